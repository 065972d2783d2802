"""Prometheus metrics of a level, collected from what its loop left for other threads to read."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from streams.level import LevelApp

PARTITION_COUNTERS = {
    "records": "Records folded (again after a restore).",
    "batches": "Coalesced batches folded.",
    "fold_seconds": "Time spent in the fold.",
    "results": "Results published.",
    "dead_letters": "Records or rows refused.",
    "ticks": "Ticks appended to a silent partition.",
    "checkpoints": "Checkpoints written and committed.",
    "checkpoints_failed": "Checkpoints not written for an operating error.",
    "fold_errors": "Records at which the fold raised.",
    "holes": "Holes in the offsets, read once more and accepted.",
    "hole_offsets": "Offsets that the log does not have.",
    "sends_failed": "Results that were not acknowledged.",
    "send_restores": "Restores after a failed send.",
    "results_too_large": "Results larger than their topic takes.",
    "metrics_errors": "Exceptions of a fold's metrics().",
}
"""Counter -> help; exposed as fleetloop_<counter>_total{level,partition}."""
PARTITION_GAUGES = {
    "lag_records": "Records not folded yet.",
    "log_time_lag_seconds": "Wall time since the last folded record was appended.",
    "dump_seconds": "Time that the last dump took.",
    "checkpoint_age_seconds": "Time since the last checkpoint.",
    "checkpoint_bytes": "Size of the last dump, uncompressed.",
    "results_pending": "Results not yet acknowledged.",
    "partition_stopped": "1 where the fold raised too often and the partition no longer goes on.",
}
"""Gauge -> help; exposed as fleetloop_<gauge>{level,partition}."""
LEVEL_GAUGES = {
    "ready": "1 when assigned, restored and not too far behind.",
    "partitions_assigned": "Partitions of this process.",
    "restores": "Rebalances after which partitions were restored.",
    "restore_seconds": "Time that the last restore took.",
    "commits_refused": "Commits that the group refused.",
    "rebalances": "Rebalances seen.",
}
"""Gauge -> help; exposed as fleetloop_<gauge>{level}."""
LABELS = ["level", "partition"]
FOLD_PREFIX = "fleetloop_fold_"
"""What a fold's metrics() names x is exposed as fleetloop_fold_x{level,partition}."""


class LevelCollector(Collector):
    """Reads a LevelApp; safe on any thread."""

    def __init__(self, level_app: LevelApp) -> None:
        self._level = level_app

    def collect(self) -> Iterable[Metric]:
        """All families of this level."""
        level, keeper = self._level.level, self._level.keeper
        states = list(keeper.states.values())
        for name, text in PARTITION_COUNTERS.items():
            counter = CounterMetricFamily(f"fleetloop_{name}", text, labels=LABELS)
            for s in states:
                counter.add_metric([level, str(s.partition)], s.fold_s if name == "fold_seconds" else s.counts[name])
            yield counter
        now, wall_ms = time.monotonic(), time.time() * 1000
        values = {
            "lag_records": [s.lag_seen for s in states],
            "log_time_lag_seconds": [
                max(0.0, (wall_ms - s.last_append_ms) / 1000) if s.last_append_ms else 0.0 for s in states
            ],
            "dump_seconds": [s.dump_s for s in states],
            "checkpoint_age_seconds": [now - s.checkpoint_at for s in states],
            "checkpoint_bytes": [s.checkpoint_bytes for s in states],
            "results_pending": [len(s.pending) for s in states],
            "partition_stopped": [float(bool(s.stopped)) for s in states],
        }
        for name, text in PARTITION_GAUGES.items():
            gauge = GaugeMetricFamily(f"fleetloop_{name}", text, labels=LABELS)
            for s, value in zip(states, values[name], strict=True):
                gauge.add_metric([level, str(s.partition)], float(value))
            yield gauge
        yield from self._of_level(level)
        folds: dict[str, Metric] = {}
        for s in states:
            for name, value in s.fold_metrics.items():
                family = folds.get(name)
                if family is None:
                    # A name that ends with _total is a counter by convention.
                    kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
                    family = folds[name] = kind(
                        FOLD_PREFIX + name.removesuffix("_total"), "As the fold counts it.", labels=LABELS
                    )
                family.add_metric([level, str(s.partition)], value)
        yield from folds.values()

    def _of_level(self, level: str) -> Iterable[Metric]:
        vault = self._level.keeper.vault
        values = {
            "ready": float(not self._level.ready()),
            "partitions_assigned": len(self._level.keeper.states),
            "restores": vault.restores,
            "restore_seconds": vault.restore_s,
            "commits_refused": vault.commits_refused,
            "rebalances": self._level.app.rebalancing_count,
        }
        for name, text in LEVEL_GAUGES.items():
            gauge = GaugeMetricFamily(f"fleetloop_{name}", text, labels=["level"])
            gauge.add_metric([level], float(values[name]))
            yield gauge


def metrics_table() -> list[tuple[str, str]]:
    """(metric, description) of every metric of a level, for the documentation."""
    rows = [(f"fleetloop_{name}_total{{level,partition}}", text) for name, text in PARTITION_COUNTERS.items()]
    rows += [(f"fleetloop_{name}{{level,partition}}", text) for name, text in PARTITION_GAUGES.items()]
    rows += [(f"fleetloop_{name}{{level}}", text) for name, text in LEVEL_GAUGES.items()]
    return [*rows, (FOLD_PREFIX + "<name>{level,partition}", "Each counter and gauge of the level's fold.")]
