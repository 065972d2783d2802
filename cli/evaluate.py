"""`fleetloop evaluate`: how well the models tell what they tell, on worlds that know nothing of them."""

from __future__ import annotations

import importlib
import os
import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.console import EXIT_FAILED, emit, err, guarded, table
from schemas.errors import InvalidInput, UnavailableError

app = typer.Typer(no_args_is_help=True, help="Measure the models on generated and recorded worlds.")
SEEDS_MAX = 1000


class Observation(StrEnum):
    """How neighbours' pressure is seen."""

    good = "good"
    mid = "mid"
    presence = "presence"


@app.command()
def interference(
    slowdown: Annotated[float, typer.Option(help="Mean slowdown while the antagonist works.", min=1.01, max=5)] = 1.2,
    noise: Annotated[float, typer.Option(help="Noise of a window's time per token, ln.", min=0, max=1)] = 0.05,
    confounders: Annotated[
        str, typer.Option(help="What else misleads: none, all, or names from throttle,prompts,kv,redeploy,correlated.")
    ] = "none",
    seeds: Annotated[str, typer.Option(help="Replicas of the figures, as FIRST-LAST or a list.")] = "10-21",
    hours: Annotated[float, typer.Option(help="Hours a replica; the first two only teach.", min=3, max=240)] = 10,
    days: Annotated[
        float, typer.Option(help="Replica-days without harm under each confounder; 0: none.", min=0, max=1000)
    ] = 10,
    observation: Annotated[
        Observation, typer.Option(help="Pressure with 10 % noise, 25 % and leakage, or presence only.")
    ] = Observation.mid,
    never_alone: Annotated[bool, typer.Option("--never-alone", help="Neighbours never pause.")] = False,
    real: Annotated[bool, typer.Option("--real", help="The recorded solo runs (FLEETLOOP_DATA) instead.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure who is slowed by whom: the class that the node level runs, on replicas of foreign step times.

    The generator lies in the tests of a source checkout. Figures: area under the ROC curve, recall at a threshold that
    1 % of windows without harm exceed, share of alarms that name the right antagonist, median error of ln slowdown;
    then alarms of replicas that nobody harms, under each confounder. Constants were chosen on seeds 0 to 5 and 500 to
    559: the others are for figures.

    Exit 1 where a target is missed (they hold from 1.2 times at up to 5 % noise), 3 without a source checkout.
    """

    def work() -> int:
        generators = generator("interference_evaluate")
        if real:
            return _real(generators, slowdown, as_json)
        setting = generators.Setting(
            hours=hours,
            slowdown=slowdown,
            noise=noise,
            confounders=_confounders(confounders, generators.CONFOUNDERS),
            observation=observation.value,
            alone=not never_alone,
        )
        numbers = seeds_of(seeds)
        found = generators.evaluate(numbers, setting, days, err.print)
        said = {**found, "seeds": numbers, "settings": vars(setting)}
        emit(said, as_json, lambda: _show(found))
        for line in found["missed"]:
            err.print(f"missed: {line}")
        return EXIT_FAILED if found["missed"] else 0

    guarded(work)


def generator(name: str) -> Any:
    """A module of tests/generators. Raises UnavailableError where the package is not run from a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "tests" / "generators" / f"{name}.py").is_file():
        raise UnavailableError(
            f"no tests/generators in {root}: evaluation needs a source checkout (pip install -e '.[test]')"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module(f"tests.generators.{name}")


def _confounders(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    if text in ("none", "all"):
        return known if text == "all" else ()
    names = tuple(text.split(","))
    wrong = [name for name in names if name not in known]
    if wrong:
        raise InvalidInput("--confounders", wrong[0], f"give none, all, or some of {', '.join(known)}")
    return names


def seeds_of(text: str) -> list[int]:
    """FIRST-LAST or a list. Raises InvalidInput for anything else."""
    span = re.fullmatch(r"(\d{1,9})-(\d{1,9})", text)
    if span:
        found = list(range(int(span[1]), min(int(span[2]) + 1, int(span[1]) + SEEDS_MAX + 1)))
    elif re.fullmatch(r"\d{1,9}(,\d{1,9})*", text):
        found = list(dict.fromkeys(int(number) for number in text.split(",")))
    else:
        found = []
    if not 0 < len(found) <= SEEDS_MAX:
        raise InvalidInput("--seeds", text, f"give FIRST-LAST or a list of 1 to {SEEDS_MAX} whole numbers")
    return found


def _real(generators: Any, slowdown: float, as_json: bool) -> int:
    folder = os.environ.get("FLEETLOOP_DATA", "")
    if not folder or not Path(folder).is_dir():
        raise InvalidInput("FLEETLOOP_DATA", folder, "name the folder with the recorded runs")
    found = generators.real(Path(folder), slowdown, range(100, 130), err.print)
    emit(
        {"runs": found, "slowdown": slowdown},
        as_json,
        lambda: table(("run", *next(iter(found.values()))), ({"run": name, **row} for name, row in found.items()), ""),
    )
    bad = [name for name, row in found.items() if row["false_windows"] > 0.005]
    bad += [name for name, row in found.items() if row["recall"] < 0.6 and slowdown >= 1.2]
    for name in bad:
        err.print(f"missed: {name}: at most .5 % false windows and a recall of at least .6 wanted")
    return EXIT_FAILED if bad else 0


def _show(found: dict[str, Any]) -> None:
    figures = [{"figure": name, "value": value} for name, value in found.items() if isinstance(value, float)]
    table(("figure", "value"), figures, "")
    rates = found["alarms_per_replica_day"]
    columns = ("misled by", "replica_days", "alarms", "alarms_per_replica_day", "false_windows", "unexplained_windows")
    if rates:
        table(columns, ({"misled by": name, **rate} for name, rate in rates.items()), "")
