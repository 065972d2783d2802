"""Who shares a GPU or a host with a replica in a window, and how much of it each takes. Pure.

The pressure of a neighbour is the largest of its shares of SM time and memory time, on the GPUs that it shares with the
replica, and of the host's CPUs: 0..1, measured per process (models.node.processes). Where its processes are not seen,
a replica is taken to press as much as its engine is busy; where that is unknown too, only its presence is known: 1, and
said to be ungraded. Instances of a MIG GPU are isolated from each other: only what is on the same instance is near.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from models.node.engines import EngineTable
from models.node.holdings import GPUS_MAX, Holdings
from models.node.interference import Neighbour
from models.node.processes import ProcessTable

CPU_SHARE_MIN = 0.05
"""A tenant of the same host that takes less of its CPUs is no neighbour on that account."""


class _Tenant(NamedTuple):
    """What runs on a node: a replica, or a process that is part of none."""

    name: str
    pool: str
    on: dict[int, list[float]]
    """GPU code -> pressures measured there; empty where only presence is known."""
    cpu: dict[int, float]
    """pid -> share of the host's CPUs."""
    busy: float
    """How busy its engine is, 0..1; NaN = unknown."""


def neighbours(
    table: EngineTable, holdings: Holdings, processes: ProcessTable | None, most: int
) -> tuple[list[list[Neighbour]], int]:
    """By row of `table`: its neighbours, those with the greatest pressure first, at most `most`; and how many were
    left out."""
    tenants = _tenants(table, holdings, processes)
    by_gpu: dict[int, list[str]] = {}
    by_node: dict[int, list[str]] = {}
    for key, tenant in tenants.items():
        for gpu in tenant.on:
            by_gpu.setdefault(gpu, []).append(key)
        if sum(tenant.cpu.values()) >= CPU_SHARE_MIN:
            by_node.setdefault(int(key.partition("/")[0]), []).append(key)
    found, left_out = [], 0
    for row in range(len(table.held.pool)):
        gpus, node, own = _gpus(table, holdings, row), _node(table, holdings, row), table.columns["replica"][row]
        near = dict.fromkeys(key for gpu in gpus for key in by_gpu.get(gpu, ()))
        near |= dict.fromkeys(by_node.get(node, ()))
        all_of = [_neighbour(tenants[key], gpus) for key in near if tenants[key].name != own]
        all_of.sort(key=lambda n: (-(n.pressure or 0.0), n.name))
        left_out += max(0, len(all_of) - most)
        found.append(all_of[:most])
    return found, left_out


def busy_ratio(table: EngineTable) -> np.ndarray:
    """float64 [N]: share of the time that each engine was busy: with a step under way, where it counts that; else how
    full its batch was."""
    with np.errstate(invalid="ignore", divide="ignore"):
        busy = table.number("busy_s") / table.number("covered_s")
        full = table.number("running_mean") / table.number("running_max")
    return np.clip(np.where(np.isfinite(busy), busy, np.where(np.isfinite(full), full, np.nan)), 0.0, 1.0)


def _node(table: EngineTable, holdings: Holdings, row: int) -> int:
    node = holdings.nodes.get(table.columns["node"][row])
    return -1 if node is None else int(node["code"])


def _gpus(table: EngineTable, holdings: Holdings, row: int) -> list[int]:
    segment = int(table.held.segment[row])
    return holdings.segment_gpus[segment] if segment >= 0 and table.held.last[row] else []


def _tenants(table: EngineTable, holdings: Holdings, processes: ProcessTable | None) -> dict[str, _Tenant]:
    """`node code/name` -> tenant."""
    found: dict[str, _Tenant] = {}
    busy = busy_ratio(table).tolist()
    for row, name in enumerate(table.columns.get("replica", ())):
        if table.held.last[row] and table.columns["state"][row] not in ("failed", "asleep"):
            on: dict[int, list[float]] = {gpu: [] for gpu in _gpus(table, holdings, row)}
            pool = holdings.pool_names[int(table.held.pool[row])]
            found[f"{_node(table, holdings, row)}/{name}"] = _Tenant(name, pool, on, {}, busy[row])
    if processes is None:
        return found
    shares = zip(processes.sm.tolist(), processes.memory.tolist(), processes.cpu.tolist(), strict=True)
    for i, (sm, memory, cpu) in enumerate(shares):
        gpu, pid, replica = int(processes.gpu[i]), int(processes.pid[i]), processes.replica[i]
        if processes.gone[i]:
            continue
        name = replica or f"{pid}/{processes.name[i] or '?'}"
        key = f"{gpu // GPUS_MAX}/{name}"
        tenant = found.get(key)
        if tenant is None:
            tenant = found[key] = _Tenant(name, "", {}, {}, math.nan)
        known = [share for share in (sm, memory) if share == share]
        measured = tenant.on.setdefault(gpu, [])
        if known and measured:  # several of its processes on one GPU add up
            measured[:] = [min(1.0, measured[0] + max(known))]
        elif known:
            measured.append(max(known))
        if cpu == cpu:
            tenant.cpu[pid] = cpu
    return found


def _neighbour(tenant: _Tenant, gpus: list[int]) -> Neighbour:
    shared = [gpu for gpu in gpus if gpu in tenant.on]
    measured = [share for gpu in shared for share in tenant.on[gpu]]
    if tenant.cpu:
        measured.append(min(1.0, sum(tenant.cpu.values())))
    graded_on_gpu = any(tenant.on[gpu] for gpu in shared)
    if shared and not graded_on_gpu:
        # of what it does on the GPU only the engine, or nothing, tells
        if tenant.busy == tenant.busy:
            measured.append(tenant.busy)
        else:
            return Neighbour(tenant.name, tenant.pool, 1.0, False)
    return Neighbour(tenant.name, tenant.pool, max(measured), True)
