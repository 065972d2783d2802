"""`fleetloop export nvml` as a process: a stand-in for the driver's library, a real Kafka, and what goes wrong."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pynvml as nv
import pytest

from schemas.base import decode
from schemas.columns import Batch
from schemas.node import GPU_SAMPLES, PROCESS_SAMPLES, NodeInventory
from schemas.topics import NODE_SAMPLES
from streams.broker import LocalBroker
from streams.deployment import ensure_deployment
from streams.reader import header, read_to_end
from streams.settings import Settings, load_settings
from tests.exporters.nvml_stub import Stub
from tests.exporters.test_processes import Host

COMMAND = Path(sys.executable).with_name("fleetloop")
NODE = "gpu-node-1"


class Exporter:
    """The process, its answers, and what has come of it on the topic."""

    def __init__(self, settings: Settings, library: Path, folder: Path, **environment: str) -> None:
        self.settings, self.stub, self.host = settings, Stub(folder / "nvml.stub", gpus=8), Host(folder)
        self._log = folder / "exporter.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._environment = {
            **os.environ,
            "LD_LIBRARY_PATH": str(library.parent),
            "NVML_STUB_FILE": str(self.stub.path),
            "FLEETLOOP_BOOTSTRAP_SERVERS": settings.bootstrap_servers,
            "FLEETLOOP_TOPIC_PREFIX": settings.topic_prefix,
            "FLEETLOOP_EDGE_BUFFER_BYTES": str(settings.edge_buffer_bytes),
            "FLEETLOOP_NVML_PERIOD_S": "0.2",
            "FLEETLOOP_NVML_PROCESS_S": "0.4",
            "FLEETLOOP_NVML_SLOW_S": "1",
            "FLEETLOOP_NVML_RETRY_S_MAX": "1",
            "FLEETLOOP_NVML_PROC": str(self.host.proc),
            "FLEETLOOP_NVML_HEALTH_PORT": str(self.port),
            **environment,
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Runs the command as an operator would."""
        with self._log.open("wb") as log:
            command = [str(COMMAND), "export", "nvml", "--node", NODE]
            self._process = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)

    @property
    def said(self) -> str:
        """Its log."""
        return self._log.read_text()

    def running(self) -> bool:
        assert self._process is not None
        return self._process.poll() is None

    def end(self) -> int:
        """SIGTERM; the exit status."""
        assert self._process is not None
        if self.running():
            self._process.send_signal(signal.SIGTERM)
        return self._process.wait(20)

    def kill(self) -> None:
        """For the end of a test that failed."""
        if self._process is not None and self.running():
            self._process.kill()
            self._process.wait(20)

    async def records(self) -> AsyncIterator[Any]:
        async for record in read_to_end(self.settings, NODE_SAMPLES):
            if record.key == NODE.encode():
                yield record

    async def batches(self, kind: Any = GPU_SAMPLES) -> list[Batch]:
        """All batches of a kind, nothing refused."""
        out = [
            kind.decode(record.value, header(record, "content-type"))
            async for record in self.records()
            if header(record, "ce_type") == kind.type
        ]
        assert all(batch.refused == [] for batch in out)
        return out

    async def inventory(self) -> NodeInventory:
        """The last one."""
        found = [
            decode(NodeInventory, record.value)
            async for record in self.records()
            if header(record, "ce_type") == "fleetloop.node.inventory.v1"
        ]
        return found[-1]

    async def until(self, condition: Callable[[dict[int, dict[str, Any]]], Any]) -> dict[int, dict[str, Any]]:
        """Waits until the last batch of samples, by GPU, is as wanted."""
        found = await self.until_batches(lambda batches: batches and condition(_rows(batches[-1])))
        return _rows(found[-1])

    async def until_batches(self, condition: Callable[[list[Batch]], Any]) -> list[Batch]:
        """Waits until the batches of samples are as wanted; an exporter that ends before is an error."""
        async with asyncio.timeout(60):
            while not condition(batches := await self.batches()):
                assert self.running(), self.said
                await asyncio.sleep(0.2)
        return batches

    async def get(self, path: str) -> str:
        """A page of its health port."""

        def read() -> str:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
                return str(answer.read().decode())

        return await asyncio.to_thread(read)

    async def metrics(self) -> dict[str, float]:
        """Its metrics by name, without labels."""
        lines = (await self.get("/metrics")).splitlines()
        return {re.split("[{ ]", line)[0]: float(line.split()[-1]) for line in lines if line[0] != "#"}


def _rows(batch: Batch) -> dict[int, dict[str, Any]]:
    columns: dict[str, list[Any]] = {name: values.tolist() for name, values in batch.numbers.items()}
    columns["status"] = batch.text("status")
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return {int(row["gpu"]): row for row in rows}


@pytest.fixture
def launch(nvml_library: Path, topic_prefix: str, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Makes an exporter for a broker; it is ended with the test."""
    made: list[Exporter] = []

    async def make(broker: LocalBroker, *, buffer_bytes: int | None = None, **environment: str) -> Exporter:
        more = {} if buffer_bytes is None else {"edge_buffer_bytes": buffer_bytes}
        settings = load_settings(bootstrap_servers=broker.bootstrap_servers, topic_prefix=topic_prefix, **more)
        await ensure_deployment(settings, local=True)
        made.append(Exporter(settings, nvml_library, tmp_path, **environment))
        return made[-1]

    yield make
    for one in made:
        one.kill()


async def test_eight_gpus_one_of_them_cut(launch: Callable[..., Any], broker: LocalBroker, tmp_path: Path) -> None:
    """Samples, processes with their owner, Xid errors and inventory are on the topic; the process says what it costs
    itself, and SIGTERM ends it in order."""
    mapping = tmp_path / "mapping.yaml"
    mapping.write_text(r"match: [{command: '--port (?P<port>\d+)', pool: chat, replica: $node-$port, tenant: acme}]")
    exporter = await launch(broker, FLEETLOOP_NVML_MAPPING_FILE=str(mapping))
    exporter.host.process(40, command="vllm serve m --port 8001", cpu_ticks=500)
    exporter.host.process(41, command="vllm serve m --port 8002")
    exporter.stub.set(
        {
            "mig@7": "1:1g.10gb,2:2g.20gb",
            "processes@0": f"40:{2**30},99:{2**20}",
            "processes@7": f"41:{2**29}:2",
            "utilisation@0": "40:30:20,0:5:5",
            "field.83": "1000000+1000",
            "field.83@3": "5000%2000",
        }
    )
    exporter.start()
    rows = await exporter.until(lambda rows: rows[0]["sm_active_ratio"] > 0 and len(rows) == 10)
    assert list(rows) == [*range(8), 129, 130]
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert rows[130]["parent"] == 7
    assert rows[130]["power_w"] != rows[130]["power_w"]  # null: the board's
    assert rows[130]["sm_active_ratio"] == pytest.approx(0.64)
    assert rows[3]["energy_j"] == pytest.approx(1.0)
    exporter.stub.set({"event@2": f"1:{nv.nvmlEventTypeXidCriticalError}:79"})
    await exporter.until(lambda rows: rows[2]["xid"] == 79)

    (batch, *_) = (await exporter.batches(PROCESS_SAMPLES))[-1:]
    found = {pid: i for i, pid in enumerate(batch.numbers["pid"].astype(int).tolist())}
    assert batch.text("replica")[found[40]] == f"{NODE}-8001"
    assert batch.text("tenant")[found[40]] == "acme"
    assert batch.numbers["sm_util_pct"][found[40]] == 30
    assert batch.numbers["gpu"][found[41]] == 130
    assert batch.numbers["gone"].tolist() == [1 if pid == 99 else 0 for pid in found]
    inventory = await exporter.inventory()
    assert [(one.gpu, one.parent, one.mig_profile) for one in inventory.gpus[7:]] == [
        (7, None, ""),
        (129, 7, "1g.10gb"),
        (130, 7, "2g.20gb"),
    ]
    assert [(one.replica, one.gpus, one.state) for one in inventory.replicas] == [
        (f"{NODE}-8001", [0], "ready"),
        (f"{NODE}-8002", [130], "ready"),
    ]
    batches = await exporter.batches()
    energy = [_rows(batch)[0]["energy_j"] for batch in batches]
    assert energy == sorted(energy)
    assert energy[-1] > energy[0]
    assert exporter.end() == 0, exporter.said


async def test_what_it_costs_itself_is_exported(launch: Callable[..., Any], broker: LocalBroker) -> None:
    """CPU seconds and resident bytes of the process, and the time that the driver says it spent on us."""
    exporter = await launch(broker)
    exporter.stub.set(latency_us=7)
    exporter.start()
    await exporter.until(lambda rows: rows[0]["status"] == "ok")
    values = await exporter.metrics()
    assert values["process_cpu_seconds_total"] > 0
    assert values["process_resident_memory_bytes"] > 10 * 2**20
    assert values["fleetloop_nvml_latency_seconds_total"] >= 8 * 14 * 7e-6
    assert values["fleetloop_exporter_rows_total"] >= 8
    assert await exporter.get("/readyz") == "ready\n"
    assert exporter.end() == 0


async def test_a_gpu_off_the_bus_and_a_driver_that_goes(launch: Callable[..., Any], broker: LocalBroker) -> None:
    """One GPU is lost while seven go on; it is unplugged and comes back with its index; then the whole driver goes, all
    are lost, and come back - all in one life of the process."""
    exporter = await launch(broker)
    exporter.start()
    await exporter.until(lambda rows: len(rows) == 8)
    exporter.stub.set({"error.*@5": nv.NVML_ERROR_GPU_IS_LOST, "absent@5": 1})
    rows = await exporter.until(lambda rows: rows[5]["status"] == "lost")
    assert [row["status"] for gpu, row in rows.items() if gpu != 5] == ["ok"] * 7
    assert rows[5]["power_w"] != rows[5]["power_w"]
    assert [one.gpu for one in (await exporter.inventory()).gpus] == list(range(8))
    exporter.stub.set({"error.*@5": None, "absent@5": None})
    await exporter.until(lambda rows: rows[5]["status"] == "ok")
    mismatch = nv.NVML_ERROR_LIB_RM_VERSION_MISMATCH
    functions = ("nvmlDeviceGetUtilizationRates", "nvmlInitWithFlags")
    exporter.stub.set({f"error.{name}": mismatch for name in functions})
    rows = await exporter.until(lambda rows: rows[0]["status"] == "lost")
    assert {row["status"] for row in rows.values()} == {"lost"}
    exporter.stub.set({f"error.{name}": None for name in functions})
    rows = await exporter.until(lambda rows: rows[0]["status"] == "ok")
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert exporter.end() == 0
    assert re.search("upgraded underneath.*[Rr]estart", exporter.said)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (nv.NVML_ERROR_DRIVER_NOT_LOADED, "nvidia-smi"),
        (nv.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "upgraded underneath"),
        (None, "libnvidia-ml.so.1"),
    ],
)
async def test_without_a_driver_it_ends_and_says_why(
    launch: Callable[..., Any], broker: LocalBroker, tmp_path: Path, code: int | None, said: str
) -> None:
    """The exit status and one sentence with the remedy; also where there is no library at all."""
    environment = {"LD_LIBRARY_PATH": str(tmp_path / "nowhere")} if code is None else {}
    exporter = await launch(broker, **environment)
    exporter.stub.set({"error.nvmlInitWithFlags": code})
    exporter.start()
    async with asyncio.timeout(60):
        while exporter.running():  # noqa: ASYNC110 - a process has no event
            await asyncio.sleep(0.1)
    assert exporter.end() not in (0, -signal.SIGTERM)
    assert said in re.sub(r"\s+", " ", exporter.said)
    assert "Traceback" not in exporter.said


async def test_a_hanging_driver_delays_only_itself(launch: Callable[..., Any], broker: LocalBroker) -> None:
    """Ticks that find a reading under way are skipped and counted, not made up for: the gap stays a gap."""
    exporter = await launch(broker)
    exporter.start()
    await exporter.until(lambda rows: rows[0]["status"] == "ok")
    exporter.stub.set({"sleep_ms.nvmlDeviceGetUtilizationRates@0": 60_000})
    async with asyncio.timeout(60):
        while (await exporter.metrics()).get("fleetloop_exporter_skipped_total", 0) < 10:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    exporter.stub.set({"sleep_ms.nvmlDeviceGetUtilizationRates@0": None})
    batches = await exporter.until_batches(
        lambda batches: batches and time.time() - _rows(batches[-1])[0]["at_s"] < 1 and len(batches) > 3
    )
    at_s = [_rows(batch)[0]["at_s"] for batch in batches]
    assert max(later - earlier for earlier, later in pairwise(at_s)) > 1.9
    assert exporter.end() == 0


async def test_an_outage_of_the_broker(launch: Callable[..., Any], own_broker: Callable[[], LocalBroker]) -> None:
    """While the broker is away the oldest batches go, the newest stay, and the batches afterwards say how many went."""
    broker = own_broker()
    exporter = await launch(broker, buffer_bytes=128 * 1024, FLEETLOOP_NVML_PERIOD_S="0.1")
    exporter.start()
    await exporter.until(lambda rows: rows[0]["status"] == "ok")
    await asyncio.to_thread(broker.kill)
    await asyncio.sleep(5)  # 50 readings of 7 KB; 18 fit
    assert exporter.running()
    await asyncio.to_thread(broker.restart)
    back_s = time.time()

    def dropped(batch: Batch) -> int:
        return int(batch.meta["dropped"])

    await exporter.until_batches(lambda batches: batches and _rows(batches[-1])[0]["at_s"] > back_s + 5)
    assert exporter.end() == 0
    batches = [*await exporter.batches(), *await exporter.batches(PROCESS_SAMPLES)]
    numbers = sorted({int(batch.meta["seq"]) for batch in batches})
    missing = set(range(1, numbers[-1] + 1)) - set(numbers)
    told = max(dropped(batch) for batch in batches)
    assert 0 < len(missing) <= told  # inventories are dropped and counted as well
    assert max(missing) < numbers[-1]
    assert numbers[-2:] == [numbers[-1] - 1, numbers[-1]]
