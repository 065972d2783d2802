"""Replay of trace files: every row once, in its order and at its time; bad rows are counted and cost themselves."""

from __future__ import annotations

import asyncio
import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from exporters import edge
from exporters.trace_file import Replayed, TraceFileOptions, run_trace_file
from schemas.config import Deployment
from schemas.errors import SettingsError
from schemas.requests import REQUEST_ROWS
from streams.settings import Settings
from tests.exporters.cells import as_rows
from tests.exporters.conftest import Producer, until

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
AZURE = HEADER + (
    "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n2023-11-16 18:15:51.2224670,879,55\n"
)
FAST = 1000.0


def rows() -> list[dict[str, Any]]:
    out = []
    for record in Producer.made[0].records:
        out += [dict(zip(REQUEST_ROWS.columns, row, strict=True)) for row in as_rows(record.batch())]
    return sorted(out, key=lambda row: (row["at_s"], row["event"]))


def _file(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


async def _replay(settings: Settings, deployment: Deployment, **given: Any) -> Replayed:
    return await run_trace_file(settings, deployment, TraceFileOptions.of(**given), asyncio.Event())


async def test_azure(settings: Settings, deployment: Deployment, tmp_path: Path) -> None:
    """Each line is an arrival and an end with its tokens; latencies that the trace does not have are null."""
    path = _file(tmp_path, "conv.csv", AZURE)
    replayed = await _replay(settings, deployment, file=path, pool="chat", speed=FAST)
    assert replayed == Replayed(6, 0, True)
    arrivals = [row for row in rows() if row["event"] == "arrival"]
    ends = [row for row in rows() if row["event"] == "end"]
    assert [row["input_tokens"] for row in arrivals] == [374, 396, 879]
    assert [row["output_tokens"] for row in ends] == [44, 109, 55]
    assert {row["output_tokens"] for row in arrivals} == {None}
    assert {(row["ttft_s"], row["tpot_s"], row["e2e_s"]) for row in ends} == {(None, None, None)}
    assert [row["request_id"] for row in arrivals] == [row["request_id"] for row in ends]
    assert len({row["request_id"] for row in arrivals}) == 3
    assert {(row["pool"], row["tenant"], row["class"]) for row in arrivals} == {("chat", "trace", "default")}
    gaps = [row["at_s"] - arrivals[0]["at_s"] for row in arrivals]
    assert gaps == pytest.approx([0, 4.314579 / FAST, 4.541877 / FAST], abs=1e-4)


async def test_latencies_that_are_given(settings: Settings, deployment: Deployment, tmp_path: Path) -> None:
    """With them an end comes when it would, in fleet time, between the arrivals that it falls between."""
    path = _file(tmp_path, "conv.csv", AZURE)
    replayed = await _replay(settings, deployment, file=path, pool="chat", speed=FAST, ttft_s=0.01, tpot_s=0.0001)
    assert replayed.sent == 6
    by_id: dict[str, dict[str, float]] = {}
    for row in rows():
        by_id.setdefault(row["request_id"], {})[row["event"]] = row["at_s"]
    spans = [times["end"] - times["arrival"] for times in by_id.values()]
    assert spans == pytest.approx([0.01 + 43e-4, 0.01 + 108e-4, 0.01 + 54e-4], abs=1e-5)
    assert sorted(row["e2e_s"] for row in rows() if row["event"] == "end") == pytest.approx([0.0143, 0.0154, 0.0208])


async def test_bad_lines_cost_themselves(settings: Settings, deployment: Deployment, tmp_path: Path) -> None:
    """A time or number that is none, a negative count, a short line: counted, and the others are replayed."""
    text = AZURE + "yesterday,1,1\n2023-11-16 18:15:52,x,1\n2023-11-16 18:15:52,nan,1\n2023-11-16 18:15:53,-4,1\n2023\n"
    replayed = await _replay(settings, deployment, file=_file(tmp_path, "conv.csv", text), pool="chat", speed=FAST)
    assert replayed.sent == 6
    assert replayed.refused == 5
    assert replayed.finished


async def test_json_lines(settings: Settings, deployment: Deployment, tmp_path: Path) -> None:
    """Rows keep what they say, but come now, under ids of this replay; options fill what they leave out."""
    lines = [
        {"event": "arrival", "request_id": "a", "at_s": 100.0, "pool": "own", "tenant": "t1", "input_tokens": 5},
        {"event": "arrival", "request_id": "b", "at_s": 100.5},
        {"event": "end", "request_id": "a", "at_s": 101.0, "pool": "own", "status": "ok", "ttft_s": 0.25},
        {"event": "odd", "request_id": "c", "at_s": 101.0},
        {"event": "end", "at_s": 101.0},
        {"event": "end", "request_id": "d", "at_s": 1.7e12},
    ]
    text = "\n".join(json.dumps(line) for line in lines) + "\n\nnot json\n"
    path = _file(tmp_path, "trace.jsonl", text)
    replayed = await _replay(settings, deployment, file=path, speed=FAST)
    assert replayed == Replayed(2, 5, True)  # without a pool of its own, and without the option, b is refused too
    found = rows()
    assert [(r["event"], r["pool"], r["tenant"], r["ttft_s"]) for r in found] == [
        ("arrival", "own", "t1", None),
        ("end", "own", "trace", 0.25),
    ]
    assert found[0]["request_id"] == found[1]["request_id"] != "a"
    assert found[1]["at_s"] - found[0]["at_s"] == pytest.approx(1 / FAST, abs=1e-4)
    Producer.made.clear()
    assert (await _replay(settings, deployment, file=path, speed=FAST, pool="other")).sent == 3
    assert {r["pool"] for r in rows()} == {"other"}


async def test_a_stop_ends_it_early(settings: Settings, deployment: Deployment, tmp_path: Path) -> None:
    """At real speed the second line is seconds away: a stop does not wait for it."""
    stop = asyncio.Event()
    options = TraceFileOptions.of(file=_file(tmp_path, "conv.csv", AZURE), pool="chat")
    running = asyncio.create_task(run_trace_file(settings, deployment, options, stop))
    await until(lambda: Producer.made and Producer.made[0].records)
    stop.set()
    assert await running == Replayed(2, 0, False)


async def test_only_the_first_seconds(settings: Settings, deployment: Deployment, tmp_path: Path) -> None:
    """`duration_s` is in trace time."""
    path = _file(tmp_path, "conv.csv", AZURE)
    assert (await _replay(settings, deployment, file=path, pool="p", speed=FAST, duration_s=4.4)).sent == 4


async def test_rows_are_never_ahead_of_fleet_time(
    settings: Settings, deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At fleet speed 100 too, no row says a time later than the fleet's when it is sent."""
    fast = deployment.model_copy(update={"speed": 100.0})
    sent: list[tuple[float, float]] = []

    def send(self: Producer, topic: str, key: str, value: bytes, **more: Any) -> None:
        now = fast.log_ms(edge.wall_now_ms()) / 1000
        sent.append((max(REQUEST_ROWS.decode(value).numbers["at_s"]), now))

    monkeypatch.setattr(Producer, "send", send)
    await _replay(settings, fast, file=_file(tmp_path, "conv.csv", AZURE), pool="p", speed=0.2)
    assert len(sent) >= 2
    assert all(at <= now + 1e-3 for at, now in sent)


@pytest.mark.parametrize(
    ("name", "text", "given", "match"),
    [
        ("x.csv", "a,b\n1,2\n", {"pool": "p"}, "header"),
        ("x.csv", "", {"pool": "p"}, "header"),
        ("x.csv", AZURE, {}, "FLEETLOOP_TRACE_POOL"),
        ("x.csv", AZURE, {"pool": "a/b"}, "FLEETLOOP_TRACE_POOL"),
        ("x.csv", AZURE, {"pool": "p", "speed": 0}, "FLEETLOOP_TRACE_SPEED"),
    ],
)
async def test_what_is_no_trace_is_named(
    settings: Settings, deployment: Deployment, tmp_path: Path, name: str, text: str, given: dict[str, Any], match: str
) -> None:
    """A foreign header and missing or wrong options raise, with what is needed."""
    with pytest.raises(SettingsError, match=match):
        await _replay(settings, deployment, file=_file(tmp_path, name, text), **given)


async def test_a_file_that_breaks_off_is_named(settings: Settings, deployment: Deployment, tmp_path: Path) -> None:
    """What a download left of a compressed trace, and a cell without end: rows before it are sent."""
    path = tmp_path / "conv.csv.gz"
    lines = "".join(f"2023-11-16 18:17:03.{i:06d},{i},{i * 7919 % 997}\n" for i in range(20_000))
    whole = gzip.compress(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{lines}".encode())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SettingsError, match=r"conv\.csv\.gz: cannot be read to its end"):
        await _replay(settings, deployment, file=path, pool="chat", speed=FAST)
    assert rows()
    path = _file(tmp_path, "chunk-1-trace.csv", f'0,1,1,Gamma,1,1\n600,"{"1" * 200_000}",1,Gamma,1,1\n')
    with pytest.raises(SettingsError, match="cannot be read to its end"):
        await _replay(settings, deployment, file=path, pool="chat", speed=FAST)


def test_a_missing_file_is_named() -> None:
    """With its variable."""
    with pytest.raises(SettingsError, match=r"FLEETLOOP_TRACE_FILE: .*no such file"):
        TraceFileOptions.of(file=Path("/nowhere.csv"), pool="p")


async def test_a_real_trace_whole(settings: Settings, deployment: Deployment, data_dir: Path) -> None:
    """All 19,366 requests of Azure's conversation trace, token for token."""
    path = data_dir / "azure-llm-2023" / "AzureLLMInferenceTrace_conv.csv"
    replayed = await _replay(settings, deployment, file=path, pool="conv", speed=100_000)
    with path.open(encoding="utf-8") as file:
        truth = list(csv.DictReader(file))
    assert replayed == Replayed(2 * len(truth), 0, True)
    arrivals = [row for row in rows() if row["event"] == "arrival"]
    assert sum(row["input_tokens"] for row in arrivals) == sum(int(row["ContextTokens"]) for row in truth)
