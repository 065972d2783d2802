"""Triton Inference Server's `/metrics`, with what its TensorRT-LLM backend adds: a row a model.

Counters are in microseconds. Proved on recorded pages of 2.51.0 and of about 23.x, and on the sample in the backend's
documentation.

Not taken: compute durations are summed by request, so that a batch counts once for each request in it: no busy time.
Summaries repeat the counters. `nv_gpu_*` names GPUs by uuid alone. A request to an ensemble counts for the ensemble and
for each of its members.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from exporters.adapters.base import Adapter, Chosen, Page, Reduce, RowPlan, Series, Values
from exporters.adapters.tables import Where, slug, text

US = 1e-6
SUCCESS, FAILURE = "nv_inference_request_success", "nv_inference_request_failure"
COLUMNS = {
    "requests": (SUCCESS, 1.0),
    "iterations": ("nv_inference_exec_count", 1.0),
    "waiting": ("nv_inference_pending_request_count", 1.0),
    "e2e_s_sum": ("nv_inference_request_duration_us", US),
    "e2e_count": (SUCCESS, 1.0),
    "queue_s_sum": ("nv_inference_queue_duration_us", US),
    "queue_count": (SUCCESS, 1.0),
}
"""Column -> counter or gauge, and its unit in ours. Summed over the versions of a model."""
REASONS = {"REJECTED": "rejected", "CANCELED": "aborted"}
"""Of FAILURE -> column; all others, and failures without a reason, are `failed`."""
IN_FLIGHT = {
    "running": ("nv_trt_llm_request_metrics", "request_type", "scheduled"),
    "waiting": ("nv_trt_llm_request_metrics", "request_type", "waiting"),
    "running_max": ("nv_trt_llm_request_metrics", "request_type", "max"),
    "kv_usage_ratio": ("nv_trt_llm_kv_cache_block_metrics", "kv_cache_block_type", "fraction"),
    "_blocks": ("nv_trt_llm_kv_cache_block_metrics", "kv_cache_block_type", "max"),
    "_tokens_per_block": ("nv_trt_llm_kv_cache_block_metrics", "kv_cache_block_type", "tokens_per"),
    "iterations": ("nv_trt_llm_general_metrics", "general_type", "iteration_counter"),
}
"""TensorRT-LLM: column -> family, and the label that is the real name. Better than COLUMNS where both are there."""
FAMILIES = frozenset({FAILURE, *(name for name, _ in COLUMNS.values()), *(name for name, _, _ in IN_FLIGHT.values())})


class Triton:
    """The Triton adapter."""

    engine = "triton"

    def recognises(self, names: Collection[str]) -> bool:
        """Whether one of Triton's own families is there."""
        return any(name.startswith(("nv_inference_", "nv_trt_llm_")) for name in names)

    def plan(self, series: Sequence[Series], chosen: Chosen) -> list[RowPlan]:
        """A row a model."""
        page = Page(series)
        models = page.values_of("model", [name for name in page.by_name if name in FAMILIES])
        return [_row(page, model) for model in models if model]


def _row(page: Page, model: str) -> RowPlan:
    def mine(labels: Mapping[str, str]) -> bool:
        return labels.get("model") == model

    columns = {column: Reduce(page.find(name, mine), "sum", scale) for column, (name, scale) in COLUMNS.items()}
    columns |= _failures(page, mine)
    for column, (family, of, value) in IN_FLIGHT.items():
        found = page.find(family, lambda labels, of=of, value=value: mine(labels) and labels.get(of) == value)
        if found:
            columns[column] = Reduce(found, "mean" if column == "kv_usage_ratio" else "sum")
    columns["start_s"] = page.start()
    return RowPlan(columns, key=slug(model), texts=text(model), finish=_capacity)


def _failures(page: Page, mine: Where) -> dict[str, Reduce]:
    parts: dict[str, list[int]] = {"failed": [], "rejected": [], "aborted": []}
    for index in page.find(FAILURE, mine):
        parts[REASONS.get(page.series[index].labels.get("reason", ""), "failed")].append(index)
    return {column: Reduce(tuple(found)) for column, found in parts.items()}


def _capacity(values: Values) -> dict[str, float | None]:
    blocks, tokens = values.get("_blocks"), values.get("_tokens_per_block")
    return {"kv_capacity_tokens": None if blocks is None or tokens is None else blocks * tokens}


TRITON: Adapter = Triton()
