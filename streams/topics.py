"""Creation of the registry's topics. What exists otherwise is an error that names both values, never a change."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError, TopicAlreadyExistsError, for_code

from schemas.errors import SettingsError, UnavailableError
from schemas.topics import TOPICS, Topic
from streams.clients import admin_client, unreachable
from streams.settings import PREFIX, Settings

CHECKED = ("message.timestamp.type", "cleanup.policy")
REPLICAS_WANTED = 3
VISIBLE_WITHIN_S = 15.0


def partition_counts(local: bool) -> dict[str, int]:
    """Topic (without prefix) -> partitions of a local or a production deployment."""
    return {t.name: t.partitions_local if local else t.partitions for t in TOPICS.values()}


async def create_topics(settings: Settings, *, local: bool) -> list[str]:
    """Creates every missing topic of the registry and checks the others; gives the names created.

    Raises SettingsError where a topic exists with other partitions, clean-up, timestamp type or a smaller message
    limit, and UnavailableError where the brokers cannot be reached.
    """
    admin = admin_client(settings)
    try:
        await admin.start()
        try:
            return await _create(admin, settings, partition_counts(local))
        finally:
            await admin.close()
    except KafkaError as error:
        raise await unreachable(settings, error) from error


async def _create(admin: AIOKafkaAdminClient, settings: Settings, counts: Mapping[str, int]) -> list[str]:
    existing = set(await admin.list_topics())
    created = []
    replicas = settings.topic_replication_factor or min(
        REPLICAS_WANTED, len((await admin.describe_cluster())["brokers"])
    )
    for topic in TOPICS.values():
        name = settings.topic(topic.name)
        if name in existing:
            continue
        new = NewTopic(name, counts[topic.name], replicas, topic_configs=topic.config())
        response = await admin.create_topics([new])
        for item in response.topic_errors:
            error = for_code(item[1])
            if item[1] and error is not TopicAlreadyExistsError:  # another process was quicker: checked below
                raise SettingsError(f"{name}: cannot be created: {error.__name__}: {item[2]}")
            if not item[1]:
                created.append(name)
    await _check(admin, settings, counts)
    await _coordinated(admin, settings)
    return created


async def _check(admin: AIOKafkaAdminClient, settings: Settings, counts: Mapping[str, int]) -> None:
    names = {settings.topic(t.name): t for t in TOPICS.values()}
    partitions = await _visible(admin, list(names))
    configs = await _configs(admin, list(names))
    wrong = []
    for name, topic in names.items():
        wrong += _differences(name, topic, counts[topic.name], partitions[name], configs.get(name, {}))
    if wrong:
        raise SettingsError(
            "; ".join(wrong) + f". Existing topics are not changed: choose another {PREFIX}TOPIC_PREFIX, "
            "or delete or alter these topics yourself"
        )


def _differences(name: str, topic: Topic, wanted: int, partitions: int, config: Mapping[str, str]) -> list[str]:
    wrong = []
    if partitions != wanted:
        wrong.append(f"{name}: has {partitions} partitions, needed are {wanted}")
    for key in CHECKED:
        needed = topic.config()[key]
        if set(config.get(key, needed).split(",")) != set(needed.split(",")):
            wrong.append(f"{name}: {key} is {config[key]}, needed is {needed}")
    limit = int(config.get("max.message.bytes", topic.max_message_bytes))
    if limit < topic.max_message_bytes:
        wrong.append(f"{name}: max.message.bytes is {limit}, needed are {topic.max_message_bytes}")
    return wrong


async def _coordinated(admin: AIOKafkaAdminClient, settings: Settings) -> None:
    """Waits for a coordinator of groups: on a new cluster the first question creates what it needs."""
    deadline = asyncio.get_running_loop().time() + VISIBLE_WITHIN_S
    while True:
        try:
            await admin.find_coordinator(settings.group("node"))
            return
        except KafkaError as error:
            if not error.retriable or asyncio.get_running_loop().time() > deadline:
                raise
        await asyncio.sleep(0.1)


async def _visible(admin: AIOKafkaAdminClient, names: list[str]) -> dict[str, int]:
    """Partitions of each topic, once the brokers' metadata shows them all (a new topic takes a moment)."""
    deadline = asyncio.get_running_loop().time() + VISIBLE_WITHIN_S
    while True:
        described = await admin.describe_topics(names)
        found = {t["topic"]: len(t["partitions"]) for t in described if not t["error_code"]}
        if all(found.get(n) for n in names):
            return found
        if asyncio.get_running_loop().time() > deadline:
            missing = [n for n in names if not found.get(n)]
            raise UnavailableError(f"topics not visible after {VISIBLE_WITHIN_S:.0f} s: {missing}")
        await asyncio.sleep(0.1)


async def _configs(admin: AIOKafkaAdminClient, names: list[str]) -> dict[str, dict[str, str]]:
    resources = [ConfigResource(ConfigResourceType.TOPIC, n) for n in names]
    found: dict[str, dict[str, str]] = {}
    responses: list[Any] = await admin.describe_configs(resources)
    for response in responses:
        for resource in response.resources:
            if resource[0]:
                continue  # not allowed to read configurations: the partitions were checked
            found[resource[3]] = {entry[0]: entry[1] for entry in resource[4]}
    return found
