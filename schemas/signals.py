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
        Column("parent", "i64", "The GPU that this MIG instance is a part of. Null: a whole GPU.", high=62),
        Column("gpu_type", "text", "Product name."),
        Column("status", "text", "lost: it no longer answers.", choices=("ok", "lost")),
        Column("allocated_s", "f64", "Time in the window that a replica held it, billed.", "s"),
        Column("loading_s", "f64", "... of this, while the replica started.", "s"),
        Column("draining_s", "f64", "... of this, while it drained.", "s"),
        Column("idle_s", "f64", "Time that samples saw without any activity.", "s"),
        Column("samples", "i64", "Samples in the window.", "1", required=True),
        Column(
            "covered_s",
            "f64",
            "Time that samples speak for (each until the next, at most 3 s).",
            "s",
            required=True,
        ),
        Column("util_gpu_pct_mean", "f64", "Time-weighted mean. Not capacity.", "%"),
        Column("util_mem_pct_mean", "f64", "Time-weighted mean.", "%"),
        Column("sm_active_ratio_mean", "f64", "Time-weighted mean.", "1"),
        Column("sm_occupancy_ratio_mean", "f64", "Time-weighted mean.", "1"),
        Column("dram_active_ratio_mean", "f64", "Time-weighted mean.", "1"),
        Column("tensor_active_ratio_mean", "f64", "Time-weighted mean.", "1"),
        Column("mem_used_bytes_max", "f64", "Largest value.", "By"),
        Column("mem_total_bytes", "f64", "Device memory.", "By"),
        Column("mem_gone_bytes", "f64", "Memory held for processes that no longer exist, at the end.", "By"),
        Column("processes", "i64", "Processes on it at the latest reading.", "1"),
        Column("power_w_mean", "f64", "Time-weighted mean. A MIG instance has none: it is the board's.", "W"),
        Column("power_w_max", "f64", "Largest value.", "W"),
        Column("power_limit_w", "f64", "Power cap that is enforced.", "W"),
        Column("energy_j", "f64", "Energy used in the window, from the counter.", "J"),
        Column("temp_c_max", "f64", "Largest value.", "Cel", low=-50),
        Column("throttled_s", "f64", "Time slowed by power or heat, from the counters.", "s"),
        Column("throttled_power_s", "f64", "... of this, by the power cap.", "s"),
        Column("throttled_thermal_s", "f64", "... of this, by heat or the power brake.", "s"),
        Column("sm_clock_ratio_mean", "f64", "SM clock as a share of the highest, time-weighted.", "1"),
        Column("pcie_bytes", "f64", "PCIe bytes sent and received in the window.", "By"),
        Column("nvlink_bytes", "f64", "NVLink bytes sent and received in the window.", "By"),
        Column("ecc_uncorrected", "f64", "Memory errors not corrected, in the window.", "1"),
        Column("remap_pending", "i64", "1: rows wait to be remapped; drain and reset.", high=1),
        Column("remap_failed", "i64", "1: a row could not be remapped.", high=1),
        Column("xid", "i64", "Xid error that came in the window; the last one."),
    ],
    _META,
)

NODE_WINDOWS = Columns(
    "node.windows",
    "One row a node and GPU type, under the pool `-`: what it has, what is allocated, and what that does.",
    [
        Column("node", "text", "Host name.", required=True, plain=True),
        Column("gpu_type", "text", "Product name."),
        Column("gpus", "f64", "GPUs by the inventory (MIG instances as their share).", "{gpu}", required=True),
        Column("gpus_allocated", "f64", "... of these, held by replicas at the window's end.", "{gpu}", required=True),
        Column(
            "gpus_free", "f64", "Whole GPUs that no replica holds any part of and that answer.", "{gpu}", required=True
        ),
        Column("gpus_lost", "f64", "GPUs that no longer answer.", "{gpu}", required=True),
        Column("replicas", "i64", "Replicas on it.", "1", required=True),
        Column("util_gpu_pct_mean", "f64", "Mean over its GPUs that gave it.", "%"),
        Column("sm_active_ratio_mean", "f64", "Mean over its GPUs that gave it.", "1"),
        Column("idle_s", "f64", "GPU seconds without any activity while allocated.", "s"),
        Column("power_w_mean", "f64", "Sum over its GPUs.", "W"),
        Column("energy_j", "f64", "Sum over its GPUs.", "J"),
        Column("mem_used_bytes_max", "f64", "Sum over its GPUs.", "By"),
        Column("mem_total_bytes", "f64", "Sum over its GPUs.", "By"),
        Column("mem_gone_bytes", "f64", "Memory held for processes that no longer exist.", "By"),
        Column("dropped", "f64", "Batches that its exporters dropped since their start.", "1"),
    ],
    _META,
)

INTERFERENCE_WINDOWS = Columns(
    "interference.windows",
    "One row a replica that shares a GPU, or is slower than its own load explains. Severity with its interval, and whose.",
    [
        Column("replica", "text", "The replica that may suffer.", required=True, plain=True),
        Column("node", "text", "Host name.", required=True, plain=True),
        Column(
            "victim", "i64", "1: it is slowed by another, by the rule (3 of the last 6 windows).", required=True, high=1
        ),
        Column("antagonist", "text", "By whom: a replica, or `pid/name` of a process that is part of none."),
        Column("antagonist_pool", "text", "The antagonist's pool."),
        Column("slowdown", "f64", "Time per token as a multiple of what its own load explains.", "1"),
        Column("slowdown_low", "f64", "Lower end of its 95 % interval.", "1"),
        Column("slowdown_high", "f64", "Upper end of its 95 % interval.", "1"),
        Column(
            "agreed", "f64", "What the alarm rests on: neighbours' pressure explains, and is seen, at least this.", "1"
        ),
        Column("pressure", "f64", "The antagonist's share of SM, memory or host CPU, the largest of them.", "1"),
        Column("graded", "i64", "1: pressure was measured; 0: only presence is known, and it says less.", high=1),
        Column("unexplained", "f64", "Slowness that no neighbour explains, as a multiple. Null: none.", "1"),
        Column("windows", "i64", "Windows that the model has learned from.", "1", required=True),
        Column("tpot_s", "f64", "Time per output token in the window.", "s"),
        Column("expected_tpot_s", "f64", "... that its own load explains.", "s"),
    ],
    _META,
)

_BINS = "buckets as the engine has them: upper bound, cumulative count, ..., count of all; closed windows only."


def _quantiles() -> list[Column]:
    """Quantiles from the engine's buckets, each with the bounds of the bucket that it lies in."""
    found = []
    for name, what in (("ttft_s", "TTFT"), ("tpot_s", "Time per output token")):
        for q in ("p50", "p99"):
            found += [
                Column(f"{name}_{q}", "f64", f"{what}, {q}, interpolated in its bucket. Null: no observation.", "s"),
                Column(f"{name}_{q}_low", "f64", "Lower bound of that bucket.", "s"),
                Column(f"{name}_{q}_high", "f64", "Upper bound of that bucket. Null: beyond the last.", "s"),
            ]
    return found


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
        Column("engine", "text", "What runs there: vllm, sglang, ..."),
        Column("model", "text", "Model served, as the engine names it."),
        Column(
            "answers", "i64", "1: the latest scrape answered; 0: the target is dead. Null: not scraped of late.", high=1
        ),
        Column("allocated_s", "f64", "Time in the window that it was billed.", "s", required=True),
        Column("loading_s", "f64", "... of this, while it started.", "s"),
        Column("draining_s", "f64", "... of this, while it drained.", "s"),
        Column("idle_s", "f64", "Time that scrapes saw with nothing running and nothing waiting.", "s"),
        Column("samples", "i64", "Scrapes in the window.", "1", required=True),
        Column("last_at_s", "f64", "Latest scrape that answered, Unix time. Null: never.", "s"),
        Column("covered_s", "f64", "Time that counter deltas speak for.", "s", required=True),
        Column("resets", "i64", "Restarts or counter resets seen.", "1", required=True),
        Column("missed", "i64", "Scrapes that failed or were lost on the way.", "1"),
        Column("running_mean", "f64", "Mean running batch.", "{request}"),
        Column("waiting_mean", "f64", "Mean queue.", "{request}"),
        Column("waiting_last", "f64", "Queue at the latest scrape.", "{request}"),
        Column("running_last", "f64", "Running at the latest scrape.", "{request}"),
        Column("kv_usage_ratio_mean", "f64", "Mean KV cache in use.", "1"),
        Column("kv_usage_ratio_max", "f64", "Largest KV cache in use.", "1"),
        Column("kv_capacity_tokens", "f64", "Tokens that the KV cache holds.", "{token}"),
        Column("running_max", "f64", "Largest batch that the engine admits.", "{request}"),
        Column("prompt_tokens", "f64", "Prompt tokens processed.", "{token}"),
        Column("cached_tokens", "f64", "Prompt tokens from the prefix cache.", "{token}"),
        Column("generation_tokens", "f64", "Tokens generated.", "{token}"),
        Column("requests", "f64", "Requests finished.", "{request}"),
        Column("failed", "f64", "Requests failed.", "{request}"),
        Column("aborted", "f64", "Requests given up by their client.", "{request}"),
        Column("rejected", "f64", "Requests refused.", "{request}"),
        Column("preemptions", "f64", "Requests preempted.", "{request}"),
        Column("iterations", "f64", "Engine steps.", "{step}"),
        Column("busy_s", "f64", "Time with a step under way.", "s"),
        Column("draft_tokens", "f64", "Tokens proposed by speculative decoding.", "{token}"),
        Column("accepted_tokens", "f64", "... of these, accepted.", "{token}"),
        Column("ttft_s_sum", "f64", "Time to first token, sum.", "s"),
        Column("ttft_count", "f64", "Requests in it.", "{request}"),
        Column("tpot_s_sum", "f64", "Time per output token, sum.", "s"),
        Column("tpot_count", "f64", "Observations in it.", "1"),
        Column("itl_s_sum", "f64", "Time between tokens as they come, sum.", "s"),
        Column("itl_count", "f64", "Observations in it.", "1"),
        Column("e2e_s_sum", "f64", "End-to-end latency, sum.", "s"),
        Column("e2e_count", "f64", "Requests in it.", "{request}"),
        Column("queue_s_sum", "f64", "Time in the queue, sum.", "s"),
        Column("queue_count", "f64", "Requests in it.", "{request}"),
        Column("prefill_s_sum", "f64", "Time from schedule to first token, sum.", "s"),
        Column("prefill_count", "f64", "Requests in it.", "{request}"),
        *_quantiles(),
        Column("ttft_s_bins", "bins", f"TTFT: {_BINS}", "s"),
        Column("tpot_s_bins", "bins", f"Time per output token: {_BINS}", "s"),
        Column("sm_active_ratio_mean", "f64", "Mean over its GPUs.", "1"),
        Column("dram_active_ratio_mean", "f64", "Mean over its GPUs.", "1"),
        Column("sm_clock_ratio_mean", "f64", "SM clock as a share of the highest, mean over its GPUs.", "1"),
        Column("power_w_mean", "f64", "Its share of its GPUs' power.", "W"),
        Column("energy_j", "f64", "Its share of its GPUs' energy.", "J"),
        Column("throttled_s", "f64", "Longest time that one of its GPUs was slowed by power or heat.", "s"),
    ],
    _META,
)

_HIST = "log-bucket histogram (models.sketches): pairs of bucket and count; null while the window is open"
REQUEST_WINDOWS = Columns(
    "request.windows",
    "One row a (model, tenant, class, priority): arrivals and ends of one partition; partials merge by adding. "
    "Early rows once a second while the window is open.",
    [
        Column("tenant", "text", "Who is billed.", required=True),
        Column("class", "text", "Class of request: its intent or tier.", required=True),
        Column("model", "text", "Model that was asked for, as the gateway names it."),
        Column("priority", "i64", "Priority; higher goes first. Null: none was given.", low=-1_000_000, high=1_000_000),
        Column("arrivals", "i64", "Requests that arrived in the window.", "{request}", required=True),
        Column("ends", "i64", "Requests that ended in the window, however.", "{request}", required=True),
        Column("ok", "i64", "... of these, answered.", "{request}", required=True),
        Column("errors", "i64", "... of these, failed, timed out or cancelled.", "{request}", required=True),
        Column("rejected", "i64", "... of these, refused.", "{request}", required=True),
        Column("timeouts", "i64", "Of the errors: timed out.", "{request}"),
        Column("cancelled", "i64", "Of the errors: given up by the client.", "{request}"),
        Column("retries", "i64", "Arrivals that were a second attempt or later.", "{request}"),
        Column("enriched", "i64", "Ends to which another source added what the first did not know.", "{request}"),
        Column(
            "unjoined",
            "i64",
            "Ends of the reporter that the policy does not name whose twin has not come; in no other column.",
            "{request}",
        ),
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
        Column("good_output_tokens", "f64", "... of these, for ends within their targets: goodput.", "{token}"),
        Column("image_units", "f64", "Images in the ends.", "{image}"),
        Column("audio_s", "f64", "Audio in the ends.", "s"),
        Column("video_s", "f64", "Video in the ends.", "s"),
        Column("queue_s_sum", "f64", "Time in the queue, sum over ends that gave it.", "s"),
        Column("queue_count", "i64", "Ends that gave it.", "{request}"),
        Column("ttft_s_sum", "f64", "Sum over ends that gave it.", "s", required=True),
        Column("ttft_count", "i64", "Ends that gave it.", "{request}", required=True),
        Column("tpot_s_sum", "f64", "Sum over ends that gave it.", "s", required=True),
        Column("tpot_count", "i64", "Ends that gave it.", "{request}", required=True),
        Column("e2e_s_sum", "f64", "Sum over ends that gave it.", "s", required=True),
        Column("e2e_count", "i64", "Ends that gave it.", "{request}", required=True),
        Column("ttft_s_hist", "pairs", f"TTFT: {_HIST}.", "s"),
        Column("tpot_s_hist", "pairs", f"Time per output token: {_HIST}.", "s"),
        Column("e2e_s_hist", "pairs", f"End-to-end latency: {_HIST}.", "s"),
        Column("queue_s_hist", "pairs", f"Time in the queue: {_HIST}.", "s"),
    ],
    _META,
)
