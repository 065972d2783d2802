"""A window that has closed: what its GPUs, processes, engines and neighbours say together.

Early looks at open windows have none of this: it is worth its cost once a window.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from models.node.engines import EngineTable
from models.node.gpus import GpuTable
from models.node.histograms import Histograms
from models.node.holdings import Holdings, Use
from models.node.interference import Neighbour, Observed
from models.node.processes import ProcessTable
from schemas.config import LimitsSpec

_MEANS = ("sm_active_ratio_mean", "dram_active_ratio_mean", "sm_clock_ratio_mean")
_SHARED = ("power_w_mean", "energy_j")


def joined(
    table: EngineTable,
    gpus: GpuTable,
    histograms: Histograms,
    processes: ProcessTable | None,
    holdings: Holdings,
    start_s: int,
    limits: LimitsSpec,
) -> EngineTable:
    """Rows of replicas with what their GPUs did and how their latencies are distributed."""
    if not len(table.held.pool):
        return table
    columns: dict[str, Any] = {**_on_gpus(table, gpus, holdings, _sm_by_replica(processes))}
    own = np.where(table.held.last, table.held.replica, -1)
    columns |= histograms.columns(own, start_s, limits.sample_gap_s, limits.grace_node_s)
    known = {name: c for name, c in columns.items() if isinstance(c, list) or not np.isnan(c).all()}
    return table._replace(columns={**table.columns, **known})


def _sm_by_replica(processes: ProcessTable | None) -> dict[tuple[int, str], float]:
    """(GPU code, replica) -> SM share that its processes took; unknown ones are left out."""
    found: dict[tuple[int, str], float] = {}
    if processes is not None:
        for gpu, replica, sm in zip(processes.gpu.tolist(), processes.replica, processes.sm.tolist(), strict=True):
            if replica is not None and sm == sm:
                found[gpu, replica] = found.get((gpu, replica), 0.0) + sm
    return found


def _on_gpus(
    table: EngineTable, gpus: GpuTable, holdings: Holdings, sm: dict[tuple[int, str], float]
) -> dict[str, np.ndarray]:
    """What a replica's GPUs did: means over them, its share of their power and energy, the longest throttling."""
    row_of = gpus.rows()
    size = len(table.held.pool)
    pairs: list[tuple[int, int, float]] = []
    for row, (segment, replica) in enumerate(
        zip(table.held.segment.tolist(), table.held.replica.tolist(), strict=True)
    ):
        for code in holdings.segment_gpus[segment] if segment >= 0 else ():
            if code in row_of:
                share = _share(replica, gpus.uses.get(code, []), code, holdings, sm)
                pairs.append((row, row_of[code], share))
    if not pairs:
        return {}
    rows, on, shares = np.array(pairs).T
    rows, on = rows.astype(np.int64), on.astype(np.int64)
    out = {}
    with np.errstate(invalid="ignore"):
        for name in _MEANS:
            total, count = _added(rows, gpus.columns[name][on], size)
            out[name] = total / count
        for name in _SHARED:
            total, count = _added(rows, gpus.columns[name][on] * shares, size)
            out[name] = np.where(count > 0, total, np.nan)
    out["throttled_s"] = np.full(size, np.nan)
    np.fmax.at(out["throttled_s"], rows, gpus.columns["throttled_s"][on])
    return out


def _added(rows: np.ndarray, values: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the known values by row, and how many are known."""
    known = ~np.isnan(values)
    return np.bincount(rows[known], values[known], size), np.bincount(rows[known], minlength=size)


def _share(replica: int, uses: list[Use], gpu: int, holdings: Holdings, sm: dict[tuple[int, str], float]) -> float:
    """Share of a GPU's power that is a replica's: all of it where it is alone; of a shared GPU by the SM time of the
    processes where that is known of all who share it, else by the share that is billed; never more than all."""
    billed: dict[int, float] = {}
    for use in uses:
        billed[use.replica] = use.share  # by time: its latest
    if list(billed) == [replica]:
        return 1.0
    known = [sm.get((gpu, holdings.replica_names[code][0]), math.nan) for code in billed]
    total = sum(known)
    if total > 0:  # not NaN
        return known[list(billed).index(replica)] / total if replica in billed else 0.0
    return billed.get(replica, 0.0) / max(1.0, sum(billed.values()))


def observed(table: EngineTable, holdings: Holdings, near: list[list[Neighbour]]) -> list[Observed]:
    """What interference is looked for in: a row per replica whose engine said anything. `near`: neighbours by row."""
    number = table.number
    covered = number("covered_s") if len(table.held.pool) else np.zeros(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        prefill = np.maximum(number("prompt_tokens") - np.nan_to_num(number("cached_tokens")), 0.0)
        itl = number("itl_s_sum") / number("itl_count")
        tpot = number("tpot_s_sum") / number("tpot_count")
        paced = number("running_mean") * covered / number("generation_tokens")
        tpot = np.where(np.isfinite(itl), itl, np.where(np.isfinite(tpot), tpot, paced))
        preempted = number("preemptions") / covered
        kv = number("kv_usage_ratio_mean") * number("kv_capacity_tokens")
        taken = number("generation_tokens") / (number("iterations") * number("running_mean"))
    speculates = number("draft_tokens") > 0
    accepted = np.where(speculates & np.isfinite(taken), np.maximum(taken, 1.0), 1.0)
    tokens, steps, running = number("generation_tokens"), number("iterations"), number("running_mean")
    clock, resets = number("sm_clock_ratio_mean"), number("resets")
    found = []
    for row in np.flatnonzero(covered > 0).tolist():
        name, node = table.columns["replica"][row], table.columns["node"][row]
        found.append(
            Observed(
                key=f"{node}/{name}",
                replica=name,
                pool=holdings.pool_names[int(table.held.pool[row])],
                node=node,
                covered_s=float(covered[row]),
                steps=_known(steps[row]),
                tokens=float(tokens[row]),
                running=_known(running[row]),
                kv_tokens=_known(kv[row]),
                prefill_tokens=_known(prefill[row]),
                tpot_s=_known(tpot[row]),
                clock_ratio=_known(clock[row]),
                preemptions_per_s=_known(preempted[row]),
                accepted=float(accepted[row]),
                restarted=bool(resets[row] > 0),
                neighbours=near[row],
                hardware=table.columns["gpu_type"][row] or "",
            )
        )
    return found


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
