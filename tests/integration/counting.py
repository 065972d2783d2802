"""A fold of the tests' own: counts rows per key and publishes upserts each second of log time.

Everything that faults could break shows in it: a row lost, a row counted twice, a version with two contents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from schemas.errors import CheckpointMismatch
from schemas.log import LogRecord, Result
from schemas.topics import COST_WINDOWS

FORMAT = "counting.1"


class CountFold:
    """Rows: JSON arrays of `{"k": key, "n": number}`; one with `raise` raises, one with `pad` swells the state."""

    def __init__(self, topic: str, partition: int, partitions: dict[str, int]) -> None:
        self.topic, self.partition = topic, partition
        self.counts: dict[str, list[int]] = {}
        self.dirty: dict[str, bool] = {}
        self.now_ms = 0
        self.rows = 0
        self.pad_bytes = 0

    def apply(self, records: Sequence[LogRecord]) -> list[Result]:
        results: list[Result] = []
        for record in records:
            self._advance(record, results)
            if record.type == "rows":
                self._rows(json.loads(record.value))
        return results

    def _rows(self, rows: list[dict[str, object]]) -> None:
        for row in rows:
            if "pad" in row:
                self.pad_bytes = int(str(row["pad"]))
                continue
            name = str(row.get("k"))
            count = self.counts.setdefault(name, [0, 0])
            count[0] += 1
            if row.get("raise"):
                raise ValueError("a poisonous row")  # after a change: who goes on with this state counts too much
            count[1] += int(str(row["n"]))
            self.rows += 1
            self.dirty[name] = True

    def _advance(self, record: LogRecord, results: list[Result]) -> None:
        before, self.now_ms = self.now_ms, max(self.now_ms, record.at_ms)
        if self.now_ms // 1000 == before // 1000:
            return
        source = f"{self.topic}/{self.partition}"
        for name in self.dirty:
            rows, total = self.counts[name]
            value = {"name": name, "source": source, "version": record.offset, "rows": rows, "sum": total}
            results.append(
                Result(
                    COST_WINDOWS,
                    name,
                    "count",
                    f"count/{name}/{source}@{record.offset}",
                    self.now_ms,
                    json.dumps(value).encode(),
                )
            )
        self.dirty = {}

    def dump(self) -> bytes:
        pad = bytearray()
        block = b"pad"
        while len(pad) < self.pad_bytes:  # hashes, because they don't compress
            block = hashlib.sha512(block).digest()
            pad += block
        state = [FORMAT, self.topic, self.partition, self.now_ms, self.rows, self.counts, self.dirty, self.pad_bytes]
        return json.dumps(state).encode() + b"\n" + bytes(pad)

    def load(self, data: bytes) -> None:
        state = json.loads(data.split(b"\n", 1)[0])
        if state[:3] != [FORMAT, self.topic, self.partition]:
            raise CheckpointMismatch(f"{state[:3]} is not {[FORMAT, self.topic, self.partition]}")
        self.now_ms, self.rows, self.counts, self.dirty, self.pad_bytes = state[3:]

    def metrics(self) -> dict[str, float]:
        return {"rows_total": float(self.rows), "keys": float(len(self.counts))}
