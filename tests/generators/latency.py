"""A pool of replicas whose latency breaks for causes that are known: what each level below would say of it, by window.

Every run is made from a seed: the model and its GPU, the engine's settings, the load, the router, and which signals are
not there. A cause is injected from `START_S` for `length_s`; two may be at the same time. Shares no code with models/.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tests.generators.latency_engine import Counters, Replica, Request, Traits

CAUSES = ("queueing", "prefill", "batch", "kv", "interference", "throttling", "cold_start", "skew")
WINDOW_S = 10
START_S = 600
TAIL_S = 120
MILD = {"queueing": 1.1, "prefill": 1.15, "batch": 1.15, "interference": 1.05, "throttling": 0.93}
"""What else changes where that is asked for, while a cause is there: for all replicas, or for r0."""
MISSING = {"iterations": 0.2, "itl": 0.25, "kv_capacity": 0.25, "times": 0.25, "clock": 0.2}
"""Signals and in what share of the pools they are null."""
RULE_WINDOWS = 2
"""Windows until level 1 says that a replica is slowed (3 of 6)."""


@dataclass(frozen=True)
class Injection:
    """One cause: how strong, on whom."""

    cause: str
    strength: float
    replicas: tuple[int, ...]


@dataclass
class World:
    """One pool."""

    seed: int
    traits: Traits
    replicas: int
    used: float
    """Usual rate as a share of what its replicas carry."""
    rate_rps: float
    prompt: float
    output: float
    cached: float
    kv_max: float
    router: str
    length_s: int
    tail_s: int
    """How long it goes on after that."""
    injected: tuple[Injection, ...]
    missing: tuple[str, ...]
    """Signals that are null throughout."""
    misled: bool
    """Whether a little of every other cause (`MILD`) comes at the same time: not what breaks it."""


@dataclass
class Window:
    """What is said of one window."""

    start_s: int
    engines: list[dict[str, Any]]
    requests: dict[str, Any]
    interference: list[dict[str, Any]]


def make(seed: int, causes: Sequence[str], tail_s: int = TAIL_S, misled: bool = False) -> World:
    """A world from a seed: the same seed gives the same pool whatever is injected."""
    rng = np.random.default_rng([seed, 1])
    token_s = rng.uniform(25e-6, 60e-6)
    traits = Traits(
        floor_s=rng.uniform(0.014, 0.035),
        token_s=token_s,
        kv_s=rng.uniform(1.0e-7, 2.5e-7),
        knee=rng.uniform(30e3, 90e3),
        host_s=rng.uniform(0.001, 0.004),
        sequence_s=rng.uniform(1.5e-4, 5e-4),
        chunk=int(rng.choice([512, 1024, 2048])),
        batch_max=int(rng.choice([128, 192, 256])),
    )
    replicas = int(rng.integers(3, 7))
    world = World(
        seed=seed,
        traits=traits,
        replicas=replicas,
        used=0.0,
        rate_rps=0.0,
        prompt=rng.uniform(500, 1600),
        output=rng.uniform(80, 220),
        cached=float(rng.choice([0.0, 0.3])),
        kv_max=1e9,
        router=str(rng.choice(["random", "two_choices", "round_robin", "least"])),
        length_s=int(rng.integers(12, 24)) * 10,
        tail_s=tail_s,
        injected=(),
        misled=misled,
        missing=tuple(
            name
            for name, likely in MISSING.items()
            if rng.random() < likely
        ),
    )  # fmt: skip
    world.used = rng.uniform(0.4, 0.55)
    world.rate_rps = replicas * _knee_rps(world) * world.used
    held, _ = _alone(world, 1.0)
    world.kv_max = max(held / rng.uniform(0.08, 0.2), 12.0 * world.prompt)
    draws = np.random.default_rng([seed, 2])
    for cause in causes:
        world.injected += (_injection(cause, world, held, draws),)
    return world


def _injection(cause: str, world: World, held: float, rng: np.random.Generator) -> Injection:
    order = tuple(int(i) for i in rng.permutation(world.replicas))
    some = order[: int(rng.integers(1, max(2, world.replicas // 2 + 1)))]
    if cause == "queueing":
        return Injection(cause, rng.uniform(1.15, 1.5) / world.used, order)
    if cause == "prefill":
        return Injection(cause, rng.uniform(3.0, 5.0), order)
    if cause == "batch":
        return Injection(cause, _longest(world, rng.uniform(0.9, 1.0)), order)
    if cause == "kv":
        return Injection(cause, rng.uniform(0.5, 0.8) * held / world.kv_max, order)
    if cause == "interference":
        return Injection(cause, rng.uniform(1.8, 2.8), some)
    if cause == "throttling":
        return Injection(cause, rng.uniform(0.3, 0.5), some)
    if cause == "cold_start":
        gone = max(1, round(world.replicas * rng.uniform(0.4, 0.65)))
        return Injection(cause, rng.uniform(1.5, 2.5), order[:gone])
    gone_too = [i for one in world.injected if one.cause == "cold_start" for i in one.replicas]
    staying = [i for i in order if i not in gone_too]
    return Injection(cause, rng.uniform(2.2, 3.2), tuple(staying[:1]))


def _sizes(rng: np.random.Generator, mean: float, spread: float, most: int) -> int:
    return int(min(max(rng.lognormal(np.log(mean) - spread**2 / 2, spread), 2), most))


def _request(world: World, rng: np.random.Generator, at_s: float, longer: float, more: float) -> Request:
    prompt = _sizes(rng, world.prompt * longer, 0.8, 24_000)
    cached = int(prompt * world.cached * rng.uniform(0.5, 1.5))
    return Request(at_s, max(1, prompt - cached), cached, _sizes(rng, world.output * more, 0.7, 2_000))


def _knee_rps(world: World) -> float:
    """What one replica carries when it is never idle."""
    rng = np.random.default_rng([world.seed, 3])
    replica = Replica(world.traits, 1e9, rng)
    for _ in range(3000):
        replica.waiting.append(_request(world, rng, 0.0, 1.0, 1.0))
    replica.advance(20.0)
    before = replica.count.requests
    replica.advance(60.0)
    return (replica.count.requests - before) / 40.0


def _alone(world: World, more: float) -> tuple[float, float]:
    """(tokens held, requests waiting) on one replica at the usual rate with answers `more` times as long, means."""
    rng = np.random.default_rng([world.seed, 4])
    replica, at_s = Replica(world.traits, 1e9, rng), 0.0
    held, waiting = [], []
    for second in range(90):
        while at_s < second + 1:
            replica.waiting.append(_request(world, rng, at_s, 1.0, more))
            at_s += rng.exponential(world.replicas / world.rate_rps)
        replica.advance(second + 1.0)
        held.append(replica.kv)
        waiting.append(len(replica.waiting))
    return float(np.mean(held[30:])), float(np.mean(waiting[30:]))


def _longest(world: World, part: float) -> float:
    """Answers so much longer that batches grow and neither the KV cache nor a queue binds: else it would be those."""
    best = 1.5
    for more in np.arange(1.75, 5.0, 0.25).tolist():
        held, waiting = _alone(world, more)
        if held > 0.5 * world.kv_max or waiting > 1.0:
            break
        best = more
    return best * part


class _Pool:
    """The world at work."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rng = np.random.default_rng([world.seed, 5])
        self.replicas = [Replica(world.traits, world.kv_max, self.rng) for _ in range(world.replicas)]
        self.ready = [True] * world.replicas
        self.loading_until = [0.0] * world.replicas
        self.warm_s = [-1e9] * world.replicas
        self.turn = 0
        self.mood = 0.0
        self.backlog: list[Request] = []
        self.arrived: list[Request] = []
        self.now: dict[str, Injection] = {}

    def second(self, at: int) -> None:
        """One second: causes, arrivals, steps."""
        world = self.world
        inside = START_S <= at < START_S + world.length_s
        self.now = {one.cause: one for one in world.injected} if inside else {}
        self._conditions(at)
        self.mood = 0.97 * self.mood + 0.25 * 0.08 * self.rng.normal()
        rate = world.rate_rps * max(0.3, 1 + self.mood) * self._strength("queueing")
        for at_s in np.sort(at + self.rng.random(int(self.rng.poisson(rate)))).tolist():
            self.backlog.append(_request(world, self.rng, at_s, self._strength("prefill"), self._strength("batch")))
            self.arrived.append(self.backlog[-1])
        if any(self.ready):
            for request in self.backlog:
                self.replicas[self._route()].waiting.append(request)
            self.backlog = []
        for i, replica in enumerate(self.replicas):
            if self.ready[i]:
                replica.advance(at + 1.0)
            else:
                replica.now_s = at + 1.0

    def _strength(self, cause: str) -> float:
        if cause in self.now:
            return self.now[cause].strength
        return MILD.get(cause, 1.0) if self.now and self.world.misled else 1.0

    def _conditions(self, at: int) -> None:
        starting = self.now.get("cold_start")
        for i, replica in enumerate(self.replicas):
            if starting is not None and i in starting.replicas and at == START_S:
                lost = [*replica.running, *replica.waiting]
                replica.kill()
                self.ready[i], self.loading_until[i] = False, at + 0.6 * self.world.length_s
                # clients ask again
                self.backlog += [Request(at, r.prompt, r.cached, r.output) for r in lost]
            if not self.ready[i] and at >= self.loading_until[i]:
                self.ready[i], self.warm_s[i] = True, at
            replica.kv_max = self.world.kv_max * self._strength("kv")
            replica.clock = self._on("throttling", i)
            replica.slow = self._on("interference", i)
            if replica.slow > 1:  # a neighbour's work comes and goes
                replica.slow = max(1.0, 1 + (replica.slow - 1) * self.rng.uniform(0.6, 1.4))
            if at - self.warm_s[i] < 20:
                replica.slow *= 1.6

    def _on(self, cause: str, replica: int) -> float:
        one = self.now.get(cause)
        if one is not None:
            return one.strength if replica in one.replicas else 1.0
        return MILD[cause] if self.now and self.world.misled and replica == 0 else 1.0

    def _route(self) -> int:
        known = [i for i, ready in enumerate(self.ready) if ready]
        skew = self.now.get("skew")
        if skew is not None and skew.replicas[0] in known and self.rng.random() < skew.strength / len(known):
            return skew.replicas[0]
        if self.world.router == "random":
            return known[int(self.rng.integers(len(known)))]
        if self.world.router == "round_robin":
            self.turn += 1
            return known[self.turn % len(known)]
        if self.world.router == "two_choices" and len(known) > 1:
            a, b = self.rng.choice(known, 2, replace=False)
            return int(a if self.replicas[a].in_flight <= self.replicas[b].in_flight else b)
        return min(known, key=lambda i: self.replicas[i].in_flight)


def windows(world: World) -> Iterator[Window]:
    """Every window of a run, in order, as it is when it is closed."""
    pool = _Pool(world)
    before = [asdict(replica.count) for replica in pool.replicas]
    for start_s in range(0, START_S + world.length_s + world.tail_s, WINDOW_S):
        gauges: list[list[tuple[float, float, float]]] = [[] for _ in pool.replicas]
        loading = [0.0] * world.replicas
        for second in range(start_s, start_s + WINDOW_S):
            pool.second(second)
            for i, replica in enumerate(pool.replicas):
                if pool.ready[i]:
                    gauges[i].append((len(replica.running), len(replica.waiting), replica.kv / replica.kv_max))
                else:
                    loading[i] += 1.0
        rows = []
        for i, replica in enumerate(pool.replicas):
            total = asdict(replica.count)
            restarted = total["iterations"] < before[i]["iterations"]
            since = asdict(Counters()) if restarted else before[i]
            grown = {name: total[name] - since[name] for name in total}
            rows.append(_engine_row(pool, i, grown, gauges[i], loading[i], restarted))
            before[i] = total
        yield Window(start_s, rows, _request_row(pool), _interference_rows(pool, start_s))


def _engine_row(
    pool: _Pool, i: int, grown: dict[str, float], gauges: list[tuple[float, float, float]], loading_s: float,
    restarted: bool,
) -> dict[str, Any]:  # fmt: skip
    world, replica = pool.world, pool.replicas[i]
    row: dict[str, Any] = {"replica": f"r{i}", "state": "ready" if pool.ready[i] else "starting"}
    row |= {"covered_s": float(len(gauges)), "loading_s": loading_s, "resets": int(restarted)}
    if not gauges:
        empty = ("running_mean", "waiting_mean", "running_last", "waiting_last")
        return row | dict.fromkeys(empty, None)
    running, waiting, usage = (np.array(column, float) for column in zip(*gauges, strict=True))
    row |= {"running_mean": running.mean(), "waiting_mean": waiting.mean()}
    row |= {"running_last": running[-1], "waiting_last": waiting[-1]}
    row |= {"kv_usage_ratio_mean": min(usage.mean(), 1.0), "kv_usage_ratio_max": min(usage.max(), 1.0)}
    row |= {"running_max": float(world.traits.batch_max), "kv_capacity_tokens": replica.kv_max, **grown}
    hot = replica.clock < 1
    row["throttled_s"] = 10.0 if hot else 0.0
    row["sm_clock_ratio_mean"] = min(1.0, replica.clock * pool.rng.normal(0.97, 0.01))
    gone = {
        "iterations": ("iterations",),
        "itl": ("itl_s_sum", "itl_count"),
        "kv_capacity": ("kv_capacity_tokens",),
        "times": ("queue_s_sum", "queue_count", "prefill_s_sum", "prefill_count"),
        "clock": ("sm_clock_ratio_mean",),
    }
    return row | {name: None for kind in world.missing for name in gone[kind]}


def _request_row(pool: _Pool) -> dict[str, Any]:
    ended = [request for replica in pool.replicas for request in replica.ended]
    ttft = [r.first_s - r.arrival_s for r in ended]
    tpot = [(r.last_s - r.first_s) / (r.output - 1) for r in ended if r.output > 1]
    arrived = pool.arrived
    pool.arrived = []
    for replica in pool.replicas:
        replica.ended = []
    return {
        "tenant": "acme",
        "arrivals": len(arrived),
        "ends": len(ended),
        "ok": len(ended),
        "arrival_input_tokens": float(sum(r.prompt + r.cached for r in arrived)),
        "input_tokens": float(sum(r.prompt + r.cached for r in ended)),
        "cached_tokens": float(sum(r.cached for r in ended)),
        "output_tokens": float(sum(r.output for r in ended)),
        "ttft_s_sum": sum(ttft),
        "ttft_count": len(ttft),
        "tpot_s_sum": sum(tpot),
        "tpot_count": len(tpot),
        "ttft": ttft,
        "tpot": tpot,
    }


def _interference_rows(pool: _Pool, start_s: int) -> list[dict[str, Any]]:
    """What level 1 says: late by its rule, 5 % off; of half of the pools it also has rows that say that all is well."""
    one = pool.now.get("interference")
    known = one if one is not None and start_s >= START_S + RULE_WINDOWS * WINDOW_S else None
    rows = []
    for i in range(pool.world.replicas):
        slowed = known is not None and i in known.replicas
        if not slowed and pool.world.seed % 2:
            continue
        factor = (known.strength if known is not None and slowed else 1.0) * float(pool.rng.lognormal(0, 0.05))
        rows.append(
            {
                "replica": f"r{i}",
                "node": "n0",
                "victim": int(slowed),
                "antagonist": "batch-7" if slowed else None,
                "slowdown": max(1.0, factor),
                "slowdown_low": max(1.0, 0.9 * factor) if slowed else 1.0,
                "slowdown_high": 1.1 * factor,
                "windows": 100,
            }
        )
    return rows
