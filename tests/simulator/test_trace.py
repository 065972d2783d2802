"""Recorded traces: reading, scaling, and driving a fleet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from schemas.errors import InvalidInput
from simulator.fleet import Fleet
from simulator.scenario import load_scenario
from simulator.trace import Trace, read_trace, scale_trace

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
SMALL = HEADER + "2023-11-16 18:15:50.9951690,396,109\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:16:46.0,5,0\n"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(SMALL)
    return path


def azure(data_dir: Path, name: str) -> Path:
    """A real trace."""
    return data_dir / "azure-llm-2023" / f"AzureLLMInferenceTrace_{name}.csv"


def test_rows_are_ordered_and_start_at_zero(small: Path) -> None:
    """Times count from the earliest row, rows are in order of time, sizes are at least one token."""
    trace = read_trace(small)
    assert trace.at_s.tolist() == pytest.approx([0, 4.314579, 59.31941], abs=1e-6)
    assert trace.input_tokens.tolist() == [374, 396, 5]
    assert trace.output_tokens.tolist() == [44, 109, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n", "the first line must be"),
        (HEADER, "no requests"),
        (HEADER + "2023-11-16 18:15:46,x,1\n", "line 2"),
        (HEADER + "2023-11-16 18:15:46,1\n", "line 2"),
        (HEADER + "yesterday,1,1\n", "TIMESTAMP"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    """A wrong file is refused, naming what is wrong in it."""
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(InvalidInput, match=message):
        read_trace(path)
    with pytest.raises(InvalidInput, match="readable CSV"):
        read_trace(tmp_path / "none.csv")


def test_scale_copies_and_thins() -> None:
    """Scale K gives K times the requests; the first copy is the trace itself; a fraction is a thinned copy."""
    n = 4000
    trace = Trace(np.linspace(0, 1000, n), np.arange(n), np.arange(n))
    assert scale_trace(trace, 1, 5, 0).at_s.tolist() == trace.at_s.tolist()
    triple = scale_trace(trace, 3, 5, 0)
    assert len(triple.at_s) == 3 * n
    assert bool((np.diff(triple.at_s) >= 0).all())
    assert sorted(triple.input_tokens.tolist()) == sorted(trace.input_tokens.tolist() * 3)
    for scale in (0.25, 1.5):
        assert len(scale_trace(trace, scale, 5, 0).at_s) == pytest.approx(scale * n, rel=0.06)
    moved = scale_trace(trace, 2, 5, 0)
    original = trace.at_s[moved.input_tokens]
    assert np.abs(moved.at_s - original).max() <= 5
    assert len(scale_trace(trace, 2, 5, 0, duration_s=100).at_s) == pytest.approx(800, rel=0.05)


def test_scale_is_seeded() -> None:
    """The same seed gives the same requests, another seed others."""
    trace = Trace(np.linspace(0, 100, 500), np.arange(500), np.arange(500))
    a, b, c = (scale_trace(trace, 2.5, 5, seed).at_s.tolist() for seed in (1, 1, 2))
    assert a == b
    assert a != c


def test_a_trace_drives_the_fleet_to_its_end(small: Path) -> None:
    """Every request of the file is sent once, to a tenant by share; when all have ended the fleet is idle."""
    scenario = load_scenario("trace").for_trace(str(small), 2)
    assert [group.count for group in scenario.nodes] == [3, 1]
    assert [(p.replicas_min, p.replicas, p.replicas_max) for p in scenario.pools] == [(1, 4, 6), (1, 1, 1), (1, 1, 1)]
    fleet = Fleet(scenario)
    events = fleet.advance(300)
    chat = [r for r in events.arrivals if r.route == "chat"]
    assert len(chat) == 6
    assert max(r.arrival_s for r in events.arrivals) <= fleet.load.end_s
    assert fleet.idle
    assert len(events.ends) == len(events.arrivals)


def test_real_trace_is_read_whole(data_dir: Path) -> None:
    """The conversation trace of Azure 2023 has 19,366 requests in 58 minutes with known token totals."""
    trace = read_trace(azure(data_dir, "conv"))
    assert len(trace.at_s) == 19_366
    assert trace.duration_s == pytest.approx(3501.72, abs=0.01)
    assert float(trace.input_tokens.mean()) == pytest.approx(1154.7, abs=0.1)
    assert float(trace.output_tokens.mean()) == pytest.approx(211.1, abs=0.1)


def test_capacity_of_a_replica_is_that_of_the_references(data_dir: Path) -> None:
    """An H100 x4 replica of llama2-70b under Poisson arrivals keeps 99 % within the SLO at 3.4, not at 3.8."""
    from simulator.engine import Engine
    from simulator.ledger import slo_met
    from simulator.request import Request

    trace = read_trace(azure(data_dir, "conv"))
    pool = load_scenario("trace").pools[0]
    n = 12_000
    attainment = {}
    for rate in (3.4, 3.8):
        rng = np.random.default_rng(3)
        at = np.cumsum(rng.exponential(1 / rate, n)).tolist()
        rows = rng.integers(0, len(trace.at_s), n).tolist()
        engine = Engine(pool.engine.spec())
        for i, row in enumerate(rows):
            engine.submit(Request(i, at[i], "", "", "", int(trace.input_tokens[row]), int(trace.output_tokens[row])))
        engine.advance(1e9)
        attainment[rate] = sum(slo_met(r, pool.slo) for r in engine.ended) / n
    assert attainment[3.4] >= 0.99 > attainment[3.8]
