"""The fold of the node level: samples and inventories of one partition in, windows per pool out.

Log node.samples; results pool.signals. Samples are kept as they came, within the grace, and windows are computed
from them: early ones (engines only) at each second of log time, closed ones when log time passes their end by
the lateness, revised ones at the second after a sample that changes them. A window is published again only if its
rows have changed. Version of everything: the offset of the record that made log time pass the second.
"""

from __future__ import annotations

import zlib
from typing import Any, ClassVar

import numpy as np

from models.fold import BaseFold
from models.node import engines, gpus
from models.node.holdings import GPUS_MAX, Holdings
from models.node.samples import SampleStore
from models.windows import WINDOW_S, closed, content_crc, window_result, window_start
from schemas.columns import Batch, Columns
from schemas.errors import InvalidRecord
from schemas.log import LogRecord
from schemas.node import ENGINE_SAMPLES, GPU_SAMPLES, NodeInventory
from schemas.signals import ENGINE_WINDOWS, GPU_WINDOWS
from schemas.topics import ce_type

CLOSES_MAX = 30
"""Windows closed at one second of log time. After an outage the rest follows at the next seconds: a bound on the work
of one record."""


class NodeFold(BaseFold):
    """One partition of node.samples."""

    level = "node"
    BOUNDS: ClassVar[tuple[tuple[str, str, str], ...]] = (
        ("holdings.nodes", "nodes_max", "overflow_nodes_total"),
        ("holdings.node_names", "nodes_max", "overflow_nodes_total"),
        ("holdings.replicas", "replicas_max", "overflow_replicas_total"),
        ("holdings.replica_names", "replicas_max", "overflow_replicas_total"),
        ("holdings.pools", "pools_max", "overflow_pools_total"),
        ("holdings.pool_names", "pools_max", "overflow_pools_total"),
        ("holdings.segments", "node_segments_max", "overflow_segments_total"),
        ("holdings.segment_gpus", "node_segments_max", "overflow_segments_total"),
        ("gpu_samples.data", "node_samples_max", "overflow_samples_total"),
        ("gpu_samples.last", "gpus_per_node_max", "overflow_gpus_total"),
        ("engine_samples.data", "node_samples_max", "overflow_samples_total"),
        ("engine_samples.last", "replicas_max", "overflow_replicas_total"),
        ("batches", "node_batches_max", "overflow_batches_total"),
        ("gpu_dirty", "grace_node_s", "late_rows_total"),
        ("engine_dirty", "grace_node_s", "late_rows_total"),
        ("emitted", "pools_max", "overflow_pools_total"),
    )
    """(container, setting that bounds it, metric that counts what the bound kept out)."""

    def __init__(self, topic: str, partition: int, partitions: dict[str, int]) -> None:
        super().__init__(topic, partition, partitions)
        self.handlers = {
            GPU_SAMPLES.type: self._gpus,
            ENGINE_SAMPLES.type: self._engines,
            ce_type(NodeInventory.kind): self._inventory,
        }
        self.holdings = Holdings()
        self.gpu_samples = SampleStore(len(gpus.COLUMNS))
        self.engine_samples = SampleStore(len(engines.COLUMNS))
        self.batches: dict[str, list[int]] = {}
        """Id of a batch or inventory -> CRC-32 of its bytes, second of log time."""
        self.next_close: int | None = None
        """Start of the earliest window not yet closed, Unix s."""
        self.horizon = 0
        """Start of the earliest window that may still change, Unix s."""
        self.gpu_dirty: dict[int, bool] = {}
        self.engine_dirty: dict[int, bool] = {}
        """Starts of closed windows that have changed since."""
        self.emitted: dict[str, list[int]] = {}
        """`kind/pool/start` -> start and CRC-32 of what was last published, closed or not."""

    # -- records ---------------------------------------------------------------------------------------------

    def _gpus(self, record: LogRecord, batch: Batch) -> None:
        name = _node_name(record, batch.meta.get("node", ""))
        node = self._node(name)
        if self._seen(record, _batch_id("gpu", name, record, batch)):
            return
        batch = self.check_times(record, batch, self.limits.grace_node_s)
        beyond = batch.numbers["gpu"] >= self.limits.gpus_per_node_max
        if beyond.any():
            self.count("overflow_gpus_total", int(beyond.sum()))
            remedy = f"at most {self.limits.gpus_per_node_max} GPUs a node (limits.gpus_per_node_max)"
            shown = float(batch.numbers["gpu"][beyond][0])
            batch = self.refuse_rows(record, batch, beyond, "overflow", "gpu", shown, remedy)
        subjects = node["code"] * GPUS_MAX + batch.numbers["gpu"]
        values = [_flags(batch, "lost"), *(batch.numbers[column] for column in gpus.COLUMNS[1:])]
        self._add(record, batch, self.gpu_samples, self.gpu_dirty, subjects, values)

    def _engines(self, record: LogRecord, batch: Batch) -> None:
        name = _node_name(record, batch.meta.get("node", ""))
        self._node(name)
        if self._seen(record, _batch_id("engine", name, record, batch)):
            return
        batch = self.check_times(record, batch, self.limits.grace_node_s)
        codes = batch.codes["replica"]
        replicas = batch.values["replica"]
        found = np.full(len(replicas), -1.0)
        for value in np.unique(codes).tolist():
            code = self.holdings.replica(name, replicas[value], self.limits.replicas_max)
            found[value] = -1.0 if code is None else code
        subjects = found[codes]
        beyond = subjects < 0
        if beyond.any():
            self.count("overflow_replicas_total", int(beyond.sum()))
            remedy = f"at most {self.limits.replicas_max} replicas a partition (limits.replicas_max)"
            shown = replicas[int(codes[beyond][0])]
            batch = self.refuse_rows(record, batch, beyond, "overflow", "replica", shown, remedy)
            subjects = subjects[~beyond]
        values = [_flags(batch, "dead"), *(batch.numbers[column] for column in engines.COLUMNS[1:])]
        self._add(record, batch, self.engine_samples, self.engine_dirty, subjects, values)

    def _add(
        self,
        record: LogRecord,
        batch: Batch,
        store: SampleStore,
        dirty: dict[int, bool],
        subjects: np.ndarray,
        values: list[np.ndarray],
    ) -> None:
        at = batch.numbers["at_s"]
        if not batch.rows:
            return
        if store.size + batch.rows > self.limits.node_samples_max:
            self.count("overflow_samples_total", batch.rows)
            remedy = "send fewer samples, or raise limits.node_samples_max"
            self.refuse_rows(record, batch, np.ones(batch.rows, bool), "overflow", "at_s", float(at[0]), remedy)
            return
        # `last_at_s` of a silent engine is in every later window too.
        speaks_s = np.inf if store is self.engine_samples else self.limits.sample_gap_s
        added = store.add(subjects, at, np.array(values), speaks_s)
        self.count("duplicate_samples_total", added.duplicates)
        self.count("samples_total", batch.rows - added.duplicates)
        from_s = added.from_s
        if store is self.engine_samples and len(added.new):
            # The first sample of a young engine counts from its start.
            start = values[engines.START][added.new]
            young = start[at[added.new] - start <= self.limits.grace_node_s]
            from_s = min(from_s, float(young.min(initial=np.inf)))
        self._mark(dirty, from_s, added.to_s)

    def _inventory(self, record: LogRecord, item: NodeInventory) -> None:
        if record.key and record.key != item.node:
            raise InvalidRecord("invalid", "node", item.node, f"must equal the key {record.key!r}")
        now_s = self.log_ms / 1000
        if item.at_s > now_s + self.limits.future_s:
            raise InvalidRecord("in_future", "at_s", item.at_s, f"log time is {now_s:.3f}: set the sender's clock")
        node = self._node(item.node)
        if self._seen(record, f"inventory/{item.node}/{item.at_s!r}"):
            return
        if item.at_s < node["at_s"]:
            self.count("inventory_outdated_total")  # absolute and overtaken: nothing is lost with it
            return
        if self.holdings.segments.shape[1] + len(item.replicas) > self.limits.node_segments_max:
            self.count("overflow_segments_total")
            raise InvalidRecord("overflow", "replicas", len(item.replicas), "raise limits.node_segments_max")
        beyond = sum(entry.gpu >= self.limits.gpus_per_node_max for entry in item.gpus)
        self.count("overflow_gpus_total", beyond)
        changed_s, left_out = self.holdings.take(node, item, now_s, self.limits)
        for metric, entries in left_out.items():
            self.count(metric, len(entries))
            reason = "overflow" if metric.startswith("overflow") else "invalid"
            remedy = "name a replica once, and keep within limits.replicas_max and limits.pools_max"
            refused = InvalidRecord(reason, f"replicas.{metric}", item.replicas[entries[0]].replica, remedy)
            self.refuse(record, refused, entries)
        if changed_s < np.inf:
            self._mark(self.engine_dirty, changed_s, now_s)
            self._mark(self.gpu_dirty, changed_s, now_s)

    def _node(self, name: str) -> dict[str, Any]:
        node = self.holdings.node(name, self.log_ms / 1000, self.limits.nodes_max)
        if node is None:
            self.count("overflow_nodes_total")
            raise InvalidRecord("overflow", "node", name, f"at most {self.limits.nodes_max} nodes a partition")
        return node

    def _seen(self, record: LogRecord, id: str) -> bool:
        """Whether a fact was taken before. Raises InvalidRecord where it then said something else."""
        if not id:
            return False
        crc = zlib.crc32(record.value)
        known = self.batches.get(id)
        if known is None:
            if len(self.batches) >= self.limits.node_batches_max:
                self.count("overflow_batches_total")
                del self.batches[next(iter(self.batches))]
            self.batches[id] = [crc, self.log_ms // 1000]
            return False
        if known[0] != crc:
            raise InvalidRecord("conflict", "id", id, "this id came before with other content: use each once")
        self.count("duplicate_batches_total")
        return True

    def _mark(self, dirty: dict[int, bool], from_s: float, to_s: float) -> None:
        """Notes that closed windows between two times may have changed."""
        if self.next_close is None or not from_s < self.next_close:
            return
        first = max(window_start(self.log_ms / 1000 - self.limits.grace_node_s), self.horizon)
        first = window_start(max(from_s, first))
        last = window_start(min(to_s, self.next_close - 1))
        for start in range(first, last + 1, WINDOW_S):
            dirty[start] = True

    # -- windows ---------------------------------------------------------------------------------------------

    def on_second(self, second: int, before: int) -> None:
        """Closes, revises and looks ahead; see the module."""
        now_s = self.log_ms / 1000
        limits = self.limits
        if self.next_close is None:
            self.next_close = window_start(now_s - limits.lateness_s)
            self.horizon = window_start(now_s - limits.grace_node_s)
            return
        closing: dict[int, bool] = {}
        while closed(self.next_close, now_s, limits.lateness_s) and len(closing) < CLOSES_MAX:
            closing[self.next_close] = True
            self.next_close += WINDOW_S
        open_now = range(window_start(now_s - limits.lateness_s), window_start(now_s) + 1, WINDOW_S)
        gpu_starts = sorted({**self.gpu_dirty, **closing})
        engine_starts = sorted({**self.engine_dirty, **closing, **dict.fromkeys(open_now, True)})
        self.gpu_dirty.clear()
        self.engine_dirty.clear()
        if gpu_starts:
            series = self.gpu_samples.series()
            for start in gpu_starts:
                found = gpus.gpu_windows(series, self.holdings, start, now_s, limits.sample_gap_s)
                self._publish(GPU_WINDOWS, "gpu", start, found)
        series = self.engine_samples.series()
        gap_s, stale_s, grace_s = limits.sample_gap_s, limits.inventory_stale_s, limits.grace_node_s
        for start in engine_starts:
            found = engines.engine_windows(series, self.holdings, start, now_s, gap_s, stale_s, grace_s)
            self._publish(ENGINE_WINDOWS, "engine", start, found)
        self._prune(now_s)

    def _publish(self, kind: Columns, short: str, start: int, found: dict[str, dict[str, Any]]) -> None:
        assert self.next_close is not None
        is_closed = start < self.next_close
        for pool, data in found.items():
            mark = [start, content_crc(data), int(is_closed)]
            key = f"{short}/{pool}/{start}"
            if self.emitted.get(key) == mark:
                continue
            self.emitted[key] = mark
            self._out.append(window_result(self, kind, short, pool, start, is_closed, data))

    def _prune(self, now_s: float) -> None:
        """Forgets what no window that may still change depends on."""
        assert self.next_close is not None
        grace_s = self.limits.grace_node_s
        horizon = min(window_start(now_s - grace_s), self.next_close)
        if horizon <= self.horizon:
            return
        self.horizon = horizon
        gap_s = self.limits.sample_gap_s
        none = np.zeros(0, np.int64)
        self.gpu_samples.prune(horizon - gap_s, horizon - grace_s, gpus.STATUS, none)
        self.engine_samples.prune(horizon - gap_s, horizon - grace_s, engines.STATUS, self.holdings.held_codes())
        sampled = set(self.engine_samples.last) | {int(code) // GPUS_MAX for code in self.gpu_samples.last}
        self.holdings.prune(horizon, now_s - self.limits.inventory_stale_s - 2 * grace_s, sampled)
        self.emitted = {key: mark for key, mark in self.emitted.items() if mark[0] >= horizon}
        for id, _ in _older(self.batches, int(now_s - 2 * grace_s)):
            del self.batches[id]

    # -- state -----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """See BaseFold."""
        return {
            "holdings": self.holdings.state(),
            "gpu_samples": self.gpu_samples.state(),
            "engine_samples": self.engine_samples.state(),
            "batches": self.batches,
            "next_close": self.next_close,
            "horizon": self.horizon,
            "gpu_dirty": self.gpu_dirty,
            "engine_dirty": self.engine_dirty,
            "emitted": self.emitted,
        }

    def restore(self, state: dict[str, Any], version: int) -> None:
        """See BaseFold."""
        self.holdings.restore(state["holdings"])
        self.gpu_samples.restore(state["gpu_samples"])
        self.engine_samples.restore(state["engine_samples"])
        self.batches, self.emitted = state["batches"], state["emitted"]
        self.next_close, self.horizon = state["next_close"], state["horizon"]
        self.gpu_dirty, self.engine_dirty = state["gpu_dirty"], state["engine_dirty"]

    def metrics(self) -> dict[str, float]:
        """Counters, and how much is held."""
        return {
            **super().metrics(),
            "nodes": float(len(self.holdings.nodes)),
            "replicas": float(len(self.holdings.replicas)),
            "gpu_samples": float(self.gpu_samples.size),
            "engine_samples": float(self.engine_samples.size),
        }


def _older(batches: dict[str, list[int]], second: int) -> list[tuple[str, list[int]]]:
    found = []
    for item in batches.items():  # by log time: the first that is young ends it
        if item[1][1] >= second:
            break
        found.append(item)
    return found


def _flags(batch: Batch, bad: str) -> np.ndarray:
    """1 where a row's status is `bad`, 0 where it is another, NaN where it is unknown."""
    flags: np.ndarray = np.array([*(float(value == bad) for value in batch.values["status"]), np.nan])
    flagged: np.ndarray = flags[batch.codes["status"]]
    return flagged


def _node_name(record: LogRecord, said: str) -> str:
    """The node of a batch: the key, which the metadata may repeat. Raises InvalidRecord where they differ."""
    name = said or record.key
    if record.key and name != record.key:
        raise InvalidRecord("invalid", "node", said, f"must equal the key {record.key!r}")
    if not name or len(name) > 200 or "/" in name or not name.isprintable():
        raise InvalidRecord("invalid", "node", name, "as key, send a node name of 1 to 200 characters, no slash")
    return name


def _batch_id(kind: str, node: str, record: LogRecord, batch: Batch) -> str:
    """What names a batch: node, exporter start and sequence; else the record's own id; empty where there is none."""
    if "start_s" in batch.meta and "seq" in batch.meta:
        return f"{kind}/{node}/{batch.meta['start_s']}/{batch.meta['seq']}"
    return f"{kind}/{node}/id/{record.id}" if record.id else ""
