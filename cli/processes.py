"""The long-running processes: worker, views, simulate, export, execute."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.console import guarded, run

Processes = Callable[[Any, Any, asyncio.Event], Awaitable[None]]
exporters = typer.Typer(
    no_args_is_help=True, help="Publish what a node, an engine, a gateway or a trace file has to say."
)
executors = typer.Typer(no_args_is_help=True, help="Carry out dispatched decisions on one kind of target.")
DryRun = Annotated[bool, typer.Option(help="Say what would be done; change nothing.")]


class Level(StrEnum):
    """Levels of the loop."""

    node = "node"
    requests = "requests"
    pool = "pool"
    fleet = "fleet"
    config = "config"


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command("worker")(worker)
    app.command("views")(views)
    app.command("simulate")(simulate)
    app.add_typer(exporters, name="export")
    app.add_typer(executors, name="execute")


def serve(app: str, main: Processes) -> None:
    """Runs an edge process until SIGINT or SIGTERM: settings and deployment are read, `stop` is set by the signal."""

    async def work() -> None:
        from streams.deployment import read_deployment
        from streams.logs import setup_logs
        from streams.settings import load_settings

        settings = load_settings()
        setup_logs(settings, app=app)
        deployment = await read_deployment(settings)  # before the signals: a broker that hangs is left by Ctrl-C
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await main(settings, deployment, stop)

    run(work())


def worker(
    level: Annotated[list[Level] | None, typer.Option(help="Only this level; may be repeated. Default: all.")] = None,
) -> None:
    """Run the loop: one process a level (node, requests, pool, fleet, config) under a supervisor.

    Start it on as many machines as you like: Kafka's consumer groups share the partitions out.
    """

    async def work() -> int:
        from agents.run import run_level, run_worker
        from streams.settings import load_settings

        names = [item.value for item in level or list(Level)]
        if len(names) == 1:
            return await run_level(names[0], load_settings())
        return await run_worker(load_settings(), tuple(names))

    run(work())


def views() -> None:
    """Serve the live page, JSON and metrics of current rows (http://127.0.0.1:6066 by default)."""

    def work() -> int:
        from streams.settings import load_settings
        from views.app import run_views

        return run_views(load_settings())

    guarded(work)


def simulate(
    scenario: Annotated[str, typer.Option(help="demo, trace, or a YAML file.")] = "demo",
    trace: Annotated[Path | None, typer.Option(help="Trace file (Azure LLM 2023 columns) that drives it.")] = None,
    scale: Annotated[float, typer.Option(help="Copies of the trace.", min=0.001)] = 1.0,
    duration: Annotated[float | None, typer.Option(help="The load ends after so many seconds.")] = None,
    port: Annotated[int, typer.Option(help="Control port on 127.0.0.1.", min=1, max=65535)] = 8801,
) -> None:
    """Run a simulated fleet that publishes and obeys through the same topics as a real one.

    PUT requests on the control port need the token in FLEETLOOP_SIMULATOR_TOKEN.
    """

    from simulator.process import SimulatorOptions, run_simulator
    from simulator.scenario import load_scenario

    async def main(settings: Any, deployment: Any, stop: asyncio.Event) -> None:
        chosen = load_scenario("trace" if trace is not None and scenario == "demo" else scenario)
        if trace is not None:
            chosen = chosen.for_trace(str(trace), scale, duration)
        elif duration is not None:
            chosen = chosen.model_copy(update={"duration_s": duration})
        await run_simulator(settings, deployment, chosen, SimulatorOptions(port=port), stop)

    serve("simulator", main)


@exporters.command("nvml")
def export_nvml(
    mapping: Annotated[
        Path | None,
        typer.Option(help="YAML file: who runs on which GPUs, told or found by rules (see docs/operations.md)."),
    ] = None,
    node: Annotated[str | None, typer.Option(help="Node name. Default: the host name.")] = None,
) -> None:
    """Publish what this host's GPUs do, and who is on them, once a second (needs an NVIDIA driver)."""

    from exporters.nvml import NvmlOptions, run_nvml

    async def main(settings: Any, deployment: Any, stop: asyncio.Event) -> None:
        await run_nvml(settings, deployment, NvmlOptions.of(mapping_file=mapping, node=node), stop)

    serve("nvml", main)


@exporters.command("engines")
def export_engines(
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="replica=http://host:port/metrics, then perhaps ;pool=..;node=..; may be repeated. Default: "
            "FLEETLOOP_ENGINES_TARGETS, and what FLEETLOOP_ENGINES_FILE_SD, _HTTP_SD and _KUBERNETES_SELECTOR find."
        ),
    ] = None,
    node: Annotated[
        str | None, typer.Option(help="Node of targets that name none. Default: this host's name for those on it.")
    ] = None,
) -> None:
    """Scrape vLLM, SGLang, TGI, Triton, Dynamo and dcgm-exporter once a second and publish what they count."""

    from exporters.engines import EngineOptions, run_engines

    async def main(settings: Any, deployment: Any, stop: asyncio.Event) -> None:
        await run_engines(settings, deployment, EngineOptions.of(targets=target or None, node=node), stop)

    serve("engines", main)


@exporters.command("traces")
def export_traces(
    host: Annotated[
        str | None,
        typer.Option(
            help="Address; beyond loopback a token is required. Default: FLEETLOOP_INTAKE_HOST, or 127.0.0.1."
        ),
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port. Default: FLEETLOOP_INTAKE_PORT, or 8810.", min=0, max=65535)
    ] = None,
    grpc_port: Annotated[
        int | None, typer.Option(help="Port of OTLP over gRPC (4317 is usual). Default: none.", min=0, max=65535)
    ] = None,
    tail: Annotated[
        Path | None, typer.Option(help="Folder of SGLang's request export files, followed as they grow.")
    ] = None,
) -> None:
    """Take requests by HTTP: our own rows, OTLP spans, LiteLLM's payloads; and from SGLang's export files.

    POST /v1/requests (JSON, NDJSON or Arrow), /v1/traces (OTLP), /v1/litellm (its generic API logger).
    """

    from exporters.intake import IntakeOptions, run_intake

    async def main(settings: Any, deployment: Any, stop: asyncio.Event) -> None:
        options = IntakeOptions.of(host=host, port=port, grpc_port=grpc_port, tail_dir=tail)
        await run_intake(settings, deployment, options, stop)

    serve("intake", main)


@exporters.command("trace-file")
def export_trace_file(
    file: Annotated[
        Path,
        typer.Argument(
            help="Trace of Azure (2023, 2024), BurstGPT, Mooncake or ServeGen, or JSON lines of request rows."
        ),
    ],
    pool: Annotated[
        str | None, typer.Option(help="Pool that the requests are said to go to; JSON lines may name their own.")
    ] = None,
    tenant: Annotated[str | None, typer.Option(help="Tenant of requests that name none. Default: trace.")] = None,
    speed: Annotated[float | None, typer.Option(help="Trace seconds per fleet second. Default: 1.", min=0.001)] = None,
    scale: Annotated[float | None, typer.Option(help="Copies of each request. Default: 1.", min=0.001)] = None,
    ttft: Annotated[float | None, typer.Option(help="Time to first token of requests that say none, s.", min=0)] = None,
    tpot: Annotated[
        float | None, typer.Option(help="Time per output token of requests that say none, s.", min=0)
    ] = None,
) -> None:
    """Replay a trace file into request.traces, its gaps kept. More: FLEETLOOP_TRACE_* settings."""

    from exporters.trace_file import TraceFileOptions, run_trace_file

    async def main(settings: Any, deployment: Any, stop: asyncio.Event) -> None:
        options = TraceFileOptions.of(
            file=file, pool=pool, tenant=tenant, speed=speed, scale=scale, ttft_s=ttft, tpot_s=tpot
        )
        await run_trace_file(settings, deployment, options, stop)

    serve("trace-file", main)


@executors.command("simulator")
def execute_simulator(
    url: Annotated[str, typer.Option(help="Control address of `fleetloop simulate`.")] = "http://127.0.0.1:8801",
    dry_run: DryRun = False,
) -> None:
    """Carry out decisions on a simulated fleet."""

    from executors.runtime import run_executor
    from executors.simulator import SimulatorTarget

    async def main(settings: Any, deployment: Any, stop: asyncio.Event) -> None:
        await run_executor(settings, deployment, SimulatorTarget.of(url=url), stop, dry_run=dry_run)

    serve("executor", main)


@executors.command("webhook")
def execute_webhook(
    url: Annotated[str, typer.Option(help="Where decisions are posted (https, or loopback).")],
    name: Annotated[str, typer.Option(help="Executor name that pools refer to.")] = "webhook",
    dry_run: DryRun = False,
) -> None:
    """Post decisions, HMAC-signed and idempotent, to your own service (secret: FLEETLOOP_WEBHOOK_SECRET or _FILE)."""

    from executors.runtime import run_executor
    from executors.webhook import WebhookTarget

    async def main(settings: Any, deployment: Any, stop: asyncio.Event) -> None:
        await run_executor(settings, deployment, WebhookTarget.of(url=url, name=name), stop, dry_run=dry_run)

    serve("executor", main)
