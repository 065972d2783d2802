"""Which requests were seen before: 64-bit names and 32-bit contents, remembered for a bounded time.

Hashes are the same on every machine and in every process. They are not cryptographic: a gateway names its
requests, not their senders. Two of 5 million names collide with a probability of 7e-7.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from schemas.columns import Batch

_M1, _M2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)  # of splitmix64
_S1, _S2 = np.uint64(29), np.uint64(32)
_TEXTS = ("pool", "tenant", "class", "replica", "status", "model", "error_type")
_NUMBERS = (
    "at_s", "input_tokens", "output_tokens", "cached_tokens", "ttft_s", "tpot_s", "e2e_s", "priority", "image_units",
    "audio_s", "video_s", "queue_s",
)  # fmt: skip
_SALTS = _M1 * np.arange(1, len(_TEXTS) + len(_NUMBERS) + 1, dtype=np.uint64)
"""A word of its own for each column."""
_SIDES = np.array([0x6A09E667F3BCC908, 0xBB67AE8584CAA73B], np.uint64)
"""A word of its own for gateway and engine."""


def _mix(state: np.ndarray, word: np.ndarray) -> np.ndarray:
    """Two rounds of multiply and shift (as in splitmix64), in uint64 with wrap-around."""
    mixed: np.ndarray = (state ^ word) * _M1
    mixed ^= mixed >> _S1
    mixed *= _M2
    mixed ^= mixed >> _S2
    return mixed


def hash_texts(values: Sequence[str]) -> np.ndarray:
    """uint64 of each text (no NUL in it), 8 bytes of UTF-8 at a time."""
    if not values:
        return np.zeros(0, np.uint64)
    raw = np.array([value.encode() for value in values], np.bytes_)
    words = -(-max(raw.itemsize, 1) // 8)
    columns = raw.astype(f"S{8 * words}").view("<u8").reshape(len(values), words)
    state = np.full(len(values), _M1)
    for word in columns.T:
        # Padding is all zeros, and depends on the longest text beside this one: it must not count.
        state = np.where(word != 0, _mix(state, word), state)
    return state


def by_engine(batch: Batch) -> np.ndarray:
    """bool [rows]: reported by the engine; whoever does not say is a gateway."""
    flags: np.ndarray = np.array([*(value == "engine" for value in batch.values["reporter"]), False])
    chosen: np.ndarray = flags[batch.codes["reporter"]]
    return chosen


def _requests(batch: Batch) -> np.ndarray:
    """uint64 [rows] of (request_id, attempt)."""
    names = hash_texts(batch.values["request_id"])[batch.codes["request_id"]]
    attempt = batch.numbers["attempt"]
    first = ~(attempt > 1)
    return names if first.all() else np.where(first, names, _mix(names, np.nan_to_num(attempt).astype(np.uint64)))


def row_names(batch: Batch) -> np.ndarray:
    """uint64 [rows] of (event, request_id, attempt, reporter)."""
    names = _mix(_requests(batch), hash_texts(batch.values["event"])[batch.codes["event"]])
    engine = by_engine(batch)
    return np.where(engine, _mix(names, _SIDES[1]), names) if engine.any() else names


def twin_names(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """(own, twin's): uint64 [rows] of (pool, request_id, attempt, reporter), and the same of the other reporter."""
    names = _mix(_requests(batch), hash_texts(batch.values["pool"])[batch.codes["pool"]])
    gateway, engine = _mix(names, _SIDES[0]), _mix(names, _SIDES[1])
    is_engine = by_engine(batch)
    return np.where(is_engine, engine, gateway), np.where(is_engine, gateway, engine)


def row_contents(batch: Batch) -> np.ndarray:
    """uint32 [rows] of all columns beside the name. What is unknown adds nothing, so that a row has the same content
    in a batch that does not have the column at all."""
    state = np.full(batch.rows, _M2)
    for column, salt in zip(_TEXTS, _SALTS, strict=False):
        if batch.values[column]:
            codes = batch.codes[column]
            words = (hash_texts(batch.values[column]) ^ salt)[codes]
            state = np.where(codes >= 0, _mix(state, words), state)
    for column, salt in zip(_NUMBERS, _SALTS[len(_TEXTS) :], strict=True):
        values = batch.numbers[column]
        known = ~np.isnan(values)
        if known.any():
            words = (values + 0.0).astype("<f8").view("<u8") ^ salt  # one zero
            state = np.where(known, _mix(state, words), state)
    return (state >> _S2).astype(np.uint32)


class IdTable:
    """Names and contents in order of insertion, found by open addressing. The index follows from the names."""

    def __init__(self, names: np.ndarray, contents: np.ndarray) -> None:
        self.size = len(names)
        self.names = names
        self.contents = contents
        self._index(self.size)

    def find(self, names: np.ndarray) -> np.ndarray:
        """int64 [n]: place of each name, -1 where it is not here."""
        found = np.full(len(names), -1, np.int64)
        active = np.arange(len(names) if self.size else 0)
        slot = (names & self._mask).astype(np.int64)
        while len(active):
            at = self._slots[slot]
            hit = (at >= 0) & (self.names[at] == names[active])
            found[active[hit]] = at[hit]
            on = (at >= 0) & ~hit
            active, slot = active[on], (slot[on] + 1) & len(self._slots) - 1
        return found

    def add(self, names: np.ndarray, contents: np.ndarray) -> None:
        """Takes names that are distinct and not here."""
        end = self.size + len(names)
        if end > len(self.names):
            room = max(end, 2 * len(self.names), 1024)
            self.names = np.concatenate((self.names[: self.size], np.zeros(room - self.size, np.uint64)))
            self.contents = np.concatenate((self.contents[: self.size], np.zeros(room - self.size, np.uint32)))
        self.names[self.size : end], self.contents[self.size : end] = names, contents
        start, self.size = self.size, end
        if 2 * end > len(self._slots):
            self._index(2 * end)
        else:
            self._place(start, end)

    def _index(self, room: int) -> None:
        self._slots = np.full(1 << max(10, (2 * room).bit_length()), -1, np.int32)
        self._mask = np.uint64(len(self._slots) - 1)
        self._place(0, self.size)

    def _place(self, start: int, end: int) -> None:
        active = np.arange(start, end, dtype=np.int32)
        slot = (self.names[start:end] & self._mask).astype(np.int64)
        while len(active):
            free = self._slots[slot] < 0
            self._slots[slot[free]] = active[free]
            on = self._slots[slot] != active  # taken before, or by another of these just now
            active, slot = active[on], (slot[on] + 1) & len(self._slots) - 1


class Seen(NamedTuple):
    """What is known of the rows of a batch. bool [rows]."""

    fresh: np.ndarray
    conflict: np.ndarray
    """Known by name, with other content. What is neither fresh nor a conflict is a duplicate."""


class SeenIds:
    """Ids by generations of log time, so that a whole generation is forgotten at once."""

    def __init__(self) -> None:
        self.generations: list[tuple[int, IdTable]] = []
        """(end, table), oldest first; ids seen before its end (Unix s) are in it. Absolute, so that another span, or
        grace, neither forgets what must be known nor keeps what need not."""

    def __len__(self) -> int:
        return sum(table.size for _, table in self.generations)

    def take(self, names: np.ndarray, contents: np.ndarray, second: int, span_s: int, ids_max: int) -> tuple[Seen, int]:
        """Looks rows up and remembers the fresh ones. Gives also how many ids the bound made it forget."""
        distinct, first, inverse = np.unique(names, return_index=True, return_inverse=True)
        wanted = contents[first]
        known = np.zeros(len(distinct), bool)
        for _, table in self.generations:
            place = table.find(distinct)
            there = place >= 0
            wanted[there] = table.contents[place[there]]
            known |= there
        fresh = ~known[inverse] & (first[inverse] == np.arange(len(names)))
        new = np.flatnonzero(fresh)
        forgotten = self._room(len(new), ids_max)
        if len(self) + len(new) <= ids_max:
            if not self.generations or self.generations[-1][0] <= second:
                end = (second // span_s + 1) * span_s
                self.generations.append((end, IdTable(np.zeros(0, np.uint64), np.zeros(0, np.uint32))))
            self.generations[-1][1].add(names[new], contents[new])
        else:
            forgotten += len(new)
        return Seen(fresh, ~fresh & (wanted[inverse] != contents)), forgotten

    def _room(self, more: int, ids_max: int) -> int:
        """Forgets the oldest generations until there is room, but for the last; gives how many ids."""
        before = len(self)
        while len(self.generations) > 1 and len(self) + more > ids_max:
            del self.generations[0]
        return before - len(self)

    def prune(self, second: int, keep_s: float) -> None:
        """Forgets the generations that ended longer than `keep_s` ago."""
        self.generations = [(end, table) for end, table in self.generations if end > second - keep_s]

    def state(self) -> list[Any]:
        """Plain values for a dump."""
        return [[end, t.names[: t.size], t.contents[: t.size]] for end, t in self.generations]

    def restore(self, state: list[Any]) -> None:
        """Replaces everything by what `state` gave."""
        self.generations = [(end, IdTable(names, contents)) for end, names, contents in state]
