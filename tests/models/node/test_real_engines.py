"""The node fold over recorded scrapes of a real vLLM: what the windows say is what the engine counted."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from schemas.log import LogRecord
from schemas.signals import ENGINE_WINDOWS
from tests.models.law import log, run, tick
from tests.models.node.logs import engine, final, fold, inventory, replica

SERIES = {
    "start_s": "process_start_time_seconds",
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "kv_usage_ratio": "vllm:kv_cache_usage_perc",
    "prompt_tokens": "vllm:prompt_tokens_total",
    "generation_tokens": "vllm:generation_tokens_total",
    "preemptions": "vllm:num_preemptions_total",
    "ttft_s_sum": "vllm:time_to_first_token_seconds_sum",
    "ttft_count": "vllm:time_to_first_token_seconds_count",
}
COUNTERS = [name for name in SERIES if name not in ("start_s", "running", "waiting", "kv_usage_ratio")]
PATTERN = re.compile(r"^([a-zA-Z_:]+)(?:\{[^}]*\})? (\S+)$")


def scrapes(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of engine.samples; a failed scrape is a dead one."""
    lines: list[str] = []
    for text in gzip.decompress(path.read_bytes()).splitlines():
        item = json.loads(text)
        if "error" in item:
            yield {"replica": "r1", "at_s": item["t"], "status": "dead"}
            continue
        if "text" in item:
            lines = item["text"].split("\n")
        for number, value in item.get("v", []):
            lines[number] = f"{lines[number].rpartition(' ')[0]} {value}"
        found = {m[1]: float(m[2]) for m in map(PATTERN.match, lines) if m}
        yield {"replica": "r1", "at_s": item["t"], "status": "ok", **{k: found.get(v) for k, v in SERIES.items()}}


def windows_of(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    first, last = samples[0]["at_s"], samples[-1]["at_s"]
    held = [replica(since_s=first - 1000.0)]
    records: list[LogRecord] = [inventory(first - 20.0, held)]
    records += [engine(sample["at_s"] + 0.1, [sample]) for sample in samples]
    records += [inventory(t, held) for t in (first + 60.0 * n for n in range(int((last - first) // 60)))]
    records.sort(key=lambda record: record.at_ms)
    out = run(fold(), log(*records, tick(last + 13), tick(last + 14)))
    return [{**rows[0], "start": start} for (_, start), rows in sorted(final(out, ENGINE_WINDOWS).items())]


def test_windows_add_up_to_the_counters(data_dir: Path) -> None:
    """Over a run of five minutes with bursts, idleness and preemptions, every counter's windows add up to its growth,
    and gauges stay within what was scraped."""
    samples = list(scrapes(data_dir / "engine-metrics" / "vllm-cpu-run" / "scrapes.jsonl.gz"))
    found = windows_of(samples)
    for name in COUNTERS:
        grown = samples[-1][name] - samples[0][name]
        assert sum(w[name] or 0.0 for w in found) == pytest.approx(grown), name
        assert grown > 0, name
    assert max(w["waiting_mean"] or 0.0 for w in found) <= max(s["waiting"] for s in samples)
    assert max(w["kv_usage_ratio_max"] or 0.0 for w in found) == max(s["kv_usage_ratio"] for s in samples)
    assert sum(w["samples"] for w in found) == len(samples)
    assert sum(w["resets"] for w in found) == 0


def test_a_killed_engine_loses_only_what_it_never_told(data_dir: Path) -> None:
    """Over a SIGKILL and restart the windows hold the growth of both processes, one reset, and no time in between."""
    samples = list(scrapes(data_dir / "engine-metrics" / "vllm-cpu-restart" / "scrapes.jsonl.gz"))
    answered = [s for s in samples if s["status"] == "ok"]
    starts = list(dict.fromkeys(s["start_s"] for s in answered))
    assert len(starts) == 2
    old = [s for s in answered if s["start_s"] == starts[0]]
    found = windows_of(samples)
    for name in COUNTERS:
        # The old process was younger than the grace at its first scrape: it counts from its start.
        young = old[0]["at_s"] - starts[0] <= 60.0
        grown = old[-1][name] - (0.0 if young else old[0][name]) + answered[-1][name]
        assert sum(w[name] or 0.0 for w in found) == pytest.approx(grown), name
    assert sum(w["resets"] for w in found) == 1
    assert sum(w["samples"] for w in found) == len(answered)
    spoken = [s["at_s"] for s in answered]
    silent = [w for w in found if not any(w["start"] - 3 < at < w["start"] + 10 for at in spoken)]
    assert any(spoken[0] < w["start"] < spoken[-1] for w in silent)
    assert all(w["waiting_last"] is None and w["waiting_mean"] is None for w in silent)
