"""Who is on a node, by what is scraped there: for nodes on which no NVML exporter says it."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Collection, Sequence

from exporters.edge import Edge
from exporters.engine_slot import Slot
from exporters.planned import Read
from schemas.node import GpuEntry, NodeInventory, ReplicaEntry, ReplicaState
from schemas.topics import NODE_SAMPLES, ce_type

LOOK_S = 1.0
REPEAT_S = 30.0
"""An inventory is sent on a change, and again after so long (wall time)."""
FORGET_S = 300.0
"""GPUs that dcgm-exporter no longer speaks of are forgotten after so long."""
TYPE_UNKNOWN = "unknown"
GPUS_MAX = 1024
HELD_MAX = 64
"""GPUs of one replica on a node."""


class Inventory:
    """Inventories of nodes, from targets that name their node and pool.

    A replica holds the GPUs that dcgm-exporter says its pod holds; else as many as its label `gpus` says, of those on
    the node that no other target has. It is starting until it first answers, ready while it does, then failed.
    """

    def __init__(self, edge: Edge, cluster: str) -> None:
        self.edge, self.cluster = edge, cluster
        self._gpus: dict[str, dict[int, GpuEntry]] = {}
        self._pods: dict[str, dict[str, list[int]]] = {}
        """Node -> Kubernetes pod -> GPUs that it holds."""
        self._held: dict[str, dict[str, list[int]]] = {}
        """Node -> replica -> GPUs that it was given."""
        self._states: dict[str, tuple[ReplicaState, float]] = {}
        self._sent: dict[str, tuple[NodeInventory, float]] = {}
        self._seen_at: dict[str, float] = {}
        """Node -> when dcgm-exporter last spoke of it, monotonic, s."""

    async def run(self, slots: Callable[[], Collection[Slot]]) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.publish(slots(), time.monotonic())

    def seen(self, slot: Slot, reads: Sequence[Read], now: float) -> None:
        """Takes the GPUs that a page names. `now`: monotonic, s."""
        found: dict[str, dict[int, GpuEntry]] = {}
        pods: dict[str, dict[str, list[int]]] = {}
        for read in reads:
            gpu, node = read.plan.gpu, slot.node_of(read.plan)
            if gpu is not None:
                found.setdefault(node, {})[gpu.gpu] = gpu
                held = pods.setdefault(node, {})
                if read.plan.pod and len(held.get(read.plan.pod, ())) < HELD_MAX:
                    held.setdefault(read.plan.pod, []).append(gpu.gpu)
        self._gpus.update(found)
        self._pods.update(pods)
        self._seen_at.update(dict.fromkeys(found, now))

    def publish(self, slots: Collection[Slot], now: float) -> None:
        """Sends the inventory of each node that has changed or is due. `now`: monotonic, s."""
        for node in [node for node, at in self._seen_at.items() if now - at > FORGET_S]:
            del self._seen_at[node], self._gpus[node], self._pods[node]
        by_node: dict[str, list[Slot]] = {node: [] for node in (*self._sent, *self._gpus)}
        for slot in slots:
            by_node.setdefault(slot.node, []).append(slot)
        by_node.pop("-", None)
        for node, there in by_node.items():
            found = self._inventory(node, there)
            before, at = self._sent.get(node, (None, 0.0))
            same = before is not None and before.model_copy(update={"at_s": found.at_s}) == found
            if (same and now - at < REPEAT_S) or (before is None and not found.replicas and not found.gpus):
                continue
            self._sent[node] = (found, now)
            if not found.replicas and not found.gpus:  # said once, then the node is forgotten
                del self._sent[node], self._held[node]
            _, id = self.edge.next_batch()
            self.edge.producer.send(NODE_SAMPLES, node, found.encode(), type=ce_type(NodeInventory.kind), id=id)
        here = {replica for slot in slots for replica in _replicas(slot)}
        self._states = {replica: state for replica, state in self._states.items() if replica in here}

    def _inventory(self, node: str, slots: Sequence[Slot]) -> NodeInventory:
        at_s = self.edge.at_s()
        gpus = dict(self._gpus.get(node, {}))
        serving = [slot for slot in slots if slot.target.pool is not None and not slot.is_gpu]
        held = self._held[node] = self._assigned(node, serving)
        replicas = []
        for slot in serving:
            for gpu in held[slot.target.replica]:
                gpus.setdefault(gpu, GpuEntry(gpu=gpu, gpu_type=slot.target.gpu_type or TYPE_UNKNOWN))
            replicas += [self._entry(slot, name, held[slot.target.replica], at_s) for name in _replicas(slot)]
        entries = [gpus[index] for index in sorted(gpus)]
        return NodeInventory(node=node, cluster=self.cluster, at_s=at_s, gpus=entries, replicas=replicas[:GPUS_MAX])

    def _assigned(self, node: str, slots: Sequence[Slot]) -> dict[str, list[int]]:
        """Replica of a target -> its GPUs: those of its pod, those that it had, or free ones in their order.

        Where dcgm-exporter says which GPUs there are, no others are made up: then there may be too few.
        """
        known, pods = self._gpus.get(node, {}), self._pods.get(node, {})
        found = {slot.target.replica: pods[slot.target.pod] for slot in slots if slot.target.pod in pods}
        taken = {gpu for held in pods.values() for gpu in held}
        there = [index for index, gpu in sorted(known.items()) if gpu.parent is None] or range(GPUS_MAX)
        others = [slot.target for slot in slots if slot.target.replica not in found]
        for target in others:
            before = self._held.get(node, {}).get(target.replica, [])
            if len(before) == (target.gpus or 0) and taken.isdisjoint(before) and set(before) <= set(there):
                found[target.replica] = before
                taken.update(before)
        for target in others:
            if target.replica not in found:
                free = (index for index in there if index not in taken)
                found[target.replica] = list(itertools.islice(free, target.gpus or 0))
                taken.update(found[target.replica])
        return found

    def _entry(self, slot: Slot, replica: str, gpus: list[int], at_s: float) -> ReplicaEntry:
        state: ReplicaState = "starting" if slot.since_s is None else "failed" if slot.dead else "ready"
        before = self._states.get(replica)
        since = before[1] if before is not None and before[0] == state else at_s
        self._states[replica] = state, since
        share = 1.0 / len(_replicas(slot))
        assert slot.target.pool is not None
        return ReplicaEntry(
            replica=replica, pool=slot.target.pool, gpus=gpus, gpu_share=share, state=state, since_s=since
        )


def _replicas(slot: Slot) -> list[str]:
    return slot.replicas or [slot.target.replica]
