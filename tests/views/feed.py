"""A made-up fleet for tests of the views: result records as the loop would publish them, the same for every run.

Three pools on two GPU types, three tenants, load that climbs and falls, forecasts, a slow replica, decisions in
many states. `Feed.second(t)` gives the records of one second of log time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from schemas.base import Record
from schemas.config import ConfigObject, PoolSpec
from schemas.costs import CostWindow
from schemas.deadletters import DeadLetter, dead_data
from schemas.decisions import (
    Action,
    Alternative,
    Decision,
    Expected,
    PoolStatus,
    Proposal,
    RerouteAction,
    ScaleAction,
    Target,
    Transition,
    Verdict,
)
from schemas.findings import Finding
from schemas.forecasts import LoadForecast
from schemas.log import CONTENT_ARROW, LogRecord
from schemas.signals import (
    ENGINE_WINDOWS,
    GPU_WINDOWS,
    INTERFERENCE_WINDOWS,
    NODE_WINDOWS,
    REQUEST_WINDOWS,
    WindowName,
)
from schemas.topics import (
    COST_WINDOWS,
    DEAD_LETTERS,
    DECISION_EVENTS,
    DECISIONS,
    FINDINGS,
    FLEET_CONFIG,
    LOAD_FORECASTS,
    POOL_SIGNALS,
    ce_type,
)

ORIGIN_S = 1_750_000_000
Item = tuple[str, LogRecord]


class Pool(NamedTuple):
    name: str
    model: str
    gpu_type: str
    price: float
    gpus_per_replica: float
    capacity: float
    base: float
    swing: float
    period_s: float
    replicas_max: int


POOLS = (
    Pool("chat-llama-70b", "llama-3.3-70b", "H100 SXM 80GB", 2.99, 4.0, 3.5, 9.0, 5.5, 2400.0, 6),
    Pool("code-qwen-32b", "qwen2.5-coder-32b", "A100 80GB", 1.79, 2.0, 2.2, 3.6, 2.4, 1500.0, 5),
    Pool("embed-mini", "bge-m3", "A100 80GB", 1.79, 0.5, 24.0, 30.0, 8.0, 3000.0, 4),
)
TENANTS = ("acme", "globex", "initech")
SHARES = (0.55, 0.3, 0.15)
COUNTS = ("arrivals", "ends", "ok", "slo_judged", "ttft_count", "tpot_count", "e2e_count")


def record(offset: int, at_s: float, value: Record, id: str = "") -> LogRecord:
    """A JSON record of the log."""
    return LogRecord(offset, round(at_s * 1000), ce_type(value.kind), "", value.encode(), id=id)


def windows(kind: Any, offset: int, at_s: float, name: WindowName, columns: dict[str, Any]) -> LogRecord:
    """A columnar record of the log."""
    value = kind.encode(columns, name.meta())
    return LogRecord(offset, round(at_s * 1000), kind.type, name.pool, value, CONTENT_ARROW)


def noise(*parts: object) -> float:
    """-1 to 1, the same for the same parts."""
    seed = sum(ord(c) * (i + 7) for i, c in enumerate("/".join(map(str, parts))))
    return math.sin(seed * 12.9898) * 0.6 + math.sin(seed * 4.1414) * 0.4


def load(pool: Pool, t: float) -> float:
    """Requests/s of a pool at log second t."""
    wave = pool.base + pool.swing * math.sin(2 * math.pi * t / pool.period_s)
    return max(0.2, wave * (1 + 0.06 * noise(pool.name, int(t // 10))))


def replicas(pool: Pool, t: float) -> int:
    """Ready replicas at log second t: what the smooth load of the last and next minutes needs, and some reserve."""
    peak = max(
        pool.base + pool.swing * math.sin(2 * math.pi * (t + step) / pool.period_s) for step in range(-300, 121, 60)
    )
    return min(pool.replicas_max, math.ceil(peak * 1.1 / pool.capacity + 0.1))


class Feed:
    """Result records second by second from `start_s` on (Unix s of log time)."""

    def __init__(self, start_s: int = ORIGIN_S) -> None:
        self.start_s = start_s
        self.offset = 0
        self.coming: list[tuple[int, Proposal, Any, float, str, str]] = []
        self.histories: dict[str, list[Transition]] = {}

    def _next(self) -> int:
        self.offset += 1
        return self.offset

    def config(self) -> Iterator[Item]:
        """The pools' specifications."""
        for pool in POOLS:
            spec = PoolSpec(
                model=pool.model,
                gpu_type=pool.gpu_type,
                gpus_per_replica=pool.gpus_per_replica,
                capacity_rps=pool.capacity,
                replicas_max=pool.replicas_max,
                mode="automatic" if pool is POOLS[0] else "approve",
            )
            item = ConfigObject(object_kind="pool", name=pool.name, revision=1, spec=spec.model_dump(mode="json"))
            yield FLEET_CONFIG, record(self._next(), self.start_s, item)

    def second(self, t: int, early: bool = True) -> Iterator[Item]:
        """Everything published in second `t` (0 = start); `early`: looks at open windows as well."""
        now = self.start_s + t
        if t == 0:
            yield from self.config()
            yield from self._slow_replica(now, 2.1, open=True)
            yield from self._letter(now)
        for number, pool in enumerate(POOLS):
            closed = t % 10 == 2
            start = now - 12 if closed else now - now % 10
            if early or closed:
                yield from self._windows(pool, number, t, start, now, closed)
            if t % 10 == 0:
                yield from self._status(pool, t, now)
                yield from self._forecasts(pool, t, now)
            if closed:
                yield from self._costs(pool, number, t, start, now)
        yield from self.decisions(t, now)
        if t == 900:
            yield from self._slow_replica(now, 1.0, open=False)

    def _windows(self, pool: Pool, number: int, t: int, start: int, now: int, closed: bool) -> Iterator[Item]:
        n = replicas(pool, t)
        name = WindowName(pool.name, f"node.samples/{number}", start, self._next(), float(now), closed)
        each = load(pool, t) / n
        slow = pool is POOLS[0] and t < 900
        names = [f"{pool.name}-{i}" for i in range(n)]
        tpot = [0.024 * (2.1 if slow and i == 1 else 1) + 0.004 * each for i in range(n)]
        yield (
            POOL_SIGNALS,
            windows(
                ENGINE_WINDOWS,
                name.version,
                now,
                name,
                {
                    "replica": names,
                    "node": [f"node-{number * 4 + int(i * pool.gpus_per_replica) // 8}" for i in range(n)],
                    "state": ["starting" if i == n - 1 and t % 300 < 40 else "ready" for i in range(n)],
                    "billed": [1] * n,
                    "gpus": [pool.gpus_per_replica] * n,
                    "gpu_type": [pool.gpu_type] * n,
                    "allocated_s": [10.0] * n,
                    "samples": [10] * n,
                    "last_at_s": [float(now)] * n,
                    "covered_s": [10.0] * n,
                    "resets": [0] * n,
                    "running_mean": [each * 8] * n,
                    "waiting_last": [max(0.0, each - pool.capacity) * 3] * n,
                    "kv_usage_ratio_mean": [min(0.97, 0.2 + 0.5 * each / pool.capacity)] * n,
                    "generation_tokens": [each * 10 * 210] * n,
                    "requests": [each * 10] * n,
                    "ttft_s_sum": [each * 10 * 0.4] * n,
                    "ttft_count": [each * 10] * n,
                    "tpot_s_sum": [each * 10 * x for x in tpot],
                    "tpot_count": [each * 10] * n,
                },
            ),
        )
        ends = [round(load(pool, t) * 10 * share) for share in SHARES]
        good = [e - round(e * 0.004 * (3 if slow else 1)) for e in ends]
        yield (
            POOL_SIGNALS,
            windows(
                REQUEST_WINDOWS,
                self._next(),
                now,
                name._replace(source=f"request.traces/{number}", version=self.offset),
                {
                    "tenant": list(TENANTS),
                    "class": ["chat"] * 3,
                    **dict.fromkeys(
                        ("arrivals", "ends", "ok", "slo_judged", "ttft_count", "tpot_count", "e2e_count"), ends
                    ),
                    "errors": [0] * 3,
                    "rejected": [0] * 3,
                    "slo_good": good,
                    "input_tokens": [e * 1100.0 for e in ends],
                    "cached_tokens": [0.0] * 3,
                    "output_tokens": [e * 210.0 for e in ends],
                    "ttft_s_sum": [e * 0.4 for e in ends],
                    "tpot_s_sum": [e * 0.03 for e in ends],
                    "e2e_s_sum": [e * 6.0 for e in ends],
                },
            ),
        )
        if closed:
            count = max(1, math.ceil(n * pool.gpus_per_replica))
            util = min(99.0, 100 * each / pool.capacity)
            yield (
                POOL_SIGNALS,
                windows(
                    GPU_WINDOWS,
                    self._next(),
                    now,
                    name._replace(version=self.offset),
                    {
                        "node": [f"node-{number * 4 + i // 8}" for i in range(count)],
                        "gpu": [i % 8 for i in range(count)],
                        "gpu_type": [pool.gpu_type] * count,
                        "status": ["ok"] * count,
                        "samples": [10] * count,
                        "covered_s": [10.0] * count,
                        "util_gpu_pct_mean": [max(0.0, util + 4 * noise(pool.name, i, t)) for i in range(count)],
                        "mem_used_bytes_max": [6.2e10] * count,
                        "mem_total_bytes": [8.0e10] * count,
                        "power_w_mean": [180 + 4.5 * util] * count,
                        "temp_c_max": [61.0] * count,
                    },
                ),
            )
            yield from self._shared(pool, number, now, name, names)

    def _shared(self, pool: Pool, number: int, now: int, name: WindowName, names: list[str]) -> Iterator[Item]:
        """Nodes, under the pool `-`, and what replicas that share a GPU suffer."""
        nodes = [f"node-{number * 4 + i}" for i in range(2)]
        sums = {"gpus": 8.0, "gpus_allocated": 6.0, "gpus_free": 2.0, "gpus_lost": 0.0, "replicas": 3}
        free = name._replace(pool="-", version=self._next())
        columns = {"node": nodes, "gpu_type": [pool.gpu_type] * 2, "power_w_mean": [4200.0] * 2}
        columns |= {key: [value] * 2 for key, value in sums.items()}
        yield POOL_SIGNALS, windows(NODE_WINDOWS, free.version, now, free, columns)
        verdict = {
            "replica": names[:1],
            "node": nodes[:1],
            "victim": [1],
            "antagonist": ["batch-0"],
            "antagonist_pool": ["batch"],
            "slowdown": [1.3],
            "slowdown_low": [1.2],
            "slowdown_high": [1.4],
            "windows": [360],
        }
        own = name._replace(version=self._next())
        yield POOL_SIGNALS, windows(INTERFERENCE_WINDOWS, own.version, now, own, verdict)

    def _status(self, pool: Pool, t: int, now: int) -> Iterator[Item]:
        n = replicas(pool, t)
        wanted = replicas(pool, t + 120)
        rate = load(pool, t)
        rho = rate / (n * pool.capacity)
        usd = n * pool.gpus_per_replica * pool.price
        slow = pool is POOLS[0] and t < 900
        status = PoolStatus(
            pool=pool.name,
            at_s=now,
            version=self._next(),
            policy_revision=1,
            gpu_type=pool.gpu_type,
            replicas_target=max(n, wanted),
            replicas_wanted=wanted,
            replicas_allocated=max(n, wanted),
            replicas_ready=n,
            gpus_allocated=n * pool.gpus_per_replica,
            gpus_per_replica=pool.gpus_per_replica,
            usd_per_hour=usd,
            usd_hour_to_date=usd * (now % 3600) / 3600,
            usd_day_to_date=usd * (now % 86400) / 3600 * 0.9,
            usd_month_to_date=usd * 24 * 11,
            evidence_s=now - 1,
            requests_per_s=rate,
            capacity_rps=pool.capacity,
            utilisation_ratio=rho,
            util_gpu_pct=min(99.0, 100 * rho),
            running=rate * 8,
            waiting=max(0.0, rho - 0.9) * 60,
            kv_usage_ratio=min(0.97, 0.2 + 0.5 * rho),
            slo_attainment=max(0.9, 0.999 - max(0.0, rho - 0.85) * 0.3 - (0.012 if slow else 0)),
            ttft_s_p50=0.31 + 0.2 * rho,
            ttft_s_p99=0.9 + 1.1 * max(0.0, rho - 0.5) * (2 if slow else 1),
            tpot_s_p50=0.028,
            tpot_s_p99=0.05 + 0.06 * rho,
            replica_weights={f"{pool.name}-1": 0.35} if slow else {},
            policy="hold 300 s x 1.10 + 1",
            candidates=[
                {"hold_s": w, "margin": m, "paid": 1 + w / 3000, "missed": 0.02 / w * 60}
                for w in (60, 300, 900)
                for m in (1, 1.1)
            ],
        )
        yield DECISION_EVENTS, record(self.offset, now, status)

    def _forecasts(self, pool: Pool, t: int, now: int) -> Iterator[Item]:
        for horizon in (60, 180, 240):
            ahead = load(pool, t + horizon) * (1 + 0.03 * noise("f", pool.name, t, horizon))
            wide = 0.08 + horizon / 2400
            forecast = LoadForecast(
                pool=pool.name,
                horizon_s=horizon,
                at_s=now,
                target_s=now + horizon,
                version=self._next(),
                requests_per_s=ahead,
                requests_per_s_p10=ahead * (1 - wide),
                requests_per_s_p90=ahead * (1 + wide),
                model="ewma 60 s",
                matured=t // 10,
                mae=0.04 * pool.base,
                mae_last=0.07 * pool.base,
                coverage_p90=0.91,
                actual_requests_per_s=load(pool, t),
                was_forecast=load(pool, t) * 1.03,
            )
            yield LOAD_FORECASTS, record(self.offset, now, forecast)

    def _costs(self, pool: Pool, number: int, t: int, start: int, now: int) -> Iterator[Item]:
        n = replicas(pool, t)
        bill = n * pool.gpus_per_replica * pool.price / 360
        rho = min(1.0, load(pool, t) / (n * pool.capacity))
        requests = [round(load(pool, t) * 10 * share) for share in SHARES]
        for tenant, share, count in (*zip(TENANTS, SHARES, requests, strict=True), (None, 1.0, sum(requests))):
            tokens = count * 1310.0
            direct, idle = bill * rho * share, bill * (1 - rho) * share
            window = CostWindow(
                pool=pool.name,
                tenant=tenant,
                start_s=start,
                size_s=10,
                version=self._next(),
                closed=True,
                requests=count,
                input_tokens=count * 1100.0,
                output_tokens=count * 210.0,
                usd_direct=direct,
                usd_idle=idle,
                usd_total=direct + idle,
                usd_per_million_tokens_direct=direct / tokens * 1e6 if tokens else None,
                usd_per_million_tokens=(direct + idle) / tokens * 1e6 if tokens else None,
            )
            yield COST_WINDOWS, record(self.offset, now, window)

    def _slow_replica(self, now: int, factor: float, open: bool) -> Iterator[Item]:
        finding = Finding(
            finding="slow_replica",
            pool=POOLS[0].name,
            subject=f"{POOLS[0].name}-1",
            open=open,
            since_s=self.start_s,
            at_s=now,
            version=self._next(),
            text=f"TPOT 61 ms against a median of 29 ms of its peers at the same load ({factor:.1f}x) for 30 s.",
            severity=factor,
            usd_per_hour=6.4 if open else None,
            evidence={"tpot_s": 0.061, "peers_tpot_s": 0.029, "windows": 3},
        )
        yield FINDINGS, record(self.offset, now, finding)

    def _letter(self, now: int) -> Iterator[Item]:
        letter = DeadLetter(
            topic="request.traces",
            partition=1,
            offset=77,
            at_s=now,
            type="fleetloop.request.rows.v1",
            reason="time_unit",
            field="at_s",
            value="1.75e12",
            remedy="send seconds since 1970, not milliseconds",
            rows=[4, 5],
            rows_refused=2,
            **dead_data(b"x"),
        )
        yield DEAD_LETTERS, record(self._next(), now, letter)

    def _lifecycle(self, pool: Pool, t: int, now: int, before: int | None, action: Action) -> None:
        """Puts the steps of a new decision among those that come."""
        scale = isinstance(action, ScaleAction)
        up = scale and before is not None and action.replicas > before
        usd = pool.price * pool.gpus_per_replica
        id = f"{pool.name[:4]}{'s' if scale else 'r'}{t:06d}"
        proposal = Proposal(
            id=id,
            decision_kind="scale" if scale else "reroute",
            target=Target(pool=pool.name),
            action=action,
            undo=ScaleAction(replicas=before) if before is not None else RerouteAction(weights={f"{pool.name}-1": 1.0}),
            reason=self._reason(pool, t, before, action),
            alternatives=[
                Alternative(action="keep as it is", why_not="two forecasts of three say the load passes capacity."),
                Alternative(action="2 replicas more", why_not="+$11.96/h for 0.1 % of SLO."),
            ],
            evidence={"requests_per_s": round(load(pool, t), 2), "forecast_p90": round(load(pool, t + 180) * 1.1, 2)},
            expected=Expected(slo_attainment=0.997, slo_attainment_low=0.985, usd_per_hour=usd if up else -usd),
            confidence=0.86,
            at_s=now,
            trigger_s=now - 1.4,
            evidence_s=now - 1,
            expires_s=now + 300,
            policy_revision=1,
            replicas_from=before,
        )
        automatic = pool is POOLS[0]
        steps = [("proposed", 0.0, "the planner", "fleetloop")]
        if automatic:
            steps += [
                ("approved", 0, "automatic mode, step within bounds", "fleetloop"),
                ("dispatched", 0, "to simulator", "fleetloop"),
                ("executed", 1.2, f"{proposal.decision_kind} carried out", "simulator"),
                ("verified", 61, "SLO 99.4 % measured, 99.7 % expected", "fleetloop"),
            ]
        else:
            steps.append(("pending", 0, "mode approve", "fleetloop"))
            steps.append(
                ("rejected", 140, "not before the launch", "ada (page)") if not up else ("expired", 300, "", "")
            )
        for state, delay, cause, actor in steps:
            self.coming.append((t + math.ceil(delay), proposal, state, delay, cause, actor))

    def decisions(self, t: int, now: int) -> Iterator[Item]:
        """Steps of decisions that are due, then new ones: where the wanted replicas change, and one reroute."""
        for pool in POOLS:
            before, after = replicas(pool, t + 119), replicas(pool, t + 120)
            if t and before != after:
                self._lifecycle(pool, t, now, before, ScaleAction(replicas=after))
        if t == 30:
            self._lifecycle(POOLS[0], t, now, None, RerouteAction(weights={f"{POOLS[0].name}-1": 0.35}))
        due = [step for step in self.coming if step[0] <= t]
        self.coming = [step for step in self.coming if step[0] > t]
        for _, proposal, state, delay, cause, actor in due:
            step = Transition(state=state, at_s=proposal.at_s + delay, offset=self._next(), cause=cause, actor=actor)
            history = self.histories.setdefault(proposal.id, [])
            history.append(step)
            decision = Decision(
                id=proposal.id,
                version=self.offset,
                state=state,
                mode="automatic" if proposal.target.pool == POOLS[0].name else "approve",
                epoch=history[0].offset,
                proposal=proposal,
                history=list(history),
            )
            yield DECISIONS, record(self.offset, now, decision)
            if state == "verified":
                verdict = Verdict(
                    decision_id=proposal.id,
                    pool=proposal.target.pool,
                    verdict="verified",
                    text="SLO attainment 99.4 % against 99.7 % expected (at least 98.5 %), +$11.96/h as expected.",
                    measured={"slo_attainment": 0.994, "usd_per_hour": 11.96},
                    at_s=now,
                )
                yield DECISION_EVENTS, record(self._next(), now, verdict)

    @staticmethod
    def _reason(pool: Pool, t: int, before: int | None, action: Action) -> str:
        if not isinstance(action, ScaleAction):
            return (
                f"{pool.name}-1 takes 61 ms per output token where its peers take 29 ms at the same load: "
                "its share of the traffic is cut to 0.35 until it has recovered for 60 s."
            )
        return (
            f"Load {load(pool, t):.1f} requests/s, held peak {load(pool, t + 60):.1f} x 1.10 over a capacity of "
            f"{pool.capacity:g} requests/s a replica, and 1 in reserve: {action.replicas} replicas instead of {before}."
        )


def records(seconds: int, start_s: int = ORIGIN_S) -> list[Item]:
    """All records of the first `seconds` seconds."""
    feed = Feed(start_s)
    return [item for t in range(seconds) for item in feed.second(t)]
