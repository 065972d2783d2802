"""What a terminal shows of a demo fits it, whatever its size, and loses no column that matters."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from cli.screen import Shown, action, clock

REASON = "load 1.4 req/s over 60 s needs 1.0 replicas at 1.40 req/s each, hold 600 s x 1.15 + 1 in reserve = 3; " * 3


def pool(name: str, **fields: Any) -> dict[str, Any]:
    return {
        "pool": name,
        "requests_per_s": 1234.5678,
        "replicas_ready": 10,
        "replicas_target": 12,
        "replicas_wanted": 14,
        "utilisation_ratio": 1.98,
        "slo_attainment": 0.88184,
        "ttft_s_p99": 13.00412,
        "tpot_s_p99": 0.13261,
        "usd_per_hour": 1137.6,
        "policy": "hold 600 s x 1.15 + 1",
    } | fields


def decision(at_s: float, state: str, act: dict[str, Any]) -> dict[str, Any]:
    target = {"pool": "chat-h100", "cluster": "local"}
    return {
        "state": state,
        "proposal": {"at_s": at_s, "target": target, "action": act, "replicas_from": 2, "reason": REASON},
    }


SCALE = {"type": "scale", "replicas": 3}
REROUTE = {"type": "reroute", "scope": "replicas", "weights": {f"chat-h100-{i}": 0.1 for i in range(9)}}
STATES = ["superseded", "pending", "blocked", "verified"] * 8


def drawn(width: int, height: int, **changes: Any) -> list[str]:
    """Lines on a terminal of a size, as a live display has them."""
    shown = Shown(
        "http://127.0.0.1:6066/",
        10.0,
        1000.0,
        36_000.0,
        {"sent": 1_234_567, "windowed": 1_234_567, "billed": 1_234_567},
        {"cost_usd": 12_345.678, "cost_usd_static_peak": None},
        {name: pool(name) for name in ("chat-h100", "chat-a100", "code-h100", "assist")},
        {str(i): decision(1000.0 + i, state, REROUTE if i % 5 == 0 else SCALE) for i, state in enumerate(STATES)},
    )._replace(**changes)
    console = Console(file=io.StringIO(), width=width, height=height, soft_wrap=True, markup=False)
    lines = console.render_lines(shown, console.options)
    return ["".join(segment.text for segment in line).rstrip() for line in lines]


@pytest.mark.parametrize("width", [80, 100, 120, 200])
@pytest.mark.parametrize("height", [20, 24, 40])
def test_it_fits(width: int, height: int) -> None:
    """No line is wider than the terminal, and all of them together leave it a line."""
    lines = drawn(width, height)
    assert max(map(len, lines)) <= width
    assert len(lines) < height


@pytest.mark.parametrize("width", [80, 120])
def test_no_column_is_lost(width: int) -> None:
    """Time, state, pool, action and the beginning of the reason of the newest decision; every figure of a pool."""
    lines = drawn(width, 24)
    assert lines[-1].split()[:8] == ["0:00:31", "verified", "chat-h100", "2", "->", "3", "replicas", "load"]
    (row,) = [line for line in lines if line.startswith("assist")]
    assert ("(wants 14)" in row) == (width >= 110)
    for figure in ("1234.6", "10 -> 12", "198%", "88.2%", "13.00 s", "0.133 s", "1,137.60"):
        assert figure in row
    assert "$12,345.68" in lines[0]
    assert ("hold 600" in row) == (width >= 110)


def test_what_waits_for_a_person_is_said_first() -> None:
    """How many, and where to answer; without any the page is named all the same."""
    assert drawn(120, 24)[1] == "8 decisions wait for you: approve or reject on http://127.0.0.1:6066/"
    assert drawn(120, 24, decisions={})[1] == "the page: http://127.0.0.1:6066/"


def test_a_loop_that_does_not_keep_up_is_told() -> None:
    """By how much, and what to do; not while it is only the usual window and lateness behind."""
    (line,) = [line for line in drawn(120, 24, newest_window_s=1000.0 + 35_000) if "behind" in line]
    assert line.startswith("the loop is 0:16:40 behind: ")
    assert "--speed" in line
    assert not any("behind" in line for line in drawn(120, 24, newest_window_s=1000.0 + 35_980))


def test_what_is_unknown_is_no_zero() -> None:
    """Before the first figures there are dashes."""
    nothing = dict.fromkeys(("requests_per_s", "utilisation_ratio", "slo_attainment", "ttft_s_p99", "usd_per_hour"))
    lines = drawn(120, 24, pools={"a": pool("a", replicas_ready=None, replicas_target=None, **nothing)}, decisions={})
    (row,) = [line for line in lines if line.startswith("a ")]
    assert row.split()[:2] == ["a", "-"]
    assert "0" not in row.split()[2:5]
    assert any("none yet" in line for line in lines)


def test_actions_and_times_in_words() -> None:
    """Short forms."""
    assert action(decision(0, "pending", SCALE)["proposal"]) == "2 -> 3 replicas"
    assert action({"action": {"type": "reroute", "weights": {"a": 1.0, "b": 0.25}}}) == "weights a 1, b 0.25"
    assert [clock(s) for s in (-1, 0, 59.9, 3661)] == ["0:00:00", "0:00:00", "0:00:59", "1:01:01"]
