"""`fleetloop replay`: run a level again over the recorded log and compare."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.console import EXIT_FAILED, emit, out, run, table

if TYPE_CHECKING:
    from streams.replay import Report


class FoldLevel(StrEnum):
    """Levels that compute."""

    node = "node"
    requests = "requests"
    pool = "pool"
    fleet = "fleet"


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command("replay")(replay)


def replay(
    level: Annotated[FoldLevel, typer.Argument(help="Level to replay.")],
    partition: Annotated[int, typer.Option(help="Partition of the level's log.", min=0)] = 0,
    from_checkpoint: Annotated[
        int | None,
        typer.Option(help="Offset that a kept checkpoint covers (see --list). Default: from the log's beginning."),
    ] = None,
    until: Annotated[
        int | None, typer.Option(help="Last offset folded. Default: what the workers have committed.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Compare ids and bytes with what was published.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the results there as JSON lines.")] = None,
    only_list: Annotated[bool, typer.Option("--list", help="Only list the checkpoints that are kept.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Run a level again over recorded offsets, from the beginning or any kept checkpoint.

    Nothing is published. With --compare every result must have the id and the bytes that the topics hold; exit 1
    where one differs.
    """

    async def work() -> int:
        from agents import make_fold
        from streams.deployment import read_deployment
        from streams.replay import kept_checkpoints
        from streams.replay import replay as again
        from streams.settings import load_settings

        settings = load_settings()
        if only_list:
            kept = [item._asdict() for item in await kept_checkpoints(settings, level.value, partition)]
            emit(kept, as_json, lambda: table(("offset", "at_ms", "dump_bytes"), kept, "no checkpoint is kept"))
            return 0
        report = await again(
            settings,
            await read_deployment(settings),
            level.value,
            partial(make_fold, level.value),
            partition,
            from_checkpoint=from_checkpoint,
            until=until,
            compare=compare,
            scratch=output,
        )
        emit({**report._asdict(), "same": report.same}, as_json, lambda: _show(report))
        return EXIT_FAILED if compare and not report.same else 0

    run(work())


def _show(report: Report) -> None:
    out.print(
        f"{report.topic}/{report.partition}, offsets {report.first} to {report.last}: {report.records} records gave "
        f"{report.results} results in {report.seconds:.1f} s, {len(report.fold_errors)} records raised",
        highlight=False,
    )
    out.print(f"results {report.results_sha256[:16]}, state {report.dump_sha256[:16]} (sha256)", highlight=False)
    if report.compared:
        verdict = "the same" if report.same else "NOT the same"
        out.print(
            f"compared with what was published: {verdict}; {report.matched} matched, {report.gone} no longer kept"
        )
    for what in ("missing", "different"):
        for example in getattr(report, what):
            out.print(f"  {what}: {example}", highlight=False)
