"""The reader of GPUs against a stand-in for the driver's library: values and units, errors, MIG, events, unplugging."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pynvml as nv
import pytest

from exporters import nvml_events, nvml_reader
from exporters.nvml_gpm import APART_S
from exporters.nvml_library import DriverGone
from exporters.nvml_reader import NvmlReader, gpu_type
from schemas.errors import UnavailableError
from schemas.node import GPU_SAMPLES
from tests.exporters.conftest import use_stub
from tests.exporters.nvml_stub import Stub

AT_S = 1_764_000_000.0
BOARD = ("power_w", "power_instant_w", "power_limit_w", "energy_j", "temp_c", "sm_clock_mhz", "pcie_tx_bytes", "xid")
"""Columns that are the board's: a MIG instance has no share of them."""


@pytest.fixture
def reader(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NvmlReader]:
    """Not yet open: the test says first which GPUs there are."""
    monkeypatch.setattr(nvml_events, "WAIT_MS", 50)  # closing waits for that thread
    made = NvmlReader(slow_s=3600, proc=tmp_path)
    yield made
    made.close()


def read(reader: NvmlReader) -> list[dict[str, Any]]:
    """Rows that the schema takes, without what is null."""
    rows = reader.read(lambda: AT_S)
    columns = {name: [row.get(name) for row in rows] for name in GPU_SAMPLES.columns}
    assert GPU_SAMPLES.decode(GPU_SAMPLES.encode(columns)).refused == []
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def later(reader: NvmlReader) -> list[dict[str, Any]]:
    """Rows of a reading that is far enough from the one before for activity."""
    time.sleep(APART_S)
    return read(reader)


def test_values_and_units(stub: Stub, reader: NvmlReader) -> None:
    """Every column comes in the unit of the schema; activity from the second reading on."""
    stub.set(gpus=2)
    reader.open()
    first, second = read(reader), later(reader)
    assert "sm_active_ratio" not in first[0]
    window_s = second[0].pop("activity_window_s")
    assert APART_S <= window_s < 60
    assert second[0] == {
        "gpu": 0,
        "at_s": AT_S,
        "status": "ok",
        "util_gpu_pct": 40,
        "util_mem_pct": 11,
        "mem_used_bytes": 70 * 2**30,
        "mem_reserved_bytes": 512 * 2**20,
        "mem_total_bytes": 80 * 2**30,
        "power_w": pytest.approx(412.5),
        "power_instant_w": pytest.approx(430),
        "power_limit_w": pytest.approx(700),
        "energy_j": pytest.approx(5e9),
        "temp_c": 60,
        "mem_temp_c": 71,
        "sm_clock_mhz": 1755,
        "sm_clock_max_mhz": 1980,
        "mem_clock_mhz": 2619,
        "throttle_mask": 4,
        "throttle_power_ns": 1e9,
        "throttle_sync_ns": 2e9,
        "throttle_thermal_ns": 7e9,
        "throttle_brake_ns": 6e9,
        "pcie_tx_bytes": 123,
        "pcie_rx_bytes": 456,
        "nvlink_tx_bytes": 7 * 1024,
        "nvlink_rx_bytes": 8 * 1024,
        "sm_active_ratio": pytest.approx(0.62),
        "sm_occupancy_ratio": pytest.approx(0.31),
        "tensor_active_ratio": pytest.approx(0.2),
        "dram_active_ratio": pytest.approx(0.44),
        "ecc_corrected": 12,
        "ecc_uncorrected": 1,
        "remap_pending": 1,
        "remap_failed": 0,
    }
    assert set(second[0]) == set(GPU_SAMPLES.columns) - {"parent", "xid", "xid_at_s", "activity_window_s"}
    assert second[1]["util_gpu_pct"] == 41


@pytest.mark.parametrize("type", range(7))
def test_every_type_of_value_is_read(stub: Stub, reader: NvmlReader, type: int) -> None:
    """The grouped call says of each value what it is: double, three unsigned, two signed, short."""
    stub.set({"field.82": 55, "fieldtype.82": type})
    reader.open()
    assert read(reader)[0]["mem_temp_c"] == 55


def test_a_counter_that_wraps_is_passed_on_as_it_is(stub: Stub, reader: NvmlReader) -> None:
    """Counters are raw: the node's fold takes deltas and sees the reset."""
    stub.set({"field.197": "4294967290%4294967296", "field.83": "100+0"})
    reader.open()
    assert read(reader)[0]["pcie_tx_bytes"] == 4294967290
    stub.set({"field.197": "4294967300%4294967296"})
    assert read(reader)[0]["pcie_tx_bytes"] == 4


UNSUPPORTED = [
    nv.NVML_ERROR_NOT_SUPPORTED,
    nv.NVML_ERROR_FUNCTION_NOT_FOUND,
    nv.NVML_ERROR_NO_PERMISSION,
    nv.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
    nv.NVML_ERROR_DEPRECATED,
    nv.NVML_ERROR_INVALID_ARGUMENT,
]


@pytest.mark.parametrize("error", UNSUPPORTED)
def test_unsupported_is_null_and_not_asked_again(stub: Stub, reader: NvmlReader, error: int) -> None:
    """What a GPU does not give is null, never 0; it is asked once, and again after the driver was opened anew."""
    stub.set({"error.nvmlDeviceGetUtilizationRates": error, "fielderror.197": error})
    reader.open()
    for _ in range(3):
        (row,) = read(reader)
        assert not {"util_gpu_pct", "util_mem_pct", "pcie_tx_bytes"} & set(row)
        assert (row["status"], row["pcie_rx_bytes"]) == ("ok", 456)
    assert stub.calls("nvmlDeviceGetUtilizationRates") == 1
    assert reader.failures == {}
    stub.set({"error.nvmlDeviceGetUtilizationRates": None, "fielderror.197": None})
    assert "util_gpu_pct" not in read(reader)[0]
    reader.close()
    reader.open()
    assert (read(reader)[0]["util_gpu_pct"], read(reader)[0]["pcie_tx_bytes"]) == (40, 123)


TRANSIENT = [
    nv.NVML_ERROR_NOT_FOUND,
    nv.NVML_ERROR_NO_DATA,
    nv.NVML_ERROR_TIMEOUT,
    nv.NVML_ERROR_NOT_READY,
    nv.NVML_ERROR_INSUFFICIENT_SIZE,
    nv.NVML_ERROR_IN_USE,
    nv.NVML_ERROR_UNKNOWN,
    nv.NVML_ERROR_MEMORY,
]


@pytest.mark.parametrize("error", TRANSIENT)
def test_transient_errors_are_null_once_and_counted(stub: Stub, reader: NvmlReader, error: int) -> None:
    """A value missing this once is null, counted, and asked again."""
    reader.open()
    stub.set({"error.nvmlDeviceGetUtilizationRates": error, "fielderror.82": error})
    (row,) = read(reader)
    assert not {"util_gpu_pct", "mem_temp_c"} & set(row)
    assert reader.failures == {"utilisation": 1, "mem_temp_c": 1}
    stub.set({"error.nvmlDeviceGetUtilizationRates": None, "fielderror.82": None})
    (row,) = read(reader)
    assert (row["util_gpu_pct"], row["mem_temp_c"]) == (40, 71)


def test_a_counter_never_takes_the_place_of_another(stub: Stub, reader: NvmlReader) -> None:
    """Thermal throttling is the two counters together, or null: the third one counts from elsewhere."""
    reader.open()
    (row,) = read(reader)
    soft = nv.NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_THERM_SLOWDOWN
    stub.set({f"fielderror.{soft}": nv.NVML_ERROR_TIMEOUT})
    assert "throttle_thermal_ns" not in read(reader)[0]
    stub.set({f"fielderror.{soft}": None})
    assert read(reader)[0]["throttle_thermal_ns"] >= row["throttle_thermal_ns"]


CALLS = {
    "nvmlDeviceGetUtilizationRates": {"util_gpu_pct", "util_mem_pct"},
    "nvmlDeviceGetClockInfo": {"sm_clock_mhz", "mem_clock_mhz"},
    "nvmlDeviceGetMaxClockInfo": {"sm_clock_max_mhz"},
    "nvmlDeviceGetEnforcedPowerLimit": {"power_limit_w"},
    "nvmlDeviceGetCurrentClocksEventReasons": {"throttle_mask"},
    "nvmlGpmMetricsGet": {"activity_window_s"} | {n for n in GPU_SAMPLES.columns if n.endswith("_ratio")},
}


@pytest.mark.parametrize("function", CALLS)
def test_each_call_fails_alone(stub: Stub, reader: NvmlReader, function: str) -> None:
    """An error of one call takes its own columns and no others."""
    reader.open()
    whole = set(read(reader)[0]) | set(later(reader)[0])
    stub.set({f"error.{function}": nv.NVML_ERROR_UNKNOWN})
    reader._slow_at = 0.0
    assert whole - set(later(reader)[0]) == CALLS[function]


@pytest.mark.parametrize(
    "error",
    [
        nv.NVML_ERROR_GPU_IS_LOST,
        nv.NVML_ERROR_RESET_REQUIRED,
        nv.NVML_ERROR_IRQ_ISSUE,
        nv.NVML_ERROR_GPU_NOT_FOUND,
    ],
)
def test_a_lost_gpu_is_said_and_others_go_on(stub: Stub, reader: NvmlReader, error: int) -> None:
    """Absence is visible: a row `lost` each time, the other GPU unchanged, and `ok` again when it is back."""
    stub.set(gpus=2)
    reader.open()
    stub.set({"error.*@0": error})
    for _ in range(2):
        rows = read(reader)
        assert rows[0] == {"gpu": 0, "at_s": AT_S, "status": "lost"}
        assert (rows[1]["status"], rows[1]["util_gpu_pct"]) == ("ok", 41)
    stub.set({"error.*@0": None})
    reader._retry_at = 0.0
    assert [row["status"] for row in read(reader)] == ["ok", "ok"]


def test_a_gpu_that_falls_off_the_bus_keeps_its_index(
    stub: Stub, reader: NvmlReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unplugged and plugged in again, through drivers opened anew: the others keep their index all the time."""
    stub.set(gpus=3)
    reader.open()
    reader.slow_s = 0.0
    monkeypatch.setattr(nvml_reader, "REOPEN_S", 0.0)
    reader._reopen_s = 0.0
    assert [row["status"] for row in read(reader)] == ["ok"] * 3
    stub.set({"error.*@1": nv.NVML_ERROR_GPU_IS_LOST, "absent@1": 1})
    statuses = [[(row["gpu"], row["status"]) for row in read(reader)] for _ in range(3)]
    assert statuses == [[(0, "ok"), (1, "lost"), (2, "ok")]] * 3
    assert [entry.gpu for entry in reader.inventory] == [0, 1, 2]
    stub.set({"error.*@1": None, "absent@1": None})
    read(reader)
    assert [(row["gpu"], row["status"]) for row in read(reader)] == [(0, "ok"), (1, "ok"), (2, "ok")]


def test_a_gpu_that_is_added_is_found(stub: Stub, reader: NvmlReader, tmp_path: Path) -> None:
    """The driver counts its GPUs when it is opened: it is opened anew when the host lists another."""
    listed = tmp_path / "driver/nvidia/gpus"
    (listed / "0000:01:00.0").mkdir(parents=True)
    reader.open()
    reader.slow_s = 0.0
    assert len(read(reader)) == 1
    stub.set(gpus=2)
    (listed / "0000:02:00.0").mkdir()
    assert len(read(reader)) == 2
    assert [entry.gpu for entry in reader.inventory] == [0, 1]


def test_a_stranger_never_gets_the_index_of_a_missing_gpu(stub: Stub, reader: NvmlReader) -> None:
    """A GPU that was exchanged for another is a new one; the old one stays lost."""
    stub.set(gpus=1)
    reader.open()
    reader.close()
    stub.set({"uuid@0": "GPU-another"})
    reader.open()
    assert [(row["gpu"], row["status"]) for row in read(reader)] == [(0, "lost"), (1, "ok")]


def test_older_drivers(nvml_library_old: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the newest functions and fields the older ones answer; what neither gives is null."""
    stub = use_stub(nvml_library_old, monkeypatch, tmp_path)
    stub.answers = {"field.75": 5 * 10**9, "name": "Tesla T4"}
    stub.set({"processes@0": "7:1000"})
    reader = NvmlReader(proc=tmp_path)
    reader.open()
    read(reader)
    (row,) = later(reader)
    assert row["temp_c"] == 60
    assert row["mem_used_bytes"] == 70 * 2**30 + 512 * 2**20
    assert (row["power_w"], row["energy_j"]) == (pytest.approx(300), pytest.approx(7000))
    assert (row["throttle_thermal_ns"], row["throttle_mask"]) == (5e9, 4)
    missing = {"mem_reserved_bytes", "power_instant_w", "throttle_power_ns", "nvlink_tx_bytes", "sm_active_ratio"}
    assert not missing & set(row)
    assert [(held.pid, held.mem_bytes) for held in reader.processes()[0]] == [(7, 1000)]
    reader.close()


def test_the_grouped_call_itself_may_be_missing(stub: Stub, reader: NvmlReader) -> None:
    """Power and energy then come by their own functions."""
    stub.set({"error.nvmlDeviceGetFieldValues": nv.NVML_ERROR_FUNCTION_NOT_FOUND})
    reader.open()
    (row,) = read(reader)
    assert (row["power_w"], row["energy_j"]) == (pytest.approx(300), pytest.approx(7000))
    assert not {"pcie_tx_bytes", "throttle_thermal_ns", "ecc_corrected"} & set(row)


def test_impossible_readings_are_null(stub: Stub, reader: NvmlReader) -> None:
    """Drivers do say 200 % and 0xffffffff: a row is not refused for it."""
    stub.set(util=200, temp=2**31 - 1)
    reader.open()
    (row,) = read(reader)
    assert not {"util_gpu_pct", "temp_c"} & set(row)
    assert row["status"] == "ok"
    assert reader.failures == {"util_gpu_pct": 1, "temp_c": 1}


@pytest.mark.parametrize(
    "error",
    [nv.NVML_ERROR_DRIVER_NOT_LOADED, nv.NVML_ERROR_UNINITIALIZED, nv.NVML_ERROR_OPERATING_SYSTEM],
)
def test_a_driver_that_is_gone_is_raised(stub: Stub, reader: NvmlReader, error: int) -> None:
    """At the start with a remedy, in between as the same error."""
    reader.open()
    stub.set({"error.nvmlDeviceGetUtilizationRates": error})
    with pytest.raises(DriverGone):
        reader.read(lambda: AT_S)
    reader.close()
    stub.set({"error.nvmlInitWithFlags": error})
    with pytest.raises(UnavailableError, match="nvidia-smi"):
        reader.open()


def test_a_driver_of_another_version_is_named(stub: Stub, reader: NvmlReader) -> None:
    """What happened (an upgrade underneath) and what to do about it."""
    stub.set({"error.nvmlInitWithFlags": nv.NVML_ERROR_LIB_RM_VERSION_MISMATCH})
    with pytest.raises(DriverGone, match=r"upgraded underneath.*Restart") as raised:
        reader.open()
    assert raised.value.mismatch


def test_slow_values_are_repeated_and_asked_seldom(stub: Stub, reader: NvmlReader) -> None:
    """Limits, clocks and ECC are in each row, and asked for once in `slow_s`."""
    reader.open()
    for _ in range(4):
        (row,) = read(reader)
        assert (row["power_limit_w"], row["sm_clock_max_mhz"], row["ecc_corrected"]) == (pytest.approx(700), 1980, 12)
    assert stub.calls("nvmlDeviceGetEnforcedPowerLimit") == 1
    reader._slow_at = 0.0
    stub.set(limit_mw=500_000)
    assert read(reader)[0]["power_limit_w"] == pytest.approx(500)


def test_one_grouped_call_a_reading(stub: Stub, reader: NvmlReader) -> None:
    """All field values of a GPU are asked for in one call, and its cost is the driver's own figure."""
    stub.set(gpus=8, latency_us=5)
    reader.open()
    read(reader)  # with the slow one
    before, latency_s = stub.calls("nvmlDeviceGetFieldValues"), reader.latency_s
    read(reader)
    assert stub.calls("nvmlDeviceGetFieldValues") == before + 8
    assert reader.latency_s - latency_s == pytest.approx(8 * 14 * 5e-6)


# -- MIG -----------------------------------------------------------------------------------------------------


def test_mig_instances_are_rows_with_a_parent(stub: Stub, reader: NvmlReader) -> None:
    """Memory and activity are the instance's own; what only the board has is null there, and on the board as ever."""
    stub.set({"gpus": 2, "mig@1": "1:1g.10gb,5:2g.20gb"})
    reader.open()
    read(reader)
    rows = {row["gpu"]: row for row in later(reader)}
    assert list(rows) == [0, 1, 33, 37]
    assert (rows[33]["parent"], rows[37]["parent"]) == (1, 1)
    assert (rows[33]["mem_used_bytes"], rows[37]["mem_used_bytes"]) == (2**30, 5 * 2**30)
    assert (rows[33]["sm_active_ratio"], rows[37]["sm_active_ratio"]) == (pytest.approx(0.63), pytest.approx(0.67))
    assert not set(BOARD) & set(rows[33])
    assert "util_gpu_pct" not in rows[33]
    assert "util_gpu_pct" not in rows[1]
    assert (rows[1]["power_w"], rows[1]["mem_total_bytes"]) == (pytest.approx(412.5), 80 * 2**30)
    entries = {entry.gpu: entry for entry in reader.inventory}
    assert (entries[37].parent, entries[37].mig_profile, entries[37].gpu_type) == (1, "2g.20gb", "H100")
    assert entries[37].mem_total_bytes == 10 * 2**30
    assert entries[37].uuid == "MIG-00000001-5"
    assert "parent" not in rows[0]


def test_a_new_layout_is_found_and_what_was_unsupported_asked_again(stub: Stub, reader: NvmlReader) -> None:
    """A GPU that is no longer cut has utilisation again; instances come and go with the inventory."""
    stub.set({"mig@0": "1:1g.10gb"})
    reader.open()
    assert [row["gpu"] for row in read(reader)] == [0, 17]
    stub.set({"mig@0": "2:3g.40gb"})
    reader._slow_at = 0.0
    assert [row["gpu"] for row in read(reader)] == [0, 18]
    assert [entry.mig_profile for entry in reader.inventory] == ["", "3g.40gb"]
    stub.set({"mig@0": None})
    reader._slow_at = 0.0
    assert [(row["gpu"], row["util_gpu_pct"]) for row in read(reader)] == [(0, 40)]
    assert [entry.gpu for entry in reader.inventory] == [0]


def test_instances_of_a_lost_gpu_are_lost(stub: Stub, reader: NvmlReader) -> None:
    """A part does not answer either, and says whose part it is."""
    stub.set({"mig@0": "1:1g.10gb"})
    reader.open()
    read(reader)
    stub.set({"error.*@0": nv.NVML_ERROR_GPU_IS_LOST})
    assert read(reader) == [
        {"gpu": 0, "at_s": AT_S, "status": "lost"},
        {"gpu": 17, "parent": 0, "at_s": AT_S, "status": "lost"},
    ]
    assert reader.lost(1.0) == [
        {"gpu": 0, "at_s": 1.0, "status": "lost"},
        {"gpu": 17, "parent": 0, "at_s": 1.0, "status": "lost"},
    ]


def test_an_ampere_without_gpm_has_instances_without_activity(stub: Stub, reader: NvmlReader) -> None:
    """MIG came before GPM: memory and processes are there, activity is null."""
    stub.set({"mig@0": "1:1g.5gb", "gpm_never": 1, "processes@0": "77:1000:1"})
    reader.open()
    read(reader)
    row = later(reader)[1]
    assert (row["gpu"], row["mem_used_bytes"]) == (17, 2**30)
    assert "sm_active_ratio" not in row
    assert [(held.pid, held.mem_bytes) for held in reader.processes()[17]] == [(77, 1000)]


def test_a_layout_that_cannot_be_read_changes_nothing(stub: Stub, reader: NvmlReader) -> None:
    """An error while a GPU is being cut is counted; the GPU is not lost for it."""
    stub.set({"mig@0": "1:1g.10gb"})
    reader.open()
    read(reader)
    reader._slow_at = 0.0
    stub.set({"error.nvmlDeviceGetMigMode": nv.NVML_ERROR_UNKNOWN})
    assert [(row["gpu"], row["status"]) for row in read(reader)] == [(0, "ok"), (17, "ok")]
    assert reader.failures == {"mig": 1}


# -- events --------------------------------------------------------------------------------------------------


def _until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_xid_is_in_every_row_from_then_on(stub: Stub, reader: NvmlReader) -> None:
    """The driver says each once, to a thread of its own; the row says code and time, of that GPU alone."""
    stub.set(gpus=2)
    reader.open()
    assert "xid" not in read(reader)[0]
    _until(lambda: stub.calls("nvmlEventSetWait_v2") >= 1)
    stub.set({"event@1": f"1:{nv.nvmlEventTypeXidCriticalError}:79"})
    _until(lambda: "xid" in read(reader)[1])
    for _ in range(2):
        rows = read(reader)
        assert (rows[1]["xid"], rows[1]["xid_at_s"]) == (79, AT_S)
        assert "xid" not in rows[0]
    stub.set({"event@1": f"2:{nv.nvmlEventTypeXidCriticalError}:48"})
    _until(lambda: read(reader)[1]["xid"] == 48)


def test_other_events_bring_the_next_slow_look_forward(stub: Stub, reader: NvmlReader) -> None:
    """After a double bit error its counter is read at once."""
    double = nv.nvmlEventTypeDoubleBitEccError
    stub.set(event_types=double | nv.nvmlEventTypeXidCriticalError)
    reader.open()
    assert read(reader)[0]["ecc_uncorrected"] == 1
    _until(lambda: stub.calls("nvmlEventSetWait_v2") >= 1)
    stub.set({"field.4": 2, "event@0": f"1:{double}:0"})
    _until(lambda: read(reader)[0]["ecc_uncorrected"] == 2)
    assert "xid" not in read(reader)[0]


def test_no_events_are_no_error(stub: Stub, reader: NvmlReader) -> None:
    """A GPU without events is read like any other."""
    stub.set({"error.nvmlDeviceRegisterEvents": nv.NVML_ERROR_NOT_SUPPORTED})
    reader.open()
    assert read(reader)[0]["status"] == "ok"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("Tesla T4", "T4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA RTX A6000", "A6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX-PRO-6000"),
        ("NVIDIA GeForce RTX 4090", "GeForce RTX 4090"),
        ("Weird/Name\x00", "Weird-Name"),
    ],
)
def test_product_names_become_those_of_price_lists(name: str, expected: str) -> None:
    """Families as prices name them; anything else as a valid name."""
    assert gpu_type(name) == expected
