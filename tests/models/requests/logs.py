"""Logs of the requests level for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from models.requests.fold import RequestsFold
from schemas.config import ConfigObject
from schemas.log import CONTENT_ARROW, LogRecord
from schemas.requests import REQUEST_ROWS
from schemas.topics import POOL_SIGNALS, REQUEST_TRACES, ce_type

PARTITIONS = {REQUEST_TRACES: 4, POOL_SIGNALS: 4}
T0 = 1_700_000_000
"""Start of a window."""


def fold() -> RequestsFold:
    return RequestsFold(REQUEST_TRACES, 0, PARTITIONS)


def arrival(id: str, at_s: float, **more: Any) -> dict[str, Any]:
    return {
        "event": "arrival",
        "request_id": id,
        "at_s": at_s,
        "pool": "chat",
        "tenant": "acme",
        "class": "fast",
        **more,
    }


def end(id: str, at_s: float, **more: Any) -> dict[str, Any]:
    """An end that meets the default targets unless told otherwise."""
    measured = {"status": "ok", "input_tokens": 100.0, "output_tokens": 10.0, "ttft_s": 0.5, "tpot_s": 0.03125}
    return {**arrival(id, at_s), "event": "end", **measured, "e2e_s": 1.0, **more}


def record(at_s: float, rows: Sequence[Mapping[str, Any]]) -> LogRecord:
    """A record of request.rows at log time `at_s`."""
    names = {name for row in rows for name in row}
    data = {name: [row.get(name) for row in rows] for name in REQUEST_ROWS.columns if name in names}
    value = REQUEST_ROWS.encode(data)
    return LogRecord(0, round(at_s * 1000), REQUEST_ROWS.type, "k", value, CONTENT_ARROW)


def pool_config(at_s: float, name: str = "chat", revision: int = 1, **spec: Any) -> LogRecord:
    """A pool with TTFT target 2 s and TPOT target 0.15 s."""
    spec = {"model": "m", "gpu_type": "H100", "gpus_per_replica": 1, "capacity_rps": 1, **spec}
    item = ConfigObject(object_kind="pool", name=name, revision=revision, spec=spec)
    return LogRecord(0, round(at_s * 1000), ce_type("config"), item.key, item.encode())


def tenant_config(at_s: float, name: str, tier: str) -> LogRecord:
    """A tenant of a tier."""
    item = ConfigObject(object_kind="tenant", name=name, revision=1, spec={"tier": tier})
    return LogRecord(0, round(at_s * 1000), ce_type("config"), item.key, item.encode())
