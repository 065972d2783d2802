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
        Column(
            "gpu",
            "i64",
            "Index on the node; names are in node.inventory. A MIG instance: (parent + 1) x 16 + GPU instance id.",
            required=True,
            high=1023,
        ),
        Column("parent", "i64", "Index of the GPU that this MIG instance is a part of. Null: a whole GPU.", high=62),
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
        Column("mem_reserved_bytes", "f64", "Device memory that the driver keeps for itself.", "By"),
        Column("mem_total_bytes", "f64", "Device memory.", "By"),
        Column("power_w", "f64", "Board power (1 s mean on Ampere and later).", "W", high=10_000),
        Column("power_instant_w", "f64", "Board power at this moment.", "W", high=10_000),
        Column("power_limit_w", "f64", "Power cap that is enforced.", "W", high=10_000),
        Column("energy_j", "f64", "Energy since the driver was loaded: a counter with resets.", "J"),
        Column("temp_c", "f64", "GPU temperature.", "Cel", low=-50, high=200),
        Column("mem_temp_c", "f64", "Memory temperature.", "Cel", low=-50, high=200),
        Column("sm_clock_mhz", "f64", "SM clock.", "MHz", high=20_000),
        Column("sm_clock_max_mhz", "f64", "Highest SM clock.", "MHz", high=20_000),
        Column("mem_clock_mhz", "f64", "Memory clock.", "MHz", high=20_000),
        Column("activity_window_s", "f64", "Time that the four activity ratios speak for.", "s", high=3600),
        Column(
            "throttle_mask",
            "i64",
            "NVML clocks event reasons, bit mask at the moment of reading.",
            high=2**40,
        ),
        Column("throttle_power_ns", "f64", "Time slowed by the power cap: a counter.", "ns"),
        Column("throttle_thermal_ns", "f64", "Time slowed by heat (software and hardware): a counter.", "ns"),
        Column("throttle_brake_ns", "f64", "Time slowed by the external power brake: a counter.", "ns"),
        Column("throttle_sync_ns", "f64", "Time slowed to stay in step with other GPUs: a counter.", "ns"),
        Column("pcie_tx_bytes", "f64", "PCIe bytes sent: a counter.", "By"),
        Column("pcie_rx_bytes", "f64", "PCIe bytes received: a counter.", "By"),
        Column("nvlink_tx_bytes", "f64", "NVLink bytes sent, all links: a counter.", "By"),
        Column("nvlink_rx_bytes", "f64", "NVLink bytes received, all links: a counter.", "By"),
        Column("ecc_corrected", "f64", "Memory errors corrected since the driver was loaded: a counter.", "1"),
        Column("ecc_uncorrected", "f64", "Memory errors not corrected since then: a counter.", "1"),
        Column("remap_pending", "i64", "1: rows wait to be remapped; drain and reset.", high=1),
        Column("remap_failed", "i64", "1: a row could not be remapped; replace the GPU.", high=1),
        Column("xid", "i64", "Code of the last Xid error since the exporter's start.", high=100_000),
        Column("xid_at_s", "f64", "When that came, Unix time.", "s"),
    ],
    _META,
)

PROCESS_SAMPLES = Columns(
    "process.samples",
    "One row a GPU, process and reading, about every 5 s: what each takes of a GPU, and whose it is.",
    [
        Column(
            "gpu", "i64", "Index as in gpu.samples (of the MIG instance, where it is on one).", required=True, high=1023
        ),
        Column("at_s", "f64", "When it was read, Unix time.", "s", required=True),
        Column("pid", "i64", "Process id on the host.", required=True, high=2**31),
        Column("name", "text", "Command name."),
        Column("container", "text", "Container id, from its control group.", plain=True),
        Column("pod", "text", "Kubernetes `namespace:pod`.", plain=True),
        Column("replica", "text", "The replica that it is part of. Null: of none that is known.", plain=True),
        Column("tenant", "text", "Whose it is, where it serves one tenant alone."),
        Column("gone", "i64", "1: the GPU still holds memory for it, but the process no longer exists.", high=1),
        Column("mem_bytes", "f64", "Device memory that it holds.", "By"),
        Column("sm_util_pct", "f64", "Its share of SM time since the reading before. 0: none of it.", "%", high=100),
        Column("mem_util_pct", "f64", "Its share of memory time since the reading before.", "%", high=100),
        Column("cpu_s", "f64", "Host CPU time since its start, all threads: a counter.", "s"),
        Column("host_cpus", "f64", "CPUs of the host: what cpu_s is a share of.", "1"),
    ],
    _META,
)

ENGINE_SAMPLES = Columns(
    "engine.samples",
    "One row an engine replica and scrape. Counters as read, since the engine's start.",
    [
        Column("replica", "text", "Name of the replica.", required=True, plain=True),
        Column("at_s", "f64", "When it was scraped, Unix time.", "s", required=True),
        Column("engine", "text", "What runs there: vllm, sglang, tgi, triton, dynamo, ..."),
        Column("pool", "text", "Pool by the target's labels: used while no inventory names the replica.", plain=True),
        Column("model", "text", "Model served, as the engine names it."),
        Column("scrape", "i64", "Number of this scrape of the target, from 1: gaps are scrapes that failed."),
        Column("since_s", "f64", "The scrape before that answered, Unix time. Null: the first.", "s"),
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
        Column("kv_capacity_tokens", "f64", "Tokens that the KV cache holds.", "{token}"),
        Column("running_max", "f64", "Largest batch that the engine admits.", "{request}"),
        Column("requests", "f64", "Requests finished: a counter.", "{request}"),
        Column("failed", "f64", "Requests failed: a counter.", "{request}"),
        Column(
            "aborted", "f64", "Requests given up by their client, where the engine counts them: a counter.", "{request}"
        ),
        Column("rejected", "f64", "Requests refused: a counter.", "{request}"),
        Column("preemptions", "f64", "Requests preempted (retracted): a counter.", "{request}"),
        Column("iterations", "f64", "Engine steps: a counter.", "{step}"),
        Column("busy_s", "f64", "Time with a step under way: a counter.", "s"),
        Column("draft_tokens", "f64", "Tokens proposed by speculative decoding: a counter.", "{token}"),
        Column("accepted_tokens", "f64", "... of these, accepted: a counter.", "{token}"),
        Column("ttft_s_sum", "f64", "Time to first token, sum: a counter.", "s"),
        Column("ttft_count", "f64", "Requests in ttft_s_sum: a counter.", "{request}"),
        Column("tpot_s_sum", "f64", "Time per output token of finished requests, sum: a counter.", "s"),
        Column("tpot_count", "f64", "Observations in tpot_s_sum: a counter.", "1"),
        Column("itl_s_sum", "f64", "Time between tokens as they come, sum: a counter.", "s"),
        Column("itl_count", "f64", "Observations in itl_s_sum (messages, with speculative decoding): a counter.", "1"),
        Column("e2e_s_sum", "f64", "End-to-end latency, sum: a counter.", "s"),
        Column("e2e_count", "f64", "Requests in e2e_s_sum: a counter.", "{request}"),
        Column("queue_s_sum", "f64", "Time in the queue, sum: a counter.", "s"),
        Column("queue_count", "f64", "Requests in queue_s_sum: a counter.", "{request}"),
        Column("prefill_s_sum", "f64", "Time from schedule to first token, sum: a counter.", "s"),
        Column("prefill_count", "f64", "Requests in prefill_s_sum: a counter.", "{request}"),
    ],
    _META,
    json_too=True,
)

HISTOGRAMS = ("ttft_s", "tpot_s", "itl_s", "e2e_s", "queue_s", "prefill_s", "input_tokens", "output_tokens")
"""Distributions that engines give, by our names."""

ENGINE_HISTOGRAMS = Columns(
    "engine.histograms",
    "One row a replica and distribution, about every 5 s: buckets as the engine counts them, since its start.",
    [
        Column("replica", "text", "Name of the replica.", required=True, plain=True),
        Column("at_s", "f64", "When it was scraped, Unix time: as of its row of engine.samples.", "s", required=True),
        Column("start_s", "f64", "Start of the engine process, Unix time: another value is a restart.", "s"),
        Column("metric", "text", "What is distributed.", required=True, choices=HISTOGRAMS),
        Column("bins", "bins", "Upper bound, cumulative count, ..., and the count of all.", required=True),
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
    parent: int | None = Field(None, ge=0, le=62, description="The GPU that this MIG instance is a part of.")
    mig_profile: str = Field("", max_length=100, description="MIG profile, e.g. 1g.10gb; empty for a whole GPU.")


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
