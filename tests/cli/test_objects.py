"""init, apply, get and orders on a real broker: what was said is on the log, once, and signed."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from cli import console
from cli.objects import COLUMNS, Thing
from schemas.base import decode
from schemas.config import SignerSpec
from schemas.decisions import Command
from schemas.topics import DECISION_EVENTS, FLEET_CONFIG, ce_type
from streams.reader import header, read_to_end
from streams.settings import load_settings
from tests.cli.conftest import Run

FLEET = """\
kind: price
name: H100
spec: {usd_per_gpu_hour: 2.5}
---
kind: fleet
name: fleet
spec: {gpus_max: {H100: 8}}
"""


def records(topic: str) -> list[Any]:
    """Everything on a topic."""

    async def read() -> list[Any]:
        return [record async for record in read_to_end(load_settings(), topic)]

    return asyncio.run(read())


@pytest.fixture
def fleet_file(tmp_path: Path) -> Path:
    """Two objects."""
    file = tmp_path / "fleet.yaml"
    file.write_text(FLEET, encoding="utf-8")
    return file


def test_init_apply_get_and_apply_again(fleetloop: Run, on_broker: None, fleet_file: Path) -> None:
    """A deployment is made once; objects are created, then unchanged, then changed by field, and can be read back."""
    first = fleetloop("init", "--local", "--speed", "3", "--json").json
    again = fleetloop("init", "--speed", "1", "--json").json
    assert again == first
    assert (first["speed"], first["local"]) == (3.0, True)

    dry = fleetloop("apply", "-f", fleet_file, "--dry-run", "--json").json
    assert [change["what"] for change in dry] == ["created", "created"]
    assert len(records(FLEET_CONFIG)) == 1

    assert "price/H100: created" in fleetloop("apply", "-f", fleet_file).out
    sent = len(records(FLEET_CONFIG))
    assert [c["what"] for c in fleetloop("apply", "-f", fleet_file, "--json").json] == ["unchanged", "unchanged"]
    assert len(records(FLEET_CONFIG)) == sent

    fleet_file.write_text(FLEET.replace("2.5", "3"), encoding="utf-8")
    shown = fleetloop("apply", "-f", fleet_file).out
    assert "price/H100: changed" in shown
    assert "usd_per_gpu_hour: 2.5 -> 3" in shown

    held = {item["key"]: item for item in fleetloop("get", "config", "--json").json}
    assert held["price/H100"]["spec"]["usd_per_gpu_hour"] == 3.0
    assert held["price/H100"]["revision"] == 2
    assert held["fleet/fleet"]["revision"] == 1
    assert "price/H100" in fleetloop("get", "config").out


def test_init_with_a_scenario_leaves_what_somebody_has_changed(fleetloop: Run, on_broker: None, tmp_path: Path) -> None:
    """Repeating `init --scenario` (a container does at each start) resets nothing."""
    fleetloop("init", "--local", "--scenario", "demo")
    before = fleetloop("get", "config", "--json").json
    pool = next(item for item in before if item["object_kind"] == "pool")
    file = tmp_path / "pool.yaml"
    file.write_text(
        json.dumps({"kind": "pool", "name": pool["name"], "spec": {**pool["spec"], "mode": "observe"}}), "utf-8"
    )
    fleetloop("apply", "-f", file)
    fleetloop("init", "--local", "--scenario", "demo")
    after = {item["key"]: item for item in fleetloop("get", "config", "--json").json}
    assert after[pool["key"]]["spec"]["mode"] == "observe"
    assert len(after) == len(before)


@pytest.mark.parametrize("thing", Thing)
def test_get_of_a_new_deployment_is_empty_and_says_so(thing: Thing, fleetloop: Run, on_broker: None) -> None:
    """Nothing is no error: an empty list as JSON, a sentence for people."""
    fleetloop("init", "--local")
    if thing is Thing.config:
        assert len(fleetloop("get", thing.value, "--json").json) == 1
        return
    assert fleetloop("get", thing.value, "--json").json == []
    assert f"no {thing.value} yet" in fleetloop("get", thing.value).err
    assert COLUMNS[thing]


def test_an_order_is_appended_signed_and_can_be_verified(
    fleetloop: Run, on_broker: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """keygen makes a key and the signer that goes with it; approve of an unknown id is a fact on the log all the same:
    the fleet level judges it, not the command line."""
    fleetloop("init", "--local", "--speed", "10")
    key, signer = tmp_path / "key.pem", tmp_path / "signer.yaml"
    signer.write_text(fleetloop("keygen", key, "--key-id", "alice", "--role", "admin").out, encoding="utf-8")
    assert fleetloop("apply", "-f", signer, "--json").json[0]["what"] == "created"
    held = {item["key"]: item for item in fleetloop("get", "config", "--json").json}
    spec = SignerSpec.model_validate(held["signer/alice"]["spec"])
    assert spec.role == "admin"

    monkeypatch.setenv("FLEETLOOP_SIGNING_KEY_FILE", str(key))
    monkeypatch.setenv("FLEETLOOP_SIGNING_KEY_ID", "alice")
    told = fleetloop("approve", "0123456789abcdef", "-m", "agreed", "--json").json
    fleetloop("reject", "0123456789abcdef")
    fleetloop("revert", "0123456789abcdef")
    fleetloop("pause", "chat")
    fleetloop("resume", "--all")

    found = [r for r in records(DECISION_EVENTS) if header(r, "ce_type") == ce_type(Command.kind)]
    commands = [decode(Command, record.value) for record in found]
    assert [c.command for c in commands] == ["approve", "reject", "revert", "pause", "resume"]
    assert commands[0].model_dump(mode="json") == told
    assert (commands[0].decision_id, commands[0].comment) == ("0123456789abcdef", "agreed")
    assert [(c.pool, c.decision_id) for c in commands[3:]] == [("chat", None), (None, None)]
    assert [header(r, "ce_id") for r in found] == [c.id for c in commands]
    assert len({c.id for c in commands}) == 5

    from models.fleet.signatures import problem

    assert [problem(c, spec) for c in commands] == [None] * 5
    forged = commands[0].model_copy(update={"decision_id": "fedcba9876543210"})
    assert problem(forged, spec) is not None
    assert commands[0].expires_s - commands[0].issued_s == pytest.approx(1200.0)


def test_an_order_without_a_key_is_not_sent(fleetloop: Run, on_broker: None, tmp_path: Path) -> None:
    """No key named: usage; a file that is no key: input. decision.events stays as it was."""
    fleetloop("init", "--local")
    assert "--key" in fleetloop("approve", "0123456789abcdef", code=2).err
    wrong = tmp_path / "key.pem"
    wrong.write_text("nothing", encoding="utf-8")
    wrong.chmod(0o600)
    found = fleetloop("approve", "0123456789abcdef", "--key", wrong, code=console.EXIT_INPUT)
    assert "Ed25519" in found.err
    assert records(DECISION_EVENTS) == []
