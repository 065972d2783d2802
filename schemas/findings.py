"""What is wrong, and where. Upserts: a finding opens, changes, closes."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from schemas.base import Name, NonNegative, Record, Seconds, register

FindingKind = Literal[
    "slow_replica",
    "replica_failed",
    "stale_data",
    "slo_at_risk",
    "idle_allocated",
    "batching_collapse",
    "gpu_lost",
    "gpu_throttled",
    "interference",
    "latency",
    "spread_collapse",
    "memory_held",
    "fragmentation",
    "node_unknown",
    "engine_dead",
    "gpu_errors",
    "telemetry_lost",
    "price_unknown",
    "frozen",
    "policy_missing",
]


@register
class Finding(Record):
    """One thing that is wrong, about one subject."""

    kind: ClassVar[str] = "finding"
    finding: FindingKind = Field(description="What kind of thing.")
    pool: Name = Field(description="The pool concerned.")
    subject: str = Field(max_length=200, description="Replica, GPU, tenant or pool that it is about.")
    open: bool = Field(description="False: it is over.")
    since_s: Seconds = Field(description="When it began, Unix s.")
    at_s: Seconds = Field(description="When this was said, Unix s.")
    version: int = Field(ge=0, description="Offset in the pool's partition of pool.signals that this rests on.")
    text: str = Field(max_length=2000, description="In words, with the figures that matter.")
    severity: float = Field(ge=0, description="Slowdown factor, share or count, as the text says.")
    usd_per_hour: NonNegative | None = Field(None, description="What it costs, USD/h, where that is known.")
    evidence: dict[str, Any] = Field(default_factory=dict, description="Figures that it rests on.")
