"""What every exporter is made of: options, a producer, ticks that are skipped and never queued, health and metrics."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterable
from typing import Any, TypeVar

import structlog
from prometheus_client import Counter, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import SecretStr, ValidationError
from pydantic_settings import BaseSettings
from pydantic_settings import SettingsError as SourceError

from schemas.config import Deployment
from schemas.errors import SettingsError
from schemas.topics import NODE_SAMPLES
from streams.deployment import wall_now_ms
from streams.health import HealthServer
from streams.producer import EdgeProducer
from streams.settings import Settings, declare_variable

log = structlog.get_logger(__name__)

O = TypeVar("O", bound=BaseSettings)  # noqa: E741 - options

METRICS = {
    "fleetloop_exporter_sent_total": "Records taken for the broker, by topic.",
    "fleetloop_exporter_acked_total": "Records that the broker has, by topic.",
    "fleetloop_exporter_dropped_total": "Records dropped because the broker was away and the buffer full, by topic.",
    "fleetloop_exporter_refused_total": "Records too large for their topic, by topic.",
    "fleetloop_exporter_buffered_bytes": "Bytes taken and not yet with the broker.",
    "fleetloop_exporter_skipped_total": "Ticks without a reading, because the one before had not ended.",
    "fleetloop_exporter_errors_total": "Readings or rows that failed, by what failed.",
    "fleetloop_exporter_rows_total": "Rows taken from the source.",
    "fleetloop_exporter_read_seconds": "Wall time of one reading of the source.",
}
"""Name -> help."""
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
STOP_WITHIN_S = 5.0
_PASSWORD = re.compile(r"(?<=//)[^/@\s]*@")
"""User and password in a URL."""


def options_of(cls: type[O], given: dict[str, Any]) -> O:
    """Options from what was given (None: not given), then the environment. Raises SettingsError."""
    prefix = cls.model_config.get("env_prefix", "")
    try:
        return cls(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise SettingsError("; ".join(_explained(cls, prefix, item) for item in error.errors())) from None
    except SourceError as error:
        raise SettingsError(f"{prefix}*: {error}: lists are separated by commas") from None


def _explained(cls: type[BaseSettings], prefix: str, item: Any) -> str:
    remedy = item["msg"].removeprefix("Value error, ")
    if not item["loc"]:
        return str(remedy)
    name = str(item["loc"][0])
    field = cls.model_fields.get(name)
    secret = field is not None and "Secret" in str(field.annotation)
    shown = "***" if secret else _PASSWORD.sub("***@", repr(item["input"]))
    return f"{prefix}{name.upper()}: {shown}: {remedy}. {field.description if field else ''}".strip()


def declare(cls: type[BaseSettings]) -> None:
    """Makes the variables of an options class known wherever settings are read."""
    prefix = cls.model_config.get("env_prefix", "")
    for name, field in cls.model_fields.items():
        default = field.default
        known = not field.is_required() and field.default_factory is None and not isinstance(default, SecretStr)
        shown = f" Default: {default}." if known and default is not None else ""
        declare_variable(prefix + name.upper(), f"{field.description}{shown}")


class ExporterMetrics(Collector):
    """Counts of one exporter and of its producer."""

    def __init__(self, exporter: str, producer: EdgeProducer) -> None:
        self.exporter, self.producer = exporter, producer
        self._skipped = Counter(
            "fleetloop_exporter_skipped_total", METRICS["fleetloop_exporter_skipped_total"], ["exporter"], registry=None
        )
        self._errors = Counter(
            "fleetloop_exporter_errors_total",
            METRICS["fleetloop_exporter_errors_total"],
            ["exporter", "what"],
            registry=None,
        )
        self._rows = Counter(
            "fleetloop_exporter_rows_total", METRICS["fleetloop_exporter_rows_total"], ["exporter"], registry=None
        )
        self._read_s = Histogram(
            "fleetloop_exporter_read_seconds",
            METRICS["fleetloop_exporter_read_seconds"],
            ["exporter"],
            registry=None,
            buckets=BUCKETS_S,
        )

    def skipped(self) -> None:
        """A tick found the reading before it still under way."""
        self._skipped.labels(self.exporter).inc()

    def failed(self, what: str, count: int = 1) -> None:
        """A reading or rows failed; `what` is one of few words."""
        self._errors.labels(self.exporter, what).inc(count)

    def read(self, rows: int, took_s: float) -> None:
        """A reading gave rows."""
        self._rows.labels(self.exporter).inc(rows)
        self._read_s.labels(self.exporter).observe(took_s)

    def collect(self) -> Iterable[Metric]:
        """See Collector."""
        for one in (self._skipped, self._errors, self._rows, self._read_s):
            yield from one.collect()
        producer = self.producer
        for name, counts in (
            ("fleetloop_exporter_sent_total", producer.sent),
            ("fleetloop_exporter_acked_total", producer.acked),
            ("fleetloop_exporter_dropped_total", producer.dropped),
            ("fleetloop_exporter_refused_total", producer.refused),
        ):
            family = CounterMetricFamily(name, METRICS[name], labels=["exporter", "topic"])
            for topic, count in list(counts.items()):
                family.add_metric([self.exporter, topic], count)
            yield family
        name = "fleetloop_exporter_buffered_bytes"
        gauge = GaugeMetricFamily(name, METRICS[name], labels=["exporter"])
        gauge.add_metric([self.exporter], producer.buffered_bytes)
        yield gauge


class Edge:
    """One exporter's producer, metrics and clock. An async context manager.

    Parameters: `name` is the exporter, `source` who it speaks for (node, gateway): `ce_source` is both; `collectors`
    are metrics beside those that every exporter has.
    """

    def __init__(
        self,
        settings: Settings,
        deployment: Deployment,
        name: str,
        source: str,
        health_port: int = 0,
        collectors: Iterable[Collector] = (),
    ) -> None:
        self.settings, self.deployment, self.name, self.source = settings, deployment, name, source
        self.producer = EdgeProducer(settings, f"{name}/{source}")
        self.metrics = ExporterMetrics(name, self.producer)
        self.start_s = f"{wall_now_ms() / 1000:.3f}"
        self.unready: list[str] = []
        """Why it does not do its work, beside the broker; the exporter keeps it."""
        self._seq = 0
        self._health = HealthServer(settings.web_host, health_port, lambda: "", self._why, self.metrics, *collectors)

    async def __aenter__(self) -> Edge:
        self._health.start()
        await self.producer.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        if not await self.producer.stop(STOP_WITHIN_S):
            log.warning("records were not acknowledged", exporter=self.name, bytes=self.producer.buffered_bytes)
        self._health.stop()

    def _why(self) -> list[str]:
        return list(self.unready) if self.producer.connected else [*self.unready, "the broker cannot be reached"]

    def at_s(self) -> float:
        """Fleet time of this moment, Unix s."""
        return self.fleet_s(wall_now_ms() / 1000)

    def fleet_s(self, wall_s: float) -> float:
        """Fleet time of a wall time, both Unix s."""
        return self.deployment.log_ms(round(wall_s * 1000)) / 1000

    def next_batch(self) -> tuple[str, str]:
        """(seq, `ce_id`) of the next batch: unique for this process."""
        self._seq += 1
        return str(self._seq), f"{self.name}/{self.source}/{self.start_s}/{self._seq}"

    def node_batch(self, node: str) -> tuple[dict[str, str], str]:
        """(metadata, `ce_id`) of the next batch for node.samples."""
        seq, id = self.next_batch()
        return {"node": node, "start_s": self.start_s, "seq": seq, "dropped": self.dropped(NODE_SAMPLES)}, id

    def dropped(self, topic: str) -> str:
        """Batches dropped since the start, as batches' metadata says it."""
        return str(self.producer.dropped[topic])


async def ticks(period_s: float, stop: asyncio.Event) -> AsyncIterator[None]:
    """One now and then each period (wall time) until `stop` is set; ticks that the consumer missed are skipped."""
    now = asyncio.get_running_loop().time
    at = now()
    while not stop.is_set():
        yield
        at += period_s * max(1, -(-(now() - at) // period_s))
        try:
            async with asyncio.timeout_at(at):
                await stop.wait()
        except TimeoutError:
            continue
