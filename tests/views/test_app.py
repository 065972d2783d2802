"""The service on a real broker: from topics to tables, JSON and back as signed commands."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiokafka import AIOKafkaConsumer

from schemas.base import decode
from schemas.config import Deployment
from schemas.decisions import Command
from schemas.errors import SettingsError
from schemas.topics import DECISION_EVENTS, ce_type
from streams.broker import LocalBroker
from streams.clients import client_options
from streams.deployment import ensure_deployment, wall_now_ms
from streams.producer import EdgeProducer
from streams.reader import header, read_to_end
from streams.settings import Settings, load_settings
from streams.signing import create_key_file, sign
from tests.views.feed import POOLS, Feed
from tests.views.served import TOKEN
from views.app import ViewsApp
from views.records import SOURCES
from views.rows import TABLES
from views.settings import ViewsSettings, load_views_settings
from views.snapshot import snapshot
from views.start import first_offset, starts

SECONDS = 40
PROCESS = """
import sys
from streams.settings import load_settings
from views.app import run_views

sys.exit(run_views(load_settings()))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def publish(settings: Settings, seconds: range, feed: Feed) -> int:
    """Publishes a feed's records to their topics; gives how many."""
    count = 0
    async with EdgeProducer(settings, "feed") as producer:
        for t in seconds:
            for topic, item in feed.second(t):
                count += 1
                id = item.id or f"{topic}-{t}-{count}"
                producer.send(
                    topic, item.key or "key", item.value, type=item.type, id=id, content_type=item.content_type
                )
        assert await producer.flush(30)
    return count


@pytest.fixture
async def deployed(broker: LocalBroker, topic_prefix: str) -> tuple[Settings, Deployment, Feed]:
    """A deployment with the first seconds of a fleet in its topics."""
    settings = load_settings(bootstrap_servers=broker.bootstrap_servers, topic_prefix=topic_prefix)
    deployment = await ensure_deployment(settings, local=True, speed=8)
    feed = Feed(wall_now_ms() // 1000)
    await publish(settings, range(SECONDS), feed)
    return settings, deployment, feed


@asynccontextmanager
async def running(settings: Settings, deployment: Deployment, views: ViewsSettings) -> AsyncIterator[Any]:
    """The service in this process, and a client of it, once it has read what there is."""
    app = ViewsApp(settings, views, deployment)
    task = asyncio.create_task(app.run())
    async with aiohttp.ClientSession(f"http://127.0.0.1:{views.port}") as client:
        async with asyncio.timeout(60):
            while app.lag() != 0:
                assert not task.done(), task.result()
                await asyncio.sleep(0.05)
        try:
            yield app, client
        finally:
            app.stop()
            assert await task == 0


async def test_topics_become_tables(deployed: tuple[Settings, Deployment, Feed]) -> None:
    """Records that lie in the topics and records that come are current rows, as Faust tables and as JSON."""
    settings, deployment, feed = deployed
    views = load_views_settings(port=free_port())
    async with running(settings, deployment, views) as (app, client):
        async with client.get("/table/") as answer:
            assert {t["name"] for t in await answer.json()} == set(TABLES)
        async with client.get(f"/table/pools/{POOLS[0].name}/") as answer:
            assert (await answer.json())["pool"] == POOLS[0].name
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        async with client.get(f"/table/replicas/{POOLS[0].name}%2F{POOLS[0].name}-0/") as answer:
            before = await answer.json()
        for absent in ("/router/", "/graph/", "/table/nonsense/"):
            async with client.get(absent) as answer:
                assert answer.status == 404
        async with client.get("/readyz") as answer:
            assert answer.status == 200
        await publish(settings, range(SECONDS, SECONDS + 20), feed)
        key = f"{POOLS[0].name}/{POOLS[0].name}-0"
        async with asyncio.timeout(20):
            while app.rows.tables["replicas"][key]["until_s"] < feed.start_s + SECONDS + 19:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert app.rows.tables["replicas"][key]["start_s"] > before["start_s"]
        assert not app.rows.counters


async def test_it_leaves_no_topics(deployed: tuple[Settings, Deployment, Feed]) -> None:
    """Its tables have no changelog: not one topic is created for them."""
    settings, deployment, _ = deployed

    async def topics() -> set[str]:
        consumer = AIOKafkaConsumer(**client_options(settings))
        await consumer.start()
        try:
            return {t for t in await consumer.topics() if t.startswith(settings.topic_prefix)}
        finally:
            await consumer.stop()

    before = await topics()
    async with running(settings, deployment, load_views_settings(port=free_port())):
        pass
    assert await topics() == before


async def test_two_show_the_same_fleet(deployed: tuple[Settings, Deployment, Feed]) -> None:
    """A second views process beside the first shows all of the fleet, not half."""
    settings, deployment, _ = deployed
    first, second = (load_views_settings(port=free_port()) for _ in range(2))
    async with running(settings, deployment, first) as (a, _), running(settings, deployment, second) as (b, _):
        for table in TABLES:
            assert set(a.rows.tables[table]) == set(b.rows.tables[table]) != set()


async def test_an_order_is_signed_and_appended(deployed: tuple[Settings, Deployment, Feed], tmp_path: Path) -> None:
    """An order through the page is a command in decision.events that carries a valid signature of our key."""
    settings, deployment, _ = deployed
    key = create_key_file(tmp_path / "views.key")
    views = load_views_settings(port=free_port(), token=TOKEN, key_file=tmp_path / "views.key", key_id="page")
    async with running(settings, deployment, views) as (_, client):
        path, headers = f"/api/pools/{POOLS[0].name}/pause", {"Authorization": f"Bearer {TOKEN}"}
        async with client.post(path, headers=headers, json={"comment": "maintenance", "name": "Ada"}) as answer:
            assert answer.status == 202, await answer.text()
            id = (await answer.json())["command_id"]
    found = [r async for r in read_to_end(settings, DECISION_EVENTS) if header(r, "ce_type") == ce_type(Command.kind)]
    assert [header(r, "ce_id") for r in found] == [id]
    command = decode(Command, found[0].value)
    assert (command.command, command.pool, command.actor) == ("pause", POOLS[0].name, "Ada (page)")
    assert command.key_id == "page"
    assert sign(command, key).signature_base64 == command.signature_base64
    assert command.issued_s < command.expires_s


async def test_a_taken_port_is_named(deployed: tuple[Settings, Deployment, Feed]) -> None:
    """A port that is taken is an error that names the setting."""
    settings, deployment, _ = deployed
    views = load_views_settings(port=free_port())
    async with running(settings, deployment, views):
        with pytest.raises(SettingsError, match="FLEETLOOP_VIEWS_PORT"):
            await ViewsApp(settings, views, deployment).run()


async def test_a_process_ends_on_sigterm(deployed: tuple[Settings, Deployment, Feed]) -> None:
    """As a process: it serves, and SIGTERM ends it with status 0 and frees the port."""
    settings, _, _ = deployed
    port = free_port()
    env = os.environ | {
        "FLEETLOOP_BOOTSTRAP_SERVERS": settings.bootstrap_servers,
        "FLEETLOOP_TOPIC_PREFIX": settings.topic_prefix,
        "FLEETLOOP_VIEWS_PORT": str(port),
    }
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", PROCESS, env=env)
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client, asyncio.timeout(60):
            while True:
                try:
                    async with client.get("/readyz") as answer:
                        if answer.status == 200:
                            break
                except aiohttp.ClientError:
                    assert process.returncode is None
                await asyncio.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 30) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize("what", [*TABLES, "dead-letters"])
async def test_snapshot_reads_the_same_rows(deployed: tuple[Settings, Deployment, Feed], what: str) -> None:
    """`get` reads each table from the topics without the service."""
    settings, _, _ = deployed
    assert await snapshot(settings, what)


@pytest.mark.parametrize(
    ("beginning", "end", "at_time", "whole", "most", "first"),
    [
        (0, 100, 60, False, 1000, 60),
        (0, 100, None, False, 1000, 100),
        (0, 100, 60, True, 1000, 0),
        (0, 100, 60, True, 10, 90),
        (95, 100, 60, False, 1000, 95),
        (0, 0, None, True, 10, 0),
    ],
)
def test_first_offset(beginning: int, end: int, at_time: int | None, whole: bool, most: int, first: int) -> None:
    """As far back as the time says, or the whole, never before the beginning and never more than the bound."""
    assert first_offset(beginning, end, at_time, whole, most) == first


async def test_a_missing_topic_is_named(broker: LocalBroker, topic_prefix: str) -> None:
    """Without topics it does not wait for ever: it says which is missing and what to do."""
    settings = load_settings(bootstrap_servers=broker.bootstrap_servers, topic_prefix=topic_prefix)
    consumer = AIOKafkaConsumer(**client_options(settings))
    await consumer.start()
    try:
        with pytest.raises(SettingsError, match="fleetloop init"):
            await starts(consumer, settings, [settings.topic(name) for name in SOURCES], 60.0, 100)
    finally:
        await consumer.stop()
