"""Objects of configuration: what computes knows only from the log. Upserts by revision; keyed by `object_kind/name`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, model_validator

from schemas.base import Name, NonNegative, Ratio, Record, Seconds, canonical, refusal, register

ObjectKind = Literal["deployment", "pool", "price", "tenant", "fleet", "signer", "limits"]
Mode = Literal["observe", "shadow", "approve", "automatic"]
MONTH_S = 30 * 86_400
Span = Annotated[float, Field(ge=0, le=MONTH_S)]
"""A duration in seconds, at most 30 days: times that it is added to stay times."""
PositiveSpan = Annotated[float, Field(gt=0, le=MONTH_S)]
"""A duration in seconds, not 0, at most 30 days."""
Tokens = Annotated[float, Field(ge=1e-3, le=1_000_000_000)]
Usd = Annotated[float, Field(ge=0, le=1_000_000)]
"""Bounds keep products finite: what overflowed would stop the partition that computes with it."""


class Deployment(Record):
    """Fixed for the life of a deployment: its clock and its partition counts. Name: `deployment`."""

    origin_ms: int = Field(ge=0, description="Unix ms at which fleet time and wall time agree.")
    speed: float = Field(1.0, gt=0, le=1000, description="Fleet seconds per wall second; 1 in production.")
    local: bool = Field(False, description="Local partition counts.")
    partitions: dict[str, int] = Field(max_length=100, description="Topic -> partitions.")

    def log_ms(self, append_ms: int) -> int:
        """Fleet time in ms of a broker append time (or of any Unix ms): origin + speed x (append - origin)."""
        return self.origin_ms + round(self.speed * (append_ms - self.origin_ms))


class TierTargets(Record):
    """Targets of one tier; null: as the pool's."""

    slo_ttft_s: PositiveSpan | None = Field(None, description="Target time to first token, s.")
    slo_tpot_s: PositiveSpan | None = Field(None, description="Target mean time per output token, s.")


class PoolSpec(Record):
    """One pool: what it serves, with what, how well, and what Fleetloop may do about it."""

    model: str = Field(max_length=200, description="Model served.")
    cluster: Name = Field("local", description="Cluster that it runs in.")
    route: Name | None = Field(None, description="Route (model name at the gateway) that it takes traffic of.")
    gpu_type: Name = Field(description="GPU product, as in prices.")
    gpus_per_replica: float = Field(gt=0, le=1024, description="GPUs a replica is billed for.")
    slo_ttft_s: PositiveSpan = Field(2.0, description="Target time to first token, s.")
    slo_tpot_s: PositiveSpan = Field(0.15, description="Target mean time per output token, s.")
    slo_target: Ratio = Field(0.99, description="Share of requests that must meet both.")
    tiers: dict[Name, TierTargets] = Field(
        default_factory=dict, max_length=100, description="Tier -> targets that differ for tenants of that tier."
    )
    reporter: Literal["gateway", "engine"] = Field(
        "gateway", description="Whose rows count where both report a request; the other's only add what is missing."
    )
    capacity_rps: float = Field(
        ge=1e-6,
        le=1_000_000_000,
        description="Prior: requests/s a replica sustains within its SLO for the usual tokens.",
    )
    input_tokens_mean: Tokens | None = Field(
        None, description="Mean prompt tokens that capacity_rps was measured with."
    )
    output_tokens_mean: Tokens | None = Field(
        None, description="Mean output tokens that capacity_rps was measured with."
    )
    cold_start_s: Span = Field(180.0, description="From the order to a ready replica, s.")
    replicas_min: int = Field(1, ge=0, le=100_000, description="Never fewer.")
    replicas_max: int = Field(64, ge=0, le=100_000, description="Never more.")
    mode: Mode = Field("approve", description="observe, shadow, approve or automatic.")
    automatic_step_max: int | None = Field(
        None, ge=0, description="In automatic mode, larger steps wait for approval. Null: none."
    )
    step_up_max: int = Field(64, ge=1, description="Most replicas added by one decision.")
    step_down_max: int = Field(16, ge=1, description="Most replicas removed by one decision.")
    cooldown_up_s: Span = Field(0.0, description="Least time between two executed scale-ups, s.")
    cooldown_down_s: Span = Field(10.0, description="Least time after an executed change before a scale-down, s.")
    stabilisation_s: float = Field(
        0.0, ge=0, le=3600, description="A scale-down must have been wanted without a break for so long, s."
    )
    freshness_s: PositiveSpan = Field(30.0, description="Evidence older than this holds every action, s.")
    approval_expiry_s: PositiveSpan = Field(
        300.0, description="A proposal that nobody approved lapses after so long, s."
    )
    miss_price: float = Field(7.0, gt=0, le=1_000_000, description="lambda: a 1 % miss is worth so many % of capacity.")
    reserve: float = Field(1.0, ge=0, le=100_000, description="Replicas kept beyond the plan.")
    priority: int = Field(0, ge=-1000, le=1000, description="Higher goes first when GPUs or money are short.")
    executor: Name = Field("simulator", description="Executor that carries out its decisions.")


class PriceSpec(Record):
    """Price of a GPU type. Name: the GPU type."""

    usd_per_gpu_hour: Usd = Field(description="USD per GPU and hour.")
    source: str = Field("", max_length=500, description="Where the figure comes from.")


class TenantSpec(Record):
    """A tenant."""

    tier: str = Field("standard", max_length=50, description="Tier, for people and later policies.")


class FleetSpec(Record):
    """Bounds over all pools. Name: `fleet`."""

    mode: Mode = Field("automatic", description="No pool acts more freely than this.")
    gpus_max: dict[str, NonNegative] = Field(
        default_factory=dict, max_length=1000, description="GPU type -> most GPUs allocated. Missing: no bound."
    )
    usd_per_hour_max: NonNegative | None = Field(
        None, description="Most spent per hour at the planned allocation, USD."
    )
    usd_per_day_max: NonNegative | None = Field(None, description="Most spent per UTC day, USD.")
    usd_per_month_max: NonNegative | None = Field(None, description="Most spent per UTC month, USD.")


class SignerSpec(Record):
    """A service whose signed commands count. Name: the key id."""

    public_key_base64: str = Field(min_length=44, max_length=44, description="Ed25519 public key, 32 bytes in base64.")
    role: Literal["viewer", "approver", "admin"] = Field(description="What its commands may do.")


class LimitsSpec(Record):
    """Windows and bounds of every fold. Name: `limits`. Every overflow is counted."""

    window_s: Literal[10] = Field(10, description="Tumbling window, s.")
    lateness_s: float = Field(2.0, ge=0, le=10, description="A window closes when log time passes its end by this, s.")
    grace_node_s: float = Field(60.0, ge=0, le=3600, description="Later node samples still revise, s.")
    grace_requests_s: float = Field(900.0, ge=0, le=7200, description="Later request rows still revise, s.")
    future_s: float = Field(60.0, ge=0, le=3600, description="Rows further ahead of log time than this are refused, s.")
    sample_gap_s: float = Field(3.0, gt=0, le=60, description="A sample speaks for at most this long, s.")
    inventory_stale_s: float = Field(90.0, gt=0, description="Without inventory for so long a node is unknown, s.")
    nodes_max: int = Field(10_000, ge=1, description="Nodes per partition.")
    gpus_per_node_max: int = Field(
        1024, ge=1, le=1024, description="GPU indices per node, those of MIG instances included."
    )
    processes_per_node_max: int = Field(512, ge=1, description="Processes per node.")
    neighbours_max: int = Field(8, ge=1, le=32, description="Neighbours of a replica that interference is looked for.")
    replicas_max: int = Field(20_000, ge=1, description="Replicas per partition.")
    config_objects_max: int = Field(100_000, ge=1, description="Objects of configuration, deleted ones too.")
    pools_max: int = Field(2_000, ge=1, description="Pools per partition.")
    tenants_max: int = Field(
        10_000, ge=1, description="Rows of a pool and window; beyond, light tenants are `(other)`."
    )
    node_samples_max: int = Field(
        2_000_000, ge=1, description="Samples of GPUs, and of engines, remembered per partition within the grace."
    )
    histogram_samples_max: int = Field(
        500_000, ge=1, description="Distributions of engines remembered per partition within the grace."
    )
    histogram_layouts_max: int = Field(64, ge=1, description="Different bucket bounds of engines per partition.")
    texts_max: int = Field(20_000, ge=1, description="Names of engines, models and processes per partition.")
    node_segments_max: int = Field(
        100_000, ge=1, description="States of replicas remembered per partition within the grace."
    )
    node_batches_max: int = Field(
        1_000_000, ge=1, description="Ids of node batches remembered per partition for deduplication."
    )
    request_ids_max: int = Field(5_000_000, ge=1, description="Request ids remembered per partition for deduplication.")
    request_twins_max: int = Field(
        200_000,
        ge=1,
        description="Ends kept per partition, where gateway and engine both report, until the other's has come.",
    )
    decisions_max: int = Field(20_000, ge=1, description="Decisions remembered by the fleet fold.")
    open_decisions_max: int = Field(2_000, ge=1, description="Decisions not yet ended.")
    commands_max: int = Field(50_000, ge=1, description="Command ids remembered.")
    actions_per_minute_max: int = Field(120, ge=1, description="Dispatches per minute over the fleet.")


SPECS: dict[str, type[Record]] = {
    "deployment": Deployment,
    "pool": PoolSpec,
    "price": PriceSpec,
    "tenant": TenantSpec,
    "fleet": FleetSpec,
    "signer": SignerSpec,
    "limits": LimitsSpec,
}


ONE_OF_A_KIND = ("deployment", "fleet", "limits")
"""Kinds of which there is one object, named like its kind: another name would be taken by some and not by others."""


@register
class ConfigObject(Record):
    """One object of configuration at one revision."""

    kind: ClassVar[str] = "config"
    object_kind: ObjectKind = Field(description="What kind of object.")
    name: Name = Field(description="Its name; with the kind it is the key.")
    revision: int = Field(ge=1, description="Greater replaces smaller.")
    deleted: bool = Field(False, description="True: the object is gone.")
    at_s: Seconds = Field(0.0, description="When it was applied, Unix s.")
    actor: str = Field("", max_length=200, description="Who applied it.")
    spec: dict[str, Any] = Field(
        default_factory=dict, max_length=200, description="The object; its schema depends on the kind."
    )

    @property
    def key(self) -> str:
        """Kafka key."""
        return f"{self.object_kind}/{self.name}"

    def typed(self) -> Record:
        """The spec as its class. Raises InvalidRecord that names field, value and remedy."""
        try:
            return self._spec()
        except ValidationError as error:
            raise refusal(f"config {self.key}", error) from None

    @model_validator(mode="after")
    def _check(self) -> ConfigObject:
        if self.object_kind in ONE_OF_A_KIND and self.name != self.object_kind:
            raise ValueError(f"there is one {self.object_kind}: name it `{self.object_kind}`")
        if not self.deleted:
            self._spec()
        return self

    def _spec(self) -> Record:
        # as JSON, strictly: what a spec says must not depend on whether it came by YAML or by the log
        try:
            data = canonical(self.spec)
        except TypeError as error:
            raise ValueError(f"spec: only what JSON can say: {error}") from None
        return SPECS[self.object_kind].model_validate_json(data, strict=True)
