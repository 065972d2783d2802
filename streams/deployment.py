"""The deployment record: clock and partition counts, written once to `fleet.config` and read by every process."""

from __future__ import annotations

import time
from contextlib import aclosing

from aiokafka.errors import KafkaError

from schemas.base import decode
from schemas.config import ConfigObject, Deployment
from schemas.errors import InvalidRecord, SettingsError
from schemas.log import CONTENT_JSON
from schemas.topics import FLEET_CONFIG, ce_type
from streams.clients import admin_client, unreachable
from streams.producer import send_once
from streams.reader import read_to_end
from streams.settings import Settings
from streams.topics import create_topics, partition_counts

NAME = "deployment"
KEY = f"deployment/{NAME}"


def wall_now_ms() -> int:
    """Wall time in Unix ms."""
    return time.time_ns() // 1_000_000


def fleet_now_ms(deployment: Deployment) -> int:
    """Fleet time in ms of this moment: what a record appended now gets."""
    return deployment.log_ms(wall_now_ms())


def wall_ms(deployment: Deployment, log_ms: float) -> float:
    """Wall time in Unix ms at which fleet time is `log_ms`: the inverse of `Deployment.log_ms`."""
    return deployment.origin_ms + (log_ms - deployment.origin_ms) / deployment.speed


async def _first(settings: Settings) -> tuple[Deployment, bytes] | None:
    async with aclosing(read_to_end(settings, FLEET_CONFIG)) as records:  # left early: its client must end now
        async for record in records:
            if record.key != KEY.encode() or not record.value:
                continue
            try:
                typed = decode(ConfigObject, record.value).typed()
            except InvalidRecord:
                continue  # the config agent dead-letters it
            if isinstance(typed, Deployment):
                return typed, record.value
    return None


async def find_deployment(settings: Settings) -> Deployment | None:
    """The deployment of the first valid record, or None where there is none yet."""
    found = await _first(settings)
    return found[0] if found else None


async def read_deployment(settings: Settings) -> Deployment:
    """The deployment. Raises SettingsError where it was never created."""
    found = await find_deployment(settings)
    if found is None:
        raise SettingsError(
            f"{settings.topic(FLEET_CONFIG)}: no deployment: create one with `fleetloop init` "
            "(or `fleetloop demo`), or mend FLEETLOOP_TOPIC_PREFIX"
        )
    return found


async def ensure_deployment(
    settings: Settings, *, local: bool = False, speed: float = 1.0, origin_ms: int | None = None
) -> Deployment:
    """Creates the topics and the deployment where they are missing; gives the one that holds.

    The first record wins: an existing deployment is given back whatever was asked for. Two creators at once leave
    one deployment: who finds that it was not first writes the first one's record again, so that compaction keeps it.
    """
    existing = None
    if await topics_exist(settings):
        existing = await find_deployment(settings)
    await create_topics(settings, local=existing.local if existing else local)
    existing = existing or await find_deployment(settings)
    if existing is not None:
        return existing
    wanted = Deployment(
        origin_ms=wall_now_ms() if origin_ms is None else origin_ms,
        speed=speed,
        local=local,
        partitions=partition_counts(local),
    )
    record = ConfigObject(object_kind="deployment", name=NAME, revision=1, spec=wanted.model_dump(mode="json"))
    await _write(settings, record.encode(), wanted.origin_ms)
    found = await _first(settings)
    assert found is not None, "a record just written is not there"
    first, value = found
    if first != wanted:
        await _write(settings, value, first.origin_ms)
    return first


async def topics_exist(settings: Settings) -> bool:
    """Whether `fleet.config` is there."""
    admin = admin_client(settings)
    try:
        await admin.start()
        return settings.topic(FLEET_CONFIG) in await admin.list_topics()
    except KafkaError as error:
        raise await unreachable(settings, error) from error
    finally:
        await admin.close()


async def _write(settings: Settings, value: bytes, at_ms: int) -> None:
    await send_once(
        settings,
        FLEET_CONFIG,
        key=KEY,
        value=value,
        type=ce_type(ConfigObject.kind),
        id=f"{KEY}@1",
        at_ms=at_ms,
        content_type=CONTENT_JSON,
    )
