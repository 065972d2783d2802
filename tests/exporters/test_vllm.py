"""The vLLM adapter on pages as real engines gave them (FLEETLOOP_DATA) and on their odd cases."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporters.vllm import HISTOGRAMS, MEANS, SUMS, VllmAdapter, together
from schemas.node import ENGINE_SAMPLES

COLUMNS = {"start_s", *SUMS, *MEANS, *(f"{n}_s_sum" for n in HISTOGRAMS), *(f"{n}_count" for n in HISTOGRAMS)}


def _page(data_dir: Path, name: str) -> str:
    return (data_dir / "engine-metrics" / name).read_text(encoding="utf-8")


def _scrapes(folder: Path) -> Iterator[tuple[float, str | None]]:
    """(time, page) of a recorded run; None where the scrape failed."""
    lines: list[str] = []
    with gzip.open(folder / "scrapes.jsonl.gz", "rt", encoding="utf-8") as file:
        for record in map(json.loads, file):
            if "error" in record:
                yield record["t"], None
                continue
            if "text" in record:
                lines = record["text"].split("\n")
            for number, value in record.get("v", []):
                lines[number] = lines[number].rpartition(" ")[0] + " " + str(value)
            yield record["t"], "\n".join(lines)


def test_columns_are_those_of_the_schema() -> None:
    """Everything but the identity of a row comes from the adapter."""
    assert COLUMNS | {"replica", "at_s", "status"} == set(ENGINE_SAMPLES.columns)


def test_vllm_0_4(data_dir: Path) -> None:
    """The v0 engine: old names, no engine label, no queue histogram, no prefix cache."""
    found = VllmAdapter().columns(_page(data_dir, "vllm-v0.4-opt125m.prom"))
    assert found == {
        "": {
            "start_s": 1718140558.3,
            "running": 0,
            "waiting": 0,
            "kv_usage_ratio": 0,
            "prompt_tokens": 5,
            "cached_tokens": None,
            "generation_tokens": 7,
            "requests": 1,
            "preemptions": 0,
            "iterations": None,
            "ttft_s_sum": 0.31326723098754883,
            "ttft_count": 1,
            "tpot_s_sum": 0.19016313552856445,
            "tpot_count": 6,
            "e2e_s_sum": 0.5034303665161133,
            "e2e_count": 1,
            "queue_s_sum": None,
            "queue_count": None,
        }
    }


def test_vllm_0_32(data_dir: Path) -> None:
    """The v1 engine in overload: finished requests are summed over their reasons."""
    (found,) = VllmAdapter().columns(_page(data_dir, "vllm-0.32.0-cpu-overload.prom")).values()
    assert found == {
        "start_s": 1795519650.67,
        "running": 7,
        "waiting": 37,
        "kv_usage_ratio": pytest.approx(46 / 99),
        "prompt_tokens": 210951,
        "cached_tokens": 0,
        "generation_tokens": 99045,
        "requests": 1034,
        "preemptions": 20,
        "iterations": 20562,
        "ttft_s_sum": 416.9173514842987,
        "ttft_count": 1041,
        "tpot_s_sum": 8.780733590451328,
        "tpot_count": 1034,
        "e2e_s_sum": 1246.2826874256134,
        "e2e_count": 1034,
        "queue_s_sum": 353.9714618029973,
        "queue_count": 1034,
    }


def test_two_engines_behind_one_port(data_dir: Path) -> None:
    """Apart by their label; together as sums, and the mean of what is a ratio."""
    found = VllmAdapter().columns(_page(data_dir, "vllm-0.32.0-cpu-dp2-busy.prom"))
    assert list(found) == ["0", "1"]
    assert [found[e]["prompt_tokens"] for e in found] == [1474, 1417]
    both = together(found)
    assert both["prompt_tokens"] == 2891
    assert both["running"] == 12
    assert both["kv_usage_ratio"] == pytest.approx((51 / 99 + 49 / 99) / 2)
    assert both["start_s"] == found["0"]["start_s"] == 1795520653.32


def test_pages_that_are_not_vllms(data_dir: Path) -> None:
    """Other engines, proxies and exporters give no engine, even where their page is not valid exposition format."""
    folder = data_dir / "engine-metrics"
    others = [p for p in sorted(folder.glob("*.prom")) if not p.name.startswith(("vllm", "dynamo-1.6.1-mocker"))]
    assert len(others) > 8
    for path in others:
        assert VllmAdapter().columns(path.read_text(encoding="utf-8")) == {}, path.name


def test_every_vllm_page_is_a_valid_row(data_dir: Path) -> None:
    """What the adapter gives is taken by the schema, on every recorded page that speaks vLLM's names."""
    folder = data_dir / "engine-metrics"
    pages = [*folder.glob("vllm*.prom"), *folder.glob("dynamo*mocker*.prom")]
    assert len(pages) >= 5
    for path in pages:
        found = VllmAdapter().columns(path.read_text(encoding="utf-8"))
        assert found, path.name
        for columns in found.values():
            assert set(columns) == COLUMNS
            row = {"replica": "r", "at_s": 1.0, "status": "ok", **columns}
            assert ENGINE_SAMPLES.decode(ENGINE_SAMPLES.encode({k: [v] for k, v in row.items()})).refused == []


def test_a_whole_run_agrees_with_its_clients(data_dir: Path) -> None:
    """331 scrapes of a real engine: counters never fall, the final ones are what its clients counted."""
    folder = data_dir / "engine-metrics" / "vllm-cpu-run"
    adapter = VllmAdapter()
    rows = [together(adapter.columns(text)) for _, text in _scrapes(folder) if text is not None]
    assert len(rows) == 331
    assert adapter.refused == {}
    for column in ("prompt_tokens", "cached_tokens", "generation_tokens", "requests", "iterations", "ttft_count"):
        values = [row[column] for row in rows]
        assert all(b >= a for a, b in itertools.pairwise(values)), column
    with gzip.open(folder / "requests.csv.gz", "rt", encoding="utf-8") as file:
        requests = list(csv.DictReader(file))
    answered = sum(r["outcome"] == "ok" for r in requests)
    gone = {c: rows[-1][c] - rows[0][c] for c in ("requests", "ttft_count", "prompt_tokens", "cached_tokens")}
    assert gone["requests"] == answered
    assert gone["ttft_count"] == answered + sum(r["outcome"] == "client_abort" for r in requests)
    assert (rows[-1]["prompt_tokens"], rows[-1]["cached_tokens"]) == (392336, 107520)
    assert max(row["waiting"] for row in rows) == 37
    assert max(row["kv_usage_ratio"] for row in rows) == 1.0


def test_a_restart_is_another_start(data_dir: Path) -> None:
    """After SIGKILL the scrapes fail, then come with another start and counters that began again."""
    adapter = VllmAdapter()
    starts: dict[Any, float] = {}
    failed, last_before = 0, 0.0
    for _, text in _scrapes(data_dir / "engine-metrics" / "vllm-cpu-restart"):
        if text is None:
            failed += 1
            continue
        row = together(adapter.columns(text))
        starts.setdefault(row["start_s"], row["generation_tokens"])
        if len(starts) == 1:
            last_before = row["generation_tokens"]
    assert failed == 21
    assert len(starts) == 2
    assert last_before > list(starts.values())[1] > 0


def test_families_that_appear_later(data_dir: Path) -> None:
    """The simulator names a family on first use only: what was unknown becomes known, and the source of a column
    never changes in between."""
    adapter = VllmAdapter()
    chosen: dict[str, str] = {}
    rows = []
    for _, text in _scrapes(data_dir / "engine-metrics" / "inference-sim-run"):
        assert text is not None
        rows.append(together(adapter.columns(text)))
        for column, name in adapter._chosen.items():
            assert chosen.setdefault(column, name) == name
    assert len(rows) == 168
    assert rows[0]["generation_tokens"] is None
    assert rows[-1]["requests"] == 445
    assert rows[-1]["tpot_count"] is not None
    assert rows[-1]["cached_tokens"] is not None


PAGE = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:generation_tokens_total{engine="0",model_name="a"} 10
vllm:generation_tokens_total{engine="0",model_name="b"} 32
"""


def test_missing_is_null_and_never_zero() -> None:
    """Only what the page has is known; models of one engine are summed."""
    (found,) = VllmAdapter().columns(PAGE).values()
    assert found["running"] == 3
    assert found["generation_tokens"] == 42
    assert {c for c, v in found.items() if v is not None} == {"running", "generation_tokens"}


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-1"])
def test_impossible_values_are_null_and_counted(value: str) -> None:
    """NaN, infinity and negative counters do not reach the log."""
    adapter = VllmAdapter()
    (found,) = adapter.columns(f'vllm:generation_tokens_total{{engine="0"}} {value}\n').values()
    assert found["generation_tokens"] is None
    assert adapter.refused == {"generation_tokens": 1}


def test_a_better_name_that_appears_is_taken_after_a_restart_only() -> None:
    """A counter does not jump from one meaning to another while the process lives."""
    itl = "vllm:inter_token_latency_seconds_sum 5\nvllm:inter_token_latency_seconds_count 50\n"
    tpot = "vllm:request_time_per_output_token_seconds_sum 1\nvllm:request_time_per_output_token_seconds_count 2\n"
    adapter = VllmAdapter()
    counts = []
    for page in (f"process_start_time_seconds 100\n{itl}", f"process_start_time_seconds 100\n{tpot}{itl}"):
        counts.append(adapter.columns(page)[""]["tpot_count"])
    counts.append(adapter.columns(f"process_start_time_seconds 200\n{tpot}{itl}")[""]["tpot_count"])
    assert counts == [50, 50, 2]


def test_together_with_an_unknown_part_is_unknown() -> None:
    """The sum of a known and an unknown counter is unknown."""
    page = 'vllm:generation_tokens_total{engine="0"} 5\nvllm:num_requests_running{engine="1"} 1\n'
    assert together(VllmAdapter().columns(page))["generation_tokens"] is None


@given(
    st.text(max_size=200)
    | st.lists(st.sampled_from([*PAGE.splitlines(), "vllm:num_requests_running{", "\x00"])).map("\n".join)
)
def test_garbage_is_refused_or_read(text: str) -> None:
    """Any text gives columns or ValueError, nothing else."""
    try:
        found = VllmAdapter().columns(text)
    except ValueError:
        return
    assert all(set(columns) == COLUMNS for columns in found.values())
