"""Short ways to write a log of the fleet level, and to read what came of it."""

from __future__ import annotations

from typing import Any

from models.fleet.fold import FleetFold
from schemas.base import Record, decode
from schemas.config import ConfigObject
from schemas.decisions import (
    AuditEntry,
    Command,
    Decision,
    ExecutorResult,
    Expected,
    Outcome,
    PoolStatus,
    Proposal,
    RerouteAction,
    ScaleAction,
    Target,
    Verdict,
)
from schemas.log import TICK, LogRecord, Result
from schemas.topics import AUDIT, DEAD_LETTERS, DECISIONS, POOL_SIGNALS, ce_type
from streams.signing import Ed25519PrivateKey, sign, signer_object

T0 = 1_700_000_000.0
PARTITIONS = {"pool.signals": 4, "decision.events": 1}
KEYS = {
    role: Ed25519PrivateKey.from_private_bytes(bytes([i]) * 32)
    for i, role in enumerate(("viewer", "approver", "admin", "stranger"))
}
POOL = {
    "model": "m",
    "gpu_type": "A",
    "gpus_per_replica": 2,
    "capacity_rps": 1.0,
    "mode": "automatic",
    "cooldown_down_s": 0,
}


def make_fold() -> FleetFold:
    return FleetFold("decision.events", 0, PARTITIONS)


def config(kind: str, name: str, revision: int = 1, deleted: bool = False, **spec: Any) -> ConfigObject:
    return ConfigObject(object_kind=kind, name=name, revision=revision, deleted=deleted, spec=spec)


def pool_config(name: str, revision: int = 1, **spec: Any) -> ConfigObject:
    return config("pool", name, revision, **(POOL | spec))


def signers() -> list[ConfigObject]:
    return [
        signer_object(role, role, key.public_key())  # type: ignore[arg-type]
        for role, key in KEYS.items()
        if role != "stranger"
    ]


def status(pool: str, at_s: float, allocated: int | None = 4, **fields: Any) -> PoolStatus:
    known = {
        "version": int((at_s - T0) * 1000),
        "gpu_type": "A",
        "replicas_allocated": allocated,
        "replicas_ready": allocated,
        "gpus_allocated": None if allocated is None else allocated * 2.0,
        "gpus_per_replica": 2.0,
        "usd_day_to_date": 1.0,
        "usd_month_to_date": 1.0,
        "evidence_s": at_s,
    }
    return PoolStatus(pool=pool, at_s=at_s, **(known | fields))


def proposal(id: str, at_s: float, pool: str = "p", replicas: int = 6, **fields: Any) -> Proposal:
    known: dict[str, Any] = {
        "decision_kind": "scale",
        "target": Target(pool=pool),
        "action": ScaleAction(replicas=replicas),
        "undo": ScaleAction(replicas=4),
        "reason": "load grows",
        "expected": Expected(slo_attainment=0.99),
        "confidence": 0.9,
        "at_s": at_s,
        "trigger_s": at_s,
        "evidence_s": at_s,
        "expires_s": at_s + 60,
        "policy_revision": 1,
    }
    return Proposal(id=id.ljust(8, "."), **(known | fields))


def reroute(id: str, at_s: float, weights: dict[str, float], pool: str = "p", **fields: Any) -> Proposal:
    scope = fields.pop("scope", "replicas")
    return proposal(
        id, at_s, pool, decision_kind="reroute", action=RerouteAction(weights=weights, scope=scope), **fields
    )


def command(id: str, name: str, at_s: float, role: str = "approver", **fields: Any) -> Command:
    key_id = fields.pop("key_id", role)
    if "decision_id" in fields:
        fields["decision_id"] = fields["decision_id"].ljust(8, ".")
    known: dict[str, Any] = {"actor": "ann", "issued_s": at_s, "expires_s": at_s + 60, "key_id": key_id}
    return sign(Command(id=id.ljust(8, "."), command=name, **(known | fields)), KEYS[role])


def answer(decision: Decision, outcome: str = "executed", **fields: Any) -> ExecutorResult:
    known: dict[str, Any] = {
        "id": f"{decision.id}/{decision.epoch}/{outcome}",
        "decision_id": decision.id,
        "epoch": decision.epoch,
        "executor": decision.executor,
        "outcome": outcome,
    }
    return ExecutorResult(**(known | fields))


def verdict(decision_id: str, at_s: float, word: str = "verified", pool: str = "p") -> Verdict:
    return Verdict(decision_id=decision_id.ljust(8, "."), pool=pool, verdict=word, text="as measured", at_s=at_s)


def record(at_s: float, value: Record | None, offset: int = 0) -> LogRecord:
    if value is None:
        return LogRecord(offset, round(at_s * 1000), TICK, "", b"")
    return LogRecord(offset, round(at_s * 1000), ce_type(value.kind), "fleet", value.encode())


class Run:
    """A fold that is fed record by record, and what it has said so far."""

    def __init__(self, *configured: ConfigObject, fold: FleetFold | None = None) -> None:
        self.fold = fold or make_fold()
        self.log: list[LogRecord] = []
        self.results: list[Result] = []
        for item in configured:
            self.at(T0, item)

    def at(self, at_s: float, value: Record | None = None) -> list[Result]:
        """Appends a record (None: a tick) and gives its results."""
        entry = record(at_s, value, len(self.log))
        self.log.append(entry)
        got = self.fold.apply([entry])
        self.results += got
        return got

    def decisions(self) -> dict[str, Decision]:
        """Each decision as last published."""
        found = [decode(Decision, r.value) for r in self.results if r.topic == DECISIONS]
        return {d.id: d for d in found}

    def decision(self, id: str) -> Decision:
        return self.decisions()[id.ljust(8, ".")]

    def state(self, id: str) -> str:
        return self.decision(id).state

    def path(self, id: str) -> list[str]:
        return [step.state for step in self.decision(id).history]

    def audit(self) -> list[AuditEntry]:
        return [decode(AuditEntry, r.value) for r in self.results if r.topic == AUDIT]

    def outcomes(self) -> list[tuple[Result, Outcome]]:
        return [(r, decode(Outcome, r.value)) for r in self.results if r.topic == POOL_SIGNALS]

    def dead(self) -> list[str]:
        return [r.id.split("/")[3] for r in self.results if r.topic == DEAD_LETTERS]


def started(*extra: ConfigObject, pools: tuple[str, ...] = ("p",), allocated: int = 4, **spec: Any) -> Run:
    """A fleet of pools that have just spoken, of automatic mode unless said otherwise."""
    objects = [pool_config(name, **spec) for name in pools]
    run = Run(*objects, config("price", "A", usd_per_gpu_hour=2.0), *signers(), *extra)
    for name in pools:
        run.at(T0, status(name, T0, allocated))
    return run
