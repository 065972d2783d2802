"""A thread that ends a process which no longer works, so that its supervisor starts it again.

A thread, because what it looks for is a loop that does not run. It also ends a child whose parent is gone.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import structlog

log = structlog.get_logger(__name__)

INTERVAL_S = 1.0
EXIT_STATUS = 70
PARENT_VARIABLE = "FLEETLOOP_PARENT_PID"
ORPHAN_GRACE_S = 5.0


class Watchdog(threading.Thread):
    """Asks `unhealthy` each second; ends the process when it answers."""

    def __init__(self, unhealthy: Callable[[], str]) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._unhealthy = unhealthy
        self._deadline: float | None = None
        self._parent = int(os.environ.get(PARENT_VARIABLE, "0"))
        self._orphan_at: float | None = None
        self._done = threading.Event()

    def expect_end(self, within_s: float) -> None:
        """From now on the process is stopping: it is ended if that takes longer, and for nothing else."""
        self._deadline = time.monotonic() + within_s

    def done(self) -> None:
        """What it watched has ended; the process may go on."""
        self._done.set()

    def run(self) -> None:
        """Until `done`, or until the process ends."""
        while not self._done.is_set():
            began = time.monotonic()
            if self._done.wait(INTERVAL_S):
                return
            self._check_parent()
            if time.monotonic() - began > 3 * INTERVAL_S:
                time.sleep(2 * INTERVAL_S)  # the whole process was suspended: let it catch up before judging it
                continue
            why = self._why()
            if why:
                log.critical("watchdog ends this process", why=why)
                faulthandler.dump_traceback(file=sys.stderr)
                os._exit(EXIT_STATUS)

    def _why(self) -> str:
        if self._deadline is not None:
            return "stopping took too long" if time.monotonic() > self._deadline else ""
        return self._unhealthy()

    def _check_parent(self) -> None:
        if not self._parent or os.getppid() == self._parent:
            return
        if self._orphan_at is None:
            self._orphan_at = time.monotonic()
            log.warning("parent is gone; stopping")
            os.kill(os.getpid(), signal.SIGTERM)
        elif time.monotonic() - self._orphan_at > ORPHAN_GRACE_S:
            os._exit(EXIT_STATUS)
