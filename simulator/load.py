"""Requests of a scenario in order of arrival, from all its sources, seeded. Made in blocks of fleet time."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import numpy as np

from simulator.request import Request
from simulator.scenario import Scenario, SyntheticLoad, Tokens, TraceLoad
from simulator.trace import read_trace, scale_trace

BLOCK_S = 10
"""Fleet seconds made at once, whole: arrivals do not depend on how they are asked for."""


class Rows(NamedTuple):
    """Requests of one source and block."""

    at_s: np.ndarray
    tenant: list[str]
    klass: list[str]
    input_tokens: list[int]
    output_tokens: list[int]


class Source(Protocol):
    """One stream of requests."""

    route: str
    end_s: float

    def block(self, start_s: float) -> Rows:
        """Requests in [start_s, start_s + BLOCK_S), asked for in order."""


class _Synthetic:
    def __init__(self, load: SyntheticLoad, klass: str, seed: list[int], end_s: float) -> None:
        self.route = load.route
        self.end_s = end_s
        self._load = load
        self._klass = klass
        self._rng = np.random.default_rng(seed)

    def rate_rps(self, t: np.ndarray) -> np.ndarray:
        load = self._load
        shape = np.ones_like(t)
        for wave in load.waves:
            shape += wave.amplitude * np.sin(2 * np.pi * (t / wave.period_s + wave.phase))
        rate: np.ndarray = load.rate_rps * np.maximum(shape, 0.0)
        for burst in load.bursts:
            rate[(t >= burst.at_s) & ((t - burst.at_s) % burst.every_s < burst.duration_s)] *= burst.factor
        return rate

    def block(self, start_s: float) -> Rows:
        rng = self._rng
        starts = start_s + np.arange(BLOCK_S, dtype=float)
        counts = rng.poisson(self.rate_rps(starts + 0.5))
        at_s = np.sort(np.repeat(starts, counts) + rng.random(int(counts.sum())))
        sizes = [_lognormal(rng, tokens, len(at_s)) for tokens in (self._load.input_tokens, self._load.output_tokens)]
        keep = at_s < self.end_s
        n = int(keep.sum())
        return Rows(
            at_s[keep],
            [self._load.tenant] * n,
            [self._klass] * n,
            sizes[0][keep].tolist(),
            sizes[1][keep].tolist(),
        )


class _Recorded:
    def __init__(self, load: TraceLoad, scenario: Scenario, seed: list[int]) -> None:
        self.route = load.route
        self._trace = scale_trace(read_trace(load.path), load.scale, load.jitter_s, scenario.seed, load.duration_s)
        self.end_s = self._trace.duration_s
        senders = [t for t in scenario.tenants if not load.tenants or t.name in load.tenants]
        shares = np.array([t.share for t in senders])
        rng = np.random.default_rng(seed)
        self._who = rng.choice(len(senders), len(self._trace.at_s), p=shares / shares.sum())
        self._names = [t.name for t in senders]
        self._classes = [t.klass for t in senders]

    def block(self, start_s: float) -> Rows:
        trace = self._trace
        low, high = np.searchsorted(trace.at_s, [start_s, start_s + BLOCK_S])
        who = self._who[low:high].tolist()
        return Rows(
            trace.at_s[low:high],
            [self._names[i] for i in who],
            [self._classes[i] for i in who],
            trace.input_tokens[low:high].tolist(),
            trace.output_tokens[low:high].tolist(),
        )


def _lognormal(rng: np.random.Generator, tokens: Tokens, n: int) -> np.ndarray:
    variance = math.log1p(tokens.cv**2)
    drawn = rng.lognormal(math.log(tokens.mean) - variance / 2, math.sqrt(variance), n)
    return np.clip(np.rint(drawn), 1, tokens.max).astype(np.int64)


class Load:
    """All sources of a scenario, merged. Where there is a trace, everything ends with it."""

    def __init__(self, scenario: Scenario) -> None:
        classes = {t.name: t.klass for t in scenario.tenants}
        recorded = {
            i: _Recorded(load, scenario, [scenario.seed, 2, i])
            for i, load in enumerate(scenario.load)
            if isinstance(load, TraceLoad)
        }
        self.end_s = max((r.end_s for r in recorded.values()), default=math.inf)
        """Fleet time of the last request; infinite for a fleet that runs for ever."""
        if scenario.duration_s is not None:
            self.end_s = min(self.end_s, scenario.duration_s)
        self._sources: list[Source] = [
            recorded[i]
            if isinstance(load, TraceLoad)
            else _Synthetic(load, classes[load.tenant], [scenario.seed, 3, i], self.end_s)
            for i, load in enumerate(scenario.load)
        ]
        self._made_s = 0.0
        self._ready: list[Request] = []
        self._next = 0
        self._number = 0

    def take(self, until_s: float) -> list[Request]:
        """The requests that arrive up to and including `until_s` and were not taken before."""
        taken: list[Request] = []
        while True:
            ready, first = self._ready, self._next
            n = first
            while n < len(ready) and ready[n].arrival_s <= until_s:
                n += 1
            taken += ready[first:n]
            self._next = n
            if n < len(ready) or self._made_s > until_s or self._made_s > self.end_s:
                return taken
            self._make()

    def _make(self) -> None:
        start_s = self._made_s
        blocks = [source.block(start_s) for source in self._sources]
        at_s = np.concatenate([b.at_s for b in blocks]) if blocks else np.zeros(0)
        which = np.repeat(np.arange(len(blocks)), [len(b.at_s) for b in blocks])
        inner = np.concatenate([np.arange(len(b.at_s)) for b in blocks]) if blocks else np.zeros(0)
        order = np.argsort(at_s, kind="stable")
        self._ready, self._next = [], 0
        for t, source, i in zip(at_s[order].tolist(), which[order].tolist(), inner[order].tolist(), strict=True):
            b = blocks[source]
            self._ready.append(
                Request(
                    self._number,
                    t,
                    self._sources[source].route,
                    b.tenant[i],
                    b.klass[i],
                    b.input_tokens[i],
                    b.output_tokens[i],
                )
            )
            self._number += 1
        self._made_s = start_s + BLOCK_S
