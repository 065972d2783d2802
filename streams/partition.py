"""What a level's process holds for one partition: the fold, how far it is, and what is on its way."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from enum import Enum, auto
from typing import Any

from faust.types import TP

from schemas.log import Fold

HOUR_S = 3600.0


class Outcome(Enum):
    """What became of a batch in the synchronous step."""

    DONE = auto()
    HOLE = auto()
    RAISED = auto()


def newer(records: list[Any], applied: int) -> list[Any]:
    """The records after an offset."""
    if not records or records[0].offset > applied:
        return records
    return [r for r in records if r.offset > applied]


class PartitionState:
    """State of one assigned partition. Replaced as a whole at every rebalance, never carried over.

    Attributes
    ----------
    applied: offset of the last record folded.
    pending: results sent and not yet acknowledged.
    failed: a send failed; nothing may be checkpointed before the partition is restored.
    resends: restores after failed sends since the last checkpoint; the next not before `resend_at`.
    poison: offsets since the checkpoint at which the fold raises.
    stopped: why this partition no longer goes on; empty while it does.
    """

    def __init__(self, tp: TP, topic: str, fold: Fold, applied: int, generation: int, queue_size: int) -> None:
        self.tp, self.topic, self.partition = tp, topic, tp.partition
        self.fold, self.applied, self.generation = fold, applied, generation
        self.pending: set[asyncio.Future[Any]] = set()
        self.failed = False
        self.stopped = ""
        self.resends = 0
        self.resend_at = 0.0
        self.repair: asyncio.Task[None] | None = None
        self.queue: asyncio.Queue[list[Any]] = asyncio.Queue(queue_size)
        self.lock = asyncio.Lock()
        self.checkpoint_offset = -1
        self.checkpoint_position: int | None = None
        self.checkpoint_bytes = 0
        self.checkpoint_at = time.monotonic()
        self.arrived_at = self.moved_at = time.monotonic()
        self.end_known = 0
        self.counts: Counter[str] = Counter()
        self.fold_s = 0.0
        self.dump_s = 0.0
        self.last_append_ms = 0
        self.lag_seen = 0
        self.poison: set[int] = set()
        self.fold_metrics: dict[str, float] = {}
        self.errors_at: deque[float] = deque()

    def lag(self, highwater: int | None) -> int:
        """Records not yet folded, as far as is known."""
        return max(0, max(highwater or 0, self.end_known) - self.applied - 1)

    def advance(self, records: list[Any]) -> None:
        """Notes that these records are folded."""
        self.applied = records[-1].offset
        self.last_append_ms = records[-1].timestamp
        self.moved_at = time.monotonic()
        self.counts["records"] += len(records)
        self.counts["batches"] += 1

    def clear_queue(self) -> None:
        """Lets go of batches that waited for a repair."""
        while not self.queue.empty():
            self.queue.get_nowait()

    def track(self, future: asyncio.Future[Any]) -> None:
        """Keeps a result's future until it is acknowledged."""
        self.pending.add(future)
        future.add_done_callback(self._on_sent)

    def _on_sent(self, future: asyncio.Future[Any]) -> None:
        if future not in self.pending:
            return  # of before a restore
        self.pending.discard(future)
        if future.cancelled() or future.exception() is not None:
            self.counts["sends_failed"] += 1
            self.failed = True

    def forget_pending(self) -> None:
        """Lets go of results on their way: everything since the checkpoint is sent again."""
        self.pending = set()
        self.failed = False

    def count_error(self, now: float) -> int:
        """Notes an exception of the fold; gives how many there were within the last hour."""
        self.errors_at.append(now)
        while self.errors_at and self.errors_at[0] < now - HOUR_S:
            self.errors_at.popleft()
        return len(self.errors_at)
