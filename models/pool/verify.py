"""Did an executed decision do what was expected? Judged after the effect horizon, in the windows since.

Regressed: SLO attainment since then is below the expected low end, by more than chance explains, although demand was
not above what was planned for; or the action had no effect. Where no replica is heard of nothing is judged. A decision
that a newer one of its kind replaces is judged at once where that is possible.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from models.pool import status
from models.pool.windows import GOOD, JUDGED, SIZE_S, STATE, R, Row, Windows
from schemas.decisions import Outcome, RerouteAction, ScaleAction

WATCHED_MAX = 100
PLANS_MAX = 100
FREEZE_S = 3600.0
FREEZE_AFTER = 2
"""So many regressions of a kind within an hour freeze it for an hour."""
JUDGED_MIN = 20.0
"""Requests that an SLO judgement needs; with fewer, only the effect is judged."""
SETTLE_S = 10.0
CHANCE = 2.0
"""Standard deviations of the share of n requests, sqrt(low (1 - low) / n), that it may lie below `low` by chance: of 20
requests with 99 % within the targets one misses in every fifth sample, which is 95 % and no regression."""


class Found(NamedTuple):
    """A judgement."""

    verified: bool
    text: str
    measured: dict[str, Any]


class Watch:
    """Executed decisions of one pool that wait for their verdict, and what earlier verdicts mean."""

    __slots__ = ("frozen", "plans", "regressions", "reverted", "watched")

    def __init__(self) -> None:
        self.plans: dict[str, dict[str, Any]] = {}
        """Own proposals: id -> what they were made for (planned load and figures before)."""
        self.watched: dict[str, dict[str, Any]] = {}
        """decision id -> what is to be judged and when."""
        self.regressions: dict[str, list[float]] = {}
        """kind -> when decisions of it regressed, within the last hour."""
        self.frozen: dict[str, float] = {}
        """kind -> until when nothing of it is proposed."""
        self.reverted: list[str] = []
        """Decisions for which a revert has been asked: once each."""

    def plan(self, id: str, load_rps: float | None, shares: dict[str, float]) -> None:
        """Notes what a proposal is made for: the load that it must carry, and the shares of the replicas it changes."""
        self.plans[id] = {"load_rps": load_rps, "shares": shares}
        _bound(self.plans, PLANS_MAX)

    def executed(self, outcome: Outcome, now_s: float, before: dict[str, Any]) -> None:
        """Begins to watch an executed decision. `before`: replicas that were held, what undoes it."""
        expected = outcome.expected
        plan = self.plans.pop(outcome.decision_id, {"load_rps": None, "shares": {}})
        self.watched[outcome.decision_id] = {
            "kind": outcome.decision_kind,
            "action": outcome.action.model_dump(mode="json"),
            "executed_s": now_s,
            "due_s": now_s + expected.horizon_s,
            "horizon_s": expected.horizon_s,
            "low": expected.slo_attainment_low,
            "reverts": outcome.reverts,
            **plan,
            **before,
        }
        _bound(self.watched, WATCHED_MAX)

    def due(self, now_s: float) -> list[str]:
        """Decisions whose horizon has passed."""
        return [id for id, item in self.watched.items() if item["due_s"] <= now_s]

    def replaced(self, kind: str) -> list[str]:
        """Decisions of a kind, all of which a newer one replaces."""
        return [id for id, item in self.watched.items() if item["kind"] == kind]

    def regressed(self, kind: str, now_s: float) -> bool:
        """Notes a regression; True when it freezes the kind."""
        times = [t for t in self.regressions.get(kind, []) if t > now_s - FREEZE_S]
        self.regressions[kind] = [*times, now_s][-FREEZE_AFTER:]
        if len(self.regressions[kind]) >= FREEZE_AFTER:
            self.frozen[kind] = now_s + FREEZE_S
            self.regressions[kind] = []
            return True
        return False

    def is_frozen(self, kind: str, now_s: float) -> bool:
        """Whether nothing of this kind may be proposed now."""
        return self.frozen.get(kind, 0.0) > now_s

    def thaw(self) -> None:
        """The operator has changed the policy: start afresh."""
        self.frozen, self.regressions = {}, {}

    def may_revert(self, id: str) -> bool:
        """True once for each decision."""
        if id in self.reverted:
            return False
        self.reverted = [*self.reverted, id][-WATCHED_MAX:]
        return True

    def state(self) -> dict[str, Any]:
        """As plain values."""
        return {name: getattr(self, name) for name in self.__slots__}

    def restore(self, state: dict[str, Any]) -> None:
        """From `state`."""
        for name in self.__slots__:
            setattr(self, name, state[name])


def _bound(items: dict[str, Any], most: int) -> None:
    while len(items) > most:
        del items[next(iter(items))]


def judge(
    item: Mapping[str, Any], windows: Windows, rows: Mapping[str, Row], now_s: float, early: bool
) -> Found | None:
    """The verdict on one watched decision; `early`: a newer one replaces it. None: cannot be judged."""
    if not rows:
        return None
    action = item["action"]
    effect = _scale_effect(item, rows) if action["type"] == "scale" else _reroute_effect(item, windows, rows, now_s)
    up = action["type"] == "scale" and action["replicas"] > (item["held_before"] or 0)
    # a larger pool can do nothing for its SLO before its replicas have started
    from_s = item["due_s"] - 30.0 if up else item["executed_s"] + SETTLE_S
    start_s = -(-int(from_s) // SIZE_S) * SIZE_S
    totals = windows.totals(start_s, int(now_s) // SIZE_S * SIZE_S)
    share = totals[GOOD] / totals[JUDGED] if totals[JUDGED] >= JUDGED_MIN else None
    demand = max((windows.rate_rps(t) for t in _minutes(item["executed_s"], now_s)), default=None)
    measured: dict[str, Any] = {**effect.measured, "slo_attainment": share, "requests_per_s_max": demand}
    words = [effect.text]
    if share is not None:
        words.append(f"SLO attainment since then {100 * share:.2f} %")
        if item["low"] is not None:
            words[-1] += f" (expected at least {100 * item['low']:.2f} %)"
    below = share is not None and item["low"] is not None and share < _least(item["low"], totals[JUDGED])
    above = item["load_rps"] is not None and demand is not None and demand > item["load_rps"] * 1.02
    if below and above:
        words.append(f"but demand of {demand:.1f} req/s was above the {item['load_rps']:.1f} planned for")
    if early:
        words.append("judged early, a newer order has replaced it")
    verified = effect.verified and (not below or above)
    if early and not verified:
        return None  # it had no time to show its effect: it is superseded, not judged
    return Found(verified, "; ".join(words), measured)


def _least(low: float, judged: float) -> float:
    """The share of so many requests below which `low` is not kept for certain."""
    return low - CHANCE * math.sqrt(low * (1.0 - low) / judged)


def _minutes(from_s: float, to_s: float) -> list[float]:
    """Ends of 10 s windows between two times, at most the last 10 min."""
    first = max(from_s, to_s - 600.0)
    return [float(t) for t in range(int(first) // SIZE_S * SIZE_S, int(to_s) + 1, SIZE_S)]


def _scale_effect(item: Mapping[str, Any], rows: Mapping[str, Row]) -> Found:
    ordered = ScaleAction.model_validate(item["action"]).replicas
    held, ready = status.held(rows), status.ready(rows)
    before = item["held_before"]
    measured = {"replicas_ordered": ordered, "replicas_held": held, "replicas_ready": ready}
    if before is None or ordered >= before:
        return Found(held >= ordered, f"{ordered} replicas ordered, {held} are there, {ready} serve", measured)
    return Found(held <= ordered, f"{ordered} replicas ordered, {held} are left", measured)


def shares(rows: Mapping[str, Row]) -> dict[str, float]:
    """Share of the running requests by replica."""
    running = {name: row[R["running_mean"]] or 0.0 for name, row in rows.items() if row[STATE] == "ready"}
    total = sum(running.values())
    return {name: value / total for name, value in running.items()} if total > 0 else {}


def _reroute_effect(item: Mapping[str, Any], windows: Windows, rows: Mapping[str, Row], now_s: float) -> Found:
    weights = RerouteAction.model_validate(item["action"]).weights
    before = item["shares"]
    now = shares(windows.rows_of((int(now_s) // SIZE_S - 1) * SIZE_S))
    words, good = [], True
    for name, share in before.items():
        if name not in rows or name not in now:
            words.append(f"{name} no longer serves")
        elif weights.get(name, 1.0) < 1.0:
            good = good and now[name] < share
            words.append(f"{name} runs {100 * now[name]:.1f} % of the requests, {100 * share:.1f} % before")
        else:
            words.append(f"{name} runs {100 * now[name]:.1f} % of the requests again")
    measured = {"share_before": dict(before), "share_now": {name: now.get(name) for name in before}}
    return Found(good, "; ".join(words) or "weights are in force", measured)
