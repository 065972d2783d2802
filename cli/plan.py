"""What a demo consists of: folder, ports, tokens, scenario, and the processes in the order of their start."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cli.stack import Stack, free_ports, preferred_port
from streams.settings import Settings, load_settings

BOOTSTRAP = "FLEETLOOP_BOOTSTRAP_SERVERS"
VIEWS_PORT = 6066
VIEWS_KEY_ID = "views"


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
    env: dict[str, str] = field(default_factory=dict)
    stack: Stack = field(init=False)
    settings: Settings = field(init=False)
    deployment: Any = None
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def make(cls, folder: Path, trace: Path | None, scale: float, speed: float, duration: float | None) -> Plan:
        """Chooses scenario, ports and tokens. Raises InvalidInput for a trace that cannot be read."""
        from simulator.scenario import load_scenario

        (folder / "logs").mkdir()
        scenario = load_scenario("demo" if trace is None else "trace")
        args: list[str] = []
        if trace is not None:
            scenario = scenario.for_trace(str(trace), scale, duration)
            args = ["--trace", str(trace), "--scale", str(scale)]
        if duration is not None:
            args += ["--duration", str(duration)]
        control, *health = free_ports(6)
        return cls(
            folder,
            speed,
            scenario,
            args,
            preferred_port(VIEWS_PORT),
            control,
            health[0],
            token=secrets.token_urlsafe(12),
            control_token=secrets.token_urlsafe(24),
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
        self.settings = load_settings(bootstrap_servers=servers, topic_prefix=prefix)
        self.stack = Stack(self.folder / "logs", self.env)

    def start_processes(self) -> None:
        """Starts workers, views, executor, simulator; each is given only the secrets that it needs."""
        views = {
            "FLEETLOOP_VIEWS_TOKEN": self.token,
            "FLEETLOOP_VIEWS_PORT": str(self.views_port),
            "FLEETLOOP_VIEWS_KEY_FILE": str(self.folder / "views.key"),
            "FLEETLOOP_VIEWS_KEY_ID": VIEWS_KEY_ID,
        }
        control = {"FLEETLOOP_SIMULATOR_TOKEN": self.control_token}
        self.stack.start("worker", "worker")
        self.stack.start("views", "views", env=views)
        self.stack.start("executor", "execute", "simulator", "--url", self.control, env=control)
        self.stack.start("simulator", "simulate", *self.simulate_args, "--port", str(self.control_port), env=control)


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
