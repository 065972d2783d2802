"""Windows per GPU: utilisation, power, energy, throttling, and whether anybody pays for it. Pure.

Counters that fall have begun anew (the driver was loaded again) and count from zero. That is assumed of the PCIe bytes
too: NVML's fields for them wrap at 32 bits within a second at full speed, which nobody can take a difference over, so
an exporter sends them as a 64-bit sum that it keeps itself, or not at all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from models.node.holdings import GPUS_MAX, STATES, Holdings, Use
from models.node.processes import ProcessTable
from models.node.samples import Series, around
from models.node.weighing import count, growth, held_s, largest, latest, latest_of, mean, weights, within
from models.windows import WINDOW_S

MEANS = (
    "util_gpu_pct", "util_mem_pct", "sm_active_ratio", "sm_occupancy_ratio", "dram_active_ratio", "tensor_active_ratio",
    "power_w", "sm_clock_ratio",
)  # fmt: skip
LATEST = ("power_limit_w", "remap_pending", "remap_failed")
LARGEST = ("mem_used_bytes", "power_w", "temp_c")
THROTTLES = ("throttle_power_ns", "throttle_thermal_ns", "throttle_brake_ns")
COUNTERS = (
    "energy_j", *THROTTLES, "pcie_tx_bytes", "pcie_rx_bytes", "nvlink_tx_bytes", "nvlink_rx_bytes", "ecc_uncorrected",
)  # fmt: skip
COLUMNS = (
    "status", "parent", *MEANS, *LATEST, "mem_used_bytes", "mem_total_bytes", "temp_c", "xid", "xid_at_s", *COUNTERS,
)  # fmt: skip
"""What is kept of a sample; status: 0 ok, 1 lost, NaN unknown; sm_clock_ratio is of the two clocks."""
AT = {name: index for index, name in enumerate(COLUMNS)}
STATUS = AT["status"]
STATUSES = ("ok", "lost")
UNUSED = "-"
"""Pool of the GPUs that no replica is on."""
SM_IDLE = 0.01
"""Below this share of active SM cycles a GPU does nothing."""
_COUNTERS = slice(len(COLUMNS) - len(COUNTERS), len(COLUMNS))
_SURE = ("samples", "covered_s", "allocated_s", "loading_s", "draining_s")
"""Columns that are zero, not unknown, where there is no sample near."""


class GpuTable(NamedTuple):
    """What a window says of GPUs. N rows, by code."""

    code: np.ndarray
    """int64 [N]."""
    kind: list[str | None]
    """Product name by the inventory, by row."""
    columns: dict[str, np.ndarray]
    """Numeric column of GPU_WINDOWS, and `status` as in COLUMNS -> float64 [N]."""
    uses: dict[int, list[Use]]
    """GPU code -> replicas on it in the window."""

    def rows(self) -> dict[int, int]:
        """GPU code -> row."""
        return {code: row for row, code in enumerate(self.code.tolist())}


def values_of(numbers: dict[str, np.ndarray], lost: np.ndarray) -> list[np.ndarray]:
    """A batch's columns as `COLUMNS` has them. `lost`: the status column."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = numbers["sm_clock_mhz"] / numbers["sm_clock_max_mhz"]
    made = {"status": lost, "sm_clock_ratio": np.where(np.isfinite(ratio), ratio, np.nan)}
    return [made[name] if name in made else numbers[name] for name in COLUMNS]


def gpu_table(
    series: Series, holdings: Holdings, start_s: int, now_s: float, gap_s: float, processes: ProcessTable | None
) -> GpuTable:
    """The window at `start_s`: a row per GPU that an inventory or a sample names. One of the inventory without samples
    has a row of nulls, so that silence shows."""
    end_s = start_s + WINDOW_S
    near = around(series, start_s, end_s, gap_s, STATUS)
    table = _table(near, start_s, end_s, now_s, gap_s)
    listed = {node["code"] * GPUS_MAX + entry[0]: entry for node in holdings.nodes.values() for entry in node["gpus"]}
    spoken = near.subjects[(table["samples"] > 0) | (table["covered_s"] > 0)]
    codes = np.unique(np.concatenate((spoken, np.array(list(listed), np.int64))))
    place = np.minimum(np.searchsorted(near.subjects, codes), max(len(near.subjects) - 1, 0))
    absent = np.ones(len(codes), bool) if not len(near.subjects) else near.subjects[place] != codes
    columns = {}
    for name, values in table.items():
        default = 0.0 if name in _SURE else np.nan
        columns[name] = np.where(absent, default, values[place] if len(values) else default)
    known: list[int] = codes.tolist()
    uses = holdings.uses(start_s, end_s)
    held = np.array([_held(uses.get(code, []), start_s, min(end_s, now_s)) for code in known], float).reshape(-1, 3)
    columns |= dict(zip(("allocated_s", "loading_s", "draining_s"), held.T, strict=True))
    parents = [listed[code][2] if code in listed else None for code in known]
    given = np.array([np.nan if p is None else p for p in parents], np.float64)
    columns["parent"] = np.where(np.isnan(given), columns["parent"], given)
    if processes is not None:
        columns["processes"], columns["mem_gone_bytes"] = _processes(codes, processes)
    return GpuTable(codes, [listed[code][1] if code in listed else None for code in known], columns, uses)


def by_pool(table: GpuTable, holdings: Holdings) -> dict[str, dict[str, Any]]:
    """Pool -> columns of gpu.windows. A GPU that replicas of two pools share is in both: its utilisation is one, and
    what each pool holds of it is in `gpus` of engine.windows."""
    rows: dict[str, list[int]] = {}
    for row, code in enumerate(table.code.tolist()):
        for pool in dict.fromkeys(use.pool for use in table.uses.get(code, ())) or (0,):
            rows.setdefault(holdings.pool_names.get(pool, UNUSED), []).append(row)
    known = {name: values for name, values in table.columns.items() if name != "status" and not np.isnan(values).all()}
    status = [None if s != s else STATUSES[int(s)] for s in table.columns["status"].tolist()]
    found = {}
    for pool_name, chosen in rows.items():
        of: list[int] = table.code[chosen].tolist()
        found[pool_name] = {
            "node": [holdings.node_names[code // GPUS_MAX] for code in of],
            "gpu": [code % GPUS_MAX for code in of],
            "gpu_type": [table.kind[row] for row in chosen],
            "status": [status[row] for row in chosen],
            **{name: values[chosen] for name, values in known.items()},
        }
    return found


def _table(near: Series, start_s: float, end_s: float, now_s: float, gap_s: float) -> dict[str, np.ndarray]:
    """Column -> float64 by subject of `near`."""
    inside = within(near, start_s, end_s)
    weight = weights(near, start_s, end_s, now_s, gap_s)
    lost = near.values[STATUS] > 0
    speaks = (inside | (weight > 0)) & ~lost
    weight = np.where(lost, 0.0, weight)
    util, sm = near.values[AT["util_gpu_pct"]], near.values[AT["sm_active_ratio"]]
    idle = ~(util > 0) & ~(sm >= SM_IDLE)
    xid_at = near.values[AT["xid_at_s"]]
    grown = dict(zip(COUNTERS, growth(near, _COUNTERS, start_s, end_s).total, strict=True))
    slowed = [grown[name] / 1e9 for name in THROTTLES]
    most = end_s - start_s
    return {
        "status": latest(near, STATUS, inside),
        "parent": latest(near, AT["parent"], near.at < end_s),
        "samples": count(near, inside).astype(np.float64),
        "covered_s": np.bincount(near.group, weight, len(near.subjects)),
        "idle_s": held_s(near, weight, ~(np.isnan(util) & np.isnan(sm)), idle),
        **{f"{name}_mean": mean(near, AT[name], weight, inside) for name in MEANS},
        **{f"{name}_max": largest(near, AT[name], speaks) for name in LARGEST},
        **{name: latest(near, AT[name], speaks) for name in LATEST},
        "mem_total_bytes": largest(near, AT["mem_total_bytes"], speaks),
        "energy_j": grown["energy_j"],
        # Power and heat can slow a GPU at once: never longer than the window is.
        "throttled_s": np.minimum(_sum(slowed), most),
        "throttled_power_s": np.minimum(slowed[0], most),
        "throttled_thermal_s": np.minimum(_sum(slowed[1:]), most),
        "pcie_bytes": _sum([grown["pcie_tx_bytes"], grown["pcie_rx_bytes"]]),
        "nvlink_bytes": _sum([grown["nvlink_tx_bytes"], grown["nvlink_rx_bytes"]]),
        "ecc_uncorrected": grown["ecc_uncorrected"],
        "xid": latest_of(near, near.values[AT["xid"]], (xid_at >= start_s) & (xid_at < end_s)),
    }


def _sum(parts: list[np.ndarray]) -> np.ndarray:
    """Of what is known; NaN where nothing is."""
    values = np.array(parts)
    known = ~np.isnan(values)
    return np.where(known.any(axis=0), np.where(known, values, 0.0).sum(axis=0), np.nan)


def _held(uses: list[Use], start_s: float, end_s: float) -> tuple[float, float, float]:
    """Time that a GPU was billed for, started on and drained, s: of replicas that share it the union."""
    billed = [use for use in uses if use.billed]
    chosen = (billed, *([u for u in billed if STATES[u.state] == state] for state in ("starting", "draining")))
    allocated_s, loading_s, draining_s = (_union_s(some, start_s, end_s) for some in chosen)
    return allocated_s, loading_s, draining_s


def _union_s(uses: list[Use], start_s: float, end_s: float) -> float:
    total, until = 0.0, start_s
    for from_s, to_s in sorted((max(use.from_s, start_s), min(use.to_s, end_s)) for use in uses):
        total += max(0.0, to_s - max(from_s, until))
        until = max(until, to_s)
    return total


def _processes(codes: np.ndarray, table: ProcessTable) -> tuple[np.ndarray, np.ndarray]:
    """Processes on each GPU at its node's latest reading, and the memory held for those that are gone."""
    read = np.array([code // GPUS_MAX in table.read for code in codes.tolist()], bool)
    counts, gone = np.zeros(len(codes)), np.zeros(len(codes))
    place = np.searchsorted(codes, table.gpu)
    place = np.minimum(place, max(len(codes) - 1, 0))
    on = table.current & (codes[place] == table.gpu) if len(codes) else np.zeros(len(table.gpu), bool)
    np.add.at(counts, place[on], 1.0)
    held = on & table.gone
    np.add.at(gone, place[held], np.nan_to_num(table.mem_bytes[held]))
    return np.where(read, counts, np.nan), np.where(read, gone, np.nan)
