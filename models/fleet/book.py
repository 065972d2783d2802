"""The decisions that the fleet fold remembers, bounded: those that can still change whole, the others by their id."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

from schemas.base import decode
from schemas.decisions import Decision, Proposal, State

PLACES: dict[State, int] = {
    "pending": 0,
    "approved": 0,
    "dispatched": 1,
    "executed": 2,
    "verified": 2,
    "regressed": 2,
}
"""State -> place within the slot of its target and kind; each place holds one decision. Other states hold none."""
WAITING, IN_FORCE, DONE = 0, 1, 2


def slot_of(proposal: Proposal) -> str:
    """The slot's name: at most one decision waits, one is in force and one is the last done per target and kind."""
    return f"{proposal.target.key}/{proposal.decision_kind}"


def content_of(proposal: Proposal) -> str:
    """What a proposal says, as a hash: the first content of an id wins."""
    return hashlib.sha256(proposal.encode()).hexdigest()


class Known(NamedTuple):
    """What is kept of every decision."""

    content: str
    state: State


class Book:
    """Decisions by id and by slot."""

    def __init__(self) -> None:
        self.live: dict[str, Decision] = {}
        """Those in a slot, and the one that is just being decided on."""
        self.contents: dict[str, str] = {}
        """Id -> content of each live one."""
        self.ended: dict[str, Known] = {}
        """The others, in the order in which they ended."""
        self.slots: dict[str, list[str | None]] = {}
        self.forgotten = 0

    def known(self, id: str) -> Known | None:
        """Content and state of a decision, or None for one never seen or forgotten."""
        decision = self.live.get(id)
        return self.ended.get(id) if decision is None else Known(self.contents[id], decision.state)

    def add(self, decision: Decision, content: str) -> None:
        """A new one."""
        self.live[decision.id], self.contents[decision.id] = decision, content

    def at(self, slot: str, place: int) -> Decision | None:
        """The decision at a place of a slot."""
        id = self.slots[slot][place] if slot in self.slots else None
        return None if id is None else self.live[id]

    def open(self) -> list[Decision]:
        """Those that wait or are in force, in a fixed order."""
        ids = [id for slot in self.slots.values() for id in slot[:DONE] if id is not None]
        return [self.live[id] for id in ids]

    def settle(self, decision: Decision) -> None:
        """Stores a decision in its new state: at its place, or among the ended."""
        name = slot_of(decision.proposal)
        slot = self.slots.setdefault(name, [None, None, None])
        slot[:] = [None if id == decision.id else id for id in slot]
        place = PLACES.get(decision.state)
        if place is None:
            self.end(decision)
        else:
            assert slot[place] is None, "whoever was there must have been moved first"
            slot[place] = decision.id
            self.live[decision.id] = decision
        if slot == [None, None, None]:
            del self.slots[name]

    def end(self, decision: Decision) -> None:
        """Keeps a decision by its id alone."""
        self.live.pop(decision.id, None)
        slot = self.slots.get(slot_of(decision.proposal), [])
        slot[:] = [None if id == decision.id else id for id in slot]
        self.ended[decision.id] = Known(self.contents.pop(decision.id), decision.state)

    def trim(self, decisions_max: int, slots_max: int) -> int:
        """Forgets the oldest beyond the bounds; how many."""
        before = self.forgotten
        if len(self.slots) > slots_max:
            idle = [n for n, slot in self.slots.items() if slot[WAITING] is None and slot[IN_FORCE] is None]
            for name in idle[: len(self.slots) - slots_max]:
                done = self.at(name, DONE)
                assert done is not None
                self.end(done)
                del self.slots[name]
                self.forgotten += 1
        while len(self.ended) > decisions_max:
            del self.ended[next(iter(self.ended))]
            self.forgotten += 1
        return self.forgotten - before

    def dump(self) -> dict[str, Any]:
        """As plain values; decisions as their bytes, for whatever numbers their evidence holds."""
        return {
            "live": [[d.encode(), self.contents[d.id]] for d in self.live.values()],
            "ended": [[id, *known] for id, known in self.ended.items()],
            "slots": {name: list(slot) for name, slot in self.slots.items()},
            "forgotten": self.forgotten,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Replaces all."""
        self.live, self.contents = {}, {}
        for value, content in state["live"]:
            self.add(decode(Decision, value), content)
        self.ended = {id: Known(content, kind) for id, content, kind in state["ended"]}
        self.slots = {name: list(slot) for name, slot in state["slots"].items()}
        self.forgotten = state["forgotten"]
