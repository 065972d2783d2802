"""The TGI adapter. No page of a real one was recorded: this one is built from the published names and their types
(documentation of metrics, and the router's source: counters without `_total`, geometric duration buckets)."""

from __future__ import annotations

from tests.exporters.adapters.pages import Plain, known, read


def histogram(name: str, bounds: list[float], counts: list[int], total: float, labels: str = "") -> str:
    given = f"{{{labels}}}" if labels else ""
    inside = f"{labels}," if labels else ""
    rows = [f'{name}_bucket{{{inside}le="{bound}"}} {count}' for bound, count in zip(bounds, counts, strict=False)]
    rows += [f'{name}_bucket{{{inside}le="+Inf"}} {counts[-1]}', f"{name}_sum{given} {total}"]
    return "\n".join([f"# TYPE {name} histogram", *rows, f"{name}_count{given} {counts[-1]}", ""])


DURATIONS = [0.0001 * 1.5**k for k in range(1, 36)]
COUNTS = [min(k, 20) for k in range(35)] + [23]
PAGE = "".join(
    [
        "tgi_queue_size 4\ntgi_batch_current_size 12\n",
        "tgi_batch_current_max_tokens 6000\ntgi_batch_max_total_tokens 24000\n",
        "tgi_request_count 31\ntgi_request_success 20\n",
        *(f'tgi_request_failure{{err="{err}"}} {n}\n' for n, err in enumerate(("overloaded", "validation"), 1)),
        *(f'tgi_request_failure{{err="{err}"}} {n}\n' for n, err in enumerate(("generation", "dropped", "new"), 3)),
        histogram("tgi_request_duration", DURATIONS, COUNTS, 41.5),
        histogram("tgi_request_queue_duration", DURATIONS, COUNTS, 3.25),
        histogram("tgi_request_mean_time_per_token_duration", DURATIONS, COUNTS, 0.75),
        histogram("tgi_request_inference_duration", DURATIONS, COUNTS, 38.0),
        histogram("tgi_request_input_length", [100, 1000], [3, 22, 23], 9000),
        histogram("tgi_request_generated_tokens", [100, 1000], [5, 20, 20], 4100),
        histogram("tgi_batch_inference_duration", DURATIONS, [0, 7, 7], 11.0, 'method="prefill"'),
        histogram("tgi_batch_inference_duration", DURATIONS, [0, 90, 90], 22.5, 'method="decode"'),
        'tgi_request_skipped_tokens{quantile="0.5"} 2\ntgi_request_skipped_tokens_sum 55\n',
        "tgi_request_skipped_tokens_count 90\n",
    ]
)


def test_what_tgi_says() -> None:
    """Refused, given up and failed apart; both methods are steps; tokens allocated of all that there are."""
    (row,) = read(PAGE)
    assert known(row) == {
        "running": 12,
        "waiting": 4,
        "kv_usage_ratio": 0.25,
        "kv_capacity_tokens": 24000,
        "requests": 20,
        "rejected": 1 + 2,
        "failed": 3 + 5,
        "aborted": 4,
        "prompt_tokens": 9000,
        "generation_tokens": 4100,
        "accepted_tokens": 55,
        "iterations": 97,
        "busy_s": 33.5,
        "e2e_s_sum": 41.5,
        "e2e_count": 23,
        "queue_s_sum": 3.25,
        "queue_count": 23,
    }
    page = Plain(PAGE)
    assert row.bins["e2e_s"] == page.bins("tgi_request_duration")
    assert len(row.bins["queue_s"]) == 2 * 35 + 1
    assert row.plan.texts == {}


def test_mean_time_per_token_is_no_time_per_output_token() -> None:
    """It has the prefill in it; TGI gives no time to first token and no time between tokens."""
    (row,) = read(PAGE)
    assert not {"tpot_s_sum", "itl_s_sum", "ttft_s_sum", "prefill_s_sum"} & set(row.values)
    assert not {"tpot_s", "itl_s", "ttft_s", "prefill_s"} & set(row.bins)


def test_an_empty_server_uses_nothing() -> None:
    """Nothing in the batch is 0, no capacity is unknown."""
    (row,) = read("tgi_batch_current_max_tokens 0\ntgi_batch_max_total_tokens 100\n")
    assert known(row) == {"kv_usage_ratio": 0, "kv_capacity_tokens": 100}
    (row,) = read("tgi_batch_current_max_tokens 0\ntgi_queue_size 0\n")
    assert known(row) == {"waiting": 0}
