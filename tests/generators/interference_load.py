"""What happens to a replica from outside, second by second: its load, its neighbours, and what misleads a detector.

Every array is [seconds]. One seed gives one replica with all its traits; nothing here knows the models.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.signal import lfilter

CONFOUNDERS = ("throttle", "prompts", "kv", "redeploy", "correlated")
NEIGHBOURS = ("antagonist", "sibling", "batch")
"""Who is beside it: the one that may harm, an LLM replica on its own daily cycle, a batch job. The last two never
harm."""


@dataclass(frozen=True)
class Setting:
    """What is generated."""

    hours: float = 10.0
    slowdown: float = 1.2
    """Mean slowdown while the antagonist is active; 1: it harms nobody."""
    noise: float = 0.05
    """Standard deviation of a window's ln step time, beside the steps' own 3 %."""
    confounders: tuple[str, ...] = ()
    observation: str = "mid"
    """good: 10 % noise; mid: 25 %, others leak in by 15 %, half a window late; presence: only on or off."""
    alone: bool = True
    """False: its neighbours never pause."""


@dataclass
class World:
    """One replica's outside. Arrays [seconds]; `taken` and `seen` [seconds, 3]."""

    traits: dict[str, float]
    arrivals: np.ndarray
    prompt: np.ndarray
    """Prompt tokens of what arrives, sum."""
    clock: np.ndarray
    kv_share: np.ndarray
    """Share of the KV cache that is there."""
    weight: np.ndarray
    """Multiple of the step time: a deployment's."""
    restarted: np.ndarray
    slowdown: np.ndarray
    accepted: np.ndarray
    taken: np.ndarray
    """What each neighbour takes: the largest of SM, memory and CPU."""
    seen: np.ndarray
    """... as it is observed."""
    scraped: np.ndarray
    jitter: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """Noise of the step time, ln."""


def autoregressive(rng: np.random.Generator, n: int, tau: float, sd: float) -> np.ndarray:
    """A stationary AR(1) with time constant tau (s) and standard deviation sd."""
    a = np.exp(-1 / tau)
    start = rng.normal(0, sd)
    found: np.ndarray = lfilter([1], [1, -a], rng.normal(0, sd * np.sqrt(1 - a * a), n), zi=[a * start])[0]
    return found


def spells(rng: np.random.Generator, n: int, off_s: tuple[float, float], on_s: tuple[float, float]) -> np.ndarray:
    """1 in spells whose length is uniform in on_s, 0 between (uniform in off_s)."""
    found = np.zeros(n)
    at = rng.uniform(0, off_s[1])
    while at < n:
        end = at + rng.uniform(*on_s)
        found[int(at) : int(end)] = 1.0
        at = end + rng.uniform(*off_s)
    return found


def _traits(rng: np.random.Generator) -> dict[str, float]:
    floor = rng.uniform(0.008, 0.025)
    batch, prompt, output = rng.uniform(10, 45), rng.uniform(200, 1400), rng.uniform(120, 400)
    return {
        "floor_s": floor,
        "token_s": floor / rng.uniform(250, 700),
        "kv_s": rng.uniform(0.004, 0.011) / 1e5,
        "knee": rng.uniform(25e3, 70e3),
        "eager_s": rng.uniform(0.0, 0.004),
        "host_s": rng.uniform(0.0008, 0.003),
        "sequence_s": rng.uniform(1e-5, 6e-5),
        "chunk": float(rng.choice([512, 1024, 2048])),
        "kv_max": batch * (prompt + output) * rng.uniform(2.5, 6),
        "batch_max": float(rng.choice([64, 128, 256])),
        "output": output,
        "prompt": prompt,
        "speculative": float(rng.random() < 1 / 3),
        "batch": batch,
    }


def _own_load(rng: np.random.Generator, n: int, traits: dict[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """(relative load, the daily cycle in it)."""
    phase = rng.uniform(0, 2 * np.pi)
    daily = 1 + rng.uniform(0.3, 0.6) * np.sin(2 * np.pi * np.arange(n) / (6 * 3600) + phase)
    slow = np.exp(autoregressive(rng, n, 400, 0.25))
    bursts = 1 + spells(rng, n, (300, 2000), (15, 90)) * rng.uniform(0.8, 2.0)
    return daily * slow * bursts, daily


def _neighbours(rng: np.random.Generator, n: int, setting: Setting, load: np.ndarray, daily: np.ndarray) -> np.ndarray:
    """[seconds, 3 neighbours, (SM, memory, CPU)]: what each takes."""
    kind = rng.choice(["sm", "dram", "both", "cpu"])
    share = {"sm": (1, 0.2, 0.1), "dram": (0.3, 1, 0.1), "both": (0.9, 0.9, 0.1), "cpu": (0.1, 0.1, 1)}[kind]
    if rng.random() < 0.7:
        active = spells(rng, n, (120, 1500), (120, 1200))
    else:
        active = np.clip(0.5 + np.sin(2 * np.pi * np.arange(n) / rng.uniform(5e3, 2e4) + rng.uniform(0, 6)), 0, 1)
    low = 0.0 if setting.alone else rng.uniform(0.1, 0.15)
    level = np.clip(0.65 * np.exp(autoregressive(rng, n, 120, 0.25)), 0.0, 1.0)
    antagonist = np.maximum(active * level, low * (active < 0.1))
    if "correlated" in setting.confounders:
        sibling = 0.45 * load / load.mean() * np.exp(autoregressive(rng, n, 60, 0.1))
    else:
        sibling = 0.4 * daily * np.exp(autoregressive(rng, n, 200, 0.2))
    if setting.alone:  # some time with nobody at all, as where replicas are put to sleep
        sibling = sibling * (1 - spells(rng, n, (600, 2500), (900, 2500)))
    batch = spells(rng, n, (200, 1500), (60, 900)) * np.clip(0.5 + autoregressive(rng, n, 100, 0.15), 0, 1)
    batch = np.maximum(batch, 0.0 if setting.alone else rng.uniform(0.1, 0.15))
    shares = np.array([share, (0.8, 1, 0.15), (1, 0.4, 0.3)])
    series = np.clip(np.stack([antagonist, sibling, batch], axis=1), 0, 1)
    return series[:, :, None] * shares[None]


def _slowdown(
    rng: np.random.Generator, setting: Setting, load: np.ndarray, press: np.ndarray, own_weight: np.ndarray
) -> np.ndarray:
    """Slowdown by the antagonist: own times theirs for SM and memory, theirs for CPU, and what exceeds the GPU."""
    if setting.slowdown <= 1:
        return np.ones(len(load))
    sm = np.clip(0.3 + 0.35 * load / load.mean(), 0.1, 0.95)
    dram = np.clip(0.75 - 0.15 * load / load.mean() + autoregressive(rng, len(load), 300, 0.05), 0.2, 0.95)
    theirs = press[:, 0]
    raw = own_weight[0] * sm * theirs[:, 0] + own_weight[1] * dram * theirs[:, 1] + own_weight[2] * theirs[:, 2]
    raw = raw + 0.3 * np.maximum(0, sm + theirs[:, 0] - 1) + 0.3 * np.maximum(0, dram + theirs[:, 1] - 1)
    active = theirs.max(axis=1) > min(0.3, 0.5 * theirs.max())
    scale = (setting.slowdown - 1) / raw[active].mean()
    found: np.ndarray = 1 + scale * raw
    return found


def _observed(rng: np.random.Generator, setting: Setting, taken: np.ndarray) -> np.ndarray:
    n, j = taken.shape
    if setting.observation == "presence":
        return (taken > 0.02).astype(float)
    sd = 0.10 if setting.observation == "good" else 0.25
    seen = taken * np.exp(np.stack([autoregressive(rng, n, 40, sd) for _ in range(j)], axis=1))
    if setting.observation == "mid":
        seen = seen + 0.15 * (taken.sum(axis=1, keepdims=True) - taken)
        seen = np.concatenate([seen[:5], seen[:-5]])
    return np.clip(seen, 0, 1)


def _mislead(rng: np.random.Generator, n: int, setting: Setting) -> dict[str, np.ndarray]:
    """Clock, share of the KV cache, multiples of prompts and of step time, restarts."""
    ones = np.ones(n)
    found = {"clock": ones, "kv": ones, "prompts": ones, "weight": ones.copy(), "restarted": np.zeros(n)}
    if "throttle" in setting.confounders:
        depth = 1 - spells(rng, n, (600, 3000), (300, 1800)) * rng.uniform(0.15, 0.4)
        found["clock"] = np.clip(depth + autoregressive(rng, n, 100, 0.02), 0.4, 1)
    if "prompts" in setting.confounders:
        found["prompts"] = 1 + spells(rng, n, (1500, 5000), (1200, 3600)) * rng.uniform(1, 4)
    if "kv" in setting.confounders:
        found["kv"] = 1 - spells(rng, n, (1200, 4000), (300, 1500)) * rng.uniform(0.75, 0.9)
    if "redeploy" in setting.confounders:
        for at in np.sort(rng.uniform(0.2, 0.95, 2) * n).astype(int):
            found["weight"][at:] *= 1 + rng.uniform(0.15, 0.2) * rng.choice([-1, 1])
            found["restarted"][at] = 1
    return found


def world(seed: int, setting: Setting) -> World:
    """One replica's outside for `setting.hours`."""
    rng = np.random.default_rng([seed, 20261124])
    n = int(setting.hours * 3600)
    traits = _traits(rng)
    load, daily = _own_load(rng, n, traits)
    press = _neighbours(rng, n, setting, load, daily)
    wrong = _mislead(rng, n, setting)
    taken = press.max(axis=2)
    own_weight = rng.dirichlet([2, 2, 2]) + 0.2
    # what gives this batch at a middling step time, with the time that prefill takes
    each_s = traits["output"] * 1.6 * traits["floor_s"] + traits["batch"] * traits["prompt"] * traits["token_s"]
    rate = traits["batch"] / each_s * load / load.mean()
    if "prompts" in setting.confounders:
        rate = rate / np.sqrt(wrong["prompts"])
    arrivals = rng.poisson(rate).astype(float)
    size = np.exp(rng.normal(-0.25 / np.sqrt(np.maximum(arrivals, 1)), 0.7 / np.sqrt(np.maximum(arrivals, 1))))
    window = np.repeat(autoregressive(rng, n // 10 + 1, -1 / np.log(0.7), setting.noise), 10)[:n]
    missed = rng.random(n) < 0.03
    for at in np.flatnonzero(rng.random(n) < 1 / 2000):
        missed[at : at + rng.integers(4, 16)] = True
    return World(
        traits=traits,
        arrivals=arrivals,
        prompt=arrivals * traits["prompt"] * wrong["prompts"] * size,
        clock=wrong["clock"],
        kv_share=wrong["kv"],
        weight=wrong["weight"],
        restarted=wrong["restarted"],
        slowdown=_slowdown(rng, setting, load, press, own_weight),
        accepted=np.clip(2.3 + autoregressive(rng, n, 3000, 0.3), 1.2, 3.8) if traits["speculative"] else np.ones(n),
        taken=taken,
        seen=_observed(rng, setting, taken),
        scraped=~missed,
        jitter=window + rng.normal(0, 0.03 / np.sqrt(30), n),
    )
