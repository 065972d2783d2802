"""One level as a process, or all of them under a supervisor."""

from __future__ import annotations

from functools import partial

from agents import FOLDS, LEVELS, make_fold, worker_commands
from agents.config import ConfigAgent
from schemas.errors import SettingsError
from schemas.topics import LEVEL_TOPIC
from streams.deployment import read_deployment
from streams.level import LevelApp
from streams.logs import setup_logs
from streams.settings import Settings
from streams.supervisor import Supervisor


async def run_level(level: str, settings: Settings) -> int:
    """Runs one level in this process until SIGTERM; gives its exit status. Raises SettingsError."""
    if level not in LEVELS:
        raise SettingsError(f"level: {level!r}: choose one of {', '.join(LEVELS)}")
    setup_logs(settings, app=level)
    deployment = await read_deployment(settings)
    if level not in FOLDS:
        return await ConfigAgent(settings, deployment).run()
    # What a fold needs is imported now: in the middle of a rebalance it would hold up the whole group.
    make_fold(level, LEVEL_TOPIC[level], 0, dict(deployment.partitions))
    return await LevelApp(level, partial(make_fold, level), settings, deployment).run()


async def run_worker(settings: Settings, levels: tuple[str, ...] = LEVELS) -> int:
    """Runs the named levels as child processes until SIGTERM; gives the exit status. Raises SettingsError."""
    setup_logs(settings, app="supervisor")
    await read_deployment(settings)  # says what is wrong once, rather than each child for ever
    return await Supervisor(worker_commands(levels), settings).run()
