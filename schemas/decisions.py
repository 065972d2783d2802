"""The life of a decision: proposals, pool status, commands, executors' results, verdicts, decisions, audit."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from schemas.base import Name, NonNegative, Ratio, Record, Seconds, canonical, register
from schemas.config import Mode

Kind = Literal["scale", "reroute", "admit", "place", "schedule"]
State = Literal[
    "proposed",
    "blocked",
    "pending",
    "approved",
    "dispatched",
    "executed",
    "failed",
    "verified",
    "regressed",
    "rejected",
    "expired",
    "superseded",
    "shadowed",
]
"""`shadowed`: proposed in shadow mode, or carried out by an executor in dry run: nothing was changed."""
ENDED: frozenset[str] = frozenset(
    {"blocked", "failed", "verified", "regressed", "rejected", "expired", "superseded", "shadowed"}
)


class ScaleAction(Record):
    """So many replicas, absolute."""

    type: Literal["scale"] = Field("scale", description="Kind of action.")
    replicas: int = Field(ge=0, le=100_000, description="Replicas that the pool shall have.")


class RerouteAction(Record):
    """Weights of replicas within a pool (or of pools within a route), absolute; what is not named keeps weight 1."""

    type: Literal["reroute"] = Field("reroute", description="Kind of action.")
    scope: Literal["replicas", "pools"] = Field("replicas", description="What the weights are of.")
    weights: dict[str, Ratio] = Field(max_length=10_000, description="Name -> weight 0 (none) to 1 (full).")


Action = Annotated[ScaleAction | RerouteAction, Field(discriminator="type")]


class Target(Record):
    """What is acted on."""

    cluster: Name = Field("local", description="Cluster.")
    pool: Name = Field(description="Pool (for scope `pools`: the route).")

    @property
    def key(self) -> str:
        """cluster/pool."""
        return f"{self.cluster}/{self.pool}"


class Expected(Record):
    """Expected effect, with an interval; null = no claim."""

    slo_attainment: Ratio | None = Field(None, description="SLO attainment at the effect horizon.")
    slo_attainment_low: Ratio | None = Field(None, description="Below this it is a regression.")
    usd_per_hour: float | None = Field(None, description="Change of cost, USD/h.")
    ttft_s_p99: NonNegative | None = Field(None, description="TTFT p99 at the effect horizon, s.")
    horizon_s: NonNegative = Field(60.0, description="When the effect can be judged, s after execution.")


class Alternative(Record):
    """Something else that was considered."""

    action: str = Field(max_length=500, description="What.")
    why_not: str = Field(max_length=1000, description="Why it was not chosen.")


@register
class Proposal(Record):
    """The pool fold asks for an action. A fact: a replay proposes the same id with the same content."""

    kind: ClassVar[str] = "decision.proposed"
    id: str = Field(min_length=8, max_length=64, description="Hash of target, kind, tick and policy revision.")
    decision_kind: Kind = Field(description="Kind of action.")
    target: Target = Field(description="What is acted on.")
    action: Action = Field(description="What to do, absolute.")
    undo: Action | None = Field(None, description="How to undo it: the action that restores what was there.")
    reason: str = Field(max_length=2000, description="Why, in words and figures.")
    alternatives: list[Alternative] = Field(
        default_factory=list, max_length=50, description="What else was considered."
    )
    evidence: dict[str, Any] = Field(default_factory=dict, description="Names, versions and figures that it rests on.")
    expected: Expected = Field(description="What it should do.")
    confidence: Ratio = Field(description="Share of recent decisions of this kind that did what was expected.")
    at_s: Seconds = Field(description="Log time of the proposal, Unix s.")
    trigger_s: Seconds = Field(description="Log time before which the evidence did not yet ask for this, Unix s.")
    evidence_s: Seconds = Field(description="Newest evidence that it rests on, Unix s.")
    expires_s: Seconds = Field(description="Afterwards it must not be done, Unix s.")
    policy_revision: int = Field(ge=0, description="Revision of the pool's policy that it rests on.")
    replicas_from: int | None = Field(None, ge=0, description="Replicas that the pool was meant to have before.")
    value_usd_per_hour: float | None = Field(None, description="SLO loss avoided, USD/h, for arbitration.")
    reverts: str | None = Field(None, max_length=64, description="Decision that this undoes.")


@register
class PoolStatus(Record):
    """The pool's present state, absolute; every 10 s and on change."""

    kind: ClassVar[str] = "pool.status"
    pool: Name = Field(description="The pool.")
    cluster: Name = Field("local", description="Cluster.")
    at_s: Seconds = Field(description="Log time, Unix s.")
    version: int = Field(ge=0, description="Offset in the pool's partition of pool.signals that this rests on.")
    policy_revision: int = Field(0, ge=0, description="Revision of the pool's policy.")
    gpu_type: str = Field("", max_length=200, description="GPU product.")
    replicas_target: int | None = Field(None, ge=0, description="Replicas that it is meant to have (last order).")
    replicas_wanted: int | None = Field(None, ge=0, description="Replicas that the planner wants now.")
    replicas_allocated: int | None = Field(None, ge=0, description="Replicas that are billed.")
    replicas_ready: int | None = Field(None, ge=0, description="Replicas that serve.")
    gpus_allocated: NonNegative | None = Field(None, description="GPUs billed.")
    gpus_per_replica: NonNegative | None = Field(None, description="GPUs a replica is billed for.")
    usd_per_hour: NonNegative | None = Field(None, description="At the present allocation, USD/h.")
    usd_hour_to_date: NonNegative | None = Field(None, description="Spent in the current UTC hour, USD.")
    usd_day_to_date: NonNegative | None = Field(None, description="Spent in the current UTC day, USD.")
    usd_month_to_date: NonNegative | None = Field(None, description="Spent in the current UTC month, USD.")
    evidence_s: Seconds | None = Field(None, description="Newest evidence, Unix s. Null: none.")
    requests_per_s: NonNegative | None = Field(None, description="Arrivals, mean of 60 s, 1/s.")
    capacity_rps: NonNegative | None = Field(None, description="Requests/s a replica sustains at the present mix.")
    utilisation_ratio: NonNegative | None = Field(None, description="Load / (ready replicas x capacity).")
    util_gpu_pct: NonNegative | None = Field(None, description="Mean NVML utilisation over its GPUs, %. Not capacity.")
    running: NonNegative | None = Field(None, description="Requests running.")
    waiting: NonNegative | None = Field(None, description="Requests waiting.")
    kv_usage_ratio: NonNegative | None = Field(None, description="Mean KV cache in use.")
    slo_attainment: Ratio | None = Field(None, description="Share of the last 300 s within the targets.")
    ttft_s_p50: NonNegative | None = Field(None, description="TTFT of the last 60 s, s.")
    ttft_s_p99: NonNegative | None = Field(None, description="TTFT of the last 60 s, s.")
    tpot_s_p50: NonNegative | None = Field(None, description="TPOT of the last 60 s, s.")
    tpot_s_p99: NonNegative | None = Field(None, description="TPOT of the last 60 s, s.")
    replica_weights: dict[str, Ratio] = Field(
        default_factory=dict, description="Weights other than 1 that are in force."
    )
    policy: str = Field("", max_length=200, description="The planner's present rule, e.g. `hold 300 s x 1.10 + 1`.")
    candidates: list[dict[str, Any]] = Field(
        default_factory=list,
        max_length=100,
        description="Shadow policies: what each would have paid and missed.",
    )


@register
class Verdict(Record):
    """Did an executed decision do what was expected? A fact, from the pool fold."""

    kind: ClassVar[str] = "decision.verdict"
    decision_id: str = Field(min_length=8, max_length=64, description="The decision.")
    pool: Name = Field(description="The pool.")
    verdict: Literal["verified", "regressed"] = Field(description="The outcome.")
    text: str = Field(max_length=2000, description="Expected against measured, in words.")
    measured: dict[str, Any] = Field(default_factory=dict, description="What was measured.")
    at_s: Seconds = Field(description="Log time, Unix s.")


CommandName = Literal["approve", "reject", "revert", "pause", "resume"]


@register
class Command(Record):
    """What a person orders; signed by the service that authenticated the person. A fact."""

    kind: ClassVar[str] = "command"
    id: str = Field(min_length=8, max_length=64, description="Unique; the first content of an id wins.")
    command: CommandName = Field(
        description="approve, reject, revert (of a decision); pause, resume (of a pool or all)."
    )
    decision_id: str | None = Field(None, max_length=64, description="For approve, reject, revert.")
    pool: Name | None = Field(None, description="For pause, resume: the pool; null = the whole fleet.")
    actor: str = Field(min_length=1, max_length=200, description="Who.")
    comment: str = Field("", max_length=2000, description="Why.")
    issued_s: Seconds = Field(description="When, Unix s of fleet time.")
    expires_s: Seconds = Field(description="It counts only until then, Unix s of fleet time.")
    key_id: str = Field(max_length=200, description="Signer object that holds the public key.")
    signature_base64: str = Field(
        "", max_length=200, description="Ed25519 over the canonical JSON of all other fields."
    )

    def signed_bytes(self) -> bytes:
        """What is signed: canonical JSON of every field but the signature."""
        return canonical(self.model_dump(mode="json", exclude={"signature_base64"}))


@register
class ExecutorResult(Record):
    """What an executor did with a dispatched decision. A fact."""

    kind: ClassVar[str] = "executor.result"
    id: str = Field(min_length=8, max_length=128, description="decision id + epoch + outcome.")
    decision_id: str = Field(min_length=8, max_length=64, description="The decision.")
    epoch: int = Field(ge=0, description="The dispatch that this answers: its offset in decision.events.")
    executor: Name = Field(description="Who acted.")
    outcome: Literal["executed", "failed", "skipped"] = Field(
        description="skipped: expired, or older than what is in force."
    )
    dry_run: bool = Field(False, description="True: nothing was changed.")
    before: dict[str, Any] = Field(default_factory=dict, max_length=10_000, description="State seen before.")
    after: dict[str, Any] = Field(default_factory=dict, max_length=10_000, description="State asked for.")
    detail: str = Field("", max_length=2000, description="Error or note.")
    took_s: NonNegative = Field(0.0, description="Wall time that it took, s.")


class Transition(Record):
    """One step of a decision's life."""

    state: State = Field(description="State reached.")
    at_s: Seconds = Field(description="Log time, Unix s.")
    offset: int = Field(ge=0, description="Offset in decision.events that caused it.")
    cause: str = Field(max_length=2000, description="What caused it, in words.")
    actor: str = Field("", max_length=200, description="Who: `fleetloop`, a person, an executor.")


@register
class Decision(Record):
    """A decision in its present state. Upsert by id; `version` grows."""

    kind: ClassVar[str] = "decision"
    id: str = Field(description="Its id.")
    version: int = Field(ge=0, description="Offset in decision.events that this state rests on.")
    state: State = Field(description="Present state.")
    mode: Mode = Field(description="Mode of the policy when it was proposed.")
    epoch: int = Field(ge=0, description="Offset of the dispatch in decision.events; before dispatch, of the proposal.")
    proposal: Proposal = Field(description="What was proposed (after constraints: the action as it will be done).")
    constraints: list[str] = Field(
        default_factory=list, description="Constraints that changed or blocked it, in words."
    )
    history: list[Transition] = Field(default_factory=list, description="Every step so far.")
    executor: Name = Field("simulator", description="Who is to carry it out.")
    reverted_by: str | None = Field(None, description="The decision that undid it.")


@register
class Outcome(Record):
    """A decision's state told back to its pool. Upsert by decision id."""

    kind: ClassVar[str] = "decision.outcome"
    decision_id: str = Field(description="The decision.")
    pool: Name = Field(description="The pool; equals the Kafka key.")
    version: int = Field(ge=0, description="Offset in decision.events.")
    state: State = Field(description="Present state.")
    at_s: Seconds = Field(description="Log time in decision.events, Unix s.")
    decision_kind: Kind = Field(description="Kind of action.")
    action: Action = Field(description="The action as decided.")
    expected: Expected = Field(description="What it should do.")
    reverts: str | None = Field(None, description="Decision that this undoes.")
    note: str = Field("", max_length=2000, description="Constraint or comment that led here.")


@register
class AuditEntry(Record):
    """One accepted transition or command. `hash` = sha256(previous hash + canonical JSON of the rest)."""

    kind: ClassVar[str] = "audit.entry"
    sequence: int = Field(ge=0, description="0, 1, 2, ... without a hole.")
    previous: str = Field(description="Hash of the entry before; 64 zeros for the first.")
    hash: str = Field(description="Hash of this one.")
    at_s: Seconds = Field(description="Log time, Unix s.")
    offset: int = Field(ge=0, description="Offset in decision.events that caused it.")
    decision_id: str | None = Field(description="The decision; null for pause and resume.")
    pool: str | None = Field(description="The pool; null for the whole fleet.")
    event: str = Field(max_length=200, description="State reached, or command.")
    actor: str = Field(max_length=200, description="Who.")
    cause: str = Field(max_length=2000, description="Why, in words.")
    action: dict[str, Any] | None = Field(None, description="The action, absolute.")
