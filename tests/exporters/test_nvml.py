"""The GPU exporter as a process without a broker: what it publishes, hangs, a driver that goes, and its threads."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import pynvml as nv
import pytest

from exporters import nvml as exporter
from exporters import nvml_events
from exporters.nvml import NvmlExporter, NvmlOptions, Worker, run_nvml
from exporters.nvml_reader import NvmlReader
from schemas.base import decode
from schemas.config import Deployment
from schemas.errors import SettingsError, UnavailableError
from schemas.node import GPU_SAMPLES, PROCESS_SAMPLES, NodeInventory
from streams.settings import Settings
from tests.exporters.conftest import Producer, Sent, until
from tests.exporters.nvml_stub import Stub
from tests.exporters.test_processes import Host


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread of events looks often whether it should end."""
    monkeypatch.setattr(nvml_events, "WAIT_MS", 50)


def _options(**given: Any) -> NvmlOptions:
    return NvmlOptions.of(node="node-1", **{"period_s": 0.1, "process_s": 0.2, "slow_s": 0.5, **given})


def _of(kind: str) -> list[Sent]:
    return [record for record in Producer.made[0].records if record.type == kind] if Producer.made else []


def _samples() -> list[Sent]:
    return _of(GPU_SAMPLES.type)


def _statuses(row: int = 0) -> list[str | None]:
    return [record.batch().text("status")[row] for record in _samples()]


def _inventories() -> list[NodeInventory]:
    return [decode(NodeInventory, record.value) for record in _of("fleetloop.node.inventory.v1")]


class Run:
    """The exporter under way."""

    def __init__(self, settings: Settings, deployment: Deployment, options: NvmlOptions) -> None:
        self._stop = asyncio.Event()
        self._task = asyncio.create_task(run_nvml(settings, deployment, options, self._stop))

    async def until(self, condition: Any) -> None:
        """Waits; an exporter that ended with an error is an error here."""
        await until(lambda: self._task.done() or condition())
        if self._task.done():
            self._task.result()

    async def stop(self) -> None:
        self._stop.set()
        await asyncio.wait_for(self._task, 10)


async def test_without_a_driver_it_says_so(stub: Stub, settings: Settings, deployment: Deployment) -> None:
    """No driver at the start raises (the command exits non-zero), before anything is published."""
    stub.set({"error.nvmlInitWithFlags": nv.NVML_ERROR_LIBRARY_NOT_FOUND})
    with pytest.raises(UnavailableError, match=r"libnvidia-ml\.so"):
        await run_nvml(settings, deployment, _options(), asyncio.Event())
    assert Producer.made == []


async def test_it_publishes_samples_and_inventory(
    stub: Stub, settings: Settings, deployment: Deployment, tmp_path: Path
) -> None:
    """Batches are numbered and named, the mapping is in the inventory, a change of it is said at once, a bad one not
    taken, and NVML is never called on the event loop."""
    stub.set(gpus=2)
    mapping = tmp_path / "mapping.yaml"
    mapping.write_text("replicas: {chat-0: {pool: chat, gpus: [0, 1]}}")
    run = Run(settings, deployment, _options(mapping_file=mapping))
    await run.until(lambda: len(_samples()) >= 3)
    mapping.write_text("replicas: {chat-0: {pool: chat, gpus: [0], state: draining}}")
    await run.until(lambda: len(_inventories()) >= 2)
    mapping.write_text("replicas: {chat-0: {pool: chat, gpus: nonsense}}")
    count = len(_samples())
    await run.until(lambda: len(_samples()) >= count + 3)
    await run.stop()

    records = Producer.made[0].records
    metas = [record.batch().meta for record in _samples()]
    assert [meta["seq"] for meta in metas] == sorted({meta["seq"] for meta in metas}, key=int)
    assert {(meta["node"], meta["dropped"]) for meta in metas} == {("node-1", "0")}
    assert len({record.id for record in records}) == len(records)
    assert {record.key for record in records} == {"node-1"}
    assert _samples()[0].batch().text("status") == ["ok", "ok"]
    inventories = _inventories()
    assert [gpu.gpu_type for gpu in inventories[0].gpus] == ["H100", "H100"]
    assert inventories[0].gpus[0].mem_total_bytes == 80 * 2**30
    said = [(one.replicas[0].state, one.replicas[0].gpus) for one in inventories]
    assert said == [("ready", [0, 1]), ("draining", [0])]
    assert stub.calls_of_thread(threading.get_native_id()) == 0


async def test_dropped_batches_are_said_in_the_next(stub: Stub, settings: Settings, deployment: Deployment) -> None:
    """What the producer had to drop since the start is in the metadata of every batch after it."""
    run = Run(settings, deployment, _options())
    await run.until(_samples)
    Producer.made[0].dropped["node.samples"] = 7
    await run.until(lambda: _samples()[-1].batch().meta["dropped"] == "7")
    await run.stop()


async def test_processes_become_replicas_of_the_inventory(
    stub: Stub, settings: Settings, deployment: Deployment, tmp_path: Path
) -> None:
    """A process is a row with its share and owner; its replica is in the inventory without anybody having listed it."""
    host = Host(tmp_path / "host")
    host.process(4711, command="vllm serve model --port 8001", cpu_ticks=250)
    mapping = tmp_path / "mapping.yaml"
    mapping.write_text(
        r"match: [{command: '--port (?P<port>\d+)', pool: chat, replica: $node-$port, tenant: acme, gpu_share: 0.5}]"
    )
    stub.set({"processes@0": "4711:1073741824", "utilisation@0": "4711:30:20"})
    run = Run(settings, deployment, _options(mapping_file=mapping, proc=host.proc))
    await run.until(lambda: len(_of(PROCESS_SAMPLES.type)) >= 2)
    await run.until(lambda: any(one.replicas for one in _inventories()))
    stub.set({"utilisation@0": "4711:60:20"})
    await run.until(lambda: _of(PROCESS_SAMPLES.type)[-1].batch().numbers["sm_util_pct"][0] == 60)
    await run.stop()
    batch = _of(PROCESS_SAMPLES.type)[-1].batch()
    assert [batch.text(name) for name in ("replica", "tenant", "name")] == [["node-1-8001"], ["acme"], ["engine"]]
    numbers = {name: batch.numbers[name].tolist() for name in ("gpu", "pid", "gone", "mem_bytes", "cpu_s", "host_cpus")}
    ticks = os.sysconf("SC_CLK_TCK")
    assert numbers == {
        "gpu": [0],
        "pid": [4711],
        "gone": [0],
        "mem_bytes": [2**30],
        "cpu_s": [250 / ticks],
        "host_cpus": [os.cpu_count()],
    }
    (replica,) = _inventories()[-1].replicas
    assert (replica.replica, replica.pool, replica.gpus, replica.gpu_share) == ("node-1-8001", "chat", [0], 0.5)
    assert replica.state == "ready"


async def test_a_hanging_driver_skips_ticks(
    stub: Stub, settings: Settings, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a call hangs nothing is queued, the process says that it is not ready, and it still stops."""
    monkeypatch.setattr(exporter, "HANGS_AFTER_S", 0.3)
    with Worker("nvml") as worker:
        reader = NvmlReader()
        await worker.call(reader.open)
        one = NvmlExporter(settings, deployment, _options(), reader, worker)
        stub.set({"sleep_ms.nvmlDeviceGetUtilizationRates": 60_000})
        stop = asyncio.Event()
        running = asyncio.create_task(one.run(stop))
        await until(lambda: one.edge.unready)
        assert stub.calls("nvmlDeviceGetUtilizationRates") == 1
        stub.set({"sleep_ms.nvmlDeviceGetUtilizationRates": None})
        await until(lambda: not one.edge.unready and _samples())
        stub.set({"sleep_ms.nvmlDeviceGetUtilizationRates": 60_000})
        await until(lambda: one.edge.unready)
        stop.set()
        await asyncio.wait_for(running, 10)
        stub.set({"sleep_ms.nvmlDeviceGetUtilizationRates": None})
        await worker.call(reader.close)


@pytest.mark.parametrize("error", [nv.NVML_ERROR_DRIVER_NOT_LOADED, nv.NVML_ERROR_LIB_RM_VERSION_MISMATCH])
async def test_a_driver_that_goes_is_looked_for_again(
    stub: Stub, settings: Settings, deployment: Deployment, error: int
) -> None:
    """Every GPU is lost while the driver is gone, and back when it is, with its index and replica."""
    stub.set(gpus=2)
    run = Run(settings, deployment, _options())
    await run.until(lambda: "ok" in _statuses())
    stub.set({"error.nvmlDeviceGetFieldValues": error, "error.nvmlInitWithFlags": error})
    await run.until(lambda: _statuses(1).count("lost") >= 2)
    stub.set({"error.nvmlDeviceGetFieldValues": None, "error.nvmlInitWithFlags": None})
    await run.until(lambda: _statuses(1)[-1] == "ok")
    await run.stop()
    assert {tuple(record.batch().numbers["gpu"]) for record in _samples()} == {(0, 1)}


def test_options_name_variable_value_and_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """From arguments, then the environment; errors say what to set."""
    monkeypatch.setenv("FLEETLOOP_NVML_PERIOD_S", "2")
    assert NvmlOptions.of(node=None).period_s == 2
    with pytest.raises(SettingsError, match="FLEETLOOP_NVML_NODE: 'a/b'"):
        NvmlOptions.of(node="a/b")
    with pytest.raises(SettingsError, match="FLEETLOOP_NVML_GPU_TYPES"):
        NvmlOptions.of(gpu_types={"NVIDIA H100": "H100/80"})
