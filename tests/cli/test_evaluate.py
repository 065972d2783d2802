"""`fleetloop evaluate`: figures on stdout, progress on stderr, and exit codes that mean something."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli import console, evaluate
from tests.cli.conftest import Run

SMALL = ("evaluate", "interference", "--json", "--seeds", "10", "--hours", "3")


def test_interference_gives_its_figures(fleetloop: Run) -> None:
    """JSON with what was asked for and what came out; 1 where a target is missed, which is then named."""
    found = fleetloop(*SMALL, "--days", "0", code=None)
    said = found.json
    assert {"auc", "recall", "false_alarm_rate", "antagonist_accuracy", "median_severity_error"} <= set(said)
    assert said["seeds"] == [10]
    assert said["settings"]["slowdown"] == 1.2
    assert said["alarms_per_replica_day"] == {}
    assert found.code == (console.EXIT_FAILED if said["missed"] else 0)
    assert "1 replicas of 3 h" in found.err


@pytest.mark.parametrize(
    ("option", "value", "word"),
    [("--seeds", "a-b", "FIRST-LAST"), ("--seeds", "9-3", "FIRST-LAST"), ("--confounders", "kv,rain", "'rain'")],
)
def test_wrong_options_are_4(option: str, value: str, word: str, fleetloop: Run) -> None:
    """The message names the value and what may stand there."""
    found = fleetloop("evaluate", "interference", option, value, code=console.EXIT_INPUT)
    assert word in found.err


def test_without_the_recorded_runs_real_is_4(fleetloop: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """FLEETLOOP_DATA is named as the remedy."""
    monkeypatch.delenv("FLEETLOOP_DATA", raising=False)
    assert "FLEETLOOP_DATA" in fleetloop("evaluate", "interference", "--real", code=console.EXIT_INPUT).err


def test_without_a_checkout_it_is_3(fleetloop: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An installed package has no generators: said so, with what to do."""
    monkeypatch.setattr(evaluate, "__file__", str(tmp_path / "cli" / "evaluate.py"))
    assert "source checkout" in fleetloop(*SMALL, code=console.EXIT_UNAVAILABLE).err
