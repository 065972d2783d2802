"""Current rows: one table per result topic, kept by applying records. Pure: no Kafka, no Faust, no clock.

Results are upserts, so a row is replaced only by a greater version, and applying a record twice changes nothing.
The tables are any mutable mappings: plain dicts in tests and snapshots, Faust tables in the service.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, MutableMapping
from typing import Any

from schemas.base import Record
from schemas.columns import Batch
from schemas.config import ConfigObject
from schemas.costs import CostWindow
from schemas.deadletters import DeadLetter
from schemas.decisions import ENDED, AuditEntry, Decision, ExecutorResult, PoolStatus, Verdict
from schemas.errors import InvalidRecord
from schemas.findings import Finding
from schemas.forecasts import LoadForecast
from schemas.log import LogRecord
from schemas.signals import (
    ENGINE_WINDOWS,
    GPU_WINDOWS,
    INTERFERENCE_WINDOWS,
    NODE_WINDOWS,
    REQUEST_WINDOWS,
    WindowName,
)
from schemas.topics import ce_type
from views.history import History
from views.recent import RecentCosts, RecentRequests, Served
from views.records import WINDOW_S, batch_rows, decode_record, engine_means, letter_id

Row = dict[str, Any]
Table = MutableMapping[str, Row]

TABLES = {
    "gpus": "Latest window per GPU. Key: node/index.",
    "nodes": "Latest window per node and GPU type. Key: node/GPU type.",
    "replicas": "Latest window per replica. Key: pool/replica.",
    "interference": "Latest verdict per replica that shares a GPU. Key: pool/replica.",
    "pools": "Latest status per pool, with its cost of the last 300 s. Key: pool.",
    "tenants": "Cost and service of the last 300 s per pool and tenant. Key: pool/tenant.",
    "forecasts": "Latest load forecast per pool and horizon. Key: pool/horizon.",
    "findings": "What is wrong, and what was within the last hour. Key: pool/kind/subject.",
    "decisions": "Every decision in its present state. Key: decision id.",
}
"""Table -> what its rows are."""

GONE_S = 20
"""A replica or GPU that its own source no longer names for so long (log time) is gone."""
SILENT_S = 900
"""... and so is one whose source says nothing at all; until then its row stays, old as it is."""
OLD_S = 3600
"""Rows of pools, tenants, forecasts and closed findings older than this are dropped."""
LETTERS_MAX = 100
LETTER_IDS_MAX = 100_000


class Rows:
    """Tables, history and counts of a fleet.

    Attributes
    ----------
    tables: name in `TABLES` -> rows by key.
    history: pool -> its last hour.
    config: `kind/name` -> object of the greatest revision, deleted ones left out.
    paused: pool (None: the fleet) -> the accepted pause that holds.
    letters: the newest refused records, without their data; `refused`: rows by (topic, reason).
    counters: records by topic, rows that found no room, values that could not be decoded.
    log_ms: greatest log time seen.
    """

    def __init__(
        self,
        tables: Mapping[str, Table] | None = None,
        *,
        rows_max: int = 50_000,
        decisions_max: int = 1_000,
        history_s: int = 3600,
    ) -> None:
        self.tables: Mapping[str, Table] = {name: {} for name in TABLES} if tables is None else tables
        self.rows_max, self.decisions_max, self.history_s = rows_max, decisions_max, history_s
        self.history: dict[str, History] = {}
        self.requests, self.costs = RecentRequests(), RecentCosts()
        self.config: dict[str, ConfigObject] = {}
        self.paused: dict[str | None, Row] = {}
        self.letters: deque[Row] = deque(maxlen=LETTERS_MAX)
        self.refused: Counter[tuple[str, str]] = Counter()
        self.counters: Counter[str] = Counter()
        self.records: Counter[str] = Counter()
        self.log_ms = 0
        self._swept_s = 0
        self._revisions: dict[str, int] = {}
        self._pauses: dict[str | None, int] = {}
        self._letter_ids: dict[str, None] = {}
        self._extras: dict[str, Row] = {}
        self._newest: dict[tuple[str, str, str], int] = {}
        self._handlers = {
            GPU_WINDOWS.type: self._gpu_windows,
            NODE_WINDOWS.type: self._node_windows,
            ENGINE_WINDOWS.type: self._engine_windows,
            INTERFERENCE_WINDOWS.type: self._interference,
            REQUEST_WINDOWS.type: self._request_windows,
            ce_type(CostWindow.kind): self._cost,
            ce_type(LoadForecast.kind): self._forecast,
            ce_type(Finding.kind): self._finding,
            ce_type(Decision.kind): self._decision,
            ce_type(PoolStatus.kind): self._status,
            ce_type(Verdict.kind): self._verdict,
            ce_type(ExecutorResult.kind): self._executor_result,
            ce_type(ConfigObject.kind): self._config,
            ce_type(AuditEntry.kind): self._audit,
            ce_type(DeadLetter.kind): self._letter,
        }

    def apply(self, topic: str, record: LogRecord) -> None:
        """Takes one record of a topic (registry name). Never raises for what others sent."""
        self.records[topic] += 1
        self.log_ms = max(self.log_ms, record.at_ms)
        handler = self._handlers.get(record.type)
        if handler is not None and record.value:
            try:
                handler(record, decode_record(record))
            except InvalidRecord:
                self.counters["undecodable"] += 1
        if self.log_ms // 1000 >= self._swept_s + WINDOW_S:
            self._swept_s = self.log_ms // 1000
            self._sweep(self.log_ms / 1000)

    # -- upserts ---------------------------------------------------------------------------------------------

    def _put(self, table: str, key: str, row: Row) -> bool:
        """Keeps the row if it is newer than the one there; False where it is not, or where there is no room."""
        rows = self.tables[table]
        known = rows.get(key)
        if known is not None:
            if _order(known) >= _order(row):
                return False
        elif len(rows) >= self.rows_max:
            self.counters["rows_overflow"] += 1
            return False
        rows[key] = row
        return True

    def _window(self, batch: Batch, kind: str) -> tuple[WindowName, Row] | None:
        try:
            name = WindowName.of(batch.meta)
        except (KeyError, ValueError):
            self.counters["undecodable"] += 1
            return None
        if name.closed:
            at = (kind, name.pool, name.source)
            self._newest[at] = max(self._newest.get(at, 0), name.start_s)
        return name, name._asdict()

    def _gpu_windows(self, _: LogRecord, batch: Batch) -> None:
        if (found := self._window(batch, "gpus")) is None:
            return
        name, meta = found
        table = self.tables["gpus"]
        for cells in batch_rows(batch):
            key = f"{cells['node']}/{cells['gpu']}"
            known = table.get(key)
            # A GPU that several pools share comes once in each one's window.
            pools = dict(known["pools"]) if known else {}
            pools[name.pool] = max(pools.get(name.pool, 0), name.start_s)
            newest = max(pools.values())
            pools = {p: s for p, s in pools.items() if s >= newest - GONE_S}
            shared = {"pool": "+".join(sorted(pools)), "pools": pools}
            if not self._put("gpus", key, meta | cells | shared) and known and known["pools"] != pools:
                table[key] = known | shared

    def _engine_windows(self, _: LogRecord, batch: Batch) -> None:
        if (found := self._window(batch, "replicas")) is None:
            return
        name, meta = found
        for cells in batch_rows(batch):
            self._put("replicas", f"{name.pool}/{cells['replica']}", meta | cells | engine_means(cells))

    def _node_windows(self, _: LogRecord, batch: Batch) -> None:
        if (found := self._window(batch, "nodes")) is not None:
            for cells in batch_rows(batch):
                self._put("nodes", f"{cells['node']}/{cells['gpu_type']}", found[1] | cells)

    def _interference(self, _: LogRecord, batch: Batch) -> None:
        if (found := self._window(batch, "interference")) is not None:
            for cells in batch_rows(batch):
                self._put("interference", f"{found[0].pool}/{cells['replica']}", found[1] | cells)

    def _request_windows(self, _: LogRecord, batch: Batch) -> None:
        if (found := self._window(batch, "requests")) is None:
            return
        name, _meta = found
        tenants: dict[str, Served] = {}
        for cells in batch_rows(batch):
            served = Served(cells["ends"], cells["slo_judged"], cells["slo_good"], cells["errors"], cells["rejected"])
            tenants[cells["tenant"]] = tenants.get(cells["tenant"], Served()).plus(served)
        for tenant, served in tenants.items():
            self.requests.put(name.pool, tenant, name.source, name.start_s, name.version, served)

    def _cost(self, _: LogRecord, window: Record) -> None:
        assert isinstance(window, CostWindow)
        if window.size_s != WINDOW_S or not self.costs.put(window):
            return
        cost = self.costs.of(window.pool, window.tenant)
        if window.tenant is None:
            pools = self.tables["pools"]
            if window.pool in pools:
                pools[window.pool] = pools[window.pool] | {"cost": cost}
            return
        served = self.requests.of(window.pool, window.tenant)
        row = {"pool": window.pool, "tenant": window.tenant, "version": window.version, **(cost or {})}
        row |= {"slo_attainment": served.slo_attainment, "errors": served.errors, "rejected": served.rejected}
        key = f"{window.pool}/{window.tenant}"
        if key in self.tables["tenants"] or len(self.tables["tenants"]) < self.rows_max:
            self.tables["tenants"][key] = row  # a late window revises the sums though its version be smaller
        else:
            self.counters["rows_overflow"] += 1

    def _forecast(self, _: LogRecord, forecast: Record) -> None:
        assert isinstance(forecast, LoadForecast)
        self._put("forecasts", f"{forecast.pool}/{forecast.horizon_s:g}", forecast.model_dump(mode="json"))
        if (history := self._history(forecast.pool)) is not None:
            history.forecast(forecast)

    def _finding(self, _: LogRecord, finding: Record) -> None:
        assert isinstance(finding, Finding)
        key = f"{finding.pool}/{finding.finding}/{finding.subject}"
        self._put("findings", key, finding.model_dump(mode="json"))

    def _status(self, _: LogRecord, status: Record) -> None:
        assert isinstance(status, PoolStatus)
        row = status.model_dump(mode="json")
        row |= {"cost": self.costs.of(status.pool, None), "spec": self._spec(status.pool)}
        self._put("pools", status.pool, row)
        if (history := self._history(status.pool)) is not None:
            history.status(status)

    def _decision(self, _: LogRecord, decision: Record) -> None:
        assert isinstance(decision, Decision)
        proposal = decision.proposal
        row = decision.model_dump(mode="json")
        row |= {
            "pool": proposal.target.pool,
            "decision_kind": proposal.decision_kind,
            "action": row["proposal"]["action"],
            "reason": proposal.reason,
            "at_s": proposal.at_s,
            "changed_s": decision.history[-1].at_s if decision.history else proposal.at_s,
        }
        row |= self._extras.get(decision.id, {})
        table = self.tables["decisions"]
        if decision.id not in table and len(table) >= self.decisions_max:
            self._drop_decision()
        self._put("decisions", decision.id, row)

    def _drop_decision(self) -> None:
        """Room for a new decision: the oldest one that has ended goes, or the oldest of all."""
        table = self.tables["decisions"]
        ended = [key for key, row in table.items() if row["state"] in ENDED]
        oldest = min(ended or list(table), key=lambda key: (table[key]["at_s"], key))
        del table[oldest]
        self.counters["decisions_dropped"] += 1

    def _verdict(self, _: LogRecord, verdict: Record) -> None:
        assert isinstance(verdict, Verdict)
        self._extra(verdict.decision_id, "verdict", verdict.model_dump(mode="json"))

    def _executor_result(self, _: LogRecord, result: Record) -> None:
        assert isinstance(result, ExecutorResult)
        self._extra(result.decision_id, "result", result.model_dump(mode="json"))

    def _extra(self, id: str, name: str, value: Row) -> None:
        """What other topics tell of a decision may come before the decision itself."""
        extra = self._extras.setdefault(id, {})
        extra[name] = value
        if len(self._extras) > 2 * self.decisions_max:
            del self._extras[next(iter(self._extras))]
        table = self.tables["decisions"]
        if id in table:
            table[id] = table[id] | extra

    # -- what is no table of its own ---------------------------------------------------------------------------

    def _config(self, _: LogRecord, item: Record) -> None:
        assert isinstance(item, ConfigObject)
        if item.revision <= self._revisions.get(item.key, 0):
            return
        if item.key not in self._revisions and len(self._revisions) >= self.rows_max:
            self.counters["rows_overflow"] += 1
            return
        self._revisions[item.key] = item.revision
        if item.deleted:
            self.config.pop(item.key, None)
        else:
            self.config[item.key] = item
        if item.object_kind == "pool":
            pools = self.tables["pools"]
            if item.deleted:
                self._forget_pool(item.name)
            elif item.name in pools:
                pools[item.name] = pools[item.name] | {"spec": self._spec(item.name)}

    def _spec(self, pool: str) -> Row | None:
        """The pool's specification with its defaults; None where it was never seen."""
        item = self.config.get(f"pool/{pool}")
        return item.typed().model_dump(mode="json") if item is not None else None

    def _audit(self, _: LogRecord, entry: Record) -> None:
        assert isinstance(entry, AuditEntry)
        if entry.event not in ("pause", "resume") or entry.sequence <= self._pauses.get(entry.pool, -1):
            return
        self._pauses[entry.pool] = entry.sequence
        if entry.event == "pause":
            self.paused[entry.pool] = {"at_s": entry.at_s, "actor": entry.actor, "cause": entry.cause}
        else:
            self.paused.pop(entry.pool, None)

    def _letter(self, record: LogRecord, letter: Record) -> None:
        assert isinstance(letter, DeadLetter)
        id = letter_id(record, letter)
        if id in self._letter_ids:
            return
        self._letter_ids[id] = None
        if len(self._letter_ids) > LETTER_IDS_MAX:
            del self._letter_ids[next(iter(self._letter_ids))]
        self.refused[(letter.topic, letter.reason)] += letter.rows_refused
        self.letters.append(letter.model_dump(mode="json", exclude={"data_base64", "detail"}))

    def _history(self, pool: str) -> History | None:
        if pool not in self.history:
            if len(self.history) >= self.rows_max:
                self.counters["rows_overflow"] += 1
                return None
            self.history[pool] = History(self.history_s)
        return self.history[pool]

    # -- what is over ------------------------------------------------------------------------------------------

    def _sweep(self, now_s: float) -> None:
        for name in ("gpus", "nodes", "replicas", "interference"):
            table = self.tables[name]
            for key, row in list(table.items()):
                pools = row["pools"] if name == "gpus" else [row["pool"]]
                newest = max(self._newest.get((name, pool, row["source"]), 0) for pool in pools)
                if row["start_s"] < newest - GONE_S or row["start_s"] < now_s - SILENT_S:
                    del table[key]
        for key, row in list(self.tables["tenants"].items()):
            if row["until_s"] < now_s - OLD_S:
                del self.tables["tenants"][key]
                self.costs.forget(row["pool"], row["tenant"])
                self.requests.forget(row["pool"], row["tenant"])
        for key, row in list(self.tables["forecasts"].items()):
            if row["target_s"] < now_s - OLD_S:
                del self.tables["forecasts"][key]
        for key, row in list(self.tables["findings"].items()):
            if not row["open"] and row["at_s"] < now_s - OLD_S:
                del self.tables["findings"][key]
        for pool, row in list(self.tables["pools"].items()):
            if row["at_s"] < now_s - OLD_S:
                self._forget_pool(pool)

    def _forget_pool(self, pool: str) -> None:
        self.tables["pools"].pop(pool, None)
        self.history.pop(pool, None)
        self.costs.forget(pool, None)
        self.requests.forget(pool)
        self._newest = {at: start for at, start in self._newest.items() if at[1] != pool}


def _order(row: Row) -> tuple[float, float, int]:
    """Later windows before versions: an old window that is revised late is not the latest."""
    return row.get("start_s", 0), row.get("until_s", 0), row["version"]
