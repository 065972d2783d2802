"""The `fleetloop` command: which sub-commands there are. Each imports what it needs when it runs."""

from __future__ import annotations

import inspect
import warnings

import typer

from cli import actions, broker, demo, evaluate, evaluate_latency, objects, processes, schemas, tools

app = typer.Typer(
    name="fleetloop",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="""Closes the loop for GPU inference fleets: telemetry in, explained, approved, executed and verified
decisions out, on Kafka.

New here? [bold]fleetloop demo[/] starts a real Kafka, a simulated fleet and the whole loop on this machine.

In production, in this order: [bold]init[/] (topics), [bold]apply[/] (pools, prices, policies),
[bold]worker[/] and [bold]views[/], [bold]export[/] on every node, [bold]execute[/] where actions are carried out.
Every process finds Kafka by FLEETLOOP_BOOTSTRAP_SERVERS (see docs/reference.md).

Exit codes: 0 done; 1 it did not come out well; 2 usage; 3 not reachable; 4 input or settings are wrong.""",
)

demo.register(app)
broker.register(app)
processes.register(app)
objects.register(app)
actions.register(app)
tools.register(app)
evaluate_latency.register(evaluate.app)
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(schemas.app, name="schemas")


def _unwrap_help(*apps: typer.Typer) -> None:
    """Paragraphs of docstrings as one line each: typer would keep the source's line breaks within them."""
    for one in apps:
        for command in one.registered_commands:
            paragraphs = inspect.cleandoc(command.help or command.callback.__doc__ or "").split("\n\n")
            command.help = "\n\n".join(" ".join(p.split()) for p in paragraphs)


_unwrap_help(app, processes.exporters, processes.executors, evaluate.app, schemas.app)


def main() -> None:
    """Entry point."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # without a line of our source
    app()


if __name__ == "__main__":
    main()
