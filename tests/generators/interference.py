"""A fleet of replicas with neighbours, window by window, by step times of another form than any model here assumes.

Engines with continuous batching and chunked prefill, advanced a second at a time, all replicas at once:
step = max(weights / bandwidth, compute) + part of the smaller + attention with a knee + prefill attention + a penalty
for steps that hold prefill + host time, with batches rounded up as CUDA graphs are. Sequences end after geometrically
many tokens, so a batch is a number and not a list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tests.generators.interference_load import Setting, World, world

WINDOW_S = 10
BUCKETS = np.array([1, 2, 4, *range(8, 513, 8)], float)
_TRAITS = (
    "floor_s",
    "token_s",
    "kv_s",
    "knee",
    "eager_s",
    "host_s",
    "sequence_s",
    "chunk",
    "kv_max",
    "batch_max",
    "output",
    "prompt",
    "speculative",
)


@dataclass
class Windows:
    """Arrays [windows, replicas]; `seen` and `taken` [windows, replicas, 3]."""

    load: dict[str, np.ndarray]
    """covered_s, steps, tokens, running, kv_tokens, prefill_tokens, tpot_s, clock_ratio, preemptions_per_s,
    accepted, restarted."""
    seen: np.ndarray
    taken: np.ndarray
    slowdown: np.ndarray
    """The truth: token-weighted geometric mean."""


def _step_s(
    t: dict[str, np.ndarray],
    batch: np.ndarray,
    kv: np.ndarray,
    prefill: np.ndarray,
    clock: np.ndarray,
    rate: np.ndarray,
) -> np.ndarray:
    """Seconds of a step with so many sequences, KV tokens and prompt tokens."""
    rounded = BUCKETS[np.minimum(np.searchsorted(BUCKETS, batch), len(BUCKETS) - 1)]
    wide = rounded * (1 + 3 * t["speculative"])
    weights = t["floor_s"] * (0.75 + 0.25 / clock) * (1 + 0.12 * np.sqrt(rounded / 256))
    compute = t["token_s"] * (wide + prefill) / clock
    attention = t["kv_s"] * (kv + 0.6 * np.maximum(kv - t["knee"], 0.0))
    long = prefill * t["prompt"] * t["token_s"] * 6e-5 / clock
    host = t["host_s"] + t["sequence_s"] * batch + 2e-4 * rate
    mixed = np.where(prefill > 0, t["eager_s"], 0.0)
    return np.maximum(weights, compute) + 0.15 * np.minimum(weights, compute) + attention + long + host + mixed


class _Engines:
    """State of all replicas: requests that wait, run, and hold KV; prompt tokens to do."""

    def __init__(self, traits: dict[str, np.ndarray]) -> None:
        self.t = traits
        n = len(traits["floor_s"])
        self.batch, self.kv, self.waiting, self.todo, self.rate = (np.zeros(n) for _ in range(5))
        self.step_s = 2 * traits["floor_s"]

    def second(self, at: dict[str, np.ndarray], noise: np.ndarray) -> dict[str, np.ndarray]:
        """One second. `at`: the world's values [replicas]."""
        t = self.t
        self.rate += 0.1 * (at["arrivals"] - self.rate)
        self.waiting += at["arrivals"]
        prompt = np.where(at["arrivals"] > 0, at["prompt"] / np.maximum(at["arrivals"], 1), t["prompt"])
        cache = t["kv_max"] * at["kv_share"]
        room = np.maximum(cache * 0.95 - self.kv, 0) / (prompt + 1)
        admitted = np.minimum(np.minimum(self.waiting, np.maximum(t["batch_max"] - self.batch, 0)), room)
        self.waiting -= admitted
        self.todo += admitted * prompt
        self.kv += admitted * prompt
        self.batch += admitted
        slow = at["slowdown"] * at["weight"] * np.exp(at["jitter"])
        plain = slow * _step_s(t, self.batch, self.kv, np.zeros(len(noise)), at["clock"], self.rate)
        full = slow * _step_s(t, self.batch, self.kv, t["chunk"], at["clock"], self.rate)
        # mixed steps of one chunk each until what is to do is done, or the second is over
        chunks = np.minimum(self.todo / t["chunk"], 1 / full)
        steps = chunks + (1 - chunks * full) / plain
        busy = np.minimum(1.0, self.batch)
        steps, chunks = steps * busy, chunks * busy
        done = chunks * t["chunk"]
        self.todo -= np.minimum(done, self.todo)
        tokens = steps * self.batch * at["accepted"]
        each = steps * at["accepted"]
        ended = self.batch * (1 - np.exp(-each / t["output"]))
        ended = np.clip(ended + noise * np.sqrt(np.maximum(ended, 0)), 0, self.batch)
        share = ended / np.maximum(self.batch, 1e-9)
        self.kv = (self.kv + tokens) * (1 - share)
        self.batch = self.batch - ended
        over = np.maximum(self.kv - cache, 0)
        out = np.where(over > 0, over / np.maximum(self.kv, 1) * self.batch, 0.0)
        self.kv -= over
        self.batch -= out
        self.waiting += out
        used = busy / np.maximum(steps, 1e-9)
        return {"steps": steps, "tokens": tokens, "prefill_tokens": done, "spent": tokens * used / at["accepted"],
                "running": self.batch.copy(), "kv_tokens": self.kv.copy(), "preempted": out}  # fmt: skip


def generate(seeds: Sequence[int], setting: Setting) -> Windows:
    """One replica a seed."""
    worlds = [world(seed, setting) for seed in seeds]
    n, windows = len(worlds), len(worlds[0].arrivals) // WINDOW_S
    engines = _Engines({name: np.array([w.traits[name] for w in worlds]) for name in _TRAITS})
    outside = {name: _stack(worlds, name) for name in
               ("arrivals", "prompt", "clock", "kv_share", "weight", "slowdown", "accepted", "jitter")}  # fmt: skip
    scraped, restarted = _stack(worlds, "scraped"), _stack(worlds, "restarted")
    noise = np.stack([np.random.default_rng([seed, 7]).normal(0, 1, windows * WINDOW_S) for seed in seeds], axis=1)
    names = ("steps", "tokens", "prefill_tokens", "spent", "running", "kv_tokens", "preempted")
    sums = {name: np.zeros((windows, n)) for name in (*names, "covered_s", "clock", "log_slow", "weight", "gain")}
    for second in range(windows * WINDOW_S):
        at = {name: values[second] for name, values in outside.items()}
        got = engines.second(at, noise[second])
        w, seen = second // WINDOW_S, scraped[second]
        for name in names:
            sums[name][w] += got[name] * seen
        sums["covered_s"][w] += seen
        sums["clock"][w] += at["clock"] * seen
        sums["gain"][w] += got["tokens"] * at["accepted"] * seen
        sums["log_slow"][w] += np.log(at["slowdown"]) * got["tokens"]
        sums["weight"][w] += got["tokens"]
    return _windows(sums, worlds, restarted, windows)


def _stack(worlds: list[World], name: str) -> np.ndarray:
    return np.stack([getattr(w, name) for w in worlds], axis=1)


def _windows(sums: dict[str, np.ndarray], worlds: list[World], restarted: np.ndarray, windows: int) -> Windows:
    covered, n = sums["covered_s"], len(worlds)
    shape = (windows, WINDOW_S, n)
    with np.errstate(divide="ignore", invalid="ignore"):
        load = {
            "covered_s": covered,
            "steps": sums["steps"],
            "tokens": sums["tokens"],
            "running": sums["running"] / covered,
            "kv_tokens": sums["kv_tokens"] / covered,
            "prefill_tokens": sums["prefill_tokens"],
            "tpot_s": sums["spent"] / sums["tokens"],
            "clock_ratio": sums["clock"] / covered,
            "preemptions_per_s": sums["preempted"] / covered,
            "accepted": sums["gain"] / sums["tokens"],
            "restarted": restarted[: windows * WINDOW_S].reshape(shape).any(axis=1).astype(float),
        }
        slowdown = np.exp(sums["log_slow"] / sums["weight"])
    seen = _stack(worlds, "seen")[: windows * WINDOW_S].reshape(windows, WINDOW_S, n, -1).mean(axis=1)
    taken = _stack(worlds, "taken")[: windows * WINDOW_S].reshape(windows, WINDOW_S, n, -1).mean(axis=1)
    return Windows(load, seen, taken, slowdown)
