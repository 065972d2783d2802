"""What exporters would read on a simulated node: GPU columns, engine columns, inventory. No Kafka, no clock.

GPU figures follow from what the engines did since the last reading: a prefill is bound by compute, a decode by
memory. They have the shape that matters (utilisation stays high while little is done, power and tensor activity do
not); they are no measurement of a GPU. What the model has no figure for stays null.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from schemas.node import GpuEntry, NodeInventory, ReplicaEntry
from simulator.events import ReplicaEvent
from simulator.fleet import Fleet
from simulator.pool import Replica

SW_THERMAL_SLOWDOWN, HW_THERMAL_SLOWDOWN = 0x20, 0x40  # NVML clocks event reasons
FAILED_SHOWN_S = 60.0
"""A dead replica stays in the inventory as `failed` for so long."""
MEMORY_SHARE = 0.9
"""Of its share of the memory, an engine allocates this much (vLLM's default)."""


class NodeTelemetry:
    """The exporters of one node. `read` at rising times to which the fleet is advanced."""

    def __init__(self, fleet: Fleet, index: int, base_s: float) -> None:
        """`base_s`: Unix time of fleet time 0."""
        node = fleet.cluster.nodes[index]
        self.name = node.name
        self._fleet, self._index, self._base_s = fleet, index, base_s
        self._gpus = len(node.free)
        self._type_name = node.gpu_type
        self._type = fleet.scenario.gpus[node.gpu_type]
        self._read_s = fleet.now_s
        self._seen: dict[str, tuple[int, float]] = {}  # replica -> prompt tokens and busy seconds at the last reading
        self._energy_j = np.zeros(self._gpus)
        self._throttled_ns = np.zeros(self._gpus)
        self._failed: list[tuple[float, ReplicaEntry]] = []

    def read(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Columns of `gpu.samples` and of `engine.samples` now; the latter are empty without a serving replica."""
        fleet, now_s = self._fleet, self._fleet.now_s
        passed_s = max(now_s - self._read_s, 1e-9)
        self._read_s = now_s
        compute, memory, busy, used = (np.zeros(self._gpus) for _ in range(4))
        slowed = np.ones(self._gpus)
        rows: list[tuple[Any, ...]] = []
        seen: dict[str, tuple[int, float]] = {}
        for replica in fleet.on_node[self._index]:
            gpus = list(replica.slot.gpus)
            used[gpus] += replica.slot.share * MEMORY_SHARE * _loaded(replica, now_s)
            if replica.state == "starting":
                continue
            view = replica.engine.view(now_s)
            prompt, busy_s = self._seen.get(replica.name, (0, 0.0))
            seen[replica.name] = (view.prompt_tokens, view.busy_s)
            active = min(1.0, max(0.0, (view.busy_s - busy_s) / passed_s))
            reading_s = replica.engine.spec.p1_ms * (view.prompt_tokens - prompt) * 1e-6 * replica.engine.slow
            prefill = min(active, reading_s / passed_s)
            decode = active - prefill
            fill = view.running / replica.engine.spec.seqs_max
            compute[gpus] += 0.9 * prefill + (0.1 + 0.4 * fill) * decode
            memory[gpus] += 0.3 * prefill + (0.6 + 0.3 * view.kv_usage) * decode
            busy[gpus] = np.maximum(busy[gpus], active)
            slowed[gpus] = np.maximum(slowed[gpus], replica.fault_slow)
            rows.append((replica.name, self._base_s + replica.ready_s, *view[:3], *view[3:8], *view[9:]))
        self._seen = seen
        gpu = self._gpu_columns(
            np.minimum(compute, 1.0), np.minimum(memory, 1.0), np.minimum(busy, 1.0), used, slowed, passed_s
        )
        return gpu, self._engine_columns(rows)

    def _gpu_columns(
        self,
        compute: np.ndarray,
        memory: np.ndarray,
        busy: np.ndarray,
        used: np.ndarray,
        slowed: np.ndarray,
        passed_s: float,
    ) -> dict[str, Any]:
        kind, n = self._type, self._gpus
        drawn = kind.power_idle_w + (kind.power_max_w - kind.power_idle_w) * np.minimum(
            0.7 * compute + 0.35 * memory, 1.0
        )
        power_w = drawn / slowed
        hot = slowed > 1
        self._energy_j += power_w * passed_s
        self._throttled_ns += np.where(hot, passed_s * 1e9, 0.0)
        return {
            "gpu": np.arange(n),
            "at_s": np.full(n, self._base_s + self._read_s),
            "status": ["ok"] * n,
            "util_gpu_pct": 100 * busy,
            "util_mem_pct": 60 * memory,
            "sm_active_ratio": np.minimum(1.0, compute + 0.25 * busy),
            "tensor_active_ratio": 0.7 * compute,
            "dram_active_ratio": memory,
            "mem_used_bytes": np.minimum(used, 1.0) * kind.mem_total_bytes,
            "mem_total_bytes": np.full(n, kind.mem_total_bytes),
            "power_w": power_w,
            "energy_j": self._energy_j.copy(),
            "temp_c": np.where(hot, 90.0, 32 + 45 * power_w / kind.power_max_w),
            "sm_clock_mhz": kind.sm_clock_mhz / slowed,
            "sm_clock_max_mhz": np.full(n, kind.sm_clock_mhz),
            "throttle_mask": np.where(hot, SW_THERMAL_SLOWDOWN | HW_THERMAL_SLOWDOWN, 0),
            "throttle_power_ns": np.zeros(n),
            "throttle_thermal_ns": self._throttled_ns.copy(),
        }

    def _engine_columns(self, rows: list[tuple[Any, ...]]) -> dict[str, Any]:
        if not rows:
            return {}
        names = (
            "replica", "start_s", "running", "waiting", "kv_usage_ratio", "prompt_tokens", "generation_tokens",
            "requests", "preemptions", "iterations", "ttft_s_sum", "ttft_count", "tpot_s_sum", "tpot_count",
            "e2e_s_sum", "e2e_count", "queue_s_sum", "queue_count",
        )  # fmt: skip
        columns: dict[str, Any] = {
            name: list(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)
        }
        columns["at_s"] = [self._base_s + self._read_s] * len(rows)
        columns["status"] = ["ok"] * len(rows)
        columns["cached_tokens"] = [0.0] * len(rows)  # the engines have no prefix cache: a measured zero
        return columns

    def failed(self, event: ReplicaEvent) -> None:
        """A replica of this node died."""
        entry = ReplicaEntry(
            replica=event.replica,
            pool=event.pool,
            gpus=list(event.slot.gpus),
            gpu_share=event.slot.share,
            state="failed",
            billed=False,
            since_s=self._base_s + event.at_s,
        )
        self._failed.append((event.at_s + FAILED_SHOWN_S, entry))

    def inventory(self) -> NodeInventory:
        """Who is who on the node now."""
        now_s = self._fleet.now_s
        self._failed = [item for item in self._failed if item[0] > now_s]
        return NodeInventory(
            node=self.name,
            cluster=self._fleet.scenario.cluster,
            at_s=self._base_s + now_s,
            gpus=[
                GpuEntry(
                    gpu=i,
                    uuid=f"GPU-{self.name}-{i}",
                    gpu_type=self._type_name,
                    mem_total_bytes=self._type.mem_total_bytes,
                )
                for i in range(self._gpus)
            ],
            replicas=[self._entry(r) for r in self._fleet.on_node[self._index]] + [e for _, e in self._failed],
        )

    def _entry(self, replica: Replica) -> ReplicaEntry:
        return ReplicaEntry.model_validate(
            {
                "replica": replica.name,
                "pool": replica.pool,
                "gpus": replica.slot.gpus,
                "gpu_share": replica.slot.share,
                "state": replica.state,
                "since_s": self._base_s + replica.since_s,
            }
        )


def _loaded(replica: Replica, now_s: float) -> float:
    """Share of its memory that a replica has allocated: weights come in while it starts."""
    if replica.state != "starting":
        return 1.0
    return min(1.0, (now_s - replica.allocated_s) / max(replica.ready_s - replica.allocated_s, 1e-9))
