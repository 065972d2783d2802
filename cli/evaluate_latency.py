"""`fleetloop evaluate latency`: how often the cause of a latency is named that was injected."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli.console import EXIT_FAILED, emit, err, guarded, table
from cli.evaluate import generator, seeds_of

SINGLE_MIN, PAIR_MIN = 0.9, 0.8


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("latency")(latency)


def latency(
    seeds: Annotated[str, typer.Option(help="Pools of the figures, as FIRST-LAST or a list.")] = "1000-1019",
    pairs: Annotated[bool, typer.Option("--pairs/--alone", help="Also every pair of causes at the same time.")] = True,
    misled: Annotated[
        bool, typer.Option("--misled", help="A little of every other cause comes at the same time.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure whether what breaks a pool's latency is named: each cause injected alone, then every pair of causes.

    The generator lies in the tests of a source checkout: engines of other step times than any model here assumes,
    through the fold that workers run. Figures: of the runs in which a p99 broke, the share in which the cause is first
    by its mean share of the excess (of two causes: both are the first two); the same over the single findings; the mean
    share left unexplained; seeds in which nothing broke; findings before the cause began. Seeds 0 to 39 were used while
    building: the others are for figures.

    Exit 1 where single causes are first in less than 90 % or pairs in less than 80 %, 3 without a source checkout.
    """

    def work() -> int:
        found = generator("latency_runs").evaluate(seeds_of(seeds), pairs, misled, err.print)
        emit(found, as_json, lambda: _show(found))
        good = (found["single"] or 0.0) >= SINGLE_MIN and (not pairs or (found["pair"] or 0.0) >= PAIR_MIN)
        return 0 if good else EXIT_FAILED

    guarded(work)


def _show(found: dict[str, Any]) -> None:
    columns = ("cause", "runs", "named", "named_in_each_finding", "unexplained", "silent", "before_the_cause")
    rows = {**found["causes"], **found.get("pairs", {})}
    table(columns, ({"cause": name, **row, "silent": len(row["silent"])} for name, row in rows.items()), "")
