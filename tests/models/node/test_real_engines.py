"""Recorded runs of a real vLLM through adapter, records and node fold: the windows say what the clients measured.

Tolerances follow from how the engine is read, and none is fitted:

- Counters are read once a second and grow evenly in between. So what a window holds of a counter lies between what
  happened between the scrapes inside it and what happened between those around it (`between`).
- A client sees a token after the engine has counted it: by HTTP and by the turn of its event loop, which shares one
  core with the engine. LAG_S bounds it: vLLM returned with each request how long it took there.
- A gauge is that of the engine's last step; a step takes up to STEP_S, the longest gap between two tokens of a stream
  in the run without preemptions.
- Buckets say of a quantile in which bucket it lies, no more.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from models.windows import WINDOW_S
from tests.models.node.recorded import (
    HISTOGRAM_S,
    Request,
    Row,
    Scraper,
    between,
    bucket,
    in_system,
    quantile,
    quantiles,
    requests_of,
    scraped,
    summed,
    windows_of,
)

LAG_S = 0.25
STEP_S = 0.6
COUNTERS = (
    *("prompt_tokens", "cached_tokens", "generation_tokens", "requests", "aborted", "failed", "preemptions"),
    *("iterations", "ttft_s_sum", "ttft_count", "tpot_s_sum", "tpot_count", "itl_s_sum", "itl_count", "e2e_s_sum"),
    *("e2e_count", "queue_s_sum", "queue_count", "prefill_s_sum", "prefill_count"),
)
RUNS = ("vllm-cpu-run", "vllm-cpu-restart", "vllm-cpu-dp2")


@cache
def _run(folder: Path) -> tuple[Scraper, list[Row], list[Request]]:
    found = scraped(folder)
    return found, windows_of(found.samples, found.histograms), requests_of(folder)


def _of(data_dir: Path, name: str) -> tuple[Scraper, list[Row], list[Request]]:
    return _run(data_dir / "engine-metrics" / name)


def _answered(scraper: Scraper) -> list[Row]:
    return [sample for sample in scraper.samples if sample["status"] == "ok"]


def _total(windows: Sequence[Row], column: str) -> float:
    return sum(window.get(column) or 0.0 for window in windows)


def _finished(requests: Sequence[Request]) -> list[Request]:
    return [request for request in requests if request.outcome == "ok"]


def test_the_lag_of_clients(data_dir: Path) -> None:
    """A first token is seen later than vLLM says that it had it, never earlier, and by less than LAG_S."""
    lags = []
    for name in ("vllm-cpu-run", "vllm-cpu-restart"):
        lags += [r.ttft_s - r.told_ttft_s for r in _finished(_of(data_dir, name)[2])]
    assert 0 < min(lags) < sorted(lags)[len(lags) // 2] < 0.02
    assert max(lags) < LAG_S


@pytest.mark.parametrize("name", ["vllm-cpu-run", "vllm-cpu-dp2"])
def test_windows_add_up_to_the_counters(data_dir: Path, name: str) -> None:
    """Over a whole run every counter's windows add up to its growth, gauges stay within what was scraped, and no window
    takes anything back."""
    scraper, windows, _ = _of(data_dir, name)
    samples = scraper.samples
    for column in COUNTERS:
        young = samples[0]["at_s"] - samples[0]["start_s"] <= 60.0  # then the fold counts from the engine's start
        before = 0.0 if young else samples[0][column]
        assert _total(windows, column) == pytest.approx(samples[-1][column] - before), column
        assert all((window.get(column) or 0.0) >= 0.0 for window in windows), column
    assert max(w["waiting_mean"] or 0.0 for w in windows) <= max(s["waiting"] for s in samples)
    assert max(w["kv_usage_ratio_max"] or 0.0 for w in windows) == max(s["kv_usage_ratio"] for s in samples)
    assert _total(windows, "samples") == len(samples)
    assert _total(windows, "resets") == _total(windows, "missed") == 0


def test_totals_are_what_the_clients_counted(data_dir: Path) -> None:
    """Requests, tokens in and out and the cached share of a run, exactly; what was aborted is in the tokens only."""
    _, windows, requests = _of(data_dir, "vllm-cpu-run")
    ok = _finished(requests)
    gone = [request for request in requests if request.outcome == "client_abort"]
    refused = [request for request in requests if request.outcome == "http_error"]
    assert (len(ok), len(gone), len(refused)) == (1553, 14, 5)
    assert _total(windows, "requests") == pytest.approx(len(ok))
    served = [*ok, *gone]
    assert _total(windows, "prompt_tokens") == pytest.approx(sum(r.prompt for r in served))
    cached = sum(r.cached for r in served)
    assert _total(windows, "cached_tokens") == pytest.approx(cached)
    assert cached / sum(r.prompt for r in served) == pytest.approx(0.274, abs=0.001)
    assert _total(windows, "generation_tokens") == pytest.approx(sum(r.output for r in served))
    assert _total(windows, "e2e_s_sum") == pytest.approx(sum(r.end - r.arrival for r in ok), rel=0.02)


def test_aborts_and_refusals_are_invisible_in_vllm(data_dir: Path) -> None:
    """This vLLM counts no abort and no refused request: their columns are a measured zero, not ours to make up. That
    requests were given up shows in first tokens which never became an end."""
    scraper, windows, requests = _of(data_dir, "vllm-cpu-run")
    assert _total(windows, "aborted") == _total(windows, "failed") == _total(windows, "rejected") == 0.0
    assert any(window.get("aborted") == 0.0 for window in windows)
    last = scraper.samples[-1]
    assert (last["running"], last["waiting"]) == (0, 0)
    lost = _total(windows, "ttft_count") - _total(windows, "requests")
    assert lost == pytest.approx(sum(r.outcome == "client_abort" for r in requests))


def test_two_engines_behind_one_port_are_one_replica(data_dir: Path) -> None:
    """Their counts, their cache and their batches together are what twelve clients saw."""
    scraper, windows, requests = _of(data_dir, "vllm-cpu-dp2")
    assert _total(windows, "requests") == pytest.approx(len(_finished(requests))) == 129
    assert _total(windows, "prompt_tokens") == pytest.approx(sum(r.prompt for r in requests))
    assert _total(windows, "generation_tokens") == pytest.approx(sum(r.output for r in requests))
    assert max(s["running"] + s["waiting"] for s in scraper.samples) == 12
    assert {w.get("kv_capacity_tokens") for w in windows if w.get("samples")} == {6400}
    assert {w.get("model") for w in windows if w.get("samples")} == {"tiny-llama-random"}


def test_a_killed_engine_loses_only_what_it_never_told(data_dir: Path) -> None:
    """SIGKILL and restart: the windows hold the growth of both processes, one reset, the scrapes that failed, and of
    the requests all but those that ended after the last scrape before the kill."""
    scraper, windows, requests = _of(data_dir, "vllm-cpu-restart")
    samples = _answered(scraper)
    starts = list(dict.fromkeys(s["start_s"] for s in samples))
    assert len(starts) == 2
    old = [s for s in samples if s["start_s"] == starts[0]]
    for column in COUNTERS:
        # The old process was older than the grace when it was first scraped: from there it counts.
        grown = old[-1][column] - old[0][column] + samples[-1][column]
        assert _total(windows, column) == pytest.approx(grown), column
        assert all((window.get(column) or 0.0) >= 0.0 for window in windows), column
    assert _total(windows, "resets") == 1
    assert _total(windows, "samples") == len(samples)
    assert _total(windows, "missed") == 21
    killed = 1795520120.17
    ok = _finished(requests)
    untold = [r for r in ok if old[-1]["at_s"] < r.end - LAG_S and r.end <= killed + LAG_S]
    maybe = [r for r in ok if old[-1]["at_s"] < r.end <= killed + LAG_S]
    assert len(ok) - len(maybe) <= round(_total(windows, "requests")) <= len(ok) - len(untold)
    assert len(maybe) < 8


def test_an_engine_that_does_not_answer_is_seen(data_dir: Path) -> None:
    """While it is down the windows say so, and know nothing of its load."""
    scraper, windows, _ = _of(data_dir, "vllm-cpu-restart")
    spoken = [s["at_s"] for s in _answered(scraper)]
    silent = [w for w in windows if not any(w["start"] - 3 < at < w["start"] + WINDOW_S for at in spoken)]
    silent = [w for w in silent if spoken[0] < w["start"] < spoken[-1]]
    assert silent
    for window in silent:
        assert window["answers"] == 0.0
        assert window["waiting_last"] is None
        assert window["waiting_mean"] is None
    assert windows[-2]["answers"] == 1.0


ENDS: dict[str, Callable[[Request], tuple[float, float]]] = {
    "requests": lambda r: (r.end, 1.0),
    "tpot_count": lambda r: (r.end, 1.0),
    "e2e_count": lambda r: (r.end, 1.0),
}
FIRSTS: dict[str, Callable[[Request], tuple[float, float]]] = {
    "ttft_count": lambda r: (r.first, 1.0),
    "prompt_tokens": lambda r: (r.first, r.prompt),
    "cached_tokens": lambda r: (r.first, r.cached),
}


@pytest.mark.parametrize("name", RUNS)
def test_every_window_holds_what_its_clients_saw(data_dir: Path, name: str) -> None:
    """Window by window: finished requests by their end; first tokens, prompts and their cached part by the first."""
    scraper, windows, requests = _of(data_dir, name)
    scrapes = [s["at_s"] for s in _answered(scraper)]
    down = [(a, b) for a, b in pairwise(scrapes) if b - a > 3]
    ok, started = _finished(requests), [r for r in requests if not math.isnan(r.first)]
    looked = 0
    for window in windows:
        start, end = window["start"], window["start"] + WINDOW_S
        if not scrapes[0] <= start <= scrapes[-1] - WINDOW_S or any(start < b and a < end for a, b in down):
            continue
        looked += 1
        for columns, given in ((ENDS, ok), (FIRSTS, started)):
            for column, event in columns.items():
                low, high = between(window, scrapes, sorted(map(event, given)), LAG_S)
                assert low - 1e-6 <= window[column] <= high + 1e-6, (column, start)
    assert looked >= {"vllm-cpu-run": 31, "vllm-cpu-restart": 1, "vllm-cpu-dp2": 2}[name]


def test_arrivals_follow_from_ends_and_what_is_in_the_engine(data_dir: Path) -> None:
    """Requests that ended and what the engine holds more at the end than before are those that arrived; where nothing
    was given up the two agree within the second between scrapes."""
    scraper, windows, requests = _of(data_dir, "vllm-cpu-run")
    scrapes = [s["at_s"] for s in scraper.samples]
    aborts = [(r.arrival - 1, r.end + WINDOW_S) for r in requests if r.outcome != "ok"]
    arrivals = sorted((r.arrival, 1.0) for r in requests)
    held = {w["start"]: (w["running_last"] or 0) + (w["waiting_last"] or 0) for w in windows}
    checked = 0
    for window in windows:
        start = window["start"]
        if start - WINDOW_S not in held or not scrapes[0] + WINDOW_S <= start <= scrapes[-1] - WINDOW_S:
            continue
        if any(a < start + WINDOW_S and start < b for a, b in aborts):
            continue
        come = window["requests"] + held[start] - held[start - WINDOW_S]
        low, high = between(window, scrapes, arrivals, STEP_S)
        # Held is as of the last scrape in the window, and what had ended is up to its border: a second's ends apart.
        ends = [r.end for r in requests if min(abs(r.end - start), abs(r.end - start - WINDOW_S)) <= 1 + LAG_S]
        assert low - len(ends) <= come <= high + len(ends), start
        checked += 1
    assert checked > 20


@pytest.mark.parametrize("name", ["vllm-cpu-run", "vllm-cpu-dp2"])
def test_running_and_waiting_are_the_requests_in_the_engine(data_dir: Path, name: str) -> None:
    """The mean batch and queue of a window are together what clients had under way at the scrapes, within one step of
    the engine; the queue alone is what is beyond the largest batch."""
    scraper, windows, requests = _of(data_dir, name)
    served = [r for r in requests if r.outcome in ("ok", "client_abort")]
    at = np.array([s["at_s"] for s in scraper.samples])
    bounds = np.array([in_system(served, t, STEP_S) for t in at])
    until = np.append(at[1:], at[-1])
    for window in windows:
        start = window["start"]
        weight = np.clip(np.minimum(until, start + WINDOW_S) - np.maximum(at, start), 0, None)
        if weight.sum() < 0.99 * WINDOW_S:
            continue
        low, high = weight @ bounds / weight.sum()
        assert low - 1e-6 <= window["running_mean"] + window["waiting_mean"] <= high + 1e-6, start
    most = max(window["waiting_mean"] or 0.0 for window in windows)
    assert (most > 3) == (name == "vllm-cpu-run")
    batch = 8 * (2 if name == "vllm-cpu-dp2" else 1)
    assert all((window["running_mean"] or 0.0) <= batch for window in windows)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("q", [0.1, 0.5, 0.9, 0.99])
def test_quantiles_of_a_run_lie_in_their_buckets(data_dir: Path, name: str, q: float) -> None:
    """Over the whole run, the buckets of all windows: the clients' quantile is in the bucket that the windows say, the
    later by no more than the client's lag. Time per output token is one number a request at both."""
    scraper, windows, requests = _of(data_dir, name)
    first = scraper.samples[0]["at_s"]
    told = [s["at_s"] for s in scraper.samples if s["status"] == "ok"]
    lost = [(a, b) for a, b in pairwise(told) if b - a > 3]

    def seen(at: float) -> bool:
        return at > first and not any(a - HISTOGRAM_S < at < b for a, b in lost)

    ttft = [r.ttft_s for r in requests if not math.isnan(r.first)]
    low, high = bucket(summed(windows, "ttft_s_bins"), q)
    # A request whose observation was never read may be any of them: ranks move by as many.
    unseen = sum(not seen(r.first) for r in requests if not math.isnan(r.first)) / len(ttft)
    assert low <= quantile(ttft, min(q + unseen, 1.0))
    assert quantile(ttft, max(q - unseen, 0.0)) <= high + LAG_S
    tpot = [r.tpot_s for r in _finished(requests) if r.output > 1]
    low, high = bucket(summed(windows, "tpot_s_bins"), q)
    one = sum(r.output == 1 for r in _finished(requests)) / len(tpot) + unseen
    assert low <= quantile(tpot, min(q + one, 1.0))
    assert quantile(tpot, max(q - one, 0.0)) <= high


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("label", ["p50", "p99"])
def test_quantiles_of_every_window_lie_in_their_buckets(data_dir: Path, name: str, label: str) -> None:
    """The median and the 99th percentile of a window's first tokens lie in the bucket that it names, for some choice of
    those observations that came while buckets were not read."""
    scraper, windows, requests = _of(data_dir, name)
    reads = sorted({row["at_s"] for row in scraper.histograms})
    firsts = sorted((r.first, r.ttft_s) for r in requests if not math.isnan(r.first))
    q = {"p50": 0.5, "p99": 0.99}[label]
    checked = 0
    for window in windows:
        start, end = window["start"], window["start"] + WINDOW_S
        if not reads[0] <= start or not end <= reads[-1] or window[f"ttft_s_{label}"] is None:
            continue
        inside = [at for at in reads if start <= at <= end]
        before, after = reads[bisect_right(reads, start) - 1], reads[bisect_left(reads, end)]
        sure = [v for at, v in firsts if inside and inside[0] + LAG_S < at <= inside[-1]]
        possible = [v for at, v in firsts if before < at <= after + LAG_S]
        if after - before > 2 * WINDOW_S or not possible:
            continue
        least, most = quantiles(sure, possible, q)
        low, high = window[f"ttft_s_{label}_low"], window[f"ttft_s_{label}_high"]
        assert least - LAG_S <= (math.inf if high is None else high), start
        assert low <= most, start
        assert low <= window[f"ttft_s_{label}"] <= (math.inf if high is None else high)
        checked += 1
    assert checked >= (1 if name == "vllm-cpu-restart" else 2)
