"""Engine exporter: scrapes `/metrics` of inference engines once a second, onto node.samples.

Every target has a slot of its own: a slow, dead or hostile one delays no other. A target that has not answered for 2 s
is said to be dead, once a second, until it answers again.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from urllib.parse import urlsplit
from zlib import crc32

import aiohttp
import structlog
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from exporters.discovery import Discovery
from exporters.edge import Edge
from exporters.engine_batches import Batches
from exporters.engine_inventory import Inventory
from exporters.engine_options import EngineOptions
from exporters.engine_slot import Slot
from exporters.exposition import PageError, lines_of
from exporters.fetch import Credentials, Fetcher, said, tls
from exporters.layout import Layout, Limits
from exporters.pages import PageReader
from exporters.planned import Read, one_a_model
from exporters.targets import Target
from schemas.config import Deployment
from schemas.errors import SettingsError
from schemas.node import ENGINE_HISTOGRAMS, ENGINE_SAMPLES, GPU_SAMPLES
from streams.settings import Settings

__all__ = ["EngineExporter", "EngineOptions", "run_engines"]

log = structlog.get_logger(__name__)

UNKNOWN_NODE = "-"
"""Key of rows whose node nobody knows; their pool is in a column."""
AT_ONCE = 16
"""So many targets of a node are asked at the same moment, so that their rows share a batch."""
LONG_LINES = 2000
"""A page with more takes long to learn, 40 ms and more; those of engines have 100 to 1,200."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")

METRICS = {
    "fleetloop_exporter_targets": "Targets that are scraped, by state: waiting (no answer yet), ok, dead.",
    "fleetloop_exporter_targets_left_out": "Targets that are not scraped, by why: bound, name_taken, invalid.",
    "fleetloop_exporter_layouts_total": "Pages whose layout was learned; a known layout is read far cheaper.",
}


async def run_engines(settings: Settings, deployment: Deployment, options: EngineOptions, stop: asyncio.Event) -> None:
    """Publishes until `stop` is set. Raises SettingsError for options that only a look at files shows to be wrong."""
    exporter = EngineExporter(settings, deployment, options)
    await exporter.run(stop)


class EngineExporter(Collector):
    """Scrapes of engines, wherever they are."""

    def __init__(self, settings: Settings, deployment: Deployment, options: EngineOptions) -> None:
        self.options, self.host = options, socket.gethostname()
        self.edge = Edge(
            settings, deployment, "engines", options.node or self.host, options.health_port, collectors=[self]
        )
        self.batches = Batches(self.edge)
        self.inventory = Inventory(self.edge, options.cluster) if options.inventory == "targets" else None
        self.discovery = Discovery(options, self.apply, self.edge.metrics.failed)
        self.fetcher = Fetcher(
            options.timeout_s,
            options.bytes_max,
            Credentials(options.username, options.password_file, options.token_file),
            tls(options.ca_file, options.cert_file, options.key_file),
        )
        self.slots: dict[str, Slot] = {}
        self.layouts = 0
        # What takes long waits for its like alone: for an event loop's tick, a page of few lines, one of many.
        self._learners = ThreadPoolExecutor(1, "layouts"), ThreadPoolExecutor(1, "long-layouts")
        self._crash: asyncio.Future[None] | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set."""
        self._crash = asyncio.get_running_loop().create_future()
        async with self.edge, self.fetcher:
            others: list[asyncio.Task[Any]] = [
                asyncio.create_task(self.discovery.run()),
                asyncio.create_task(stop.wait()),
            ]
            if self.inventory is not None:
                others.append(asyncio.create_task(self.inventory.run(lambda: self.slots.values())))
            await asyncio.wait({*others, self._crash}, return_when=asyncio.FIRST_COMPLETED)
            await self._end(others)
            ended: list[asyncio.Future[Any]] = [*others, self._crash]
            for one in ended:
                if one.done() and not one.cancelled():
                    one.result()  # our bugs end the process
        for learners in self._learners:
            learners.shutdown(cancel_futures=True)

    async def _end(self, others: list[asyncio.Task[Any]]) -> None:
        for slot in self.slots.values():
            self._drop(slot)
        tasks = [slot.task for slot in self.slots.values() if slot.task is not None]
        for task in others:
            if not task.done():
                task.cancel()
        await asyncio.wait([*others, *tasks], timeout=5)
        self.batches.flush_all()

    # -- targets -----------------------------------------------------------------------------------------------

    def apply(self, targets: dict[str, Target]) -> None:
        """Begins, changes and ends slots, so that exactly these targets are scraped."""
        for replica in [name for name in self.slots if name not in targets]:
            self._drop(self.slots.pop(replica))
        on_node: Counter[str] = Counter()
        for replica, target in targets.items():
            node = self._node(target)
            on_node[node] += 1
            slot = self.slots.get(replica)
            if slot is not None and (slot.target.url, slot.target.engine) == (target.url, target.engine):
                slot.target, slot.node = target, node
                continue
            if slot is not None:
                self._drop(slot)
            self._begin(target, node, on_node[node] // AT_ONCE)
        self.edge.unready[:] = [] if self.slots else ["no targets are known"]

    def _begin(self, target: Target, node: str, group: int) -> None:
        phase = crc32(f"{node}/{group}".encode()) / 2**32
        own = crc32(target.replica.encode()) / 2**32
        limits = Limits(self.options.series_max, self.options.line_bytes_max)
        reader = PageReader(target.engine, self.options.verify_s, own, limits)
        slot = Slot(target, node, own, reader, time.monotonic())
        self.slots[target.replica] = slot
        loop = asyncio.get_running_loop()
        slot.due = loop.time() + phase * self.options.period_s
        slot.timer = loop.call_at(slot.due, self._tick, slot)

    def _drop(self, slot: Slot) -> None:
        if slot.timer is not None:
            slot.timer.cancel()
        if slot.task is not None:
            slot.task.cancel()

    def _node(self, target: Target) -> str:
        here = self.host if (urlsplit(target.url).hostname or "") in LOOPBACK else UNKNOWN_NODE
        return target.node or self.options.node or here

    # -- scrapes -----------------------------------------------------------------------------------------------

    def _tick(self, slot: Slot) -> None:
        """Begins a scrape unless the last one has not ended; says so where the target is dead."""
        loop = asyncio.get_running_loop()
        late = loop.time() - slot.due
        slot.due += self.options.period_s * max(1, -(-late // self.options.period_s))
        slot.timer = loop.call_at(slot.due, self._tick, slot)
        if slot.task is None or slot.task.done():
            slot.task = loop.create_task(self._scrape(slot))
            slot.task.add_done_callback(self._ended)
        else:
            self.edge.metrics.skipped()
        # To the nearest tick: one that comes a little early must not make it a period more.
        if time.monotonic() - slot.answered_at >= self.options.dead_after_s - self.options.period_s / 2:
            slot.dead = True
            self._say_dead(slot)

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and self._crash is not None and not self._crash.done():
            self._crash.set_exception(error)

    async def _scrape(self, slot: Slot) -> None:
        began = time.monotonic()
        slot.scrapes += 1
        histograms = began >= slot.histogram_at
        try:
            page = await self.fetcher.page(slot.target.url)
            at_s = self.edge.at_s()
            lines = lines_of(page.body)
            reads = slot.reader.quick(lines, histograms)
            if reads is None:
                work = slot.reader.slow, lines, page.openmetrics, histograms, began
                reads = await self._learner(lines, *work)
            elif (layout := slot.reader.to_verify(began)) is not None:
                asking = self._learner(lines, layout.agrees, lines, page.openmetrics)
                asking.add_done_callback(partial(_verified, slot.reader, layout))
        except (aiohttp.ClientError, OSError, TimeoutError, UnicodeError, PageError, SettingsError) as error:
            self._failed(slot, error)
            return
        if slot.failure:
            log.info("target answers again", replica=slot.target.replica)
        slot.failure, slot.answered_at, slot.dead = "", began, False
        if histograms:
            first = slot.histogram_at == 0.0  # from then on at moments of its own, not all targets at once
            slot.histogram_at = began + self.options.histogram_s * (slot.phase if first else 1.0)
        self.edge.metrics.read(len(reads), time.monotonic() - began)
        self._count(slot.reader.counts)
        self._take(slot, reads, at_s)
        slot.since_s = at_s

    def _learner(self, lines: list[bytes], *work: Any) -> asyncio.Future[Any]:
        learners = self._learners[len(lines) > LONG_LINES]
        return asyncio.get_running_loop().run_in_executor(learners, *work)

    def _failed(self, slot: Slot, error: Exception) -> None:
        match error:
            case PageError():
                kind = error.what
            case TimeoutError():
                kind = "timeout"
            case SettingsError():
                kind = "credentials"
            case _:
                kind = "connect"
        self.edge.metrics.failed(kind)
        self._count(slot.reader.counts)
        if slot.failure != kind:
            slot.failure = kind
            trace = error.__cause__ if kind == "adapter" else None
            known = {"replica": slot.target.replica, "error": said(error)[:300]}
            log.warning("target does not answer", **known, exc_info=trace)

    def _count(self, counts: Counter[str]) -> None:
        self.layouts += counts.pop("layout_learned", 0)
        for what, count in counts.items():
            if count:
                self.edge.metrics.failed(what, count)
        counts.clear()

    # -- rows --------------------------------------------------------------------------------------------------

    def _take(self, slot: Slot, reads: list[Read], at_s: float) -> None:
        layout = slot.reader.layout
        slot.engine = layout.adapter.engine if layout is not None else slot.engine
        engines = [read for read in reads if read.plan.kind is ENGINE_SAMPLES]
        if engines and self.options.engines == "together":
            engines = one_a_model(engines)
        slot.replicas = [_replica(slot.target.replica, read.plan.key) for read in engines]
        for replica, read in zip(slot.replicas, engines, strict=True):
            self._engine_row(slot, replica, read, at_s)
        if not reads and not slot.is_gpu:
            self.batches.add(ENGINE_SAMPLES, slot.node, self._identity(slot, slot.target.replica, at_s, "ok"))
        for read in reads:
            if read.plan.kind is GPU_SAMPLES:
                self.batches.add(
                    GPU_SAMPLES,
                    slot.node_of(read.plan),
                    {"at_s": at_s, "status": "ok", **read.plan.texts, **read.values},
                )
        if self.inventory is not None:
            self.inventory.seen(slot, reads, slot.answered_at)

    def _engine_row(self, slot: Slot, replica: str, read: Read, at_s: float) -> None:
        start = read.values.get("start_s")
        start_s = None if start is None else self.edge.fleet_s(start)
        row = self._identity(slot, replica, at_s, "ok")
        row |= {"scrape": slot.scrapes, "since_s": slot.since_s, **read.plan.texts, **read.values, "start_s": start_s}
        self.batches.add(ENGINE_SAMPLES, slot.node, row)
        for metric, bins in read.bins.items():
            found = {"replica": replica, "at_s": at_s, "start_s": start_s, "metric": metric, "bins": bins}
            self.batches.add(ENGINE_HISTOGRAMS, slot.node, found)

    def _say_dead(self, slot: Slot) -> None:
        if slot.is_gpu:
            return
        at_s = self.edge.at_s()
        for replica in slot.replicas or [slot.target.replica]:
            self.batches.add(ENGINE_SAMPLES, slot.node, self._identity(slot, replica, at_s, "dead"))

    def _identity(self, slot: Slot, replica: str, at_s: float, status: str) -> dict[str, Any]:
        target = slot.target
        known = {"engine": slot.engine, "pool": target.pool, "model": target.model}
        return {"replica": replica, "at_s": at_s, "status": status, **known}

    # -- metrics -----------------------------------------------------------------------------------------------

    def collect(self) -> Iterable[Metric]:
        """See Collector."""
        states = Counter({"waiting": 0, "ok": 0, "dead": 0})
        states.update(slot.state for slot in list(self.slots.values()))
        for name, label, counts in (
            ("fleetloop_exporter_targets", "state", states),
            ("fleetloop_exporter_targets_left_out", "why", self.discovery.set.left_out),
        ):
            gauge = GaugeMetricFamily(name, METRICS[name], labels=["exporter", label])
            for value, count in list(counts.items()):
                gauge.add_metric([self.edge.name, value], count)
            yield gauge
        name = "fleetloop_exporter_layouts_total"
        counter = CounterMetricFamily(name, METRICS[name], labels=["exporter"])
        counter.add_metric([self.edge.name], self.layouts)
        yield counter


def _verified(reader: PageReader, layout: Layout, asked: asyncio.Future[bool]) -> None:
    if not asked.cancelled():
        reader.verified(layout, asked.result())


def _replica(name: str, key: str) -> str:
    return f"{name}:{key}"[:200] if key else name
