"""The three shapes that pass between a log and what computes over it.

`LogRecord` goes into a fold, `Result` and `Metrics` come out. Both sides import them from here,
so that neither the substrate knows what a fold computes nor a fold where its records come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

CONTENT_ARROW = "application/vnd.apache.arrow.stream"
CONTENT_JSON = "application/json"

TICK = "tick"  # ce_type of the empty record by which a silent partition's log time moves on


class LogRecord(NamedTuple):
    """One record of one partition, as the log has it."""

    offset: int
    at_ms: int
    """Log time of the record itself in ms: origin + speed x (append - origin). Not yet a running maximum."""
    type: str
    """`ce_type` header; empty when the header is missing."""
    key: str
    value: bytes
    content_type: str = CONTENT_JSON
    id: str = ""
    """`ce_id` header: names a fact; the first content of an id wins. Empty when the header is missing."""


class Result(NamedTuple):
    """One record to publish. The same log gives the same results, byte for byte."""

    topic: str
    """Name in the registry (`schemas.topics`), without the deployment's prefix."""
    key: str
    type: str
    """`ce_type`."""
    id: str
    """`ce_id`: deterministic; for upserts `name@version`."""
    at_ms: int
    """Log time in ms (`ce_time`)."""
    value: bytes
    content_type: str = CONTENT_JSON
    partition: int | None = None
    """Only where the key must not decide (config copies): the partition to write to."""


class Fold(Protocol):
    """What computes over one partition of one level's log. Pure: no I/O, no clock, no logging.

    The law of folds: any split of the records into calls of `apply`, with `load(dump())` between any two,
    gives the same results and the same dump, byte for byte.
    """

    def apply(self, records: Sequence[LogRecord]) -> list[Result]:
        """Takes records in offset order and gives what is to be published, in order.

        Bad input never raises: it comes back as results for `dead.letters`. What raises is our bug.
        """

    def dump(self) -> bytes:
        """The whole state; names level, topic, partition and format inside."""

    def load(self, data: bytes) -> None:
        """Replaces the state by a dump. Raises CheckpointMismatch for another level, topic, partition, format."""

    def metrics(self) -> dict[str, float]:
        """Counters and gauges of this partition by Prometheus name without prefix, e.g. `late_rows_total`."""
