"""Settings of a process: where it connects, and its bounds. Nothing of what is computed (that comes by `fleet.config`).

Read from the environment (`FLEETLOOP_<NAME>`) and from a YAML file named by `FLEETLOOP_SETTINGS_FILE`
or by argument; the environment wins.
"""

from __future__ import annotations

import ipaddress
import os
import ssl
import warnings
from pathlib import Path
from typing import Any, Literal

import yaml
from aiokafka.helpers import create_ssl_context
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from schemas.errors import SettingsError

PREFIX = "FLEETLOOP_"
SETTINGS_FILE = PREFIX + "SETTINGS_FILE"
ELSEWHERE = {
    SETTINGS_FILE: "YAML file with settings by name in lower case; the environment wins over it.",
    PREFIX + "DATA": "Folder with real traces, for tests and benchmarks that use them.",
    PREFIX + "PARENT_PID": "Set by the supervisor for its children, which end with it. Not for you to set.",
    PREFIX + "LONG_TESTS": "1 runs the long forms of the broker tests as well.",
    PREFIX + "REQUIRE_BROKER": "1 (the default of `make test`): a broker test that would be skipped fails.",
    PREFIX + "SPEED": "docker-compose.yml alone: the deployment's speed.",
}
"""Variables with our prefix that are no field of `Settings`; other packages add theirs by `declare_variable`."""

OTHER_PROCESSES = (
    "ENGINES_",
    "EXECUTOR_",
    "INTAKE_",
    "NVML_",
    "SIGNING_",
    "SIMULATOR_",
    "TRACE_",
    "VIEWS_",
    "WEBHOOK_",
)
"""How variables begin, after our prefix, that packages above this one declare: in an environment that processes share,
a process meets those of packages that it never loads.
"""

HEALTH_PORT_OFFSET = {"node": 0, "requests": 1, "pool": 2, "fleet": 3, "config": 4}
MIB = 1024 * 1024


def _state_dir() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "fleetloop"


class Settings(BaseSettings):
    """Where a process connects and its bounds. Use `load_settings` to make one: it explains what is wrong."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    # Where
    bootstrap_servers: str = Field(
        "127.0.0.1:9092", min_length=1, description="Kafka brokers, host:port, separated by commas."
    )
    topic_prefix: str = Field(
        "",
        pattern=r"^[A-Za-z0-9._-]*$",
        max_length=100,
        description="Before every topic's and group's name, so that deployments can share a cluster.",
    )
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="How brokers are spoken to."
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        "SCRAM-SHA-512", description="SASL mechanism, where security_protocol begins with SASL."
    )
    sasl_username: str = Field("", description="SASL user.")
    sasl_password: SecretStr = Field(SecretStr(""), description="SASL password; better given as a file.")
    sasl_password_file: Path | None = Field(None, description="File that holds the SASL password.")
    ssl_ca_file: Path | None = Field(None, description="PEM file of the authorities that sign the brokers.")
    ssl_cert_file: Path | None = Field(None, description="PEM file of this client's certificate.")
    ssl_key_file: Path | None = Field(None, description="PEM file of this client's key.")
    state_dir: Path = Field(
        default_factory=_state_dir, description="Where a process may keep files (local broker, caches)."
    )

    # Topics
    topic_replication_factor: int = Field(
        0, ge=0, le=15, description="Replicas of topics that we create; 0: three, or one per broker where fewer."
    )

    # Workers
    checkpoint_interval_s: float = Field(
        10.0, gt=0, le=600, description="Wall time between two checkpoints of a partition."
    )
    checkpoint_chunk_bytes: int = Field(
        4 * MIB, ge=1024, le=7 * MIB, description="A compressed dump larger than this is cut into chunks."
    )
    coalesce_bytes: int = Field(
        MIB,
        ge=1024,
        le=64 * MIB,
        description="Records of a partition handed to a fold at once: bytes at most.",
    )
    coalesce_records: int = Field(
        200, ge=1, le=10_000, description="Records of a partition handed to a fold at once: number at most."
    )
    channel_size: int = Field(
        8, ge=1, le=256, description="Coalesced batches waiting before the fetching of a partition pauses."
    )
    tick_silence_s: float = Field(
        1.0,
        gt=0,
        le=60,
        description="Log time without a record after which a partition read to its end gets a tick "
        "(never oftener than every 0.1 s of wall time).",
    )
    session_timeout_s: float = Field(
        10.0,
        ge=1,
        le=300,
        description="A worker silent for this long loses its partitions; brokers allow 6 s and more by default.",
    )
    rebalance_timeout_s: float = Field(30.0, ge=1, le=600, description="Time that members have to join a rebalance.")
    fold_errors_per_hour_max: int = Field(
        10,
        ge=0,
        le=10_000,
        description="More exceptions of a fold per partition and hour stop that partition.",
    )
    restore_timeout_s: float = Field(
        60.0,
        gt=0,
        le=3600,
        description="The watchdog ends a process assigned but not restored for this long.",
    )
    stall_timeout_s: float = Field(
        30.0,
        gt=0,
        le=3600,
        description="The watchdog ends a process whose loop, or whose progress, stalls so long.",
    )
    lag_ready_max: int = Field(
        10_000, ge=0, description="/readyz says no while a partition is more records behind than this."
    )
    stop_timeout_s: float = Field(
        20.0, gt=0, le=600, description="Time from SIGTERM until a worker that has not ended is killed."
    )

    # Producers and consumers
    producer_linger_ms: int = Field(2, ge=0, le=1000, description="Wait for more records before sending a batch.")
    edge_linger_ms: int = Field(5, ge=0, le=5000, description="The same, for exporters, intakes and executors.")
    edge_buffer_bytes: int = Field(
        64 * MIB,
        ge=1024 * 64,
        description="Records that an exporter, intake or executor holds through an outage; the oldest are dropped "
        "and counted beyond it.",
    )
    fetch_max_wait_ms: int = Field(
        50, ge=1, le=5000, description="How long a broker may hold back a fetch that has nothing to give."
    )

    # What people and machines see of a process
    web_host: str = Field("127.0.0.1", description="Address that health, metrics and pages listen on.")
    health_port: int = Field(
        9464,
        ge=0,
        le=65_000,
        description="Port of /healthz, /readyz and /metrics: this one for node, then +1 requests, +2 pool, +3 fleet, "
        "+4 config; 0: none.",
    )
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="auto: console on a terminal, JSON otherwise."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Least level logged.")

    @field_validator("bootstrap_servers")
    @classmethod
    def _servers(cls, value: str) -> str:
        for server in value.split(","):
            host, colon, port = server.strip().rpartition(":")
            if not (colon and host and port.isdigit() and 0 < int(port) < 65536):
                raise ValueError(f"{server.strip()!r} is not host:port; write e.g. 127.0.0.1:9092")
        return ",".join(s.strip() for s in value.split(","))

    @model_validator(mode="after")
    def _security(self) -> Settings:
        if self.security_protocol.startswith("SASL") and not (self.sasl_username and self.password()):
            raise ValueError(
                f"security_protocol {self.security_protocol} needs {PREFIX}SASL_USERNAME and "
                f"{PREFIX}SASL_PASSWORD or {PREFIX}SASL_PASSWORD_FILE"
            )
        for name in ("sasl_password_file", "ssl_ca_file", "ssl_cert_file", "ssl_key_file"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise ValueError(f"{PREFIX}{name.upper()}: {path} is no readable file")
        return self

    def password(self) -> str:
        """The SASL password, from its file where one is named."""
        if self.sasl_password_file is not None and self.sasl_password_file.is_file():
            return self.sasl_password_file.read_text(encoding="utf-8").strip()
        return self.sasl_password.get_secret_value()

    def ssl_context(self) -> ssl.SSLContext | None:
        """TLS for the brokers, or None where the protocol has none."""
        if "SSL" not in self.security_protocol:
            return None
        files = [self.ssl_ca_file, self.ssl_cert_file, self.ssl_key_file]
        try:
            # An empty password, because without one OpenSSL would ask the terminal for that of an encrypted key.
            return create_ssl_context(cafile=files[0], certfile=files[1], keyfile=files[2], password="")
        except OSError as error:  # of which ssl.SSLError is one
            names = ", ".join(str(file) for file in files if file is not None)
            raise SettingsError(
                f"{PREFIX}SSL_CA_FILE, {PREFIX}SSL_CERT_FILE, {PREFIX}SSL_KEY_FILE: {names}: {error}: name readable "
                "PEM files that belong together, with a key that is not encrypted"
            ) from error

    def topic(self, name: str) -> str:
        """Full name of a topic of the registry."""
        return self.topic_prefix + name

    def group(self, level: str) -> str:
        """Consumer group of a level."""
        return f"{self.topic_prefix}fleetloop.{level}"

    def health_port_of(self, level: str) -> int:
        """Port of a level's health server, 0 for none."""
        return self.health_port and self.health_port + HEALTH_PORT_OFFSET[level]


def declare_variable(name: str, description: str) -> None:
    """Names an environment variable of another package, so that it is neither warned about nor undocumented."""
    ELSEWHERE[name] = description


def load_settings(file: Path | str | None = None, **overrides: Any) -> Settings:
    """Settings from overrides, then the environment, then the YAML file. Raises SettingsError.

    The error names each field as its environment variable, the value and the remedy.
    """
    path = file or os.environ.get(SETTINGS_FILE)
    if path is not None and not Path(path).is_file():
        raise SettingsError(f"{SETTINGS_FILE}: {str(path)!r}: no such file; name an existing YAML file or unset it")

    class Loaded(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            if path is None:
                return init_settings, env_settings
            return init_settings, env_settings, YamlConfigSettingsSource(settings_cls, yaml_file=path)

    known = {PREFIX + name.upper() for name in Settings.model_fields} | set(ELSEWHERE)
    # Where their package is loaded, these are known by their whole names.
    others = tuple(
        p for p in (PREFIX + o for o in OTHER_PROCESSES) if not any(name.startswith(p) for name in ELSEWHERE)
    )
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known and not name.startswith(others):
            warnings.warn(f"{name} is no setting of Fleetloop and has no effect", stacklevel=2)
    try:
        return Loaded(**overrides)
    except ValidationError as error:
        raise SettingsError(_explain(error)) from None
    except yaml.YAMLError as error:
        raise SettingsError(f"{SETTINGS_FILE}: {str(path)!r}: not YAML: {error}") from None


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        name = str(item["loc"][0]) if item["loc"] else ""
        field = Settings.model_fields.get(name)
        if field is None and item["type"] == "extra_forbidden":
            lines.append(f"{name}: no such setting: remove it or mend its name")
        elif field is None:
            lines.append(item["msg"].removeprefix("Value error, "))
        else:
            shown = "***" if field.annotation is SecretStr else repr(item["input"])
            remedy = item["msg"].removeprefix("Value error, ")
            lines.append(f"{PREFIX}{name.upper()}: {shown}: {remedy}. {field.description}")
    return "; ".join(lines)


def settings_table() -> list[tuple[str, str, str]]:
    """(variable, default, description) of every setting, for the documentation."""
    rows = []
    for name, field in Settings.model_fields.items():
        default = "" if field.default_factory is not None or field.default is None else field.default
        if isinstance(default, SecretStr):
            default = ""
        rows.append((PREFIX + name.upper(), str(default), field.description or ""))
    return rows + [(name, "", text) for name, text in ELSEWHERE.items()]


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
