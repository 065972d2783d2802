"""What a simulated fleet is made of: nodes, pools, tenants, load, faults. YAML, checked by pydantic."""

from __future__ import annotations

import math
from collections.abc import Collection
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from schemas.base import Name
from schemas.errors import InvalidInput
from simulator.request import EngineSpec

Positive = Annotated[float, Field(gt=0)]
BUILT_IN = ("demo", "trace")


class Part(BaseModel):
    """Base: immutable, unknown fields refused (a typing error must not pass as a default)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class NodeGroup(Part):
    """Equal hosts."""

    prefix: Name = Field(description="Hosts are named prefix-0, prefix-1, ...")
    gpu: Name = Field(description="GPU type, a key of `gpus`.")
    gpus: int = Field(8, ge=1, le=64, description="GPUs a host.")
    count: int = Field(ge=1, le=10_000, description="Hosts.")


class GpuType(Part):
    """A GPU type: price and what its telemetry is made from."""

    usd_per_gpu_hour: Positive = Field(description="Price of one GPU for an hour.")
    price_source: str = Field("", max_length=500, description="Where the price comes from.")
    mem_total_bytes: Positive = Field(80 * 2**30, description="Device memory.")
    power_idle_w: Positive = Field(70.0, description="Board power without work.")
    power_max_w: Positive = Field(700.0, description="Board power limit.")
    sm_clock_mhz: Positive = Field(1980.0, description="Highest SM clock.")


class EngineConfig(Part):
    """Step-time coefficients (ms; D2 and P1 per 1000 tokens) and engine configuration."""

    d0_ms: Positive
    d1_ms: float = Field(ge=0)
    d2_ms: float = Field(ge=0)
    p1_ms: float = Field(ge=0)
    chunk_tokens: int = Field(2048, ge=16, description="max_num_batched_tokens.")
    seqs_max: int = Field(256, ge=1, description="max_num_seqs.")
    kv_tokens_max: int = Field(450_000, ge=1000, description="KV cache, tokens.")
    queue_max: int = Field(10_000, ge=1, description="Requests that may wait at a replica; more are rejected.")
    timeout_s: Positive | None = Field(None, description="Longest wait for admission, s; null: no limit.")

    @model_validator(mode="after")
    def _decodes_fit(self) -> EngineConfig:
        if self.chunk_tokens <= self.seqs_max:
            raise ValueError("chunk_tokens must exceed seqs_max: a full batch of decodes leaves no room for prompts")
        return self

    def spec(self) -> EngineSpec:
        """The engine's own form."""
        timeout_s = math.inf if self.timeout_s is None else self.timeout_s
        return EngineSpec(**{**self.model_dump(), "timeout_s": timeout_s})


class ColdStart(Part):
    """Time from asking for a replica to its first request. Paid for."""

    mean_s: float = Field(180.0, ge=0)
    sd_s: float = Field(0.0, ge=0, description="Above 0: lognormal with this standard deviation.")


class Slo(Part):
    """A request is good with TTFT and mean time per output token at or below these."""

    ttft_s: Positive = 2.0
    tpot_s: Positive = 0.15


class PoolSpec(Part):
    """One pool: the replicas of one model deployment."""

    name: Name
    route: Name = Field(description="Model name that clients ask for; several pools may share it.")
    route_weight: float = Field(1.0, ge=0, description="Share of the route's requests, relative to its other pools.")
    model: Name
    gpu: Name = Field(description="GPU type, a key of `gpus`.")
    tp: int = Field(1, ge=1, le=64, description="GPUs a replica, on one node.")
    gpu_share: float = Field(1.0, gt=0, le=1, description="Share of each GPU; below 1 pools may be co-located.")
    replicas: int = Field(ge=0, le=10_000, description="Replicas ready at the start.")
    replicas_min: int = Field(1, ge=0)
    replicas_max: int = Field(ge=0, le=10_000)
    capacity_rps: Positive = Field(description="Prior: requests per s that a replica serves within the SLO.")
    input_tokens_mean: Positive | None = Field(None, description="Mean prompt that capacity_rps was measured with.")
    output_tokens_mean: Positive | None = Field(None, description="Mean answer that capacity_rps was measured with.")
    mode: Literal["observe", "shadow", "approve", "automatic"] = Field("automatic", description="Policy of the pool.")
    engine: EngineConfig
    cold_start: ColdStart = ColdStart()
    slo: Slo = Slo()
    router: Literal["two_choices", "random", "round_robin", "least"] = "two_choices"
    backlog_max: int = Field(10_000, ge=0, description="Requests that may wait for a first ready replica.")
    interference: dict[Name, float] = Field(
        default_factory=dict,
        description="Pool on the same GPUs -> how much slower our steps are while it is busy: 0.2 = 20 %.",
    )

    @model_validator(mode="after")
    def _bounds_agree(self) -> PoolSpec:
        if not self.replicas_min <= self.replicas <= self.replicas_max:
            bounds = f"{self.replicas_min} <= {self.replicas} <= {self.replicas_max}"
            raise ValueError(f"replicas_min <= replicas <= replicas_max must hold: {bounds}")
        return self


class Tenant(Part):
    """Who is billed."""

    name: Name
    klass: Name = Field("default", alias="class", description="Class of its requests.")
    share: Positive = Field(1.0, description="Share of a trace's requests, relative to the other tenants.")


class Burst(Part):
    """A rectangular burst that comes again."""

    every_s: Positive
    duration_s: Positive
    factor: Positive = Field(description="Times the rate while it lasts.")
    at_s: float = Field(0.0, ge=0, description="First start.")


class Tokens(Part):
    """A lognormal size in tokens, cut to [1, max]."""

    mean: Positive
    cv: float = Field(1.0, ge=0, description="Standard deviation / mean.")
    max: int = Field(8192, ge=1)


class Wave(Part):
    """One sine of the rate."""

    period_s: Positive
    amplitude: float = Field(ge=0, le=1, description="Relative to the mean rate.")
    phase: float = Field(0.0, description="Of a period, 0 to 1.")


class SyntheticLoad(Part):
    """Poisson arrivals of one tenant, mean rate x (1 + sum of sines) x bursts; runs for ever."""

    kind: Literal["synthetic"] = "synthetic"
    route: Name
    tenant: Name
    rate_rps: Positive
    waves: list[Wave] = Field(default_factory=list, max_length=8)
    bursts: list[Burst] = Field(default_factory=list, max_length=8)
    input_tokens: Tokens
    output_tokens: Tokens


class TraceLoad(Part):
    """A recorded trace (Azure LLM 2023 columns), its requests given to the tenants by their shares."""

    kind: Literal["trace"] = "trace"
    route: Name
    path: str = Field("", description="CSV file; given on the command line for the built-in scenario.")
    scale: Positive = Field(1.0, description="Copies; fractional ones by thinning.")
    jitter_s: float = Field(5.0, ge=0, description="Copies are moved by up to +/- this.")
    duration_s: Positive | None = Field(None, description="Only its first seconds.")
    tenants: list[Name] = Field(default_factory=list, description="Who sends; empty: all tenants.")


class Fault(Part):
    """Something that goes wrong at a set time."""

    kind: Literal["slow", "death"]
    pool: Name
    replica: int = Field(0, ge=0, description="Which of the pool's ready replicas then, oldest first, counted round.")
    at_s: float = Field(ge=0)
    duration_s: Positive = Field(300.0, description="How long it is slow.")
    factor: Positive = Field(2.5, description="Times the step time while slow.")
    every_s: Positive | None = Field(None, description="Comes again after so long.")


class Scenario(Part):
    """A simulated fleet and what happens to it. Fleet time starts at 0 s."""

    name: Name
    seed: int = Field(0, ge=0)
    cluster: Name = "local"
    step_s: Positive = Field(0.5, description="Routers' view of loads, neighbours and lifecycle are this old at most.")
    reference_scale: Positive = Field(1.0, description="Trace scale that node and replica counts are written for.")
    gpus: dict[Name, GpuType]
    nodes: list[NodeGroup] = Field(min_length=1, max_length=1000)
    pools: list[PoolSpec] = Field(min_length=1, max_length=1000)
    tenants: list[Tenant] = Field(min_length=1, max_length=10_000)
    duration_s: Positive | None = Field(None, description="Load ends then; null: with the trace, or never.")
    load: list[Annotated[SyntheticLoad | TraceLoad, Field(discriminator="kind")]] = Field(max_length=1000)
    faults: list[Fault] = Field(default_factory=list, max_length=1000)

    @model_validator(mode="after")
    def _names_agree(self) -> Scenario:
        pools = [pool.name for pool in self.pools]
        tenants = [tenant.name for tenant in self.tenants]
        routes = {pool.route for pool in self.pools}
        for what, names in (("pool", pools), ("tenant", tenants)):
            if len(set(names)) < len(names):
                raise ValueError(f"two {what}s have the same name: {names}")
        used: list[tuple[str, Collection[str], list[str]]] = [
            ("gpus", self.gpus, [n.gpu for n in self.nodes] + [p.gpu for p in self.pools])
        ]
        neighbours = [name for pool in self.pools for name in pool.interference]
        used.append(("pools", pools, [fault.pool for fault in self.faults] + neighbours))
        used.append(("routes", routes, [load.route for load in self.load]))
        senders = [t for s in self.load for t in ([s.tenant] if isinstance(s, SyntheticLoad) else s.tenants)]
        used.append(("tenants", tenants, senders))
        for what, known, wanted in used:
            missing = [name for name in wanted if name not in known]
            if missing:
                raise ValueError(f"{missing[0]!r} is not among the {what}: {', '.join(sorted(known))}")
        return self

    def for_trace(self, path: str, scale: float, duration_s: float | None = None) -> Scenario:
        """This scenario driven by a trace file: hosts, replicas and synthetic rates grow with its scale."""
        grow = scale / self.reference_scale

        def count(n: int) -> int:
            return max(1, math.ceil(n * grow - 1e-9)) if n else 0

        data = self.model_dump(by_alias=True)
        for group in data["nodes"]:
            group["count"] = count(group["count"])
        for pool in data["pools"]:
            for bound in ("replicas_min", "replicas", "replicas_max"):
                pool[bound] = count(pool[bound])
        for load in data["load"]:
            if load["kind"] == "trace":
                load.update(path=path, scale=scale, duration_s=duration_s)
            else:
                load["rate_rps"] *= grow
        return Scenario.model_validate(data)


def load_scenario(name: str | Path) -> Scenario:
    """A built-in scenario by name (demo, trace) or from a YAML file. Raises InvalidInput naming the field."""
    source = files("simulator") / f"{name}.yaml" if str(name) in BUILT_IN else Path(name)
    try:
        data = yaml.safe_load(source.read_text(encoding="utf-8"))
        return Scenario.model_validate(data)
    except OSError as error:
        raise InvalidInput(
            "scenario", str(name), f"name a YAML file or one of {', '.join(BUILT_IN)} ({error})"
        ) from None
    except yaml.YAMLError as error:
        raise InvalidInput("scenario", str(name), f"write valid YAML: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "scenario"
        raise InvalidInput(field, first.get("input"), first["msg"]) from None
