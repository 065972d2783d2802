"""Who is slowed by a neighbour on the same GPU or host, by whom, and how much: one row a replica and window.

The arithmetic is in `models.node.interference_fit`. Here: who is whose neighbour, what is said of it, and the second
channel: a replica that is slower than its own load and its neighbours explain, by its own past or by what the other
replicas of its pool need when they are alone (`models.node.interference_pool`). That is never blamed on anybody.

Knows no samples: the node fold gives what one closed window says of every replica.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from models.node.interference_fit import LEARNED, Bank, Judged
from models.node.interference_pool import Alone
from models.node.interference_rows import fresh, with_slot, without_slot
from models.node.interference_terms import features
from schemas.config import LimitsSpec
from schemas.signals import INTERFERENCE_WINDOWS

TOKENS_MIN, STEPS_MIN, COVERED_S_MIN = 60.0, 20.0, 4.0
"""A window that says less is not learned from or judged."""
LOAD_MAX = {
    "running": 1e5, "kv_tokens": 1e9, "prefill_step": 1e6, "preemptions_per_s": 1e5, "accepted": 1e3, "tpot_s": 1e4,
}  # fmt: skip
"""A window with a load beyond is not one of an engine: one such would spoil the fit of its pool for good."""
LN_MAX = 50.0
"""Largest logarithm that is told as a multiple or a time: beyond, a number would leave what records can hold."""
KEEP_S = 6 * 3600
"""Replicas and neighbours that were not seen for so long are forgotten."""
SLOW = math.log(1.10)
"""Slowness without a cause is told from here, in ln TPOT."""
OF_SIX = 3
"""Hits among the last six windows that make a victim."""
INTERVAL = 2.4
"""Standard deviations to either end of 95 %: a window's errors have heavier tails than the normal's 1.96 (measured)."""
_BITS = np.array([bin(bits).count("1") for bits in range(64)])

Key = int | str


class Neighbour(NamedTuple):
    """What shares a GPU or the host with a replica in a window."""

    name: str
    """A replica, or `pid/name` of a process that is part of none."""
    pool: str
    """Empty: of none."""
    pressure: float | None
    """0..1: the largest of its shares of SM, memory and host CPU; 1 where only presence is known. None: unknown."""
    graded: bool
    """Whether pressure was measured."""


class Observed(NamedTuple):
    """What one closed window says of a replica. None: unknown."""

    key: Key
    replica: str
    pool: str
    node: str
    covered_s: float
    """Time that the counters speak for."""
    steps: float | None
    """Engine steps. None: taken from tokens, batch and acceptance."""
    tokens: float
    """Tokens generated."""
    running: float | None
    kv_tokens: float | None
    prefill_tokens: float | None
    """Prompt tokens computed (not from a cache)."""
    tpot_s: float | None
    clock_ratio: float | None
    preemptions_per_s: float | None
    accepted: float
    """Tokens a sequence and step: 1 without speculative decoding."""
    restarted: bool
    """The engine began anew: another start or version."""
    neighbours: Sequence[Neighbour]
    hardware: str = ""
    """GPU type: only replicas of one pool on the same are compared."""


class Interference:
    """All replicas of one partition."""

    def __init__(self) -> None:
        self.banks: dict[int, Bank] = {}
        """Number of neighbours -> replicas with so many."""
        self.slots: dict[Key, list[list[str]]] = {}
        """Replica -> its neighbours' names and pools, in the order of its bank's arrays."""
        self.alone: dict[str, Alone] = {}
        """`pool/hardware` -> what its replicas need when they are alone."""
        self.hour = 0
        self.counters: dict[str, int] = {}

    # -- a window --------------------------------------------------------------------------------------------

    def step(self, start_s: float, observed: Iterable[Observed], limits: LimitsSpec) -> dict[str, dict[str, Any]]:
        """Learns from one closed window and judges it: pool -> columns of INTERFERENCE_WINDOWS.

        Windows come in order, each once; a replica at most once in each. A row for each replica that has a neighbour
        or that is slower than anything explains."""
        self._prune(start_s)
        taken = sorted(self._admitted(observed, limits), key=lambda item: (item.pool, item.replica))
        pressures = self._meet(start_s, taken, limits.neighbours_max)
        y, phi = _loads(taken)
        rows: list[dict[str, Any] | None] = [None] * len(taken)
        groups: dict[int, list[int]] = {}
        for i, item in enumerate(taken):
            groups.setdefault(len(self.slots[item.key]), []).append(i)
        judged: dict[int, tuple[Bank, np.ndarray, Judged]] = {}
        for j, group in groups.items():
            bank = self.banks[j]
            at = np.array([bank.rows[taken[i].key] for i in group])
            u = np.array([pressures[i] for i in group], float).reshape(len(group), j)
            bank.meet(start_s, at, np.array([self._graded(taken[i]) for i in group], float).reshape(len(group), j))
            restarted = np.array([taken[i].restarted for i in group], bool)
            bank.restart(at[restarted])
            judged[j] = (bank, at, bank.step(start_s, at, y[group], phi[group], u))
        self._siblings(start_s, taken, groups, judged, y, limits.pools_max)
        for j, group in groups.items():
            self._rows(taken, group, y, *judged[j], rows)
        return _by_pool(rows, taken)

    def _admitted(self, observed: Iterable[Observed], limits: LimitsSpec) -> list[Observed]:
        taken, new = [], {}
        for item in observed:
            if item.key not in self.slots:
                if len(self.slots) >= limits.replicas_max:
                    self._count("overflow_replicas_total")
                    continue
                self.slots[item.key] = []
                new[item.key] = fresh()
            taken.append(item)
        if new:
            self.banks.setdefault(0, Bank(0)).put(new)
        return taken

    def _meet(self, start_s: float, taken: list[Observed], most: int) -> list[list[float]]:
        """Pressures by replica in the order of its slots, NaN = unknown; gives new neighbours their slots."""
        wanted: dict[Key, list[Neighbour]] = {}
        for item in taken:
            known = {name for name, _ in self.slots[item.key]}
            new = [n for n in item.neighbours if n.name not in known]
            if new:
                wanted[item.key] = sorted(new, key=lambda n: (-(n.pressure or 0.0), n.name))
        if wanted:
            self._widen(start_s, wanted, {item.key: item for item in taken if item.key in wanted}, most)
        found = []
        for item in taken:
            slots = self.slots[item.key]
            now = {n.name: n for n in item.neighbours}
            found.append([_pressure(now.get(name)) for name, _ in slots])
            for slot in slots:
                if slot[0] in now:
                    slot[1] = now[slot[0]].pool
        return found

    def _widen(self, start_s: float, wanted: dict[Key, list[Neighbour]], items: dict[Key, Observed], most: int) -> None:
        rows = self._lift(wanted)
        for key, row in rows.items():
            slots = self.slots[key]
            here = {n.name for n in items[key].neighbours}
            for neighbour in wanted[key]:
                if any(name == neighbour.name for name, _ in slots):
                    continue
                if len(slots) >= most:
                    gone = [(row["slots"][0, i], i) for i, (name, _) in enumerate(slots) if name not in here]
                    if not gone:
                        self._count("overflow_neighbours_total")
                        continue
                    row = without_slot(row, min(gone)[1])
                    del slots[min(gone)[1]]
                row = with_slot(row)
                slots.append([neighbour.name, neighbour.pool])
            rows[key] = row
        self._lower(rows)

    def _lift(self, keys: Iterable[Key]) -> dict[Key, dict[str, np.ndarray]]:
        by_bank: dict[int, list[Key]] = {}
        for key in keys:
            by_bank.setdefault(len(self.slots[key]), []).append(key)
        rows: dict[Key, dict[str, np.ndarray]] = {}
        for j, group in by_bank.items():
            rows |= self.banks[j].take(group)
            if not self.banks[j].rows:
                del self.banks[j]
        return rows

    def _lower(self, rows: dict[Key, dict[str, np.ndarray]]) -> None:
        by_bank: dict[int, dict[Key, dict[str, np.ndarray]]] = {}
        for key, row in rows.items():
            by_bank.setdefault(len(self.slots[key]), {})[key] = row
        for j, group in by_bank.items():
            self.banks.setdefault(j, Bank(j)).put(group)

    def _graded(self, item: Observed) -> list[float]:
        """By slot: whether its pressure is measured, NaN where it is not there now."""
        now = {n.name: float(n.graded) for n in item.neighbours}
        return [now.get(name, math.nan) for name, _ in self.slots[item.key]]

    def _count(self, name: str, n: int = 1) -> None:
        self.counters[name] = self.counters.get(name, 0) + n

    # -- what is said ----------------------------------------------------------------------------------------

    def _siblings(
        self,
        start_s: float,
        taken: list[Observed],
        groups: dict[int, list[int]],
        judged: dict[int, tuple[Bank, np.ndarray, Judged]],
        y: np.ndarray,
        pools_max: int,
    ) -> None:
        """Compares every replica with what its siblings need when alone, and notes who was slow."""
        where = {i: (j, row) for j, group in groups.items() for row, i in enumerate(group)}
        pools: dict[str, list[int]] = {}
        for i, item in enumerate(taken):
            pools.setdefault(f"{item.pool}/{item.hardware}", []).append(i)
        gaps = np.full(len(taken), np.nan)
        for name, members in pools.items():
            spots = [where[i] for i in members]
            alone = self.alone.get(name)
            if alone is None:
                if len(self.alone) >= pools_max:
                    self._count("overflow_pools_total")
                    continue
                alone = self.alone[name] = Alone()
            phi = np.array([judged[j][2].phi[row] for j, row in spots])
            free = np.array([judged[j][2].free[row] for j, row in spots])
            explained = np.array([judged[j][2].full[row] for j, row in spots])
            learned = np.array([judged[j][0].number("alone")[judged[j][1][row]] for j, row in spots])
            gaps[members] = alone.step(start_s, y[members], phi, explained, free, learned)
        for j, group in groups.items():
            bank, at, result = judged[j]
            bank.slow(at, result, gaps[group], SLOW)

    def _rows(
        self,
        taken: list[Observed],
        group: list[int],
        y: np.ndarray,
        bank: Bank,
        at: np.ndarray,
        judged: Judged,
        rows: list[dict[str, Any] | None],
    ) -> None:
        victims = _BITS[bank.number("hits")[at].astype(np.int64)] >= OF_SIX
        slow = _BITS[bank.number("slow")[at].astype(np.int64)] >= OF_SIX
        beyond = np.maximum(bank.number("level") + bank.number("silent"), bank.number("gap"))[at]
        unexplained = np.exp(np.minimum(beyond, LN_MAX))
        updates = bank.number("updates")[at]
        for k, i in enumerate(group):
            item = taken[i]
            if not (item.neighbours or slow[k]):
                continue
            known = updates[k] > LEARNED and not math.isnan(judged.severity[k])
            ends = judged.severity[k] + INTERVAL * judged.sd[k] * np.array([0.0, -1.0, 1.0])
            ratio, low, high = np.exp(np.clip(ends, 0.0, LN_MAX)).tolist() if known else (math.nan,) * 3
            row = {
                "replica": item.replica,
                "node": item.node,
                "victim": int(victims[k]),
                "antagonist": None,
                "antagonist_pool": None,
                "slowdown": ratio,
                "slowdown_low": low,
                "slowdown_high": high,
                "agreed": math.exp(min(judged.agreed[k], LN_MAX)) if known else math.nan,
                "pressure": math.nan,
                "graded": int(all(n.graded for n in item.neighbours)) if item.neighbours else None,
                "unexplained": float(unexplained[k]) if slow[k] else math.nan,
                "windows": int(updates[k]),
                "tpot_s": math.exp(y[i]),
                "expected_tpot_s": math.exp(min(judged.own[k], LN_MAX)) if known else math.nan,
            }
            blame = bank.slot("blame")[at[k]]
            if victims[k] and blame.max(initial=0.0) > 0:
                slot = int(blame.argmax())
                name, pool = self.slots[item.key][slot]
                pressure = next((n.pressure for n in item.neighbours if n.name == name), None)
                row |= {"antagonist": name, "antagonist_pool": pool or None}
                row["pressure"] = math.nan if pressure is None else pressure
                row["graded"] = int(bank.slot("graded")[at[k], slot])
            rows[i] = row

    # -- what is kept ----------------------------------------------------------------------------------------

    def forget(self, keys: Iterable[Key]) -> None:
        """Forgets replicas that are gone; unknown keys are no error."""
        known = [key for key in keys if key in self.slots]
        self._lift(known)
        for key in known:
            del self.slots[key]

    def _prune(self, start_s: float) -> None:
        """Once an hour: forgets who was not seen for KEEP_S."""
        hour = int(start_s // 3600)
        if hour == self.hour:
            return
        self.hour = hour
        before = start_s - KEEP_S
        old = [key for bank in self.banks.values() for key, i in bank.rows.items() if bank.number("seen_s")[i] < before]
        self.forget(old)
        stale = [
            key
            for bank in self.banks.values()
            for key, i in bank.rows.items()
            if (bank.slot("seen_s")[i] < before).any()
        ]
        rows = self._lift(stale)
        for key, row in rows.items():
            for slot in reversed(range(len(self.slots[key]))):
                if row["slots"][0, slot] < before:
                    row = without_slot(row, slot)
                    del self.slots[key][slot]
            rows[key] = row
        self._lower(rows)
        self.alone = {name: alone for name, alone in self.alone.items() if alone.seen_s >= before}

    def state(self) -> dict[str, Any]:
        """Plain values and arrays."""
        return {
            "banks": {j: bank.state() for j, bank in self.banks.items()},
            "slots": self.slots,
            "alone": {name: alone.state() for name, alone in self.alone.items()},
            "hour": self.hour,
            "counters": self.counters,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what `state` gave."""
        self.banks = {j: Bank(j) for j in state["banks"]}
        for j, bank in self.banks.items():
            bank.restore(state["banks"][j])
        self.slots = state["slots"]
        self.alone = {name: Alone.restored(alone) for name, alone in state["alone"].items()}
        self.hour, self.counters = state["hour"], state["counters"]


def _pressure(neighbour: Neighbour | None) -> float:
    if neighbour is None:
        return 0.0  # away: it takes nothing
    return math.nan if neighbour.pressure is None else neighbour.pressure


def _loads(taken: list[Observed]) -> tuple[np.ndarray, np.ndarray]:
    """(ln TPOT [n], NaN where the window says too little; features [n, 11])."""
    names = Observed._fields[4:14]
    numbers = np.array([item[4:14] for item in taken], float).reshape(len(taken), len(names))
    load = dict(zip(names, numbers.T, strict=True))
    per_step = load["running"] * load["accepted"]
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.where(np.isnan(load["steps"]), load["tokens"] / per_step, load["steps"])
        load["prefill_step"] = np.where(steps > 0, load["prefill_tokens"] / steps, np.nan)
        wild = np.array([load[name] > most for name, most in LOAD_MAX.items()])
        for name, beyond in zip(LOAD_MAX, wild, strict=True):
            load[name] = np.where(beyond, np.nan, load[name])
        usable = (
            ~wild.any(axis=0)
            & (load["tokens"] >= TOKENS_MIN)
            & (steps >= STEPS_MIN)
            & (load["covered_s"] >= COVERED_S_MIN)
        )
        y = np.where(usable & (load["tpot_s"] > 0), np.log(load["tpot_s"]), np.nan)
    return y, features(load)


def _by_pool(rows: list[dict[str, Any] | None], taken: list[Observed]) -> dict[str, dict[str, Any]]:
    pools: dict[str, list[dict[str, Any]]] = {}
    for row, item in zip(rows, taken, strict=True):
        if row is not None:
            pools.setdefault(item.pool, []).append(row)
    return {
        pool: {name: _column(name, [row[name] for row in found]) for name in found[0]} for pool, found in pools.items()
    }


def _column(name: str, values: list[Any]) -> Any:
    """Measured columns as arrays, in which NaN is unknown."""
    return np.array(values, float) if INTERFERENCE_WINDOWS.columns[name].type == "f64" else values
