"""Prometheus metrics of an executor."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import Counter, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

METRICS = {
    "fleetloop_executor_results_total": "Dispatches answered, by outcome.",
    "fleetloop_executor_attempts_total": "Attempts at actions.",
    "fleetloop_executor_overflow_total": "What was forgotten or refused for a bound, by what it was.",
    "fleetloop_executor_action_seconds": "Wall time of an action, all attempts.",
    "fleetloop_executor_dispatch_seconds": "Fleet time from dispatch to the end of its action.",
}
"""Name -> help."""
BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class ExecutorMetrics(Collector):
    """Counts of one executor."""

    def __init__(self, executor: str) -> None:
        def counter(name: str, *labels: str) -> Counter:
            return Counter(name, METRICS[name], ["executor", *labels], registry=None)

        def histogram(name: str) -> Histogram:
            return Histogram(name, METRICS[name], ["executor"], registry=None, buckets=BUCKETS_S)

        self.executor = executor
        self._results = counter("fleetloop_executor_results_total", "outcome")
        self._attempts = counter("fleetloop_executor_attempts_total")
        self._overflow = counter("fleetloop_executor_overflow_total", "what")
        self._action_s = histogram("fleetloop_executor_action_seconds")
        self._dispatch_s = histogram("fleetloop_executor_dispatch_seconds")

    def attempt(self) -> None:
        """One attempt began."""
        self._attempts.labels(self.executor).inc()

    def overflow(self, what: str) -> None:
        """Something was left alone: `undecodable`, `slots`, `answers`."""
        self._overflow.labels(self.executor, what).inc()

    def answered(self, outcome: str, took_s: float, since_dispatch_s: float) -> None:
        """A dispatch was answered."""
        self._results.labels(self.executor, outcome).inc()
        if outcome != "skipped":
            self._action_s.labels(self.executor).observe(took_s)
            self._dispatch_s.labels(self.executor).observe(max(0.0, since_dispatch_s))

    def collect(self) -> Iterable[Metric]:
        """See Collector."""
        for one in (self._results, self._attempts, self._overflow, self._action_s, self._dispatch_s):
            yield from one.collect()
