"""Windows of GPUs and nodes: who pays, what stands idle, MIG instances, errors, links, processes."""

from __future__ import annotations

from typing import Any

import pytest

from schemas.log import LogRecord
from schemas.node import GpuEntry
from schemas.signals import GPU_WINDOWS, NODE_WINDOWS
from tests.models.law import log, run, tick
from tests.models.node.logs import T0, final, fold, gpu, inventory, process, replica

Row = dict[str, Any]


def read(at: float, index: int = 0, **more: Any) -> LogRecord:
    return gpu(at, [{"gpu": index, "at_s": at, "status": "ok", **more}])


def found(records: list[LogRecord], kind: Any = GPU_WINDOWS, start: int = T0, pool: str = "chat") -> list[Row]:
    sent = log(*sorted([*records, tick(T0 + 12), tick(T0 + 22)], key=lambda r: r.at_ms))
    return final(run(fold(), sent), kind)[(pool, start)]


def one(records: list[LogRecord], start: int = T0) -> Row:
    return found([inventory(T0 - 2.0, [replica()], gpus=1), *records], start=start)[0]


def test_allocation_of_a_shared_gpu_is_a_union() -> None:
    """A GPU is allocated as long as anybody pays for it, loading as long as anybody loads on it."""
    shared: Row = {"gpus": [0], "gpu_share": 0.5}
    a = replica("a", state="starting", since_s=T0 - 5.0, **shared)
    ready = replica("a", state="ready", since_s=T0 + 4.0, **shared)
    b = replica("b", state="draining", since_s=T0 + 2.0, **shared)
    records = [inventory(T0 - 5.0, [a], gpus=1), inventory(T0 + 2.0, [a, b], gpus=1)]
    records += [inventory(T0 + 4.0, [ready, b], gpus=1), inventory(T0 + 8.0, [], gpus=1)]
    (got,) = found(records)
    assert (got["allocated_s"], got["loading_s"], got["draining_s"]) == (8, 4, 6)


def test_gpu_that_is_not_paid_for_is_not_allocated() -> None:
    """A replica that is not billed holds a GPU at no cost."""
    assert found([inventory(T0 - 2.0, [replica(billed=False)], gpus=1)])[0]["allocated_s"] == 0


@pytest.mark.parametrize(
    ("util", "sm", "idle"),
    [(0.0, None, 3), (0.0, 0.005, 3), (0.0, 0.5, 0), (5.0, 0.0, 0), (None, 0.0, 3), (None, 0.4, 0), (None, None, None)],
)
def test_idle_needs_all_that_is_known(util: float | None, sm: float | None, idle: float | None) -> None:
    """Idle: no kernel was resident and, where it is known, no SM was active; nothing known is unknown."""
    assert one([read(T0 + 1.0, util_gpu_pct=util, sm_active_ratio=sm)])["idle_s"] == idle


def test_lost_gpu_is_not_idle() -> None:
    """A GPU that no longer answers stands still for another reason."""
    lost = gpu(T0 + 2.0, [{"gpu": 0, "at_s": T0 + 2.0, "status": "lost"}])
    got = one([read(T0 + 1.0, util_gpu_pct=0.0), lost])
    assert (got["status"], got["idle_s"]) == ("lost", 1)


def test_throttling_is_split_and_never_longer_than_the_window() -> None:
    """Power is told from heat and the brake; together they slow a GPU for at most as long as the window is."""
    counters = {
        "throttle_power_ns": 6e9,
        "throttle_thermal_ns": 3e9,
        "throttle_brake_ns": 2.5e9,
        "throttle_sync_ns": 9e9,
    }
    got = one([read(T0 + 0.0, **dict.fromkeys(counters, 0.0)), read(T0 + 10.0, **counters)])
    assert (got["throttled_power_s"], got["throttled_thermal_s"], got["throttled_s"]) == (6, 5.5, 10)
    unknown = one([read(T0 + 0.0), read(T0 + 9.0)])
    assert (unknown["throttled_s"], unknown["throttled_power_s"], unknown["throttled_thermal_s"]) == (None, None, None)


def test_links_and_errors_are_growth() -> None:
    """Bytes of both directions add up; a counter that fell has begun anew at zero; what is not given stays unknown."""
    before = {"pcie_tx_bytes": 100.0, "pcie_rx_bytes": 50.0, "ecc_uncorrected": 7.0, "nvlink_tx_bytes": 10.0}
    after = {"pcie_tx_bytes": 30.0, "pcie_rx_bytes": 70.0, "ecc_uncorrected": 9.0, "nvlink_tx_bytes": 15.0}
    got = one([read(T0 + 0.0, **before), read(T0 + 9.0, **after)])
    assert (got["pcie_bytes"], got["nvlink_bytes"], got["ecc_uncorrected"]) == (30 + 20, 5, 2)
    assert one([read(T0 + 0.0), read(T0 + 9.0)])["pcie_bytes"] is None


def test_clock_is_a_share_of_the_highest() -> None:
    """Time-weighted; unknown where the highest is."""
    rows = [read(T0 + t, sm_clock_mhz=mhz, sm_clock_max_mhz=2000.0) for t, mhz in ((0.0, 2000.0), (2.0, 1000.0))]
    assert one(rows)["sm_clock_ratio_mean"] == pytest.approx((2 * 1.0 + 3 * 0.5) / 5)
    assert one([read(T0 + 1.0, sm_clock_mhz=500.0)])["sm_clock_ratio_mean"] is None


def test_xid_is_in_the_window_in_which_it_came() -> None:
    """An error belongs to the window of its own time, though it is read later and stays the last for good."""
    rows = [read(T0 + 8.0), *(read(T0 + t, xid=79, xid_at_s=T0 + 9.0) for t in (10.5, 15.0, 20.0))]
    assert (one(rows)["xid"], one(rows, T0 + 10)["xid"]) == (79, None)


def test_xid_of_the_first_sample_revises_the_window_before() -> None:
    """An exporter that begins after the window has closed still tells of an error that came in it."""
    first = read(T0 + 13.0, xid=79, xid_at_s=T0 + 9.0)
    assert one([tick(T0 + 12.0), first, tick(T0 + 14.0)])["xid"] == 79


def test_flags_and_limits_are_the_latest() -> None:
    """What waits to be repaired and the power cap are as last read; the power is also given at its largest."""
    rows = [read(T0 + 1.0, remap_pending=0, power_limit_w=700.0, power_w=600.0)]
    got = one([*rows, read(T0 + 2.0, remap_pending=1, remap_failed=0, power_limit_w=500.0, power_w=500.0)])
    assert (got["remap_pending"], got["remap_failed"], got["power_limit_w"], got["power_w_max"]) == (1, 0, 500, 600)


def seen(at: float, *rows: Row) -> LogRecord:
    return process(at, [{"gpu": 0, "at_s": at, "pid": 7, **row} for row in rows])


def test_processes_at_the_latest_reading() -> None:
    """Processes and the memory of dead ones are those of the node's latest reading; no reading is not none."""
    early = seen(T0 + 2.0, {"pid": 1}, {"pid": 2, "gone": 1, "mem_bytes": 4e9})
    late = seen(T0 + 7.0, {"pid": 1}, {"pid": 3, "gone": 1, "mem_bytes": 5e9}, {"pid": 4, "gpu": 1})
    held = inventory(T0 - 2.0, [replica(gpus=(0, 1))])
    rows = found([held, early, late])
    assert [(r["processes"], r["mem_gone_bytes"]) for r in rows] == [(2, 5e9), (1, 0)]
    assert [r["processes"] for r in found([held])] == [None, None]
    assert [r["processes"] for r in found([held, late], start=T0 - 10)] == [None, None]


# -- nodes -------------------------------------------------------------------------------------------------------


def nodes(records: list[LogRecord], start: int = T0) -> list[Row]:
    return found(records, NODE_WINDOWS, start, "-")


def test_node_window() -> None:
    """What a node has, what is held, what is free and answers, what is lost, and what it draws."""
    held = [replica("a", gpus=[0], gpu_share=0.5), replica("b", gpus=[0], gpu_share=0.25), replica("c", gpus=[1])]
    rows = [{"gpu": g, "at_s": T0 + 0.0, "status": "ok", "util_gpu_pct": 0.0, "power_w": 100.0} for g in (0, 1, 2, 3)]
    records = [inventory(T0 - 2.0, held, gpus=6), gpu(T0 + 0.0, rows, start_s="5", seq="1", dropped="4")]
    records += [gpu(T0 + 2.0, [{"gpu": 3, "at_s": T0 + 2.0, "status": "lost"}], start_s="5", seq="2", dropped="6")]
    (got,) = nodes(records)
    assert (got["node"], got["gpu_type"], got["gpus"], got["replicas"], got["dropped"]) == ("n1", "H100", 6, 3, 6)
    assert got["gpus_allocated"] == 0.75 + 1
    # 2 answers and is free; 3 is lost, 4 and 5 say nothing
    assert (got["gpus_free"], got["gpus_lost"]) == (1, 1)
    assert (got["util_gpu_pct_mean"], got["power_w_mean"]) == (0, 400)
    assert got["idle_s"] == 3 + 3  # of the two that are paid for


def test_windows_of_nodes_are_closed_ones() -> None:
    """A row per GPU type, none while the window is open."""
    entries = [GpuEntry(gpu=0, gpu_type="H100"), GpuEntry(gpu=1, gpu_type="L4")]
    got = nodes([inventory(T0 - 2.0, [], gpus=entries)])
    assert [(r["gpu_type"], r["gpus"]) for r in got] == [("H100", 1), ("L4", 1)]
    out = run(fold(), log(inventory(T0 - 2.0, [], gpus=entries), tick(T0 + 5)))
    assert not [r for r in out if r.type == NODE_WINDOWS.type and f"/{T0}/" in r.id]


def test_mig_instances_count_as_their_share() -> None:
    """An instance has its share of the board, the board what is left; nothing of it is a free whole GPU."""
    gib = 2.0**30
    entries = [GpuEntry(gpu=0, gpu_type="H100", mem_total_bytes=80 * gib), GpuEntry(gpu=1, gpu_type="H100")]
    entries += [
        GpuEntry(gpu=16 + i, gpu_type="H100", mem_total_bytes=size * gib, parent=0, mig_profile="x")
        for i, size in enumerate((20, 40))
    ]
    both: Row = {"at_s": T0 + 1.0, "status": "ok", "mem_used_bytes": 1.0}
    rows = [{"gpu": 0, "power_w": 300.0, **both}, {"gpu": 1, "power_w": 90.0, **both}, {"gpu": 16, "parent": 0, **both}]
    records = [inventory(T0 - 2.0, [replica(gpus=[16])], gpus=entries), gpu(T0 + 1.0, rows)]
    (got,) = nodes(records)
    assert (got["gpus"], got["gpus_allocated"], got["gpus_free"]) == (2, 0.25, 1)
    assert (got["power_w_mean"], got["mem_used_bytes_max"]) == (390, 2)
    (instance,) = found(records)
    assert (instance["gpu"], instance["parent"], instance["power_w_mean"], instance["samples"]) == (16, 0, None, 1)
