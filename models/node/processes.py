"""Processes on the GPUs of a partition's nodes: whose they are and what each takes of SMs, memory and host CPU.

A reading says what a process took since the reading before, so it speaks for the time before it, at most `SPEAKS_S`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from models.node.samples import Added, SampleStore, around
from models.node.texts import Texts
from models.node.weighing import growth, latest, latest_of
from models.windows import WINDOW_S, overlap
from schemas.columns import Batch
from schemas.config import LimitsSpec

SPEAKS_S = 15.0
"""Time that a reading speaks for at most: three of the 5 s at which exporters read."""
SAME_READING_S = 1.0
"""Rows of one node within this belong to one reading: the GPUs are read one after the other."""
COLUMNS = ("status", "replica", "name", "gone", "host_cpus", "mem_bytes", "sm_util_pct", "mem_util_pct", "cpu_s")
"""What is kept of a reading; status: always 0; texts are codes."""
AT = {name: index for index, name in enumerate(COLUMNS)}
TEXTS = ("replica", "name")


class ProcessTable(NamedTuple):
    """What a window says of processes, by (node, GPU, process). P rows; NaN = unknown."""

    gpu: np.ndarray
    """int64 [P]: GPU code."""
    pid: np.ndarray
    """int64 [P]: on the host."""
    replica: list[str | None]
    name: list[str | None]
    sm: np.ndarray
    """float64 [P]: share of its GPU's SM time, 0..1."""
    memory: np.ndarray
    """float64 [P]: share of its GPU's memory time, 0..1."""
    cpu: np.ndarray
    """float64 [P]: share of the host's CPUs, 0..1; the same in every row of a process."""
    current: np.ndarray
    """bool [P]: whether it is in its node's latest reading before the window's end."""
    gone: np.ndarray
    """bool [P]: it no longer exists, and the GPU still holds memory for it."""
    mem_bytes: np.ndarray
    """float64 [P]: device memory at its latest reading."""
    read: dict[int, bool]
    """Codes of the nodes that said anything of processes: of their other GPUs it is known that they have none."""


class Processes:
    """State; see the module."""

    def __init__(self) -> None:
        self.store = SampleStore(len(COLUMNS))
        self.code = 0
        self.codes: dict[str, int] = {}
        """`node code/GPU code/pid` -> code."""
        self.names: dict[int, list[int]] = {}
        """Code -> node code, GPU code, pid."""
        self.counts: dict[int, int] = {}
        """Node code -> processes known on it."""

    def places(self, batch: Batch, node: int, gpus: np.ndarray, processes_max: int) -> np.ndarray:
        """float64 by row: code of its process, given if new; NaN where the node has too many. `gpus`: GPU codes."""
        found = np.full(batch.rows, np.nan)
        for row, (gpu, pid) in enumerate(zip(gpus.tolist(), batch.numbers["pid"].tolist(), strict=True)):
            key = f"{node}/{int(gpu)}/{int(pid)}"
            code = self.codes.get(key)
            if code is None:
                known = self.counts.get(node, 0)
                if known >= processes_max:
                    continue
                self.counts[node] = known + 1
                self.code += 1
                code = self.codes[key] = self.code
                self.names[code] = [node, int(gpu), int(pid)]
            found[row] = code
        return found

    def add(self, subjects: np.ndarray, batch: Batch, texts: dict[str, np.ndarray]) -> Added:
        """Takes rows; `texts`: codes of the text columns."""
        rows = [texts[c] if c in TEXTS else batch.numbers[c] for c in COLUMNS[1:]]
        return self.store.add(subjects, batch.numbers["at_s"], np.array([np.zeros(batch.rows), *rows]), SPEAKS_S)

    def table(self, texts: Texts, start_s: int, limits: LimitsSpec) -> ProcessTable | None:
        """What the window at `start_s` says; None where no process was ever read."""
        if not self.store.size:
            return None
        end_s = start_s + WINDOW_S
        near = around(self.store.series(), start_s, end_s, SPEAKS_S, AT["status"])
        before = np.full(len(near.at), -np.inf)
        before[1:] = np.where(near.group[1:] == near.group[:-1], near.at[:-1], -np.inf)
        weight = overlap(np.maximum(before, near.at - SPEAKS_S), near.at, start_s, end_s)
        of = [self.names[code] for code in near.subjects.tolist()]
        node, gpu, pid = (np.array([name[i] for name in of], np.int64) for i in range(3))
        past = (near.at < end_s) & (near.at >= end_s - SPEAKS_S)
        last = latest_of(near, near.at, past)
        newest: dict[int, float] = {}
        for code, at in zip(node.tolist(), last.tolist(), strict=True):
            if at == at:
                newest[code] = max(at, newest.get(code, at))
        of_node = np.array([newest.get(code, np.inf) for code in node.tolist()], np.float64)
        shown = (np.bincount(near.group, weight, len(of)) > 0) | ~np.isnan(last)
        cpus = growth(near, slice(AT["cpu_s"], AT["cpu_s"] + 1), start_s, end_s)
        hosts = latest(near, AT["host_cpus"], near.at < np.inf)
        with np.errstate(invalid="ignore", divide="ignore"):
            cpu = np.clip(cpus.total[0] / cpus.covered_s / hosts, 0.0, 1.0)
        sm, memory = (_mean(near.group, near.values[AT[c]], weight, len(of)) for c in ("sm_util_pct", "mem_util_pct"))
        known = near.at < end_s
        found = ProcessTable(
            gpu=gpu,
            pid=pid,
            replica=texts.listed(latest(near, AT["replica"], near.at < np.inf)),
            name=texts.listed(latest(near, AT["name"], near.at < np.inf)),
            sm=np.clip(sm / 100, 0.0, 1.0),
            memory=np.clip(memory / 100, 0.0, 1.0),
            cpu=cpu,
            current=last >= of_node - SAME_READING_S,
            gone=latest(near, AT["gone"], known) > 0,
            mem_bytes=latest(near, AT["mem_bytes"], known),
            read=dict.fromkeys(newest, True),
        )
        return found if shown.all() else _where(found, shown)

    def prune(self, horizon_s: float, oldest_s: float) -> None:
        """Forgets readings before `horizon_s`, but each process's last, and that too if it is before `oldest_s`."""
        self.store.prune(horizon_s, oldest_s, AT["status"], np.zeros(0))
        self.codes = {key: code for key, code in self.codes.items() if code in self.store.last}
        self.names = {code: self.names[code] for code in self.codes.values()}
        self.counts = {}
        for node, _, _ in self.names.values():
            self.counts[node] = self.counts.get(node, 0) + 1

    def texts(self) -> np.ndarray:
        """Codes of the texts in use."""
        used: np.ndarray = self.store.data[[2 + AT[name] for name in TEXTS], : self.store.size].ravel()
        return used

    def state(self) -> dict[str, Any]:
        """Plain values for a dump."""
        return {"store": self.store.state(), "code": self.code, "codes": self.codes, "names": self.names}

    def restore(self, state: dict[str, Any]) -> None:
        """Replaces everything by what `state` gave."""
        self.store.restore(state["store"])
        self.code, self.codes, self.names = state["code"], state["codes"], state["names"]
        self.counts = {}
        for node, _, _ in self.names.values():
            self.counts[node] = self.counts.get(node, 0) + 1


def _mean(group: np.ndarray, values: np.ndarray, weight: np.ndarray, size: int) -> np.ndarray:
    used = np.where(np.isnan(values), 0.0, weight)
    with np.errstate(invalid="ignore"):
        total = np.bincount(group, used * np.where(np.isnan(values), 0.0, values), size)
        found: np.ndarray = total / np.bincount(group, used, size)
    return found


def _where(table: ProcessTable, shown: np.ndarray) -> ProcessTable:
    chosen = np.flatnonzero(shown)
    lists = ([values[i] for i in chosen.tolist()] for values in (table.replica, table.name))
    replica, name = lists
    arrays = {c: getattr(table, c)[chosen] for c in table._fields if isinstance(getattr(table, c), np.ndarray)}
    return table._replace(replica=replica, name=name, **arrays)
