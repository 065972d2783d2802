"""GPU exporter: what NVML says of this host's GPUs, once a second, and who is who on it.

NVML is only ever called on one thread of its own: a call that hangs delays neither the broker nor the next tick, which
is skipped. While the driver is gone every GPU is said to be lost, and the driver is looked for again.
"""

from __future__ import annotations

import asyncio
import queue
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from exporters.edge import Edge, declare, options_of, ticks
from exporters.inventory import Holdings
from exporters.nvml_reader import DriverGone, NvmlReader
from schemas.base import Name
from schemas.config import Deployment
from schemas.errors import SettingsError
from schemas.log import CONTENT_ARROW
from schemas.node import GPU_SAMPLES, NodeInventory
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
    gpu_types: dict[str, str] = Field(
        {}, description="JSON: NVML product name -> name in the price list, where the usual one does not fit."
    )
    period_s: float = Field(1.0, ge=0.1, le=60, description="Time between two readings, s.")
    inventory_s: float = Field(30.0, ge=1, le=60, description="Longest time between two inventories, s.")
    retry_s_max: float = Field(30.0, ge=1, le=600, description="Longest wait before a lost driver is looked for, s.")
    health_port: int = Field(0, ge=-1, le=65535, description="Port of /healthz, /readyz, /metrics; 0: none, -1: any.")

    @classmethod
    def of(cls, **given: Any) -> NvmlOptions:
        """From arguments (None: not given), then the environment. Raises SettingsError."""
        return options_of(cls, given)


declare(NvmlOptions)


async def run_nvml(settings: Settings, deployment: Deployment, options: NvmlOptions, stop: asyncio.Event) -> None:
    """Publishes until `stop` is set. Raises UnavailableError without a driver, SettingsError for the mapping."""
    reader = NvmlReader(options.gpu_types)
    with Worker("nvml") as worker:
        await worker.call(reader.open)  # no driver at the start is an error: somebody has to know
        holdings = Holdings(options.mapping_file)
        holdings.refresh(fleet_now_ms(deployment) / 1000)
        exporter = NvmlExporter(settings, deployment, options, reader, holdings, worker)
        try:
            await exporter.run(stop)
        finally:
            worker.post(reader.close)


class NvmlExporter:
    """Readings and inventories of one host, onto node.samples."""

    def __init__(
        self,
        settings: Settings,
        deployment: Deployment,
        options: NvmlOptions,
        reader: NvmlReader,
        holdings: Holdings,
        worker: Worker,
    ) -> None:
        self.options, self.reader, self.holdings, self.worker = options, reader, holdings, worker
        self.edge = Edge(settings, deployment, "nvml", options.node, options.health_port)
        self._reading: asyncio.Task[None] | None = None
        self._began = 0.0
        self._driver = True
        self._retry_at = self._retry_s = 0.0
        self._said: bytes = b""
        self._said_at = -1e9

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set."""
        async with self.edge:
            async for _ in ticks(self.options.period_s, stop):
                self.tick()
            if self._reading is not None:
                self._reading.cancel()
                await asyncio.gather(self._reading, return_exceptions=True)

    def tick(self) -> None:
        """Begins a reading, unless the last one has not ended; says who is who where that is due."""
        self._publish_inventory()
        if self._reading is None or self._reading.done():
            if self._reading is not None and not self._reading.cancelled():
                self._reading.result()  # our bugs end the process
            self.edge.unready = [] if self._driver else ["the driver does not answer"]
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
        rows = await self.worker.call(self._rows)
        self.edge.metrics.read(len(rows), time.monotonic() - began)
        for name, count in self.reader.failures.items():
            self.edge.metrics.failed(name, count)
        self.reader.failures = {}
        if rows:
            self._publish(rows)

    def _rows(self) -> list[dict[str, Any]]:
        """On the worker's thread: a reading, or `lost` for every GPU while the driver is gone."""
        try:
            if not self._driver and time.monotonic() >= self._retry_at:
                self.reader.open()
                self._driver, self._retry_s = True, 0.0
                log.info("the driver is back", gpus=len(self.reader.gpus))
            if self._driver:
                return self.reader.read(self.edge.at_s)
        except DriverGone as error:
            if self._driver:
                log.error("the driver is gone", error=str(error))
                self.reader.close()
            self._driver = False
            self._retry_s = min(self.options.retry_s_max, self._retry_s * 2 or 1.0)
            self._retry_at = time.monotonic() + self._retry_s
        return self.reader.lost(self.edge.at_s())

    def _publish(self, rows: list[dict[str, Any]]) -> None:
        seq, id = self.edge.next_batch()
        meta = {
            "node": self.options.node,
            "start_s": self.edge.start_s,
            "seq": seq,
            "dropped": self.edge.dropped(NODE_SAMPLES),
        }
        columns = {name: [row.get(name) for row in rows] for name in GPU_SAMPLES.columns}
        value = GPU_SAMPLES.encode(columns, meta)
        self.edge.producer.send(
            NODE_SAMPLES, self.options.node, value, type=GPU_SAMPLES.type, id=id, content_type=CONTENT_ARROW
        )

    def _publish_inventory(self) -> None:
        try:
            self.holdings.refresh(self.edge.at_s())
        except SettingsError as error:
            self.edge.metrics.failed("mapping")
            log.error("the mapping cannot be used; the one before holds", error=str(error))
        record = NodeInventory(
            node=self.options.node,
            cluster=self.options.cluster,
            at_s=0.0,
            gpus=self.reader.inventory(),
            replicas=self.holdings.replicas(),
        )
        content = record.encode()
        now = time.monotonic()
        if content == self._said and now - self._said_at < self.options.inventory_s:
            return
        self._said, self._said_at = content, now
        at_s = self.edge.at_s()
        self.edge.producer.send(
            NODE_SAMPLES,
            self.options.node,
            record.model_copy(update={"at_s": at_s}).encode(),
            type=ce_type(NodeInventory.kind),
            id=f"nvml/{self.options.node}/{at_s:.3f}",
        )


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
