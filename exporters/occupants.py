"""Who is on the GPUs: the driver's processes, with what /proc, kubelet and the mapping say of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from exporters.inventory import Holdings, Seen
from exporters.matching import Owner, Subject
from exporters.nvml_mig import index_of
from exporters.nvml_processes import Held
from exporters.pods import Holder, Pods
from exporters.processes import Process, Processes
from schemas.node import PROCESS_SAMPLES, GpuEntry

ROWS_MAX = 1024
"""A record of so many rows, with all their names, is small enough for its topic."""
TEXT_MAX = 200
_NUMBER = re.compile(r"(?:nvidia)?(\d{1,2})(?:/gi(\d{1,2}))?")


class _Row(NamedTuple):
    gpu: int
    held: Held
    process: Process | None
    gone: bool
    subject: Subject


class Occupants:
    """What each process takes of a GPU, and whose it is."""

    def __init__(self, node: str, processes: Processes, pods: Pods, holdings: Holdings) -> None:
        self.node, self.processes, self.pods, self.holdings = node, processes, pods, holdings
        self.dropped = 0
        """Rows beyond the bound, since the start."""
        self._last: dict[int, list[_Row]] = {}
        self._missing: set[tuple[int, int]] = set()

    def look(
        self, held: Mapping[int, Sequence[Held]], gpus: Sequence[GpuEntry], at_s: Callable[[], float]
    ) -> dict[str, list[Any]]:
        """Columns of PROCESS_SAMPLES. `held`: index -> processes; a GPU that is left out keeps what it had."""
        now_s = at_s()
        self.pods.refresh()
        found = self.processes.look([one.pid for each in held.values() for one in each])
        given = self._given(gpus)
        missing = {pid for pid, process in found.items() if process is None}
        for gpu, each in held.items():
            rows = (self._row(gpu, one, found, given.get(gpu, [])) for one in each)
            self._last[gpu] = [row for row in rows if row is not None]
        self._missing = {(gpu, one.pid) for gpu, each in held.items() for one in each if one.pid in missing}
        present = {entry.gpu for entry in gpus}
        self._last = {gpu: rows for gpu, rows in self._last.items() if gpu in present}
        owners = self.holdings.observe(self._seen(given), self._last, now_s)
        return self._columns([row for gpu in held for row in self._last.get(gpu, ())], owners, now_s)

    def _row(self, gpu: int, held: Held, found: Mapping[int, Process | None], holders: list[Holder]) -> _Row | None:
        process = found.get(held.pid)
        if process is None:
            if not held.holds:
                return None  # ended since it used the GPU
            # Once may be a process that is just ending: the driver and /proc are not read in the same moment.
            gone = held.pid in found and (gpu, held.pid) in self._missing
            return _Row(gpu, held, None, gone, Subject(self.node))
        pod = self.pods.name_of(process.pod_uid)
        if not pod and process.pod_uid and len({one.pod for one in holders}) == 1:
            pod = holders[0].pod
        names = {one.container for one in holders if one.pod == pod}
        name = names.pop() if len(names) == 1 else ""
        commands = tuple(process.commands)
        return _Row(gpu, held, process, False, Subject(self.node, pod, process.container, name, process.name, commands))

    def _given(self, gpus: Sequence[GpuEntry]) -> dict[int, list[Holder]]:
        """GPU -> containers that kubelet gave it to."""
        by_name = {entry.uuid: entry.gpu for entry in gpus}
        known = {entry.gpu for entry in gpus}
        out: dict[int, list[Holder]] = {}
        for holder in self.pods.holders or ():
            for device in holder.devices:
                name = device.partition("::")[0]  # `::` and a number: one of several shares of it
                numbers = _NUMBER.fullmatch(name)
                index = by_name.get(name)
                if index is None and numbers is not None:
                    whole = int(numbers[1])
                    index = whole if numbers[2] is None else index_of(whole, int(numbers[2]))
                if index in known and holder not in out.setdefault(index, []):  # type: ignore[arg-type]
                    out[index].append(holder)  # type: ignore[index]
        return out

    def _seen(self, given: Mapping[int, Sequence[Holder]]) -> list[Seen]:
        pods = [
            Seen(gpu, 0, "", Subject(self.node, one.pod, "", one.container), False)
            for gpu, holders in given.items()
            for one in holders
        ]
        live = [
            Seen(row.gpu, row.process.pid, row.process.start, row.subject, row.held.holds)
            for rows in self._last.values()
            for row in rows
            if row.process is not None
        ]
        return pods + live

    def _columns(self, rows: list[_Row], owners: Mapping[tuple[int, int], Owner], now_s: float) -> dict[str, list[Any]]:
        self.dropped += max(0, len(rows) - ROWS_MAX)
        out: dict[str, list[Any]] = {name: [] for name in PROCESS_SAMPLES.columns}
        for row in rows[:ROWS_MAX]:
            pid = row.held.pid if row.process is None else row.process.pid
            owner = owners.get((row.gpu, pid))
            subject = row.subject
            values = {
                "gpu": row.gpu,
                "at_s": now_s,
                "pid": pid,
                "name": _text(subject.process),
                "container": subject.container or None,
                "pod": _text(subject.pod),
                "replica": owner.replica if owner else None,
                "tenant": owner.tenant if owner else None,
                "gone": int(row.gone) if row.process is not None or row.gone else None,
                "mem_bytes": row.held.mem_bytes,
                "sm_util_pct": row.held.sm_util_pct,
                "mem_util_pct": row.held.mem_util_pct,
                "cpu_s": row.process.cpu_s if row.process else None,
                "host_cpus": self.processes.host_cpus,
            }
            for name, column in out.items():
                column.append(values[name])
        return out


def _text(text: str) -> str | None:
    shown = "".join(c for c in text if c.isprintable())[:TEXT_MAX]
    return shown or None
