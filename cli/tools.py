"""`fleetloop replay`: run a level again over the recorded log and compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.console import EXIT_FAILED, emit, out, run
from cli.processes import Level


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command("replay")(replay)


def replay(
    level: Annotated[Level, typer.Argument(help="Level to replay.")],
    partition: Annotated[int, typer.Option(help="Partition of the level's log.", min=0)] = 0,
    from_checkpoint: Annotated[
        int | None,
        typer.Option(help="Offset in the level's checkpoints topic. Default: from the log's beginning."),
    ] = None,
    until: Annotated[int | None, typer.Option(help="Stop before this offset. Default: the log's present end.")] = None,
    compare: Annotated[bool, typer.Option(help="Compare ids and bytes with what was published.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the results there as JSON lines.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Run a level again over recorded offsets, from the beginning or any kept checkpoint.

    Nothing is published. With --compare every result must have the id and the bytes that the topics hold; exit 1
    where one differs.
    """

    async def work() -> int:
        from agents import make_fold
        from streams.replay import replay as again
        from streams.settings import load_settings

        report = await again(
            load_settings(),
            level.value,
            make_fold,
            partition=partition,
            from_checkpoint=from_checkpoint,
            until=until,
            compare=compare,
            output=output,
        )
        emit(report.as_dict(), as_json, lambda: out.print(report.text()))
        return EXIT_FAILED if compare and not report.same else 0

    run(work())
