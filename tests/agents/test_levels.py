"""Every level has a fold, and a process that runs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from agents import FOLDS, LEVELS, make_fold, worker_commands
from schemas.errors import SettingsError
from schemas.topics import LEVEL_TOPIC
from streams.topics import partition_counts


def test_levels_are_those_of_the_registry() -> None:
    """The registry's levels, and no others, can be run."""
    assert set(LEVELS) == set(LEVEL_TOPIC)
    assert list(worker_commands(("pool",))) == ["pool"]


@pytest.mark.parametrize("level", FOLDS)
def test_fold_of_each_level(level: str) -> None:
    """A fresh fold takes nothing, gives nothing, and comes back from its own dump."""
    fold = make_fold(level, LEVEL_TOPIC[level], 0, partition_counts(True))
    assert fold.apply([]) == []
    dump = fold.dump()
    again = make_fold(level, LEVEL_TOPIC[level], 0, partition_counts(True))
    again.load(dump)
    assert again.dump() == dump
    assert all(isinstance(v, float | int) for v in fold.metrics().values())


def test_unknown_level() -> None:
    """An unknown level is an error that names the known ones, in code and as a process."""
    with pytest.raises(SettingsError, match="node, requests, pool, fleet"):
        make_fold("nodes", "node.samples", 0, {})
    done = subprocess.run(
        [sys.executable, "-m", "agents", "nodes"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "choose one of node" in done.stderr
    assert "Traceback" not in done.stderr
