"""A level in this process on the real broker: ticks, readiness, metrics, and the commit that Faust does not offer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiokafka.errors import IllegalStateError
from faust.types import TP
from prometheus_client import CollectorRegistry, generate_latest

from schemas.config import Deployment
from schemas.log import TICK, LogRecord, Result
from schemas.topics import DEAD_LETTERS, FINDINGS, NODE_SAMPLES
from streams import checkpoints, metrics
from streams.broker import LocalBroker
from streams.clients import admin_client
from streams.deployment import ensure_deployment
from streams.faustapp import commit
from streams.level import LevelApp
from streams.producer import EdgeProducer
from streams.reader import header, read_to_end
from streams.settings import Settings, load_settings
from streams.topics import partition_counts


class Echo:
    """Publishes each record again; a record of type `large` as a result that no topic takes."""

    def __init__(self, topic: str, partition: int, partitions: dict[str, int]) -> None:
        self.seen: list[LogRecord] = []

    def apply(self, records: Sequence[LogRecord]) -> list[Result]:
        self.seen += records
        rows = [r for r in records if r.type != TICK]
        return [
            Result(FINDINGS, r.key, "echo", f"{r.offset}", r.at_ms, r.value * (2_000_000 if r.type == "large" else 1))
            for r in rows
        ]

    def dump(self) -> bytes:
        return b"echo"

    def load(self, data: bytes) -> None:
        assert data == b"echo"

    def metrics(self) -> dict[str, float]:
        return {"records_total": float(len(self.seen)), "open": 1.0}


async def eventually(ready: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(90):
        while not await ready():  # noqa: ASYNC110 - the broker does not call us
            await asyncio.sleep(0.05)


@pytest.fixture
async def settings(broker: LocalBroker, topic_prefix: str) -> Settings:
    made = load_settings(
        bootstrap_servers=broker.bootstrap_servers, topic_prefix=topic_prefix, health_port=0, checkpoint_interval_s=0.5
    )
    await ensure_deployment(made, local=True, speed=5)
    return made


@asynccontextmanager
async def running(settings: Settings, fold: type[Echo] = Echo) -> AsyncIterator[LevelApp]:
    level = LevelApp("node", fold, settings, await ensure_deployment(settings))
    assert level.ready() == ["not assigned"]
    task = asyncio.create_task(level.run())

    async def ready() -> bool:
        assert not task.done()
        return not level.ready()

    await eventually(ready)
    yield level
    level.stop()
    assert await task == 0


async def test_silence_is_ticked(settings: Settings) -> None:
    """Every partition that is read to its end and silent gets ticks, and log time goes on with the fleet's clock."""
    async with running(settings) as level:

        async def ticked() -> bool:
            return all(s.counts["ticks"] >= 3 and s.applied >= 2 for s in level.keeper.states.values())

        await eventually(ticked)
        for state in level.keeper.states.values():
            records = state.fold.seen  # type: ignore[attr-defined]
            assert {r.type for r in records} == {TICK}
            passed = records[-1].at_ms - records[0].at_ms
            assert passed >= (len(records) - 1) * 900  # 1 s of log time apart, 0.2 s of wall time at speed 5
    async for record in read_to_end(settings, NODE_SAMPLES):
        assert (header(record, "ce_type"), record.value, record.timestamp_type) == (TICK, b"", 1)


async def test_checkpoint_and_commit_move_together(settings: Settings) -> None:
    """The committed offset's metadata points at the checkpoint of that offset, also after a stop."""
    async with running(settings) as level, EdgeProducer(settings, "test") as producer:
        for i in range(40):
            producer.send(NODE_SAMPLES, f"k{i}", b"v", type="row", id=str(i))
        assert await producer.flush(60)

        async def checkpointed() -> bool:
            return all(s.counts["checkpoints"] >= 2 for s in level.keeper.states.values())

        await eventually(checkpointed)
        with pytest.raises(IllegalStateError):
            await commit(level.app, TP(settings.topic(FINDINGS), 0), 1, "")
        registry = CollectorRegistry()
        registry.register(metrics.LevelCollector(level))
        text = generate_latest(registry).decode()
    for name, _ in metrics.metrics_table()[:-1]:
        assert f"\n{name.split('{')[0]}{{" in text, name
    assert 'fleetloop_fold_records_total{level="node",partition="0"}' in text
    assert 'fleetloop_fold_open{level="node",partition="0"} 1.0' in text
    assert 'fleetloop_ready{level="node"} 1.0' in text
    admin = admin_client(settings)
    await admin.start()
    try:
        offsets = await admin.list_consumer_group_offsets(settings.group("node"))
    finally:
        await admin.close()
    found = {r.offset: r async for r in read_to_end(settings, "checkpoints.node")}
    ends = {s.partition: s.checkpoint_offset for s in level.last_states}
    assert len(offsets) == 4
    for tp, committed in offsets.items():
        position = checkpoints.parse_pointer(committed.metadata)
        assert position is not None
        checkpoint = checkpoints.decode([found[position]])
        assert (checkpoint.partition, checkpoint.offset) == (tp.partition, committed.offset - 1)
        assert checkpoint.offset == ends[tp.partition]


async def test_result_beyond_its_topics_limit(settings: Settings) -> None:
    """It goes to dead letters, cut and with its hash; the partition goes on."""
    async with running(settings) as level, EdgeProducer(settings, "test") as producer:
        producer.send(NODE_SAMPLES, "k", b"v", type="large", id="1")
        producer.send(NODE_SAMPLES, "k", b"w", type="row", id="2")
        assert await producer.flush(60)

        async def published() -> bool:
            return [r.value async for r in read_to_end(settings, FINDINGS)] == [b"w"]

        await eventually(published)
        assert not level.ready()
    [letter] = [r async for r in read_to_end(settings, DEAD_LETTERS)]
    assert b'"reason":"too_large"' in letter.value
    assert b'"data_bytes":2000000' in letter.value


async def test_a_lost_delivery_is_read_again(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records that never reached the fold, with nothing after them, are missed and read once more."""
    monkeypatch.setattr("streams.level.NUDGE_S", 0.5)
    async with running(settings) as level, EdgeProducer(settings, "test") as producer:
        lost: list[int] = []
        take = level.keeper.take

        async def lossy(records: list[Any]) -> None:
            if not lost and any(header(r, "ce_type") == "row" for r in records):
                lost.extend(r.offset for r in records)
            else:
                await take(records)

        monkeypatch.setattr(level.keeper, "take", lossy)
        producer.send(NODE_SAMPLES, "k", b"v", type="row", id="1")
        assert await producer.flush(60)

        async def published() -> bool:
            return [r.value async for r in read_to_end(settings, FINDINGS)] == [b"v"]

        await eventually(published)
        assert lost
        [state] = [s for s in level.keeper.states.values() if s.counts["holes"]]
        offsets = [r.offset for r in state.fold.seen]  # type: ignore[attr-defined]
        assert offsets == list(range(len(offsets)))
        assert state.counts["hole_offsets"] == 0


class Renewed(Echo):
    """A later version of the code, to which the old dump says nothing."""

    def dump(self) -> bytes:
        return b"renewed"

    def load(self, data: bytes) -> None:
        raise KeyError("a field that the old dump lacks")


async def test_dump_of_another_version(settings: Settings) -> None:
    """A checkpoint that the fold refuses, however it does, is told, and the log is read from its beginning."""
    async with running(settings) as level:

        async def checkpointed() -> bool:
            return all(s.counts["checkpoints"] >= 1 for s in level.keeper.states.values())

        await eventually(checkpointed)
    async with running(settings, Renewed) as level:

        async def read_again() -> bool:
            states = level.keeper.states.values()
            return all(s.counts["checkpoints"] >= 1 for s in states)

        await eventually(read_again)
        for state in level.keeper.states.values():
            offsets = [r.offset for r in state.fold.seen]  # type: ignore[attr-defined]
            assert offsets == list(range(len(offsets)))
    async with running(settings) as level:  # the older version refuses the newer one's as well
        assert all(s.applied >= -1 for s in level.keeper.states.values())


async def test_a_crash_ends_the_process(settings: Settings) -> None:
    """When Faust crashes the run ends with a status that makes the supervisor start it again."""
    level = LevelApp("node", Echo, settings, await ensure_deployment(settings))
    task = asyncio.create_task(level.run())

    async def ready() -> bool:
        return not level.ready()

    await eventually(ready)
    await level.app.consumer.crash(RuntimeError("broken"))
    assert await asyncio.wait_for(task, 90) == 1


async def test_no_broker() -> None:
    """A worker that cannot connect ends with an error status."""
    deployment = Deployment(origin_ms=0, speed=1, partitions=partition_counts(True))
    settings = load_settings(bootstrap_servers="127.0.0.1:1", health_port=0)
    assert await LevelApp("node", Echo, settings, deployment).run() == 1
