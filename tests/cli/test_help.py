"""Help teaches: every command says what it does, and every option what it is."""

from __future__ import annotations

import pytest

from cli.collect import commands
from cli.main import app
from tests.cli.conftest import Run

COMMANDS = {command.name: command for command in commands(app)}
NEEDED = "demo broker worker views simulate export execute apply get approve reject revert pause replay schemas"


def test_every_command_of_the_design_is_there() -> None:
    """Each has a name by which it is found."""
    assert {name.split()[1] for name in COMMANDS} >= set(NEEDED.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches(name: str, fleetloop: Run) -> None:
    """`--help` works, begins with a sentence, and explains each parameter."""
    command = COMMANDS[name]
    assert command.help[0].isupper()
    assert command.help.split("\n\n")[0].rstrip(")").endswith((".", "0")), command.help
    assert [p.name for p in command.parameters if not p.help.endswith((".", ")"))] == []
    shown = fleetloop(*name.split()[1:], "--help").out
    assert command.help.split()[0] in shown
    assert "Traceback" not in shown


def test_the_help_says_where_to_begin(fleetloop: Run) -> None:
    """Who knows nothing is told the first command, the order of the others, and the exit codes."""
    shown = fleetloop("--help").out
    for word in ("demo", "init", "apply", "worker", "FLEETLOOP_BOOTSTRAP_SERVERS", "Exit codes"):
        assert word in shown


def test_without_a_command_the_help_is_shown(fleetloop: Run) -> None:
    """`fleetloop` alone is a usage error that shows what there is."""
    assert "worker" in fleetloop(code=2).out
