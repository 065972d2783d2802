"""What an executor acts on: the one method that a kind of target has to offer, and how it says that it could not."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from schemas.decisions import Decision
from schemas.errors import FleetloopError


class TryAgain(FleetloopError):
    """The target cannot be reached or is busy: the same action may succeed soon."""


class ActionFailed(FleetloopError):
    """The target refuses the action: trying again would not help. The text says why."""


class NewerInForce(FleetloopError):
    """The target holds the order of a newer epoch."""


class Acted(NamedTuple):
    """What the target says that it did."""

    before: dict[str, Any]
    """State seen before."""
    after: dict[str, Any]
    """State asked for, or reached."""
    detail: str = ""


class ActionTarget(Protocol):
    """A kind of target. `act` is absolute and idempotent: the same decision twice does no harm."""

    name: str
    """Executor name that pools refer to."""

    async def open(self) -> None:
        """Before the first action."""

    async def act(self, decision: Decision, dry_run: bool) -> Acted:
        """Carries out a decision. Raises TryAgain, ActionFailed, NewerInForce."""

    async def close(self) -> None:
        """After the last action."""
