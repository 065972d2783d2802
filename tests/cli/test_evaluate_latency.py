"""`fleetloop evaluate latency`: figures as JSON, seeds from the command line."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from cli.main import app
from tests.generators.latency import CAUSES


def test_figures_of_the_seeds_that_were_asked_for() -> None:
    """One pool, every cause alone: what was injected, and how often it was named."""
    done = CliRunner().invoke(app, ["evaluate", "latency", "--seeds", "1", "--alone", "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["seeds"] == [1]
    assert list(said["causes"]) == list(CAUSES)
    assert "pairs" not in said
    assert said["single"] >= 0.9
    for row in said["causes"].values():
        assert row["runs"] + len(row["silent"]) == 1


def test_what_are_no_seeds_is_refused() -> None:
    """With the field, before anything runs."""
    done = CliRunner().invoke(app, ["evaluate", "latency", "--seeds", "many"])
    assert done.exit_code == 4
    assert "--seeds" in done.stderr
