"""The config agent brings every object of configuration into every partition of the four logs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from agents import config
from agents.config import ConfigAgent
from schemas.config import ConfigObject
from schemas.topics import DEAD_LETTERS, FLEET_CONFIG, LEVEL_TOPIC, ce_type
from streams.broker import LocalBroker
from streams.deployment import ensure_deployment
from streams.producer import EdgeProducer
from streams.reader import header, read_to_end
from streams.settings import Settings, load_settings

CONFIG = ce_type("config")
LOGS = [topic for level, topic in LEVEL_TOPIC.items() if level != "config"]


@pytest.fixture
async def settings(broker: LocalBroker, topic_prefix: str) -> Settings:
    made = load_settings(bootstrap_servers=broker.bootstrap_servers, topic_prefix=topic_prefix, health_port=0)
    await ensure_deployment(made, local=True)
    return made


def price(revision: int, usd: float) -> ConfigObject:
    return ConfigObject(object_kind="price", name="H100", revision=revision, spec={"usd_per_gpu_hour": usd})


async def apply(settings: Settings, *objects: ConfigObject) -> None:
    async with EdgeProducer(settings, "test") as producer:
        for item in objects:
            producer.send(FLEET_CONFIG, item.key, item.encode(), type=CONFIG, id=f"{item.key}@{item.revision}")
        assert await producer.flush()


async def copies(settings: Settings) -> list[tuple[str, int, str]]:
    """(topic, partition, id) of every copy, in the order of each partition."""
    return [
        (topic, record.partition, header(record, "ce_id"))
        for topic in LOGS
        async for record in read_to_end(settings, topic)
        if header(record, "ce_type") == CONFIG
    ]


async def eventually(ready: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await ready():  # noqa: ASYNC110 - the broker does not call us
            await asyncio.sleep(0.05)


async def until(settings: Settings, count: int) -> list[tuple[str, int, str]]:
    found: list[tuple[str, int, str]] = []

    async def enough() -> bool:
        found[:] = await copies(settings)
        return len(found) >= count

    await eventually(enough)
    return found


async def test_every_object_reaches_every_partition(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each newer revision once per partition, in order; older ones never; all again at start and after a time."""
    deployment = await ensure_deployment(settings)
    partitions = [(topic, p) for topic in LOGS for p in range(deployment.partitions[topic])]
    await apply(settings, price(1, 2.0), price(2, 3.0), price(1, 9.0))
    agent = ConfigAgent(settings, deployment)
    task = asyncio.create_task(agent.run())
    found = await until(settings, 3 * len(partitions))
    for place in partitions:
        ids = [name for *where, name in found if tuple(where) == place]
        assert ids == ["deployment/deployment@1", "price/H100@1", "price/H100@2"]
    await apply(settings, price(3, 4.0))
    assert len(await until(settings, 4 * len(partitions))) == 4 * len(partitions)
    monkeypatch.setattr(config, "RESEND_S", 0.0)
    found = await until(settings, 6 * len(partitions))
    assert {name for *_, name in found[-1:]} <= {"deployment/deployment@1", "price/H100@3"}
    agent.stop()
    assert await task == 0


async def test_what_is_no_object_is_dead_lettered(settings: Settings) -> None:
    """A refused record goes to dead letters with its reason and coordinates, and what follows it still counts."""
    deployment = await ensure_deployment(settings)
    async with EdgeProducer(settings, "test") as producer:
        producer.send(FLEET_CONFIG, "pool/x", b"{", type=CONFIG, id="1")
        producer.send(FLEET_CONFIG, "price/y", b'{"object_kind":"price","name":"y","revision":0}', type=CONFIG, id="2")
    await apply(settings, price(1, 2.0))
    agent = ConfigAgent(settings, deployment)
    task = asyncio.create_task(agent.run())
    found = await until(settings, 2 * len(agent.targets))
    assert {name for *_, name in found} == {"deployment/deployment@1", "price/H100@1"}
    agent.stop()
    assert await task == 0
    letters = [r async for r in read_to_end(settings, DEAD_LETTERS)]
    assert [header(r, "ce_id") for r in letters] == ["fleet.config/0/1", "fleet.config/0/2"]


async def test_only_one_of_a_group_copies(settings: Settings) -> None:
    """A second agent waits, and takes over when the first one leaves."""
    deployment = await ensure_deployment(settings)
    first, second = ConfigAgent(settings, deployment), ConfigAgent(settings, deployment)
    tasks = [asyncio.create_task(first.run())]
    await until(settings, len(first.targets))
    tasks.append(asyncio.create_task(second.run()))

    async def settled() -> bool:
        return second.joined and first.assigned != second.assigned

    await eventually(settled)
    owner, heir = (first, second) if first.assigned else (second, first)
    owner.stop()

    async def taken_over() -> bool:
        return heir.assigned

    await eventually(taken_over)
    await apply(settings, price(1, 2.0))

    async def copied() -> bool:
        return ("node.samples", 3, "price/H100@1") in await copies(settings)

    await eventually(copied)
    heir.stop()
    assert await asyncio.gather(*tasks) == [0, 0]
