"""How well interference is told on generated replicas: the product's own class, window by window, against the truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models.node.interference import Interference, Neighbour, Observed
from schemas.config import LimitsSpec
from tests.generators.interference import WINDOW_S, Windows, generate
from tests.generators.interference_load import NEIGHBOURS, Setting

WARM_WINDOWS = 720
"""Two hours are learned before anything is scored."""
_FIELDS = ("slowdown", "slowdown_low", "slowdown_high", "agreed", "unexplained", "expected_tpot_s")


@dataclass
class Told:
    """What was said and what was so. Arrays [windows, replicas]."""

    victim: np.ndarray
    right: np.ndarray
    """The antagonist that was named is the one."""
    said: dict[str, np.ndarray]
    truth: np.ndarray


def observe(w: Windows, t: int, graded: bool, pools: Sequence[str] | None = None) -> list[Observed]:
    """The replicas of window t, as the node fold would give them."""
    columns = {name: values[t].tolist() for name, values in w.load.items()}
    seen = w.seen[t].tolist()
    return [
        Observed(
            key=i,
            replica=f"r{i}",
            pool=pools[i] if pools else f"p{i}",
            node=f"n{i}",
            covered_s=columns["covered_s"][i],
            steps=columns["steps"][i],
            tokens=columns["tokens"][i],
            running=columns["running"][i],
            kv_tokens=columns["kv_tokens"][i],
            prefill_tokens=columns["prefill_tokens"][i],
            tpot_s=columns["tpot_s"][i],
            clock_ratio=columns["clock_ratio"][i],
            preemptions_per_s=columns["preemptions_per_s"][i],
            accepted=columns["accepted"][i],
            restarted=columns["restarted"][i] > 0,
            neighbours=[Neighbour(name, "", u, graded) for name, u in zip(NEIGHBOURS, seen[i], strict=True)],
        )
        for i in range(len(seen))
    ]


def tell(w: Windows, graded: bool = True) -> Told:
    """Runs the model over all windows."""
    windows, n = w.slowdown.shape
    model, limits = Interference(), LimitsSpec()
    victim, right = (np.zeros((windows, n), bool) for _ in range(2))
    said = {name: np.full((windows, n), np.nan) for name in _FIELDS}
    for t in range(windows):
        for columns in model.step(1e9 + t * WINDOW_S, observe(w, t, graded), limits).values():
            for k, replica in enumerate(columns["replica"]):
                i = int(replica[1:])
                victim[t, i] = columns["victim"][k]
                right[t, i] = columns["antagonist"][k] == NEIGHBOURS[0]
                for name in _FIELDS:
                    value = columns[name][k]
                    said[name][t, i] = np.nan if value is None else value
    return Told(victim, right, said, w.slowdown)


def run(seeds: Sequence[int], setting: Setting) -> Told:
    """Generates and tells; what is learned from first is cut off."""
    told = tell(generate(seeds, setting), setting.observation != "presence")
    cut = {name: values[WARM_WINDOWS:] for name, values in told.said.items()}
    rest = (array[WARM_WINDOWS:] for array in (told.victim, told.right))
    return Told(*rest, cut, told.truth[WARM_WINDOWS:])


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Chance that a positive scores above a negative; ties count half."""
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, "left")
    ties = np.searchsorted(ordered, positive, "right") - below
    return float((below + ties / 2).mean() / len(negative))


def share(flags: np.ndarray) -> float | None:
    """Mean of flags; None where there are none."""
    return float(flags.mean()) if flags.size else None


def scores(harmed: Told, spared: Told, slowdown: float, alone: bool = True) -> dict[str, float | None]:
    """The figures of one setting: `harmed` with, `spared` without the antagonist's harm, the same seeds."""
    agreed = harmed.said["agreed"]
    usable = ~np.isnan(agreed)
    positive = usable & (harmed.truth >= 1 + 0.4 * (slowdown - 1))
    quiet = usable & (harmed.truth <= (1.01 if alone else 1 + 0.25 * (slowdown - 1)))
    free = spared.said["agreed"][~np.isnan(spared.said["agreed"])]
    everything = np.concatenate([agreed[quiet], free])
    threshold = float(np.quantile(everything, 0.99))
    alarm = harmed.victim & usable
    hit = positive & (agreed > threshold)
    untouched = usable & (harmed.truth <= 1.01)
    error = np.abs(np.log(harmed.said["slowdown"]) - np.log(harmed.truth))
    inside = (harmed.said["slowdown_low"] <= harmed.truth) & (harmed.truth <= harmed.said["slowdown_high"])
    return {
        "auc": auc(agreed[positive], agreed[quiet]),
        "threshold": threshold,
        "recall": share(hit[positive]),
        "rule_recall": share(alarm[positive]),
        "false_alarm_rate": float((agreed[quiet] > threshold).sum() + (free > threshold).sum()) / len(everything),
        "rule_false_alarm_rate": share(harmed.victim[untouched]),
        "rule_false_alarm_rate_spared": share(spared.victim),
        "antagonist_accuracy": share(harmed.right[alarm]),
        "median_severity_error": float(np.median(error[hit])) if hit.any() else None,
        "interval_coverage": share(inside[hit]),
        "unexplained_rate_spared": share(~np.isnan(spared.said["unexplained"])),
    }


def alarms(told: Told) -> tuple[int, int]:
    """(alarms that began, windows under alarm)."""
    rising = told.victim[1:] & ~told.victim[:-1]
    return int(rising.sum() + told.victim[0].sum()), int(told.victim.sum())
