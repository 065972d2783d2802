"""What `fleetloop evaluate interference` runs: figures with harm, alarms without, and real solo runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.generators.interference_load import CONFOUNDERS, Setting
from tests.generators.interference_real import beside, burst, vllm_cpu
from tests.generators.interference_score import WARM_WINDOWS, alarms, auc, run, scores, share, tell

TARGETS = {
    "auc": ("at least", 0.97),
    "recall": ("at least", 0.90),
    "antagonist_accuracy": ("at least", 0.95),
    "median_severity_error": ("at most", 0.05),
}
"""At 1.2x and 5 % noise; recall at a threshold of 1 % false windows."""
TOGETHER = 30
"""Replicas that are generated at once: what memory holds."""
FREE_SEEDS_FROM = 10_000
"""Seeds of the replicas that nobody harms, beside those of the figures."""

Progress = Callable[[str], None]


def evaluate(seeds: Sequence[int], setting: Setting, days: float, say: Progress) -> dict[str, Any]:
    """Figures of `setting` over `seeds`, and the alarms of `days` replica-days without harm under each confounder."""
    say(f"{len(seeds)} replicas of {setting.hours:g} h, slowed {setting.slowdown:g} times while the antagonist works")
    harmed = run(seeds, setting)
    say("the same without harm")
    spared = run(seeds, replace(setting, slowdown=1.0))
    found: dict[str, Any] = scores(harmed, spared, setting.slowdown, setting.alone)
    rates = {}
    for name in ("none", *CONFOUNDERS) if days > 0 else ():
        say(f"{days:g} replica-days without harm, misled by: {name}")
        rates[name] = without_harm(replace(setting, confounders=() if name == "none" else (name,)), days)
    return {**found, "alarms_per_replica_day": rates, "missed": missed(found, setting, rates)}


def without_harm(setting: Setting, days: float) -> dict[str, float]:
    """Alarms a replica-day where nobody harms."""
    scored_days = setting.hours / 24 - WARM_WINDOWS * 10 / 86400
    replicas = int(np.ceil(days / scored_days))
    began = windows = slow = of = 0
    for first in range(0, replicas, TOGETHER):
        seeds = range(FREE_SEEDS_FROM + first, FREE_SEEDS_FROM + min(first + TOGETHER, replicas))
        told = run(seeds, replace(setting, slowdown=1.0))
        more = alarms(told)
        began, windows = began + more[0], windows + more[1]
        slow, of = slow + int((~np.isnan(told.said["unexplained"])).sum()), of + told.victim.size
    days = replicas * scored_days
    return {
        "replica_days": round(days, 2),
        "alarms": began,
        "alarms_per_replica_day": began / days,
        "false_windows": windows / of,
        "unexplained_windows": slow / of,
    }


def missed(found: dict[str, Any], setting: Setting, rates: dict[str, dict[str, float]]) -> list[str]:
    """Targets that were not reached: those of the figures only where they apply."""
    bad = []
    if setting.slowdown >= 1.2 and setting.noise <= 0.05 and setting.observation != "presence":
        for name, (how, limit) in TARGETS.items():
            value = found[name]
            if value is None or (value < limit if how == "at least" else value > limit):
                bad.append(f"{name} {value}, {how} {limit} wanted")
    bad += [f"{rate['alarms']} false alarms under {name}" for name, rate in rates.items() if rate["alarms"]]
    return bad


def real(data: Path, slowdown: float, draws: range, say: Progress) -> dict[str, Any]:
    """The real solo runs beside fictitious neighbours: false windows, and recall where the first is made to harm."""
    loads = {
        "burstgpt-vllm-replay": lambda: burst(data / "burstgpt-vllm-replay"),
        "vllm-cpu-run": lambda: vllm_cpu(data / "engine-metrics" / "vllm-cpu-run"),
    }
    found = {}
    for name, read in loads.items():
        say(f"{name}, {len(draws)} draws of neighbours")
        load = read()
        solo, told = tell(beside(load, draws, 1.0)), tell(beside(load, draws, slowdown))
        agreed = told.said["agreed"]
        usable = ~np.isnan(agreed)
        positive = usable & (told.truth >= 1 + 0.4 * (slowdown - 1))
        quiet = usable & (told.truth <= 1.01)
        error = np.abs(np.log(told.said["slowdown"]) - np.log(told.truth))
        found[name] = {
            "windows": len(load["tokens"]),
            "false_windows": float(solo.victim[~np.isnan(solo.said["agreed"])].mean()),
            "recall": float(told.victim[positive].mean()),
            "auc": auc(agreed[positive], agreed[quiet]),
            "antagonist_accuracy": share(told.right[told.victim & usable]),
            "median_severity_error": float(np.median(error[positive & told.victim])),
            "unexplained_windows": float((~np.isnan(solo.said["unexplained"])).mean()),
        }
    return found
