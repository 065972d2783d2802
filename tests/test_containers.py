"""docker-compose.yml and Dockerfile fit the code: real commands, known settings, nobody is root, loopback alone."""

from __future__ import annotations

import importlib
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from streams import settings
from streams.jars import KAFKA_VERSION

ROOT = Path(__file__).parents[1]
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
OURS = [name for name, service in SERVICES.items() if "command" in service]
DECLARES_VARIABLES = ("views.app", "simulator.process", "executors.simulator")


def resolved(text: str) -> str:
    """The text with compose's `${NAME:-default}` replaced by the default."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def test_it_has_every_part_of_the_loop() -> None:
    """Kafka, worker, views, executor, exporter and simulator are services."""
    assert {"kafka", "init", "worker", "views", "executor", "exporter", "simulator"} == SERVICES.keys()


@pytest.mark.parametrize("name", OURS)
def test_each_command_is_one_of_fleetloop(name: str) -> None:
    """The command and its options are known to `fleetloop`."""
    from cli.main import app

    result = CliRunner().invoke(app, [*map(resolved, SERVICES[name]["command"]), "--help"])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", OURS)
def test_each_variable_is_a_setting(name: str) -> None:
    """A FLEETLOOP_* variable that nothing reads would be a bound or a secret that silently does not hold."""
    for module in DECLARES_VARIABLES:
        importlib.import_module(module)
    known = {settings.PREFIX + field.upper() for field in settings.Settings.model_fields} | set(settings.ELSEWHERE)
    given = {key for key in SERVICES[name]["environment"] if key.startswith(settings.PREFIX)}
    assert given - known == set()


@pytest.mark.parametrize("name", SERVICES)
def test_nobody_is_root(name: str) -> None:
    """Each service runs as another user, without capabilities and without a way to new ones."""
    service = SERVICES[name]
    assert service["user"].split(":")[0] not in ("", "0", "root")
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_published_on_loopback_alone(name: str) -> None:
    """What the host publishes can be reached from the host only."""
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[name].get("ports", []))


def test_the_broker_is_the_one_that_we_test_with() -> None:
    """The image is of the version that `fleetloop broker` runs."""
    assert SERVICES["kafka"]["image"] == f"apache/kafka:{KAFKA_VERSION}"


def test_the_image_has_every_package_and_no_root() -> None:
    """The Dockerfile copies each package of the distribution and ends as another user."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = [name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]]
    assert [f"COPY {name} {name}" for name in packages if f"COPY {name} {name}" not in lines] == []
    assert [line for line in lines if line.startswith("USER ")][-1] == "USER 10001"
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert [name for name in packages if f"!{name}" not in ignored] == []
