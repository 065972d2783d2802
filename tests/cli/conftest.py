"""A command of `fleetloop` in this process, and the environment that it sees."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog
from typer.testing import CliRunner

from cli.main import app
from streams.broker import LocalBroker


class Outcome:
    """What a command did: exit code, both streams."""

    def __init__(self, result: Any) -> None:
        self.code: int = result.exit_code
        self.out: str = result.stdout
        self.err: str = result.stderr
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception

    @property
    def json(self) -> Any:
        """stdout as JSON."""
        return json.loads(self.out)


Run = Callable[..., Outcome]


@pytest.fixture
def _logs_as_before() -> Iterator[None]:
    """A long-running command sets up the process's logs, on a stream that ends with the command."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()


@pytest.fixture
def fleetloop(_logs_as_before: None) -> Run:
    """Runs `fleetloop ARGS`; an exception that is no exit code of ours is raised."""

    def run(*args: str, code: int | None = 0) -> Outcome:
        found = Outcome(CliRunner().invoke(app, [str(arg) for arg in args]))
        assert code is None or found.code == code, (found.code, found.out, found.err)
        return found

    return run


@pytest.fixture
def on_broker(broker: LocalBroker, topic_prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real Kafka of the tests, under a prefix of its own, as the environment names it."""
    monkeypatch.setenv("FLEETLOOP_BOOTSTRAP_SERVERS", broker.bootstrap_servers)
    monkeypatch.setenv("FLEETLOOP_TOPIC_PREFIX", topic_prefix)


@pytest.fixture
def nobody_there(monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a broker that is not up."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("FLEETLOOP_BOOTSTRAP_SERVERS", address)
    return address
