"""The fold of the node level: samples and inventories of one partition in, windows per pool out.

Log node.samples; results pool.signals. Windows are computed from the samples that `models.node.records` keeps: early
ones (engines only, without what their GPUs did) at each second of log time, closed ones when log time passes their end
by the lateness, revised ones at the second after a sample that changes them, or, for what is read every 5 s only, when
the next window closes. A window is published again only if its rows have changed. Interference is judged once, when a
window closes. Version of everything: the offset of the record that made log time pass the second.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from models.node import closing, engines, gpus, nodes
from models.node.holdings import GPUS_MAX
from models.node.interference import Interference
from models.node.neighbours import neighbours
from models.node.processes import SPEAKS_S
from models.node.records import NodeRecords
from models.windows import WINDOW_S, closed, content_crc, window_result, window_start
from schemas.columns import Columns
from schemas.signals import ENGINE_WINDOWS, GPU_WINDOWS, INTERFERENCE_WINDOWS, NODE_WINDOWS

CLOSES_MAX = 30
"""Windows closed at one second of log time. After an outage the rest follows at the next seconds: a bound on the work
of one record."""


class NodeFold(NodeRecords):
    """One partition of node.samples."""

    format: ClassVar[int] = 2
    reads: ClassVar[tuple[int, ...]] = (2,)
    BOUNDS: ClassVar[tuple[tuple[str, str, str], ...]] = (
        ("holdings.nodes", "nodes_max", "overflow_nodes_total"),
        ("holdings.node_names", "nodes_max", "overflow_nodes_total"),
        ("holdings.replicas", "replicas_max", "overflow_replicas_total"),
        ("holdings.replica_names", "replicas_max", "overflow_replicas_total"),
        ("holdings.pools", "pools_max", "overflow_pools_total"),
        ("holdings.pool_names", "pools_max", "overflow_pools_total"),
        ("holdings.segments", "node_segments_max", "overflow_segments_total"),
        ("holdings.segment_gpus", "node_segments_max", "overflow_segments_total"),
        ("texts.codes", "texts_max", "overflow_texts_total"),
        ("texts.names", "texts_max", "overflow_texts_total"),
        ("gpu_samples.data", "node_samples_max", "overflow_samples_total"),
        ("gpu_samples.last", "gpus_per_node_max", "overflow_gpus_total"),
        ("engine_samples.data", "node_samples_max", "overflow_samples_total"),
        ("engine_samples.last", "replicas_max", "overflow_replicas_total"),
        ("processes.codes", "processes_per_node_max", "overflow_processes_total"),
        ("processes.names", "processes_per_node_max", "overflow_processes_total"),
        ("processes.counts", "nodes_max", "overflow_nodes_total"),
        ("histograms.stores", "histogram_layouts_max", "overflow_histograms_total"),
        ("batches", "node_batches_max", "overflow_batches_total"),
        ("gpu_dirty", "grace_node_s", "late_rows_total"),
        ("engine_dirty", "grace_node_s", "late_rows_total"),
        ("slow_dirty", "grace_node_s", "late_rows_total"),
        ("emitted", "pools_max", "overflow_pools_total"),
        ("interference.banks", "neighbours_max", "overflow_neighbours_total"),
        ("interference.slots", "replicas_max", "overflow_replicas_total"),
        ("interference.alone", "pools_max", "overflow_pools_total"),
        ("interference.counters", "neighbours_max", "overflow_neighbours_total"),
    )
    """(container, setting that bounds it, metric that counts what the bound kept out). What a store within
    `processes` and `histograms` holds is bounded by node_samples_max and histogram_samples_max."""

    def __init__(self, topic: str, partition: int, partitions: dict[str, int]) -> None:
        super().__init__(topic, partition, partitions)
        self.interference = Interference()
        self.emitted: dict[str, list[int]] = {}
        """`kind/pool/start` -> start and CRC-32 of what was last published, closed or not."""

    # -- windows ---------------------------------------------------------------------------------------------

    def on_second(self, second: int, before: int) -> None:
        """Closes, revises and looks ahead; see the module."""
        now_s = self.log_ms / 1000
        limits = self.limits
        if self.next_close is None:
            self.next_close = window_start(now_s - limits.lateness_s)
            self.horizon = window_start(now_s - limits.grace_node_s)
            return
        first = self.next_close
        while closed(self.next_close, now_s, limits.lateness_s) and self.next_close < first + CLOSES_MAX * WINDOW_S:
            self.next_close += WINDOW_S
        closing_now = dict.fromkeys(range(first, self.next_close, WINDOW_S), True)
        late = {**self.gpu_dirty, **self.engine_dirty}
        if closing_now:
            late |= self.slow_dirty
            self.slow_dirty.clear()
        self.gpu_dirty.clear()
        self.engine_dirty.clear()
        open_now = range(window_start(now_s - limits.lateness_s), window_start(now_s) + 1, WINDOW_S)
        series = self.engine_samples.series()
        done = sorted({**late, **closing_now})
        if done:
            self._close(done, closing_now, series, now_s)
        for start in open_now:
            if start >= self.next_close:
                table = engines.engine_table(series, self.holdings, self.texts, start, now_s, limits)
                self._publish(ENGINE_WINDOWS, "engine", start, engines.by_pool(table, self.holdings))
        self._prune(now_s)

    def _close(self, starts: list[int], new: dict[int, bool], series: Any, now_s: float) -> None:
        """Publishes closed windows: those in `new` for the first time."""
        limits, holdings = self.limits, self.holdings
        of_gpus = self.gpu_samples.series()
        for start in starts:
            processes = self.processes.table(self.texts, start, limits)
            on = gpus.gpu_table(of_gpus, holdings, start, now_s, limits.sample_gap_s, processes)
            self._publish(GPU_WINDOWS, "gpu", start, gpus.by_pool(on, holdings))
            on_nodes = nodes.node_windows(on, holdings, start)
            if on_nodes:
                self._publish(NODE_WINDOWS, "node", start, {gpus.UNUSED: on_nodes})
            table = engines.engine_table(series, holdings, self.texts, start, now_s, limits)
            table = closing.joined(table, on, self.histograms, processes, holdings, start, limits)
            self._publish(ENGINE_WINDOWS, "engine", start, engines.by_pool(table, holdings))
            if start in new:
                near, left_out = neighbours(table, holdings, processes, limits.neighbours_max)
                self.count("overflow_neighbours_total", left_out)
                seen = closing.observed(table, holdings, near)
                found = self.interference.step(start, seen, limits) if seen else {}
                judged = {pool: _with_arrays(INTERFERENCE_WINDOWS, columns) for pool, columns in found.items()}
                self._publish(INTERFERENCE_WINDOWS, "interference", start, judged)

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
        none, held = np.zeros(0, np.int64), self.holdings.held_codes()
        self.gpu_samples.prune(horizon - gap_s, horizon - grace_s, gpus.STATUS, none)
        self.engine_samples.prune(horizon - gap_s, horizon - grace_s, engines.STATUS, held)
        self.processes.prune(horizon - SPEAKS_S, horizon - grace_s)
        self.histograms.prune(horizon - gap_s, horizon - grace_s, held)
        sampled = set(self.engine_samples.last) | {int(code) // GPUS_MAX for code in self.gpu_samples.last}
        sampled |= self.histograms.replicas() | {node for node, _, _ in self.processes.names.values()}
        labelled = self.engine_samples.distinct(engines.POOL)
        self.holdings.prune(horizon, now_s - self.limits.inventory_stale_s - 2 * grace_s, sampled, labelled)
        texts = [self.engine_samples.distinct(engines.AT[name]) for name in engines.TEXTS]
        self.texts.prune(np.concatenate((*texts, self.processes.texts())))
        self.emitted = {key: mark for key, mark in self.emitted.items() if mark[0] >= horizon}
        for id, _ in _older(self.batches, int(now_s - 2 * grace_s)):
            del self.batches[id]

    # -- state -----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """See BaseFold."""
        return {
            "holdings": self.holdings.state(),
            "texts": self.texts.state(),
            "gpu_samples": self.gpu_samples.state(),
            "engine_samples": self.engine_samples.state(),
            "processes": self.processes.state(),
            "histograms": self.histograms.state(),
            "interference": self.interference.state(),
            "batches": self.batches,
            "next_close": self.next_close,
            "horizon": self.horizon,
            "gpu_dirty": self.gpu_dirty,
            "engine_dirty": self.engine_dirty,
            "slow_dirty": self.slow_dirty,
            "emitted": self.emitted,
        }

    def restore(self, state: dict[str, Any], version: int) -> None:
        """See BaseFold."""
        self.holdings.restore(state["holdings"])
        self.texts.restore(state["texts"])
        self.gpu_samples.restore(state["gpu_samples"])
        self.engine_samples.restore(state["engine_samples"])
        self.processes.restore(state["processes"])
        self.histograms.restore(state["histograms"])
        self.interference.restore(state["interference"])
        self.batches, self.emitted = state["batches"], state["emitted"]
        self.next_close, self.horizon = state["next_close"], state["horizon"]
        self.gpu_dirty, self.engine_dirty = state["gpu_dirty"], state["engine_dirty"]
        self.slow_dirty = state["slow_dirty"]

    def metrics(self) -> dict[str, float]:
        """Counters, and how much is held."""
        found = super().metrics()
        for name, n in self.interference.counters.items():
            found[name] = found.get(name, 0.0) + n
        return {
            **found,
            "nodes": float(len(self.holdings.nodes)),
            "replicas": float(len(self.holdings.replicas)),
            "processes": float(len(self.processes.names)),
            "gpu_samples": float(self.gpu_samples.size),
            "engine_samples": float(self.engine_samples.size),
            "histogram_samples": float(self.histograms.size),
        }


def _older(batches: dict[str, list[int]], second: int) -> list[tuple[str, list[int]]]:
    found = []
    for item in batches.items():  # by log time: the first that is young ends it
        if item[1][1] >= second:
            break
        found.append(item)
    return found


def _with_arrays(kind: Columns, columns: dict[str, Any]) -> dict[str, Any]:
    """Columns with lists of numbers as arrays, in which NaN is unknown."""
    numbers = [name for name in columns if kind.columns[name].type in ("f64", "i64")]
    return {**columns, **{name: np.array(columns[name], np.float64) for name in numbers}}
