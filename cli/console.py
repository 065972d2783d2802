"""What every command shares: output for people or as JSON, errors as exit codes, tables.

Data goes to stdout, everything else to stderr.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from aiokafka.errors import KafkaError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from schemas.errors import FleetloopError, InvalidInput, SettingsError, UnavailableError

EXIT_FAILED = 1
EXIT_UNAVAILABLE = 3
EXIT_INPUT = 4
EXIT_INTERRUPTED = 130
EXIT_CODES = {
    0: "Done.",
    EXIT_FAILED: "What was asked did not come out well.",
    2: "Wrong usage.",
    EXIT_UNAVAILABLE: "Something outside (the broker, a driver, a download) cannot be reached or had.",
    EXIT_INPUT: "Input or settings are wrong; the message names field, value and remedy.",
    EXIT_INTERRUPTED: "Interrupted (Ctrl-C).",
}
"""Exit code -> meaning."""

logging.getLogger("aiokafka").addHandler(logging.NullHandler())  # what it could not do is told once, as our error

# No markup: what is shown quotes records and files, and "[/x]" in them is no instruction to us.
# A table that goes to a file or a pipe is not squeezed into 80 columns.
out = Console(soft_wrap=True, markup=False, width=None if sys.stdout.isatty() else 240)
err = Console(stderr=True, soft_wrap=True, markup=False)


def emit(value: object, as_json: bool, human: Callable[[], None]) -> None:
    """Prints `value` as JSON on stdout, or calls `human`."""
    if as_json:
        print(json.dumps(value, indent=2, default=str))
    else:
        human()


def table(columns: Iterable[str], rows: Iterable[Mapping[str, Any]], empty: str) -> None:
    """A table of rows by column name; `empty` is said where there are none."""
    names = list(columns)
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        grid.add_column(name.replace("_", " "), overflow="fold")  # a heading may be wrapped, at its words
    count = 0
    for row in rows:
        grid.add_row(*(cell(row.get(name)) for name in names))
        count += 1
    if count:
        out.print(grid)
    else:
        err.print(empty)


def cell(value: object) -> str:
    """A value for people: unknown is `-`."""
    if value is None or value == "":
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e6 else f"{value:.0f}"
    return str(value)


def fail(text: str, code: int) -> NoReturn:
    """Says what is wrong and ends."""
    err.print(Text.assemble(("error:", "bold red"), f" {text}"))
    raise typer.Exit(code)


def guarded(work: Callable[[], int | None]) -> None:
    """Runs a command's work and turns our exceptions into messages and exit codes."""
    try:
        code = work()
    except UnavailableError as error:
        fail(str(error), EXIT_UNAVAILABLE)
    except KafkaError as error:
        fail(f"Kafka: {error}: is FLEETLOOP_BOOTSTRAP_SERVERS right and the broker up?", EXIT_UNAVAILABLE)
    except (InvalidInput, SettingsError) as error:
        fail(str(error), EXIT_INPUT)
    except FleetloopError as error:
        fail(str(error), EXIT_FAILED)
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if code:
        raise typer.Exit(code)


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM interrupts what blocks, as Ctrl-C does; whoever is interrupted cleans up."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def uninterruptible() -> Iterator[None]:
    """A second Ctrl-C, or SIGTERM, must not interrupt a clean-up."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(work: Coroutine[Any, Any, int | None]) -> None:
    """`guarded` for a coroutine."""
    guarded(lambda: asyncio.run(work))
