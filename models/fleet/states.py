"""The life of a decision as one table: state and event give the next state; whatever is not here is refused."""

from __future__ import annotations

from typing import Literal

from schemas.decisions import State

Event = Literal[
    "expire",
    "block",
    "shadow",
    "hold",
    "approve",
    "reject",
    "dispatch",
    "supersede",
    "execute",
    "fail",
    "no_answer",
    "skip",
    "rehearse",
    "verify",
    "regress",
]
Cause = Literal["fleetloop", "person", "executor", "pool"]

TABLE: dict[State, dict[Event, State]] = {
    "proposed": {
        "expire": "expired",
        "block": "blocked",
        "shadow": "shadowed",
        "hold": "pending",
        "approve": "approved",
    },
    "pending": {
        "approve": "approved",
        "reject": "rejected",
        "expire": "expired",
        "block": "blocked",
        "supersede": "superseded",
    },
    "approved": {
        "dispatch": "dispatched",
        "reject": "rejected",
        "expire": "expired",
        "block": "blocked",
        "supersede": "superseded",
    },
    "dispatched": {
        "execute": "executed",
        "fail": "failed",
        "no_answer": "failed",
        "skip": "superseded",
        "rehearse": "shadowed",
        "expire": "expired",
        "supersede": "superseded",
    },
    "executed": {"verify": "verified", "regress": "regressed", "supersede": "superseded"},
}
"""State -> event -> next state. States that are not a key are final."""

CAUSES: dict[Event, tuple[Cause, ...]] = {
    "expire": ("fleetloop", "executor"),
    "block": ("fleetloop",),
    "shadow": ("fleetloop",),
    "hold": ("fleetloop",),
    "approve": ("fleetloop", "person"),
    "reject": ("person",),
    "dispatch": ("fleetloop",),
    "supersede": ("fleetloop",),
    "execute": ("executor",),
    "fail": ("executor",),
    "no_answer": ("fleetloop",),
    "skip": ("executor",),
    "rehearse": ("executor",),
    "verify": ("pool",),
    "regress": ("pool",),
}
"""Event -> who may cause it."""


class Refused(Exception):
    """An event that the table does not admit; the text says why. It changes nothing."""


def step(state: State, event: Event, who: Cause) -> State:
    """The next state. Raises Refused."""
    if who not in CAUSES[event]:
        raise Refused(f"`{event}` is not for {who} to cause (only {', '.join(CAUSES[event])})")
    following = TABLE.get(state, {}).get(event)
    if following is None:
        admits = [s for s, events in TABLE.items() if event in events]
        raise Refused(f"the decision is {state}; `{event}` is possible only from {', '.join(admits)}")
    return following
