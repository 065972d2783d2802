"""NVIDIA Dynamo's `/metrics`: a frontend (a row a model), or a worker (the row of the engine in it).

Proved on recorded pages of Dynamo 1.6.1, both from one run with a simulated engine. A frontend and its workers see the
same requests: give them to different pools, or scrape one of the two.

A worker's page has its engine's own families (`vllm:*`, `sglang:*`) beside `dynamo_component_*`: the engine's are
taken, and of the component's what the engine does not say. Nothing is added up over the two.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from exporters.adapters.base import Adapter, Chosen, Page, Reduce, RowPlan, Series, Values
from exporters.adapters.sglang import SGLANG
from exporters.adapters.tables import Table, counter, slug, text
from exporters.adapters.vllm import VLLM

FRONTEND = Table(
    sums={
        # Until the first token; those in flight are all that have not ended.
        "waiting": ("dynamo_frontend_queued_requests",),
        "_in_flight": ("dynamo_frontend_inflight_requests",),
        "prompt_tokens": ("dynamo_frontend_input_sequence_tokens_sum",),
        "cached_tokens": ("dynamo_frontend_cached_tokens_sum",),
        "generation_tokens": (*counter("dynamo_frontend_output_tokens"), "dynamo_frontend_output_sequence_tokens_sum"),
    },
    times={
        "ttft_s": ("dynamo_frontend_time_to_first_token_seconds",),
        "itl_s": ("dynamo_frontend_inter_token_latency_seconds",),
        "e2e_s": ("dynamo_frontend_request_duration_seconds",),
    },
    sizes={
        "input_tokens": ("dynamo_frontend_input_sequence_tokens",),
        "output_tokens": ("dynamo_frontend_output_sequence_tokens",),
    },
)
REQUESTS = counter("dynamo_frontend_requests")
UNKNOWN_MODEL = "unknown_model"
"""What the frontend calls the model of requests that ask for one that it does not have."""
ERRORS = {
    "cancelled": "aborted",
    "validation": "rejected",
    "not_found": "rejected",
    "overload": "rejected",
    "not_implemented": "rejected",
}
"""`error_type` -> column; all others are `failed`."""
ENDPOINT = "generate"
"""Of a worker's endpoints the one that serves requests."""
COMPONENT = Table(
    sums={
        "running": ("dynamo_component_inflight_requests",),
        "requests": counter("dynamo_component_requests"),
        "aborted": counter("dynamo_component_cancellation"),
    },
    times={"e2e_s": ("dynamo_component_request_duration_seconds",)},
)
WORKER_ERRORS = counter("dynamo_component_errors")
OF_ABORTS = "publish_response"
"""The error that a client's going away is to a worker: counted as aborted already."""


class Dynamo:
    """The Dynamo adapter."""

    engine = "dynamo"

    def recognises(self, names: Collection[str]) -> bool:
        """Whether a family of Dynamo's is there: before vLLM and SGLang, whose names its workers emit."""
        return any(name.startswith(("dynamo_frontend_", "dynamo_component_")) for name in names)

    def plan(self, series: Sequence[Series], chosen: Chosen) -> list[RowPlan]:
        """A row a model of a frontend; a row an engine of a worker."""
        page = Page(series)
        if any(name.startswith("dynamo_frontend_") for name in page.by_name):
            return _frontend(page, chosen)
        return _worker(page, series, chosen)


def _frontend(page: Page, chosen: Chosen) -> list[RowPlan]:
    names = [name for names in FRONTEND.sums.values() for name in names]
    families = [f"{name}_count" for names in FRONTEND.times.values() for name in names]
    plans = []
    for model in page.values_of("model", [*names, *families, *REQUESTS]):
        if model in ("", UNKNOWN_MODEL):
            continue

        def mine(labels: Mapping[str, str], model: str = model) -> bool:
            return labels.get("model") == model

        columns, histograms = FRONTEND.fill(page, chosen, mine, model)
        columns |= _ended(page, page.find(chosen.pick(f"{model}/requests", REQUESTS, page.by_name), mine))
        columns["start_s"] = page.start()
        plans.append(RowPlan(columns, slug(model), texts=text(model), histograms=histograms, finish=_running))
    return plans


def _ended(page: Page, found: Sequence[int]) -> dict[str, Reduce]:
    parts: dict[str, list[int]] = {"requests": [], "failed": [], "rejected": [], "aborted": []}
    for index in found:
        labels = page.series[index].labels
        ok = labels.get("status", "success") == "success"
        parts["requests" if ok else ERRORS.get(labels.get("error_type", ""), "failed")].append(index)
    return {column: Reduce(tuple(indices)) for column, indices in parts.items()}


def _running(values: Values) -> dict[str, float | None]:
    """Those in flight that have had their first token. The two gauges are not read in one instant: never below 0."""
    total, waiting = values.get("_in_flight"), values.get("waiting")
    return {"running": None if total is None or waiting is None else max(total - waiting, 0.0)}


def _worker(page: Page, series: Sequence[Series], chosen: Chosen) -> list[RowPlan]:
    def mine(labels: Mapping[str, str]) -> bool:
        return labels.get("dynamo_endpoint", ENDPOINT) == ENDPOINT

    component, histograms = COMPONENT.fill(page, chosen, mine, "component")
    name = chosen.pick("component/failed", WORKER_ERRORS, page.by_name)
    component["failed"] = Reduce(
        tuple(i for i in page.find(name, mine) if series[i].labels.get("error_type") != OF_ABORTS)
    )
    component["start_s"] = page.start()
    engines = VLLM.plan(series, chosen) or SGLANG.plan(series, chosen)
    if not engines:
        given = any(reduce.indices for reduce in component.values())
        return [RowPlan(component, histograms=histograms)] if given else []
    if len(engines) > 1:
        return engines  # the component's counts are of all of them together
    (one,) = engines
    said = {column: reduce for column, reduce in one.columns.items() if reduce.indices}
    return [replace(one, columns={**component, **said})]


DYNAMO: Adapter = Dynamo()
