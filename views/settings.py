"""Settings of the views service: FLEETLOOP_VIEWS_*. Where it connects and listens comes from `streams.settings`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from schemas.errors import SettingsError
from streams.settings import declare_variable

PREFIX = "FLEETLOOP_VIEWS_"
TOKEN_LENGTH_MIN = 16


class ViewsSettings(BaseSettings):
    """What the page serves, and who may act through it."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", frozen=True)

    port: int = Field(6066, ge=1, le=65535, description="Port of the page, its JSON and metrics.")
    token: SecretStr | None = Field(
        None, description="Bearer token for approve, reject, revert, pause, resume; better given as a file."
    )
    token_file: Path | None = Field(None, description="File that holds the token. Without a token actions are refused.")
    key_file: Path | None = Field(
        None,
        description="Ed25519 private key that signs commands (`fleetloop keygen`). Without it actions are refused.",
    )
    key_id: str = Field("views", min_length=1, max_length=200, description="Signer object with that key's public half.")
    allowed_hosts: list[str] = Field(
        [],
        description="Host names (JSON list) by which the page may be asked for, beside loopback ones; `*`: any. "
        "Checked by a listener on loopback, so that a foreign web page cannot read through a name of its own, and "
        "by any other where they are given.",
    )
    rows_max: int = Field(50_000, ge=1, description="Rows per table; further keys are counted and left out.")
    decisions_max: int = Field(1_000, ge=1, description="Decisions kept; the oldest that have ended go first.")
    history_s: int = Field(3600, ge=60, le=86_400, description="Log time that charts reach back, s.")
    start_records_max: int = Field(
        50_000, ge=100, description="At start, at most so many of a partition's newest records are read."
    )

    @field_validator("token", mode="after")
    @classmethod
    def _long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value.get_secret_value()) < TOKEN_LENGTH_MIN:
            raise ValueError(f"needs at least {TOKEN_LENGTH_MIN} characters: `openssl rand -hex 24` makes one")
        return value

    @field_validator("token_file", "key_file", mode="after")
    @classmethod
    def _readable(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_file():
            raise ValueError("no such file: name a readable one")
        return value

    def secret(self) -> str | None:
        """The token, from its file where one is named. Raises SettingsError for one too short."""
        if self.token_file is None:
            return self.token.get_secret_value() if self.token is not None else None
        text = self.token_file.read_text(encoding="utf-8").strip()
        if len(text) < TOKEN_LENGTH_MIN:
            raise SettingsError(f"{PREFIX}TOKEN_FILE: {self.token_file}: needs at least {TOKEN_LENGTH_MIN} characters")
        return text


for _name, _field in ViewsSettings.model_fields.items():
    declare_variable(PREFIX + _name.upper(), _field.description or "")


def load_views_settings(**overrides: Any) -> ViewsSettings:
    """Settings from overrides, then the environment. Raises SettingsError that names variable, value and remedy."""
    try:
        return ViewsSettings(**overrides)
    except ValidationError as error:
        lines = []
        for item in error.errors(include_url=False):
            name = str(item["loc"][0])
            shown = "***" if name == "token" else repr(item["input"])
            remedy = item["msg"].removeprefix("Value error, ")
            lines.append(f"{PREFIX}{name.upper()}: {shown}: {remedy}. {ViewsSettings.model_fields[name].description}")
        raise SettingsError("; ".join(lines)) from None
