"""The fold of the requests level: arrivals and ends of one partition in, partial windows per pool out.

Log request.traces; results pool.signals. An arrival counts in the window of its arrival, an end in that of its end.
A row is named by (event, request_id, attempt, reporter); the first content of a name wins. Every attempt that reached
the pool is an arrival; `retries` says how many of them were not the first. Open windows are published at each second
of log time in which they have changed, without histograms; closed ones with them, and again when a late row has changed
them. An end too late for its window is still billed: as a correction (counts and tokens) in the window open now.
Version of everything: the offset of the record that made log time pass the second.

Who counts: the rows of the reporter that the pool's policy names. Ends of the other one add what is missing to the same
request (twins.py), in whatever order the two come; where the first is not here they are counted apart (`unjoined`), and
are never added: ids that cannot be joined would count each request twice. Silence of the named reporter is not made up
for by the other: no window comes, and the pool level says so. Ends are kept for their twins from the moment that both
reporters have been heard of the pool; of requests before that, the other's ends stay unjoined.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from models.fold import BaseFold
from models.requests import twins
from models.requests.grouping import UNKNOWN, Groups
from models.requests.heavy import Heavy
from models.requests.ids import SeenIds, by_engine, row_contents, row_names, twin_names
from models.requests.judging import LATENCIES, F, ends, stats, table
from models.requests.twins import CELL, Twins
from models.requests.window import Label, RequestWindow
from models.sketches import bucket_of
from models.windows import WINDOW_S, closed, final, window_result, window_starts
from schemas.base import Record
from schemas.columns import Batch
from schemas.config import ConfigObject, PoolSpec, TenantSpec
from schemas.log import LogRecord
from schemas.requests import REQUEST_ROWS
from schemas.signals import REQUEST_WINDOWS
from schemas.topics import REQUEST_TRACES, TOPICS

RETENTION_S = TOPICS[REQUEST_TRACES].retention_ms / 1000
"""Rows older than what their topic keeps are nobody's usage any more, s."""
_GENERATIONS = 3
_NO_TARGETS = (float("nan"), float("nan"))


class RequestsFold(BaseFold):
    """One partition of request.traces."""

    level = "requests"
    format: ClassVar[int] = 2
    reads: ClassVar[tuple[int, ...]] = (2,)
    BOUNDS: ClassVar[tuple[tuple[str, str, str], ...]] = (
        ("windows", "grace_requests_s", "late_rows_total"),
        ("ids.generations", "request_ids_max", "overflow_request_ids_total"),
        ("twins.rows", "request_twins_max", "overflow_twins_total"),
        ("twins.texts", "request_twins_max", "overflow_twins_total"),
        ("twins.vocabulary", "request_twins_max", "overflow_twins_total"),
        ("both", "pools_max", "overflow_pools_total"),
        ("heavy", "pools_max", "overflow_pools_total"),
        ("specs", "config_objects_max", "dead_overflow_total"),
        ("tiers", "config_objects_max", "dead_overflow_total"),
    )
    """(container, setting that bounds it, metric that counts what the bound kept out). Each window holds at most
    pools_max pools of tenants_max rows, and one for each tenant that is kept (overflow_tenants_total): those of the
    configuration and fewer than tenants_max heavy ones."""

    def __init__(self, topic: str, partition: int, partitions: dict[str, int]) -> None:
        super().__init__(topic, partition, partitions)
        self.handlers = {REQUEST_ROWS.type: self._rows}
        self.windows: dict[int, RequestWindow] = {}
        """Start (Unix s) -> window."""
        self.floor_s = 0
        """Windows that start before this (Unix s) are forgotten: what falls in one is late, also by a longer grace."""
        self.ids = SeenIds()
        self.twins = Twins()
        self.both: dict[str, int] = {}
        """Pool -> when the reporter that only enriches was last heard of it, Unix s."""
        self.heavy: dict[str, Heavy] = {}
        """Pools that had more rows than a window may have."""
        self.specs: dict[str, PoolSpec] = {}
        """Pool -> policy; rebuilt from the configuration."""
        self.tiers: dict[str, str] = {}
        """Tenant -> tier; rebuilt from the configuration."""

    def on_config(self, item: ConfigObject, spec: Record | None) -> None:
        """Takes the policies of pools and the tiers of tenants."""
        if item.object_kind == "pool":
            self.specs.pop(item.name, None)
            if isinstance(spec, PoolSpec):
                self.specs[item.name] = spec
        elif item.object_kind == "tenant":
            self.tiers.pop(item.name, None)
            if isinstance(spec, TenantSpec):
                self.tiers[item.name] = spec.tier

    def _targets(self, pool: str, tenant: str) -> tuple[float, float]:
        """(TTFT, TPOT) targets in s: those of the tenant's tier where the pool has any, else the pool's; else NaN."""
        spec = self.specs.get(pool)
        if spec is None:
            return _NO_TARGETS
        tier = spec.tiers.get(self.tiers.get(tenant, ""))
        if tier is None:
            return spec.slo_ttft_s, spec.slo_tpot_s
        ttft_s = spec.slo_ttft_s if tier.slo_ttft_s is None else tier.slo_ttft_s
        return ttft_s, spec.slo_tpot_s if tier.slo_tpot_s is None else tier.slo_tpot_s

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
        foreign = self._foreign(batch)
        wanted = fresh & (~foreign | ends(batch))  # an arrival has nothing to add
        self.count("foreign_rows_total", int((fresh & foreign).sum()))
        if not wanted.all():
            batch, late, foreign = batch.keep(wanted), late[wanted], foreign[wanted]
        if batch.rows:
            self.count("corrected_rows_total", int(late.sum()))
            self._count(record, batch, late, foreign, oldest_s)

    def _late(self, record: LogRecord, batch: Batch, late: np.ndarray) -> Batch:
        """Refuses late rows that bill nothing: arrivals, and what only enriches. Late ends stay."""
        self.count("late_rows_total", int(late.sum()))
        refused = late & (~ends(batch) | self._foreign(batch))
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
            remedy = (
                "(event, request_id, attempt, reporter) came before with other content: the first was taken; "
                "use each id once"
            )
            self.refuse_rows(record, batch, seen.conflict, "conflict", "request_id", shown, remedy)
        return seen.fresh

    def _span_s(self) -> int:
        return max(1, int(self.limits.grace_requests_s) // _GENERATIONS)

    def _foreign(self, batch: Batch) -> np.ndarray:
        """bool [rows]: reported by the one whose rows only enrich, by the pool's policy; without one the gateway's
        count."""
        specs = [self.specs.get(pool) for pool in batch.values["pool"]]
        engine_counts = np.array([spec is not None and spec.reporter == "engine" for spec in specs])
        found: np.ndarray = by_engine(batch) != engine_counts[batch.codes["pool"]]
        return found

    def _count(self, record: LogRecord, batch: Batch, late: np.ndarray, foreign: np.ndarray, oldest_s: float) -> None:
        """Counts rows in their windows, then looks for twins where both reporters are heard."""
        for pool in {batch.values["pool"][code]: None for code in batch.codes["pool"][foreign].tolist()}:
            if pool in self.both or len(self.both) < self.limits.pools_max:
                self.both[pool] = self.log_ms // 1000
        waiting = np.zeros(0, np.int64)
        if self.both:
            is_both = np.array([pool in self.both for pool in batch.values["pool"]])[batch.codes["pool"]]
            waiting = np.flatnonzero(is_both & ends(batch) & ~late)
        if len(waiting):
            # counted before, by another policy: what comes now only enriches
            own, theirs = twin_names(batch)
            foreign[waiting] |= self.twins.counted(self.twins.find(theirs[waiting], oldest_s))
        rows, cells = self._sum(record, batch, late, foreign)
        if len(waiting):
            waiting = waiting[cells[waiting] >= 0]
            stored = np.concatenate((rows, cells[None, :], np.zeros((1, batch.rows))))
            for chosen in (waiting[~foreign[waiting]], waiting[foreign[waiting]]):
                self._match(batch, chosen, stored, own, theirs, oldest_s)

    def _sum(
        self, record: LogRecord, batch: Batch, late: np.ndarray, foreign: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Adds rows to their windows, late ones to the one that is open now. Gives the rows as a table with targets,
        and the cell of each: -1 where it was refused."""
        groups = Groups(batch, np.where(late, self.log_ms / 1000, batch.numbers["at_s"]), foreign)
        rows = table(batch, foreign, late)
        counts = np.bincount(groups.inverse, minlength=len(groups)).tolist()
        found, targets = [], []
        for (start_s, pool, label), rows_of in zip(groups, counts, strict=True):
            found.append(self._cell(start_s, pool, label, rows_of))
            targets.append(self._targets(pool, label.tenant))
        cells = np.array(found, np.int64)
        rows[F["ttft_target_s"]], rows[F["tpot_target_s"]] = np.array(targets).T[:, groups.inverse]
        row_cells = cells[groups.inverse]
        if (cells < 0).any():
            refused = row_cells < 0
            shown = batch.values["pool"][int(batch.codes["pool"][refused][0])]
            remedy = f"at most {self.limits.pools_max} pools a partition (limits.pools_max)"
            self.refuse_rows(record, batch, refused, "overflow", "pool", shown, remedy)
        self._add(rows, groups.inverse, cells, groups.starts)
        return rows, row_cells

    def _cell(self, start_s: int, pool: str, label: Label, rows: int) -> int:
        """The cell that a window counts so many rows in; -1: one pool too many."""
        window = self.windows.get(start_s)
        if window is None:
            window = self.windows[start_s] = RequestWindow()
        heavy, most = self.heavy.get(pool), self.limits.tenants_max
        if heavy is None and (known := window.pools.get(pool, {}).get(label)) is not None:
            window.dirty[pool] = True
            return known
        if heavy is not None:
            heavy.add(label.tenant, rows, most)
        kept = label.tenant in self.tiers or (heavy is not None and label.tenant in heavy.kept)
        cell, metric = window.cell(pool, label, kept, self.limits.pools_max, most)
        if metric:
            self.count(metric, rows)
        if metric == "overflow_tenants_total":
            if heavy is None:
                heavy = self.heavy[pool] = Heavy()
            heavy.until_s = self.log_ms // 1000 + int(self.limits.grace_requests_s)
        return cell

    def _add(
        self, rows: np.ndarray, inverse: np.ndarray, cells: np.ndarray, window_of: np.ndarray, taken_off: bool = False
    ) -> None:
        """Adds rows by group (in record order) to each group's cell in its window, or takes them off again; a group
        without a cell is left out."""
        found, latencies = stats(rows)
        sums = np.array([np.bincount(inverse, stat, len(cells)) for stat in found])
        windows, row_cells = window_of[inverse], cells[inverse]
        taken = cells >= 0
        for start in np.unique(window_of).tolist():
            window = self.windows[start]
            groups = (window_of == start) & taken
            window.add(cells[groups], -sums[:, groups] if taken_off else sums[:, groups])
            mine = (windows == start) & (row_cells >= 0)
            for number in range(len(LATENCIES)):
                known = mine & ~np.isnan(latencies[number])
                if known.any():
                    window.observe(row_cells[known], number, bucket_of(latencies[number][known]), taken_off)

    # -- twins -----------------------------------------------------------------------------------------------

    def _match(
        self,
        batch: Batch,
        chosen: np.ndarray,
        rows: np.ndarray,
        own_names: np.ndarray,
        their_names: np.ndarray,
        oldest_s: float,
    ) -> None:
        """Joins the chosen rows, all counted already, with their twins; those without one wait for it."""
        places = self.twins.find(their_names[chosen], oldest_s)
        with_twin, alone = chosen[places >= 0], chosen[places < 0]
        if len(with_twin):
            self._join(rows[:, with_twin], self.twins.intern(batch, with_twin), places[places >= 0])
        if len(alone):
            most = self.limits.request_twins_max
            forgotten = self.twins.room(len(alone), most)
            texts = self.twins.intern(batch, alone)
            forgotten += self.twins.add(own_names[alone], rows[:, alone], texts, most)
            self.count("overflow_twins_total", forgotten)

    def _join(self, new: np.ndarray, new_texts: np.ndarray, places: np.ndarray) -> None:
        """Takes off what rows and their twins have counted as alone, and counts them as one."""
        known, known_texts = self.twins.take(places), self.twins.texts[:, places]
        is_own = new[F["foreign"]] == 0
        own, own_texts = np.where(is_own, new, known), np.where(is_own, new_texts, known_texts)
        other, other_texts = np.where(is_own, known, new), np.where(is_own, known_texts, new_texts)
        one = twins.merged(own, other)
        one_texts = np.where(own_texts < 0, other_texts, own_texts)
        told = (own_texts != one_texts).any(axis=0)
        one[F["enriched"]] = np.maximum(one[F["enriched"]], told)
        self._apart(own, taken_off=True)
        self._apart(other, taken_off=True)
        moved = (own[F["foreign"]] > 0) | told
        moved |= np.isnan(own[F["priority"]]) & ~np.isnan(one[F["priority"]])
        words = self.twins.words(one_texts)
        starts = window_starts(one[F["at_s"]]).tolist()
        for number in np.flatnonzero(moved).tolist():
            label = twins.label_of(words[number], float(one[F["priority"], number]), UNKNOWN)
            pool = str(words[number][0])
            one[CELL, number] = self._cell(starts[number], pool, label, 1)
            targets = self._targets(pool, label.tenant)
            one[[F["ttft_target_s"], F["tpot_target_s"]], number] = targets
        self._apart(one)
        others = window_starts(other[F["at_s"]]).tolist()
        for start, other_start, (name, *_) in zip(starts, others, words, strict=True):
            self.windows[start].dirty[str(name)] = self.windows[other_start].dirty[str(name)] = True

    def _apart(self, rows: np.ndarray, taken_off: bool = False) -> None:
        """Adds rows to their own cells, or takes them off."""
        each = np.arange(rows.shape[1])
        self._add(rows, each, rows[CELL].astype(np.int64), window_starts(rows[F["at_s"]]), taken_off)

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
        if second // WINDOW_S != before // WINDOW_S:
            self._forget(second, now_s)

    def _forget(self, second: int, now_s: float) -> None:
        """Once a window: twins that can no longer come, pools of one reporter, tenants that were heavy."""
        grace_s = self.limits.grace_requests_s
        self.count("unjoined_rows_total", self.twins.prune(now_s - grace_s))
        self.both = {pool: heard_s for pool, heard_s in self.both.items() if heard_s > now_s - grace_s}
        self.heavy = {pool: heavy for pool, heavy in self.heavy.items() if heavy.until_s > second}
        for heavy in self.heavy.values():
            heavy.step(self.limits.tenants_max)

    # -- state -----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """See BaseFold."""
        return {
            "floor_s": self.floor_s,
            "windows": {start: window.state() for start, window in self.windows.items()},
            "ids": self.ids.state(),
            "twins": self.twins.state(),
            "both": self.both,
            "heavy": {pool: heavy.state() for pool, heavy in self.heavy.items()},
        }

    def restore(self, state: dict[str, Any], version: int) -> None:
        """See BaseFold."""
        self.windows = {start: RequestWindow.of(window) for start, window in state["windows"].items()}
        self.floor_s = state["floor_s"]
        self.ids.restore(state["ids"])
        self.twins.restore(state["twins"])
        self.both = state["both"]
        self.heavy = {pool: Heavy.of(heavy) for pool, heavy in state["heavy"].items()}
        self.specs, self.tiers = {}, {}
        for plain in self.config.values():
            item = ConfigObject.model_validate(plain)
            self.on_config(item, None if item.deleted else item.typed())

    def metrics(self) -> dict[str, float]:
        """Counters, and how much is held."""
        return {
            **super().metrics(),
            "request_windows": float(len(self.windows)),
            "request_ids": float(len(self.ids)),
            "request_twins": float(len(self.twins)),
        }
