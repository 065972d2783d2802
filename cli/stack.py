"""A whole Fleetloop on this machine: child processes with their logs in files, watched, and ended together."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

from schemas.errors import UnavailableError

STOP_WITHIN_S = 25.0
"""More than a worker gives its own children (FLEETLOOP_STOP_TIMEOUT_S and 2 s)."""
TAIL_LINES = 15


def free_ports(count: int) -> list[int]:
    """Ports on loopback in a row that are free now, below the ephemeral range: no client is given one of them."""
    found: list[int] = []
    # From anywhere: two demos that start together shall not look in the same place.
    for port in range(18_000 + random.randrange(1500), 20_000):
        found = [*found, port] if is_free(port) else []
        if len(found) == count:
            return found
    raise UnavailableError(f"no {count} free ports on 127.0.0.1 between 18000 and 20000: end what uses them")


def is_free(port: int) -> bool:
    """Whether a port on loopback can be listened on."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # TIME_WAIT is no obstacle for a listener
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def preferred_port(port: int, otherwise: int) -> int:
    """The port if it is free, else the other one."""
    return port if is_free(port) else otherwise


def claimed(folder: Path, port: int) -> IO[bytes] | None:
    """Claims a port among programs of ours, as long as the file given is open; None where another has claimed it,
    or where the folder cannot be written.

    Between the look for a free port and its use by a child that has yet to start, seconds pass.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f"port-{port}.lock").open("wb")
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


class Stack:
    """Child processes `fleetloop ARGS`, each in a session of its own so that Ctrl-C reaches us alone."""

    def __init__(self, logs: Path, env: dict[str, str]) -> None:
        self.logs = logs
        self.env = {**os.environ, **env, "PYTHONUNBUFFERED": "1"}
        self.children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *args: str, env: dict[str, str] | None = None) -> None:
        """Starts `fleetloop ARGS` with its output in `logs/name.log`."""
        with (self.logs / f"{name}.log").open("wb") as log:
            self.children[name] = subprocess.Popen(
                # the child ends when this pipe closes, however we die (see cli.lifeline)
                [sys.executable, "-m", "cli.lifeline", *args],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**self.env, **(env or {})},
                start_new_session=True,
            )

    def check(self) -> None:
        """Raises UnavailableError with the end of its log where a child has ended."""
        for name, child in self.children.items():
            code = child.poll()
            if code is not None:
                raise UnavailableError(
                    f"{name} ended with code {code}; {self.logs / name}.log ends with:\n{self.tail(name)}"
                )

    def tail(self, name: str) -> str:
        """The last lines of a child's log."""
        return "\n".join((self.logs / f"{name}.log").read_text(errors="replace").splitlines()[-TAIL_LINES:])

    def stop(self) -> None:
        """SIGTERM to all, newest first; SIGKILL to whole sessions that have not ended in time."""
        for child in reversed(list(self.children.values())):
            if child.poll() is None:
                child.terminate()
        deadline = time.monotonic() + STOP_WITHIN_S
        for child in self.children.values():
            try:
                child.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
            if child.stdin is not None:
                child.stdin.close()
        self.children.clear()
