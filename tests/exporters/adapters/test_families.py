"""What holds for every adapter: families that are missing take their columns away and change no other."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exporters.adapters import ADAPTERS
from exporters.adapters.base import Chosen, Series
from exporters.exposition import PageError
from exporters.planned import Read
from tests.exporters.adapters.pages import read, text_of, without

PAGES = [
    "vllm-0.32.0-cpu-overload.prom",
    "vllm-0.32.0-cpu-dp2-busy.prom",
    "vllm-v0.4-opt125m.prom",
    "vllm-0.32.0-cpu-ngram-specdecode-excerpt.prom",
    "dcgm-exporter-a800-mig-dcp.prom",
    "dcgm-exporter-t4-edited.prom",
    "sglang-0.3.5-gemma2-name-label.prom",
    "sglang-0.4.3-llama8b-overload.prom",
    "triton-2.51.0-cpu-busy.prom",
    "triton-2023-t4-summaries.prom",
    "triton-trtllm-inflight.prom",
    "dynamo-1.6.1-frontend.prom",
    "dynamo-1.6.1-mocker-worker.prom",
]
OTHERWISE = {
    "start_s": "the start of the counters stands for that of the process, seconds later",
    "requests": "observations of the whole latency stand for ends, where those are not counted by reason",
}
"""Columns that another family says in other figures, and why."""


@cache
def _whole(name: str) -> tuple[str, dict[tuple[str, str], Read], tuple[str, ...]]:
    text = text_of(Path(os.environ["FLEETLOOP_DATA"]), name)
    samples = [line for line in text.split("\n") if line and not line.startswith("#")]
    names = {re.match(r"[\w:]+", line)[0]: None for line in samples}  # type: ignore[index]
    families = {re.sub(r"_(bucket|sum|count|total|created)$", "", one): None for one in names}
    return text, {(row.plan.node, row.plan.key): row for row in read(text)}, tuple(families)


@pytest.mark.parametrize("name", PAGES)
@settings(max_examples=15)
@given(data=st.data())
def test_a_missing_family_is_null_and_touches_nothing_else(data_dir: Path, name: str, data: st.DataObject) -> None:
    """Any families gone: every column and bucket that is still there is what it was; no row is made up."""
    text, whole, families = _whole(name)
    gone = data.draw(st.sets(st.sampled_from(families)))
    left = without(text, lambda one: re.sub(r"_(bucket|sum|count|total|created)$", "", one) in gone)
    try:
        rows = read(left)
    except PageError:
        return  # nothing of an engine is left
    for row in rows:
        before = whole[row.plan.node, _key(name, row)]
        for column, value in row.values.items():
            if value is not None and column not in _may_differ(name):
                assert value == before.values[column], column
        for what, flat in row.bins.items():
            if what not in _may_differ(name):
                assert flat == before.bins[what], what


def _key(name: str, row: Read) -> str:
    """A worker's row without families of its engine is the component's; else it is the engine's."""
    return row.plan.key or ("0" if "worker" in name else "")


def _may_differ(name: str) -> set[str]:
    more = {"running", "e2e_s", "e2e_s_sum", "e2e_count"} if "worker" in name else set()
    return more | set(OTHERWISE)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.engine)
@given(st.data())
def test_no_labels_and_no_names_make_an_adapter_raise(adapter: object, data: st.DataObject) -> None:
    """Whatever a page calls its series, a plan is made, and only of series that are there."""
    names = st.sampled_from(
        [
            *("vllm:num_requests_running", "vllm:cache_config_info", "vllm:request_success_total"),
            *("vllm:time_to_first_token_seconds_bucket", "vllm:time_to_first_token_seconds_count"),
            *("DCGM_FI_DEV_FB_USED", "DCGM_FI_PROF_SM_ACTIVE", "DCGM_FI_DEV_GPU_UTIL_RATIO"),
            *("sglang:num_running_reqs", "sglang:queue_time_seconds_count", "sglang:queue_time_seconds_bucket"),
            *("tgi_request_failure", "tgi_request_duration_bucket", "tgi_request_duration_count"),
            *("nv_inference_request_failure", "nv_inference_request_success", "nv_trt_llm_request_metrics"),
            *("dynamo_frontend_requests_total", "dynamo_component_errors_total", "dynamo_frontend_queued_requests"),
        ]
    )
    keys = st.sampled_from(
        [
            *("le", "engine", "model", "model_name", "name", "gpu", "GPU_I_ID", "UUID", "GPU_I_PROFILE", "hostname"),
            *("pod", "namespace", "tp_rank", "dp_rank", "priority", "reason", "err", "status", "block_size"),
            *("num_gpu_blocks", "kv_cache_size_tokens", "dynamo_endpoint", "error_type", "modelName"),
        ]
    )
    values = st.sampled_from(["0", "1", "NaN", "+Inf", "-1", "1e300", "", "a/b", "None"]) | st.text(max_size=300)
    labels = st.dictionaries(keys, values, max_size=6)
    series = [Series(n, found) for n, found in data.draw(st.lists(st.tuples(names, labels), max_size=12))]
    for plan in adapter.plan(series, Chosen()):  # type: ignore[attr-defined]
        used = [i for reduce in plan.columns.values() for i in reduce.indices]
        used += [i for buckets in plan.histograms.values() for i in buckets.count]
        assert all(0 <= i < len(series) for i in used)
        assert "/" not in plan.key
        assert "/" not in plan.node
        if plan.finish is not None:
            plan.finish(dict(plan.fixed))
