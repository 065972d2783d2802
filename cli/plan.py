"""What a demo consists of: folder, ports, tokens, scenario, and the processes in the order of their start."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import aiohttp

from cli.stack import Stack, claimed, free_ports, preferred_port
from schemas.errors import UnavailableError
from streams.settings import HEALTH_PORT_OFFSET, Settings, load_settings

BOOTSTRAP = "FLEETLOOP_BOOTSTRAP_SERVERS"
VIEWS_PORT = 6066
VIEWS_KEY_ID = "views"
READY_WITHIN_S = 60.0


@dataclass
class Plan:
    """One demo."""

    folder: Path
    speed: float
    scenario: Any
    simulate_args: list[str]
    views_port: int
    control_port: int
    health_port: int
    token: str
    control_token: str
    finite: bool
    """Whether the load ends by itself."""
    claim: IO[bytes] | None
    """Held open as long as the usual port of the page is ours."""
    env: dict[str, str] = field(default_factory=dict)
    stack: Stack = field(init=False)
    settings: Settings = field(init=False)
    deployment: Any = None
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def make(cls, folder: Path, trace: Path | None, scale: float, speed: float, duration: float | None) -> Plan:
        """Chooses scenario, ports and tokens. Raises InvalidInput for a trace that cannot be read."""
        from simulator.scenario import load_scenario
        from simulator.trace import read_trace

        (folder / "logs").mkdir()
        scenario = load_scenario("demo" if trace is None else "trace")
        args: list[str] = []
        if trace is not None:
            read_trace(trace)  # what is wrong with it is said before anything is started
            scenario = scenario.for_trace(str(trace), scale, duration)
            args = ["--trace", str(trace), "--scale", str(scale)]
        if duration is not None:
            args += ["--duration", str(duration)]
        spare, control, *health = free_ports(2 + len(HEALTH_PORT_OFFSET))
        claim = claimed(load_settings().state_dir, VIEWS_PORT)
        return cls(
            folder,
            speed,
            scenario,
            args,
            preferred_port(VIEWS_PORT, spare) if claim is not None else spare,
            control,
            health[0],
            token=secrets.token_urlsafe(12),
            control_token=secrets.token_urlsafe(24),
            finite=trace is not None or duration is not None,
            claim=claim,
        )

    @property
    def page(self) -> str:
        """Address of the live page."""
        return f"http://127.0.0.1:{self.views_port}/"

    @property
    def control(self) -> str:
        """Address of the simulator's control API."""
        return f"http://127.0.0.1:{self.control_port}"

    def start_broker(self, cleanup: ExitStack, progress: Callable[[str], None]) -> None:
        """Uses the broker of the environment, else starts one that `cleanup` ends."""
        servers = os.environ.get(BOOTSTRAP)
        prefix = ""
        if servers:
            prefix = f"demo-{secrets.token_hex(4)}."
            progress(f"using the Kafka at {servers}, topics {prefix}*")
        else:
            from streams.broker import LocalBroker

            broker = LocalBroker(self.folder / "kafka")
            cleanup.callback(broker.stop)
            broker.start(progress=progress)
            servers = broker.bootstrap_servers
            progress(f"Kafka listens on {servers}")
        self.env = {
            BOOTSTRAP: servers,
            "FLEETLOOP_TOPIC_PREFIX": prefix,
            "FLEETLOOP_HEALTH_PORT": str(self.health_port),
            "FLEETLOOP_LOG_FORMAT": "json",
        }
        self.settings = load_settings(bootstrap_servers=servers, topic_prefix=prefix, health_port=self.health_port)
        self.stack = Stack(self.folder / "logs", self.env)

    def start_loop(self) -> None:
        """Starts workers, views and executor; each is given only the secrets that it needs."""
        views = {
            "FLEETLOOP_VIEWS_TOKEN": self.token,
            "FLEETLOOP_VIEWS_PORT": str(self.views_port),
            "FLEETLOOP_VIEWS_KEY_FILE": str(self.folder / "views.key"),
            "FLEETLOOP_VIEWS_KEY_ID": VIEWS_KEY_ID,
        }
        self.stack.start("worker", "worker")
        self.stack.start("views", "views", env=views)
        self.stack.start("executor", "execute", "simulator", "--url", self.control, env=self.control_env)

    def start_simulator(self) -> None:
        """Starts the simulated fleet: the first request is sent at once."""
        args = [*self.simulate_args, "--port", str(self.control_port)]
        self.stack.start("simulator", "simulate", *args, env=self.control_env)

    @property
    def control_env(self) -> dict[str, str]:
        """What those need who may act on the simulated fleet."""
        return {"FLEETLOOP_SIMULATOR_TOKEN": self.control_token}

    async def loop_ready(self, stop: asyncio.Event) -> None:
        """Waits until every level is assigned and restored. Raises UnavailableError after `READY_WITHIN_S`.

        A fleet that starts before its loop would begin with stale evidence, which holds every action.
        """
        ports = [self.settings.health_port_of(level) for level in HEALTH_PORT_OFFSET]
        deadline = time.monotonic() + READY_WITHIN_S
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session:
            while ports and not stop.is_set():
                self.stack.check()
                ports = [port for port in ports if not await _answers(session, port)]
                if time.monotonic() > deadline:
                    raise UnavailableError(
                        f"workers are not ready after {READY_WITHIN_S:.0f} s:\n{self.stack.tail('worker')}"
                    )
                await asyncio.sleep(0.2)


async def _answers(session: aiohttp.ClientSession, port: int) -> bool:
    try:
        async with session.get(f"http://127.0.0.1:{port}/readyz") as response:
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False


async def configure(plan: Plan) -> None:
    """Creates topics, deployment and the configuration objects of the scenario."""
    from simulator.publish import scenario_config
    from streams.config_store import send_objects
    from streams.deployment import ensure_deployment, wall_now_ms
    from streams.signing import create_key_file, signer_object

    plan.deployment = await ensure_deployment(plan.settings, local=True, speed=plan.speed, origin_ms=wall_now_ms())
    key = create_key_file(plan.folder / "views.key")
    objects = [*scenario_config(plan.scenario), signer_object(VIEWS_KEY_ID, "admin", key)]
    await send_objects(plan.settings, objects)
