"""Windows per node and GPU type: what a node has, what is held of it, what is free, what that does. Pure."""

from __future__ import annotations

from typing import Any

import numpy as np

from models.node.gpus import GpuTable
from models.node.holdings import GPUS_MAX, Holdings
from models.windows import WINDOW_S

_SUMS = ("power_w_mean", "energy_j", "mem_used_bytes_max", "mem_total_bytes")
"""Summed over whole GPUs: what a MIG instance says of them is in its board's."""


def node_windows(table: GpuTable, holdings: Holdings, start_s: int) -> dict[str, Any]:
    """Columns of node.windows for the window at `start_s`; empty where no inventory names a GPU."""
    out: dict[str, list[Any]] = {}
    at_end = start_s + WINDOW_S
    row_of = table.rows()
    for name, node in holdings.nodes.items():
        groups: dict[str, list[int]] = {}
        for gpu, kind, _, _ in node["gpus"]:
            groups.setdefault(kind, []).append(row_of[node["code"] * GPUS_MAX + gpu])
        share = _shares(node)
        dropped = sum(entry[1] for entry in node["dropped"].values()) if node["dropped"] else None
        for kind, rows in groups.items():
            found = _row(table, rows, share, at_end)
            for column, value in {"node": name, "gpu_type": kind, **found, "dropped": dropped}.items():
                out.setdefault(column, []).append(value)
    return out


def _shares(node: dict[str, Any]) -> dict[int, float]:
    """GPU index -> its share of a board. A MIG instance has its share of the board's memory (an equal one where sizes
    are unknown), the board itself what its instances leave."""
    memory = {gpu: size for gpu, _, _, size in node["gpus"]}
    children: dict[int, list[int]] = {}
    for gpu, _, parent, _ in node["gpus"]:
        if parent is not None:
            children.setdefault(parent, []).append(gpu)
    share = {gpu: 1.0 for gpu, _, parent, _ in node["gpus"] if parent is None}
    for parent, instances in children.items():
        for gpu in instances:
            of, whole = memory[gpu], memory.get(parent)
            share[gpu] = min(1.0, of / whole) if of and whole else 1.0 / len(instances)
        if parent in share:
            share[parent] = max(0.0, 1.0 - sum(share[gpu] for gpu in instances))
    return share


def _row(table: GpuTable, rows: list[int], share: dict[int, float], at_end: float) -> dict[str, Any]:
    codes: list[int] = table.code[rows].tolist()
    weight = np.array([share[code % GPUS_MAX] for code in codes])
    part = ~np.isnan(table.columns["parent"][rows])
    on = [[use for use in table.uses.get(code, ()) if use.from_s < at_end <= use.to_s] for code in codes]
    held = np.array([min(1.0, sum(use.share for use in uses if use.billed)) for uses in on])
    status, samples = table.columns["status"][rows], table.columns["samples"][rows]
    empty = np.array([not uses for uses in on], bool)
    whole = ~part & (weight == 1.0)
    answers = (samples > 0) & ~(status > 0)
    idle_s = np.minimum(table.columns["idle_s"][rows], table.columns["allocated_s"][rows])
    gone = table.columns.get("mem_gone_bytes")
    return {
        "gpus": float(weight.sum()),
        "gpus_allocated": float((held * weight).sum()),
        "gpus_free": float((whole & empty & answers).sum()),
        "gpus_lost": float((weight * (status > 0)).sum()),
        "replicas": len({use.replica for uses in on for use in uses}),
        "util_gpu_pct_mean": _mean(table.columns["util_gpu_pct_mean"][rows]),
        "sm_active_ratio_mean": _mean(table.columns["sm_active_ratio_mean"][rows]),
        "idle_s": _sum(idle_s * weight),
        **{name: _sum(table.columns[name][rows][~part]) for name in _SUMS},
        "mem_gone_bytes": None if gone is None else _sum(gone[rows]),
    }


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def _sum(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.sum()) if len(known) else None
