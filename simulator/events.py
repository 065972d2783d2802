"""What happens in a fleet, and what becomes of an action on it."""

from __future__ import annotations

from typing import NamedTuple

from simulator.nodes import Slot
from simulator.request import Request


class ReplicaEvent(NamedTuple):
    """A change of a replica's life: starting, ready, draining, failed, cancelled (while starting), gone."""

    at_s: float
    pool: str
    replica: str
    state: str
    slot: Slot


class Events(NamedTuple):
    """What happened in one `advance`, each in order of time."""

    arrivals: list[Request]
    ends: list[Request]
    replicas: list[ReplicaEvent]


class Outcome(NamedTuple):
    """What became of an action."""

    accepted: bool
    """False: an older epoch, or the same with other content; nothing was done."""
    applied: bool
    """Whether the target is now as asked (also when it was before); false while GPUs are lacking."""
    changed: bool
    reason: str
    """In words."""
    replicas: int
    """Replicas of the pool that stay (starting and ready), or targets that have a weight."""
