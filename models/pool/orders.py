"""The decisions of one pool as it knows them: what is asked, what is in force, what became of it.

One slot a kind. Outcomes (upserts by decision id) move it. The target is the last scale action dispatched or executed;
before the first, what was found allocated.
"""

from __future__ import annotations

import hashlib
from typing import Any

from schemas.base import canonical
from schemas.decisions import ENDED, Action, Kind, Outcome, RerouteAction, ScaleAction

VERSIONS_MAX = 500
"""Decision ids whose newest version is remembered."""
RETRY_S = {"blocked": 10.0, "expired": 10.0, "failed": 30.0, "rejected": 300.0, "shadowed": 300.0}
"""How long the same action is not asked again after it ended so."""
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

    __slots__ = ("asked", "open", "target", "target_before", "target_s", "versions", "weights", "weights_before")

    def __init__(self) -> None:
        self.open: dict[str, dict[str, Any]] = {}
        """kind -> {id, state, action, at_s, expires_s} of a decision that has not ended."""
        self.asked: dict[str, dict[str, Any]] = {}
        """kind -> {action, second, until_s} of the last proposal: the same is not asked again before `until_s`."""
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
        last = self.asked.get(kind)
        if last is not None:
            if second <= last["second"]:
                return False  # one proposal a kind and second: its id names the second
            if last["action"] == action.model_dump(mode="json") and second < last["until_s"]:
                return False
        waiting = self.waits(kind)
        if waiting is None:
            return True
        return waiting["state"] == "pending" and _differs(waiting["action"], action, self.target)

    def ask(self, id: str, kind: str, action: Action, at_s: float, second: int, expires_s: float) -> None:
        """Notes a proposal."""
        plain = action.model_dump(mode="json")
        self.open[kind] = {"id": id, "state": "proposed", "action": plain, "at_s": at_s, "expires_s": expires_s}
        self.asked[kind] = {"action": plain, "second": second, "until_s": 0.0}

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
            self._in_force(action, now_s)
        elif state == "failed" and isinstance(action, ScaleAction) and self.target == action.replicas:
            self.target, self.target_s = self.target_before, now_s
        order = self.open.get(kind)
        if order is not None and order["id"] == outcome.decision_id:
            asked = self.asked[kind]
            if state in ENDED:
                del self.open[kind]
                asked["until_s"] = now_s + RETRY_S.get(state, 0.0)
            else:
                order["state"] = state
                if state in ("dispatched", "executed") and order["action"] != action.model_dump(mode="json"):
                    asked["until_s"] = now_s + CLIPPED_RETRY_S
                order["action"] = action.model_dump(mode="json")
        elif state not in ENDED and state != "executed":
            # somebody else's (a revert by a person): it takes the slot, so that we wait for it
            self.open[kind] = {
                "id": outcome.decision_id,
                "state": state,
                "action": action.model_dump(mode="json"),
                "at_s": outcome.at_s,
                "expires_s": now_s + 300.0,
            }
            self.asked.setdefault(kind, {"action": None, "second": 0, "until_s": 0.0})
        return True

    def _in_force(self, action: Action, now_s: float) -> None:
        if isinstance(action, ScaleAction):
            if action.replicas != self.target:
                self.target_before, self.target, self.target_s = self.target, action.replicas, now_s
        elif isinstance(action, RerouteAction) and action.scope == "replicas":
            before, self.weights = (
                self.weights,
                {name: weight for name, weight in action.weights.items() if weight != 1.0},
            )
            if before != self.weights:
                self.weights_before = before

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
