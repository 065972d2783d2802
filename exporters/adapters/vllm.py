"""vLLM's `/metrics`, over its versions (v0 and v1, with `_total` or without), and llm-d-inference-sim's.

Proved on recorded pages of vLLM 0.4.3 and 0.32.0, of llm-d-inference-sim 0.10.2 and of a Dynamo worker.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from exporters.adapters.base import Adapter, Chosen, Page, Reduce, RowPlan, Series, number
from exporters.adapters.tables import Table, Where, counter, label, slug, text

TABLE = Table(
    sums={
        "running": ("vllm:num_requests_running",),
        "waiting": ("vllm:num_requests_waiting",),
        "prompt_tokens": counter("vllm:prompt_tokens"),
        # gpu_prefix_cache_hits of earlier versions counts blocks, in later ones tokens: it is not taken.
        "cached_tokens": counter("vllm:prompt_tokens_cached", "vllm:prefix_cache_hits"),
        "generation_tokens": counter("vllm:generation_tokens"),
        "preemptions": counter("vllm:num_preemptions"),
        # A histogram despite its name: one observation a step.
        "iterations": ("vllm:iteration_tokens_total_count", "vllm:iteration_tokens_count"),
        "draft_tokens": counter("vllm:spec_decode_num_draft_tokens"),
        "accepted_tokens": counter("vllm:spec_decode_num_accepted_tokens"),
    },
    # 0 to 1 despite the names.
    means={"kv_usage_ratio": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")},
    times={
        "ttft_s": ("vllm:time_to_first_token_seconds",),
        "tpot_s": ("vllm:request_time_per_output_token_seconds",),
        # One observation a token, or a message where speculative decoding is on. The second is its earlier name.
        "itl_s": ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"),
        "e2e_s": ("vllm:e2e_request_latency_seconds",),
        "queue_s": ("vllm:request_queue_time_seconds",),
        "prefill_s": ("vllm:request_prefill_time_seconds",),
    },
    sizes={
        "input_tokens": ("vllm:request_prompt_tokens",),
        "output_tokens": ("vllm:request_generation_tokens",),
    },
)
ENDED = counter("vllm:request_success")
"""Requests that ended, by `finished_reason` (`finish_reason` in the simulator)."""
OTHERWISE = {"abort": "aborted", "error": "failed"}
"""Reason -> column; all others are requests that finished."""
E2E_COUNT = "vllm:e2e_request_latency_seconds_count"
"""Requests that finished, where nothing else says it."""
REJECTED = counter("vllm:admission_rejections")
"""The only family without `engine`: it is the server's."""
CONFIG = "vllm:cache_config_info"
CREATED = ("vllm:generation_tokens", "vllm:num_preemptions")
MARKS = frozenset(
    {
        *(name for names in (*TABLE.sums.values(), *TABLE.means.values()) for name in names),
        *(f"{name}_count" for names in TABLE.times.values() for name in names),
        *ENDED,
    }
)
"""What says that there is an engine: one of these."""


class Vllm:
    """The vLLM adapter."""

    engine = "vllm"

    def recognises(self, names: Collection[str]) -> bool:
        """Whether one of the engine's own families is there."""
        return not MARKS.isdisjoint(names)

    def plan(self, series: Sequence[Series], chosen: Chosen) -> list[RowPlan]:
        """A row an engine (data parallel rank) of the page."""
        page = Page(series)
        engines = page.values_of("engine", [name for name in page.by_name if name in MARKS])
        return [_row(page, chosen, engine, len(engines)) for engine in engines]


def _row(page: Page, chosen: Chosen, engine: str, engines: int) -> RowPlan:
    def mine(labels: Mapping[str, str]) -> bool:
        return labels.get("engine", "") == engine

    columns, histograms = TABLE.fill(page, chosen, mine, engine)
    columns |= _ends(page, chosen, mine, engine)
    if engines == 1:
        columns["rejected"] = Reduce(page.find(chosen.pick("rejected", REJECTED, page.by_name)))
    columns["start_s"] = page.start(CREATED)
    of_engine = [i for i, one in enumerate(page.series) if one.name in MARKS and mine(one.labels)]
    return RowPlan(
        columns,
        key=slug(engine),
        texts=text(label(page, ("model_name",), of_engine)),
        fixed=_capacity(page, mine, engines),
        histograms=histograms,
    )


def _ends(page: Page, chosen: Chosen, mine: Where, key: str) -> dict[str, Reduce]:
    name = chosen.pick(f"{key}/requests", (*ENDED, E2E_COUNT), page.by_name)
    if name == E2E_COUNT:
        return {"requests": Reduce(page.find(name, mine))}

    def reason(labels: Mapping[str, str]) -> str:
        return labels.get("finished_reason") or labels.get("finish_reason", "")

    def by(wanted: Callable[[str], bool]) -> Reduce:
        return Reduce(page.find(name, lambda labels: mine(labels) and wanted(reason(labels))))

    found = {column: by(lambda r, one=one: r == one) for one, column in OTHERWISE.items()}
    return {"requests": by(lambda r: r not in OTHERWISE), **found}


def _capacity(page: Page, mine: Where, engines: int) -> dict[str, float]:
    """Tokens that the KV cache of this engine holds. v0 names no model and no engine there."""
    found = page.find(CONFIG, mine) or page.find(CONFIG, lambda labels: "engine" not in labels)
    if not found:
        return {}
    labels = page.series[found[0]].labels
    tokens = number(labels.get("kv_cache_size_tokens"))
    blocks, size = number(labels.get("num_gpu_blocks")), number(labels.get("block_size"))
    if tokens is None and blocks is not None and size is not None:
        # With data parallelism each engine says the sum over all of them.
        tokens = blocks * size / engines
    return {"kv_capacity_tokens": tokens} if tokens is not None and 0 < tokens < 1e15 else {}


VLLM: Adapter = Vllm()
