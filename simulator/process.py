"""The simulator as a process: moves a fleet along the deployment's time, publishes its telemetry, obeys over HTTP."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from schemas.config import Deployment
from schemas.errors import SettingsError
from schemas.topics import REQUEST_TRACES
from simulator.control import make_app
from simulator.fleet import Fleet
from simulator.ledger import Ledger
from simulator.publish import Publisher
from simulator.scenario import Scenario
from streams.producer import EdgeProducer
from streams.settings import Settings, declare_variable

log = structlog.get_logger(__name__)

TOKEN_VARIABLE = "FLEETLOOP_SIMULATOR_TOKEN"
declare_variable(TOKEN_VARIABLE, "Bearer token that the simulator's control port asks for; without it nothing may act.")

declare_variable(f"{TOKEN_VARIABLE}_FILE", "File that holds it; wins over the variable.")

PUBLISH_EVERY_S = 0.25  # fleet time
TICK_WALL_S_MIN = 0.02
STRIDE_S = 1.0
"""Fleet time taken at once when behind, so that control and telemetry go on."""
LAG_S_MAX = 5.0
"""Behind fleet time by more, the process is not ready and says so."""
FLUSH_WITHIN_S = 10.0


@dataclass(frozen=True, slots=True)
class SimulatorOptions:
    """How a simulator runs."""

    port: int = 8801
    """Control port on the settings' web host; 0: any free one."""
    token: str | None = None
    """Bearer token of the control port; None: from FLEETLOOP_SIMULATOR_TOKEN."""
    record: Path | None = None
    """File that every request row is written to as a JSON line."""
    on_started: Callable[[int], None] | None = None
    """Called with the control port once it listens."""


class Simulator:
    """A fleet, its ledger and its publisher, moved along the deployment's time."""

    def __init__(
        self, deployment: Deployment, scenario: Scenario, producer: EdgeProducer, record: IO[str] | None = None
    ) -> None:
        self.fleet = Fleet(scenario)
        self.ledger = Ledger(self.fleet)
        self.lag_s = 0.0
        self._deployment = deployment
        self._producer = producer
        self._base_s = self._log_now_s()
        self._publisher = Publisher(self.fleet, producer, self._base_s, deployment.partitions[REQUEST_TRACES], record)
        self._final: dict[str, Any] | None = None
        self._complained_at = -60.0

    def _log_now_s(self) -> float:
        origin_s = self._deployment.origin_ms / 1000
        return origin_s + self._deployment.speed * (time.time() - origin_s)

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`. After the end of a trace the fleet goes on idle, so that windows close."""
        tick_s = max(TICK_WALL_S_MIN, PUBLISH_EVERY_S / self._deployment.speed)
        while not stop.is_set():
            begun = time.monotonic()
            self.step()
            if self.lag_s > STRIDE_S:
                await asyncio.sleep(0)
                continue
            try:
                await asyncio.wait_for(stop.wait(), max(0.001, tick_s - (time.monotonic() - begun)))
            except TimeoutError:
                continue

    def step(self) -> None:
        """Moves to the present, at most a stride, and publishes."""
        fleet = self.fleet
        target_s = self._log_now_s() - self._base_s
        if target_s > fleet.now_s:
            events = fleet.advance(min(target_s, fleet.now_s + STRIDE_S))
            if self._final is None:
                self.ledger.add(events)
            self._publisher.take(events)
            self._publisher.flush_requests()
            self._publisher.publish_nodes()
            if self._final is None and fleet.idle:
                self._final = self.ledger.report()
                log.info("trace ended", requests=self._final["ended"], fleet_s=round(fleet.now_s, 1))
        self.lag_s = max(0.0, self._log_now_s() - self._base_s - fleet.now_s)
        if self.lag_s > LAG_S_MAX and time.monotonic() - self._complained_at > 10:
            self._complained_at = time.monotonic()
            log.warning("behind fleet time: lower the speed or the load", lag_s=round(self.lag_s, 1))

    def unready(self) -> str:
        """Why the process is not ready; empty when it is."""
        if not self._producer.connected:
            return "the broker is not reached"
        return f"{self.lag_s:.1f} s behind fleet time" if self.lag_s > LAG_S_MAX else ""

    def report(self) -> dict[str, Any]:
        """The ledger: as it stood when the trace had ended, or as it stands."""
        dropped = dict(self._producer.dropped)
        return {**(self._final or self.ledger.report()), "dropped_records": dropped}

    def state(self) -> dict[str, Any]:
        """Pools, replicas, weights and epochs as they are, beside the ledger's totals."""
        fleet = self.fleet
        report = self.report()
        return {
            "scenario": fleet.scenario.name,
            "fleet_s": fleet.now_s,
            "log_s": self._base_s + fleet.now_s,
            "speed": self._deployment.speed,
            "lag_s": self.lag_s,
            "done": report["done"],
            "requests": {"sent": report["arrivals"], "ended": report["ended"]},
            "cost_usd": report["cost_usd"],
            "routes": {
                route: {"weights": weights, "epoch": fleet.route_epochs.get(route)}
                for route, weights in fleet.routes.items()
            },
            "pools": {name: self._pool_state(name, report["pools"][name]) for name in fleet.pools},
            "producer": {
                "connected": self._producer.connected,
                "buffered_bytes": self._producer.buffered_bytes,
                "dropped_records": report["dropped_records"],
            },
        }

    def _pool_state(self, name: str, truth: dict[str, Any]) -> dict[str, Any]:
        pool = self.fleet.pools[name]
        states = [r.state for r in pool.replicas]
        return {
            "desired": pool.desired,
            "scale_epoch": pool.scale_epoch.number,
            "weights": pool.weights,
            "weights_epoch": pool.weights_epoch.number,
            **{state: states.count(state) for state in ("starting", "ready", "draining")},
            "in_flight": pool.in_flight,
            "backlog": len(pool.backlog),
            "refused_total": pool.refused_total,
            "cost_usd": truth["cost_usd"],
            "slo_attainment": truth["slo_attainment"],
            "replicas": [
                {
                    "replica": r.name,
                    "state": r.state,
                    "node": self.fleet.cluster.nodes[r.slot.node].name,
                    "gpus": list(r.slot.gpus),
                    "weight": pool.weights.get(r.name, 1.0),
                    "in_flight": r.engine.in_flight,
                    "since_s": self._base_s + r.since_s,
                }
                for r in pool.replicas
            ],
        }


class _Metrics(Collector):
    def __init__(self, simulator: Simulator, producer: EdgeProducer) -> None:
        self._simulator, self._producer = simulator, producer

    def collect(self) -> Iterable[Metric]:
        fleet, ledger = self._simulator.fleet, self._simulator.ledger
        yield GaugeMetricFamily("fleetloop_simulator_lag_seconds", "Behind fleet time.", value=self._simulator.lag_s)
        yield GaugeMetricFamily("fleetloop_simulator_fleet_seconds", "Fleet time.", value=fleet.now_s)
        requests = CounterMetricFamily("fleetloop_simulator_requests", "Requests by fate.", labels=["pool", "event"])
        cost = CounterMetricFamily("fleetloop_simulator_cost_usd", "Allocated so far.", labels=["pool"])
        refused = CounterMetricFamily("fleetloop_simulator_starts_refused", "Starts without GPUs.", labels=["pool"])
        backlog = GaugeMetricFamily("fleetloop_simulator_backlog", "Requests without a replica.", labels=["pool"])
        for name, pool in fleet.pools.items():
            requests.add_metric([name, "arrival"], ledger.pools[name].arrivals)
            for status, count in ledger.pools[name].status.items():
                requests.add_metric([name, status], count)
            cost.add_metric([name], fleet.cost_usd(name))
            refused.add_metric([name], pool.refused_total)
            backlog.add_metric([name], len(pool.backlog))
        yield from (requests, cost, refused, backlog)
        for what in ("sent", "dropped"):
            family = CounterMetricFamily(f"fleetloop_simulator_records_{what}", f"Records {what}.", labels=["topic"])
            for topic, count in getattr(self._producer, what).items():
                family.add_metric([topic], count)
            yield family


async def run_simulator(
    settings: Settings,
    deployment: Deployment,
    scenario: Scenario,
    options: SimulatorOptions | None = None,
    stop: asyncio.Event | None = None,
) -> dict[str, Any]:
    """Runs until `stop`; gives the ledger's report. Raises InvalidInput (scenario, trace), SettingsError (port)."""
    options, stop = options or SimulatorOptions(), stop or asyncio.Event()
    token = _token() if options.token is None else options.token
    if not token:
        log.warning(f"{TOKEN_VARIABLE} is not set: the fleet cannot be scaled or rerouted")
    with ExitStack() as files:
        record = files.enter_context(options.record.open("w", encoding="utf-8")) if options.record else None
        async with EdgeProducer(settings, f"simulator/{scenario.name}") as producer:
            simulator = Simulator(deployment, scenario, producer, record)
            registry = CollectorRegistry()
            registry.register(_Metrics(simulator, producer))
            app = make_app(simulator.fleet, token, simulator.state, simulator.report, simulator.unready, registry)
            runner = web.AppRunner(app, access_log=None)
            await runner.setup()
            try:
                port = await _listen(runner, settings.web_host, options.port)
                log.info("simulator", scenario=scenario.name, pools=list(simulator.fleet.pools), port=port)
                if options.on_started is not None:
                    options.on_started(port)
                await simulator.run(stop)
                if not await producer.flush(FLUSH_WITHIN_S):
                    log.warning("the broker did not take everything", bytes=producer.buffered_bytes)
            finally:
                await runner.cleanup()
            return simulator.report()


def _token() -> str:
    """From the environment, or from the file named by the variable with _FILE. Raises SettingsError."""
    if not (path := os.environ.get(f"{TOKEN_VARIABLE}_FILE")):
        return os.environ.get(TOKEN_VARIABLE, "")
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{TOKEN_VARIABLE}_FILE: {path!r}: cannot be read ({error})") from None


async def _listen(runner: web.AppRunner, host: str, port: int) -> int:
    site = web.TCPSite(runner, host, port)
    try:
        await site.start()
    except OSError as error:
        raise SettingsError(f"port: {host}:{port}: {error.strerror}: choose a free one") from None
    return int(runner.addresses[0][1])
