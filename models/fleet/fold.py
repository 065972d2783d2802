"""The fleet fold: the state machine over proposals, pool status, commands, executors' results and verdicts.

It alone writes `decisions`. What is decided where: `states` which step is possible at all, `constraints` and
`budgets` what may be done, `gate` who has to agree, `commands` whose word counts, `audit` what is kept for ever.
Knows nothing of how a pool came to its proposal, nor of how an executor acts.
"""

from __future__ import annotations

from typing import Any, ClassVar

from models.fleet import commands
from models.fleet.audit import cut
from models.fleet.book import WAITING, Book, content_of, slot_of
from models.fleet.case import Fleet, concerned
from models.fleet.gate import passage
from models.fleet.lifecycle import US, Lifecycle
from models.fleet.pools import STATUS_FIELDS, PoolView
from models.fleet.states import Event, Refused, step
from models.fold import BaseFold
from schemas.base import Record
from schemas.config import ConfigObject, FleetSpec, PoolSpec, PriceSpec, SignerSpec
from schemas.decisions import (
    Action,
    Command,
    Decision,
    ExecutorResult,
    Expected,
    PoolStatus,
    Proposal,
    Verdict,
)
from schemas.errors import InvalidRecord
from schemas.log import LogRecord
from schemas.topics import ce_type

FORGET_POOL_S = 3600.0
"""A pool that is neither configured nor heard of for so long no longer counts, s."""
RESULT_EVENTS: dict[str, Event] = {"executed": "execute", "failed": "fail"}
PROPOSAL_BYTES_MAX = 256 * 1024
"""With its history a decision must fit a record of 1 MiB."""
STATUS_MAX = 1e15
"""No count, sum or offset of a pool's status is larger."""
REVERT_OPEN = ("proposed", "pending", "approved", "dispatched", "executed", "verified", "regressed")


class FleetFold(BaseFold):
    """The one partition of `decision.events`."""

    level = "fleet"
    BOUNDS: ClassVar[tuple[tuple[str, str, str], ...]] = (
        ("book.live", "open_decisions_max", "open_decisions_overflow_total"),
        ("book.contents", "open_decisions_max", "open_decisions_overflow_total"),
        ("book.ended", "decisions_max", "decisions_forgotten_total"),
        ("book.slots", "pools_max", "decisions_forgotten_total"),
        ("fleet.views", "pools_max", "dead_overflow_total"),
        ("seen.ids", "commands_max", "dead_overflow_total"),
        ("life.dispatches", "actions_per_minute_max", "dispatches_delayed_total"),
        ("life._dirty", "open_decisions_max", "open_decisions_overflow_total"),
    )
    """(container, setting of LimitsSpec, overflow counter); what copies the configuration is as large as that."""

    def __init__(self, topic: str, partition: int, partitions: dict[str, int]) -> None:
        super().__init__(topic, partition, partitions)
        self.handlers = {
            ce_type(Proposal.kind): self._on_proposal,
            ce_type(PoolStatus.kind): self._on_status,
            ce_type(Verdict.kind): self._on_verdict,
            ce_type(Command.kind): self._on_command,
            ce_type(ExecutorResult.kind): self._on_result,
        }
        self.book = Book()
        self.fleet = Fleet()
        self.signers: dict[str, SignerSpec] = {}
        self.life = Lifecycle(self, self.book, self.fleet)
        self.seen = commands.Seen()

    @property
    def now_s(self) -> float:
        """Log time, Unix s."""
        return self.log_ms / 1000

    def _one(self, record: LogRecord) -> None:
        super()._one(record)
        self.life.publish()
        slots_max = 2 * self.limits.pools_max + self.limits.open_decisions_max
        self.count("decisions_forgotten_total", self.book.trim(self.limits.decisions_max, slots_max))

    # -- what comes in ---------------------------------------------------------------------------------------

    def on_config(self, item: ConfigObject, spec: Record | None) -> None:
        """Policies, prices, signers and the fleet's bounds."""
        fleet, name = self.fleet, item.name
        if item.object_kind == "pool":
            fleet.specs.pop(name, None)
            fleet.revisions[name] = item.revision
            if isinstance(spec, PoolSpec):
                fleet.specs[name] = spec
            else:
                fleet.paused.pop(name, None)
        elif item.object_kind == "price":
            fleet.prices.pop(name, None)
            if isinstance(spec, PriceSpec):
                fleet.prices[name] = spec.usd_per_gpu_hour
        elif item.object_kind == "signer":
            self.signers.pop(name, None)
            if isinstance(spec, SignerSpec):
                self.signers[name] = spec
        elif item.object_kind == "fleet" and name == "fleet":
            fleet.spec = spec if isinstance(spec, FleetSpec) else FleetSpec()

    def on_second(self, second: int, before: int) -> None:
        """Deadlines pass; once a minute what is of no more use is forgotten."""
        self.life.pass_time()
        if second // 60 != before // 60:
            self.seen.forget(self.now_s)
            self._forget_pools()

    def _on_proposal(self, record: LogRecord, proposal: Proposal) -> None:
        if len(record.value) > PROPOSAL_BYTES_MAX:
            remedy = f"a proposal may have {PROPOSAL_BYTES_MAX} bytes: name its evidence instead of copying it"
            raise InvalidRecord("too_large", "value", len(record.value), remedy)
        content, known = content_of(proposal), self.book.known(proposal.id)
        if known is not None:
            if known.content != content:
                remedy = "the first content of an id wins: give another proposal another id"
                raise InvalidRecord("conflict", "id", proposal.id, remedy)
            self.count("proposals_repeated_total")
            return
        decision = self.life.begin(proposal, content, cut(proposal.reason), US)
        now = self.now_s
        if now > proposal.expires_s:
            late = f"arrived {now - proposal.expires_s:.1f} s after it expired"
            self.life.move(decision, "expire", "fleetloop", US, late)
            return
        if self.life.full(decision):
            return
        waiting = self.book.at(slot_of(proposal), WAITING)
        if waiting is not None:
            self.life.move(waiting, "supersede", "fleetloop", US, f"a newer proposal: {proposal.id}")
        refusal = None if proposal.reverts is None else self._not_revertible(proposal.reverts)
        if refusal is not None:
            self.life.block(decision, f"revert: {refusal}")
            return
        decision, refusal = self.life.examine(decision, "proposed")
        if refusal is not None:
            self.life.block(decision, refusal)
            return
        specs = [self.fleet.specs[p] for p in concerned(decision.proposal, self.fleet.specs)]
        through = passage(decision.mode, self.life.size(decision), specs[0].automatic_step_max)
        if through.event == "approve":
            self.life.dispatch(decision, "fleetloop", US, through.cause)
        elif through.event == "block":
            self.life.block(decision, through.cause)
        else:
            self.life.move(decision, through.event, "fleetloop", US, through.cause)

    def _on_status(self, record: LogRecord, status: PoolStatus) -> None:
        large = [n for n in STATUS_FIELDS if isinstance(v := getattr(status, n), int | float) and v > STATUS_MAX]
        if large:
            raise InvalidRecord("out_of_bounds", large[0], getattr(status, large[0]), f"at most {STATUS_MAX:g}")
        view = self.fleet.views.get(status.pool)
        if view is None:
            if len(self.fleet.views) >= self.limits.pools_max:
                remedy = "raise pools_max in limits/limits, or use fewer pools"
                raise InvalidRecord("overflow", "pool", status.pool, remedy)
            view = self.fleet.views[status.pool] = PoolView()
        spec = self.fleet.specs.get(status.pool)
        if not view.take(status, spec.freshness_s if spec else 30.0):
            self.count("status_older_total")

    def _on_verdict(self, record: LogRecord, verdict: Verdict) -> None:
        decision = self.book.live.get(verdict.decision_id)
        if decision is None or verdict.pool not in concerned(decision.proposal, self.fleet.specs):
            self.count("verdicts_ignored_total")
            return
        event: Event = "verify" if verdict.verdict == "verified" else "regress"
        try:
            self.life.move(decision, event, "pool", US, cut(verdict.text))
        except Refused:
            self.count("verdicts_ignored_total")

    def _on_result(self, record: LogRecord, result: ExecutorResult) -> None:
        decision = self.book.live.get(result.decision_id)
        if decision is None or decision.state != "dispatched":
            self.count("results_late_total")
        elif result.epoch != decision.epoch or result.executor != decision.executor:
            self.count("results_foreign_total")
        else:
            event = RESULT_EVENTS.get(result.outcome)
            if event is None:
                event = "expire" if self.now_s > decision.proposal.expires_s else "skip"
            cause = f"{result.outcome} by {result.executor}" + (f": {result.detail}" if result.detail else "")
            if result.dry_run:
                self.count("results_dry_total")
                event, cause = "rehearse", f"dry run, nothing was changed: {cause}"
            self.life.move(decision, event, "executor", result.executor, cut(cause))

    # -- commands --------------------------------------------------------------------------------------------

    def _on_command(self, record: LogRecord, command: Command) -> None:
        signer = commands.check_signature(command, self.signers)
        commands.check_time(command, self.now_s)
        if self.seen.take(command, self.now_s, self.limits.commands_max) == "again":
            self.count("commands_repeated_total")
            return
        try:
            commands.check_rights(command, signer, self.now_s, self.limits.future_s)
            if command.command in ("pause", "resume"):
                self._pause(command)
            else:
                self._order(command)
        except Refused as refused:
            self.count("commands_refused_total")
            self.life.audit(
                f"refused: {command.command}", command.actor, str(refused), command.decision_id, command.pool
            )

    def _order(self, command: Command) -> None:
        """approve, reject, revert. Raises Refused before anything is changed."""
        id, says = command.decision_id, command.comment or f"{command.command} by {command.actor}"
        if id is None:
            raise Refused(f"{command.command} needs a decision_id")
        known = self.book.known(id)
        if known is None:
            raise Refused(f"decision {id[:64]} is not known")
        if command.command == "revert":
            self._revert(command, id, says)
            return
        event: Event = "approve" if command.command == "approve" else "reject"
        step(known.state, event, "person")
        decision = self.book.live[id]
        if event == "reject":
            self.life.move(decision, "reject", "person", command.actor, says)
            return
        pools = concerned(decision.proposal, self.fleet.specs)
        if (paused := self.fleet.pause_of(pools)) is not None:
            raise Refused(f"{paused}: resume first")
        if self.fleet.mode(pools) in ("observe", "shadow"):
            raise Refused(f"the mode is {self.fleet.mode(pools)} now: nothing may be dispatched")
        self.life.release(decision, "approved", "person", command.actor, says)

    def _revert(self, command: Command, id: str, says: str) -> None:
        refusal = self._not_revertible(id)
        if refusal is not None:
            raise Refused(refusal)
        decision = self.book.live[id]
        undo = decision.proposal.undo
        if undo is None:
            raise Refused(f"decision {id} does not say how to undo it")
        pools = concerned(decision.proposal, self.fleet.specs)
        if self.fleet.mode(pools) in ("observe", "shadow"):
            raise Refused(f"the mode is {self.fleet.mode(pools)} now: nothing may be dispatched")
        new_id = commands.revert_id(id)
        if self.book.known(new_id) is not None:
            new_id = commands.revert_id(id, command.id)
        proposal = self._undoing(decision, undo, new_id, f"{command.actor} reverts {id}: {says}")
        begun = self.life.begin(proposal, content_of(proposal), cut(proposal.reason), command.actor)
        if self.life.full(begun):
            return
        waiting = self.book.at(slot_of(proposal), WAITING)
        if waiting is not None:
            self.life.move(waiting, "supersede", "fleetloop", US, f"{command.actor} reverts instead: {new_id}")
        self.life.release(begun, "revert", "person", command.actor, says)

    def _not_revertible(self, id: str) -> str | None:
        """Why a decision cannot be reverted (again), or None."""
        known, decision = self.book.known(id), self.book.live.get(id)
        if decision is None or decision.state not in ("executed", "verified", "regressed"):
            state = known.state if known else "unknown"
            return f"decision {id[:64]} is {state}: only the last executed one of a target can be reverted"
        earlier = None if decision.reverted_by is None else self.book.known(decision.reverted_by)
        if earlier is not None and earlier.state in REVERT_OPEN:
            return f"{decision.reverted_by} reverts it already and is {earlier.state}"
        return None

    def _undoing(self, decision: Decision, undo: Action, id: str, reason: str) -> Proposal:
        old, now = decision.proposal, self.now_s
        spec = self.fleet.specs.get(old.target.pool)
        view = self.fleet.views.get(old.target.pool)
        return Proposal(
            id=id,
            decision_kind=old.decision_kind,
            target=old.target,
            action=undo,
            undo=old.action,
            reason=cut(reason),
            evidence={"reverts": decision.id, "version": decision.version},
            expected=Expected(horizon_s=old.expected.horizon_s),
            confidence=old.confidence,
            at_s=now,
            trigger_s=now,
            evidence_s=now,
            expires_s=now + (spec.approval_expiry_s if spec else 300.0),
            policy_revision=self.fleet.revisions.get(old.target.pool, 0),
            replicas_from=view.base() if view and old.decision_kind == "scale" else None,
            reverts=decision.id,
        )

    def _pause(self, command: Command) -> None:
        name, paused = command.pool or "", self.fleet.paused
        what = f"pool {name}" if name else "the whole fleet"
        if name and name not in self.fleet.specs:
            raise Refused(f"pool {name} is not configured")
        if (command.command == "pause") == (name in paused):
            raise Refused(f"{what} is {'already' if name in paused else 'not'} paused")
        if command.command == "pause":
            paused[name] = f"by {command.actor} since {self.now_s:.0f}" + (
                f": {command.comment}" if command.comment else ""
            )
        else:
            del paused[name]
        cause = command.comment or f"{command.command} of {what}"
        self.life.audit(command.command, command.actor, cause, None, command.pool)

    def _forget_pools(self) -> None:
        """Drops pools that are neither configured nor heard of."""
        views, known = self.fleet.views, self.fleet.specs
        for name in [n for n in views if n not in known]:
            status = views[name].status
            if status is None or status["at_s"] < self.now_s - FORGET_POOL_S:
                del views[name]

    # -- state -----------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """See BaseFold."""
        return {
            "book": self.book.dump(),
            "views": {name: view.dump() for name, view in self.fleet.views.items()},
            "paused": self.fleet.paused,
            "chain": [self.life.chain.sequence, self.life.chain.previous],
            "seen": {id: list(kept) for id, kept in self.seen.ids.items()},
            "dispatches": self.life.dispatches,
        }

    def restore(self, state: dict[str, Any], version: int) -> None:
        """See BaseFold."""
        self.book.load(state["book"])
        self.fleet, self.signers = Fleet(), {}
        for item in self.config.values():
            known = ConfigObject.model_validate(item)
            self.on_config(known, None if known.deleted else known.typed())
        self.fleet.views = {name: PoolView(**view) for name, view in state["views"].items()}
        self.fleet.paused = dict(state["paused"])
        self.seen.ids = {id: (content, expires_s) for id, (content, expires_s) in state["seen"].items()}
        self.life = Lifecycle(self, self.book, self.fleet)
        self.life.chain.sequence, self.life.chain.previous = state["chain"]
        self.life.dispatches = list(state["dispatches"])

    def metrics(self) -> dict[str, float]:
        """See BaseFold."""
        found = super().metrics()
        states = [decision.state for decision in self.book.open()]
        for state in ("pending", "approved", "dispatched"):
            found[f"decisions_{state}"] = float(states.count(state))
        found["decisions_remembered"] = float(len(self.book.ended) + len(self.book.live))
        found["paused"] = float(len(self.fleet.paused))
        found["audit_entries_total"] = float(self.life.chain.sequence)
        return found
