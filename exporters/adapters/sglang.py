"""SGLang's `/metrics`, from 0.3.5 to 0.5. Needs `--enable-metrics` there.

Proved on recorded pages of 0.3.5, 0.4.0 and 0.4.3; the names of 0.5 are those of its source (metrics_collector.py of
0.5.23), of which no page was recorded.

Not taken: `cache_hit_rate` (percent in some versions, a share in others, and no counter) and `num_retracted_reqs` (a
gauge of the last step; the counter `num_retracted_requests_total` is taken).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from exporters.adapters.base import Adapter, Chosen, Page, Reduce, RowPlan, Series, number
from exporters.adapters.tables import Names, Table, label, text

REQUESTS = Table(
    # Counted once a server, by its tokenizer.
    sums={
        "prompt_tokens": ("sglang:prompt_tokens_total",),
        "cached_tokens": ("sglang:cached_tokens_total",),
        "generation_tokens": ("sglang:generation_tokens_total",),
        "requests": ("sglang:num_requests_total", "sglang:e2e_request_latency_seconds_count"),
        "aborted": ("sglang:num_aborted_requests_total",),
    },
    times={
        "ttft_s": ("sglang:time_to_first_token_seconds",),
        "tpot_s": ("sglang:request_time_per_output_token_seconds",),
        # One observation a token that was streamed. The second is its earlier name.
        "itl_s": ("sglang:inter_token_latency_seconds", "sglang:time_per_output_token_seconds"),
        "e2e_s": ("sglang:e2e_request_latency_seconds",),
    },
    sizes={
        "input_tokens": ("sglang:prompt_tokens_histogram", "sglang:request_prompt_tokens"),
        "output_tokens": ("sglang:generation_tokens_histogram", "sglang:request_generation_tokens"),
    },
)
SCHEDULER: dict[str, Names] = {
    "running": ("sglang:num_running_reqs", "sglang:num_requests_running"),
    "waiting": ("sglang:num_queue_reqs", "sglang:num_requests_waiting", "sglang:queue_req"),
    "kv_usage_ratio": ("sglang:token_usage",),
    "kv_capacity_tokens": ("sglang:max_total_num_tokens",),
    "running_max": ("sglang:max_running_requests",),
    "preemptions": ("sglang:num_retracted_requests_total",),
    "busy_s": ("sglang:forward_execution_seconds_total",),
}
"""Said by the schedulers, each rank of which may repeat it."""
MEANS = ("kv_usage_ratio", "busy_s")
"""Of these the mean over data parallel ranks, of the others the sum."""
QUEUE = Table(times={"queue_s": ("sglang:queue_time_seconds", "sglang:waiting_request_latency_seconds")})
"""Said by the schedulers too."""
RANKS = ("pp_rank", "tp_rank", "moe_ep_rank")
Labels = Mapping[str, str]


class Sglang:
    """The SGLang adapter."""

    engine = "sglang"

    def recognises(self, names: Collection[str]) -> bool:
        """Whether a family of SGLang is there."""
        return any(name.startswith("sglang:") for name in names)

    def plan(self, series: Sequence[Series], chosen: Chosen) -> list[RowPlan]:
        """One row: what is counted by request is not told apart by data parallel rank."""
        page = Page(series)
        leads = _leaders(series)

        def leading(labels: Labels) -> bool:
            ranks = _ranks(labels)
            return ranks is None or leads[labels.get("dp_rank", "")] == ranks

        columns, histograms = REQUESTS.fill(page, chosen)
        waits, distribution = QUEUE.fill(page, chosen, leading)
        for column, names in SCHEDULER.items():
            name = chosen.pick(column, names, page.by_name)
            # With priorities on, a series each and one, without a value of the label, for all.
            total = page.find(name, lambda labels: leading(labels) and not labels.get("priority"))
            found = total or page.find(name, leading)
            replicas = {series[i].labels.get("dp_rank", "") for i in found}
            columns[column] = Reduce(found, "sum", 1.0 / len(replicas) if column in MEANS and replicas else 1.0)
        columns["start_s"] = page.start()
        named = [i for i, one in enumerate(series) if one.name.startswith("sglang:") and "func_latency" not in one.name]
        model = text(label(page, ("model_name", "name"), named))
        return [RowPlan(columns | waits, texts=model, histograms=histograms | distribution)] if named else []


def _ranks(labels: Labels) -> tuple[float, ...] | None:
    """Place in the tensor, pipeline and expert parallel groups; None where the labels say none."""
    if not any(rank in labels for rank in RANKS):
        return None
    return tuple(number(labels.get(rank)) or 0.0 for rank in RANKS)


def _leaders(series: Sequence[Series]) -> dict[str, tuple[float, ...]]:
    """Data parallel rank -> the first of its ranks: the others repeat what it says."""
    found: dict[str, tuple[float, ...]] = {}
    for one in series:
        ranks = _ranks(one.labels)
        if ranks is not None and one.name.startswith("sglang:"):
            replica = one.labels.get("dp_rank", "")
            found[replica] = min(found.get(replica, ranks), ranks)
    return found


SGLANG: Adapter = Sglang()
