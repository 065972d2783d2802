"""Runs `fleetloop` as a child that does not outlive its parent: when stdin, a pipe that only the parent holds,
closes, it gets SIGTERM as if it had been told to stop. The kernel closes the pipe however the parent dies.
"""

from __future__ import annotations

import os
import signal
import threading

from cli.main import main


def _watch() -> None:
    while os.read(0, 1):  # not sys.stdin: its lock would be held when the interpreter ends
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_watch, name="lifeline", daemon=True).start()
    main()
