"""The levels as agents: bind each level's fold to the substrate. No arithmetic here."""

from __future__ import annotations

import importlib
import sys

from schemas.errors import SettingsError
from schemas.log import Fold

FOLDS = {
    "node": ("agents.node", "NodeFold"),
    "requests": ("agents.requests", "RequestsFold"),
    "pool": ("agents.pool", "PoolFold"),
    "fleet": ("agents.fleet", "FleetFold"),
}
"""Level -> module and class of its fold; loaded when asked for, so that a worker loads only its own level."""

LEVELS = (*FOLDS, "config")
"""Every level that a worker can run."""


def make_fold(level: str, topic: str, partition: int, partitions: dict[str, int]) -> Fold:
    """A fresh fold of a level for one partition. Raises SettingsError for an unknown level."""
    if level not in FOLDS:
        raise SettingsError(f"level: {level!r}: choose one of {', '.join(FOLDS)}")
    module, name = FOLDS[level]
    fold: Fold = getattr(importlib.import_module(module), name)(topic, partition, partitions)
    return fold


def worker_commands(levels: tuple[str, ...] = LEVELS) -> dict[str, list[str]]:
    """Level -> command line of its process, for `streams.supervisor.Supervisor`."""
    return {level: [sys.executable, "-m", "agents", level] for level in levels}
