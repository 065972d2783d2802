"""Runs processes, one per level, and starts again what ends: with back-off and jitter, so that nothing storms.

SIGTERM and SIGINT pass on, wait, then kill. Children end with their parent (streams.watchdog looks for it).
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Mapping

import structlog

from streams.settings import Settings
from streams.watchdog import PARENT_VARIABLE

log = structlog.get_logger(__name__)

BACKOFF_S_FIRST = 0.5
BACKOFF_S_MAX = 30.0
STEADY_S = 60.0
"""A child that lived for so long starts again without the back-off of earlier ends."""


def backoff_s(ends: int, jitter: float) -> float:
    """Wait before the start after `ends` ends in a row: doubled each time, +/- 25 % by jitter in [0, 1)."""
    return min(BACKOFF_S_MAX, BACKOFF_S_FIRST * 2 ** min(ends - 1, 16)) * (0.75 + jitter / 2)


class Supervisor:
    """Keeps one process per name running until told to stop.

    Parameters
    ----------
    commands: name -> command line.
    """

    def __init__(self, commands: Mapping[str, list[str]], settings: Settings) -> None:
        self.commands, self.settings = dict(commands), settings
        self.children: dict[str, asyncio.subprocess.Process] = {}
        self.restarts: dict[str, int] = dict.fromkeys(commands, 0)
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Begins to stop everything."""
        self._stopping.set()

    async def run(self) -> int:
        """Until SIGTERM, SIGINT or `stop`; 0 when every child ended by itself within the time."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        results = await asyncio.gather(*(self._keep(name) for name in self.commands))
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        return max(results, default=0)

    async def _keep(self, name: str) -> int:
        ends = 0
        while not self._stopping.is_set():
            began = time.monotonic()
            child = self.children[name] = await self._start(name)
            log.info("started", child=name, pid=child.pid)
            if not await self._wait(child):
                return await self._end(name, child)
            lived = time.monotonic() - began
            ends = 1 if lived > STEADY_S else ends + 1
            self.restarts[name] += 1
            wait = backoff_s(ends, random.random())
            log.error(
                "child ended", child=name, status=child.returncode, lived_s=round(lived, 1), wait_s=round(wait, 1)
            )
            try:
                async with asyncio.timeout(wait):
                    await self._stopping.wait()
            except TimeoutError:
                continue
        return 0

    async def _start(self, name: str) -> asyncio.subprocess.Process:
        environment = {**os.environ, PARENT_VARIABLE: str(os.getpid())}
        # A session of its own: Ctrl-C at the terminal reaches the supervisor alone, which passes it on once.
        return await asyncio.create_subprocess_exec(
            *self.commands[name], env=environment, stdin=asyncio.subprocess.DEVNULL, start_new_session=True
        )

    async def _wait(self, child: asyncio.subprocess.Process) -> bool:
        """True when the child ended, False when it is time to stop it."""
        ended, stopping = asyncio.create_task(child.wait()), asyncio.create_task(self._stopping.wait())
        await asyncio.wait([ended, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if ended.done() and not self._stopping.is_set():
            return True
        ended.cancel()
        return False

    async def _end(self, name: str, child: asyncio.subprocess.Process) -> int:
        if child.returncode is None:
            child.terminate()
        try:
            async with asyncio.timeout(self.settings.stop_timeout_s + 2.0):
                await child.wait()
            return 0
        except TimeoutError:
            log.error("child killed: it did not end", child=name, pid=child.pid)
            child.kill()
            await child.wait()
            return 1
