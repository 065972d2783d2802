"""Real runs of real engines that had their machine to themselves, beside neighbours who never were.

BurstGPT's replay against vLLM (six rates, as one series; time per token = running / generation throughput) and the
recorded run of vLLM on a CPU (histogram deltas). Both are minutes long, so a window is 1 and 2 s here and is given as
if it were one of 10 s: rates and time per token are what they were, their noise is that of the short window.

Nobody harmed these engines: what is alarmed on is false. With `slowdown` the first of the fictitious neighbours does:
the recorded time per token is multiplied by what it would have cost.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np

from tests.generators.interference import WINDOW_S, Windows
from tests.generators.interference_load import autoregressive, spells
from tests.recorded import scrapes

BURST_KV_TOKENS = 700e3
"""KV cache of Llama-3.2-1B on 24 GiB; the logs give per cent of it."""
_VLLM = {
    "running": "vllm:num_requests_running",
    "kv": "vllm:kv_cache_usage_perc",
    "prompt": "vllm:prompt_tokens_total",
    "cached": "vllm:prompt_tokens_cached_total",
    "tokens": "vllm:generation_tokens_total",
    "steps": "vllm:iteration_tokens_total_count",
    "preemptions": "vllm:num_preemptions_total",
    "itl_s": "vllm:inter_token_latency_seconds_sum",
    "itl": "vllm:inter_token_latency_seconds_count",
}
_SERIES = re.compile(r"^([a-zA-Z_:]+)(?:\{[^}]*\})? (\S+)$")


def burst(folder: Path) -> dict[str, np.ndarray]:
    """Loads [windows] of 1 s, the six runs one after another, slowest first."""
    rows: list[np.ndarray] = []
    for scale in (100, 300, 500, 700, 1000, 2000):
        with (folder / "vllm_log" / f"vllm_log_scale{scale}_prompt500.csv").open() as file:
            found = [[float(value) for value in row.values()] for row in csv.DictReader(file)]
        run = np.array(found)[: len(found) // 2 * 2]
        rows.append(run.reshape(-1, 2, run.shape[1]).mean(axis=1))
    at = np.concatenate(rows).T
    prompt, generated, running, kv = at[1], at[2], at[3], at[6]
    with np.errstate(divide="ignore", invalid="ignore"):
        tpot = np.where((generated > 0) & (running > 0), running / generated, np.nan)
    unknown = np.full(len(prompt), np.nan)
    return {
        "steps": unknown,
        "tokens": generated * WINDOW_S,
        "running": running,
        "kv_tokens": kv / 100 * BURST_KV_TOKENS,
        "prefill_tokens": prompt * WINDOW_S,
        "tpot_s": tpot,
        "preemptions_per_s": unknown,
    }


def vllm_cpu(folder: Path) -> dict[str, np.ndarray]:
    """Loads [windows] of 2 s, from one scrape a second."""
    read = []
    for at_s, page in scrapes(folder):
        if page is not None:
            found = {m[1]: float(m[2]) for m in map(_SERIES.match, page.split("\n")) if m}
            read.append([at_s, *(found[name] for name in _VLLM.values())])
    at = dict(zip(("t", *_VLLM), np.array(read)[::2].T, strict=True))
    grown = {name: np.diff(values) for name, values in at.items()}
    stretch = WINDOW_S / grown["t"]
    with np.errstate(divide="ignore", invalid="ignore"):
        tpot = grown["itl_s"] / grown["itl"]
    both = np.array(read).T
    running, kv = (_pairs(both[1 + list(_VLLM).index(name)], len(tpot)) for name in ("running", "kv"))
    return {
        "steps": grown["steps"] * stretch,
        "tokens": grown["tokens"] * stretch,
        "running": running,
        "kv_tokens": kv * 99 * 32,
        "prefill_tokens": (grown["prompt"] - grown["cached"]) * stretch,
        "tpot_s": tpot,
        "preemptions_per_s": grown["preemptions"] / grown["t"],
    }


def _pairs(gauge: np.ndarray, n: int) -> np.ndarray:
    """Mean of the two scrapes that end each window."""
    found: np.ndarray = gauge[1 : 2 * n + 1].reshape(n, 2).mean(axis=1)
    return found


def beside(load: dict[str, np.ndarray], seeds: range, slowdown: float) -> Windows:
    """The run once for each seed, each beside three fictitious neighbours of its own."""
    windows = len(load["tokens"])
    taken, harm = np.zeros((windows, len(seeds), 3)), np.ones((windows, len(seeds)))
    for i, seed in enumerate(seeds):
        rng = np.random.default_rng([seed, 77])
        for k in range(3):
            level = np.clip(0.65 * np.exp(autoregressive(rng, windows, 12, 0.25)), 0, 1)
            taken[:, i, k] = level * spells(rng, windows, (6, 40), (8, 40))
        active = taken[:, i, 0] > 0
        harm[:, i] = 1 + (slowdown - 1) * taken[:, i, 0] / taken[active, i, 0].mean()
    rng = np.random.default_rng([seeds.start, 78])
    seen = taken * np.exp(rng.normal(0, 0.25, taken.shape))
    seen = np.clip(seen + 0.15 * (taken.sum(axis=2, keepdims=True) - taken), 0, 1)
    many = {name: np.repeat(values[:, None], len(seeds), axis=1) for name, values in load.items()}
    many["tpot_s"] = many["tpot_s"] * harm
    constant = {"covered_s": float(WINDOW_S), "clock_ratio": np.nan, "accepted": 1.0, "restarted": 0.0}
    many |= {name: np.full(harm.shape, value) for name, value in constant.items()}
    return Windows(many, seen, taken, harm)
