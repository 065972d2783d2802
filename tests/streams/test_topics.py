"""Topics and the deployment record, on the real broker."""

from __future__ import annotations

import asyncio

import pytest
from aiokafka.admin import NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from schemas.config import Deployment
from schemas.errors import SettingsError, UnavailableError
from schemas.topics import TOPICS
from streams.broker import LocalBroker
from streams.clients import admin_client
from streams.deployment import ensure_deployment, fleet_now_ms, read_deployment, wall_ms
from streams.reader import read_to_end
from streams.settings import Settings, load_settings
from streams.topics import create_topics, partition_counts


@pytest.fixture
def settings(broker: LocalBroker, topic_prefix: str) -> Settings:
    return load_settings(bootstrap_servers=broker.bootstrap_servers, topic_prefix=topic_prefix)


async def test_creates_every_topic_of_the_registry(settings: Settings) -> None:
    """All are there as the registry says, and a second creation finds nothing to do."""
    created = await create_topics(settings, local=True)
    assert sorted(created) == sorted(settings.topic(name) for name in TOPICS)
    assert await create_topics(settings, local=True) == []
    admin = admin_client(settings)
    await admin.start()
    try:
        resources = [ConfigResource(ConfigResourceType.TOPIC, settings.topic(n)) for n in TOPICS]
        for response in await admin.describe_configs(resources):
            for resource in response.resources:
                values = {entry[0]: entry[1] for entry in resource[4]}
                assert TOPICS[resource[3].removeprefix(settings.topic_prefix)].config().items() <= values.items()
    finally:
        await admin.close()


async def test_existing_topics_are_not_changed(settings: Settings) -> None:
    """A topic with other partitions or settings is an error that names both values, and stays as it is."""
    admin = admin_client(settings)
    await admin.start()
    try:
        name = settings.topic("findings")
        await admin.create_topics([NewTopic(name, 7, 1, topic_configs={"message.timestamp.type": "CreateTime"})])
        with pytest.raises(SettingsError) as caught:
            await create_topics(settings, local=True)
        text = str(caught.value)
        assert f"{name}: has 7 partitions, needed are 4" in text
        assert "message.timestamp.type is CreateTime, needed is LogAppendTime" in text
        assert "cleanup.policy is delete, needed is compact,delete" in text
        [topic] = await admin.describe_topics([name])
        assert len(topic["partitions"]) == 7
    finally:
        await admin.close()


async def test_no_broker() -> None:
    """Without a broker the error names the setting and the remedy."""
    with pytest.raises(UnavailableError, match=r"FLEETLOOP_BOOTSTRAP_SERVERS.*fleetloop broker"):
        await create_topics(load_settings(bootstrap_servers="127.0.0.1:1"), local=True)
    with pytest.raises(UnavailableError, match=r"FLEETLOOP_BOOTSTRAP_SERVERS.*fleetloop broker"):
        await read_deployment(load_settings(bootstrap_servers="127.0.0.1:1"))


async def test_first_deployment_wins(settings: Settings) -> None:
    """However many create one at once, all hold the same, and the last record in the log is the first one's content."""
    made = await asyncio.gather(*(ensure_deployment(settings, local=True, speed=speed) for speed in (1.0, 10.0, 100.0)))
    assert len({d.model_dump_json() for d in made}) == 1
    assert await read_deployment(settings) == made[0]
    assert await ensure_deployment(settings, local=False, speed=7) == made[0]
    records = [r async for r in read_to_end(settings, "fleet.config")]
    assert records[-1].value == records[0].value
    assert made[0].partitions == partition_counts(True)


async def test_no_deployment(settings: Settings) -> None:
    """Before creation the error says how to create one."""
    with pytest.raises(SettingsError, match="fleetloop init"):
        await read_deployment(settings)
    await create_topics(settings, local=True)
    with pytest.raises(SettingsError, match="fleetloop init"):
        await read_deployment(settings)


@pytest.mark.parametrize("speed", [1.0, 10.0, 0.25])
def test_fleet_time_and_its_inverse(speed: float) -> None:
    """Fleet time passes `speed` times as fast from the origin on."""
    d = Deployment(origin_ms=1_000_000, speed=speed, partitions={})
    assert d.log_ms(1_000_000) == 1_000_000
    assert d.log_ms(1_004_000) == 1_000_000 + 4000 * speed
    assert wall_ms(d, d.log_ms(1_004_000)) == pytest.approx(1_004_000)
    assert fleet_now_ms(d) > d.origin_ms
