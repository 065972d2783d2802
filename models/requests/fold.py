"""The fold of the requests level: arrivals and ends of one partition in, partial windows per pool out.

Log request.traces; results pool.signals. An arrival counts in the window of its arrival, an end in that of its end.
A row is named by (event, request_id); the first content of a name wins. Open windows are published at each second of
log time in which they have changed, without histograms; closed ones with them, and again when a late row has changed
them. An end too late for its window is still billed: as a correction (counts and tokens) in the window open now.
Version of everything: the offset of the record that made log time pass the second.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from models.fold import BaseFold
from models.requests.ids import SeenIds, row_contents, row_names
from models.requests.judging import LATENCIES, Rows
from models.requests.window import RequestWindow
from models.sketches import bucket_of
from models.windows import WINDOW_S, closed, final, window_result, window_starts
from schemas.base import Record
from schemas.columns import Batch
from schemas.config import ConfigObject, PoolSpec
from schemas.log import LogRecord
from schemas.requests import REQUEST_ROWS
from schemas.signals import REQUEST_WINDOWS
from schemas.topics import REQUEST_TRACES, TOPICS

UNKNOWN_TENANT, DEFAULT_CLASS = "unknown", "default"
RETENTION_S = TOPICS[REQUEST_TRACES].retention_ms / 1000
"""Rows older than what their topic keeps are nobody's usage any more, s."""
_GENERATIONS = 3


class RequestsFold(BaseFold):
    """One partition of request.traces."""

    level = "requests"
    BOUNDS: ClassVar[tuple[tuple[str, str, str], ...]] = (
        ("windows", "grace_requests_s", "late_rows_total"),
        ("ids.generations", "request_ids_max", "overflow_request_ids_total"),
        ("targets", "config_objects_max", "dead_overflow_total"),
    )
    """(container, setting that bounds it, metric that counts what the bound kept out). Each window holds at most
    pools_max pools of tenants_max (tenant, class) pairs (overflow_tenants_total)."""

    def __init__(self, topic: str, partition: int, partitions: dict[str, int]) -> None:
        super().__init__(topic, partition, partitions)
        self.handlers = {REQUEST_ROWS.type: self._rows}
        self.windows: dict[int, RequestWindow] = {}
        """Start (Unix s) -> window."""
        self.floor_s = 0
        """Windows that start before this (Unix s) are forgotten: what falls in one is late, also by a longer grace."""
        self.ids = SeenIds()
        self.targets: dict[str, tuple[float, float]] = {}
        """Pool -> (TTFT, TPOT) targets in s."""

    def on_config(self, item: ConfigObject, spec: Record | None) -> None:
        """Takes the targets of pools."""
        if item.object_kind != "pool":
            return
        if isinstance(spec, PoolSpec):
            self.targets[item.name] = (spec.slo_ttft_s, spec.slo_tpot_s)
        else:
            self.targets.pop(item.name, None)

    # -- rows ------------------------------------------------------------------------------------------------

    def _rows(self, record: LogRecord, batch: Batch) -> None:
        batch = self.check_times(record, batch, RETENTION_S)
        now_s = self.log_ms / 1000
        oldest_s = max(now_s - self.limits.grace_requests_s, float(self.floor_s))
        late = batch.numbers["at_s"] < oldest_s
        if late.any():
            batch = self._late(record, batch, late)
            late = batch.numbers["at_s"] < oldest_s
        if not batch.rows:
            return
        fresh = self._fresh(record, batch)
        if not fresh.all():
            batch, late = batch.keep(fresh), late[fresh]
        if batch.rows:
            self.count("corrected_rows_total", int(late.sum()))
            self._sum(record, batch, late, np.where(late, now_s, batch.numbers["at_s"]))

    def _late(self, record: LogRecord, batch: Batch, late: np.ndarray) -> Batch:
        """Refuses late arrivals: an arrival bills nothing. Late ends stay."""
        self.count("late_rows_total", int(late.sum()))
        is_arrival = np.array([value == "arrival" for value in batch.values["event"]])[batch.codes["event"]]
        refused = late & is_arrival
        if not refused.any():
            return batch
        remedy = f"send within {self.limits.grace_requests_s:g} s; log time is {self.log_ms / 1000:.3f}"
        shown = float(batch.numbers["at_s"][refused][0])
        return self.refuse_rows(record, batch, refused, "too_late", "event", shown, remedy)

    def _fresh(self, record: LogRecord, batch: Batch) -> np.ndarray:
        """Which rows are new; those that contradict a known one go to dead.letters."""
        seen, forgotten = self.ids.take(
            row_names(batch), row_contents(batch), self.log_ms // 1000, self._span_s(), self.limits.request_ids_max
        )
        self.count("overflow_request_ids_total", forgotten)
        conflicts = int(seen.conflict.sum())
        self.count("duplicate_rows_total", batch.rows - int(seen.fresh.sum()) - conflicts)
        if conflicts:
            shown = batch.values["request_id"][int(batch.codes["request_id"][seen.conflict][0])]
            remedy = "(event, request_id) came before with other content: the first was taken; use each id once"
            self.refuse_rows(record, batch, seen.conflict, "conflict", "request_id", shown, remedy)
        return seen.fresh

    def _span_s(self) -> int:
        return max(1, int(self.limits.grace_requests_s) // _GENERATIONS)

    def _sum(self, record: LogRecord, batch: Batch, late: np.ndarray, at_s: np.ndarray) -> None:
        """Adds rows to the windows of `at_s`."""
        starts = window_starts(at_s)
        codes = [batch.codes[name] for name in ("pool", "tenant", "class")]
        sizes = [len(batch.values[name]) + 1 for name in ("pool", "tenant", "class")]
        first = int(starts.min())
        key = (starts - first) // WINDOW_S
        for code, size in zip(codes, sizes, strict=True):
            key = key * size + code + 1
        groups, inverse = np.unique(key, return_inverse=True)
        cells = np.empty(len(groups), np.int64)
        window_of = np.empty(len(groups), np.int64)
        overflowed: dict[str, list[int]] = {}
        for number, group in enumerate(groups.tolist()):
            group, kind = divmod(group, sizes[2])
            group, tenant = divmod(group, sizes[1])
            index, pool = divmod(group, sizes[0])
            start = window_of[number] = first + index * WINDOW_S
            window = self.windows.get(start)
            if window is None:
                window = self.windows[start] = RequestWindow()
            cells[number], metric = window.cell(
                batch.values["pool"][pool - 1],
                (tenant and batch.values["tenant"][tenant - 1]) or UNKNOWN_TENANT,
                (kind and batch.values["class"][kind - 1]) or DEFAULT_CLASS,
                self.limits.pools_max,
                self.limits.tenants_max,
            )
            if metric:
                overflowed.setdefault(metric, []).append(number)
        for metric, numbers in overflowed.items():
            self.count(metric, int(np.isin(inverse, numbers).sum()))
        taken = cells >= 0
        if not taken.all():
            refused = ~taken[inverse]
            shown = batch.values["pool"][int(batch.codes["pool"][refused][0])]
            remedy = f"at most {self.limits.pools_max} pools a partition (limits.pools_max)"
            self.refuse_rows(record, batch, refused, "overflow", "pool", shown, remedy)
        self._add(Rows(batch, late, self.targets), inverse, cells, window_of)

    def _add(self, rows: Rows, inverse: np.ndarray, cells: np.ndarray, window_of: np.ndarray) -> None:
        """Sums by group (in record order), then into each group's window; a group without a cell is left out."""
        sums = np.array([np.bincount(inverse, stat, len(cells)) for stat in rows.stats])
        windows, row_cells = window_of[inverse], cells[inverse]
        taken = cells >= 0
        for start in np.unique(window_of).tolist():
            window = self.windows[start]
            groups = (window_of == start) & taken
            window.add(cells[groups], sums[:, groups])
            mine = (windows == start) & (row_cells >= 0)
            for number, name in enumerate(LATENCIES):
                known = mine & ~np.isnan(rows.latencies[name])
                if known.any():
                    window.observe(row_cells[known], number, bucket_of(rows.latencies[name][known]))

    # -- windows ---------------------------------------------------------------------------------------------

    def on_second(self, second: int, before: int) -> None:
        """Publishes what has changed, and all of the windows that close now; forgets what nothing can change."""
        now_s = self.log_ms / 1000
        for start in sorted(self.windows):
            window = self.windows[start]
            if start > now_s:
                break  # rows from a clock ahead of ours: their window has not begun
            is_closed = window.closed or closed(start, now_s, self.limits.lateness_s)
            pools = window.pools if is_closed and not window.closed else window.dirty
            for pool in pools:
                data = window.columns(pool, is_closed)
                self._out.append(window_result(self, REQUEST_WINDOWS, "request", pool, start, is_closed, data))
            window.closed = is_closed
            window.dirty = {}
            if final(start, now_s, self.limits.grace_requests_s):
                del self.windows[start]
                self.floor_s = max(self.floor_s, start + WINDOW_S)
        self.ids.prune(second, self.limits.grace_requests_s)

    # -- state -----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """See BaseFold."""
        return {
            "floor_s": self.floor_s,
            "windows": {start: window.state() for start, window in self.windows.items()},
            "ids": self.ids.state(),
            "targets": self.targets,
        }

    def restore(self, state: dict[str, Any], version: int) -> None:
        """See BaseFold."""
        self.windows = {start: RequestWindow.of(window) for start, window in state["windows"].items()}
        self.floor_s = state["floor_s"]
        self.ids.restore(state["ids"])
        self.targets = {pool: (ttft, tpot) for pool, (ttft, tpot) in state["targets"].items()}

    def metrics(self) -> dict[str, float]:
        """Counters, and how much is held."""
        return {
            **super().metrics(),
            "request_windows": float(len(self.windows)),
            "request_ids": float(len(self.ids)),
        }
