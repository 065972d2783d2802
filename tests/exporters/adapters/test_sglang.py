"""The SGLang adapter on recorded pages of three versions, and on the form of 0.5's, held against a plain reader."""

from __future__ import annotations

from pathlib import Path

import pytest

from schemas.node import ENGINE_HISTOGRAMS
from tests.exporters.adapters.pages import Plain, known, read, text_of

TIMES = {
    "ttft": "sglang:time_to_first_token_seconds",
    "itl": "sglang:time_per_output_token_seconds",
    "e2e": "sglang:e2e_request_latency_seconds",
}


def times(page: Plain, families: dict[str, str]) -> dict[str, float]:
    return {f"{what}_s_sum": page.one(f"{name}_sum") for what, name in families.items()} | {
        f"{what}_count": page.one(f"{name}_count") for what, name in families.items()
    }


def test_0_3_5(data_dir: Path) -> None:
    """Its model label is `name`, its gauges have other names, its hit rate (percent) is no counter and goes nowhere."""
    text = text_of(data_dir, "sglang-0.3.5-gemma2-name-label.prom")
    page = Plain(text)
    (row,) = read(text)
    assert known(row) == {
        "running": page.one("sglang:num_requests_running"),
        "waiting": page.one("sglang:num_requests_waiting"),
        "kv_usage_ratio": 0.01,
        "kv_capacity_tokens": 161721,
        "running_max": 4097,
        "prompt_tokens": 506780,
        "generation_tokens": 424549,
        "requests": page.one("sglang:e2e_request_latency_seconds_count"),
        **times(page, TIMES | {"queue": "sglang:waiting_request_latency_seconds"}),
    }
    assert row.plan.texts == {"model": "google/gemma-2-9b-it"}
    assert row.bins == {
        **{f"{what}_s": page.bins(family) for what, family in TIMES.items()},
        "queue_s": page.bins("sglang:waiting_request_latency_seconds"),
        "input_tokens": page.bins("sglang:request_prompt_tokens"),
        "output_tokens": page.bins("sglang:request_generation_tokens"),
    }


@pytest.mark.parametrize("name", ["sglang-0.4.0-llama8b-fresh.prom", "sglang-0.4.3-llama8b-overload.prom"])
def test_0_4(data_dir: Path, name: str) -> None:
    """`func_latency_seconds` names a function where others name the model; throughput and hit rate go nowhere."""
    text = text_of(data_dir, name)
    page = Plain(text)
    (row,) = read(text)
    assert known(row) == {
        "running": page.one("sglang:num_running_reqs"),
        "waiting": page.one("sglang:num_queue_reqs"),
        "kv_usage_ratio": page.one("sglang:token_usage"),
        "prompt_tokens": page.one("sglang:prompt_tokens_total"),
        "generation_tokens": page.one("sglang:generation_tokens_total"),
        "requests": page.one("sglang:e2e_request_latency_seconds_count"),
        **times(page, TIMES),
    }
    assert row.plan.texts == {"model": "meta-llama/Llama-3.1-8B-Instruct"}
    assert row.bins == {f"{what}_s": page.bins(family) for what, family in TIMES.items()}


def test_most_first_tokens_lie_beyond_the_last_bucket(data_dir: Path) -> None:
    """In the overload 77 % took longer than the last bound of 30 s: the distribution says so, and by how many."""
    (row,) = read(text_of(data_dir, "sglang-0.4.3-llama8b-overload.prom"))
    assert known(row)["waiting"] == 2826
    *_, bound, below, count = row.bins["ttft_s"]
    assert (bound, count) == (30, 11008)
    assert 1 - below / count == pytest.approx(0.77, abs=0.005)
    flat = {"replica": ["r"], "at_s": [1.0], "metric": ["ttft_s"], "bins": [row.bins["ttft_s"]]}
    assert ENGINE_HISTOGRAMS.decode(ENGINE_HISTOGRAMS.encode(flat)).refused == []


def lines(name: str, value: float, **labels: str) -> str:
    given = ",".join(f'{key}="{text}"' for key, text in labels.items())
    return f"sglang:{name}{{{given}}} {value}\n"


def test_ranks_that_repeat_a_number_are_not_summed() -> None:
    """Tensor and pipeline parallel ranks say the same: of each data parallel rank the first speaks; their requests
    add up, their shares are a mean. Counts by request come once, from the tokenizer, and split by streaming."""
    body = ""
    for dp in (0, 1):
        for pp in (0, 1):
            for tp in (0, 1, 10):
                who = {"engine_type": "unified", "model_name": "m", "dp_rank": f"{dp}", "pp_rank": f"{pp}"}
                who |= {"tp_rank": f"{tp}", "moe_ep_rank": "0"}
                body += lines("num_running_reqs", 10 + dp, **who)
                body += lines("token_usage", 0.2 + 0.2 * dp, **who)
                body += lines("max_total_num_tokens", 1000, **who)
                body += lines("num_retracted_requests_total", 3, **who)
                body += lines("num_retracted_reqs", 1, **who)
                body += lines("forward_execution_seconds_total", 5 + dp, **who, category="decode")
                body += lines("forward_execution_seconds_total", 1, **who, category="extend")
                for le, count in (("0.5", 1), ("+Inf", 2)):
                    body += lines("queue_time_seconds_bucket", count, **who, le=le)
                body += lines("queue_time_seconds_count", 2, **who) + lines("queue_time_seconds_sum", 0.9, **who)
    for stream in ("true", "false"):
        who = {"model_name": "m", "is_streaming": stream}
        body += lines("prompt_tokens_total", 100, **who) + lines("num_requests_total", 4, **who)
        body += lines("inter_token_latency_seconds_sum", 2, **who) + lines(
            "inter_token_latency_seconds_count", 50, **who
        )
    body += lines("cached_tokens_total", 7, model_name="m", cache_source="device")
    body += lines("cached_tokens_total", 2, model_name="m", cache_source="host")
    body += lines("num_aborted_requests_total", 1, model_name="m")
    (row,) = read(body)
    assert known(row) == pytest.approx(
        {
            "running": 21,
            "kv_usage_ratio": 0.3,
            "kv_capacity_tokens": 2000,
            "preemptions": 6,
            "busy_s": 6.5,
            "prompt_tokens": 200,
            "cached_tokens": 9,
            "requests": 8,
            "aborted": 1,
            "itl_s_sum": 4,
            "itl_count": 100,
            "queue_s_sum": 1.8,
            "queue_count": 4,
        }
    )
    assert row.bins["queue_s"] == [0.5, 2, 4]


def test_priorities_have_a_series_each_and_one_for_all() -> None:
    """Only that for all counts; where there is none, the others do."""
    who = {"model_name": "m", "tp_rank": "0", "pp_rank": "0"}
    body = "".join(
        lines("num_queue_reqs", value, **who, priority=name) for name, value in (("", 5), ("1", 2), ("9", 3))
    )
    assert known(read(body)[0]) == {"waiting": 5}
    body = "".join(lines("num_queue_reqs", value, **who, priority=name) for name, value in (("1", 2), ("9", 3)))
    assert known(read(body)[0]) == {"waiting": 5}


def test_a_rank_that_is_not_the_first_speaks_where_it_is_alone() -> None:
    """With attention split by data, a scheduler's tensor parallel rank is its own number."""
    body = lines("num_running_reqs", 4, model_name="m", tp_rank="1", dp_rank="1")
    body += lines("num_running_reqs", 3, model_name="m", tp_rank="0", dp_rank="0")
    assert known(read(body)[0]) == {"running": 7}
