"""Windows per GPU: utilisation, power, energy, throttling. Pure: samples and holdings in, columns out."""

from __future__ import annotations

from typing import Any

import numpy as np

from models.node.holdings import GPUS_MAX, Holdings
from models.node.samples import Series, around
from models.node.weighing import count, growth, largest, latest, mean, weights, within
from models.windows import WINDOW_S

COLUMNS = (
    "status",
    "util_gpu_pct",
    "sm_active_ratio",
    "dram_active_ratio",
    "tensor_active_ratio",
    "power_w",
    "mem_used_bytes",
    "mem_total_bytes",
    "temp_c",
    "energy_j",
    "throttle_power_ns",
    "throttle_thermal_ns",
)
"""What is kept of a sample; status: 0 ok, 1 lost, NaN unknown."""
STATUS = COLUMNS.index("status")
STATUSES = ("ok", "lost")
UNUSED = "-"
"""Pool of the GPUs that no replica is on."""
_MEANS = COLUMNS[1:6]
_COUNTERS = slice(COLUMNS.index("energy_j"), len(COLUMNS))


def gpu_windows(
    series: Series, holdings: Holdings, start_s: int, now_s: float, gap_s: float
) -> dict[str, dict[str, Any]]:
    """Pool -> columns of gpu.windows for the window at `start_s`, a row per GPU.

    A GPU that replicas of two pools share is in both: its utilisation is one, and what each pool holds of it is in
    `gpus` of engine.windows. A GPU of the inventory without samples has a row of nulls, so that silence shows.
    """
    end_s = start_s + WINDOW_S
    near = around(series, start_s, end_s, gap_s, STATUS)
    table = _table(near, start_s, end_s, now_s, gap_s)
    types = {node["code"] * GPUS_MAX + gpu: kind for node in holdings.nodes.values() for gpu, kind in node["gpus"]}
    spoken = near.subjects[(table["samples"] > 0) | (table["covered_s"] > 0)]
    codes = np.unique(np.concatenate((spoken, np.array(list(types), np.int64))))
    place = np.minimum(np.searchsorted(near.subjects, codes), max(len(near.subjects) - 1, 0))
    absent = np.ones(len(codes), bool) if not len(near.subjects) else near.subjects[place] != codes
    pools_of = holdings.gpu_pools(start_s, end_s)
    rows: dict[str, list[int]] = {}
    for row, code in enumerate(codes.tolist()):
        for pool in pools_of.get(code, (0,)):
            rows.setdefault(holdings.pool_names.get(pool, UNUSED), []).append(row)
    found = {}
    for pool_name, chosen in rows.items():
        picked, missing = place[chosen], absent[chosen]
        of: list[int] = codes[chosen].tolist()
        data: dict[str, Any] = {
            "node": [holdings.node_names[code // GPUS_MAX] for code in of],
            "gpu": [code % GPUS_MAX for code in of],
            "gpu_type": [types.get(code) for code in of],
        }
        for name, values in table.items():
            # A GPU without any sample near: no samples, no time covered, all else unknown.
            default = 0.0 if name in ("samples", "covered_s") else np.nan
            data[name] = np.where(missing, default, values[picked] if len(values) else default)
        status: list[float] = data.pop("status").tolist()
        data["status"] = [None if s != s else STATUSES[int(s)] for s in status]
        found[pool_name] = data
    return found


def _table(near: Series, start_s: float, end_s: float, now_s: float, gap_s: float) -> dict[str, np.ndarray]:
    """Column -> float64 by subject of `near`."""
    inside = within(near, start_s, end_s)
    weight = weights(near, start_s, end_s, now_s, gap_s)
    lost = near.values[STATUS] > 0
    speaks = (inside | (weight > 0)) & ~lost
    weight = np.where(lost, 0.0, weight)
    at = {name: index for index, name in enumerate(COLUMNS)}
    grown = growth(near, _COUNTERS, start_s, end_s).total
    throttled = np.where(np.isnan(grown[1:]), 0.0, grown[1:]).sum(axis=0) / 1e9
    return {
        "status": latest(near, STATUS, inside),
        "samples": count(near, inside).astype(np.float64),
        "covered_s": np.bincount(near.group, weight, len(near.subjects)),
        **{f"{name}_mean": mean(near, at[name], weight, inside) for name in _MEANS},
        "mem_used_bytes_max": largest(near, at["mem_used_bytes"], speaks),
        "mem_total_bytes": largest(near, at["mem_total_bytes"], speaks),
        "energy_j": grown[0],
        "temp_c_max": largest(near, at["temp_c"], speaks),
        # Power and heat can slow a GPU at once: never longer than the window is.
        "throttled_s": np.where(np.isnan(grown[1:]).all(axis=0), np.nan, np.minimum(throttled, end_s - start_s)),
    }
