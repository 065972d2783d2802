"""What exporters would read on a simulated node: GPU columns, engine columns, inventory. No Kafka, no clock.

GPU figures follow from what the engines did since the last reading: a prefill is bound by compute, a decode by
memory. They have the shape that matters (utilisation stays high while little is done, power and tensor activity do
not); they are no measurement of a GPU. What the model has no figure for stays null.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import numpy as np

from schemas.node import GpuEntry, NodeInventory, ReplicaEntry
from simulator.engine import TPOT_BOUNDS_S, TTFT_BOUNDS_S
from simulator.events import ReplicaEvent
from simulator.fleet import Fleet
from simulator.pool import Replica
from simulator.request import EngineView

SW_THERMAL_SLOWDOWN, HW_THERMAL_SLOWDOWN = 0x20, 0x40  # NVML clocks event reasons
FAILED_SHOWN_S = 60.0
"""A dead replica stays in the inventory as `failed` for so long."""
MEMORY_SHARE = 0.9
"""Of its share of the memory, an engine allocates this much (vLLM's default)."""
ENGINE = "simulator"
PID_FIRST = 1000


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
        self._scrapes: dict[str, tuple[int, float]] = {}  # replica -> number and time of its last scrape
        self._pids: dict[str, int] = {}
        self._pid_next = PID_FIRST
        self._taken: dict[str, np.ndarray] = {}  # replica -> SM seconds, memory seconds, seconds since the last reading

    def read(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Columns of `gpu.samples` and of `engine.samples` now; the latter are empty without a serving replica."""
        fleet, now_s = self._fleet, self._fleet.now_s
        passed_s = max(now_s - self._read_s, 1e-9)
        self._read_s = now_s
        compute, memory, busy, used = (np.zeros(self._gpus) for _ in range(4))
        slowed = np.ones(self._gpus)
        rows: list[dict[str, Any]] = []
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
            own = 0.9 * prefill + (0.1 + 0.4 * fill) * decode
            read = 0.3 * prefill + (0.6 + 0.3 * view.kv_usage) * decode
            compute[gpus] += own
            memory[gpus] += read
            spent = np.array([min(1.0, own + 0.25 * active) * passed_s, read * passed_s, passed_s])
            self._taken[replica.name] = self._taken.get(replica.name, 0.0) + spent
            busy[gpus] = np.maximum(busy[gpus], active)
            slowed[gpus] = np.maximum(slowed[gpus], replica.fault_slow)
            rows.append(self._scraped(replica, view))
        self._seen = seen
        self._scrapes = {name: scrape for name, scrape in self._scrapes.items() if name in seen}
        gpu = self._gpu_columns(
            np.minimum(compute, 1.0), np.minimum(memory, 1.0), np.minimum(busy, 1.0), used, slowed, passed_s
        )
        return gpu, {name: [row[name] for row in rows] for name in rows[0]} if rows else {}

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

    def _scraped(self, replica: Replica, view: EngineView) -> dict[str, Any]:
        """One row of `engine.samples`."""
        at_s = self._base_s + self._read_s
        number, since_s = self._scrapes.get(replica.name, (0, None))
        self._scrapes[replica.name] = (number + 1, at_s)
        counters = view._asdict()
        spec = replica.engine.spec
        return {
            "replica": replica.name,
            "at_s": at_s,
            "engine": ENGINE,
            "pool": replica.pool,
            "model": self._fleet.pools[replica.pool].spec.model,
            "scrape": number + 1,
            "since_s": since_s,
            "start_s": self._base_s + replica.ready_s,
            "status": "ok",
            "kv_usage_ratio": counters.pop("kv_usage"),
            "kv_capacity_tokens": float(spec.kv_tokens_max),
            "running_max": float(spec.seqs_max),
            "cached_tokens": 0.0,  # the engines have no prefix cache: a measured zero
            **counters,
        }

    def histograms(self) -> dict[str, Any]:
        """Columns of `engine.histograms` as of the last `read`; empty without a serving replica."""
        rows = []
        for replica in self._fleet.on_node[self._index]:
            if replica.name not in self._scrapes:
                continue
            engine = replica.engine
            start_s = self._base_s + replica.ready_s
            for metric, bounds, counts in (
                ("ttft_s", TTFT_BOUNDS_S, engine.ttft_buckets),
                ("tpot_s", TPOT_BOUNDS_S, engine.tpot_buckets),
            ):
                up_to = list(accumulate(counts))
                bins = [float(x) for pair in zip(bounds, up_to[:-1], strict=True) for x in pair] + [float(up_to[-1])]
                rows.append((replica.name, self._base_s + self._read_s, start_s, metric, bins))
        names = ("replica", "at_s", "start_s", "metric", "bins")
        return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)) if rows else {}

    def processes(self) -> dict[str, Any]:
        """Columns of `process.samples` as of the last `read`, one process a replica and GPU; empty without a replica.

        What it took of SMs and memory since the call before. Host CPU and what runs beside engines are not modelled.
        """
        rows = []
        here = self._fleet.on_node[self._index]
        for replica in here:
            if replica.name not in self._pids:
                self._pids[replica.name] = self._pid_next
                self._pid_next += len(replica.slot.gpus)
            sm_s, memory_s, passed_s = self._taken.get(replica.name, (0.0, 0.0, 1.0))
            held = replica.slot.share * MEMORY_SHARE * _loaded(replica, self._read_s) * self._type.mem_total_bytes
            for rank, gpu in enumerate(replica.slot.gpus):
                shares = (100 * min(1.0, sm_s / passed_s), 100 * min(1.0, memory_s / passed_s))
                pid = self._pids[replica.name] + rank
                rows.append((gpu, self._base_s + self._read_s, pid, ENGINE, replica.name, 0, held, *shares))
        self._taken = {}
        self._pids = {replica.name: self._pids[replica.name] for replica in here}
        names = ("gpu", "at_s", "pid", "name", "replica", "gone", "mem_bytes", "sm_util_pct", "mem_util_pct")
        return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)) if rows else {}

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
