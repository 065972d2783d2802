"""Options of the trace intake: where it listens, who may send, what it bounds, and how it reads spans."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SecretStr, TypeAdapter, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from exporters.conventions import CLASS_ATTRIBUTES, CLASS_MAP, REPLICA_ATTRIBUTES, TENANT_ATTRIBUTES, is_content
from exporters.edge import declare, options_of
from schemas.base import Name
from schemas.errors import SettingsError
from streams.settings import is_loopback

TOKEN_LENGTH_MIN = 16
_NAME: TypeAdapter[str] = TypeAdapter(Name)
Names = Annotated[tuple[str, ...], NoDecode]


class IntakeOptions(BaseSettings):
    """Options of the trace intake; environment FLEETLOOP_INTAKE_<NAME>."""

    model_config = SettingsConfigDict(env_prefix="FLEETLOOP_INTAKE_", frozen=True)

    host: str = Field("127.0.0.1", description="Address to listen on; beyond loopback a token or mTLS is required.")
    port: int = Field(8810, ge=0, le=65535, description="Port of HTTP; 0: any free one.")
    grpc_port: int = Field(-1, ge=-1, le=65535, description="Port of OTLP over gRPC; 0: any free one, -1: none.")
    token: SecretStr | None = Field(None, description="Bearer token that senders need; better given as a file.")
    token_file: Path | None = Field(
        None, description="File of tokens, one a line, each alone or as client=token; wins over the variable."
    )
    tls_cert_file: Path | None = Field(None, description="PEM file of this server's certificate: TLS.")
    tls_key_file: Path | None = Field(None, description="PEM file of its key.")
    tls_client_ca_file: Path | None = Field(
        None, description="PEM file of authorities: senders need a certificate of theirs (mTLS)."
    )
    source: Name = Field("intake", description="Name of this intake in the batches that it sends.")
    body_bytes_max: int = Field(
        4 * 1024 * 1024, ge=1024, le=64 * 1024 * 1024, description="Longest body, bytes, when decompressed; more: 413."
    )
    rows_max: int = Field(50_000, ge=1, le=100_000, description="Most rows or spans of one body; more: 413.")
    rows_per_s_max: float = Field(
        0.0,
        ge=0,
        le=1e9,
        description="Rows a second that one client (its token, certificate or address) may send on "
        "average; more: 429. 0: no limit.",
    )
    clients_max: int = Field(
        1024, ge=1, le=1_000_000, description="Clients whose rate is watched apart; the others share one."
    )
    body_timeout_s: float = Field(10.0, gt=0, le=600, description="Time that a sender has for its body, s.")
    coalesce_s: float = Field(0.05, ge=0, le=5, description="Rows gathered for so long before they are sent, s.")
    ack_timeout_s: float = Field(
        8.0, gt=0, le=600, description="Time that the broker has to acknowledge before the sender gets 503, s."
    )
    requests_max: int = Field(32, ge=1, le=10_000, description="Bodies read and decoded at once; more get 429.")
    retry_after_s: int = Field(1, ge=1, le=3600, description="Retry-After of a 429 or 503, s.")
    letters_per_min_max: int = Field(
        600, ge=0, le=1_000_000, description="Dead letters written per minute for refused spans; the rest are counted."
    )
    tenant_attributes: Names = Field(
        TENANT_ATTRIBUTES, description="Attributes of span or resource that name the tenant; the first one there is."
    )
    tenant_headers: Names = Field(
        ("x-fleetloop-tenant", "x-scope-orgid"),
        description="Headers of the sender's request (HTTP, gRPC) that name the tenant of what says none itself.",
    )
    default_tenant: str = Field("unknown", min_length=1, max_length=200, description="Tenant of requests without one.")
    class_attributes: Names = Field(
        CLASS_ATTRIBUTES, description="Attributes that name the class (interactive, batch, quality) or tier."
    )
    class_headers: Names = Field(
        ("x-fleetloop-class",), description="Headers of the sender's request that name the class."
    )
    class_map: Names = Field(
        CLASS_MAP, description="value=class of what class attributes say; an empty class: says nothing."
    )
    infer_class: bool = Field(
        True, description="A request without class that does not stream and allows many tokens is `batch`."
    )
    batch_tokens_min: int = Field(2048, ge=1, le=100_000_000, description="How many tokens are many there.")
    pools: Names = Field((), description="model=pool or service=pool, in order of model served, asked for, service.")
    default_pool: Name | None = Field(
        None, description="Pool of the others. None: the name of the model, or of the service, is the pool's."
    )
    replica_attributes: Names = Field(
        REPLICA_ATTRIBUTES, description="Attributes of an engine's span or resource that name the replica."
    )
    engine_services: Names = Field(
        (), description="service.name of those whose spans are an engine's; vLLM's are known without."
    )
    tail_dir: Path | None = Field(None, description="Folder of SGLang's request export files, followed as they grow.")
    tail_state_file: Path | None = Field(
        None, description="Where the read positions are kept. Default: `.fleetloop-tail.json` in that folder."
    )
    tail_pool: Name | None = Field(None, description="Pool of the requests in those files.")
    tail_replica: Name | None = Field(None, description="Replica that wrote them.")
    health_port: int = Field(0, ge=-1, le=65535, description="Port of /healthz, /readyz, /metrics; 0: none, -1: any.")

    @field_validator(
        "tenant_attributes",
        "tenant_headers",
        "class_attributes",
        "class_headers",
        "class_map",
        "pools",
        "replica_attributes",
        "engine_services",
        mode="before",
    )
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(i.strip() for i in value.split(",") if i.strip()) if isinstance(value, str) else value

    @field_validator("tenant_attributes", "class_attributes", "replica_attributes")
    @classmethod
    def _no_content(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if is_content(name):
                raise ValueError(f"{name} holds what a user wrote or was answered, which is never read")
        return value

    @field_validator("tail_dir")
    @classmethod
    def _folder(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_dir():
            raise ValueError("no such folder")
        return value

    @field_validator("tenant_headers", "class_headers")
    @classmethod
    def _lower(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name.lower() for name in value)

    @field_validator("class_map")
    @classmethod
    def _classes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        pairs(value)
        return value

    @field_validator("pools")
    @classmethod
    def _pools(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pool in pairs(value).values():
            try:
                _NAME.validate_python(pool)
            except ValidationError:
                raise ValueError(f"{pool!r} is no name of a pool") from None
        return value

    @classmethod
    def of(cls, **given: Any) -> IntakeOptions:
        """From arguments (None: not given), then the environment. Raises SettingsError."""
        return options_of(cls, given)

    def tokens(self) -> dict[str, str]:
        """Token -> name of its client; empty where none is needed. Raises SettingsError."""
        lines = [self.token.get_secret_value()] if self.token is not None else []
        if self.token_file is not None:
            try:
                lines = self.token_file.read_text(encoding="utf-8").split("\n")
            except (OSError, UnicodeDecodeError) as error:
                raise SettingsError(f"FLEETLOOP_INTAKE_TOKEN_FILE: {self.token_file}: {error}") from None
        found: dict[str, str] = {}
        for number, line in enumerate(line.strip() for line in lines if line.strip()):
            name, named, token = line.partition("=")
            token, name = (token, name) if named and token.strip("=") else (line, f"token-{number}")
            if len(token) < TOKEN_LENGTH_MIN:
                raise SettingsError(f"FLEETLOOP_INTAKE_TOKEN: needs at least {TOKEN_LENGTH_MIN} characters")
            found[token] = name
        asked = self.token is not None or self.token_file is not None
        if asked and not found:
            raise SettingsError("FLEETLOOP_INTAKE_TOKEN_FILE: holds no token: write one a line, or do not name it")
        if not found and not self.tls_client_ca_file and not is_loopback(self.host):
            raise SettingsError(
                f"FLEETLOOP_INTAKE_TOKEN: none, and {self.host} can be reached from elsewhere: set a token "
                "(`openssl rand -hex 24` makes one), ask for certificates (FLEETLOOP_INTAKE_TLS_CLIENT_CA_FILE), or "
                "listen on 127.0.0.1"
            )
        return found

    def tls(self) -> ssl.SSLContext | None:
        """TLS as the server speaks it; None: plain. Raises SettingsError."""
        if self.tls_cert_file is None or self.tls_key_file is None:
            if self.tls_cert_file or self.tls_key_file or self.tls_client_ca_file:
                raise SettingsError("FLEETLOOP_INTAKE_TLS_CERT_FILE: TLS needs it and FLEETLOOP_INTAKE_TLS_KEY_FILE")
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.tls_cert_file, self.tls_key_file, password="")
            if self.tls_client_ca_file is not None:
                context.load_verify_locations(self.tls_client_ca_file)
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ValueError) as error:
            raise SettingsError(f"FLEETLOOP_INTAKE_TLS_CERT_FILE, _KEY_FILE, _CLIENT_CA_FILE: {error}") from None
        return context


declare(IntakeOptions)


def pairs(items: tuple[str, ...]) -> dict[str, str]:
    """`a=b` items as a mapping. Raises ValueError."""
    found = {}
    for item in items:
        left, equals, right = item.rpartition("=")
        if not equals or not left:
            raise ValueError(f"{item!r}: write name=name, separated by commas")
        found[left.strip()] = right.strip()
    return found
