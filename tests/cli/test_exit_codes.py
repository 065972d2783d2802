"""Exit codes: 2 usage, 3 not reachable, 4 input or settings; the message names what and the remedy."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from cli import console
from schemas.errors import FleetloopError
from tests.cli.conftest import Run

PRICE = "kind: price\nname: H100\nspec: {usd_per_gpu_hour: 2}\n"
BAD_FILES = {
    "no such file": (None, ["file", "readable"]),
    "not YAML": ("kind: [", ["valid YAML"]),
    "markup in YAML": ("a: [/b]\n  c: [/d", ["valid YAML"]),
    "a list": ("- 1\n", ["document 1", "kind, name and spec"]),
    "no name": ("kind: pool\nspec: {}\n", ["document 1", "kind, name and spec"]),
    "unknown kind": ("kind: pol\nname: a\n", ["kind", "'pol'", "pool, price"]),
    "deployment": ("kind: deployment\nname: deployment\nspec: {speed: 5}\n", ["'deployment'", "write one of"]),
    "two of a name": (f"{PRICE}---\n{PRICE}", ["price/H100", "once"]),
    "a word that is none": (
        "kind: fleet\nname: fleet\nspecs: {mode: observe}\n",
        ["document 1: specs", "spec, deleted"],
    ),
    "a kind that is a list": ("kind: [pool]\nname: a\n", ["kind", "['pool']", "write one of"]),
    "second document": (f"{PRICE}---\nkind: x\nname: y\n", ["document 2", "'x'"]),
}
BAD_OBJECTS = {
    "unknown field": ("kind: price\nname: H100\nspec: {usd_per_hour: 2}\n", ["usd_per_hour", "2", "usd_per_gpu_hour"]),
    "out of bounds": ("kind: price\nname: H100\nspec: {usd_per_gpu_hour: -2}\n", ["price/H100", "-2", "greater"]),
    "missing field": ("kind: pool\nname: a\nspec: {model: m, gpu_type: H100, capacity_rps: 1}\n", ["gpus_per_replica"]),
    "a mode that is none": ("kind: fleet\nname: fleet\nspec: {mode: auto}\n", ["mode", "'auto'", "'automatic'"]),
    "a name with a slash": ("kind: price\nname: a/b\nspec: {usd_per_gpu_hour: 2}\n", ["name", "a/b"]),
    "deleted that is neither": ("kind: price\nname: H100\ndeleted: maybe\n", ["deleted", "'maybe'", "true or false"]),
    "a spec that is no object": ("kind: price\nname: H100\nspec: 2\n", ["price/H100", "spec", "2"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_read_is_4(name: str, tmp_path: Path, fleetloop: Run, nobody_there: str) -> None:
    """Before a broker is asked; the message names place, value and remedy."""
    text, words = BAD_FILES[name]
    file = tmp_path / "objects.yaml"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    found = fleetloop("apply", "-f", file, code=console.EXIT_INPUT)
    assert [word for word in words if word not in found.err] == []
    assert found.out == ""


@pytest.mark.parametrize("name", BAD_OBJECTS)
def test_an_object_that_is_wrong_is_4(name: str, tmp_path: Path, fleetloop: Run, on_broker: None) -> None:
    """Field, value and remedy are named, and nothing of the file is applied."""
    text, words = BAD_OBJECTS[name]
    file = tmp_path / "objects.yaml"
    file.write_text(f"kind: price\nname: A100\nspec: {{usd_per_gpu_hour: 1}}\n---\n{text}", encoding="utf-8")
    fleetloop("init", "--local")
    found = fleetloop("apply", "-f", file, code=console.EXIT_INPUT)
    assert [word for word in words if word not in found.err] == []
    assert [item["key"] for item in fleetloop("get", "config", "--json").json] == ["deployment/deployment"]


def test_a_deployment_that_is_not_there_is_4(fleetloop: Run, on_broker: None) -> None:
    """With a broker but no topics the remedy is `fleetloop init`, or another prefix."""
    for command in (["get", "config"], ["get", "decisions"], ["worker", "--level", "fleet"], ["replay", "pool"]):
        found = fleetloop(*command, code=console.EXIT_INPUT)
        assert "fleetloop init" in found.err
        assert "FLEETLOOP_TOPIC_PREFIX" in found.err


@pytest.mark.parametrize(
    "command",
    ["init", "get config", "get decisions", "worker", "worker --level fleet", "views", "simulate", "replay pool"],
)
@pytest.mark.timeout(60)
def test_a_broker_that_is_not_there_is_3(command: str, fleetloop: Run, nobody_there: str) -> None:
    """It ends by itself, and says which setting to look at."""
    found = fleetloop(*command.split(), code=console.EXIT_UNAVAILABLE)
    assert "FLEETLOOP_BOOTSTRAP_SERVERS" in found.err
    assert nobody_there.split(":")[1] in found.err
    assert "Traceback" not in found.err


@pytest.mark.parametrize("value", ["nowhere", "host:port", "host:99999"])
def test_a_setting_that_is_wrong_is_4(value: str, fleetloop: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable, its value and the remedy are named."""
    monkeypatch.setenv("FLEETLOOP_BOOTSTRAP_SERVERS", value)
    found = fleetloop("get", "pools", code=console.EXIT_INPUT)
    assert "FLEETLOOP_BOOTSTRAP_SERVERS" in found.err
    assert repr(value) in found.err
    assert "host:port" in found.err


@pytest.mark.parametrize(
    "args",
    [
        ["nonsense"],
        ["get", "nonsense"],
        ["worker", "--level", "nonsense"],
        ["apply"],
        ["demo", "--speed", "0"],
        ["demo", "--trace", "/nonexistent.csv"],
        ["approve"],
        ["execute", "webhook"],
    ],
)
def test_wrong_usage_is_2(args: list[str], fleetloop: Run) -> None:
    """Nothing is begun."""
    assert "Usage" in fleetloop(*args, code=2).err


def test_pause_wants_a_pool_or_all_and_never_both(tmp_path: Path, fleetloop: Run, nobody_there: str) -> None:
    """A slip must not stop a whole fleet."""
    key = tmp_path / "key.pem"
    fleetloop("keygen", key)
    for command in ("pause", "resume"):
        assert "--all" in fleetloop(command, "--key", key, code=2).err
        assert "--all" in fleetloop(command, "chat", "--all", "--key", key, code=2).err


def test_a_key_is_never_overwritten_and_never_readable_by_others(tmp_path: Path, fleetloop: Run) -> None:
    """keygen refuses an existing file; a key that others may read is refused with the remedy."""
    key = tmp_path / "key.pem"
    fleetloop("keygen", key)
    before = key.read_bytes()
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert "exists" in fleetloop("keygen", key, code=console.EXIT_INPUT).err
    assert key.read_bytes() == before
    key.chmod(0o644)
    assert "chmod 600" in fleetloop("approve", "abcdefgh", "--key", key, code=console.EXIT_INPUT).err


def test_a_role_that_is_none_makes_no_key(tmp_path: Path, fleetloop: Run) -> None:
    """keygen prints only objects that apply takes."""
    fleetloop("keygen", tmp_path / "key.pem", "--role", "root", code=2)
    assert not (tmp_path / "key.pem").exists()


def test_what_is_quoted_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets in somebody's data come out as they are."""

    def work() -> None:
        raise FleetloopError("no [bold]such[/] thing [/x]")

    with pytest.raises(console.typer.Exit):
        console.guarded(work)
    console.table(["a"], [{"a": "[/x] [red]y"}], "nothing")
    shown = capsys.readouterr()
    assert "no [bold]such[/] thing [/x]" in shown.err
    assert "[/x] [red]y" in shown.out


def test_every_exit_code_has_a_meaning() -> None:
    """What the reference prints is what the code has."""
    assert set(console.EXIT_CODES) == {0, console.EXIT_FAILED, 2, console.EXIT_UNAVAILABLE, console.EXIT_INPUT, 130}
