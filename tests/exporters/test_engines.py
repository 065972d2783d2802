"""The engine exporter against HTTP servers that answer, hang, break off and die."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from exporters.engines import EngineExporter, EngineOptions, run_engines
from schemas.config import Deployment
from schemas.errors import SettingsError
from schemas.node import ENGINE_SAMPLES
from schemas.topics import NODE_SAMPLES
from streams.settings import Settings
from tests.exporters.conftest import Producer, until

PAGE = """\
process_start_time_seconds 1764000000.5
vllm:num_requests_running{{engine="0"}} {running}
vllm:num_requests_running{{engine="1"}} {running}
"""


class Engine:
    """A server of `/metrics` whose next answers a test decides."""

    def __init__(self) -> None:
        self.mode = "ok"
        self.asked = 0
        self.runner = web.AppRunner(self._app(), access_log=None, shutdown_timeout=0.1)
        self.url = ""

    def _app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        return app

    async def start(self, port: int = 0) -> None:
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", port)
        await site.start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}/metrics"

    async def _metrics(self, request: web.Request) -> web.Response:
        self.asked += 1
        match self.mode:
            case "hang":
                await asyncio.sleep(30)
            case "status":
                return web.Response(status=503)
            case "large":
                return web.Response(text="x" * 100_000)
            case "other":
                return web.Response(text="node_load1 1\n")
            case "broken":
                return web.Response(text="vllm:num_requests_running{\n")
            case "redirect":
                raise web.HTTPFound("/elsewhere")
        return web.Response(text=PAGE.format(running=self.asked))


@pytest.fixture
async def engines() -> AsyncIterator[list[Engine]]:
    made = [Engine(), Engine()]
    for engine in made:
        await engine.start()
    yield made
    for engine in made:
        await engine.runner.cleanup()


def _options(servers: list[Engine], **given: Any) -> EngineOptions:
    targets = [f"r{i}={engine.url}" for i, engine in enumerate(servers)]
    small = {"period_s": 0.1, "timeout_s": 0.3, "dead_after_s": 0.2, "bytes_max": 50_000}
    return EngineOptions.of(targets=targets, node="node-1", **(small | given))


def rows() -> list[dict[str, Any]]:
    """Every row published so far."""
    out = []
    for record in Producer.made[0].records if Producer.made else []:
        batch = record.batch()
        names = {name: batch.text(name) for name in ("replica", "status")}
        for i in range(batch.rows):
            numbers = {name: batch.numbers[name][i] for name in ("running", "at_s", "start_s")}
            out.append({"replica": names["replica"][i], "status": names["status"][i], **numbers})
    return out


def statuses(replica: str) -> list[str]:
    return [row["status"] for row in rows() if row["replica"] == replica]


async def test_rows_batches_and_names(engines: list[Engine], settings: Settings, deployment: Deployment) -> None:
    """Each scrape is a row of its replica; batches carry node, sequence and unique ids; engines are summed."""
    stop = asyncio.Event()
    patient = _options(engines, timeout_s=5.0, dead_after_s=5.0)  # a busy machine is no dead engine
    running = asyncio.create_task(run_engines(settings, deployment, patient, stop))
    await until(lambda: len(rows()) >= 6)
    stop.set()
    await running
    records = Producer.made[0].records
    assert {(r.topic, r.key, r.type) for r in records} == {(NODE_SAMPLES, "node-1", ENGINE_SAMPLES.type)}
    assert [r.batch().meta["seq"] for r in records] == [str(i + 1) for i in range(len(records))]
    assert len({r.id for r in records}) == len(records)
    mine = [row for row in rows() if row["replica"] == "r0"]
    assert [row["running"] for row in mine[:3]] == [2, 4, 6]
    assert {row["start_s"] for row in mine} == {1764000000.5}
    assert all(b["at_s"] > a["at_s"] for a, b in itertools.pairwise(mine))


async def test_times_are_fleet_time(engines: list[Engine], settings: Settings, deployment: Deployment) -> None:
    """At speed 10 both the time of a scrape and the start of the engine are told on the fleet's clock."""
    fast = deployment.model_copy(update={"speed": 10.0})
    stop = asyncio.Event()
    running = asyncio.create_task(run_engines(settings, fast, _options(engines), stop))
    await until(lambda: any(row["status"] == "ok" for row in rows()))
    stop.set()
    await running
    first = next(row for row in rows() if row["status"] == "ok")
    assert first["start_s"] == 1764000005.0
    assert first["at_s"] > 1764000000 + 10 * (1764000000 - 1763990000)


async def test_engines_apart(engines: list[Engine], settings: Settings, deployment: Deployment) -> None:
    """On demand each engine behind a port is a row of its own, `replica:engine`; a dead port is dead for each."""
    stop = asyncio.Event()
    running = asyncio.create_task(run_engines(settings, deployment, _options(engines[:1], engines="apart"), stop))
    await until(lambda: len(rows()) >= 2)
    engines[0].mode = "status"
    await until(lambda: "dead" in statuses("r0:0") and "dead" in statuses("r0:1"))
    stop.set()
    await running
    assert {row["replica"] for row in rows()} == {"r0:0", "r0:1"}
    assert rows()[0]["running"] == 1


@pytest.mark.parametrize("mode", ["hang", "status", "large", "other", "broken", "redirect"])
async def test_a_bad_target_is_dead_and_delays_no_other(
    engines: list[Engine], settings: Settings, deployment: Deployment, mode: str
) -> None:
    """Whatever a target does wrong, it is dead after a while and `ok` when it answers again; the other is never."""
    stop = asyncio.Event()
    running = asyncio.create_task(run_engines(settings, deployment, _options(engines), stop))
    await until(lambda: "ok" in statuses("r0"))
    engines[0].mode = mode
    await until(lambda: statuses("r0").count("dead") >= 2)
    dead = len(statuses("r0"))
    engines[0].mode = "ok"
    await until(lambda: "ok" in statuses("r0")[dead:])
    stop.set()
    await running
    assert set(statuses("r1")) == {"ok"}
    assert all(row["running"] != row["running"] for row in rows() if row["status"] == "dead")  # null


async def test_a_closed_port_is_dead(engines: list[Engine], settings: Settings, deployment: Deployment) -> None:
    """A target that was never there is said to be dead as well."""
    await engines[0].runner.cleanup()
    stop = asyncio.Event()
    running = asyncio.create_task(run_engines(settings, deployment, _options(engines), stop))
    await until(lambda: "dead" in statuses("r0"))
    stop.set()
    await running
    assert "ok" not in statuses("r0")


async def test_a_slow_target_is_asked_once_at_a_time(
    engines: list[Engine], settings: Settings, deployment: Deployment
) -> None:
    """Ticks are skipped, not queued, while a scrape is under way."""
    engines[0].mode = "hang"
    exporter = EngineExporter(settings, deployment, _options(engines[:1], timeout_s=20))
    stop = asyncio.Event()
    running = asyncio.create_task(exporter.run(stop))
    await until(lambda: statuses("r0").count("dead") >= 3)
    stop.set()
    await running
    assert engines[0].asked == 1
    samples = {s.name: s.value for m in exporter.edge.metrics.collect() for s in m.samples}
    assert samples["fleetloop_exporter_skipped_total"] >= 3


@pytest.mark.parametrize(
    "target", ["r0", "r0=", "r0=ftp://x/", "=http://x/", "a/b=http://x/", "r=http://a/,r=http://b/"]
)
def test_bad_targets_are_named(target: str) -> None:
    """Missing parts, other schemes, invalid and repeated names."""
    with pytest.raises(SettingsError, match="FLEETLOOP_ENGINES_TARGETS"):
        EngineOptions.of(targets=target)


def test_targets_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Separated by commas; without any it says what to set."""
    monkeypatch.setenv("FLEETLOOP_ENGINES_TARGETS", "a=http://x/metrics, b=http://y/metrics")
    assert EngineOptions.of().targets == ["a=http://x/metrics", "b=http://y/metrics"]
    monkeypatch.delenv("FLEETLOOP_ENGINES_TARGETS")
    with pytest.raises(SettingsError, match=r"FLEETLOOP_ENGINES_TARGETS: .*replica=http"):
        EngineOptions.of()
