"""What a process is told: an option wins, else its variable, else the default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import exporters.engines
import exporters.intake
import exporters.trace_file
from cli import processes
from cli.console import EXIT_INPUT
from tests.cli.conftest import Run


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Options that exporters would run with; nothing is started."""
    found: list[Any] = []

    async def record(settings: Any, deployment: Any, options: Any, stop: Any) -> None:
        found.append(options)

    for module, name in (
        (exporters.intake, "intake"),
        (exporters.engines, "engines"),
        (exporters.trace_file, "trace_file"),
    ):
        monkeypatch.setattr(module, f"run_{name}", record)

    def serve(app: str, main: processes.Processes) -> None:
        processes.run(main(None, None, None))  # type: ignore[arg-type]

    monkeypatch.setattr(processes, "serve", serve)
    return found


def test_the_intake_listens_where_it_is_told(told: list[Any], fleetloop: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Default, environment, option."""
    fleetloop("export", "traces")
    monkeypatch.setenv("FLEETLOOP_INTAKE_PORT", "1234")
    fleetloop("export", "traces")
    fleetloop("export", "traces", "--port", "4321")
    assert [(o.host, o.port) for o in told] == [("127.0.0.1", 8810), ("127.0.0.1", 1234), ("127.0.0.1", 4321)]


def test_the_intake_follows_a_folder(told: list[Any], fleetloop: Run, tmp_path: Path) -> None:
    """And listens for gRPC, where it is told to."""
    fleetloop("export", "traces", "--tail", tmp_path, "--grpc-port", "4317")
    assert "FLEETLOOP_INTAKE_TAIL_DIR" in fleetloop("export", "traces", "--tail", tmp_path / "x", code=EXIT_INPUT).err
    assert [(o.tail_dir, o.grpc_port) for o in told] == [(tmp_path, 4317)]


def test_engines_are_named_by_option_or_variable(
    told: list[Any], fleetloop: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without either the variable is named."""
    assert "FLEETLOOP_ENGINES_TARGETS" in fleetloop("export", "engines", code=EXIT_INPUT).err
    monkeypatch.setenv("FLEETLOOP_ENGINES_TARGETS", "a=http://127.0.0.1:1/metrics,b=http://127.0.0.1:2/metrics")
    fleetloop("export", "engines")
    fleetloop("export", "engines", "--target", "c=http://127.0.0.1:3/metrics", "--node", "host-1")
    assert [len(o.targets) for o in told] == [2, 1]
    assert told[1].node == "host-1"


def test_a_trace_names_its_pool(told: list[Any], fleetloop: Run, tmp_path: Path) -> None:
    """Azure's columns have none, so it must be said; JSON lines may name their own."""
    azure, lines = tmp_path / "trace.csv", tmp_path / "trace.jsonl"
    azure.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n", encoding="utf-8")
    lines.write_text("", encoding="utf-8")
    assert "FLEETLOOP_TRACE_POOL" in fleetloop("export", "trace-file", azure, code=EXIT_INPUT).err
    fleetloop("export", "trace-file", azure, "--pool", "chat")
    fleetloop("export", "trace-file", lines, "--speed", "2")
    assert [(o.pool, o.tenant, o.speed) for o in told] == [("chat", "trace", 1.0), (None, "trace", 2.0)]
