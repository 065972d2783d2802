"""Dead letters of the intake: why a span was refused, its hash and the names of its attributes. Never a value."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from exporters.edge import Edge
from schemas.deadletters import DeadLetter, dead_data
from schemas.topics import DEAD_LETTERS, REQUEST_TRACES, ce_type

NAMES_MAX = 100
_NAME = re.compile(r"[\w.\-/:]{1,100}")
ODD = "(odd)"
"""Stands for a name that could be a text in a name's place."""


class RefusedSpan(NamedTuple):
    """A span, or another report of a request, that could not be taken."""

    reason: str
    field: str
    remedy: str
    sha256: str
    bytes: int
    names: tuple[str, ...]
    """Of its attributes."""


class Letters:
    """Writes dead letters, one for all spans of a body that were refused alike, at most `per_min_max` a minute."""

    def __init__(self, edge: Edge, per_min_max: int) -> None:
        self.edge, self.per_min_max = edge, per_min_max
        self._minute, self._written, self._number = -1, 0, 0

    def write(self, refused: list[RefusedSpan], type: str) -> None:
        """`type`: what they were, as `otlp.span`."""
        alike: dict[tuple[str, str, tuple[str, ...]], list[RefusedSpan]] = {}
        for one in refused:
            alike.setdefault((one.reason, one.field, one.names), []).append(one)
        for same in alike.values():
            if not self._may_write():
                self.edge.metrics.failed("letters")
                continue
            self._send(same[0], len(same), type)

    def _may_write(self) -> bool:
        minute = int(self.edge.at_s() // 60)
        if minute != self._minute:
            self._minute, self._written = minute, 0
        self._written += 1
        return self._written <= self.per_min_max

    def _send(self, one: RefusedSpan, count: int, type: str) -> None:
        names = [name if _NAME.fullmatch(name) else ODD for name in one.names[:NAMES_MAX]]
        data: dict[str, Any] = dead_data(json.dumps({"attributes": names}).encode())
        data |= {"data_bytes": one.bytes, "data_sha256": one.sha256}
        letter = DeadLetter(
            topic=REQUEST_TRACES,
            partition=0,
            offset=0,
            at_s=self.edge.at_s(),
            type=type,
            reason=one.reason,  # type: ignore[arg-type]
            field=one.field,
            remedy=one.remedy,
            rows_refused=count,
            detail=f"refused by {self.edge.name}/{self.edge.source}; data: the names of its attributes; "
            "data_bytes and data_sha256: of the whole",
            **data,
        )
        self._number += 1
        name = f"{self.edge.name}/{self.edge.source}/{self.edge.start_s}/{self._number}"
        self.edge.producer.send(DEAD_LETTERS, name, letter.encode(), type=ce_type(DeadLetter.kind), id=name)
