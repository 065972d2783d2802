"""The topic registry: every topic of a deployment, and nothing that is not here.

Topics are created from this table and `schemas/generated/asyncapi.yaml` is written from it.
"""

from __future__ import annotations

from typing import NamedTuple

KIB = 1024
MIB = 1024 * KIB
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS


class Topic(NamedTuple):
    """One topic. Its full name is `prefix + name`; all topics use `message.timestamp.type=LogAppendTime`."""

    name: str
    doc: str
    key: str
    kinds: tuple[str, ...]
    """`ce_type`s that it may carry, without `fleetloop.` and `.v1`."""
    partitions: int
    partitions_local: int
    cleanup: str = "delete"
    retention_ms: int = 7 * DAY_MS
    max_message_bytes: int = MIB
    level: str = ""
    """The level whose log this is; empty for results."""

    def config(self) -> dict[str, str]:
        """The topic's Kafka configuration."""
        return {
            "message.timestamp.type": "LogAppendTime",
            "cleanup.policy": self.cleanup,
            "retention.ms": str(self.retention_ms),
            "max.message.bytes": str(self.max_message_bytes),
        }


NODE_SAMPLES = "node.samples"
REQUEST_TRACES = "request.traces"
POOL_SIGNALS = "pool.signals"
DECISION_EVENTS = "decision.events"
FLEET_CONFIG = "fleet.config"
COST_WINDOWS = "cost.windows"
LOAD_FORECASTS = "load.forecasts"
FINDINGS = "findings"
DECISIONS = "decisions"
AUDIT = "audit"
DEAD_LETTERS = "dead.letters"

_ALL = (
    Topic(
        NODE_SAMPLES,
        "All that a node's exporters say: GPU samples, engine samples, who is who.",
        "node",
        (
            "gpu.samples",
            "process.samples",
            "engine.samples",
            "engine.histograms",
            "node.inventory",
            "config",
            "tick",
        ),
        16,
        4,
        retention_ms=DAY_MS,
        level="node",
    ),
    Topic(
        REQUEST_TRACES,
        "Requests as gateways saw them: one row when they arrive, one when they end.",
        "request id (batches: any id of the partition)",
        ("request.rows", "config", "tick"),
        16,
        4,
        retention_ms=DAY_MS,
        level="requests",
    ),
    Topic(
        POOL_SIGNALS,
        "Every window, replica state, policy change and outcome of a pool in one order.",
        "pool",
        (
            "gpu.windows",
            "node.windows",
            "engine.windows",
            "interference.windows",
            "request.windows",
            "decision.outcome",
            "config",
            "tick",
        ),
        16,
        4,
        retention_ms=3 * DAY_MS,
        level="pool",
    ),
    Topic(
        DECISION_EVENTS,
        "Proposals, pool status, signed commands and executors' results: what the fleet fold decides on.",
        "fleet",
        (
            "decision.proposed",
            "pool.status",
            "decision.verdict",
            "command",
            "executor.result",
            "config",
            "tick",
        ),
        1,
        1,
        retention_ms=30 * DAY_MS,
        level="fleet",
    ),
    Topic(
        FLEET_CONFIG,
        "Objects of configuration: deployment, pools, tenants, prices, policies, signers.",
        "kind/name",
        ("config",),
        1,
        1,
        cleanup="compact",
        retention_ms=-1,
        level="config",
    ),
    Topic(
        COST_WINDOWS,
        "Cost per pool, tenant and window: direct, idle and total; the parts add up to the bill.",
        "pool/tenant/window start",
        ("cost.window",),
        16,
        4,
        cleanup="compact,delete",
        retention_ms=30 * DAY_MS,
    ),
    Topic(
        LOAD_FORECASTS,
        "Load per pool and horizon with interval and the forecaster's own published error.",
        "pool/horizon",
        ("load.forecast",),
        16,
        4,
        cleanup="compact,delete",
    ),
    Topic(
        FINDINGS,
        "What is wrong where, with severity and evidence: slow replicas, idle GPUs, collapsed batches, stale data.",
        "pool/kind/subject",
        ("finding",),
        16,
        4,
        cleanup="compact,delete",
    ),
    Topic(
        DECISIONS,
        "Every decision in its present state: what executors carry out and people approve. One partition: "
        "the fleet fold alone writes it, and an executor needs one order.",
        "decision id",
        ("decision",),
        1,
        1,
        cleanup="compact,delete",
        retention_ms=30 * DAY_MS,
    ),
    Topic(
        AUDIT,
        "One record per accepted transition, hash-chained, kept for ever.",
        "decision id",
        ("audit.entry",),
        1,
        1,
        retention_ms=-1,
    ),
    Topic(
        DEAD_LETTERS,
        "Every refused record: bytes, reason and coordinates.",
        "topic/partition/offset",
        ("dead.letter",),
        4,
        1,
        retention_ms=7 * DAY_MS,
    ),
    *(
        Topic(
            f"checkpoints.{level}",
            f"Checkpoints of the {level} level: (offset, state); older ones are starting points for replay.",
            "topic/partition",
            ("checkpoint",),
            1,
            1,
            retention_ms=2 * DAY_MS,
            max_message_bytes=8 * MIB,
        )
        for level in ("node", "requests", "pool", "fleet")
    ),
)

TOPICS: dict[str, Topic] = {t.name: t for t in _ALL}
LEVEL_TOPIC: dict[str, str] = {t.level: t.name for t in _ALL if t.level}
"""Level -> the topic that is its log: node, requests, pool, fleet, config."""


def ce_type(kind: str) -> str:
    """`ce_type` of a record kind, version 1."""
    return kind if kind == "tick" else f"fleetloop.{kind}.v1"
