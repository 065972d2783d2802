"""The windows of one pool: what each source said of each, merged by greatest version.

A record replaces what its source said before of that window; sources add up. Kept per window: sums of the requests,
usage per tenant, allocated and busy GPU seconds per GPU type. Rows per replica and histograms are kept for the newest
windows only. Windows are dropped when no source can revise them any more, and at `KEEP_MAX` in any case.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from models.pool.gpus import faults
from schemas.columns import Batch
from schemas.errors import InvalidRecord
from schemas.signals import WindowName

SIZE_S = 10
KEEP_MAX = 1000
"""Windows of one pool that are kept at most (2.8 h): the longest outage of a level below that is billed exactly."""
SLACK_S = 120
"""Windows are kept for the grace and this much longer: a revision still has to come through two topics."""
DETAIL = 9
"""Newest windows of which rows per replica, GPUs and histograms are kept."""
VALUE_MAX = 1e15
"""Counts and sums in one row beyond this are refused."""
TENANT_ROWS_MAX = 200_000
"""Usage rows (tenant x source x window) of one pool; beyond, the oldest windows are dropped early."""

SUMS = (
    "arrivals",
    "ends",
    "slo_judged",
    "slo_good",
    "input_tokens",
    "output_tokens",
    "ttft_s_sum",
    "ttft_count",
    "arrival_input_tokens",
)
ARRIVALS, ENDS, JUDGED, GOOD, INPUT, OUTPUT, TTFT_S, TTFT_N, ARRIVAL_INPUT = range(len(SUMS))
USAGE = ("ends", "input_tokens", "cached_tokens", "output_tokens")

REPLICA = (
    "gpus",
    "allocated_s",
    "covered_s",
    "last_at_s",
    "running_mean",
    "waiting_mean",
    "running_last",
    "waiting_last",
    "kv_usage_ratio_mean",
    "prompt_tokens",
    "requests",
    "iterations",
    "ttft_s_sum",
    "ttft_count",
    "tpot_s_sum",
    "tpot_count",
    "billed",
    "loading_s",
    "resets",
    "kv_usage_ratio_max",
    "kv_capacity_tokens",
    "running_max",
    "cached_tokens",
    "generation_tokens",
    "preemptions",
    "itl_s_sum",
    "itl_count",
    "queue_s_sum",
    "queue_count",
    "prefill_s_sum",
    "prefill_count",
    "sm_clock_ratio_mean",
    "throttled_s",
    "answers",
)
R = {name: i for i, name in enumerate(REPLICA)}
STATE, GPU_TYPE, NODE = len(REPLICA), len(REPLICA) + 1, len(REPLICA) + 2
Row = list[Any]
"""One replica in one window: the numbers of `REPLICA` (None = unknown), then state, GPU type, node."""
SUSPECT = ("victim", "slowdown", "slowdown_low", "slowdown_high", "unexplained", "pressure", "graded")
S = {name: i for i, name in enumerate(SUSPECT)}
ANTAGONIST, ANTAGONIST_POOL = len(SUSPECT), len(SUSPECT) + 1
"""What level 1 says of a replica that may suffer: the numbers of `SUSPECT` (None = unknown), then by whom, of which
pool."""


class Window:
    """One window: what its sources said, and what was billed for it."""

    __slots__ = ("dirty", "emitted", "engines", "prices", "requests", "usd")

    def __init__(self) -> None:
        self.requests: dict[str, list[Any]] = {}
        """source -> [version, sums, tenant -> usage]."""
        self.engines: dict[str, list[Any]] = {}
        """source -> [version, GPU type -> [GPU seconds allocated, ... of these busy]]."""
        self.prices: dict[str, float] = {}
        """GPU type -> USD per GPU hour at its first billing: a later price does not rewrite the past."""
        self.usd: float | None = None
        """What the totals hold for it."""
        self.dirty = True
        self.emitted = False

    def sums(self) -> list[float]:
        """The columns of `SUMS` over all sources."""
        total = [0.0] * len(SUMS)
        for _, sums, _ in self.requests.values():
            for i, value in enumerate(sums):
                total[i] += value
        return total

    def arrivals(self) -> float:
        """Arrivals over all sources."""
        total = 0.0
        for _, sums, _ in self.requests.values():
            total += sums[ARRIVALS]
        return total

    def state(self) -> list[Any]:
        """As plain values."""
        return [self.requests, self.engines, self.prices, self.usd, self.dirty, self.emitted]

    @classmethod
    def of(cls, state: list[Any]) -> Window:
        """From `state`."""
        window = cls()
        window.requests, window.engines, window.prices, window.usd, window.dirty, window.emitted = state
        return window


class Windows:
    """All windows of one pool that can still change, and the newest in detail."""

    __slots__ = (
        "by_start", "dead", "engine_until", "first_engine_s", "floor_s", "gpus", "hists", "request_until", "rows",
        "suspects", "unjoined",
    )  # fmt: skip

    def __init__(self) -> None:
        self.by_start: dict[int, Window] = {}
        self.rows: dict[int, dict[str, list[Any]]] = {}
        """start -> source -> [version, replica -> Row]."""
        self.hists: dict[int, dict[str, list[Any]]] = {}
        """start -> source -> [version, TTFT pairs, TPOT pairs], of closed windows."""
        self.gpus: dict[int, dict[str, list[Any]]] = {}
        """start -> source -> [version, sum of util x covered s, covered s, what is wrong (gpus.faults), GPUs]."""
        self.suspects: dict[int, dict[str, list[Any]]] = {}
        """start -> source -> [version, replica -> numbers of `SUSPECT`, then its antagonist and that one's pool]."""
        self.dead: dict[str, list[str]] = {}
        """source -> replicas whose engine does not answer, by its latest word."""
        self.unjoined: dict[str, list[float]] = {}
        """source -> [log time, ends in the window] where only the reporter that does not count was heard of."""
        self.request_until: dict[str, float] = {}
        """source -> log time up to which it has been heard, Unix s."""
        self.engine_until: dict[str, float] = {}
        self.floor_s = 0
        """Windows that start before this were dropped."""
        self.first_engine_s = 0.0

    # -- taking ----------------------------------------------------------------------------------------------

    def window(self, start_s: int) -> Window | None:
        """The window that starts at `start_s`, made when new; None where it was dropped."""
        found = self.by_start.get(start_s)
        if found is None and start_s >= self.floor_s:
            found = self.by_start[start_s] = Window()
        return found

    def take_requests(self, name: WindowName, batch: Batch) -> bool:
        """Rows per (model, tenant, class, priority) of one source, added up: each request is in one of them. False:
        nothing newer than what is known, too old, or nothing that counts."""
        counted = (batch.numbers["arrivals"] + batch.numbers["ends"]).any()
        unjoined = float(np.nansum(batch.numbers["unjoined"]))
        if unjoined and not counted:  # no word of those whose word counts is no word that there was nothing
            self.unjoined[name.source] = [name.until_s, unjoined]
            return False
        self.request_until[name.source] = max(name.until_s, self.request_until.get(name.source, 0.0))
        window = self.window(name.start_s)
        if window is None or _known(window.requests, name):
            return False
        columns = [batch.numbers[column].tolist() for column in SUMS]
        # NaN only in arrival_input_tokens: unknown sizes add nothing, the mean is then taken over the ends
        columns[ARRIVAL_INPUT] = [0.0 if math.isnan(v) else v for v in columns[ARRIVAL_INPUT]]
        usage: dict[str, list[float]] = {}
        values = [batch.numbers[column].tolist() for column in USAGE]
        for tenant, *row in zip(batch.text("tenant"), *values, strict=True):
            if not any(row):
                continue
            known = usage.get(str(tenant))
            usage[str(tenant)] = row if known is None else [a + b for a, b in zip(known, row, strict=True)]
        _check(columns + values)
        window.requests[name.source] = [name.version, [math.fsum(column) for column in columns], usage]
        window.dirty = True
        if name.closed:
            pairs = [_merge_pairs(batch.pairs["ttft_s_hist"]), _merge_pairs(batch.pairs["tpot_s_hist"])]
            _put(self.hists, name, pairs)
        return True

    def take_engines(self, name: WindowName, batch: Batch) -> bool:
        """Rows per replica of one source. False: nothing newer than what is known, or too old."""
        self.engine_until[name.source] = max(name.until_s, self.engine_until.get(name.source, 0.0))
        self.first_engine_s = self.first_engine_s or name.until_s
        window = self.window(name.start_s)
        if window is None or _known(window.engines, name):
            return False
        raw = [batch.numbers[column].tolist() for column in REPLICA]
        _check(raw)
        columns = [_optional(column) for column in raw]
        rows: dict[str, Row] = {}
        usage: dict[str, list[float]] = {}
        gpu_types, nodes = batch.text("gpu_type"), batch.text("node")
        lines = zip(
            batch.text("replica"), batch.text("state"), gpu_types, nodes, zip(*columns, strict=True), strict=True
        )
        for replica, state, gpu_type, node, numbers in lines:
            row = [*numbers, state, gpu_type, node]
            _join(rows, str(replica), row)
            gpu_s = row[R["gpus"]] * row[R["allocated_s"]]
            used = usage.setdefault(gpu_type or "", [0.0, 0.0])
            used[0] += gpu_s
            # a replica is busy in proportion to the time with anything running
            used[1] += gpu_s * min(1.0, row[R["running_mean"]] or 0.0)
        window.engines[name.source] = [name.version, usage]
        window.dirty = True
        dead = [replica for replica, row in rows.items() if row[R["answers"]] == 0]
        if dead or name.source in self.dead:
            self.dead[name.source] = dead
        _put(self.rows, name, [rows])
        return True

    def take_gpus(self, name: WindowName, batch: Batch) -> None:
        """Rows per GPU of one source."""
        util, covered = batch.numbers["util_gpu_pct_mean"], batch.numbers["covered_s"]
        known = util == util  # not NaN
        weighted = float((util[known] * covered[known]).sum())
        _put(self.gpus, name, [weighted, float(covered[known].sum()), faults(batch), batch.rows])

    def take_interference(self, name: WindowName, batch: Batch) -> None:
        """Rows per replica of one source."""
        columns = [_optional(batch.numbers[column].tolist()) for column in SUSPECT]
        whose = (batch.text("antagonist"), batch.text("antagonist_pool"))
        rows = [list(row) for row in zip(*columns, *whose, strict=True)]
        _put(self.suspects, name, [dict(zip(batch.text("replica"), rows, strict=True))])

    # -- reading ---------------------------------------------------------------------------------------------

    def replicas(self, now_s: float, stale_s: float) -> dict[str, Row]:
        """Every replica by its newest row, of sources heard within `stale_s`; gone ones are not in it."""
        newest: dict[str, int] = {}
        for start in self.rows:
            for source in self.rows[start]:
                newest[source] = max(start, newest.get(source, start))
        found: dict[str, Row] = {}
        at: dict[str, int] = {}
        for source, start in newest.items():
            if now_s - self.engine_until.get(source, 0.0) <= stale_s and now_s - start <= stale_s + SIZE_S:
                for replica, row in self.rows[start][source][1].items():
                    # the same replica in windows apart has moved; in one it lies on several nodes
                    if at.get(replica, start) == start:
                        _join(found, replica, row)
                    elif start > at[replica]:
                        found[replica] = row
                    at[replica] = max(start, at.get(replica, start))
        return found

    def rows_of(self, start_s: int) -> dict[str, Row]:
        """Every replica's row of one window."""
        found: dict[str, Row] = {}
        for _, rows in self.rows.get(start_s, {}).values():
            for replica, row in rows.items():
                _join(found, replica, row)
        return found

    def suspects_of(self, start_s: int) -> dict[str, list[Any]]:
        """What level 1 says of replicas that may suffer, in one window."""
        found: dict[str, list[Any]] = {}
        for _, rows in self.suspects.get(start_s, {}).values():
            found.update(rows)
        return found

    def totals(self, start_s: int, end_s: int) -> list[float]:
        """The columns of `SUMS` over all windows that start in [start, end)."""
        total = [0.0] * len(SUMS)
        for start in range(start_s - start_s % SIZE_S, end_s, SIZE_S):
            window = self.by_start.get(start)
            if window is not None and start >= start_s:
                for i, value in enumerate(window.sums()):
                    total[i] += value
        return total

    def rate_rps(self, until_s: float, span_s: int = 60) -> float:
        """Mean arrivals per s over the `span_s` up to `until_s`; the first window counts by its share."""
        first_s = until_s - span_s
        start = int(first_s // SIZE_S) * SIZE_S
        total = 0.0
        share = (start + SIZE_S - first_s) / SIZE_S
        while start < until_s:
            window = self.by_start.get(start)
            if window is not None:
                total += window.arrivals() * share
            share = 1.0
            start += SIZE_S
        return total / span_s

    def source_arrivals(self, source: str, until_s: float) -> float:
        """Arrivals of one source in the 60 s before `until_s`."""
        total = 0.0
        last = int(until_s // SIZE_S) * SIZE_S
        for start in range(last - 60, last, SIZE_S):
            window = self.by_start.get(start)
            if window is not None and source in window.requests:
                total += window.requests[source][1][ARRIVALS]
        return total

    def unbilled(self, known: list[int]) -> list[int]:
        """Starts of windows without a bill although replicas were heard of, and not in `known`: to be billed anew."""
        found = []
        for start, window in self.by_start.items():
            if window.usd is None and window.engines and start not in known:
                window.dirty = True
                found.append(start)
        return found

    # -- bounds ----------------------------------------------------------------------------------------------

    def drop(self, now_s: float, grace_s: float) -> int:
        """Drops what no source can revise any more; gives the number of windows that went before their time."""
        heard = min(self.request_until.values(), default=now_s)
        cut = min(now_s, heard) - grace_s - SLACK_S - SIZE_S
        early = 0
        for start in sorted(start for start in self.by_start if start < cut):
            if self.by_start[start].emitted and not self.by_start[start].dirty:
                self._drop(start)
        over = len(self.by_start) - KEEP_MAX
        usage = 0 if len(self.by_start) < 2 else self._usage_rows()
        for start in sorted(self.by_start):
            if over <= 0 and usage <= TENANT_ROWS_MAX:
                break
            usage -= sum(len(entry[2]) for entry in self.by_start[start].requests.values())
            over -= 1
            early += 1
            self._drop(start)
        for detail in (self.rows, self.hists, self.gpus, self.suspects):
            for start in sorted(detail)[:-DETAIL]:
                del detail[start]
        for present in (self.gpus, self.suspects):  # no word that all is well comes of what is no longer there
            for start in [start for start in present if start < now_s - DETAIL * SIZE_S]:
                del present[start]
        return early

    def _drop(self, start: int) -> None:
        del self.by_start[start]
        self.floor_s = max(self.floor_s, start + SIZE_S)

    def _usage_rows(self) -> int:
        return sum(len(entry[2]) for window in self.by_start.values() for entry in window.requests.values())

    # -- state -----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """As plain values."""
        state = {name: getattr(self, name) for name in self.__slots__}
        state["by_start"] = {start: window.state() for start, window in self.by_start.items()}
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """From `state`."""
        for name in self.__slots__:
            setattr(self, name, state[name])
        self.by_start = {start: Window.of(window) for start, window in state["by_start"].items()}


def _check(columns: list[list[float]]) -> None:
    """Raises InvalidRecord for a value that no fleet has: sums of it would leave the numbers that JSON can hold."""
    for column in columns:
        for value in column:
            if value > VALUE_MAX:
                raise InvalidRecord("out_of_bounds", "rows", value, f"send counts and sums below {VALUE_MAX:g}")


def _known(by_source: dict[str, list[Any]], name: WindowName) -> bool:
    known = by_source.get(name.source)
    return known is not None and bool(known[0] >= name.version)


def _put(store: dict[int, dict[str, list[Any]]], name: WindowName, values: list[Any]) -> None:
    """Keeps the greatest version in a store of the newest windows; an older window is no longer of interest."""
    if len(store) >= DETAIL and name.start_s < min(store):
        return
    known = store.setdefault(name.start_s, {})
    if not _known(known, name):
        known[name.source] = [name.version, *values]


def _join(rows: dict[str, Row], replica: str, row: Row) -> None:
    known = rows.get(replica)
    rows[replica] = row if known is None else joined(known, row)


def joined(a: Row, b: Row) -> Row:
    """Rows of one replica on several nodes, or known to an inventory here and to a scraper there, as one.

    GPUs add up, the time allocated is such that GPUs x time is the sum of both, and what the engine says comes from the
    row that has samples (the later ones, where both have). One node that is slow or loads makes the replica so.
    """
    first, other = (a, b) if _freshness(a) >= _freshness(b) else (b, a)
    row = list(first)
    gpus = a[R["gpus"]] + b[R["gpus"]]
    gpu_s = sum(x[R["gpus"]] * x[R["allocated_s"]] for x in (a, b))
    row[R["gpus"]] = gpus
    row[R["allocated_s"]] = gpu_s / gpus if gpus > 0 else max(a[R["allocated_s"]], b[R["allocated_s"]])
    for name, worst in (
        ("billed", max), ("loading_s", max), ("throttled_s", max), ("sm_clock_ratio_mean", min), ("answers", min),
    ):  # fmt: skip
        row[R[name]] = worst((x[R[name]] for x in (a, b) if x[R[name]] is not None), default=None)
    if first[STATE] == "unknown":
        row[STATE] = other[STATE]
    if not first[R["gpus"]] and other[R["gpus"]]:
        row[NODE] = other[NODE]
    row[GPU_TYPE] = first[GPU_TYPE] or other[GPU_TYPE]
    return row


def _freshness(row: Row) -> tuple[float, float, str]:
    last_s = row[R["last_at_s"]]
    return row[R["covered_s"]] or 0.0, -1.0 if last_s is None else last_s, row[NODE]


def _optional(values: list[float]) -> list[float | None]:
    return [None if value != value else value for value in values]


def _merge_pairs(rows: list[Any]) -> list[int]:
    """Sparse histograms added up: (bucket, count, bucket, count, ...) in order of bucket."""
    total: dict[int, int] = {}
    for row in rows:
        if row is not None:
            flat = row.tolist()
            for bucket, count in zip(flat[::2], flat[1::2], strict=True):
                total[bucket] = total.get(bucket, 0) + count
    return [value for bucket in sorted(total) for value in (bucket, total[bucket])]
