"""The Triton adapter on recorded pages, held against a plain reader."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporters.planned import one_a_model
from tests.exporters.adapters.pages import Plain, known, read, text_of

US = 1e-6


def expected(page: Plain, model: str) -> dict[str, float]:
    mine = {"model": model}
    success = page.sum("nv_inference_request_success", **mine)
    return {
        "requests": success,
        "iterations": page.sum("nv_inference_exec_count", **mine),
        "waiting": page.sum("nv_inference_pending_request_count", **mine),
        "e2e_s_sum": page.sum("nv_inference_request_duration_us", **mine) * US,
        "e2e_count": success,
        "queue_s_sum": page.sum("nv_inference_queue_duration_us", **mine) * US,
        "queue_count": success,
    }


@pytest.mark.parametrize("name", ["triton-2.51.0-cpu-fresh.prom", "triton-2.51.0-cpu-busy.prom"])
def test_2_51(data_dir: Path, name: str) -> None:
    """A row a model, microseconds as seconds, failures by reason; `Nan` in the summaries spoils nothing."""
    text = text_of(data_dir, name)
    page = Plain(text)
    rows = {row.plan.key: row for row in read(text)}
    assert list(rows) == ["ranker", "encoder"]
    for model, row in rows.items():
        fails = {
            "rejected": page.one("nv_inference_request_failure", model=model, reason="REJECTED"),
            "aborted": page.one("nv_inference_request_failure", model=model, reason="CANCELED"),
            "failed": page.one("nv_inference_request_failure", model=model, reason="OTHER")
            + page.one("nv_inference_request_failure", model=model, reason="BACKEND"),
        }
        assert known(row) == pytest.approx(expected(page, model) | fails)
        assert row.plan.texts == {"model": model}
        assert row.bins == {}


def test_compute_time_by_request_is_no_busy_time(data_dir: Path) -> None:
    """It counts a batch once for each request in it, and so runs faster than the clock: nothing is made of it."""
    page = Plain(text_of(data_dir, "triton-2.51.0-cpu-busy.prom"))
    summed = sum(page.all("nv_inference_compute_infer_duration_us")) * US
    longest = max(page.all("nv_inference_request_duration_us")) * US
    assert summed > 50
    assert longest > summed
    for row in read(text_of(data_dir, "triton-2.51.0-cpu-busy.prom")):
        assert not {"busy_s", "prefill_s_sum", "tpot_s_sum", "running"} & set(known(row))


def test_2023(data_dir: Path) -> None:
    """No reasons: all failures are failures. GPUs by uuid are nobody's."""
    text = text_of(data_dir, "triton-2023-t4-summaries.prom")
    page = Plain(text)
    rows = {row.plan.key: known(row) for row in read(text)}
    assert len(rows) == 8
    for model, found in rows.items():
        failed = page.one("nv_inference_request_failure", model=model)
        assert found == pytest.approx(expected(page, model) | {"failed": failed})
    assert rows["densenet_onnx"]["e2e_s_sum"] == pytest.approx(1.327965)


def test_tensorrt_llm_in_flight(data_dir: Path) -> None:
    """The real metric is a label: scheduled, waiting and most requests; blocks as share, and as tokens of all."""
    (row,) = read(text_of(data_dir, "triton-trtllm-inflight.prom"))
    assert known(row) == {
        "running": 1,
        "waiting": 1,
        "running_max": 512,
        "kv_usage_ratio": 0.4875,
        "kv_capacity_tokens": 6239 * 64,
        "iterations": 0,
    }


def test_versions_of_a_model_are_one() -> None:
    """Two versions serve one model: their counts add up."""
    line = 'nv_inference_request_success{{model="m",version="{0}"}} {0}\n'
    (row,) = read(line.format(1) + line.format(2))
    assert known(row)["requests"] == 3


def test_models_behind_one_port_stay_apart(data_dir: Path) -> None:
    """Engines of one model may be taken together, models never: each keeps its name and its numbers."""
    rows = read(text_of(data_dir, "triton-2.51.0-cpu-busy.prom"))
    found = one_a_model(rows)
    assert [row.plan.key for row in found] == ["ranker", "encoder"]
    assert [row.values for row in found] == [row.values for row in rows]
