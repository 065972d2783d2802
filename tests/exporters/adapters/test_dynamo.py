"""The Dynamo adapter on the recorded pages of a frontend and its worker, held against a plain reader."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.exporters.adapters.pages import Plain, known, read, text_of, without

MODEL = "tiny-llama-random"
FRONTEND = {
    "ttft": "dynamo_frontend_time_to_first_token_seconds",
    "itl": "dynamo_frontend_inter_token_latency_seconds",
    "e2e": "dynamo_frontend_request_duration_seconds",
}
WORKER = {
    "ttft": "vllm:time_to_first_token_seconds",
    "itl": "vllm:inter_token_latency_seconds",
    "e2e": "vllm:e2e_request_latency_seconds",
}


def times(page: Plain, families: dict[str, str], **mine: str) -> dict[str, float]:
    return {f"{what}_s_sum": page.one(f"{name}_sum", **mine) for what, name in families.items()} | {
        f"{what}_count": page.one(f"{name}_count", **mine) for what, name in families.items()
    }


def test_frontend(data_dir: Path) -> None:
    """A row a model; a client that went away is an abort; requests for a model that it does not have are no row."""
    text = text_of(data_dir, "dynamo-1.6.1-frontend.prom")
    page = Plain(text)
    (row,) = read(text)
    mine = {"model": MODEL}
    assert known(row) == {
        "running": page.one("dynamo_frontend_inflight_requests", **mine)
        - page.one("dynamo_frontend_queued_requests", **mine),
        "waiting": page.one("dynamo_frontend_queued_requests", **mine),
        "prompt_tokens": page.one("dynamo_frontend_input_sequence_tokens_sum", **mine),
        "cached_tokens": page.one("dynamo_frontend_cached_tokens_sum", **mine),
        "generation_tokens": page.one("dynamo_frontend_output_tokens_total", **mine),
        "requests": page.sum("dynamo_frontend_requests_total", status="success", **mine),
        "aborted": page.one("dynamo_frontend_requests_total", error_type="cancelled", **mine),
        **times(page, FRONTEND, **mine),
    }
    assert (known(row)["requests"], known(row)["aborted"]) == (212, 5)
    assert row.plan.texts == {"model": MODEL}
    for what, family in FRONTEND.items():
        assert row.bins[f"{what}_s"] == page.bins(family, **mine)
    assert row.bins["ttft_s"][0] == 0.0  # le="0" is a bound as any other
    # What is a worker's (blocks, batch size) is not said of the frontend, which may have several.
    assert not {"kv_capacity_tokens", "running_max", "kv_usage_ratio"} & set(known(row))


def test_in_flight_without_the_queued_is_what_runs() -> None:
    """Queued are those before their first token, and in flight too; the gauges are not read in one instant."""
    line = 'dynamo_frontend_{0}_requests{{model="m"}} {1}\n'
    rows = [
        read(line.format("inflight", total) + line.format("queued", queued))[0] for total, queued in ((7, 3), (2, 3))
    ]
    assert [row.values["running"] for row in rows] == [4, 0]


def test_worker(data_dir: Path) -> None:
    """The engine's own families; of the component's what the engine does not say. An abort is not a failure too."""
    text = text_of(data_dir, "dynamo-1.6.1-mocker-worker.prom")
    page = Plain(text)
    (row,) = read(text)
    generate = {"dynamo_endpoint": "generate"}
    assert known(row) == {
        "running": page.one("vllm:num_requests_running"),
        "waiting": page.one("vllm:num_requests_waiting"),
        "kv_usage_ratio": page.one("vllm:kv_cache_usage_perc"),
        "preemptions": page.one("vllm:num_preemptions_total"),
        "requests": page.one("vllm:e2e_request_latency_seconds_count"),
        "aborted": page.one("dynamo_component_cancellation_total", **generate),
        **times(page, WORKER),
    }
    assert page.one("dynamo_component_errors_total", error_type="publish_response") == known(row)["aborted"] == 5
    assert row.bins == {f"{what}_s": page.bins(family) for what, family in WORKER.items()}


def test_a_worker_counts_as_its_frontend_does(data_dir: Path) -> None:
    """Both saw the same run: their counts agree, so adding them would count every request twice."""
    (front,) = read(text_of(data_dir, "dynamo-1.6.1-frontend.prom"))
    (worker,) = read(text_of(data_dir, "dynamo-1.6.1-mocker-worker.prom"))
    for column in ("requests", "aborted", "ttft_count"):
        assert known(front)[column] == known(worker)[column], column
    assert known(worker)["ttft_s_sum"] == pytest.approx(known(front)["ttft_s_sum"], rel=0.01)


def test_a_worker_without_families_of_its_engine(data_dir: Path) -> None:
    """Then the component's own counts serve, of the endpoint that generates."""
    text = without(text_of(data_dir, "dynamo-1.6.1-mocker-worker.prom"), lambda name: name.startswith("vllm:"))
    page = Plain(text)
    generate = {"dynamo_endpoint": "generate"}
    (row,) = read(text)
    assert known(row) == {
        "running": page.one("dynamo_component_inflight_requests", **generate),
        "requests": page.one("dynamo_component_requests_total", **generate),
        "aborted": page.one("dynamo_component_cancellation_total", **generate),
        **times(page, {"e2e": "dynamo_component_request_duration_seconds"}, **generate),
    }


def test_an_sglang_worker() -> None:
    """The engine in a worker may be another one."""
    body = 'dynamo_component_requests_total{dynamo_endpoint="generate"} 9\nsglang:num_running_reqs{model_name="m"} 2\n'
    (row,) = read(body)
    assert known(row) == {"running": 2, "requests": 9}
    assert row.plan.texts == {"model": "m"}
