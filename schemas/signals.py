"""Pool level input: windows per GPU, replica and (tenant, class). All are upserts.

A window is named by (pool, kind, start, source); source is the `topic/partition` that it was folded from. Its
`version` is the offset there that it rests on: a consumer keeps the greatest and merges sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from schemas.columns import Column, Columns

_META = {
    "pool": "The pool; equals the Kafka key.",
    "source": "topic/partition that this was folded from.",
    "version": "Offset there that this rests on.",
    "start_s": "Start of the window, Unix s.",
    "size_s": "Length of the window, s (10).",
    "until_s": "Log time up to which the source had been read, Unix s.",
    "closed": "1: the window has closed (later rows revise it); 0: an early look at an open window.",
}


class WindowName(NamedTuple):
    """The name of a window, from a batch's metadata."""

    pool: str
    source: str
    start_s: int
    version: int
    until_s: float
    closed: bool

    @classmethod
    def of(cls, meta: Mapping[str, str]) -> WindowName:
        """Raises KeyError or ValueError where the metadata is not a window's."""
        return cls(
            meta["pool"],
            meta["source"],
            int(meta["start_s"]),
            int(meta["version"]),
            float(meta["until_s"]),
            meta["closed"] == "1",
        )

    def meta(self, size_s: int = 10) -> dict[str, str]:
        """The metadata of a batch with this name."""
        return {
            "pool": self.pool,
            "source": self.source,
            "version": str(self.version),
            "start_s": str(self.start_s),
            "size_s": str(size_s),
            "until_s": f"{self.until_s:.3f}",
            "closed": "1" if self.closed else "0",
        }


GPU_WINDOWS = Columns(
    "gpu.windows",
    "Utilisation per GPU and window, time-weighted. GPUs that serve no pool come under the pool `-`.",
    [
        Column("node", "text", "Host name.", required=True, plain=True),
        Column("gpu", "i64", "Index on the node.", required=True, high=1023),
        Column("gpu_type", "text", "Product name."),
        Column("status", "text", "lost: it no longer answers.", choices=("ok", "lost")),
        Column("samples", "i64", "Samples in the window.", "1", required=True),
        Column(
            "covered_s",
            "f64",
            "Time that samples speak for (each until the next, at most 3 s).",
            "s",
            required=True,
        ),
        Column("util_gpu_pct_mean", "f64", "Time-weighted mean. Not capacity.", "%"),
        Column("sm_active_ratio_mean", "f64", "Time-weighted mean.", "1"),
        Column("dram_active_ratio_mean", "f64", "Time-weighted mean.", "1"),
        Column("tensor_active_ratio_mean", "f64", "Time-weighted mean.", "1"),
        Column("mem_used_bytes_max", "f64", "Largest value.", "By"),
        Column("mem_total_bytes", "f64", "Device memory.", "By"),
        Column("power_w_mean", "f64", "Time-weighted mean.", "W"),
        Column("energy_j", "f64", "Energy used in the window, from the counter.", "J"),
        Column("temp_c_max", "f64", "Largest value.", "Cel", low=-50),
        Column("throttled_s", "f64", "Time slowed by power or heat, from the counters.", "s"),
    ],
    _META,
)

ENGINE_WINDOWS = Columns(
    "engine.windows",
    "One row a replica: what it holds (from the inventory) and what it did (from its counters). "
    "Early rows once a second while the window is open.",
    [
        Column("replica", "text", "Name of the replica.", required=True, plain=True),
        Column("node", "text", "Host name.", required=True, plain=True),
        Column(
            "state",
            "text",
            "Latest state by the inventory; unknown: the node has said nothing for 90 s.",
            required=True,
            choices=("starting", "ready", "draining", "asleep", "failed", "unknown"),
        ),
        Column("billed", "i64", "1: its GPUs are paid for now.", required=True, high=1),
        Column("gpus", "f64", "GPUs that are billed to it (shares count as fractions).", "{gpu}", required=True),
        Column("gpu_type", "text", "Product name."),
        Column("allocated_s", "f64", "Time in the window that it was billed.", "s", required=True),
        Column("samples", "i64", "Scrapes in the window.", "1", required=True),
        Column("last_at_s", "f64", "Latest scrape that answered, Unix time. Null: never.", "s"),
        Column("covered_s", "f64", "Time that counter deltas speak for.", "s", required=True),
        Column("resets", "i64", "Restarts or counter resets seen.", "1", required=True),
        Column("running_mean", "f64", "Mean running batch.", "{request}"),
        Column("waiting_mean", "f64", "Mean queue.", "{request}"),
        Column("waiting_last", "f64", "Queue at the latest scrape.", "{request}"),
        Column("running_last", "f64", "Running at the latest scrape.", "{request}"),
        Column("kv_usage_ratio_mean", "f64", "Mean KV cache in use.", "1"),
        Column("kv_usage_ratio_max", "f64", "Largest KV cache in use.", "1"),
        Column("prompt_tokens", "f64", "Prompt tokens processed.", "{token}"),
        Column("cached_tokens", "f64", "Prompt tokens from the prefix cache.", "{token}"),
        Column("generation_tokens", "f64", "Tokens generated.", "{token}"),
        Column("requests", "f64", "Requests finished.", "{request}"),
        Column("preemptions", "f64", "Requests preempted.", "{request}"),
        Column("iterations", "f64", "Engine steps.", "{step}"),
        Column("ttft_s_sum", "f64", "Time to first token, sum.", "s"),
        Column("ttft_count", "f64", "Requests in it.", "{request}"),
        Column("tpot_s_sum", "f64", "Time per output token, sum.", "s"),
        Column("tpot_count", "f64", "Observations in it.", "1"),
        Column("e2e_s_sum", "f64", "End-to-end latency, sum.", "s"),
        Column("e2e_count", "f64", "Requests in it.", "{request}"),
    ],
    _META,
)

_HIST = "log-bucket histogram (models.sketches): pairs of bucket and count; null while the window is open"
REQUEST_WINDOWS = Columns(
    "request.windows",
    "One row a (tenant, class): arrivals and ends of one partition; partials merge over sources by adding. "
    "Early rows once a second while the window is open.",
    [
        Column("tenant", "text", "Who is billed.", required=True),
        Column("class", "text", "Class of request.", required=True),
        Column("arrivals", "i64", "Requests that arrived in the window.", "{request}", required=True),
        Column("ends", "i64", "Requests that ended in the window, however.", "{request}", required=True),
        Column("ok", "i64", "... of these, answered.", "{request}", required=True),
        Column("errors", "i64", "... of these, failed, timed out or cancelled.", "{request}", required=True),
        Column("rejected", "i64", "... of these, refused.", "{request}", required=True),
        Column(
            "slo_judged",
            "i64",
            "Ends to which a target applies (all but cancelled ones).",
            "{request}",
            required=True,
        ),
        Column("slo_good", "i64", "... of these, within TTFT and TPOT targets.", "{request}", required=True),
        Column("arrival_input_tokens", "f64", "Prompt tokens of the arrivals that gave them.", "{token}"),
        Column("input_tokens", "f64", "Prompt tokens of the ends.", "{token}", required=True),
        Column("cached_tokens", "f64", "... of these, from the prefix cache.", "{token}", required=True),
        Column("output_tokens", "f64", "Tokens generated for the ends.", "{token}", required=True),
        Column("ttft_s_sum", "f64", "Sum over ends that gave it.", "s", required=True),
        Column("ttft_count", "i64", "Ends that gave it.", "{request}", required=True),
        Column("tpot_s_sum", "f64", "Sum over ends that gave it.", "s", required=True),
        Column("tpot_count", "i64", "Ends that gave it.", "{request}", required=True),
        Column("e2e_s_sum", "f64", "Sum over ends that gave it.", "s", required=True),
        Column("e2e_count", "i64", "Ends that gave it.", "{request}", required=True),
        Column("ttft_s_hist", "pairs", f"TTFT: {_HIST}.", "s"),
        Column("tpot_s_hist", "pairs", f"Time per output token: {_HIST}.", "s"),
        Column("e2e_s_hist", "pairs", f"End-to-end latency: {_HIST}.", "s"),
    ],
    _META,
)
