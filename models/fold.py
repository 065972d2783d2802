"""What every level's fold has in common: log time, seconds, configuration, dispatch, refusals.

A level subclasses `BaseFold`, fills `handlers` and overrides the hooks. The base keeps the law of folds for
what is its own: log time is the running maximum of `at_ms`; results come only while a record is applied;
`on_second` is called by the first record past each second of log time, *before* that record is taken.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from models.state import pack, packable, unpack
from schemas.base import KINDS, Record, decode
from schemas.columns import COLUMNAR, Batch
from schemas.config import ConfigObject, LimitsSpec
from schemas.deadletters import DeadLetter, dead_data
from schemas.errors import InvalidRecord
from schemas.log import TICK, LogRecord, Result
from schemas.topics import DEAD_LETTERS, ce_type

Handler = Callable[[LogRecord, Any], None]


class BaseFold(ABC):
    """One partition of one level's log.

    Parameters: `topic` (registry name), `partition`, `partitions` (topic -> count).
    """

    level: ClassVar[str] = ""
    format: ClassVar[int] = 1
    """Version of the state's format."""
    reads: ClassVar[tuple[int, ...]] = (1,)
    """Formats that `load` understands."""

    def __init__(self, topic: str, partition: int, partitions: dict[str, int]) -> None:
        self.topic = topic
        self.partition = partition
        self.partitions = partitions
        self.source = f"{topic}/{partition}"
        self.log_ms = 0
        self.second = 0
        """Last second of log time for which `on_second` was called (Unix s)."""
        self.offset = -1
        """Offset of the record that is being applied: the version of every result that it causes."""
        self.config: dict[str, dict[str, Any]] = {}
        """key -> ConfigObject as plain values, the greatest revision. It bounds whatever copies it: what is derived
        from it must follow from it alone, or a reload would give something else."""
        self.limits = LimitsSpec()
        self.counters: dict[str, int] = {}
        self.handlers: dict[str, Handler] = {}
        """`ce_type` -> method(record, Batch or Record)."""
        self._out: list[Result] = []

    # -- the law ---------------------------------------------------------------------------------------------

    def apply(self, records: Sequence[LogRecord]) -> list[Result]:
        """See schemas.log.Fold."""
        self._out = []
        for record in records:
            self._one(record)
        out, self._out = self._out, []
        return out

    def _one(self, record: LogRecord) -> None:
        self.offset = record.offset
        if record.at_ms > self.log_ms:
            self.log_ms = record.at_ms
            second = self.log_ms // 1000
            if second > self.second:
                first, self.second = self.second, second
                self.on_second(second, first)
        if record.type == TICK:
            return
        try:
            self._take(record)
        except InvalidRecord as refused:
            self.refuse(record, refused)

    def _take(self, record: LogRecord) -> None:
        if record.type == ce_type(ConfigObject.kind):
            self._configure(decode(ConfigObject, record.value))
            return
        handler = self.handlers.get(record.type)
        if handler is None:
            raise _unknown(record.type, list(self.handlers))
        if record.type in COLUMNAR:
            batch = COLUMNAR[record.type].decode(record.value, record.content_type)
            for bad in batch.refused:
                self.refuse(record, InvalidRecord(bad.reason, bad.field, bad.value, bad.remedy), bad.rows)
            if batch.rows:
                handler(record, batch)
            return
        handler(record, decode(KINDS[record.type], record.value))

    def on_second(self, second: int, before: int) -> None:  # noqa: B027 - a hook, not a duty
        """Log time has passed `second` (Unix s); the last call was for `before` (0: the first record)."""

    def on_config(self, item: ConfigObject, spec: Record | None) -> None:  # noqa: B027 - a hook, not a duty
        """An object changed; `spec` is None when it was deleted. `limits` is already taken."""

    # -- configuration ---------------------------------------------------------------------------------------

    def _configure(self, item: ConfigObject) -> None:
        known = self.config.get(item.key)
        if known is not None and known["revision"] >= item.revision:
            return
        most = self.limits.config_objects_max
        if known is None and len(self.config) >= most and item.object_kind != "limits":
            raise InvalidRecord("overflow", item.key, most, "raise limits.config_objects_max")
        spec = None if item.deleted else item.typed()
        kept = item.model_copy(update={"spec": {} if spec is None else spec.model_dump(mode="json")})
        plain = kept.model_dump(mode="json")
        if not packable(plain):
            raise InvalidRecord("out_of_bounds", item.key, "", "send whole numbers of at most 64 bits")
        self.config[item.key] = plain
        if item.key == "limits/limits":
            self.limits = spec if isinstance(spec, LimitsSpec) else LimitsSpec()
        self.on_config(item, spec)

    # -- results ---------------------------------------------------------------------------------------------

    def emit(
        self, topic: str, key: str, kind: str, id: str, value: bytes, content_type: str = "application/json"
    ) -> None:
        """Queues one result."""
        self._out.append(Result(topic, key, ce_type(kind), id, self.log_ms, value, content_type))

    def emit_record(self, topic: str, key: str, id: str, record: Record) -> None:
        """Queues one JSON record."""
        self.emit(topic, key, record.kind, id, record.encode())

    def count(self, name: str, by: int = 1) -> None:
        """Adds to a counter; names end in `_total`."""
        if by:
            self.counters[name] = self.counters.get(name, 0) + by

    def refuse(self, record: LogRecord, refused: InvalidRecord, rows: Sequence[int] | None = None) -> None:
        """Sends a record, or rows of it, to dead.letters."""
        count = 1 if rows is None else len(rows)
        self.count(f"dead_{refused.reason}_total", count)
        letter = DeadLetter(
            topic=self.topic,
            partition=self.partition,
            offset=record.offset,
            at_s=self.log_ms / 1000,
            type=record.type[:200],
            reason=refused.reason,
            field=refused.field,
            value=refused.value,
            remedy=refused.remedy,
            rows=None if rows is None else list(rows),
            rows_refused=count,
            **dead_data(record.value),
        )
        name = f"{self.source}/{record.offset}"
        self.emit_record(DEAD_LETTERS, name, f"{name}/{refused.reason}/{refused.field}", letter)

    def refuse_rows(
        self,
        record: LogRecord,
        batch: Batch,
        bad: np.ndarray,
        reason: str,
        field: str,
        value: object,
        remedy: str,
    ) -> Batch:
        """Dead-letters the rows where `bad` is true (by their number in the record) and gives the others."""
        if not bad.any():
            return batch
        rows: list[int] = batch.index[bad].tolist()
        self.refuse(record, InvalidRecord(reason, field, value, remedy), rows)
        return batch.keep(~bad)

    def check_times(self, record: LogRecord, batch: Batch, grace_s: float, column: str = "at_s") -> Batch:
        """The rows whose event time is neither in the future nor older than the grace; others are refused."""
        at = batch.numbers[column]
        now = self.log_ms / 1000
        ahead = at > now + self.limits.future_s
        if ahead.any():
            batch = self.refuse_rows(
                record,
                batch,
                ahead,
                "in_future",
                column,
                float(at[ahead][0]),
                f"log time is {now:.3f}: set the sender's clock",
            )
            at = batch.numbers[column]
        late = at < now - grace_s
        if late.any():
            self.count("late_rows_total", int(late.sum()))
            batch = self.refuse_rows(
                record,
                batch,
                late,
                "too_late",
                column,
                float(at[late][0]),
                f"send within {grace_s:g} s; log time is {now:.3f}",
            )
        return batch

    # -- state -----------------------------------------------------------------------------------------------

    def dump(self) -> bytes:
        """See schemas.log.Fold."""
        base = {
            "log_ms": self.log_ms,
            "second": self.second,
            "offset": self.offset,
            "config": self.config,
            "counters": self.counters,
        }
        return pack(self.level, self.topic, self.partition, self.format, {"base": base, "own": self.state()})

    def load(self, data: bytes) -> None:
        """See schemas.log.Fold."""
        version, state = unpack(self.level, self.topic, self.partition, self.reads, data)
        base = state["base"]
        self.log_ms, self.second, self.offset = base["log_ms"], base["second"], base["offset"]
        self.config, self.counters = base["config"], base["counters"]
        limits = self.config.get("limits/limits")
        self.limits = LimitsSpec() if limits is None or limits["deleted"] else LimitsSpec.model_validate(limits["spec"])
        self._out = []
        self.restore(state["own"], version)

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """The level's own state as plain values and numpy arrays."""

    @abstractmethod
    def restore(self, state: dict[str, Any], version: int) -> None:
        """Replaces the level's own state; `self.config` is already restored."""

    def metrics(self) -> dict[str, float]:
        """See schemas.log.Fold."""
        return {name: float(value) for name, value in self.counters.items()}


def _unknown(type: str, known: Sequence[str]) -> InvalidRecord:
    for name in known:
        if type.rpartition(".")[0] == name.rpartition(".")[0]:
            return InvalidRecord("unknown_version", "ce_type", type, f"this version takes {name}")
    return InvalidRecord("unknown_type", "ce_type", type, f"send one of {', '.join(known)}")
