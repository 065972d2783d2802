"""The GPU exporter against a driver in Python: values and units, each class of error, hangs, and the inventory."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pynvml as nv
import pytest

from exporters import nvml as exporter
from exporters.nvml import NvmlExporter, NvmlOptions, Worker, run_nvml
from exporters.nvml_reader import DriverGone, NvmlReader, gpu_type
from schemas.base import decode
from schemas.config import Deployment
from schemas.errors import SettingsError, UnavailableError
from schemas.node import GPU_SAMPLES, NodeInventory
from streams.settings import Settings
from tests.exporters.conftest import Producer, until
from tests.exporters.fake_nvml import FakeGpu, FakeNvml

AT_S = 1_764_000_000.0


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeNvml]:
    """Puts a driver in place of the library."""

    def put(*gpus: FakeGpu) -> FakeNvml:
        fake = FakeNvml(*gpus)
        monkeypatch.setattr(nv, "nvmlLib", fake)
        monkeypatch.setattr(nv, "_nvmlGetFunctionPointer_cache", {})
        return fake

    return put


def _read(reader: NvmlReader) -> list[dict[str, Any]]:
    rows = reader.read(lambda: AT_S)
    columns = {name: [row.get(name) for row in rows] for name in GPU_SAMPLES.columns}
    assert GPU_SAMPLES.decode(GPU_SAMPLES.encode(columns)).refused == []
    return rows


def _opened(types: dict[str, str] | None = None) -> NvmlReader:
    reader = NvmlReader(types)
    reader.open()
    return reader


def test_values_and_units(install: Callable[..., FakeNvml]) -> None:
    """Every column comes in the unit of the schema; activity from the second reading on."""
    install(FakeGpu(0), FakeGpu(1))
    reader = _opened()
    first, second = _read(reader), _read(reader)
    assert "sm_active_ratio" not in first[0]
    assert second[0] == {
        "gpu": 0,
        "at_s": AT_S,
        "status": "ok",
        "util_gpu_pct": 40,
        "util_mem_pct": 11,
        "mem_used_bytes": 70 * 2**30,
        "mem_total_bytes": 80 * 2**30,
        "power_w": pytest.approx(412.5),
        "energy_j": pytest.approx(5e9),
        "temp_c": 60,
        "mem_temp_c": 71,
        "sm_clock_mhz": 1755,
        "sm_clock_max_mhz": 1980,
        "throttle_mask": 4,
        "throttle_power_ns": 1e9,
        "throttle_thermal_ns": 7e9,
        "pcie_tx_bytes": 123,
        "pcie_rx_bytes": 456,
        "nvlink_tx_bytes": 7 * 1024,
        "nvlink_rx_bytes": 8 * 1024,
        "sm_active_ratio": pytest.approx(0.62),
        "sm_occupancy_ratio": pytest.approx(0.31),
        "tensor_active_ratio": pytest.approx(0.2),
        "dram_active_ratio": pytest.approx(0.44),
    }
    assert set(second[0]) == set(GPU_SAMPLES.columns)
    assert second[1]["util_gpu_pct"] == 41


UNSUPPORTED = [
    nv.NVML_ERROR_NOT_SUPPORTED,
    nv.NVML_ERROR_NO_PERMISSION,
    nv.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
    nv.NVML_ERROR_DEPRECATED,
    nv.NVML_ERROR_INVALID_ARGUMENT,
]


@pytest.mark.parametrize("error", UNSUPPORTED)
def test_unsupported_is_null_and_not_asked_again(install: Callable[..., FakeNvml], error: int) -> None:
    """What a GPU does not give is None, never 0; it is asked once, and again after the driver was opened anew."""
    fake = install(FakeGpu(0))
    fake.gpus[0].errors["nvmlDeviceGetUtilizationRates"] = error
    fake.gpus[0].field_errors[nv.NVML_FI_DEV_PCIE_COUNT_TX_BYTES] = error
    reader = _opened()
    for _ in range(3):
        (row,) = _read(reader)
        assert (row["util_gpu_pct"], row["util_mem_pct"], row["pcie_tx_bytes"]) == (None, None, None)
        assert (row["status"], row["pcie_rx_bytes"]) == ("ok", 456)
    assert fake.calls.count("nvmlDeviceGetUtilizationRates") == 1
    fake.gpus[0].errors.clear()
    reader.close()
    reader.open()
    assert _read(reader)[0]["util_gpu_pct"] == 40


@pytest.mark.parametrize(
    "error", [nv.NVML_ERROR_TIMEOUT, nv.NVML_ERROR_NO_DATA, nv.NVML_ERROR_UNKNOWN, nv.NVML_ERROR_IN_USE]
)
def test_transient_errors_are_null_once(install: Callable[..., FakeNvml], error: int) -> None:
    """A value missing this once is None, counted, and asked again."""
    fake = install(FakeGpu(0))
    reader = _opened()
    fake.gpus[0].errors["nvmlDeviceGetUtilizationRates"] = error
    assert _read(reader)[0]["util_gpu_pct"] is None
    assert reader.failures == {"utilisation": 1}
    fake.gpus[0].errors.clear()
    assert _read(reader)[0]["util_gpu_pct"] == 40


@pytest.mark.parametrize("error", [nv.NVML_ERROR_GPU_IS_LOST, nv.NVML_ERROR_RESET_REQUIRED, nv.NVML_ERROR_IRQ_ISSUE])
def test_a_lost_gpu_is_said_and_others_go_on(install: Callable[..., FakeNvml], error: int) -> None:
    """Absence is visible: a row `lost` each time, the other GPU unchanged, and `ok` again when it is back."""
    fake = install(FakeGpu(0), FakeGpu(1))
    reader = _opened()
    fake.gpus[0].errors["*"] = error
    for _ in range(2):
        rows = _read(reader)
        assert rows[0] == {"gpu": 0, "at_s": AT_S, "status": "lost"}
        assert (rows[1]["status"], rows[1]["util_gpu_pct"]) == ("ok", 41)
    fake.gpus[0].errors.clear()
    assert _read(reader)[0]["status"] == "ok"


def test_older_drivers_and_gpus(install: Callable[..., FakeNvml]) -> None:
    """Without the newest functions and fields the older ones answer; what neither gives is None."""
    gpu = FakeGpu(0, "Tesla T4")
    gpu.gpm = False
    keep = (nv.NVML_FI_DEV_PERF_POLICY_THERMAL,)
    gpu.fields = {field: value for field, value in gpu.fields.items() if field in keep}
    fake = install(gpu)
    fake.missing = {"nvmlDeviceGetTemperatureV", "nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetCurrentClocksEventReasons"}
    reader = _opened()
    (row,) = _read(reader)
    assert row["temp_c"] == 60
    assert row["mem_used_bytes"] == 70 * 2**30 + 1
    assert (row["power_w"], row["energy_j"]) == (pytest.approx(300), pytest.approx(7000))
    assert row["throttle_thermal_ns"] == 5e9
    assert [row[n] for n in ("throttle_mask", "throttle_power_ns", "nvlink_tx_bytes", "mem_temp_c")] == [None] * 4
    assert "sm_active_ratio" not in row


def test_the_grouped_call_itself_may_be_missing(install: Callable[..., FakeNvml]) -> None:
    """Power and energy then come by their own functions."""
    fake = install(FakeGpu(0))
    fake.missing = {"nvmlDeviceGetFieldValues"}
    (row,) = _read(_opened())
    assert row["power_w"] == pytest.approx(300)
    assert row["pcie_tx_bytes"] is None


def test_impossible_readings_are_null(install: Callable[..., FakeNvml]) -> None:
    """Drivers do say 200 % and 0xffffffff: a row is not refused for it."""
    gpu = FakeGpu(0)
    gpu.util, gpu.temperature = 200, 2**31 - 1
    install(gpu)
    reader = _opened()
    (row,) = _read(reader)
    assert (row["util_gpu_pct"], row["temp_c"], row["status"]) == (None, None, "ok")
    assert reader.failures == {"util_gpu_pct": 1, "temp_c": 1}


@pytest.mark.parametrize(
    "error", [nv.NVML_ERROR_DRIVER_NOT_LOADED, nv.NVML_ERROR_LIB_RM_VERSION_MISMATCH, nv.NVML_ERROR_UNINITIALIZED]
)
def test_a_driver_that_is_gone_is_raised(install: Callable[..., FakeNvml], error: int) -> None:
    """At the start with a remedy, in between as the same error."""
    fake = install(FakeGpu(0))
    reader = _opened()
    fake.errors["nvmlDeviceGetUtilizationRates"] = error
    with pytest.raises(DriverGone):
        reader.read(lambda: AT_S)
    fake.errors = {"nvmlInitWithFlags": error}
    with pytest.raises(UnavailableError, match="nvidia-smi"):
        NvmlReader().open()


def test_indices_stay_when_a_gpu_falls_off(install: Callable[..., FakeNvml]) -> None:
    """After a re-open with one GPU fewer the others keep their index, the missing one is lost."""
    first, second = FakeGpu(0), FakeGpu(1)
    install(first, second)
    reader = _opened()
    reader.close()
    install(second)
    reader.open()
    rows = _read(reader)
    assert [(row["gpu"], row["status"]) for row in rows] == [(0, "lost"), (1, "ok")]


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


# -- the process ---------------------------------------------------------------------------------------------


def _options(**given: Any) -> NvmlOptions:
    return NvmlOptions.of(node="node-1", **{"period_s": 0.1, **given})


async def test_without_a_driver_it_says_so(
    install: Callable[..., FakeNvml], settings: Settings, deployment: Deployment
) -> None:
    """No driver at the start raises (the command exits non-zero), before anything is published."""
    fake = install()
    fake.errors["nvmlInitWithFlags"] = nv.NVML_ERROR_LIBRARY_NOT_FOUND
    with pytest.raises(UnavailableError, match=r"libnvidia-ml\.so"):
        await run_nvml(settings, deployment, _options(), asyncio.Event())
    assert Producer.made == []


async def test_it_publishes_samples_and_inventory(
    install: Callable[..., FakeNvml], settings: Settings, deployment: Deployment, tmp_path: Path
) -> None:
    """Batches are numbered and named, the mapping is in the inventory, a change of it is said at once, NVML is called
    on one other thread only."""
    fake = install(FakeGpu(0), FakeGpu(1))
    mapping = tmp_path / "mapping.yaml"
    mapping.write_text("replicas: {chat-0: {pool: chat, gpus: [0, 1]}}")
    stop = asyncio.Event()
    running = asyncio.create_task(run_nvml(settings, deployment, _options(mapping_file=mapping), stop))
    await until(lambda: Producer.made and Producer.made[0].sent["node.samples"] >= 4)
    mapping.write_text("replicas: {chat-0: {pool: chat, gpus: [0], state: draining}}")
    records = Producer.made[0].records
    await until(lambda: sum(r.type == "fleetloop.node.inventory.v1" for r in records) >= 2)
    mapping.write_text("replicas: {chat-0: {pool: chat, gpus: nonsense}}")
    await until(lambda: records and running.done() is False and len(records) > 6)
    stop.set()
    await running

    batches = [r for r in records if r.type == GPU_SAMPLES.type]
    metas = [r.batch().meta for r in batches]
    assert [m["seq"] for m in metas] == [str(i) for i in range(1, len(metas) + 1)]
    assert {(m["node"], m["dropped"]) for m in metas} == {("node-1", "0")}
    assert len({r.id for r in records}) == len(records)
    assert {r.key for r in records} == {"node-1"}
    assert batches[0].batch().text("status") == ["ok", "ok"]
    inventories = [decode(NodeInventory, r.value) for r in records if r.type == "fleetloop.node.inventory.v1"]
    assert [g.gpu_type for g in inventories[0].gpus] == ["H100", "H100"]
    assert inventories[0].gpus[0].mem_total_bytes == 80 * 2**30
    assert [(i.replicas[0].state, i.replicas[0].gpus) for i in inventories] == [
        ("ready", [0, 1]),
        ("draining", [0]),
    ]
    assert threading.get_ident() not in fake.threads
    assert len(fake.threads) == 1


async def test_a_hanging_driver_skips_ticks(
    install: Callable[..., FakeNvml], settings: Settings, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a call hangs nothing is queued, the process says that it is not ready, and it still stops."""
    monkeypatch.setattr(exporter, "HANGS_AFTER_S", 0.3)
    fake = install(FakeGpu(0))
    with Worker("nvml") as worker:
        reader = NvmlReader()
        await worker.call(reader.open)
        one = NvmlExporter(settings, deployment, _options(), reader, exporter.Holdings(None), worker)
        fake.block = threading.Event()
        stop = asyncio.Event()
        running = asyncio.create_task(one.run(stop))
        await until(lambda: one.edge.unready)
        assert fake.calls.count("nvmlDeviceGetUtilizationRates") == 1
        fake.block.set()
        await until(lambda: not one.edge.unready)
        fake.block = threading.Event()
        await until(lambda: one.edge.unready)
        stop.set()
        await asyncio.wait_for(running, 10)
        fake.block.set()


async def test_a_driver_that_goes_is_looked_for_again(
    install: Callable[..., FakeNvml], settings: Settings, deployment: Deployment
) -> None:
    """Every GPU is lost while the driver is gone, and back when it is."""
    fake = install(FakeGpu(0))
    stop = asyncio.Event()
    running = asyncio.create_task(run_nvml(settings, deployment, _options(), stop))

    def statuses() -> list[str | None]:
        if not Producer.made:
            return []
        return [r.batch().text("status")[0] for r in Producer.made[0].records if r.type == GPU_SAMPLES.type]

    await until(lambda: "ok" in statuses())
    fake.errors = dict.fromkeys(("nvmlDeviceGetFieldValues", "nvmlInitWithFlags"), nv.NVML_ERROR_DRIVER_NOT_LOADED)
    await until(lambda: statuses().count("lost") >= 2)
    fake.errors = {}
    await until(lambda: statuses()[-1] == "ok")
    stop.set()
    await running


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("- a", "replicas"),
        ("replicas: {a: 1}", "replicas.a"),
        ("replicas: {a: {pool: p}}", r"replicas\.a\.gpus"),
        ("replicas: {a: {pool: p/q, gpus: [0]}}", r"replicas\.a\.pool"),
        ("replicas: {a: {pool: p, gpus: [0], state: odd}}", r"replicas\.a\.state"),
        ("{", "YAML"),
    ],
)
def test_a_bad_mapping_is_named(tmp_path: Path, text: str, match: str) -> None:
    """The error names file, replica, field and value."""
    path = tmp_path / "mapping.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=match) as refused:
        exporter.Holdings(path).refresh(AT_S)
    assert str(path) in str(refused.value)


def test_since_is_kept_while_the_state_is(tmp_path: Path) -> None:
    """A replica's `since_s` changes with its state, not with the file."""
    path = tmp_path / "mapping.yaml"
    holdings = exporter.Holdings(path)
    path.write_text("replicas: {a: {pool: p, gpus: [0]}}")
    holdings.refresh(10.0)
    path.write_text("replicas: {a: {pool: p, gpus: [0, 1]}}")
    holdings.refresh(20.0)
    assert holdings.replicas()[0].since_s == 10.0
    path.write_text("replicas: {a: {pool: p, gpus: [0, 1], state: draining}}")
    holdings.refresh(30.0)
    assert holdings.replicas()[0].since_s == 30.0


def test_options_name_variable_value_and_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """From arguments, then the environment; errors say what to set."""
    monkeypatch.setenv("FLEETLOOP_NVML_PERIOD_S", "2")
    assert NvmlOptions.of(node=None).period_s == 2
    with pytest.raises(SettingsError, match="FLEETLOOP_NVML_NODE: 'a/b'"):
        NvmlOptions.of(node="a/b")
