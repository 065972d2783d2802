"""GPU exporter: what NVML says of this host's GPUs, once a second, who is on them, and who is who on the host.

NVML is never called on the event loop: all is read and made into records on one thread, events are waited for on
another. A call that hangs delays neither the broker nor the next tick, which is skipped. While the driver is gone every
GPU is said to be lost, and the driver is looked for again.

The driver's own sample buffers (nvmlDeviceGetSamples) are left alone: their rate and clock are not documented, they run
dry on an idle GPU, and GPM and the driver's energy and throttle counters say more of the same second in fewer calls.
"""

from __future__ import annotations

import asyncio
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import structlog
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from exporters.edge import Edge, declare, options_of, ticks
from exporters.inventory import Holdings
from exporters.nvml_library import DriverGone
from exporters.nvml_reader import NvmlReader
from exporters.occupants import Occupants
from exporters.pods import Pods
from exporters.processes import Processes
from schemas.base import Name
from schemas.columns import Columns
from schemas.config import Deployment
from schemas.errors import SettingsError
from schemas.log import CONTENT_ARROW
from schemas.node import GPU_SAMPLES, PROCESS_SAMPLES, GpuEntry, NodeInventory, ReplicaEntry
from schemas.topics import NODE_SAMPLES, ce_type
from streams.deployment import fleet_now_ms
from streams.settings import Settings

log = structlog.get_logger(__name__)

HANGS_AFTER_S = 10.0


class NvmlOptions(BaseSettings):
    """Options of the GPU exporter; environment FLEETLOOP_NVML_<NAME>."""

    model_config = SettingsConfigDict(env_prefix="FLEETLOOP_NVML_", frozen=True)

    node: Name = Field(default_factory=socket.gethostname, description="Node name (default: the host's name).")
    cluster: Name = Field("local", description="Cluster that the node belongs to.")
    mapping_file: Path | None = Field(
        None, description="YAML file: which replica of which pool runs on which GPUs; read again when it changes."
    )
    gpu_types: dict[str, Name] = Field(
        {}, description="JSON: NVML product name -> name in the price list, where the usual one does not fit."
    )
    period_s: float = Field(1.0, ge=0.1, le=60, description="Time between two readings, s.")
    process_s: float = Field(5.0, ge=0.1, le=600, description="Time between two looks at processes, s.")
    slow_s: float = Field(
        30.0, ge=0.1, le=600, description="Time between two looks at ECC, row remapping, limits and MIG layout, s."
    )
    inventory_s: float = Field(30.0, ge=1, le=60, description="Longest time between two inventories, s.")
    retry_s_max: float = Field(30.0, ge=1, le=600, description="Longest wait before a lost driver is looked for, s.")
    proc: Path = Field(
        Path("/proc"), description="Where the host's /proc is; it takes the host's process namespace to see processes."
    )
    pod_resources: Path | None = Field(
        None, description="Kubelet's socket (/var/lib/kubelet/pod-resources/kubelet.sock): which pods hold which GPUs."
    )
    pod_logs: Path | None = Field(
        Path("/var/log/pods"), description="Kubelet's log folder, where the names of pods are found by their uid."
    )
    health_port: int = Field(0, ge=-1, le=65535, description="Port of /healthz, /readyz, /metrics; 0: none, -1: any.")

    @classmethod
    def of(cls, **given: Any) -> NvmlOptions:
        """From arguments (None: not given), then the environment. Raises SettingsError."""
        return options_of(cls, given)


declare(NvmlOptions)


METRICS = {
    "fleetloop_nvml_latency_seconds_total": "Time that the driver says it spent on our grouped calls (latencyUsec).",
    "fleetloop_nvml_processes_dropped_total": "Processes left out because a look found too many.",
}
"""Name -> help. CPU and memory of the exporter itself: process_cpu_seconds_total, process_resident_memory_bytes."""


async def run_nvml(settings: Settings, deployment: Deployment, options: NvmlOptions, stop: asyncio.Event) -> None:
    """Publishes until `stop` is set. Raises UnavailableError without a driver, SettingsError for the mapping."""
    reader = NvmlReader(options.gpu_types, options.slow_s, options.proc)
    with Worker("nvml") as worker:
        await worker.call(reader.open)  # no driver at the start is an error: somebody has to know
        exporter = NvmlExporter(settings, deployment, options, reader, worker)
        exporter.holdings.refresh(fleet_now_ms(deployment) / 1000)
        try:
            await exporter.run(stop)
        finally:
            worker.post(reader.close)


class _Reading(NamedTuple):
    rows: int
    records: list[tuple[Columns, bytes, str]]
    """Kind, value and id of each."""


class NvmlExporter(Collector):
    """Readings and inventories of one host, onto node.samples."""

    def __init__(
        self, settings: Settings, deployment: Deployment, options: NvmlOptions, reader: NvmlReader, worker: Worker
    ) -> None:
        self.options, self.reader, self.worker = options, reader, worker
        self.edge = Edge(settings, deployment, "nvml", options.node, options.health_port, collectors=[self])
        self.holdings = Holdings(options.mapping_file, options.node)
        self.occupants = Occupants(
            options.node, Processes(options.proc), Pods(options.pod_resources, options.pod_logs), self.holdings
        )
        self._reading: asyncio.Task[None] | None = None
        self._began = 0.0
        self._gone = ""
        """Why the driver does not answer; empty while it does."""
        self._retry_at = self._retry_s = self._processes_at = 0.0
        self._said: tuple[list[GpuEntry], list[ReplicaEntry]] | None = None
        self._said_at = 0.0

    def collect(self) -> Iterable[Metric]:
        """See Collector."""
        for name, value in zip(METRICS, (self.reader.latency_s, self.occupants.dropped), strict=True):
            family = CounterMetricFamily(name, METRICS[name], labels=["exporter"])
            family.add_metric([self.edge.name], value)
            yield family

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set."""
        if not self.occupants.processes.whole:
            log.warning(
                "processes of other containers cannot be seen: start this exporter in the host's process namespace "
                "(hostPID: true) as root, or mount the host's /proc and set FLEETLOOP_NVML_PROC"
            )
        async with self.edge:
            async for _ in ticks(self.options.period_s, stop):
                self.tick()
            if self._reading is not None:
                self._reading.cancel()
                await asyncio.gather(self._reading, return_exceptions=True)

    def tick(self) -> None:
        """Begins a reading, unless the last one has not ended; says who is who where that is due."""
        if self._said is not None:
            self._say_who()
        if self._reading is None or self._reading.done():
            if self._reading is not None and not self._reading.cancelled():
                self._reading.result()  # our bugs end the process
            self.edge.unready = [self._gone] if self._gone else []
            self._began = time.monotonic()
            self._reading = asyncio.create_task(self._read())
            return
        self.edge.metrics.skipped()
        hangs_s = time.monotonic() - self._began
        if hangs_s > HANGS_AFTER_S and not self.edge.unready:
            log.error("NVML does not answer", since_s=round(hangs_s, 1))
            self.edge.unready = [f"NVML has not answered for {HANGS_AFTER_S:.0f} s"]

    async def _read(self) -> None:
        began = time.monotonic()
        reading = await self.worker.call(self._take)
        self.edge.metrics.read(reading.rows, time.monotonic() - began)
        self._say_who()
        for kind, value, id in reading.records:
            self.edge.producer.send(
                NODE_SAMPLES, self.options.node, value, type=kind.type, id=id, content_type=CONTENT_ARROW
            )

    def _say_who(self) -> None:
        who = (self.reader.inventory, self.holdings.replicas())
        now = time.monotonic()
        same = self._said is not None and who[0] is self._said[0] and who[1] is self._said[1]
        if same and now - self._said_at < self.options.inventory_s:
            return
        self._said, self._said_at = who, now
        at_s = self.edge.at_s()
        record = NodeInventory(
            node=self.options.node, cluster=self.options.cluster, at_s=at_s, gpus=who[0], replicas=who[1]
        )
        self.edge.producer.send(
            NODE_SAMPLES,
            self.options.node,
            record.encode(),
            type=ce_type(NodeInventory.kind),
            id=f"nvml/{self.options.node}/{at_s:.3f}",  # batches are numbered on the other thread
        )

    # -- on the worker's thread ------------------------------------------------------------------------------

    def _take(self) -> _Reading:
        try:
            self.holdings.refresh(self.edge.at_s())
        except SettingsError as error:
            self.edge.metrics.failed("mapping")
            log.error("the mapping cannot be used; the one before holds", error=str(error))
        records = []
        rows = self._rows()
        if rows:
            records.append(
                self._record(GPU_SAMPLES, {name: [r.get(name) for r in rows] for name in GPU_SAMPLES.columns})
            )
        if not self._gone and time.monotonic() >= self._processes_at:
            self._processes_at = time.monotonic() + self.options.process_s - 0.01  # due with a tick, not after it
            found = self._occupants()
            if found["gpu"]:
                records.append(self._record(PROCESS_SAMPLES, found))
        for failures in (self.reader.failures, self.holdings.failures, self.occupants.pods.failures):
            for name, count in failures.items():
                self.edge.metrics.failed(name, count)
            failures.clear()
        return _Reading(len(rows), records)

    def _rows(self) -> list[dict[str, Any]]:
        """A reading, or `lost` for every GPU while the driver is gone."""
        try:
            if self._gone and time.monotonic() >= self._retry_at:
                self.reader.open()
                self._gone, self._retry_s = "", 0.0
                log.info("the driver is back", gpus=len(self.reader.gpus), driver=self.reader.driver)
            if not self._gone:
                return self.reader.read(self.edge.at_s)
        except DriverGone as error:
            self._lose(error)
        return self.reader.lost(self.edge.at_s())

    def _occupants(self) -> dict[str, list[Any]]:
        try:
            held = self.reader.processes()
        except DriverGone as error:
            self._lose(error)
            held = {}
        return self.occupants.look(held, self.reader.inventory, self.edge.at_s)

    def _lose(self, error: DriverGone) -> None:
        if not self._gone:
            log.error("the driver is gone", error=str(error))
            self.reader.close()
        self._gone = str(error)
        self._retry_s = min(self.options.retry_s_max, self._retry_s * 2 or 1.0)
        self._retry_at = time.monotonic() + self._retry_s

    def _record(self, kind: Columns, columns: dict[str, list[Any]]) -> tuple[Columns, bytes, str]:
        meta, id = self.edge.node_batch(self.options.node)
        return kind, kind.encode(columns, meta), id


class Worker:
    """One daemon thread for calls that may hang: unlike an executor's, it is never waited for at the end."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def __enter__(self) -> Worker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._calls.put(None)
        self._thread.join(timeout=1.0)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()

    def post(self, function: Callable[[], object]) -> None:
        """Has the thread call a function whose result nobody waits for."""
        self._calls.put(lambda: (function(), None)[1])

    async def call(self, function: Callable[[], Any]) -> Any:
        """What the function returns or raises on the thread."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            if not future.done():
                future.set_exception(error) if error is not None else future.set_result(result)

        def work() -> None:
            result, error = None, None
            try:
                result = function()
            except Exception as raised:
                error = raised
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, result, error)

        self._calls.put(work)
        return await future
