"""One decision before its constraints: all that they may look at, and how they say no."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from models.fleet.gate import strictest
from models.fleet.pools import PoolView
from schemas.config import FleetSpec, Mode, PoolSpec
from schemas.decisions import Action, Proposal, RerouteAction, ScaleAction

Phase = Literal["proposed", "approved", "released", "revert"]
"""When it is examined: on arrival; when a person approves; when it had to wait for its turn; ordered by a person."""


class Blocked(Exception):
    """A constraint says no: its text has the figures and what would lift it."""


@dataclass(slots=True)
class Fleet:
    """What the fleet fold knows, as constraints see it."""

    specs: dict[str, PoolSpec] = field(default_factory=dict)
    revisions: dict[str, int] = field(default_factory=dict)
    prices: dict[str, float] = field(default_factory=dict)
    """GPU type -> USD per GPU and hour."""
    spec: FleetSpec = field(default_factory=FleetSpec)
    views: dict[str, PoolView] = field(default_factory=dict)
    paused: dict[str, str] = field(default_factory=dict)
    """Pool, or `` for the whole fleet -> who paused it, when and why, in words."""

    def names(self) -> list[str]:
        """Every pool that is configured or has said something, in one order whatever came first."""
        return sorted({**self.specs, **self.views})

    def mode(self, pools: list[str]) -> Mode:
        """The strictest mode of some pools and the fleet."""
        return strictest([self.spec.mode, *(self.specs[p].mode for p in pools if p in self.specs)])

    def pause_of(self, pools: list[str]) -> str | None:
        """Why one of some pools is paused, or None."""
        for name in ["", *pools]:
            if name in self.paused:
                return f"{f'pool {name}' if name else 'the whole fleet'} is paused {self.paused[name]}"
        return None


@dataclass(slots=True)
class Case:
    """One decision to examine. Constraints may make its action smaller, never larger, and say so in `notes`."""

    now_s: float
    phase: Phase
    proposal: Proposal
    action: Action
    fleet: Fleet
    future_s: float
    unanswered: str | None = None
    """Decision of the same target and kind that is dispatched and not answered."""
    notes: list[str] = field(default_factory=list)

    @property
    def pool(self) -> str:
        return self.proposal.target.pool

    @property
    def view(self) -> PoolView:
        """What is known of the pool. Raises Blocked where that is nothing."""
        view = self.fleet.views.get(self.pool)
        if view is None or view.status is None:
            raise Blocked(f"status: pool {self.pool} has said nothing yet; lifts with its first pool.status")
        return view

    @property
    def base(self) -> int:
        """Replicas that the pool is meant to have now. Raises Blocked where that is unknown."""
        base = self.view.base()
        if base is None:
            raise Blocked(
                f"status: nobody knows how many replicas pool {self.pool} has; "
                "lifts when its pool.status says so (replicas_target or replicas_allocated)"
            )
        return base

    def clamp(self, replicas: int, words: str) -> None:
        """Makes a scale action smaller (nearer to what is)."""
        assert isinstance(self.action, ScaleAction)
        self.notes.append(f"{words}: {self.action.replicas} became {replicas} replicas")
        self.action = ScaleAction(replicas=replicas)


def concerned(proposal: Proposal, specs: Mapping[str, PoolSpec]) -> list[str]:
    """Pools that a proposal acts on: its target, or for weights between pools those of the route and those named."""
    action = proposal.action
    if isinstance(action, RerouteAction) and action.scope == "pools":
        route = [name for name, spec in specs.items() if spec.route == proposal.target.pool]
        return sorted({**dict.fromkeys(action.weights), **dict.fromkeys(route)})
    return [proposal.target.pool]
