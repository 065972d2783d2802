"""The supervisor starts again what ends, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.settings import load_settings
from streams.supervisor import BACKOFF_S_MAX, Supervisor, backoff_s

SLEEPER = "import os, sys, time; open(sys.argv[1], 'a').write(f'{os.getpid()}\\n'); time.sleep(600)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEPER
CHILD_WITH_WATCHDOG = (
    "from streams.watchdog import Watchdog; import os, sys, time; Watchdog(lambda: '').start(); "
    "open(sys.argv[1], 'a').write(f'{os.getpid()}\\n'); time.sleep(600)"
)


def pids(file: Path) -> list[int]:
    return [int(line) for line in file.read_text().splitlines()] if file.exists() else []


async def until_pids(file: Path, count: int) -> list[int]:
    async with asyncio.timeout(30):
        while len(pids(file)) < count:  # noqa: ASYNC110 - another process writes it
            await asyncio.sleep(0.02)
    return pids(file)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] != "Z"


async def test_restarts_and_stops(tmp_path: Path) -> None:
    """A killed child is started again, alone; at the end none is left."""
    one, two = tmp_path / "one", tmp_path / "two"
    commands = {f.name: [sys.executable, "-c", SLEEPER, str(f)] for f in (one, two)}
    supervisor = Supervisor(commands, load_settings())
    task = asyncio.create_task(supervisor.run())
    [first] = await until_pids(one, 1)
    [other] = await until_pids(two, 1)
    os.kill(first, signal.SIGKILL)
    again = (await until_pids(one, 2))[1]
    assert (supervisor.restarts["one"], supervisor.restarts["two"]) == (1, 0)
    supervisor.stop()
    assert await task == 0
    assert not any(alive(p) for p in (first, again, other))


async def test_kills_what_does_not_end(tmp_path: Path) -> None:
    """A child that ignores SIGTERM is killed after its time, and the status says so."""
    file = tmp_path / "pid"
    supervisor = Supervisor({"s": [sys.executable, "-c", STUBBORN, str(file)]}, load_settings(stop_timeout_s=0.1))
    task = asyncio.create_task(supervisor.run())
    [pid] = await until_pids(file, 1)
    supervisor.stop()
    assert await task == 1
    assert not alive(pid)


async def test_children_end_with_their_parent(tmp_path: Path) -> None:
    """When the supervisor is killed -9, its children notice and end."""
    file = tmp_path / "pid"
    code = (
        "import asyncio, sys; from streams.settings import load_settings; from streams.supervisor import Supervisor; "
        f"asyncio.run(Supervisor({{'c': [sys.executable, '-c', {CHILD_WITH_WATCHDOG!r}, {str(file)!r}]}}, "
        "load_settings()).run())"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)  # noqa: ASYNC220
    [child] = await until_pids(file, 1)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while alive(child):
        assert time.monotonic() < deadline, "the child outlived its parent"
        await asyncio.sleep(0.05)


@given(st.integers(1, 1000), st.floats(0, 1, exclude_max=True))
def test_back_off(ends: int, jitter: float) -> None:
    """It doubles to a bound, within a quarter."""
    assert 0.75 * 0.5 <= backoff_s(ends, jitter) <= 1.25 * BACKOFF_S_MAX
    assert backoff_s(1, 0.5) == pytest.approx(0.5)
    assert backoff_s(3, 0.5) == pytest.approx(2.0)
