"""Nodes with GPUs, and which replica lies on which: so many GPUs of one node, a share of each.

Packs: the fullest node that fits, its fullest GPUs first, so that co-located pools meet and nodes stay free.
"""

from __future__ import annotations

from typing import NamedTuple

EPSILON = 1e-9  # shares are decimal fractions: 0.75 + 0.25 must fill a GPU


class Slot(NamedTuple):
    """Where a replica lies."""

    node: int
    """Index into `Cluster.nodes`."""
    gpus: tuple[int, ...]
    """Indices on the node."""
    share: float
    """Of each of these GPUs."""


class Node:
    """A host: name, GPU type, and what is free of each GPU (1.0 = all of it)."""

    __slots__ = ("free", "gpu_type", "name")

    def __init__(self, name: str, gpu_type: str, gpus: int) -> None:
        self.name = name
        self.gpu_type = gpu_type
        self.free = [1.0] * gpus


class Cluster:
    """All nodes of a fleet."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes

    def take(self, gpu_type: str, count: int, share: float) -> Slot | None:
        """Takes `share` of `count` GPUs of one node; None where none has them."""
        best: tuple[float, int, list[int]] | None = None
        for index, node in enumerate(self.nodes):
            if node.gpu_type != gpu_type:
                continue
            fits = [gpu for gpu, free in enumerate(node.free) if free >= share - EPSILON]
            if len(fits) < count:
                continue
            fits.sort(key=lambda gpu: node.free[gpu])
            chosen = fits[:count]
            # least room left on the chosen GPUs, then on the node
            rank = sum(node.free[gpu] for gpu in chosen) * 1000 + sum(node.free)
            if best is None or rank < best[0] - EPSILON:
                best = (rank, index, chosen)
        if best is None:
            return None
        _, index, chosen = best
        for gpu in chosen:
            self.nodes[index].free[gpu] -= share
        return Slot(index, tuple(sorted(chosen)), share)

    def give(self, slot: Slot) -> None:
        """Gives a slot back."""
        free = self.nodes[slot.node].free
        for gpu in slot.gpus:
            free[gpu] = min(1.0, free[gpu] + slot.share)
            assert free[gpu] >= -EPSILON

    def free_gpus(self, gpu_type: str) -> int:
        """GPUs of a type that nobody uses at all."""
        return sum(free >= 1 - EPSILON for n in self.nodes if n.gpu_type == gpu_type for free in n.free)
