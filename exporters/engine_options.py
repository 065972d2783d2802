"""Options of the engine exporter."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from exporters.edge import declare, options_of
from exporters.targets import Rules, checked_url, parse_target
from schemas.base import Name

List = Annotated[list[str], NoDecode]
_SOURCES = ("targets", "file_sd", "http_sd", "kubernetes_selector")


class EngineOptions(BaseSettings):
    """Options of the engine exporter; environment FLEETLOOP_ENGINES_<NAME>."""

    model_config = SettingsConfigDict(env_prefix="FLEETLOOP_ENGINES_", frozen=True)

    # What is scraped
    targets: List = Field(
        default_factory=list,
        max_length=1024,
        description="replica=http://host:port/metrics, then perhaps ;pool=..;node=..;model=..;engine=..;gpus=..;"
        "gpu_type=.., separated by commas. dns+http:// is every address of the host, srv+http:// every record.",
    )
    file_sd: List = Field(
        default_factory=list, max_length=64, description="Files of Prometheus target groups (JSON, YAML); * allowed."
    )
    http_sd: List = Field(
        default_factory=list, max_length=64, description="URLs that answer with Prometheus target groups (JSON)."
    )
    kubernetes_selector: str = Field("", max_length=1000, description="Label selector of pods; empty: none.")
    kubernetes_namespaces: List = Field(default_factory=list, max_length=64, description="Empty: all namespaces.")
    kubernetes_port: str = Field(
        "",
        max_length=63,
        description="Port of a pod, by name or number. Empty: annotation prometheus.io/port, else the port metrics, "
        "else http, else its first.",
    )
    kubernetes_config: Path | None = Field(
        None, description="kubeconfig file, its current context. Default: as the service account of this pod."
    )
    labels: List = Field(
        default_factory=list,
        max_length=64,
        description="field=label, before the usual ones: which label of a discovered target says its replica, pool, "
        "node, model, engine, gpus, gpu_type.",
    )
    targets_max: int = Field(1024, ge=1, le=16_384, description="Targets that are scraped; those beyond are counted.")
    refresh_s: float = Field(
        10.0, ge=0.1, le=3600, description="Time between two looks at DNS, http_sd and Kubernetes, s (files: 1 s)."
    )
    node: Name | None = Field(
        None, description="Node of targets that name none. Default: this host's name for those on it, else unknown."
    )
    engines: Literal["together", "apart"] = Field(
        "together",
        description="Several engines behind one port: together as one replica, or apart as `replica:engine`.",
    )
    inventory: Literal["none", "targets"] = Field(
        "none",
        description="targets: say who is on a node from the targets, where no NVML exporter runs on the nodes.",
    )
    cluster: Name = Field("local", description="Cluster of those nodes.")

    # How
    period_s: float = Field(1.0, ge=0.1, le=60, description="Time between two scrapes of a target, s.")
    timeout_s: float = Field(1.0, ge=0.05, le=60, description="Time that a target has to answer, s.")
    dead_after_s: float = Field(2.0, ge=0, le=600, description="Without an answer for so long a target is dead, s.")
    histogram_s: float = Field(5.0, ge=0.1, le=600, description="Time between two readings of distributions, s.")
    verify_s: float = Field(
        60.0, ge=1, le=3600, description="Time between two comparisons of a page with the full parser, s."
    )
    bytes_max: int = Field(
        4 * 1024 * 1024,
        ge=1024,
        le=64 * 1024 * 1024,
        description="Longest page taken from a target, bytes when decompressed.",
    )
    series_max: int = Field(10_000, ge=10, le=1_000_000, description="Most series of a page.")
    line_bytes_max: int = Field(16_384, ge=256, le=1024 * 1024, description="Longest line of a page, bytes.")
    username: str = Field("", max_length=200, description="User that targets are shown (with password_file).")
    password_file: Path | None = Field(None, description="File that holds that user's password.")
    token_file: Path | None = Field(None, description="File that holds a bearer token that targets are shown.")
    ca_file: Path | None = Field(None, description="PEM file of the authorities that sign https targets and http_sd.")
    cert_file: Path | None = Field(None, description="PEM file of the certificate that targets are shown.")
    key_file: Path | None = Field(None, description="PEM file of that certificate's key.")
    health_port: int = Field(0, ge=-1, le=65535, description="Port of /healthz, /readyz, /metrics; 0: none, -1: any.")

    @field_validator("targets", "file_sd", "http_sd", "kubernetes_namespaces", "labels", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value

    @field_validator("targets")
    @classmethod
    def _valid(cls, value: list[str]) -> list[str]:
        names = Counter(parse_target(item).replica for item in value)
        if names and names.most_common(1)[0][1] > 1:
            raise ValueError(f"every replica may be named once, {names.most_common(1)[0][0]} is twice")
        return value

    @field_validator("http_sd")
    @classmethod
    def _urls(cls, value: list[str]) -> list[str]:
        for url in value:
            checked_url(url)
        return value

    @field_validator("labels")
    @classmethod
    def _rules(cls, value: list[str]) -> list[str]:
        Rules(value)
        return value

    @model_validator(mode="after")
    def _whole(self) -> EngineOptions:
        if not any(getattr(self, name) for name in _SOURCES):
            raise ValueError(
                "FLEETLOOP_ENGINES_TARGETS: nothing to scrape: write replica=http://host:port/metrics, or set "
                + ", ".join(f"FLEETLOOP_ENGINES_{name.upper()}" for name in _SOURCES[1:])
            )
        if bool(self.username) != (self.password_file is not None):
            raise ValueError("FLEETLOOP_ENGINES_USERNAME and FLEETLOOP_ENGINES_PASSWORD_FILE go together")
        if self.token_file is not None and self.username:
            raise ValueError("FLEETLOOP_ENGINES_TOKEN_FILE and FLEETLOOP_ENGINES_USERNAME exclude each other")
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("FLEETLOOP_ENGINES_CERT_FILE and FLEETLOOP_ENGINES_KEY_FILE go together")
        return self

    @classmethod
    def of(cls, **given: Any) -> EngineOptions:
        """From arguments (None: not given), then the environment. Raises SettingsError."""
        return options_of(cls, given)


declare(EngineOptions)
