"""However records come, and whatever goes wrong on the way, a partition ends where one clean pass would end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from aiokafka import ConsumerRecord
from faust.types import TP
from hypothesis import given
from hypothesis import strategies as st

from schemas.config import Deployment
from schemas.log import Result
from schemas.topics import DEAD_LETTERS, NODE_SAMPLES
from streams.checkpoints import Checkpoint
from streams.keeper import Keeper
from streams.partition import PartitionState
from streams.repairs import Repairs
from streams.settings import load_settings
from tests.integration.counting import CountFold

SETTINGS = load_settings(coalesce_records=3, fold_errors_per_hour_max=1000)
DEPLOYMENT = Deployment(origin_ms=0, speed=1, partitions={})
TPS = TP(NODE_SAMPLES, 0)


class FickleFold(CountFold):
    """Raises at every other poisonous row, so that a second try on the same state would pass, and count too much."""

    def _rows(self, rows: list[dict[str, object]]) -> None:
        for item in rows:
            if not item.get("raise"):
                super()._rows([item])
                continue
            count = self.counts.setdefault(str(item["k"]), [0, 0])
            count[0] += 1
            if count[0] % 2:
                raise ValueError("a poisonous row")


class MemoryRepairs(Repairs):
    async def _read(self, state: PartitionState, first: int, last: int) -> AsyncIterator[list[Any]]:
        found = [r for r in self.keeper.log if first <= r.offset <= last]  # type: ignore[attr-defined]
        for start in range(0, len(found), 3):
            await asyncio.sleep(0)
            yield found[start : start + 3]


class MemoryKeeper(Keeper):
    """A keeper over a list; `failing` sends fail."""

    def __init__(self, log: list[Any]) -> None:
        super().__init__("node", NODE_SAMPLES, None, SETTINGS, DEPLOYMENT, FickleFold)  # type: ignore[arg-type]
        self.log = log
        self.repairs = MemoryRepairs(self)
        self.vault.read = self._kept  # type: ignore[method-assign,assignment]
        self.kept: dict[int, Checkpoint] = {}
        self.sent: list[tuple[str, str, bytes]] = []
        self.failing = 0
        first = log[0].offset if log else 0
        self.state = PartitionState(TPS, NODE_SAMPLES, self.fresh(0), first - 1, 1, 8)
        self.states = {TPS: self.state}

    async def _kept(self, position: int | None) -> Checkpoint | None:
        await asyncio.sleep(0)
        return None if position is None else self.kept[position]

    def send(
        self, topic: str, key: bytes | None, value: bytes, partition: int | None, headers: Any
    ) -> asyncio.Future[Any]:
        future = asyncio.get_running_loop().create_future()
        if self.failing:
            self.failing -= 1
            future.set_exception(OSError("not taken"))
        else:
            self.sent.append((topic, dict(headers)["ce_id"].decode(), value))
            future.set_result(None)
        return future

    async def settle(self) -> None:
        """Until nothing is being repaired and every result was taken."""
        while True:
            await asyncio.sleep(0)
            if self.state.repair is not None:
                await self.state.repair
            elif self.state.failed:
                self.state.resend_at = 0.0
                self.repairs.mend_sends()
            else:
                return

    def checkpoint(self) -> None:
        """As the vault does, in memory: it asks the futures themselves, whose callbacks may not have run yet."""
        s = self.state
        failed = s.failed or any(future.exception() is not None for future in s.pending)
        if s.repair is None and not failed and s.applied > s.checkpoint_offset:
            self.kept[s.applied] = Checkpoint(NODE_SAMPLES, 0, s.applied, s.fold.dump(), s.applied)
            s.checkpoint_offset = s.checkpoint_position = s.applied
            s.poison = {o for o in s.poison if o > s.applied}


def record(offset: int, at_ms: int, rows: list[dict[str, Any]]) -> ConsumerRecord[Any, Any]:
    value = json.dumps(rows).encode()
    return ConsumerRecord(NODE_SAMPLES, 0, offset, at_ms, 1, b"k", value, None, 1, len(value), (("ce_type", b"rows"),))


def row(key: str, raises: bool) -> dict[str, Any]:
    return {"k": key, "n": len(key), **({"raise": True} if raises else {})}


@st.composite
def logs(draw: st.DrawFn) -> list[Any]:
    """Records with gaps in their offsets, times that pass seconds, and some at which the fold raises."""
    steps = st.tuples(st.integers(1, 3), st.integers(0, 700), st.sampled_from(["a", "bb"]), st.integers(0, 7))
    offset, at_ms, found = draw(st.integers(0, 3)), 0, []
    for skip, wait, key, luck in draw(st.lists(steps, min_size=1, max_size=30)):
        at_ms += wait
        found.append(record(offset, at_ms, [row(key, False), row(key, luck == 0)]))
        offset += skip
    return found


def one_pass(log: list[Any]) -> tuple[bytes, dict[str, bytes], set[int]]:
    """Dump, results by id and the offsets at which the fold raises, of one record at a time."""
    keeper = MemoryKeeper(log)
    fold, results, poison = keeper.fresh(0), list[Result](), set()
    for r in log:
        before = fold.dump()
        try:
            results += fold.apply([keeper.log_record(r)])
        except ValueError:
            poison.add(r.offset)
            fold = keeper.fresh(0)
            fold.load(before)
    return fold.dump(), {r.id: r.value for r in results}, poison


@given(logs(), st.data())
def test_ends_where_a_clean_pass_ends(log: list[Any], data: st.DataObject) -> None:
    """Batches cut, lost, repeated, sends failing, folds raising: same state, same results, same dead letters."""
    wanted_dump, wanted_results, poison = one_pass(log)

    async def play() -> MemoryKeeper:
        keeper = MemoryKeeper(log)
        at = 0
        while at < len(log):
            size = data.draw(st.integers(1, 6), label="batch")
            event = data.draw(st.sampled_from(["", "", "", "lost", "again", "checkpoint", "settle", "fail"]))
            batch = log[max(0, at - 2) if event == "again" else at : at + size]
            at += size
            if event == "fail":
                keeper.failing = 2
            if event == "settle":
                await keeper.settle()
            if event == "lost" and at < len(log):
                continue
            await keeper.take(batch)
            if event == "checkpoint":
                keeper.checkpoint()
        keeper.failing = 0
        await keeper.settle()
        return keeper

    keeper = asyncio.run(play())
    assert keeper.state.stopped == ""
    assert keeper.state.applied == log[-1].offset
    assert keeper.state.fold.dump() == wanted_dump
    letters = {name for topic, name, _ in keeper.sent if topic == DEAD_LETTERS}
    assert letters == {f"{NODE_SAMPLES}/0/{offset}#fold_error" for offset in poison}
    assert keeper.state.counts["fold_errors"] >= len(poison)
    results: dict[str, bytes] = {}
    for topic, name, value in keeper.sent:
        if topic != DEAD_LETTERS:
            assert results.setdefault(name, value) == value
    assert results == wanted_results


@given(st.integers(0, 3))
def test_stops_when_it_raises_too_often(allowed: int) -> None:
    """One error more than allowed within the hour ends the partition; what comes later is left alone."""
    log = [record(i, i, [row(f"k{i}", raises=True)]) for i in range(6)]

    async def play() -> MemoryKeeper:
        keeper = MemoryKeeper(log)
        keeper.settings = SETTINGS.model_copy(update={"fold_errors_per_hour_max": allowed})
        for r in log:
            await keeper.take([r])
            await keeper.settle()
        return keeper

    keeper = asyncio.run(play())
    assert f"{allowed + 1} fold errors" in keeper.state.stopped
    assert keeper.state.counts["fold_errors"] == allowed + 1
    assert keeper.state.applied == allowed - 1
