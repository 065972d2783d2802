"""The gate: what the mode of a policy lets a decision do once it has passed every constraint."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from models.fleet.states import Event
from schemas.config import Mode

FREEDOM: tuple[Mode, ...] = ("observe", "shadow", "approve", "automatic")
"""From the strictest to the freest."""


class Passage(NamedTuple):
    """What happens to the decision, and why in words."""

    event: Event
    cause: str


def strictest(modes: Iterable[Mode]) -> Mode:
    """The strictest of several modes; `observe` of none (nothing is known: nothing is done)."""
    return min(modes, key=FREEDOM.index, default="observe")


def passage(mode: Mode, step: int | None, automatic_step_max: int | None) -> Passage:
    """`step`: replicas that the decision adds or removes; None where it has no size."""
    if mode == "observe":
        return Passage("block", "mode observe: nothing is done; lifts when the policy's mode is another")
    if mode == "shadow":
        return Passage("shadow", "mode shadow: proposed and scored, never dispatched")
    if mode == "approve":
        return Passage("hold", "mode approve: waits for a person")
    if step is not None and automatic_step_max is not None and step > automatic_step_max:
        return Passage(
            "hold",
            f"automatic up to {automatic_step_max} replicas (automatic_step_max); a step of {step} waits for a person",
        )
    return Passage("approve", "mode automatic: within all bounds")
