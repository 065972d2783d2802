"""Child processes of a demo: they end with their parent however it ends, and free ports are free."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cli import stack
from cli.stack import Stack, claimed, free_ports, preferred_port
from schemas.errors import UnavailableError

PARENT = """
import sys, time
from pathlib import Path
from cli.stack import Stack
s = Stack(Path(sys.argv[1]), {})
s.start("broker", "broker", "--data", sys.argv[1] + "/kafka", "--port", sys.argv[2], "--heap-mb", "256")
print(s.children["broker"].pid, flush=True)
time.sleep(600)
"""
SLEEPER = "import cli.lifeline, signal, time; {before}; print('up', flush=True); time.sleep(600)"


def eventually(what: str, holds: Callable[[], bool], within_s: float = 30.0) -> None:
    """Waits until something holds; fails with its name when it does not."""
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {within_s:.0f} s: {what}"
        time.sleep(0.05)


def listens(port: int) -> bool:
    """Whether somebody takes connections on a port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_children_end_with_a_parent_that_was_killed(tmp_path: Path, broker: object) -> None:
    """kill -9 of a demo leaves no Kafka, no process and no port behind (`broker`: Java and jars are there)."""
    (port,) = free_ports(1)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path), str(port)], stdout=subprocess.PIPE, text=True, close_fds=True
    )
    try:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        eventually("Kafka listens", lambda: listens(port), 90.0)
        family = [child, *child.children(recursive=True)]
        assert len(family) >= 2, "fleetloop and its JVM"
    finally:
        parent.kill()
        parent.wait()
        assert parent.stdout is not None
        parent.stdout.close()
    gone, alive = psutil.wait_procs(family, timeout=40)
    for process in alive:
        process.kill()
    assert alive == []
    assert len(gone) == len(family)
    assert not listens(port)


def test_a_child_that_ended_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    """Exit code and the last lines, so that nobody has to look for a file."""
    processes = Stack(tmp_path, {"FLEETLOOP_BOOTSTRAP_SERVERS": "nowhere"})
    processes.start("views", "views")
    try:
        processes.children["views"].wait(60)
        with pytest.raises(UnavailableError, match=r"(?s)views ended with code 4;.*host:port"):
            processes.check()
    finally:
        processes.stop()


def test_stop_ends_all_also_one_that_does_not_listen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM first; what ignores it is killed with its whole session, and nothing is left."""
    monkeypatch.setattr(stack, "STOP_WITHIN_S", 1.0)
    processes = Stack(tmp_path, {})
    for name, before in (("good", "pass"), ("deaf", "signal.signal(signal.SIGTERM, signal.SIG_IGN)")):
        with (tmp_path / f"{name}.log").open("wb") as log:
            processes.children[name] = subprocess.Popen(
                [sys.executable, "-c", SLEEPER.format(before=before)],
                stdin=subprocess.PIPE,
                stdout=log,
                start_new_session=True,
            )
    found = dict(processes.children)
    eventually("both run", lambda: all("up" in processes.tail(name) for name in found))
    processes.stop()
    assert found["good"].returncode == -signal.SIGTERM
    assert found["deaf"].returncode == -signal.SIGKILL
    assert processes.children == {}


def test_each_child_has_a_session_of_its_own(tmp_path: Path) -> None:
    """Ctrl-C in a terminal reaches the parent alone, which ends the others in order."""
    processes = Stack(tmp_path, {})
    processes.start("help", "--help")
    try:
        assert os.getsid(processes.children["help"].pid) == processes.children["help"].pid
        processes.children["help"].wait(60)
    finally:
        processes.stop()


def test_free_ports_are_free_in_a_row_and_below_the_ephemeral_ones() -> None:
    """No client is given one of them between the look and the use."""
    ports = free_ports(6)
    assert ports == list(range(ports[0], ports[0] + 6)), "in a row: a worker's health ports are counted from one"
    assert max(ports) < int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in ports:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


def test_a_port_in_use_is_not_preferred() -> None:
    """The wanted port where it is free, the other one where it is not."""
    (port,) = free_ports(1)
    assert preferred_port(port, 1) == port
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", port))
        holder.listen()
        assert preferred_port(port, 1) == 1


def test_a_claimed_port_is_claimed_by_one(tmp_path: Path) -> None:
    """Two demos that start in the same second do not both take the usual port; the next one after them may."""
    first = claimed(tmp_path / "state", 6066)
    assert first is not None
    assert claimed(tmp_path / "state", 6066) is None
    other = claimed(tmp_path / "state", 6067)
    assert other is not None
    other.close()
    first.close()
    again = claimed(tmp_path / "state", 6066)
    assert again is not None
    again.close()
