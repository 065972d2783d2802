"""Settings of the views: from the environment, with errors that name variable, value and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from schemas.errors import SettingsError
from streams.settings import ELSEWHERE
from views.settings import PREFIX, ViewsSettings, load_views_settings


def test_every_setting_is_described_and_declared() -> None:
    """Each has a description, and other processes know its variable."""
    for name, field in ViewsSettings.model_fields.items():
        assert field.description
        assert ELSEWHERE[PREFIX + name.upper()] == field.description


def test_token_from_file_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token file is read without its end of line, and preferred."""
    file = tmp_path / "token"
    file.write_text("from-a-file-0123456789\n")
    monkeypatch.setenv("FLEETLOOP_VIEWS_TOKEN", "from-the-environment")
    assert load_views_settings().secret() == "from-the-environment"
    monkeypatch.setenv("FLEETLOOP_VIEWS_TOKEN_FILE", str(file))
    assert load_views_settings().secret() == "from-a-file-0123456789"


def test_no_token_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a token nobody may act."""
    monkeypatch.delenv("FLEETLOOP_VIEWS_TOKEN", raising=False)
    assert load_views_settings().secret() is None


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"token": "short"}, ("FLEETLOOP_VIEWS_TOKEN", "openssl")),
        ({"port": 0}, ("FLEETLOOP_VIEWS_PORT", "0")),
        ({"key_file": "/no/such/file"}, ("FLEETLOOP_VIEWS_KEY_FILE", "no such file")),
    ],
)
def test_errors_name_variable_and_remedy(values: dict[str, object], says: tuple[str, ...]) -> None:
    """What cannot be used is named, with what to do, and a token is never shown."""
    with pytest.raises(SettingsError) as caught:
        load_views_settings(**values)
    assert all(part in str(caught.value) for part in says)
    assert "short" not in str(caught.value)


def test_a_short_token_in_a_file_is_refused(tmp_path: Path) -> None:
    """A file with a token too short to be one is an error, not an open door."""
    file = tmp_path / "token"
    file.write_text("x\n")
    with pytest.raises(SettingsError, match="TOKEN_FILE"):
        load_views_settings(token_file=file).secret()
