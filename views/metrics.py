"""Prometheus gauges from current rows. A value that is unknown is left out, never 0."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from views.actions import Actions
from views.rows import Rows

POOL_GAUGES = {
    "requests_per_second": ("requests_per_s", "Arrivals, mean of 60 s."),
    "capacity_requests_per_second": ("capacity_rps", "Requests/s that a replica sustains at the present mix."),
    "utilisation_ratio": ("utilisation_ratio", "Load / (ready replicas x capacity)."),
    "kv_usage_ratio": ("kv_usage_ratio", "Mean KV cache in use."),
    "running_requests": ("running", "Requests running."),
    "waiting_requests": ("waiting", "Requests waiting."),
    "slo_attainment_ratio": ("slo_attainment", "Share of the last 300 s within the targets."),
    "gpus_allocated": ("gpus_allocated", "GPUs billed."),
    "cost_usd_per_hour": ("usd_per_hour", "Cost at the present allocation."),
    "cost_usd_month_to_date": ("usd_month_to_date", "Spent in the current UTC month."),
    "evidence_timestamp_seconds": ("evidence_s", "Newest evidence, Unix time of the fleet."),
}
"""Name after fleetloop_pool_ -> (field of the pools table, help)."""
REPLICA_STATES = {"ready": "replicas_ready", "allocated": "replicas_allocated", "target": "replicas_target"}
TENANT_GAUGES = {
    "requests": ("requests", "Requests that ended within the last 300 s."),
    "cost_usd": ("usd_total", "Cost of the last 300 s, idle included."),
    "cost_usd_idle": ("usd_idle", "... of it, the share of idle GPU time."),
    "cost_usd_per_million_tokens": ("usd_per_million_tokens", "Cost per 1M tokens (in + out), idle included."),
    "cost_usd_per_million_tokens_direct": ("usd_per_million_tokens_direct", "... of busy GPU time alone."),
    "slo_attainment_ratio": ("slo_attainment", "Share of the last 300 s within the targets."),
}
"""Name after fleetloop_tenant_ -> (field of the tenants table, help)."""
GPU_GAUGES = {
    "utilisation_percent": ("util_gpu_pct_mean", "NVML utilisation of the latest window. Not capacity."),
    "power_watts": ("power_w_mean", "Mean power of the latest window."),
    "memory_used_bytes": ("mem_used_bytes_max", "Most memory used in the latest window."),
}
"""Name after fleetloop_gpu_ -> (field of the gpus table, help)."""


class RowsCollector(Collector):
    """Reads current rows; to be used on the event loop's thread."""

    def __init__(self, rows: Rows, actions: Actions, lag: Callable[[], int | None]) -> None:
        self._rows, self._actions, self._lag = rows, actions, lag

    def collect(self) -> Iterable[Metric]:
        yield from self._pools()
        yield from _gauges("tenant", TENANT_GAUGES, ("pool", "tenant"), self._rows.tables["tenants"].values())
        yield from _gauges("gpu", GPU_GAUGES, ("node", "gpu", "pool"), self._rows.tables["gpus"].values())
        yield from self._forecasts()
        yield from self._loop()
        yield from self._service()

    def _pools(self) -> Iterable[Metric]:
        pools = list(self._rows.tables["pools"].values())
        yield from _gauges("pool", POOL_GAUGES, ("pool",), pools)
        replicas = GaugeMetricFamily("fleetloop_pool_replicas", "Replicas by state.", labels=("pool", "state"))
        for row in pools:
            for state, name in REPLICA_STATES.items():
                if row[name] is not None:
                    replicas.add_metric((row["pool"], state), row[name])
        yield replicas
        for kind, name in (("ttft", "Time to first token"), ("tpot", "Time per output token")):
            labels = ("pool", "quantile")
            family = GaugeMetricFamily(f"fleetloop_pool_{kind}_seconds", f"{name}, last 60 s.", labels=labels)
            for row in pools:
                for quantile, field in (("0.5", f"{kind}_s_p50"), ("0.99", f"{kind}_s_p99")):
                    if row[field] is not None:
                        family.add_metric((row["pool"], quantile), row[field])
            yield family

    def _forecasts(self) -> Iterable[Metric]:
        labels = ("pool", "horizon_s", "quantile")
        family = GaugeMetricFamily(
            "fleetloop_forecast_requests_per_second", "Latest load forecast; quantile `mean`: expected.", labels=labels
        )
        error = GaugeMetricFamily(
            "fleetloop_forecast_mae_requests_per_second", "Its mean absolute error so far.", labels=labels[:2]
        )
        for row in self._rows.tables["forecasts"].values():
            of = (row["pool"], f"{row['horizon_s']:g}")
            for quantile, field in (("0.1", "_p10"), ("mean", ""), ("0.9", "_p90")):
                if row[f"requests_per_s{field}"] is not None:
                    family.add_metric((*of, quantile), row[f"requests_per_s{field}"])
            if row["mae"] is not None:
                error.add_metric(of, row["mae"])
        return family, error

    def _loop(self) -> Iterable[Metric]:
        rows = self._rows
        findings = GaugeMetricFamily("fleetloop_findings_open", "Open findings.", labels=("pool", "finding"))
        opened = Counter((r["pool"], r["finding"]) for r in rows.tables["findings"].values() if r["open"])
        for key, count in opened.items():
            findings.add_metric(key, count)
        decisions = GaugeMetricFamily(
            "fleetloop_decisions", "Decisions kept, by state.", labels=("pool", "kind", "state")
        )
        states = Counter((r["pool"], r["decision_kind"], r["state"]) for r in rows.tables["decisions"].values())
        for state, count in states.items():
            decisions.add_metric(state, count)
        refused = CounterMetricFamily(
            "fleetloop_refused_rows", "Rows refused, as dead letters say.", labels=("topic", "reason")
        )
        for reason, count in rows.refused.items():
            refused.add_metric(reason, count)
        return findings, decisions, refused

    def _service(self) -> Iterable[Metric]:
        rows = self._rows
        read = CounterMetricFamily("fleetloop_views_records", "Records read.", labels=("topic",))
        for topic, count in rows.records.items():
            read.add_metric((topic,), count)
        yield read
        kept = GaugeMetricFamily("fleetloop_views_rows", "Current rows.", labels=("table",))
        for name, table in rows.tables.items():
            kept.add_metric((name,), len(table))
        yield kept
        overflow = CounterMetricFamily(
            "fleetloop_views_overflow", "What found no room or could not be read.", labels=("what",)
        )
        counts = {"rows_overflow": 0, "decisions_dropped": 0, "undecodable": 0, **rows.counters}
        counts["recent_overflow"] = rows.requests.overflow + rows.costs.overflow
        for what, count in counts.items():
            overflow.add_metric((what,), count)
        yield overflow
        orders = CounterMetricFamily("fleetloop_views_orders", "Orders of people.", labels=("command", "outcome"))
        for order, count in self._actions.counts.items():
            orders.add_metric(order, count)
        yield orders
        yield GaugeMetricFamily(
            "fleetloop_views_log_timestamp_seconds", "Greatest log time read, Unix time.", value=rows.log_ms / 1000
        )
        if (lag := self._lag()) is not None:
            yield GaugeMetricFamily("fleetloop_views_lag_records", "Records not read yet.", value=lag)


def _gauges(
    what: str, gauges: dict[str, tuple[str, str]], labels: tuple[str, ...], rows: Iterable[dict[str, object]]
) -> Iterable[Metric]:
    found = list(rows)
    for name, (field, text) in gauges.items():
        family = GaugeMetricFamily(f"fleetloop_{what}_{name}", text, labels=labels)
        for row in found:
            value = row.get(field)
            if isinstance(value, int | float):
                family.add_metric([str(row[label]) for label in labels], value)
        yield family
