"""Kafka clients from settings: the one place that knows how we connect."""

from __future__ import annotations

from typing import Any

import faust
from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.partitioner import murmur2
from faust.auth import SASLCredentials, SSLCredentials

from streams.settings import Settings


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
        "max_partition_fetch_bytes": 4 * 1024 * 1024,
    }
    return AIOKafkaConsumer(**client_options(settings), **(defaults | options))


def admin_client(settings: Settings) -> AIOKafkaAdminClient:
    """An admin client."""
    return AIOKafkaAdminClient(**client_options(settings))


def partition_of(key: bytes, partitions: int) -> int:
    """The partition that Kafka's default partitioner gives a key (murmur2, as the Java client and aiokafka do)."""
    return (murmur2(key) & 0x7FFFFFFF) % partitions
