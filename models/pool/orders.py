"""The decisions of one pool as it knows them: what is asked, what is in force, what became of it.

One slot a kind. Outcomes (upserts by decision id) move it. The target is the last scale action dispatched or executed;
before the first, what was found allocated. What ended without effect is asked again only after a while, which grows
while the same action is blocked for the same cause: every proposal is an entry of the audit, kept for ever.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from schemas.base import canonical
from schemas.decisions import ENDED, Action, Kind, Outcome, RerouteAction, ScaleAction

VERSIONS_MAX = 500
"""Decision ids whose newest version is remembered."""
RETRY_S = {"expired": 10.0, "failed": 30.0, "rejected": 300.0, "shadowed": 300.0}
"""How long the same action is not asked again after it ended so."""
BLOCKED_RETRY_S = (10.0, 20.0, 40.0, 60.0)
"""The same after it was blocked once, twice, ... on end for the same cause; from then on the last."""
ENDED_MAX = 8
"""Actions of a kind of which it is remembered how they ended: a want that goes to and fro waits as well."""
CAUSE_MAX = 200
CLIPPED_RETRY_S = 10.0
LOST_S = 30.0
"""A proposal whose expiry passed so long ago without an outcome is forgotten."""


def proposal_id(target: str, kind: Kind, tick_s: int, revision: int, action: Action) -> str:
    """Names a proposal: a replay proposes the same id."""
    body = canonical(action.model_dump(mode="json")).decode()
    text = f"{target}|{kind}|{tick_s}|{revision}|{body}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Orders:
    """The decisions of one pool."""

    __slots__ = (
        "asked",
        "by",
        "ended",
        "open",
        "target",
        "target_before",
        "target_s",
        "versions",
        "weights",
        "weights_before",
    )

    def __init__(self) -> None:
        self.open: dict[str, dict[str, Any]] = {}
        """kind -> {id, state, asked, action, at_s, expires_s} of a decision that has not ended: the action as it was
        asked for, and as constraints have left it."""
        self.asked: dict[str, int] = {}
        """kind -> second of the last proposal."""
        self.ended: dict[str, list[dict[str, Any]]] = {}
        """kind -> {action, cause, times, until_s} of what ended without effect: not asked again before `until_s`."""
        self.by: dict[str, str] = {}
        """kind -> decision that put in force what is."""
        self.target: int | None = None
        self.target_before: int | None = None
        self.target_s = 0.0
        """When the target last changed, Unix s."""
        self.weights: dict[str, float] = {}
        """Replica weights other than 1 that are in force."""
        self.weights_before: dict[str, float] = {}
        self.versions: dict[str, int] = {}

    # -- asking ----------------------------------------------------------------------------------------------

    def waits(self, kind: str) -> dict[str, Any] | None:
        """The decision of this kind that has not been answered or approved yet."""
        order = self.open.get(kind)
        return order if order is not None and order["state"] in ("proposed", "pending", "approved") else None

    def level(self) -> int:
        """Replicas that are asked for already: by the waiting proposal, else the target."""
        waiting = self.waits("scale")
        assert self.target is not None
        return int(waiting["action"]["replicas"]) if waiting is not None else self.target

    def may_ask(self, kind: str, action: Action, second: int) -> bool:
        """Whether this action may be proposed now."""
        if second <= self.asked.get(kind, 0):
            return False  # one proposal a kind and second: its id names the second
        ended = _entry(self.ended.get(kind, []), action.model_dump(mode="json"))
        if ended is not None and second < ended["until_s"]:
            return False
        waiting = self.waits(kind)
        if waiting is None:
            return True
        return waiting["state"] == "pending" and _differs(waiting["action"], action, self.target)

    def ask(self, id: str, kind: str, action: Action, at_s: float, second: int, expires_s: float) -> None:
        """Notes a proposal."""
        plain = action.model_dump(mode="json")
        self.open[kind] = _order(id, "proposed", plain, at_s, expires_s)
        self.asked[kind] = second

    def forget_lost(self, now_s: float) -> list[str]:
        """Kinds whose proposal was never answered."""
        lost = [
            kind
            for kind, order in self.open.items()
            if order["state"] in ("proposed", "pending", "approved") and order["expires_s"] + LOST_S < now_s
        ]
        for kind in lost:
            del self.open[kind]
        return lost

    # -- hearing ---------------------------------------------------------------------------------------------

    def hear(self, outcome: Outcome, now_s: float) -> bool:
        """Takes an outcome; False where a newer one of this decision is known."""
        known = self.versions.pop(outcome.decision_id, -1)
        self.versions[outcome.decision_id] = max(known, outcome.version)
        while len(self.versions) > VERSIONS_MAX:
            del self.versions[next(iter(self.versions))]
        if known >= outcome.version:
            return False
        kind, state, action = outcome.decision_kind, outcome.state, outcome.action
        if state in ("dispatched", "executed"):
            self._in_force(outcome, now_s)
        elif state in ("failed", "expired", "shadowed") and self.by.get(kind) == outcome.decision_id:
            self._undone(kind, now_s)
        order = self.open.get(kind)
        if order is not None and order["id"] == outcome.decision_id:
            if state in ENDED:
                del self.open[kind]
                self._ended(kind, order["asked"], outcome, now_s)
            else:
                order["state"], order["action"] = state, action.model_dump(mode="json")
                if state in ("dispatched", "executed"):
                    self.ended[kind] = [entry for entry in self.ended.get(kind, []) if entry["cause"] in RETRY_S]
                    if order["action"] != order["asked"]:
                        self._wait(kind, order["asked"], "clipped", 1, now_s + CLIPPED_RETRY_S)
        elif state not in ENDED and state != "executed":
            # somebody else's (a revert by a person): it takes the slot, so that we wait for it
            plain = action.model_dump(mode="json")
            self.open[kind] = _order(outcome.decision_id, state, plain, outcome.at_s, now_s + 300.0)
        return True

    def _ended(self, kind: str, action: dict[str, Any], outcome: Outcome, now_s: float) -> None:
        """Notes how long an action that ended without effect is not asked again."""
        if outcome.state in RETRY_S:
            self._wait(kind, action, outcome.state, 1, now_s + RETRY_S[outcome.state])
        elif outcome.state == "blocked":
            cause = re.sub(r"[0-9.]+", "#", outcome.note)[:CAUSE_MAX]  # the same words with other figures
            known = _entry(self.ended.get(kind, []), action)
            on_end = known is not None and known["cause"] == cause and now_s <= known["until_s"] + BLOCKED_RETRY_S[-1]
            times = known["times"] + 1 if known is not None and on_end else 1
            wait_s = BLOCKED_RETRY_S[min(times, len(BLOCKED_RETRY_S)) - 1]
            self._wait(kind, action, cause, times, now_s + wait_s)

    def _wait(self, kind: str, action: dict[str, Any], cause: str, times: int, until_s: float) -> None:
        others = [entry for entry in self.ended.get(kind, []) if entry["action"] != action]
        entry = {"action": action, "cause": cause, "times": times, "until_s": until_s}
        self.ended[kind] = [*others, entry][-ENDED_MAX:]

    def _in_force(self, outcome: Outcome, now_s: float) -> None:
        action, kind = outcome.action, outcome.decision_kind
        if isinstance(action, RerouteAction) and action.scope != "replicas":
            return
        if self.by.get(kind) != outcome.decision_id:
            self.by[kind] = outcome.decision_id
            if isinstance(action, ScaleAction):
                self.target_before = self.target
            else:
                self.weights_before = self.weights
        if isinstance(action, RerouteAction):
            self.weights = {name: weight for name, weight in action.weights.items() if weight != 1.0}
        elif action.replicas != self.target:
            self.target, self.target_s = action.replicas, now_s

    def _undone(self, kind: str, now_s: float) -> None:
        """What was dispatched last was not carried out: what held before holds."""
        del self.by[kind]
        if kind == "reroute":
            self.weights = self.weights_before
        elif self.target != self.target_before:
            self.target, self.target_s = self.target_before, now_s

    def state(self) -> dict[str, Any]:
        """As plain values."""
        return {name: getattr(self, name) for name in self.__slots__}

    def restore(self, state: dict[str, Any]) -> None:
        """From `state`."""
        for name in self.__slots__:
            setattr(self, name, state[name])


def _differs(waiting: dict[str, Any], action: Action, target: int | None) -> bool:
    """Whether an action is so different that what waits for approval should give way."""
    if isinstance(action, ScaleAction):
        old, new, now = int(waiting["replicas"]), action.replicas, target or 0
        return (old > now) != (new > now) or abs(new - old) >= max(1.0, 0.1 * old)
    return bool(waiting != action.model_dump(mode="json"))


def _order(id: str, state: str, action: dict[str, Any], at_s: float, expires_s: float) -> dict[str, Any]:
    return {"id": id, "state": state, "asked": action, "action": action, "at_s": at_s, "expires_s": expires_s}


def _entry(ended: list[dict[str, Any]], action: dict[str, Any]) -> dict[str, Any] | None:
    return next((entry for entry in ended if entry["action"] == action), None)
