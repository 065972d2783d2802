"""Published traces: columns as they are published, gaps kept, copies that keep them, bad lines that cost themselves."""

from __future__ import annotations

import gzip
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporters.trace_file import Replayed, TraceFileOptions
from exporters.trace_file_formats import FORMATS, SERVEGEN, WINDOW_S, Request, format_of, scaled
from schemas.config import Deployment
from schemas.errors import SettingsError
from streams.settings import Settings
from tests.exporters.conftest import Producer
from tests.exporters.test_trace_file import AZURE, _replay, rows

AZURE_2024 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 02:00:01+02:00,7,8\n"
)
BURSTGPT = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,1087,0,1087,API log\n"
)
BURSTGPT_2 = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,s1,0.25,ChatGPT,472,18,490,Conversation log\n"
)
MOONCAKE = (
    '{"timestamp": 0, "input_length": 6755, "output_length": 500, "hash_ids": [0, 1]}\n'
    '{"timestamp": 3052, "input_length": 7234, "output_length": 794, "hash_ids": [0, 2]}\n'
)
SERVEGEN_ALL = (
    ",".join(SERVEGEN) + "\n0,0,0,0,,0,0\n0,600,0.5,2,Gamma,0.25,8\n1,0,0.2,1,Weibull,0.5,1\n1,600,0.1,1,Gamma,1,10\n"
)
SERVEGEN_CLIENT = "0,0.5,2,Gamma,0.25,8\n600,0,0,,0,0\n1200,1.5,2,Weibull,0.4,8\n"
REPLAY = {
    "0": {"in_len": 476, "out_len": 409, "first_chunk_time": 0.125, "total_chunk_time": 0.5, "record_time": 100.5},
    "1": {"in_len": 182, "out_len": 122, "first_chunk_time": 0.125, "total_chunk_time": 0.25, "record_time": 100.375},
}
FILES = {
    "azure": ("AzureLLMInferenceTrace_conv.csv", AZURE),
    "burstgpt": ("BurstGPT_1.csv", BURSTGPT),
    "burstgpt-replay": ("detail_log.json", json.dumps(REPLAY)),
    "mooncake": ("conversation_trace.jsonl", MOONCAKE),
    "servegen": ("chunk-7-trace.csv", SERVEGEN_CLIENT),
    "jsonl": ("rows.jsonl", '{"event": "arrival", "request_id": "a", "at_s": 1, "pool": "p"}\n'),
}


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def read(path: Path, kind: str, seed: int = 0) -> list[Request]:
    """Its requests, nothing refused."""
    refused: list[tuple[int, str]] = []
    found = list(FORMATS[kind](path, lambda line, why: refused.append((line, why)), seed))
    assert refused == []
    return found


@pytest.mark.parametrize("kind", list(FILES))
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_each_format_is_known_by_its_beginning(tmp_path: Path, kind: str, suffix: str) -> None:
    """Plain and compressed."""
    name, text = FILES[kind]
    assert format_of(written(tmp_path, name + suffix, text)) == kind


def test_azure_2024(tmp_path: Path) -> None:
    """Its times name their zone."""
    first, second = read(written(tmp_path, "week.csv", AZURE_2024), "azure")
    assert (first.input_tokens, first.output_tokens) == (2162, 5)
    assert second.at_s - first.at_s == pytest.approx(1 - 0.00993)


def test_burstgpt(tmp_path: Path) -> None:
    """No response tokens: it failed. Newer files say how long a request took."""
    first, second = read(written(tmp_path, "b.csv", BURSTGPT), "burstgpt")
    assert first == Request(5, 472, 18, model="ChatGPT", request_class="interactive")
    assert second == Request(45, 1087, 0, model="GPT-4", status="error")
    assert read(written(tmp_path, "b2.csv", BURSTGPT_2), "burstgpt")[0].e2e_s == 0.25


def test_burstgpt_replay(tmp_path: Path) -> None:
    """In order of arrival, which is the record's time less how long it took; `out_len` is no count of tokens."""
    assert read(written(tmp_path, "d.json", json.dumps(REPLAY)), "burstgpt-replay") == [
        Request(100.0, 476, ttft_s=0.125, e2e_s=0.5),
        Request(100.125, 182, ttft_s=0.125, e2e_s=0.25),
    ]


def test_mooncake(tmp_path: Path) -> None:
    """Milliseconds."""
    assert read(written(tmp_path, "m.jsonl", MOONCAKE), "mooncake") == [
        Request(0, 6755, 500),
        Request(3.052, 7234, 794),
    ]


def test_servegen_holds_each_client_s_rate(tmp_path: Path) -> None:
    """In each window as many requests as its rate says, in order, inside it; a client is a tenant; seeds differ."""
    path = written(tmp_path, "rates.csv", SERVEGEN_ALL)
    found = read(path, "servegen")
    counts = Counter((one.tenant, one.at_s // WINDOW_S) for one in found)
    assert counts == {("client-0", 1): 300, ("client-1", 0): 120, ("client-1", 1): 60}
    assert [one.at_s for one in found] == sorted(one.at_s for one in found)
    assert found == read(path, "servegen")
    assert found != read(path, "servegen", seed=1)


def test_servegen_file_of_one_client(tmp_path: Path) -> None:
    """As published: no header, the client's number in the name."""
    found = read(written(tmp_path, "chunk-7-trace.csv", SERVEGEN_CLIENT), "servegen")
    assert {one.tenant for one in found} == {"client-7"}
    assert Counter(one.at_s // WINDOW_S for one in found) == {0: 300, 2: 900}


def test_servegen_bursts_are_bursts(tmp_path: Path) -> None:
    """A small shape gives gaps that vary more than those of a Poisson process, a large one gaps that vary less."""

    def variation(shape: float) -> float:
        text = f"0,2,1,Gamma,{shape},1\n"
        times = [one.at_s for one in read(written(tmp_path, f"chunk-{shape}-trace.csv", text), "servegen")]
        gaps = [b - a for a, b in itertools.pairwise(times)]
        mean = sum(gaps) / len(gaps)
        return float((sum((g - mean) ** 2 for g in gaps) / len(gaps)) ** 0.5 / mean)

    assert variation(0.1) == pytest.approx(10**0.5, rel=0.25)
    assert variation(25.0) == pytest.approx(0.2, rel=0.25)


@pytest.mark.parametrize("kind", list(FORMATS))
def test_bad_lines_cost_themselves(tmp_path: Path, kind: str) -> None:
    """Each is named by its line and without its text; the others are read."""
    bad = {
        "azure": AZURE + "x,secret,1\n2023\n2023-11-16 18:15:53,-4,1\n2023-11-16 18:15:53,nan,1\n",
        "burstgpt": BURSTGPT + "secret,a,1,1,2,x\n9,a,,1,1,x\n9,a,inf,1,1,x\n9\n",
        "burstgpt-replay": json.dumps(
            REPLAY | {str(i): one for i, one in enumerate(({}, 3, None, {"record_time": "secret"}), 9)}
        ),
        "mooncake": MOONCAKE
        + '{\n[]\n{"timestamp": true}\n{"timestamp": 1, "input_length": "secret", "output_length": 1}\n',
        "servegen": SERVEGEN_CLIENT + "secret,1,1,Gamma,1,1\n0\n0,1,1,Pareto,1,1\n0,-1,1,Gamma,1,1\n",
    }
    good = len(read(written(tmp_path, "good", FILES[kind][1]), kind))
    refused: list[tuple[int, str]] = []
    found = list(FORMATS[kind](written(tmp_path, "bad", bad[kind]), lambda line, why: refused.append((line, why)), 0))
    assert (len(found), len(refused)) == (good, 4)
    assert "secret" not in str(refused)


@given(
    st.lists(st.floats(0, 1000), max_size=60).map(sorted),
    st.floats(0.01, 5),
    st.floats(0, 30),
    st.integers(0, 3),
)
def test_copies_keep_the_order_and_the_first_one_its_gaps(
    times: list[float], scale: float, jitter_s: float, seed: int
) -> None:
    """In order of time, between the whole copies and one more each; the first of each at its own time."""
    given_ = [Request(at_s, float(i)) for i, at_s in enumerate(times)]
    found = list(scaled(given_, scale, jitter_s, seed))
    assert [one.at_s for one in found] == sorted(one.at_s for one in found)
    counts = Counter(one.input_tokens for one in found)
    assert all(int(scale) <= counts[one.input_tokens] <= int(scale) + 1 for one in given_)
    for one in given_:
        copies = [copy.at_s for copy in found if copy.input_tokens == one.input_tokens]
        assert all(one.at_s <= at_s <= one.at_s + jitter_s for at_s in copies)
        assert not copies or min(copies) == one.at_s


@pytest.mark.parametrize("kind", [kind for kind in FILES if kind != "jsonl"])
async def test_each_format_is_replayed(settings: Settings, deployment: Deployment, tmp_path: Path, kind: str) -> None:
    """An arrival and an end of each request, in gaps as the trace has them."""
    path = written(tmp_path, *FILES[kind])
    truth = read(path, kind)
    replayed = await _replay(settings, deployment, file=path, pool="chat", speed=10_000.0)
    assert replayed == Replayed(2 * len(truth), 0, True)
    at = sorted(row["at_s"] for row in rows() if row["event"] == "arrival")
    gaps = [(b - a) * 10_000 for a, b in itertools.pairwise(at)]
    expected = [b.at_s - a.at_s for a, b in itertools.pairwise(truth)]
    assert gaps == pytest.approx(expected, abs=0.1)


async def test_latencies_of_the_trace_win(settings: Settings, deployment: Deployment, tmp_path: Path) -> None:
    """What was measured is not overruled by the options, which fill what is missing."""
    path = written(tmp_path, "b2.csv", BURSTGPT_2)
    await _replay(settings, deployment, file=path, pool="p", ttft_s=0.08, speed=1000.0)
    (end,) = [row for row in rows() if row["event"] == "end"]
    assert (end["ttft_s"], end["e2e_s"], end["tpot_s"]) == (0.08, 0.25, pytest.approx(0.01))
    Producer.made.clear()
    path = written(tmp_path, "d.json", json.dumps(REPLAY))
    await _replay(settings, deployment, file=path, pool="p", ttft_s=9.0, output_tokens=11, speed=1000.0)
    ends = sorted((row["e2e_s"], row["ttft_s"], row["tpot_s"]) for row in rows() if row["event"] == "end")
    assert ends == [(0.25, 0.125, pytest.approx(0.0125)), (0.5, 0.125, pytest.approx(0.0375))]


async def test_scale(settings: Settings, deployment: Deployment, tmp_path: Path) -> None:
    """Copies are requests of their own."""
    path = written(tmp_path, "conv.csv", AZURE)
    replayed = await _replay(settings, deployment, file=path, pool="p", speed=1000.0, scale=3.0)
    assert replayed.sent == 18
    assert len({row["request_id"] for row in rows()}) == 9


def test_an_unknown_file_is_said_to_be_one(tmp_path: Path) -> None:
    """With the headers that are known."""
    with pytest.raises(SettingsError, match="Request tokens"):
        TraceFileOptions.of(file=written(tmp_path, "x.csv", "a,b\n1,2\n"), pool="p")
    (tmp_path / "x.csv.gz").write_bytes(b"no gzip")
    with pytest.raises(SettingsError, match="FLEETLOOP_TRACE_FILE"):
        TraceFileOptions.of(file=tmp_path / "x.csv.gz", pool="p")


@pytest.mark.parametrize("speed", [100, 2000])
def test_the_real_replays(data_dir: Path, speed: int) -> None:
    """500 requests each; arrivals in the order in which they were numbered, latencies as recorded."""
    path = data_dir / "burstgpt-vllm-replay" / "detail_log" / f"detail_log_scale{speed}_prompt500.json"
    assert format_of(path) == "burstgpt-replay"
    found = read(path, "burstgpt-replay")
    truth: dict[str, Any] = json.loads(path.read_text())
    by_number = sorted(truth.values(), key=lambda one: one["event_id"])
    assert len(found) == 500
    assert [one.input_tokens for one in found] == [one["in_len"] for one in by_number]


def test_the_real_rates(data_dir: Path) -> None:
    """The first window of 43 clients: each count within one of its published rate."""
    path = data_dir / "servegen-m-small" / "client_rates.csv.gz"
    assert format_of(path) == "servegen"
    counts: Counter[tuple[str | None, float]] = Counter()
    for one in FORMATS["servegen"](path, lambda line, why: pytest.fail(f"{line}: {why}"), 0):
        if one.at_s >= WINDOW_S:
            break
        counts[one.tenant, one.at_s // WINDOW_S * WINDOW_S] += 1
    with gzip.open(path, "rt") as file:
        for line in list(file)[1:]:
            client, at_s, rate = line.split(",")[:3]
            if float(at_s) < WINDOW_S:
                assert abs(counts[f"client-{client}", float(at_s)] - float(rate) * WINDOW_S) <= 1
