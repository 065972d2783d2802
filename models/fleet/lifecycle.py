"""How decisions are begun, examined, moved and published: each step by the table, each step audited.

Knows what may be done and who has to agree only through `constraints`; who asked is the fold's business.
"""

from __future__ import annotations

from typing import Any, Protocol

from models.fleet.audit import Chain, cut
from models.fleet.book import DONE, IN_FORCE, Book, slot_of
from models.fleet.case import Case, Fleet, Phase, concerned
from models.fleet.constraints import examine
from models.fleet.states import Cause, Event, step
from schemas.base import Record
from schemas.config import LimitsSpec
from schemas.decisions import (
    Action,
    Decision,
    Outcome,
    Proposal,
    RerouteAction,
    ScaleAction,
    Transition,
)
from schemas.topics import AUDIT, DECISIONS, POOL_SIGNALS

US = "fleetloop"
RATE_WINDOW_S = 60.0
ANSWER_GRACE_S = 10.0
"""An executor that found a decision expired needs time to say so, s."""
NOT_DONE = ("fail", "skip", "rehearse")
"""Events after which what held before holds."""


class Host(Protocol):
    """What the fold lends: log time, the record's offset, bounds, and where results and counts go."""

    offset: int
    limits: LimitsSpec

    @property
    def now_s(self) -> float: ...

    def count(self, name: str, by: int = 1) -> None: ...

    def emit_record(self, topic: str, key: str, id: str, record: Record) -> None: ...


class Lifecycle:
    """The decisions of the fleet and their way through the table."""

    def __init__(self, host: Host, book: Book, fleet: Fleet) -> None:
        self.host, self.book, self.fleet = host, book, fleet
        self.chain = Chain()
        self.dispatches: list[float] = []
        """Log times of the dispatches of the last 60 s; at most actions_per_minute_max."""
        self._dirty: dict[str, tuple[Decision, bool]] = {}
        """Decisions that this record changed -> (as they are now, whether their state changed)."""

    def pass_time(self) -> None:
        """Deadlines pass, and what waited for its turn is released."""
        now = self.host.now_s
        self.dispatches = [at_s for at_s in self.dispatches if at_s > now - RATE_WINDOW_S]
        for found in self.book.open():
            decision = self.book.live.get(found.id)
            if decision is None:  # another decision of this second took its place
                continue
            if decision.state == "dispatched":
                if now > decision.proposal.expires_s + ANSWER_GRACE_S:
                    cause = f"no answer from executor {decision.executor} until it expired"
                    self.move(decision, "no_answer", "fleetloop", US, cause)
            elif now > self.lapses_s(decision):
                self.move(decision, "expire", "fleetloop", US, f"still {decision.state} when it expired")
            elif decision.state == "approved":
                self.release(decision, "released", "fleetloop", US, "its turn has come")

    def publish(self) -> None:
        """Gives out what this record changed: at most one version of each decision."""
        for decision, moved in self._dirty.values():
            self._publish(decision, moved)
        self._dirty.clear()

    def begin(self, proposal: Proposal, content: str, cause: str, actor: str) -> Decision:
        """A new decision in the state `proposed`."""
        pools = concerned(proposal, self.fleet.specs)
        executors = [self.fleet.specs[p].executor for p in pools if p in self.fleet.specs]
        now, offset = self.host.now_s, self.host.offset
        decision = Decision(
            id=proposal.id,
            version=offset,
            state="proposed",
            mode=self.fleet.mode(pools) if executors else "observe",
            epoch=offset,
            proposal=proposal,
            history=[Transition(state="proposed", at_s=now, offset=offset, cause=cause, actor=actor)],
            executor=executors[0] if executors else "simulator",
        )
        self.book.add(decision, content)
        self._touch(decision, True)
        self.audit("proposed", actor, cause, decision.id, proposal.target.pool, proposal.action)
        return decision

    def full(self, decision: Decision) -> bool:
        """Whether too many are open; the decision is then blocked."""
        most = self.host.limits.open_decisions_max
        if len(self.book.open()) < most:
            return False
        self.host.count("open_decisions_overflow_total")
        self.block(decision, f"open: {most} decisions are open (open_decisions_max); lifts when some have ended")
        return True

    def examine(self, decision: Decision, phase: Phase) -> tuple[Decision, str | None]:
        """The decision with its action as constraints leave it, and the words of the one that blocks it."""
        in_force = self.book.at(slot_of(decision.proposal), IN_FORCE)
        case = Case(
            now_s=self.host.now_s,
            phase=phase,
            proposal=decision.proposal,
            action=decision.proposal.action,
            fleet=self.fleet,
            future_s=self.host.limits.future_s,
            unanswered=None if in_force is None else in_force.id,
        )
        refusal = examine(case)
        if case.notes:
            proposal = decision.proposal.model_copy(update={"action": case.action})
            decision = decision.model_copy(
                update={"proposal": proposal, "constraints": [*decision.constraints, *case.notes]}
            )
            self.book.live[decision.id] = decision
            self._touch(decision, False)
        return decision, refusal

    def release(self, decision: Decision, phase: Phase, who: Cause, actor: str, cause: str) -> None:
        """Examines once more what was agreed to, and dispatches it."""
        decision, refusal = self.examine(decision, phase)
        if refusal is not None:
            self.block(decision, refusal)
        else:
            self.dispatch(decision, who, actor, cause)

    def dispatch(self, decision: Decision, who: Cause, actor: str, cause: str) -> None:
        """Approves and dispatches; where too much was dispatched within a minute, leaves it approved for its turn."""
        if decision.state != "approved":
            decision = self.move(decision, "approve", who, actor, cause)
        if len(self.dispatches) >= self.host.limits.actions_per_minute_max:
            self.host.count("dispatches_delayed_total")
            return
        proposal = decision.proposal
        replaced = self.book.at(slot_of(proposal), IN_FORCE)
        if replaced is not None:
            self.move(replaced, "supersede", "fleetloop", US, f"replaced by {decision.id} before it was answered")
        self.dispatches.append(self.host.now_s)
        self.move(decision, "dispatch", "fleetloop", US, f"to executor {decision.executor}", epoch=self.host.offset)
        if isinstance(proposal.action, ScaleAction):
            self.fleet.views[proposal.target.pool].order(proposal.action.replicas)
        reverted = None if proposal.reverts is None else self.book.live.get(proposal.reverts)
        if reverted is not None:
            reverted = reverted.model_copy(update={"reverted_by": decision.id, "version": self.host.offset})
            self.book.live[reverted.id] = reverted
            self._touch(reverted, False)

    def block(self, decision: Decision, words: str) -> None:
        """Ends a decision by a constraint, in its words."""
        noted = decision.model_copy(update={"constraints": [*decision.constraints, words]})
        self.host.count("decisions_blocked_total")
        self.move(noted, "block", "fleetloop", US, words)

    def move(self, decision: Decision, event: Event, who: Cause, actor: str, cause: str, **changes: Any) -> Decision:
        """One step of the table. Raises Refused before anything is changed."""
        state = step(decision.state, event, who)
        cause = cut(cause)
        at = Transition(state=state, at_s=self.host.now_s, offset=self.host.offset, cause=cause, actor=actor)
        changes |= {"state": state, "history": [*decision.history, at], "version": self.host.offset}
        moved = decision.model_copy(update=changes)
        slot = slot_of(moved.proposal)
        if state == "executed":
            before = self.book.at(slot, DONE)
            if before is not None and before.state == "executed":
                self.move(before, "supersede", "fleetloop", US, f"{moved.id} was executed before a verdict came")
            elif before is not None:
                self.book.end(before)
        self._order_ended(moved, event)
        self.book.settle(moved)
        self._touch(moved, True)
        self.audit(state, actor, cause, moved.id, moved.proposal.target.pool, moved.proposal.action)
        self.host.count(f"decisions_{state}_total")
        return moved

    def _order_ended(self, decision: Decision, event: Event) -> None:
        """Tells the pool's view how an order of replicas ended; one that was replaced ended with its successor."""
        view = self.fleet.views.get(decision.proposal.target.pool)
        if view is None or not isinstance(decision.proposal.action, ScaleAction):
            return
        if event == "execute":
            view.executed(self.host.now_s)
        elif event == "no_answer":
            view.unanswered(self.host.now_s)
        elif event in NOT_DONE or (event == "expire" and decision.history[-2].state == "dispatched"):
            view.undone()

    def size(self, decision: Decision) -> int | None:
        """Replicas that a scale decision adds or removes; None for others, or where that is unknown."""
        action, view = decision.proposal.action, self.fleet.views.get(decision.proposal.target.pool)
        base = view.base() if view is not None else None
        return abs(action.replicas - base) if isinstance(action, ScaleAction) and base is not None else None

    def lapses_s(self, decision: Decision) -> float:
        """When an open decision that is not yet dispatched expires, Unix s."""
        if decision.state != "pending":
            return decision.proposal.expires_s
        spec = self.fleet.specs.get(decision.proposal.target.pool)
        waits_s = spec.approval_expiry_s if spec is not None else 0.0
        return min(decision.proposal.expires_s, decision.history[-1].at_s + waits_s)

    def _touch(self, decision: Decision, moved: bool) -> None:
        before = self._dirty.get(decision.id)
        self._dirty[decision.id] = (decision, moved or (before is not None and before[1]))

    def _publish(self, decision: Decision, moved: bool) -> None:
        decision = decision.model_copy(update={"version": self.host.offset})
        if decision.id in self.book.live:
            self.book.live[decision.id] = decision
        name = f"{decision.id}@{self.host.offset}"
        self.host.emit_record(DECISIONS, decision.id, name, decision)
        if not moved:
            return
        action, last = decision.proposal.action, decision.history[-1]
        between = isinstance(action, RerouteAction) and action.scope == "pools"
        for pool in concerned(decision.proposal, self.fleet.specs):
            outcome = Outcome(
                decision_id=decision.id,
                pool=pool,
                version=self.host.offset,
                state=decision.state,
                at_s=self.host.now_s,
                decision_kind=decision.proposal.decision_kind,
                action=action,
                expected=decision.proposal.expected,
                reverts=decision.proposal.reverts,
                note=cut("; ".join(dict.fromkeys([*decision.constraints, last.cause]))),
            )
            id = f"outcome/{decision.id}/{pool}" if between else f"outcome/{decision.id}"
            self.host.emit_record(POOL_SIGNALS, pool, f"{id}@{self.host.offset}", outcome)

    def audit(
        self,
        event: str,
        actor: str,
        cause: str,
        decision_id: str | None,
        pool: str | None,
        action: Action | None = None,
    ) -> None:
        entry = self.chain.append(
            at_s=self.host.now_s,
            offset=self.host.offset,
            decision_id=decision_id,
            pool=pool,
            event=event,
            actor=actor,
            cause=cut(cause),
            action=None if action is None else action.model_dump(mode="json"),
        )
        self.host.emit_record(AUDIT, decision_id or "fleet", f"audit/{entry.sequence}", entry)
