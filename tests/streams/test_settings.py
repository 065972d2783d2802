"""Settings: where they come from, and errors that tell what to do."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli import collect
from schemas.errors import SettingsError
from streams.settings import (
    ELSEWHERE,
    OTHER_PROCESSES,
    PREFIX,
    SETTINGS_FILE,
    Settings,
    load_settings,
    settings_table,
)


def test_environment_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A field of the YAML file counts unless the environment or an argument names it."""
    file = tmp_path / "fleetloop.yaml"
    file.write_text("topic_prefix: file-\ncoalesce_records: 7\nchannel_size: 3\n")
    monkeypatch.setenv("FLEETLOOP_SETTINGS_FILE", str(file))
    monkeypatch.setenv("FLEETLOOP_TOPIC_PREFIX", "env-")
    settings = load_settings(channel_size=4)
    assert (settings.topic_prefix, settings.coalesce_records, settings.channel_size) == ("env-", 7, 4)
    assert settings.topic("findings") == "env-findings"
    assert settings.group("node") == "env-fleetloop.node"


@pytest.mark.parametrize(
    ("variable", "value", "shown"),
    [
        ("FLEETLOOP_COALESCE_BYTES", "many", "'many'"),
        ("FLEETLOOP_BOOTSTRAP_SERVERS", "kafka", "write e.g. 127.0.0.1:9092"),
        ("FLEETLOOP_BOOTSTRAP_SERVERS", "kafka:99999", "kafka:99999"),
        ("FLEETLOOP_TOPIC_PREFIX", "a b", "'a b'"),
        ("FLEETLOOP_SECURITY_PROTOCOL", "TLS", "SASL_SSL"),
        ("FLEETLOOP_CHECKPOINT_INTERVAL_S", "0", "greater than 0"),
        ("FLEETLOOP_SSL_CA_FILE", "/nowhere/ca.pem", "/nowhere/ca.pem"),
    ],
)
def test_errors_name_variable_value_and_remedy(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, shown: str
) -> None:
    """What is wrong is said with the variable to change and what it would take."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert variable in str(caught.value)
    assert shown in str(caught.value)


def test_sasl_needs_user_and_password(tmp_path: Path) -> None:
    """SASL without credentials is refused; a password file serves, and is not shown."""
    with pytest.raises(SettingsError, match="FLEETLOOP_SASL_USERNAME"):
        load_settings(security_protocol="SASL_PLAINTEXT")
    secret = tmp_path / "password"
    secret.write_text("s3cret\n")
    settings = load_settings(security_protocol="SASL_PLAINTEXT", sasl_username="me", sasl_password_file=secret)
    assert settings.password() == "s3cret"
    assert "s3cret" not in repr(load_settings(sasl_password="s3cret"))


def test_a_shared_environment_is_no_reason_to_warn() -> None:
    """A process that loads no other package knows every variable of the reference, and still finds a slip.

    The names are those that all packages declare: one whose beginning is missing from OTHER_PROCESSES fails here.
    """
    classes = collect.settings_classes()
    names = set(ELSEWHERE)
    for cls in classes:
        names |= {cls.model_config["env_prefix"] + name.upper() for name in cls.model_fields}
    assert [p for p in OTHER_PROCESSES if not any(name.startswith(PREFIX + p) for name in names)] == []
    own = {PREFIX + name.upper() for name in Settings.model_fields} | {SETTINGS_FILE}
    shared = dict.fromkeys(sorted(names - own), "x")
    for extra, status in ({}, 0), ({"FLEETLOOP_VIEWSTOKEN": "x"}, 1), ({"FLEETLOOP_TOPIC_PREFX": "x"}, 1):
        found = subprocess.run(
            [sys.executable, "-W", "error", "-c", "from streams.settings import load_settings as l; l()"],
            env={**os.environ, **shared, **extra},
            cwd=collect.ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert found.returncode == status, found.stderr
        assert all(name in found.stderr for name in extra)


def test_a_slip_in_a_loaded_package_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the views are loaded, their variables are known by their whole names."""
    importlib.import_module("views.settings")
    monkeypatch.setenv("FLEETLOOP_VIEWS_TOKEN", "x")
    load_settings()
    monkeypatch.setenv("FLEETLOOP_VIEWS_TOKN", "x")
    with pytest.warns(UserWarning, match="FLEETLOOP_VIEWS_TOKN "):
        load_settings()


def test_unknown_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped variable is warned about, a mistyped field of the file is an error, a missing file too."""
    monkeypatch.setenv("FLEETLOOP_TOPIC_PREFX", "x")
    with pytest.warns(UserWarning, match="FLEETLOOP_TOPIC_PREFX"):
        load_settings()
    monkeypatch.delenv("FLEETLOOP_TOPIC_PREFX")
    file = tmp_path / "s.yaml"
    file.write_text("topic_prefx: x\n")
    with pytest.raises(SettingsError, match="topic_prefx"):
        load_settings(file)
    file.write_text("a: [")
    with pytest.raises(SettingsError, match="not YAML"):
        load_settings(file)
    with pytest.raises(SettingsError, match="no such file"):
        load_settings(tmp_path / "none.yaml")


def test_every_setting_is_described() -> None:
    """The table for the documentation has every field, with words."""
    rows = settings_table()
    assert {name for name, _, _ in rows} == {f"FLEETLOOP_{n.upper()}" for n in Settings.model_fields} | set(ELSEWHERE)
    assert all(text for _, _, text in rows)
