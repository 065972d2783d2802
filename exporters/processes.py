"""Who a process is, by the host's /proc: its container and pod, its command and those above it, its CPU time.

A driver's process ids may be those of a container (of this one, where it is not started in the host's process
namespace). Each is looked up as a host's id first, and believed only if the process has the GPU open wherever that is
in doubt; else a process whose id inside its namespace is that one, and which has it open, is taken.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

PARENTS_MAX = 8
SCAN_MAX = 32_768
"""Processes looked at for ids that are not the host's."""
SCAN_S = 30.0
"""... where one stays unknown, not again before this."""
_INIT_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO: the host's, on every Linux since 3.8
_CONTAINER = re.compile(r"(?<![0-9a-f])(?<!conmon-)([0-9a-f]{64})(?![0-9a-f])")
_POD = re.compile(
    r"pod([0-9a-f]{8}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{12}|[0-9a-f]{32})(?![0-9a-f])"
)
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(slots=True)
class Process:
    """A process of the host while it lives."""

    pid: int
    start: str
    """Start time in clock ticks since boot: with `pid` it names the process."""
    name: str = ""
    container: str = ""
    pod_uid: str = ""
    commands: list[str] = field(default_factory=list, repr=False)
    """Its command line and those of its parents. May hold secrets: to be matched, never to be shown."""
    cpu_s: float | None = None
    """CPU time of all its threads since its start."""


class Processes:
    """The host's processes. Parameters: `proc` is where the host's /proc is mounted."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self.proc = proc
        self.host_cpus = os.cpu_count()
        self._known: dict[int, Process] = {}
        """By the driver's id, those of the last `look`."""
        self._absent: set[int] = set()
        self._scan_at = 0.0
        own = _ids(self._text("self/status"))
        self.nested = len(own) > 1
        """`proc` is the host's, and we are in a namespace below it: the driver may give ids of ours."""
        hosts = self.nested or self._link("self/ns/pid") in (_INIT_NAMESPACE, "")
        self.whole = hosts and bool(self._text("1/stat"))  # hidepid hides those of other users
        """Every process of the host can be seen: one that is not there does not exist."""
        self._level = len(own) - 1

    def look(self, pids: list[int]) -> dict[int, Process | None]:
        """Who these are, by the driver's ids. None: it no longer exists. Left out: it cannot be seen from here."""
        now = time.monotonic()
        scan = self.nested and now >= self._scan_at
        known = {pid: process for pid in dict.fromkeys(pids) if (process := self._one(pid, scan)) is not None}
        absent = {pid for pid in pids if pid not in known}
        if scan and absent:
            self._scan_at = now + SCAN_S
        if scan or not self.nested:
            self._absent = absent if self.whole else set()
        self._known = known
        return {**known, **dict.fromkeys(absent & self._absent)}

    def _one(self, pid: int, scan: bool) -> Process | None:
        known = self._known.get(pid)
        if known is not None:
            alive = self._alive(known.pid)
            if alive is not None and alive.start == known.start:
                known.cpu_s, known.name = alive.cpu_s, alive.name
                return known
        process = self._alive(pid)
        if self.nested and (process is None or not self._has_gpu(pid)):
            process = self._by_inner_id(pid) if scan else None
        if process is not None:
            process.container, process.pod_uid = of_cgroup(self._text(f"{process.pid}/cgroup"))
            process.commands = self._commands(process.pid)
        return process

    def _alive(self, pid: int) -> Process | None:
        """The process with its CPU time; None where there is none (or only a zombie)."""
        name, _, rest = self._text(f"{pid}/stat").partition("(")[2].rpartition(")")
        values = rest.split()
        if len(values) < 20:
            return None
        state, threads = values[0], values[17]
        if state in "XxZ" and threads in ("0", "1"):
            return None
        cpu_s = (int(values[11]) + int(values[12])) / _TICKS_PER_S
        return Process(pid, values[19], name=name, cpu_s=cpu_s)

    def _has_gpu(self, pid: int) -> bool:
        try:
            with os.scandir(self.proc / str(pid) / "fd") as files:
                return any(self._link(f"{pid}/fd/{one.name}").startswith("/dev/nvidia") for one in files)
        except OSError:
            return False

    def _by_inner_id(self, pid: int) -> Process | None:
        """The only process that has this id at our level of namespaces, or in its own, and a GPU open."""
        found = []
        try:
            numbers = [int(name) for name in os.listdir(self.proc) if name.isdigit()][:SCAN_MAX]
        except OSError:
            return None
        for number in numbers:
            ids = _ids(self._text(f"{number}/status"))
            if pid in (ids[self._level : self._level + 1] + ids[-1:]) and len(ids) > 1 and self._has_gpu(number):
                found.append(number)
        return self._alive(found[0]) if len(found) == 1 else None

    def _commands(self, pid: int) -> list[str]:
        out = []
        for _ in range(PARENTS_MAX):
            line = self._text(f"{pid}/cmdline").replace("\0", " ").strip()
            if line:
                out.append(line)
            parent = re.search(r"^PPid:\s*(\d+)", self._text(f"{pid}/status"), re.MULTILINE)
            pid = int(parent[1]) if parent is not None else 0
            if pid <= 1:
                break
        return out

    def _text(self, path: str) -> str:
        try:
            with open(self.proc / path, "rb") as file:
                return file.read(65_536).decode(errors="replace")
        except OSError:  # it has ended, or is not ours to see
            return ""

    def _link(self, path: str) -> str:
        try:
            return os.readlink(self.proc / path)
        except OSError:
            return ""


def of_cgroup(text: str) -> tuple[str, str]:
    """(container id, pod uid) of a /proc/<pid>/cgroup, versions 1 and 2; empty where there is none.

    Docker, containerd, CRI-O and podman name a group by the container's 64 hex digits, kubelet by `pod<uid>`.
    """
    container = pod = ""
    for line in text.splitlines():
        path = line.split(":", 2)[-1]
        if containers := _CONTAINER.findall(path):
            container = container or containers[-1]  # the innermost, where one runs in another
        if pods := _POD.findall(path):
            pod = pod or pods[-1].replace("_", "-")
    return container, pod


def _ids(status: str) -> list[int]:
    """The process id in each namespace from the mount's inwards (NSpid of /proc/<pid>/status)."""
    found = re.search(r"^NSpid:((?:\s+\d+)+)\s*$", status, re.MULTILINE)
    return [int(one) for one in found[1].split()] if found is not None else []
