"""Exporters on a real Kafka: what they are given arrives, also what came while the broker was away."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from exporters import edge
from exporters.intake import PATH, Intake, IntakeOptions
from exporters.trace_file import TraceFileOptions, run_trace_file
from schemas.requests import REQUEST_ROWS
from schemas.topics import REQUEST_TRACES
from streams.broker import LocalBroker
from streams.clients import partition_of
from streams.deployment import ensure_deployment
from streams.producer import EdgeProducer
from streams.reader import header, read_to_end
from streams.settings import Settings, load_settings
from tests.exporters.cells import as_rows
from tests.exporters.otlp_examples import request
from tests.exporters.test_intake import example
from tests.exporters.test_trace_file import AZURE


@pytest.fixture(autouse=True)
def real_producer(producers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Undoes what the other tests of this folder use."""
    monkeypatch.setattr(edge, "EdgeProducer", EdgeProducer)


async def _ids(settings: Settings) -> Counter[str]:
    """Request ids on the topic, each on its partition and in batches with the headers that they need."""
    found: Counter[str] = Counter()
    async for record in read_to_end(settings, REQUEST_TRACES):
        assert header(record, "ce_type") == REQUEST_ROWS.type
        batch = REQUEST_ROWS.decode(record.value, header(record, "content-type"))
        assert batch.refused == []
        for row in as_rows(batch):
            id = dict(zip(REQUEST_ROWS.columns, row, strict=True))["request_id"]
            assert record.partition == partition_of(id.encode(), 4)
            found[id] += 1
    return found


async def test_a_trace_arrives_whole(broker: LocalBroker, topic_prefix: str, tmp_path: Any) -> None:
    """Replayed rows are on the topic when the replay says that it is done."""
    settings = load_settings(bootstrap_servers=broker.bootstrap_servers, topic_prefix=topic_prefix)
    deployment = await ensure_deployment(settings, local=True)
    path = tmp_path / "conv.csv"
    path.write_text(AZURE)
    options = TraceFileOptions.of(file=path, pool="chat", speed=1000.0)
    replayed = await run_trace_file(settings, deployment, options, asyncio.Event())
    assert replayed.sent == 6
    assert sorted((await _ids(settings)).values()) == [2, 2, 2]


async def test_an_outage_loses_nothing_that_was_taken(own_broker: Callable[[], LocalBroker], topic_prefix: str) -> None:
    """While the broker is away nobody is told that rows are stored; what was said to be is there afterwards."""
    broker = own_broker()
    settings = load_settings(bootstrap_servers=broker.bootstrap_servers, topic_prefix=topic_prefix)
    deployment = await ensure_deployment(settings, local=True)
    intake = Intake(settings, deployment, IntakeOptions.of(port=0, ack_timeout_s=1))
    stop = asyncio.Event()
    running = asyncio.create_task(intake.run(stop))
    await intake.listening.wait()
    taken: list[str] = []
    answers: Counter[int] = Counter()
    async with aiohttp.ClientSession() as session:

        async def post(name: str, count: int) -> int:
            rows = [{**row, "request_id": f"{name}-{i}"} for i, row in enumerate(example(count))]
            async with session.post(f"http://127.0.0.1:{intake.port}{PATH}", json=rows) as answer:
                answers[answer.status] += 1
                if answer.status == 200:
                    taken.extend(row["request_id"] for row in rows)
                return answer.status

        async def stored(name: str) -> None:
            async with asyncio.timeout(60):
                while await post(name, 20) != 200:  # noqa: ASYNC110 - the intake has no event for it
                    await asyncio.sleep(0.2)

        await stored("before")
        await asyncio.to_thread(broker.kill)
        for number in range(5):
            assert await post(f"away-{number}", 20) == 503
        await asyncio.to_thread(broker.restart)
        await stored("after")
    stop.set()
    await running
    assert set(answers) <= {200, 503}
    assert intake.edge.producer.dropped.total() == 0
    found = await _ids(settings)
    assert set(found) >= set(taken) >= {"before-0", "after-19"}


class IntakeProcess:
    """`fleetloop export traces` as a process of its own, on one port through every restart."""

    def __init__(self, settings: Settings) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.environment = os.environ | {
            "FLEETLOOP_BOOTSTRAP_SERVERS": settings.bootstrap_servers,
            "FLEETLOOP_TOPIC_PREFIX": settings.topic_prefix,
            "FLEETLOOP_INTAKE_PORT": str(self.port),
            "FLEETLOOP_INTAKE_DEFAULT_POOL": "chat",
        }
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "cli.main", "export", "traces", env=self.environment
        )

    async def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        await self.process.wait()


async def test_nothing_acknowledged_is_lost_when_the_intake_is_killed(broker: LocalBroker, topic_prefix: str) -> None:
    """Killed with SIGKILL again and again under load of rows and spans: every acknowledged id is on the topic."""
    settings = load_settings(bootstrap_servers=broker.bootstrap_servers, topic_prefix=topic_prefix)
    await ensure_deployment(settings, local=True)
    intake = IntakeProcess(settings)
    acknowledged: set[str] = set()
    cut_off = 0
    chance = random.Random(4)
    done = asyncio.Event()

    async def load(sender: int, session: aiohttp.ClientSession) -> None:
        nonlocal cut_off
        number = 0
        while not done.is_set():
            number += 1
            base = (sender * 100_000 + number) * 100
            ids = [f"chatcmpl-genai-{base + i}" for i in range(20)]
            if sender % 2:
                path, body, content = "/v1/traces", request("genai", 20, first=base), "application/x-protobuf"
                sent = body.SerializeToString()
            else:
                rows = [{**row, "request_id": id} for id, row in zip(ids, example(20), strict=True)]
                path, content, sent = PATH, "application/json", json.dumps(rows).encode()
            try:
                async with session.post(
                    f"http://127.0.0.1:{intake.port}{path}", data=sent, headers={"Content-Type": content}
                ) as answer:
                    await answer.read()
                    if answer.status == 200:
                        acknowledged.update(ids)
            except aiohttp.ClientError:
                cut_off += 1
                await asyncio.sleep(0.1)

    await intake.start()
    async with aiohttp.ClientSession() as session:
        senders = [asyncio.create_task(load(sender, session)) for sender in range(6)]
        for _ in range(3):
            known = len(acknowledged)
            async with asyncio.timeout(60):
                while len(acknowledged) < known + 200:  # noqa: ASYNC110 - another process has no event
                    await asyncio.sleep(0.02)
            await asyncio.sleep(chance.uniform(0, 0.5))
            await intake.kill()
            await intake.start()
        await intake.kill()
        done.set()
        await asyncio.gather(*senders)
    assert cut_off
    found = await _ids(settings)
    assert acknowledged - set(found) == set()
