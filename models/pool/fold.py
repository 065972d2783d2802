"""The pool level: one partition of pool.signals, many pools.

Order within a second of log time, per pool: ticks (10 s windows that ended a second ago), bills, findings, verdicts,
proposals, status, forecasts. Load steps are looked for with every record of request windows, slow replicas also in the
middle of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from models.fold import BaseFold
from models.pool import cost, deciding, evidence, scale, status, wrong
from models.pool.context import Context, capacity_rps
from models.pool.findings import Findings, Found
from models.pool.forecast import forecast_rows
from models.pool.naming import check_histograms, window_name
from models.pool.nodes import NO_POOL, Nodes
from models.pool.pool import Pool
from models.pool.shadow_hold import FIRST_CHOICE_S, HISTORY, MEAN_TICKS, TICK_S
from models.pool.windows import ARRIVAL_INPUT, ARRIVALS, ENDS, INPUT, OUTPUT, SIZE_S, R, Row
from schemas.base import Record
from schemas.columns import Batch
from schemas.config import ConfigObject, PoolSpec, PriceSpec
from schemas.costs import CostWindow
from schemas.decisions import Outcome, PoolStatus, Proposal, Verdict
from schemas.errors import InvalidRecord
from schemas.findings import FindingKind
from schemas.log import LogRecord
from schemas.signals import ENGINE_WINDOWS, GPU_WINDOWS, INTERFERENCE_WINDOWS, NODE_WINDOWS, REQUEST_WINDOWS, WindowName
from schemas.topics import (
    COST_WINDOWS,
    DECISION_EVENTS,
    FINDINGS,
    LOAD_FORECASTS,
    NODE_SAMPLES,
    REQUEST_TRACES,
    ce_type,
)

TICK_DELAY_S = 1
"""A tick is taken so long after its window ended: every source has then said what it saw up to the end."""
LOOK_AT_S = 6
"""Second of a window at which its early rows are looked at for slow replicas."""
NODES_DELAY_S = 5
"""Nodes are looked at so long after a window ended: it has closed, and come."""
BILL_DELAY_S = 2
"""A window is billed so long after it closed: its sources' last words are then here."""
BILLS_MAX = 500
"""Windows of one pool that are billed in one second; the rest follow in the next."""
UNPRICED_MAX = 50
"""GPU types without a price that are named; more would be noise in the telemetry."""
FORECAST_S = 60
"""Forecasts are published so often."""


class PoolFold(BaseFold):
    """All pools of one partition of pool.signals."""

    level: ClassVar[str] = "pool"
    format: ClassVar[int] = 3
    reads: ClassVar[tuple[int, ...]] = (3,)
    BOUNDS: ClassVar[tuple[tuple[str, str, str], ...]] = (
        ("pools", "pools_max", "pools_overflow_total"),
        ("specs", "config_objects_max", "dead_overflow_total"),
        ("prices", "config_objects_max", "dead_overflow_total"),
        ("nodes.rows", "nodes_max", "overflow_nodes_total"),
        ("nodes.gpus", "nodes_max", "overflow_nodes_total"),
        ("nodes.dropped", "nodes_max", "overflow_nodes_total"),
    )
    """Container, its setting and its overflow metric. Within a pool: windows.KEEP_MAX and TENANT_ROWS_MAX
    (windows_dropped_total, windows_too_old_total), findings.OPEN_MAX (findings_overflow_total), and rings of which the
    oldest goes: shadow_hold.HISTORY, orders.VERSIONS_MAX, verify.WATCHED_MAX, asking.LEVELS_MAX, forecast.RESIDUALS."""

    def __init__(self, topic: str, partition: int, partitions: dict[str, int]) -> None:
        super().__init__(topic, partition, partitions)
        self.pools: dict[str, Pool] = {}
        self.specs: dict[str, tuple[int, PoolSpec]] = {}
        """pool -> (revision, policy); rebuilt from the configuration."""
        self.prices: dict[str, float] = {}
        """GPU type -> USD per GPU hour; rebuilt from the configuration."""
        self.nodes = Nodes()
        """Nodes, and GPUs that serve no pool."""
        self.handlers = {
            REQUEST_WINDOWS.type: self._requests,
            ENGINE_WINDOWS.type: self._engines,
            GPU_WINDOWS.type: self._gpus,
            INTERFERENCE_WINDOWS.type: self._interference,
            NODE_WINDOWS.type: self._nodes,
            ce_type(Outcome.kind): self._outcome,
        }

    # -- configuration ---------------------------------------------------------------------------------------

    def on_config(self, item: ConfigObject, spec: Record | None) -> None:
        """See BaseFold."""
        if item.object_kind == "pool":
            self.specs.pop(item.name, None)
            if isinstance(spec, PoolSpec):
                self.specs[item.name] = (item.revision, spec)
            pool = self.pools.get(item.name)
            if pool is not None:
                pool.watch.thaw()
                pool.billable += pool.windows.unbilled(pool.billable)
        elif item.object_kind == "price":
            self.prices.pop(item.name, None)
            if isinstance(spec, PriceSpec):
                self.prices[item.name] = spec.usd_per_gpu_hour
                for pool in self.pools.values():
                    pool.billable += pool.windows.unbilled(pool.billable)

    def _context(self, pool: Pool) -> Context:
        revision, spec = self.specs.get(pool.name, (0, None))
        now_s = self.log_ms / 1000
        return Context(now_s, self.second, self.offset, spec, revision, self.prices, self.count)

    # -- records ---------------------------------------------------------------------------------------------

    def _named(self, batch: Batch, topic: str) -> tuple[Pool, WindowName] | None:
        """The pool and the window of a batch; None for nodes, and GPUs without a pool."""
        name = self._name(batch, topic)
        return None if name.pool == NO_POOL else (self._pool(name.pool), name)

    def _name(self, batch: Batch, topic: str) -> WindowName:
        return window_name(batch, topic, self.log_ms / 1000, self.limits.future_s)

    def _pool(self, name: str) -> Pool:
        pool = self.pools.get(name)
        if pool is None:
            if len(self.pools) >= self.limits.pools_max:
                self.count("pools_overflow_total")
                raise InvalidRecord("overflow", "pool", name, "raise limits.pools_max")
            pool = self.pools[name] = Pool(name)
            pool.first_s = self.log_ms / 1000
            # the first whole window is the first that says how much arrived
            pool.tick_end_s = (self.log_ms // 1000 // TICK_S + 2) * TICK_S
        return pool

    def _requests(self, record: LogRecord, batch: Batch) -> None:
        check_histograms(batch)
        found = self._named(batch, REQUEST_TRACES)
        if found is None:
            return
        pool, name = found
        before_s = pool.windows.request_until.get(name.source, 0.0)
        if self._taken(pool, name, pool.windows.take_requests(name, batch)):
            context = self._context(pool)
            self._ask(pool, context, deciding.look_now(pool, context, name, before_s))

    def _engines(self, record: LogRecord, batch: Batch) -> None:
        found = self._named(batch, NODE_SAMPLES)
        if found is None:
            return
        pool, name = found
        if name.closed and not pool.windows.request_until:
            pool.latency.bins.take(name, batch)  # no gateway says how late answers are
        self._taken(pool, name, pool.windows.take_engines(name, batch))

    def _gpus(self, record: LogRecord, batch: Batch) -> None:
        found = self._named(batch, NODE_SAMPLES)
        if found is None:
            self.nodes.take_gpus(self._name(batch, NODE_SAMPLES), batch)
        else:
            found[0].windows.take_gpus(found[1], batch)

    def _interference(self, record: LogRecord, batch: Batch) -> None:
        found = self._named(batch, NODE_SAMPLES)
        if found is not None:
            found[0].windows.take_interference(found[1], batch)

    def _nodes(self, record: LogRecord, batch: Batch) -> None:
        """Nodes belong to no pool."""
        name = self._name(batch, NODE_SAMPLES)
        self.count("overflow_nodes_total", self.nodes.take_nodes(name, batch, self.limits.nodes_max))

    def _outcome(self, record: LogRecord, outcome: Outcome) -> None:
        pool = self._pool(outcome.pool)
        deciding.heard(pool, self._context(pool), outcome)

    def _taken(self, pool: Pool, name: WindowName, new: bool) -> bool:
        """A window that changed is to be rated and billed (again)."""
        if new:
            for todo in (pool.unrated, pool.billable):
                if name.start_s not in todo:
                    todo.append(name.start_s)
        elif name.start_s < pool.windows.floor_s:
            self.count("windows_too_old_total")
        return new

    # -- log time --------------------------------------------------------------------------------------------

    def on_second(self, second: int, before: int) -> None:
        """See BaseFold."""
        for pool in self.pools.values():
            minute = pool.tick_end_s // FORECAST_S
            ticked = self._ticks(pool, second)
            self._bill(pool, second)
            context = self._context(pool)
            if not ticked and (second - LOOK_AT_S) // TICK_S != (before - LOOK_AT_S) // TICK_S:
                self._look(pool, context, second // TICK_S * TICK_S, closed=False)
                self._ask(pool, context, deciding.heal(pool, context))
            if ticked:
                self._decide(pool, context)
            elif pool.windows.dead:  # said at once: what does not answer takes no requests
                self._findings(pool.name, pool.findings, {"engine_dead": wrong.dead(pool, context)})
            if ticked or pool.status_due:
                self._status(pool, context)
            if pool.tick_end_s // FORECAST_S != minute:
                self._forecast(pool)
        if (second - NODES_DELAY_S) // SIZE_S != (before - NODES_DELAY_S) // SIZE_S:
            specs = [spec for _, spec in self.specs.values()]
            self._findings(NO_POOL, self.nodes.findings, self.nodes.found(self.log_ms / 1000, specs, self.prices))

    def _decide(self, pool: Pool, context: Context) -> None:
        """What follows from a tick."""
        rows = context.rows(pool)
        pool.waiting = deciding.waiting(rows)
        pool.health.forget(rows, pool.orders.weights)
        unknown = [name for name in pool.unpriced if name not in self.prices]
        pool.unpriced = dict.fromkeys(unknown[:UNPRICED_MAX])
        deciding.settle(pool, context)
        self._look(pool, context, pool.tick_end_s - 2 * TICK_S, closed=True)
        rate = None if context.spec is None else capacity_rps(pool, context.spec)
        # the window before: the one that has just ended is not closed yet, and only closed ones have histograms
        pool.latency.look(pool.tick_end_s - 3 * TICK_S, pool.windows, context.spec, rate, pool.orders.weights)
        self._findings(pool.name, pool.findings, wrong.found(pool, context))
        verdicts, reverts = deciding.judge(pool, context)
        for verdict in verdicts:
            self._say(verdict)
        for revert in reverts:
            self._ask(pool, context, revert)
        self._ask(pool, context, deciding.plan(pool, context))
        self._ask(pool, context, deciding.heal(pool, context))
        dropped = pool.windows.drop(context.now_s, self.limits.grace_requests_s)
        self.count("windows_dropped_total", dropped)

    def _look(self, pool: Pool, context: Context, start_s: int, closed: bool) -> None:
        pool.health.look(start_s, pool.windows.rows_of(start_s), pool.orders.weights, closed)

    def _ticks(self, pool: Pool, second: int) -> bool:
        """Takes the ticks that are due; True when there was any."""
        due = pool.tick_end_s + TICK_DELAY_S <= second
        if due and second - pool.tick_end_s > HISTORY * TICK_S:
            pool.series.restart()
            pool.tick_end_s = second // TICK_S * TICK_S
        while pool.tick_end_s + TICK_DELAY_S <= second:
            self._tick(pool, pool.tick_end_s)
            pool.tick_end_s += TICK_S
        return due

    def _tick(self, pool: Pool, end_s: int) -> None:
        """One 10 s window has ended at `end_s`: the series grow by it, revised ones are corrected."""
        start_s = end_s - TICK_S
        windows, series = pool.windows, pool.series
        _, spec = self.specs.get(pool.name, (0, None))
        settled = windows.totals(start_s - SIZE_S, start_s)
        inputs = settled[ARRIVAL_INPUT] if settled[ARRIVAL_INPUT] > 0 else settled[INPUT]
        arrivals = settled[ARRIVALS] if settled[ARRIVAL_INPUT] > 0 else settled[ENDS]
        pool.mix.learn(inputs, arrivals, settled[OUTPUT], settled[ENDS], TICK_S)
        if start_s not in pool.unrated:
            pool.unrated.append(start_s)
        mix = 0.0 if spec is None else pool.mix.factor_ln(spec)
        series.push(start_s // TICK_S, float("nan"), mix, _in_flight(windows.rows_of(start_s)))
        self._rate(pool, end_s)
        if spec is None:
            return
        pool.forecast.horizons(spec.cold_start_s)
        pool.forecast.observe(float(series.rates[-1]))
        if series.count % MEAN_TICKS == 0 and series.count * TICK_S >= FIRST_CHOICE_S:
            series.choose(spec.capacity_rps, spec.reserve, spec.miss_price, spec.cold_start_s)
        pool.plan = series.plan(spec.capacity_rps, spec.reserve)

    def _rate(self, pool: Pool, end_s: int) -> None:
        """Puts the arrivals of new and revised windows into the series; those that a silent source hides wait."""
        windows = pool.windows
        rows = windows.replicas(end_s, self._context(pool).fresh_s).values()
        newest = evidence.evidence_s(windows, rows)
        quiet = evidence.silent(windows, rows, end_s)
        waiting = []
        for start_s in pool.unrated:
            hidden = any(windows.request_until[source] < start_s + SIZE_S for source in quiet)
            if start_s + SIZE_S > end_s or newest is None or newest < start_s or hidden:
                waiting.append(start_s)
                continue
            window = windows.by_start.get(start_s)
            pool.series.revise(start_s // TICK_S, 0.0 if window is None else window.arrivals() / SIZE_S)
        pool.unrated = waiting[-HISTORY:]

    # -- bills -----------------------------------------------------------------------------------------------

    def _bill(self, pool: Pool, second: int) -> None:
        """Cost windows that have closed, or changed since."""
        ripe_s = second - SIZE_S - self.limits.lateness_s - BILL_DELAY_S
        due = [start_s for start_s in pool.billable if start_s <= ripe_s][:BILLS_MAX]
        if not due:
            return
        done = dict.fromkeys(due)
        pool.billable = [start_s for start_s in pool.billable if start_s not in done]
        _, spec = self.specs.get(pool.name, (0, None))
        head = {"size_s": float(SIZE_S), "version": self.offset, "closed": True}
        for start_s in due:
            window = pool.windows.by_start.get(start_s)
            if window is None or not window.dirty:
                continue
            usd, busy_usd, missing = cost.bill(window, self.prices, spec.gpu_type if spec else "")
            pool.unpriced.update(dict.fromkeys(missing[:UNPRICED_MAX]))
            if usd is not None:
                pool.totals.add(start_s, usd - (window.usd or 0.0))
                window.usd = usd
            window.dirty, window.emitted = False, True
            self._emit_bill(pool, start_s, cost.rows(pool.name, start_s, window, usd, busy_usd, head))

    def _emit_bill(self, pool: Pool, start_s: int, rows: Sequence[CostWindow]) -> None:
        totals = pool.totals.to_date(start_s)
        for row in rows:
            if row.tenant is None and row.usd_total is not None:
                row = row.model_copy(update={f"usd_{name}_to_date": usd for name, usd in totals.items()})
            tenant = "*" if row.tenant is None else row.tenant
            if row.tenant is not None and not row.tenant.strip("*"):
                tenant += "*"  # a tenant of that name is not the pool
            name = f"{pool.name}/{tenant}/{start_s}"
            self.emit_record(COST_WINDOWS, name, f"cost/{name}@{self.offset}", row)

    # -- what is said ----------------------------------------------------------------------------------------

    def _findings(self, name: str, findings: Findings, current: dict[FindingKind, dict[str, Found]]) -> None:
        for kind, found in current.items():
            said, over = findings.update(name, kind, found, self.log_ms / 1000, self.offset)
            self.count("findings_overflow_total", over)
            for finding in said:
                id = f"{name}/{kind}/{finding.subject}"
                self.emit_record(FINDINGS, id, f"finding/{id}@{self.offset}", finding)

    def _ask(self, pool: Pool, context: Context, proposal: Proposal | None) -> None:
        if proposal is not None:
            automatic = context.spec is not None and context.spec.mode == "automatic"
            for verdict in deciding.replaced(pool, context, proposal) if automatic else ():
                self._say(verdict)
            self.emit_record(DECISION_EVENTS, "fleet", proposal.id, proposal)

    def _say(self, verdict: Verdict) -> None:
        self.emit_record(DECISION_EVENTS, "fleet", f"{verdict.decision_id}/verdict", verdict)

    def _forecast(self, pool: Pool) -> None:
        for row in forecast_rows(pool.name, pool.forecast, self.log_ms / 1000, self.offset):
            name = f"{pool.name}/{row.horizon_s:g}"
            self.emit_record(LOAD_FORECASTS, name, f"forecast/{name}@{self.offset}", row)

    def _status(self, pool: Pool, context: Context) -> None:
        pool.status_due = False
        windows, spec, rows = pool.windows, context.spec, context.rows(pool)
        newest = evidence.evidence_s(windows, rows.values())
        totals: dict[str, float | None] = {**pool.totals.to_date(context.now_s)}
        if pool.unpriced:
            totals = dict.fromkeys(totals)  # what has no price is not free: a budget must not take it for nothing
        rate = pool.rate_rps(newest) if newest is not None else None
        fields: dict[str, Any] = {
            **status.allocation(rows, self.prices, spec),
            **status.engine_load(rows),
            **status.latency(windows, context.window_end_s),
        }
        if spec is not None:
            capacity, ready = capacity_rps(pool, spec), fields.get("replicas_ready")
            fields["cluster"], fields["gpu_type"] = spec.cluster, spec.gpu_type
            fields["capacity_rps"], fields["gpus_per_replica"] = capacity, spec.gpus_per_replica
            fields["utilisation_ratio"] = rate / (ready * capacity) if ready and rate is not None else None
            if pool.plan is not None:
                want = pool.plan.want((rate or 0.0) / capacity)
                extra = scale.backlog(pool.waiting, rate or 0.0, capacity)
                fields["replicas_wanted"], fields["policy"] = scale.bounded(want, extra, spec), scale.rule(want)
        record = PoolStatus(
            pool=pool.name,
            at_s=context.now_s,
            version=self.offset,
            policy_revision=context.revision,
            replicas_target=pool.orders.target,
            usd_hour_to_date=totals["hour"],
            usd_day_to_date=totals["day"],
            usd_month_to_date=totals["month"],
            evidence_s=None if newest is None else min(newest, context.now_s),
            requests_per_s=rate,
            util_gpu_pct=status.gpu_util_pct(windows),
            slo_attainment=status.attainment(windows, context.window_end_s)[0],
            replica_weights=status.weights(pool.orders, rows),
            candidates=status.candidates(pool.series.candidates),
            **fields,
        )
        self.emit_record(DECISION_EVENTS, "fleet", f"status/{pool.name}@{self.offset}", record)

    # -- state -----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """See BaseFold."""
        return {"pools": [pool.state() for pool in self.pools.values()], "nodes": self.nodes.state()}

    def restore(self, state: dict[str, Any], version: int) -> None:
        """See BaseFold."""
        self.pools, self.specs, self.prices = {}, {}, {}
        for plain in self.config.values():
            item = ConfigObject.model_validate(plain)
            self.on_config(item, None if item.deleted else item.typed())
        self.pools = {plain["name"]: Pool.of(plain) for plain in state["pools"]}
        self.nodes.restore(state["nodes"])

    def metrics(self) -> dict[str, float]:
        """See BaseFold."""
        return {**super().metrics(), "pools": float(len(self.pools))}


def _in_flight(rows: dict[str, Row]) -> float:
    """Requests running and waiting, mean over a window; NaN where no engine was heard."""
    known = [row for row in rows.values() if row[R["running_mean"]] is not None]
    if not known:
        return float("nan")
    return float(sum(row[R["running_mean"]] + (row[R["waiting_mean"]] or 0.0) for row in known))
