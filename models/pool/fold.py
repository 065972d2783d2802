"""The pool level: one partition of pool.signals, many pools.

Order within a second of log time, per pool: ticks (10 s windows that ended a second ago), bills, findings,
verdicts, proposals, status. Load steps are looked for with every record of request windows.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from models.fold import BaseFold
from models.pool import cost, evidence, scale, status
from models.pool.findings import Found
from models.pool.forecast import forecast_rows
from models.pool.pool import Pool
from models.pool.shadow_hold import FIRST_CHOICE_S, HISTORY, MEAN_TICKS, TICK_S
from models.pool.windows import ARRIVAL_INPUT, ARRIVALS, ENDS, INPUT, OUTPUT, SIZE_S, R, Row
from models.sketches import BUCKETS
from schemas.base import Record
from schemas.columns import Batch
from schemas.config import ConfigObject, PoolSpec, PriceSpec
from schemas.decisions import Outcome, PoolStatus, Proposal
from schemas.errors import InvalidRecord
from schemas.findings import FindingKind
from schemas.log import LogRecord
from schemas.signals import ENGINE_WINDOWS, GPU_WINDOWS, REQUEST_WINDOWS, WindowName
from schemas.topics import COST_WINDOWS, DECISION_EVENTS, FINDINGS, LOAD_FORECASTS, ce_type

TICK_DELAY_S = 1
"""A tick is taken so long after its window ended: every source has then said what it saw up to the end."""
NO_POOL = "-"
"""Key under which GPUs come that serve no pool."""
SETTLE_S = 15.0
"""What is allocated counts as the first target when engines have been heard for so long."""
DRIFT_S = 60.0
"""When what is allocated differs from the target for so long and nothing is under way, it becomes the target."""
BILLS_MAX = 500
"""Windows of one pool that are billed in one second; the rest follow in the next."""
SOURCES_MAX = 4096
FORECAST_S = 60
"""Forecasts are published so often."""


class PoolFold(BaseFold):
    """All pools of one partition of pool.signals."""

    level: ClassVar[str] = "pool"
    BOUNDS: ClassVar[tuple[tuple[str, str, str], ...]] = (
        ("pools", "pools_max", "pools_overflow_total"),
        ("specs", "pools_max", "pools_overflow_total"),
        ("prices", "pools_max", "pools_overflow_total"),
    )
    """Container, its setting and its overflow metric. Within a pool: windows.KEEP_MAX and TENANT_ROWS_MAX
    (windows_dropped_total), findings.OPEN_MAX (findings_overflow_total), orders.VERSIONS_MAX,
    shadow_hold.HISTORY, asking.LEVELS_MAX (the oldest go)."""

    def __init__(self, topic: str, partition: int, partitions: dict[str, int]) -> None:
        super().__init__(topic, partition, partitions)
        self.pools: dict[str, Pool] = {}
        self.specs: dict[str, tuple[int, PoolSpec]] = {}
        """pool -> (revision, policy); rebuilt from the configuration."""
        self.prices: dict[str, float] = {}
        """GPU type -> USD per GPU hour; rebuilt from the configuration."""
        self.handlers = {
            REQUEST_WINDOWS.type: self._requests,
            ENGINE_WINDOWS.type: self._engines,
            GPU_WINDOWS.type: self._gpus,
            ce_type(Outcome.kind): self._outcome,
        }

    # -- configuration ---------------------------------------------------------------------------------------

    def on_config(self, item: ConfigObject, spec: Record | None) -> None:
        """See BaseFold."""
        if item.object_kind == "pool":
            self.specs.pop(item.name, None)
            if isinstance(spec, PoolSpec):
                self.specs[item.name] = (item.revision, spec)
        elif item.object_kind == "price":
            self.prices.pop(item.name, None)
            if isinstance(spec, PriceSpec):
                self.prices[item.name] = spec.usd_per_gpu_hour

    def _spec(self, pool: Pool) -> PoolSpec | None:
        found = self.specs.get(pool.name)
        return None if found is None else found[1]

    # -- records ---------------------------------------------------------------------------------------------

    def _named(self, batch: Batch, topic: str) -> tuple[Pool, WindowName] | None:
        """The pool and the window that a batch is about. Raises InvalidRecord where its metadata is not a window's."""
        try:
            name = WindowName.of(batch.meta)
        except (KeyError, ValueError) as error:
            remedy = "name pool, source, start_s, version, until_s and closed"
            raise InvalidRecord("invalid", "schema metadata", str(error), remedy) from None
        number = name.source.removeprefix(f"{topic}/")
        if number == name.source or not number.isdecimal() or int(number) >= SOURCES_MAX:
            raise InvalidRecord("invalid", "source", name.source, f"the source must be {topic}/<partition>")
        if name.start_s % SIZE_S or name.start_s < 0 or name.version < 0:
            raise InvalidRecord("invalid", "start_s", name.start_s, f"windows start at multiples of {SIZE_S} s")
        if not name.start_s <= self.log_ms / 1000 + self.limits.future_s:
            raise InvalidRecord("in_future", "start_s", name.start_s, "set the clock of the level below")
        if not 0 < name.until_s <= self.log_ms / 1000 + self.limits.future_s:
            raise InvalidRecord("in_future", "until_s", name.until_s, "set the clock of the level below")
        if name.pool == NO_POOL:
            return None
        return self._pool(name.pool), name

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
        for column in ("ttft_s_hist", "tpot_s_hist"):
            if any(pairs is not None and len(pairs) and pairs[::2].max() >= BUCKETS for pairs in batch.pairs[column]):
                raise InvalidRecord("out_of_bounds", column, "a bucket", f"buckets are below {BUCKETS}")
        found = self._named(batch, "request.traces")
        if found is None:
            return
        pool, name = found
        before = pool.windows.request_until.get(name.source, 0.0)
        if pool.windows.take_requests(name, batch):
            self._changed(pool, name.start_s)
            self._look_now(pool, name, before)
        elif name.start_s < pool.windows.floor_s:
            self.count("windows_too_old_total")

    def _engines(self, record: LogRecord, batch: Batch) -> None:
        found = self._named(batch, "node.samples")
        if found is None:
            return
        pool, name = found
        if pool.windows.take_engines(name, batch):
            self._changed(pool, name.start_s)
        elif name.start_s < pool.windows.floor_s:
            self.count("windows_too_old_total")

    def _gpus(self, record: LogRecord, batch: Batch) -> None:
        found = self._named(batch, "node.samples")
        if found is not None:
            found[0].windows.take_gpus(found[1], batch)

    def _outcome(self, record: LogRecord, outcome: Outcome) -> None:
        pool = self._pool(outcome.pool)
        target = pool.orders.target
        if pool.orders.hear(outcome, self.log_ms / 1000):
            pool.status_due = pool.status_due or pool.orders.target != target

    def _changed(self, pool: Pool, start_s: int) -> None:
        """A window has to be rated and billed (again)."""
        if start_s not in pool.unrated:
            pool.unrated.append(start_s)
        if start_s not in pool.billable:
            pool.billable.append(start_s)

    # -- log time --------------------------------------------------------------------------------------------

    def on_second(self, second: int, before: int) -> None:
        """See BaseFold."""
        for pool in self.pools.values():
            ticked = self._ticks(pool, second)
            self._bill(pool, second)
            if ticked:
                self._settle(pool, second)
                self._wrong(pool)
                self._plan(pool, second)
                dropped = pool.windows.drop(self.log_ms / 1000, self.limits.grace_requests_s)
                self.count("windows_dropped_total", dropped)
            if ticked or pool.status_due:
                self._status(pool)
            if ticked and second // FORECAST_S != before // FORECAST_S:
                self._forecast(pool)

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
        windows, series, spec = pool.windows, pool.series, self._spec(pool)
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
        rows = windows.replicas(end_s, self._freshness(pool))
        newest = evidence.evidence_s(windows, rows.values())
        quiet = evidence.silent(windows, end_s)
        waiting = []
        for start_s in pool.unrated:
            window = windows.by_start.get(start_s)
            if start_s + SIZE_S > end_s:
                waiting.append(start_s)
                continue
            hidden = any(windows.request_until[source] < start_s + SIZE_S for source in quiet)
            if newest is None or newest < start_s or hidden:
                waiting.append(start_s)
                continue
            rate = 0.0 if window is None else window.arrivals() / SIZE_S
            pool.series.revise(start_s // TICK_S, rate)
        pool.unrated = waiting[-HISTORY:]

    def _freshness(self, pool: Pool) -> float:
        spec = self._spec(pool)
        return 30.0 if spec is None else spec.freshness_s

    def _capacity(self, pool: Pool, spec: PoolSpec) -> float:
        """Requests per s that a replica carries at the present token mix."""
        mix = float(pool.series.mix[-1]) if len(pool.series.mix) else 0.0
        return float(spec.capacity_rps * math.exp(mix))

    # -- bills -----------------------------------------------------------------------------------------------

    def _bill(self, pool: Pool, second: int) -> None:
        """Cost windows that have closed, or changed since."""
        ripe_s = second - SIZE_S - self.limits.lateness_s - 2
        due = [start_s for start_s in pool.billable if start_s <= ripe_s][:BILLS_MAX]
        if not due:
            return
        done = dict.fromkeys(due)
        pool.billable = [start_s for start_s in pool.billable if start_s not in done]
        spec = self._spec(pool)
        for start_s in due:
            window = pool.windows.by_start.get(start_s)
            if window is None or not window.dirty:
                continue
            usd, busy_usd, missing = cost.bill(window, self.prices, spec.gpu_type if spec else "")
            for gpu_type in missing:
                pool.unpriced[gpu_type] = None
            if usd is not None:
                pool.totals.add(start_s, usd - (window.usd or 0.0))
                window.usd = usd
            window.dirty, window.emitted = False, True
            self._emit_bill(
                pool,
                start_s,
                cost.rows(
                    pool.name,
                    start_s,
                    window,
                    usd,
                    busy_usd,
                    {"size_s": float(SIZE_S), "version": self.offset, "closed": True},
                ),
            )

    def _emit_bill(self, pool: Pool, start_s: int, rows: list[Any]) -> None:
        totals = pool.totals.to_date(start_s)
        for row in rows:
            if row.tenant is None and row.usd_total is not None:
                row = row.model_copy(update={f"usd_{name}_to_date": usd for name, usd in totals.items()})
            name = f"{pool.name}/{'*' if row.tenant is None else row.tenant}/{start_s}"
            self.emit_record(COST_WINDOWS, name, f"cost/{name}@{self.offset}", row)

    # -- findings --------------------------------------------------------------------------------------------

    def _find(self, pool: Pool, kind: FindingKind, current: dict[str, Found]) -> None:
        said, over = pool.findings.update(pool.name, kind, current, self.log_ms / 1000, self.offset)
        self.count("findings_overflow_total", over)
        for finding in said:
            name = f"{pool.name}/{kind}/{finding.subject}"
            self.emit_record(FINDINGS, name, f"finding/{name}@{self.offset}", finding)

    def _wrong(self, pool: Pool) -> None:
        """Findings that rest on the newest windows."""
        now = self.log_ms / 1000
        spec = self._spec(pool)
        unknown = {gpu_type: None for gpu_type in pool.unpriced if gpu_type not in self.prices}
        pool.unpriced = unknown
        self._find(
            pool,
            "price_unknown",
            {
                gpu_type or "-": Found(
                    f"GPU type {gpu_type or '(unnamed)'} has no price, so cost is unknown; apply one", 1.0
                )
                for gpu_type in unknown
            },
        )
        self._find(
            pool,
            "policy_missing",
            {}
            if spec is not None
            else {pool.name: Found("no pool object in fleet.config: nothing is planned for it; apply one", 1.0)},
        )
        stale = self._stale(pool)
        self._find(pool, "stale_data", {} if stale is None else {pool.name: Found(stale[0], stale[1])})
        share, judged = status.attainment(pool.windows, int(now) // SIZE_S * SIZE_S)
        at_risk = spec is not None and share is not None and judged >= 50 and share < spec.slo_target
        self._find(
            pool,
            "slo_at_risk",
            {}
            if not at_risk or spec is None or share is None
            else {
                pool.name: Found(
                    f"{100 * share:.2f} % of {judged:.0f} requests of the last 300 s were within "
                    f"{spec.slo_ttft_s:g} s TTFT and "
                    f"{1000 * spec.slo_tpot_s:g} ms per token; the target is {100 * spec.slo_target:g} %",
                    1.0 - share,
                )
            },
        )

    def _stale(self, pool: Pool) -> tuple[str, float] | None:
        """Why nothing may be planned on this evidence, and its age in s; None: it is fresh."""
        now = self.log_ms / 1000
        freshness = self._freshness(pool)
        rows = pool.windows.replicas(now, freshness)
        newest = evidence.evidence_s(pool.windows, rows.values())
        if newest is None:
            return "no request window has come for this pool: nothing is planned", now - pool.first_s
        age = now - newest
        if age > freshness:
            return f"the newest evidence on load is {age:.0f} s old (limit {freshness:g} s): every action is held", age
        quiet = {s: age for s, age in evidence.silent(pool.windows, now).items() if age > freshness}
        if quiet:
            source, age = next(iter(quiet.items()))
            return f"{source} has been silent for {age:.0f} s while requests are overdue: every action is held", age
        return None

    # -- plan ------------------------------------------------------------------------------------------------

    def _settle(self, pool: Pool, second: int) -> None:
        """The first target, and the new one where reality has left the old."""
        windows, orders = pool.windows, pool.orders
        now = self.log_ms / 1000
        if not windows.first_engine_s or now - windows.first_engine_s < SETTLE_S:
            return
        rows = windows.replicas(now, self._freshness(pool))
        if not rows:
            return
        found = status.held(rows)
        if orders.target is None:
            orders.target, orders.target_s, pool.status_due = found, now, True
        elif found == orders.target or ("scale" in orders.open and orders.open["scale"]["state"] != "executed"):
            pool.drift_s = now
        elif now - max(pool.drift_s, orders.target_s) > DRIFT_S:
            self.count("targets_resynced_total")
            orders.target, orders.target_s, pool.status_due = found, now, True
            pool.drift_s = now

    def _held_back(self, pool: Pool) -> bool:
        """Whether nothing may be proposed."""
        spec = self._spec(pool)
        return (
            spec is None
            or spec.mode == "observe"
            or pool.orders.target is None
            or pool.plan is None
            or self._stale(pool) is not None
        )

    def _look_now(self, pool: Pool, name: WindowName, before_s: float) -> None:
        """The fast path: does the demand of the last 60 s, as of these rows, ask for more than is ordered?"""
        spec, plan, orders = self._spec(pool), pool.plan, pool.orders
        if spec is None or plan is None or orders.target is None or spec.mode == "observe":
            return
        span = int(min(60.0, max(TICK_S, name.until_s - pool.first_s)))
        rate = pool.windows.rate_rps(max(pool.windows.request_until.values()), span)
        capacity = self._capacity(pool, spec)
        want = plan.want(rate / capacity)
        extra = scale.backlog(pool.waiting, rate, capacity)
        wanted = scale.bounded(want, extra, spec)
        trigger_s = pool.asking.look(wanted, orders.target, max(before_s, name.until_s - 2.0))
        if wanted > orders.level() and not self._held_back(pool):
            self._propose(pool, spec, want, extra, trigger_s, rate)

    def _plan(self, pool: Pool, second: int) -> None:
        """The tick's look: ups by the hold window, the backlog or a new setting; downs."""
        spec, plan, orders = self._spec(pool), pool.plan, pool.orders
        for _ in orders.forget_lost(self.log_ms / 1000):
            self.count("proposals_lost_total")
        if spec is None or plan is None:
            return
        rows = pool.windows.replicas(self.log_ms / 1000, spec.freshness_s)
        pool.waiting = status.engine_load(rows)["waiting"] or 0.0
        if orders.target is None:
            return
        rate = float(pool.series.rates[-1])
        known = rate == rate
        rate = pool.windows.rate_rps(pool.tick_end_s - TICK_S)
        want = plan.want()
        extra = scale.backlog(pool.waiting, rate, self._capacity(pool, spec))
        wanted = scale.bounded(want, extra, spec)
        trigger_s = pool.asking.look(wanted, orders.target, float(pool.tick_end_s - TICK_S))
        if self._held_back(pool) or wanted == orders.level():
            return
        if wanted < orders.target and (pool.series.span_s < plan.hold_s or not known):
            return  # what was before the first window, or is missing now, is unknown, not zero
        self._propose(pool, spec, want, extra, trigger_s, rate)

    def _propose(self, pool: Pool, spec: PoolSpec, want: Any, extra: int, trigger_s: float, rate: float) -> None:
        orders = pool.orders
        assert orders.target is not None
        now = self.log_ms / 1000
        revision = self.specs[pool.name][0]
        price = self.prices.get(spec.gpu_type)
        rows = pool.windows.replicas(now, spec.freshness_s)
        look = scale.Look(
            at_s=now,
            second=self.second,
            rate_rps=rate,
            capacity_rps=self._capacity(pool, spec),
            waiting=pool.waiting,
            evidence_s=min(now, evidence.evidence_s(pool.windows, rows.values()) or 0.0),
            attainment=status.attainment(pool.windows, int(now) // SIZE_S * SIZE_S)[0],
            usd_per_replica_hour=None if price is None else price * spec.gpus_per_replica,
            windows=_newest(pool),
            candidates=pool.series.candidates,
            confidence=pool.confidence("scale"),
        )
        proposal = scale.propose(pool.name, spec, revision, want, extra, orders.target, trigger_s, look)
        self._ask(pool, proposal)

    def _ask(self, pool: Pool, proposal: Proposal) -> bool:
        kind = proposal.decision_kind
        if not pool.orders.may_ask(kind, proposal.action, self.second):
            return False
        pool.orders.ask(proposal.id, kind, proposal.action, proposal.at_s, self.second, proposal.expires_s)
        self.count(f"proposals_{kind}_total")
        self.emit_record(DECISION_EVENTS, "fleet", proposal.id, proposal)
        return True

    # -- forecasts --------------------------------------------------------------------------------------------

    def _forecast(self, pool: Pool) -> None:
        for row in forecast_rows(pool.name, pool.forecast, self.log_ms / 1000, self.offset):
            name = f"{pool.name}/{row.horizon_s:g}"
            self.emit_record(LOAD_FORECASTS, name, f"forecast/{name}@{self.offset}", row)

    # -- status ----------------------------------------------------------------------------------------------

    def _status(self, pool: Pool) -> None:
        pool.status_due = False
        now = self.log_ms / 1000
        end_s = int(now) // SIZE_S * SIZE_S
        windows, orders, spec = pool.windows, pool.orders, self._spec(pool)
        rows = windows.replicas(now, self._freshness(pool))
        newest = evidence.evidence_s(windows, rows.values())
        held = status.allocation(rows, self.prices, spec)
        totals = pool.totals.to_date(now)
        fields: dict[str, Any] = {**held, **status.engine_load(rows), **status.latency(windows, end_s)}
        span = int(min(60.0, max(TICK_S, now - pool.first_s)))
        rate = windows.rate_rps(newest, span) if newest is not None else None
        if spec is not None:
            capacity = self._capacity(pool, spec)
            ready = held.get("replicas_ready")
            fields["capacity_rps"] = capacity
            fields["gpus_per_replica"] = spec.gpus_per_replica
            fields["utilisation_ratio"] = rate / (ready * capacity) if ready and rate is not None else None
            fields["replicas_wanted"], fields["policy"] = self._wanted(pool, spec, rate)
        self.emit_record(
            DECISION_EVENTS,
            "fleet",
            f"status/{pool.name}@{self.offset}",
            PoolStatus(
                pool=pool.name,
                cluster=spec.cluster if spec else "local",
                at_s=now,
                version=self.offset,
                policy_revision=self.specs[pool.name][0] if spec else 0,
                gpu_type=spec.gpu_type if spec else "",
                replicas_target=orders.target,
                usd_hour_to_date=totals["hour"],
                usd_day_to_date=totals["day"],
                usd_month_to_date=totals["month"],
                evidence_s=None if newest is None else min(newest, now),
                requests_per_s=rate,
                util_gpu_pct=status.gpu_util_pct(windows),
                slo_attainment=status.attainment(windows, end_s)[0],
                replica_weights=status.weights(orders, rows),
                candidates=pool.series.candidates,
                **fields,
            ),
        )

    def _wanted(self, pool: Pool, spec: PoolSpec, rate: float | None) -> tuple[int | None, str]:
        plan = pool.plan
        if plan is None:
            return None, ""
        capacity = self._capacity(pool, spec)
        want = plan.want((rate or 0.0) / capacity)
        extra = scale.backlog(pool.waiting, rate or 0.0, capacity)
        return scale.bounded(want, extra, spec), scale.rule(want)

    # -- state -----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """See BaseFold."""
        return {"pools": [pool.state() for pool in self.pools.values()]}

    def restore(self, state: dict[str, Any], version: int) -> None:
        """See BaseFold."""
        self.pools = {plain["name"]: Pool.of(plain) for plain in state["pools"]}
        self.specs, self.prices = {}, {}
        for plain in self.config.values():
            item = ConfigObject.model_validate(plain)
            self.on_config(item, None if item.deleted else item.typed())

    def metrics(self) -> dict[str, float]:
        """See BaseFold."""
        return {**super().metrics(), "pools": float(len(self.pools))}


def _in_flight(rows: dict[str, Row]) -> float:
    """Requests running and waiting, mean over a window; NaN where no engine was heard."""
    known = [row for row in rows.values() if row[R["running_mean"]] is not None]
    if not known:
        return float("nan")
    return float(sum(row[R["running_mean"]] + (row[R["waiting_mean"]] or 0.0) for row in known))


def _newest(pool: Pool) -> list[str]:
    """Names of the newest request windows with their versions."""
    with_requests = [start for start, window in pool.windows.by_start.items() if window.requests]
    if not with_requests:
        return []
    start = max(with_requests)
    entries = pool.windows.by_start[start].requests.items()
    return [f"request/{pool.name}/{start}/{source}@{entry[0]}" for source, entry in entries]
