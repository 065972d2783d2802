"""Kafka clients from settings: the one place that knows how we connect."""

from __future__ import annotations

import ssl
from typing import Any

import faust
from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.conn import collect_hosts, create_conn
from aiokafka.errors import KafkaConnectionError, KafkaError, SaslAuthenticationFailed, UnsupportedSaslMechanismError
from aiokafka.partitioner import murmur2
from faust.auth import SASLCredentials, SSLCredentials

from schemas.errors import UnavailableError
from streams.settings import PREFIX, Settings

REQUEST_TIMEOUT_MS = 10_000
"""Of clients without a group. One that joins a group must wait longer: a join is answered when all have joined."""
PROBE_TIMEOUT_MS = 3_000
REMEDIES: tuple[tuple[type[Exception], str], ...] = (
    (
        ssl.SSLCertVerificationError,
        f"name the authority that signed the broker's certificate in {PREFIX}SSL_CA_FILE, and the broker as the "
        "certificate does",
    ),
    (SaslAuthenticationFailed, f"mend {PREFIX}SASL_USERNAME, {PREFIX}SASL_PASSWORD_FILE or {PREFIX}SASL_MECHANISM"),
    (UnsupportedSaslMechanismError, f"choose one that the broker offers in {PREFIX}SASL_MECHANISM"),
    (ConnectionRefusedError, "start a broker (`fleetloop broker`) or name one that can be reached"),
)
"""Why a broker cannot be spoken to -> what to do."""
OTHERWISE = (
    f"name a broker that can be reached, in {PREFIX}SECURITY_PROTOCOL the way that it is spoken to, and in "
    f"{PREFIX}SSL_CERT_FILE and {PREFIX}SSL_KEY_FILE a certificate where it asks for one"
)


def client_options(settings: Settings) -> dict[str, Any]:
    """Keyword arguments with which every aiokafka client connects."""
    options: dict[str, Any] = {
        "bootstrap_servers": settings.bootstrap_servers,
        "security_protocol": settings.security_protocol,
        "ssl_context": settings.ssl_context(),
    }
    if settings.security_protocol.startswith("SASL"):
        options |= {
            "sasl_mechanism": settings.sasl_mechanism,
            "sasl_plain_username": settings.sasl_username,
            "sasl_plain_password": settings.password(),
        }
    return options


def faust_credentials(settings: Settings) -> faust.auth.Credentials | None:
    """The same for Faust."""
    context = settings.ssl_context()
    if settings.security_protocol.startswith("SASL"):
        return SASLCredentials(
            username=settings.sasl_username,
            password=settings.password(),
            ssl_context=context,
            mechanism=settings.sasl_mechanism,
        )
    return SSLCredentials(context) if context else None


def faust_brokers(settings: Settings) -> str:
    """Bootstrap servers as Faust's broker URL."""
    return ";".join("kafka://" + server for server in settings.bootstrap_servers.split(","))


def plain_consumer(settings: Settings, **options: Any) -> AIOKafkaConsumer:
    """A consumer without a group that reads what it is assigned, oldest first."""
    defaults: dict[str, Any] = {
        "enable_auto_commit": False,
        "auto_offset_reset": "earliest",
        "fetch_max_wait_ms": settings.fetch_max_wait_ms,
        "request_timeout_ms": REQUEST_TIMEOUT_MS,
        "max_partition_fetch_bytes": 4 * 1024 * 1024,
    }
    return AIOKafkaConsumer(**client_options(settings), **(defaults | options))


def admin_client(settings: Settings) -> AIOKafkaAdminClient:
    """An admin client."""
    return AIOKafkaAdminClient(**client_options(settings), request_timeout_ms=REQUEST_TIMEOUT_MS)


async def unreachable(settings: Settings, error: Exception) -> UnavailableError:
    """What to raise where a client could not be started or used: address, reason and remedy.

    Why it could not connect aiokafka tells its log alone; so the first broker is asked once more.
    """
    reason = await _refusal(settings) if isinstance(error, KafkaConnectionError) else None
    why = str(error) if reason is None else str(reason) or "no answer"
    remedy = next((text for kind, text in REMEDIES if isinstance(reason, kind)), OTHERWISE)
    return UnavailableError(f"{PREFIX}BOOTSTRAP_SERVERS: {settings.bootstrap_servers!r}: {why}: {remedy}")


async def _refusal(settings: Settings) -> Exception | None:
    options = client_options(settings)
    host, port, _ = collect_hosts(options.pop("bootstrap_servers"), randomize=False)[0]
    try:
        connection = await create_conn(host, port, request_timeout_ms=PROBE_TIMEOUT_MS, **options)
    except (KafkaError, OSError) as reason:
        return reason
    await connection.close()
    return None


def partition_of(key: bytes, partitions: int) -> int:
    """The partition that Kafka's default partitioner gives a key (murmur2, as the Java client and aiokafka do)."""
    return (murmur2(key) & 0x7FFFFFFF) % partitions
