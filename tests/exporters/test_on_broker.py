"""Exporters on a real Kafka: what they are given arrives, also what came while the broker was away."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from exporters import edge
from exporters.intake import PATH, Intake, IntakeOptions
from exporters.rows import as_rows
from exporters.trace_file import TraceFileOptions, run_trace_file
from schemas.requests import REQUEST_ROWS
from schemas.topics import REQUEST_TRACES
from streams.broker import LocalBroker
from streams.clients import partition_of
from streams.deployment import ensure_deployment
from streams.producer import EdgeProducer
from streams.reader import header, read_to_end
from streams.settings import Settings, load_settings
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
    """Rows posted before, while and after the broker is killed are there afterwards; those answered 429 are not."""
    broker = own_broker()
    settings = load_settings(
        bootstrap_servers=broker.bootstrap_servers, topic_prefix=topic_prefix, edge_buffer_bytes=256 * 1024
    )
    deployment = await ensure_deployment(settings, local=True)
    intake = Intake(settings, deployment, IntakeOptions.of(port=0))
    stop = asyncio.Event()
    running = asyncio.create_task(intake.run(stop))
    await intake.listening.wait()
    taken: list[str] = []
    turned_away = 0
    async with aiohttp.ClientSession() as session:

        async def post(name: str, count: int) -> int:
            rows = [{**row, "request_id": f"{name}-{i}"} for i, row in enumerate(example(count))]
            async with session.post(f"http://127.0.0.1:{intake.port}{PATH}", json=rows) as answer:
                if answer.status == 202:
                    taken.extend(row["request_id"] for row in rows)
                return answer.status

        assert await post("before", 20) == 202
        await asyncio.to_thread(broker.kill)
        for number in range(30):
            turned_away += await post(f"away-{number}", 20) == 429
        assert len(taken) > 20
        assert turned_away > 0
        await asyncio.to_thread(broker.restart)
        async with asyncio.timeout(60):
            while await post("after", 20) != 202:  # noqa: ASYNC110 - the intake has no event for room
                await asyncio.sleep(0.2)
        assert await intake.edge.producer.flush(60)
    stop.set()
    await running
    assert intake.edge.producer.dropped.total() == 0
    found = await _ids(settings)
    assert set(found) == set(taken)
