"""Node level input: what exporters read on a host. Raw and cumulative; the node fold takes the deltas."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from schemas.base import Name, NonNegative, Ratio, Record, Seconds, register
from schemas.columns import Column, Columns

ReplicaState = Literal["starting", "ready", "draining", "asleep", "failed"]

_META = {
    "node": "Host name; equals the Kafka key.",
    "start_s": "Start of the exporter process, Unix s. With `seq` it names the batch.",
    "seq": "Number of the batch since the exporter's start.",
    "dropped": "Batches that the exporter dropped since its start because the broker was away too long.",
}

GPU_SAMPLES = Columns(
    "gpu.samples",
    "One row a GPU and reading, about once a second. Null = the GPU or driver does not give it.",
    [
        Column("gpu", "i64", "Index on the node; names are in node.inventory.", required=True, high=1023),
        Column("at_s", "f64", "When it was read, Unix time.", "s", required=True),
        Column(
            "status",
            "text",
            "lost: the GPU no longer answers; its other columns are null.",
            choices=("ok", "lost"),
        ),
        Column(
            "util_gpu_pct",
            "f64",
            "Share of the last sample period with a kernel resident. Not capacity.",
            "%",
            high=100,
        ),
        Column(
            "util_mem_pct",
            "f64",
            "Share of time that device memory was read or written. Not bandwidth.",
            "%",
            high=100,
        ),
        Column("sm_active_ratio", "f64", "Cycles with a warp on an SM (GPM or DCGM).", "1", high=1),
        Column("sm_occupancy_ratio", "f64", "Resident warps of the maximum.", "1", high=1),
        Column("tensor_active_ratio", "f64", "Cycles with a tensor pipe active.", "1", high=1),
        Column("dram_active_ratio", "f64", "Cycles with the memory interface active.", "1", high=1),
        Column(
            "mem_used_bytes",
            "f64",
            "Device memory in use. Flat under LLM engines, which allocate it all.",
            "By",
        ),
        Column("mem_total_bytes", "f64", "Device memory.", "By"),
        Column("power_w", "f64", "Board power (1 s mean on Ampere and later).", "W", high=10_000),
        Column("energy_j", "f64", "Energy since the driver was loaded: a counter with resets.", "J"),
        Column("temp_c", "f64", "GPU temperature.", "Cel", low=-50, high=200),
        Column("mem_temp_c", "f64", "Memory temperature.", "Cel", low=-50, high=200),
        Column("sm_clock_mhz", "f64", "SM clock.", "MHz", high=20_000),
        Column("sm_clock_max_mhz", "f64", "Highest SM clock.", "MHz", high=20_000),
        Column(
            "throttle_mask",
            "i64",
            "NVML clocks event reasons, bit mask at the moment of reading.",
            high=2**40,
        ),
        Column("throttle_power_ns", "f64", "Time slowed by the power cap: a counter.", "ns"),
        Column("throttle_thermal_ns", "f64", "Time slowed by heat (software and hardware): a counter.", "ns"),
        Column("pcie_tx_bytes", "f64", "PCIe bytes sent: a counter.", "By"),
        Column("pcie_rx_bytes", "f64", "PCIe bytes received: a counter.", "By"),
        Column("nvlink_tx_bytes", "f64", "NVLink bytes sent, all links: a counter.", "By"),
        Column("nvlink_rx_bytes", "f64", "NVLink bytes received, all links: a counter.", "By"),
    ],
    _META,
)

ENGINE_SAMPLES = Columns(
    "engine.samples",
    "One row an engine replica and scrape. Counters as read, since the engine's start.",
    [
        Column("replica", "text", "Name of the replica.", required=True, plain=True),
        Column("at_s", "f64", "When it was scraped, Unix time.", "s", required=True),
        Column("start_s", "f64", "Start of the engine process, Unix time: another value is a restart.", "s"),
        Column(
            "status",
            "text",
            "dead: the endpoint did not answer; the other columns are null.",
            choices=("ok", "dead"),
        ),
        Column("running", "f64", "Requests in the running batch.", "{request}"),
        Column("waiting", "f64", "Requests that wait for admission.", "{request}"),
        Column("kv_usage_ratio", "f64", "KV cache in use.", "1", high=1.0001),
        Column("prompt_tokens", "f64", "Prompt tokens processed: a counter.", "{token}"),
        Column("cached_tokens", "f64", "Prompt tokens found in the prefix cache: a counter.", "{token}"),
        Column("generation_tokens", "f64", "Tokens generated: a counter.", "{token}"),
        Column("requests", "f64", "Requests finished: a counter.", "{request}"),
        Column("preemptions", "f64", "Requests preempted: a counter.", "{request}"),
        Column("iterations", "f64", "Engine steps: a counter.", "{step}"),
        Column("ttft_s_sum", "f64", "Time to first token, sum: a counter.", "s"),
        Column("ttft_count", "f64", "Requests in ttft_s_sum: a counter.", "{request}"),
        Column("tpot_s_sum", "f64", "Time per output token (or inter-token latency), sum: a counter.", "s"),
        Column("tpot_count", "f64", "Observations in tpot_s_sum: a counter.", "1"),
        Column("e2e_s_sum", "f64", "End-to-end latency, sum: a counter.", "s"),
        Column("e2e_count", "f64", "Requests in e2e_s_sum: a counter.", "{request}"),
        Column("queue_s_sum", "f64", "Time in the queue, sum: a counter.", "s"),
        Column("queue_count", "f64", "Requests in queue_s_sum: a counter.", "{request}"),
    ],
    _META,
    json_too=True,
)


class GpuEntry(Record):
    """One GPU of a node."""

    gpu: int = Field(ge=0, le=1023, description="Index on the node.")
    uuid: str = Field("", max_length=100, description="NVML uuid.")
    gpu_type: Name = Field(description="Product name as in the price list, e.g. H100.")
    mem_total_bytes: NonNegative | None = Field(None, description="Device memory, bytes.")


class ReplicaEntry(Record):
    """One engine replica on a node."""

    replica: Name = Field(description="Name of the replica, unique in the fleet.")
    pool: Name = Field(description="The pool that it serves.")
    gpus: list[Annotated[int, Field(ge=0, le=1023)]] = Field(
        max_length=64, description="Indices of the GPUs that it runs on."
    )
    gpu_share: Ratio = Field(1.0, description="Share of those GPUs that is billed to it (co-located replicas).")
    state: ReplicaState = Field(description="starting, ready, draining, asleep or failed.")
    billed: bool = Field(True, description="Whether its GPUs are paid for now (loading and draining are).")
    since_s: Seconds = Field(description="Since when it has had this state, Unix s.")


@register
class NodeInventory(Record):
    """Who is who on a node: on every change and at least every 30 s."""

    kind: ClassVar[str] = "node.inventory"
    node: Name = Field(description="Host name.")
    cluster: Name = Field("local", description="Cluster that the node belongs to.")
    at_s: Seconds = Field(description="When it was read, Unix s.")
    gpus: list[GpuEntry] = Field(default_factory=list, max_length=1024, description="GPUs of the node.")
    replicas: list[ReplicaEntry] = Field(default_factory=list, max_length=1024, description="Replicas on the node.")
