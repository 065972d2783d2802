"""A level in this process on the real broker: ticks, readiness, metrics, and the commit that Faust does not offer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

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
async def running(settings: Settings) -> AsyncIterator[LevelApp]:
    level = LevelApp("node", Echo, settings, await ensure_deployment(settings))
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
