"""The simulator as a process: what its control port takes and refuses, and what reaches a real broker."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client import CollectorRegistry

from schemas.columns import COLUMNAR
from schemas.config import Deployment
from schemas.errors import SettingsError
from schemas.topics import NODE_SAMPLES, REQUEST_TRACES
from simulator.control import make_app
from simulator.fleet import Fleet
from simulator.process import Simulator, SimulatorOptions, run_simulator
from simulator.scenario import Scenario
from streams.broker import LocalBroker
from streams.deployment import ensure_deployment
from streams.producer import EdgeProducer
from streams.reader import header, read_to_end
from streams.settings import load_settings

Make = Callable[..., Scenario]
TOKEN = {"Authorization": "Bearer s3cret"}


@pytest.fixture
async def served(scenario: Make) -> AsyncIterator[tuple[Fleet, TestClient[Any, Any]]]:
    fleet = Fleet(scenario())
    app = make_app(fleet, "s3cret", lambda: {"a": 1}, lambda: {"b": 2}, lambda: "", CollectorRegistry())
    async with TestClient(TestServer(app)) as client:
        yield fleet, client


async def test_actions_are_carried_out_and_answered(served: tuple[Fleet, TestClient[Any, Any]]) -> None:
    """Scale and weights reach the fleet; the answer says what became of them; an older epoch is a conflict."""
    fleet, client = served
    answer = await client.put("/v1/pools/big/scale", json={"replicas": 3, "epoch": 7}, headers=TOKEN)
    assert answer.status == 200
    expected = {"accepted": True, "applied": True, "changed": True, "reason": "applied", "replicas": 3}
    sizes = {"before": {"replicas": 2}, "after": {"replicas": 3}}
    assert await answer.json() == {**expected, **sizes, "epoch": 7, "dry_run": False}
    assert len(fleet.pools["big"].staying) == 3
    answer = await client.put("/v1/pools/big/scale", json={"replicas": 1, "epoch": 6}, headers=TOKEN)
    assert (answer.status, (await answer.json())["reason"]) == (409, "epoch 6 is not newer than 7")
    answer = await client.put("/v1/pools/big/scale", json={"replicas": 1, "epoch": 8, "dry_run": True}, headers=TOKEN)
    assert (await answer.json())["reason"] == "would stop 2"
    assert len(fleet.pools["big"].staying) == 3
    answer = await client.put("/v1/pools/big/weights", json={"weights": {"big-0": 0}, "epoch": 1}, headers=TOKEN)
    assert answer.status == 200
    assert fleet.pools["big"].weights == {"big-0": 0.0}
    answer = await client.put("/v1/routes/chat/weights", json={"weights": {"big": 0}, "epoch": 1}, headers=TOKEN)
    assert answer.status == 200
    assert fleet.routes["chat"] == {"big": 0.0, "old": 1.0}


@pytest.mark.parametrize(
    ("path", "body", "status", "field"),
    [
        ("/v1/pools/nope/scale", {"replicas": 1, "epoch": 1}, 404, "pool"),
        ("/v1/routes/nope/weights", {"weights": {"big": 1}, "epoch": 1}, 404, "route"),
        ("/v1/pools/big/scale", {"replicas": -1, "epoch": 1}, 422, "replicas"),
        ("/v1/pools/big/scale", {"replicas": 1.5, "epoch": 1}, 422, "replicas"),
        ("/v1/pools/big/scale", {"replicas": 10**9, "epoch": 1}, 422, "replicas"),
        ("/v1/pools/big/scale", {"replicas": 1}, 422, "epoch"),
        ("/v1/pools/big/scale", {"replicas": 1, "epoch": 1, "more": 2}, 422, "more"),
        ("/v1/pools/big/scale", [], 422, "body"),
        ("/v1/pools/big/weights", {"weights": {"big-0": -1}, "epoch": 1}, 422, "weights.big-0"),
        ("/v1/routes/chat/weights", {"weights": {"mini": 1}, "epoch": 1}, 422, "weights"),
    ],
)
async def test_wrong_actions_are_refused_by_field(
    served: tuple[Fleet, TestClient[Any, Any]], path: str, body: Any, status: int, field: str
) -> None:
    """A wrong action changes nothing and is answered with field, value and remedy."""
    fleet, client = served
    answer = await client.put(path, json=body, headers=TOKEN)
    assert answer.status == status
    refusal = await answer.json()
    assert refusal["field"] == field
    assert refusal["remedy"]
    assert fleet.pools["big"].scale_epoch.number is None


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}])
async def test_without_the_token_nothing_may_act(scenario: Make, headers: dict[str, str]) -> None:
    """A PUT without the right token is refused, also where no token is configured; reading needs none."""
    for token in ("s3cret", ""):
        fleet = Fleet(scenario())
        app = make_app(fleet, token, lambda: {"a": 1}, lambda: {"b": 2}, lambda: "late", CollectorRegistry())
        async with TestClient(TestServer(app)) as client:
            answer = await client.put("/v1/pools/big/scale", json={"replicas": 1, "epoch": 1}, headers=headers)
            assert answer.status == 401
            assert "s3cret" not in await answer.text()
            assert await (await client.get("/v1/state")).json() == {"a": 1}
            assert await (await client.get("/v1/ledger")).json() == {"b": 2}
            ready = await client.get("/readyz")
            assert (ready.status, await ready.text()) == (503, "late\n")
            assert (await client.get("/healthz")).status == 200
        assert len(fleet.pools["big"].staying) == 2


async def test_behind_schedule_it_goes_on_in_strides_and_says_so(
    scenario: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that was away moves on by a stride at a time, is not ready meanwhile, and reaches the present."""
    now = [1000.0]
    monkeypatch.setattr("simulator.process.time.time", lambda: now[0])
    deployment = Deployment(origin_ms=900_000, speed=10, partitions={REQUEST_TRACES: 4})
    producer = EdgeProducer(load_settings(), "test")
    producer.connected = True
    simulator = Simulator(deployment, scenario(), producer)
    now[0] += 2
    simulator.step()
    assert (simulator.fleet.now_s, simulator.lag_s) == pytest.approx((1.0, 19.0))
    assert simulator.unready() == "19.0 s behind fleet time"
    for _ in range(19):
        simulator.step()
    assert (simulator.fleet.now_s, simulator.lag_s) == pytest.approx((20.0, 0.0))
    assert simulator.unready() == ""
    state = simulator.state()
    assert state["log_s"] == pytest.approx(900 + 10 * 102)
    assert state["requests"]["sent"] == simulator.report()["arrivals"] > 0


async def eventually(check: Callable[[], Any], within_s: float = 60.0) -> Any:
    """The first true answer of an async check."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if found := await check():
            return found
        await asyncio.sleep(0.05)
    pytest.fail(f"not within {within_s} s")


async def test_a_trace_reaches_the_broker_whole(
    broker: LocalBroker, topic_prefix: str, tmp_path: Path, scenario: Make
) -> None:
    """On a real broker: a trace to its end, an action on the way; the log holds the ledger's rows, each once."""
    trace = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:15:{10 + i / 10:06.3f},{100 + i},{20 + i % 50}" for i in range(400)]
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows))

    def change(data: dict[str, Any]) -> None:
        data["load"][0] = {"kind": "trace", "route": "chat", "path": str(trace)}

    settings = load_settings(bootstrap_servers=broker.bootstrap_servers, topic_prefix=topic_prefix)
    deployment = await ensure_deployment(settings, local=True, speed=20)
    ports: list[int] = []
    stop = asyncio.Event()
    record = tmp_path / "rows.jsonl"
    options = SimulatorOptions(port=0, token="s3cret", record=record, on_started=ports.append)
    task = asyncio.create_task(run_simulator(settings, deployment, scenario(change), options, stop))

    async with aiohttp.ClientSession() as session:

        async def get(path: str) -> Any:
            if task.done():
                task.result()
            if not ports:
                return None
            async with session.get(f"http://127.0.0.1:{ports[0]}{path}") as answer:
                return await answer.json() if answer.content_type == "application/json" else await answer.text()

        async def done() -> Any:
            ledger = await get("/v1/ledger")
            return ledger if ledger and ledger["done"] else None

        assert await eventually(lambda: get("/v1/state"))
        body = {"replicas": 3, "epoch": 1}
        async with session.put(f"http://127.0.0.1:{ports[0]}/v1/pools/big/scale", json=body, headers=TOKEN) as answer:
            assert answer.status == 200
        ledger = await eventually(done)
        state = await get("/v1/state")
        assert state["pools"]["big"]["desired"] == 3
        assert 'fleetloop_simulator_requests_total{event="ok",pool="big"}' in await get("/metrics")
        await asyncio.sleep(0.2)
        assert (await get("/v1/ledger")) == ledger  # what a finished trace cost no longer grows
    stop.set()
    assert await task == ledger
    assert ledger["ended"] == ledger["arrivals"] > 400
    assert ledger["dropped_records"] == {}

    found: Counter[tuple[Any, ...]] = Counter()
    async for item in read_to_end(settings, REQUEST_TRACES):
        if header(item, "ce_type") == "fleetloop.request.rows.v1":
            batch = COLUMNAR["fleetloop.request.rows.v1"].decode(item.value)
            assert batch.refused == []
            log_s = deployment.log_ms(item.timestamp) / 1000
            assert bool((batch.numbers["at_s"] <= log_s).all())
            found.update(zip(batch.text("event"), batch.text("request_id"), batch.text("status"), strict=True))
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    expected = Counter((line["event"], line["request_id"], line["status"]) for line in lines)
    assert found == expected
    assert set(found.values()) == {1}
    assert sum(event == "end" for event, *_ in found) == ledger["ended"]
    kinds = Counter([header(item, "ce_type") async for item in read_to_end(settings, NODE_SAMPLES)])
    assert {"fleetloop.gpu.samples.v1", "fleetloop.engine.samples.v1", "fleetloop.node.inventory.v1"} <= set(kinds)


async def test_a_taken_port_is_said_with_its_remedy(scenario: Make, tmp_path: Path) -> None:
    """A control port that is in use ends the start with the port and what to do."""
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    settings = load_settings(bootstrap_servers="127.0.0.1:1")
    deployment = Deployment(origin_ms=0, partitions={REQUEST_TRACES: 4})
    async with server:
        with pytest.raises(SettingsError, match=f"127.0.0.1:{port}.*choose a free one"):
            await run_simulator(settings, deployment, scenario(), SimulatorOptions(port=port, token="x"))
