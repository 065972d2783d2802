"""`fleetloop demo`: a real Kafka, a simulated fleet and the whole loop on this machine, shown live."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.console import EXIT_FAILED, EXIT_INTERRUPTED, err, guarded, interruptible, uninterruptible

if TYPE_CHECKING:
    from cli.plan import Plan


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("demo")(demo)


def demo(
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Trace file (Azure LLM 2023 columns). Default: a synthetic fleet.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    scale: Annotated[float, typer.Option(help="Copies of the trace; the fleet grows with it.", min=0.001)] = 1.0,
    speed: Annotated[float, typer.Option(help="Fleet seconds per second.", min=0.1, max=100)] = 10.0,
    duration: Annotated[
        float | None,
        typer.Option(help="Stop after so many fleet seconds. Default: the trace's end, or never.", min=1),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout.")] = False,
    keep: Annotated[bool, typer.Option(help="Keep the data folder (logs, Kafka's data).")] = False,
) -> None:
    """See Fleetloop work: starts Kafka, workers, views, an executor and a simulated fleet; Ctrl-C ends it all.

    Without options it runs for ever at ten times life's speed: 4 pools on H100 and A100, 3 tenants, bursts, a slow
    replica. With --trace a recorded trace drives it and a summary follows at the end.

    Exit 0 only if every request that was sent was windowed and billed, or is in dead.letters; 130 where Ctrl-C came
    before that. A demo without an end, which only Ctrl-C ends, exits 0. Uses the Kafka of FLEETLOOP_BOOTSTRAP_SERVERS
    where that is set, else starts its own.
    """
    guarded(lambda: _demo(trace, scale, speed, duration, as_json, keep))


def _demo(trace: Path | None, scale: float, speed: float, duration: float | None, as_json: bool, keep: bool) -> int:
    from cli.plan import Plan

    folder = Path(tempfile.mkdtemp(prefix="fleetloop-demo-"))
    cleanup = ExitStack()
    if keep:
        cleanup.callback(err.print, f"data kept in {folder}")
    else:
        cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
    with interruptible():  # also while Kafka is downloaded
        try:
            plan = Plan.make(folder, trace, scale, speed, duration)
            plan.start_broker(cleanup, err.print)
            return asyncio.run(_run(plan, cleanup, as_json))
        finally:
            with uninterruptible():
                cleanup.close()


async def _run(plan: Plan, cleanup: ExitStack, as_json: bool) -> int:
    """Everything after the broker; gives the exit code."""
    from cli.watch import Watch

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    if not await _start(plan, cleanup, stop):
        return EXIT_INTERRUPTED
    err.print(f"[bold]The page:[/] {plan.page}  (token for its buttons: {plan.token})", markup=True)
    err.print(f"Logs: {plan.stack.logs}. Fleet time runs at {plan.speed:g}x. Ctrl-C ends everything.\n")
    async with Watch(plan, as_json=as_json) as watch:
        ended = await watch.until_done(stop)
        complete = ended and await watch.settle(stop)
        if not plan.finite and not as_json:
            return 0
        summary = await watch.summary()
    if as_json:
        print(json.dumps(summary, indent=2))
    else:
        watch.show_summary(summary)
    if complete:
        return 0
    return EXIT_INTERRUPTED if stop.is_set() else EXIT_FAILED


async def _start(plan: Plan, cleanup: ExitStack, stop: asyncio.Event) -> bool:
    """Starts everything but the broker; False where Ctrl-C came first."""
    from cli.plan import configure

    err.print("creating topics and configuration")
    await configure(plan)
    err.print("starting workers, views and executor")
    cleanup.callback(plan.stack.stop)
    cleanup.callback(err.print, "ending everything")
    plan.start_loop()
    await plan.loop_ready(stop)
    if stop.is_set():
        return False
    err.print("starting the simulated fleet")
    plan.start_simulator()
    return True
