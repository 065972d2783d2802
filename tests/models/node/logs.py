"""Logs of the node level for tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from models.node.fold import NodeFold
from schemas.columns import Batch
from schemas.log import CONTENT_ARROW, LogRecord, Result
from schemas.node import (
    ENGINE_HISTOGRAMS,
    ENGINE_SAMPLES,
    GPU_SAMPLES,
    PROCESS_SAMPLES,
    GpuEntry,
    NodeInventory,
    ReplicaEntry,
)
from schemas.signals import WindowName
from schemas.topics import NODE_SAMPLES, POOL_SIGNALS, ce_type

PARTITIONS = {NODE_SAMPLES: 4, POOL_SIGNALS: 4}
T0 = 1_700_000_000
"""Start of a window."""


def fold() -> NodeFold:
    return NodeFold(NODE_SAMPLES, 0, PARTITIONS)


def batch(kind: Any, at_s: float, node: str, rows: Sequence[Mapping[str, Any]], meta: Mapping[str, str]) -> LogRecord:
    names = {name for row in rows for name in row}
    data = {name: [row.get(name) for row in rows] for name in kind.columns if name in names}
    value = kind.encode(data, {"node": node, **meta})
    return LogRecord(0, round(at_s * 1000), kind.type, node, value, CONTENT_ARROW)


def gpu(at_s: float, rows: Sequence[Mapping[str, Any]], node: str = "n1", **meta: str) -> LogRecord:
    """A record of gpu.samples at log time `at_s`."""
    return batch(GPU_SAMPLES, at_s, node, rows, meta)


def engine(at_s: float, rows: Sequence[Mapping[str, Any]], node: str = "n1", **meta: str) -> LogRecord:
    """A record of engine.samples at log time `at_s`."""
    return batch(ENGINE_SAMPLES, at_s, node, rows, meta)


def process(at_s: float, rows: Sequence[Mapping[str, Any]], node: str = "n1", **meta: str) -> LogRecord:
    """A record of process.samples at log time `at_s`."""
    return batch(PROCESS_SAMPLES, at_s, node, rows, meta)


def histogram(at_s: float, rows: Sequence[Mapping[str, Any]], node: str = "n1", **meta: str) -> LogRecord:
    """A record of engine.histograms at log time `at_s`."""
    return batch(ENGINE_HISTOGRAMS, at_s, node, rows, meta)


def replica(name: str = "r1", pool: str = "chat", gpus: Sequence[int] = (0,), **more: Any) -> ReplicaEntry:
    return ReplicaEntry(replica=name, pool=pool, gpus=list(gpus), **{"state": "ready", "since_s": T0 - 1000, **more})


def inventory(
    at_s: float, replicas: Sequence[ReplicaEntry], node: str = "n1", gpus: int | Sequence[GpuEntry] = 2
) -> LogRecord:
    """An inventory read and appended at `at_s`; `gpus`: so many H100, or these."""
    entries = [GpuEntry(gpu=i, gpu_type="H100") for i in range(gpus)] if isinstance(gpus, int) else list(gpus)
    item = NodeInventory(node=node, at_s=at_s, gpus=entries, replicas=list(replicas))
    return LogRecord(0, round(at_s * 1000), ce_type(item.kind), node, item.encode())


def windows(results: Iterable[Result], kind: Any) -> list[tuple[WindowName, Batch]]:
    """All windows of a kind, in order."""
    found = []
    for result in results:
        if result.type == kind.type:
            decoded = kind.decode(result.value)
            assert not decoded.refused
            assert result.topic == POOL_SIGNALS
            found.append((WindowName.of(decoded.meta), decoded))
    return found


def rows(batch: Batch) -> list[dict[str, Any]]:
    """A batch as dictionaries, None = unknown."""
    columns: dict[str, list[Any]] = {}
    for name, values in batch.numbers.items():
        columns[name] = [None if v != v else v for v in values.tolist()]
    for name in batch.codes:
        columns[name] = batch.text(name)
    for name, pairs in batch.pairs.items():
        columns[name] = [None if v is None else v.tolist() for v in pairs]
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def final(results: Iterable[Result], kind: Any) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """(pool, start) -> rows of the greatest version of each closed window."""
    best: dict[tuple[str, int], tuple[int, list[dict[str, Any]]]] = {}
    for name, decoded in windows(results, kind):
        key = (name.pool, name.start_s)
        if name.closed and name.version >= best.get(key, (-1, []))[0]:
            best[key] = (name.version, rows(decoded))
    return {key: found for key, (_, found) in best.items()}
