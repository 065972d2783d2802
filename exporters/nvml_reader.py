"""Reads the GPUs of a host by NVML. Synchronous: belongs on a thread of its own, never on an event loop.

A value that a GPU or driver does not give is None, is asked for once, and not again before the GPU is found anew.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pynvml as nv
import structlog

from exporters.nvml_events import Events
from exporters.nvml_gpu import Gpu, memory
from exporters.nvml_library import DRIVER, LOST, Asking, DriverGone
from exporters.nvml_mig import Instance, index_of, layout, profile
from exporters.nvml_processes import Held
from schemas.node import GPU_SAMPLES, GpuEntry

log = structlog.get_logger(__name__)

LOST_RETRY_S = 5.0
REOPEN_S, REOPEN_S_MAX = 60.0, 960.0
"""While a GPU is missing, the driver is opened anew after so long, and then ever more seldom."""


class NvmlReader:
    """All GPUs of this host.

    Parameters
    ----------
    types: maps an NVML product name to the name in the price list, where the usual one does not fit.
    slow_s: time between two looks at what seldom changes.
    proc: the host's /proc, where the driver lists its GPUs: a new one is noticed there.
    """

    def __init__(
        self, types: Mapping[str, str] | None = None, slow_s: float = 30.0, proc: Path = Path("/proc")
    ) -> None:
        self.types, self.slow_s, self.proc = dict(types or {}), slow_s, proc
        self.gpus: list[Gpu] = []
        self.failures: Counter[str] = Counter()
        """Transient failures by field, since the start."""
        self.inventory: list[GpuEntry] = []
        """Who the GPUs and MIG instances are; lost ones too. Another list whenever it changes."""
        self.driver = ""
        self._open = False
        self._events = Events(self._happened)
        self._xids: dict[str, tuple[int, float]] = {}
        self._clock: Callable[[], float] = time.time
        self._slow_at = self._retry_at = self._reopen_at = 0.0
        self._reopen_s = REOPEN_S
        self._listed: list[str] = []

    @property
    def latency_s(self) -> float:
        """Time that the driver says it spent on our grouped calls since the start."""
        return sum(gpu.latency_us for gpu in self.gpus) / 1e6

    def open(self) -> None:
        """Finds the driver and its GPUs. Raises DriverGone with the remedy. GPUs known before keep their index."""
        try:
            nv.nvmlInit()
            self._open = True
            self.driver = str(nv.nvmlSystemGetDriverVersion())
            handles = [self._handle(i) for i in range(nv.nvmlDeviceGetCount())]
        except nv.NVMLError as error:
            self.close()
            raise DriverGone(error) from None
        known = {gpu.uuid: gpu for gpu in self.gpus}
        taken = {gpu.index for gpu in self.gpus}
        for gpu in self.gpus:
            gpu.lost()
        for index, handle in enumerate(handles):
            if handle is not None and (uuid := self._uuid(handle)):
                if uuid in known:
                    known[uuid].found(handle)
                    continue
                index = index if index not in taken else max(taken) + 1
                taken.add(index)
                known[uuid] = self._identify(index, uuid, handle)
        self.gpus = sorted(known.values(), key=lambda gpu: gpu.index)
        self._listed = self._listing()
        self._slow_at = 0.0
        self._events.start([gpu.uuid for gpu in self.gpus if gpu.handle is not None])

    def close(self) -> None:
        """Lets the driver go."""
        self._events.stop()
        for gpu in self.gpus:
            gpu.lost()
        if self._open:
            self._open = False
            try:
                nv.nvmlShutdown()
            except nv.NVMLError:
                self.failures["shutdown"] += 1

    def read(self, at_s: Callable[[], float]) -> list[dict[str, Any]]:
        """A row of GPU_SAMPLES a GPU and MIG instance, units as there. Raises DriverGone; a lost GPU is a row `lost`.

        `at_s`: the time of this moment, Unix s.
        """
        self._clock = at_s
        now = time.monotonic()
        if now >= self._slow_at:
            self._slow_at = now + self.slow_s
            self._missing(now)
            for gpu in self.gpus:
                self._guarded(gpu, lambda gpu=gpu: self._slowly(gpu))  # type: ignore[misc]
            who = [one.entry for gpu in self.gpus for one in (gpu, *gpu.instances)]
            if who != self.inventory:
                self.inventory = who
        rows: list[dict[str, Any]] = []
        for gpu in self.gpus:
            if gpu.handle is None and now >= self._retry_at:
                self._again(gpu)
            rows += self._rows(gpu, at_s())
        if now >= self._retry_at:
            self._retry_at = now + LOST_RETRY_S
        return rows

    def lost(self, at_s: float) -> list[dict[str, Any]]:
        """A row `lost` for every GPU known: what is to be said while the driver is gone."""
        return [row for gpu in self.gpus for row in _lost(gpu, at_s)]

    def processes(self) -> dict[int, list[Held]]:
        """Index of each GPU (of its MIG instances, where it is cut) -> processes that hold or used it.

        Left out: those whose driver did not say. Raises DriverGone.
        """
        found: dict[int, list[Held]] = {}
        for gpu in self.gpus:
            for one in gpu.instances or [gpu]:
                listed = self._guarded(gpu, one.listing.read)
                if listed is not None:
                    found[one.index] = listed
        return found

    # -- one GPU ---------------------------------------------------------------------------------------------

    def _rows(self, gpu: Gpu, now_s: float) -> list[dict[str, Any]]:
        def take() -> list[dict[str, Any]]:
            row = {"gpu": gpu.index, "at_s": now_s, "status": "ok", **gpu.read()}
            if gpu.uuid in self._xids:
                row["xid"], row["xid_at_s"] = self._xids[gpu.uuid]
            known = {"at_s": now_s, "status": "ok", "parent": gpu.index}
            return [row, *({"gpu": one.index, **known, **one.read()} for one in gpu.instances)]

        return (self._guarded(gpu, take) if gpu.handle is not None else None) or _lost(gpu, now_s)

    def _guarded(self, gpu: Gpu, work: Callable[[], Any]) -> Any:
        """What it gives; None where this GPU is lost, which is then noted. Raises DriverGone."""
        if gpu.handle is None:
            return None
        try:
            return work()
        except nv.NVMLError as error:
            if error.value in DRIVER:
                raise DriverGone(error) from None
            if error.value not in LOST:
                self.failures["mig"] += 1  # a part of a GPU that is being cut anew
                return None
            log.error("a GPU is lost", gpu=gpu.index, uuid=gpu.uuid, error=f"{error} ({error.value})")
            gpu.lost()
            return None

    def _slowly(self, gpu: Gpu) -> None:
        gpu.slowly()
        found = layout(gpu.handle)
        if [one.index for one in gpu.instances] != [index_of(gpu.index, id) for id in found]:
            log.info("MIG layout", gpu=gpu.index, instances=list(found))
            for one in gpu.instances:
                one.activity.free()
            gpu.asking.unsupported.clear()  # what a GPU gives depends on whether it is cut
            gpu.instances = [self._instance(gpu, id, handles) for id, handles in found.items()]

    def _instance(self, gpu: Gpu, id: int, handles: list[Any]) -> Instance:
        handle = handles[0]
        source = memory(handle)
        total = Asking(self.failures).ask(source).get("mem_total_bytes")
        entry = GpuEntry(
            gpu=index_of(gpu.index, id),
            uuid=str(nv.nvmlDeviceGetUUID(handle)),
            gpu_type=gpu.entry.gpu_type,
            mem_total_bytes=None if total is None else float(total),
            parent=gpu.index,
            mig_profile=profile(handle),
        )
        return Instance(gpu.handle, handles, entry, source, self.failures)

    def _handle(self, index: int) -> Any:
        try:
            return nv.nvmlDeviceGetHandleByIndex(index)
        except nv.NVMLError as error:
            if error.value in DRIVER:
                raise
            self.failures["handle"] += 1
            return None

    def _uuid(self, handle: Any) -> str:
        try:
            return str(nv.nvmlDeviceGetUUID(handle))
        except nv.NVMLError:
            self.failures["identity"] += 1
            return ""

    def _identify(self, index: int, uuid: str, handle: Any) -> Gpu:
        try:
            name = str(nv.nvmlDeviceGetName(handle))
            total = Asking(self.failures).ask(memory(handle)).get("mem_total_bytes")
        except nv.NVMLError:
            self.failures["identity"] += 1
            name, total = "unknown", None
        entry = GpuEntry(
            gpu=index,
            uuid=uuid,
            gpu_type=self.types.get(name) or gpu_type(name),
            mem_total_bytes=None if total is None else float(total),
        )
        return Gpu(handle, entry, self.failures)

    def _again(self, gpu: Gpu) -> None:
        """Back after a reset?"""
        try:
            gpu.found(nv.nvmlDeviceGetHandleByUUID(gpu.uuid.encode()))
        except nv.NVMLError as error:
            if error.value in DRIVER:
                raise DriverGone(error) from None
            return
        log.info("a GPU is back", gpu=gpu.index, uuid=gpu.uuid)
        self._slow_at = 0.0
        self._events.start([one.uuid for one in self.gpus if one.handle is not None])

    def _missing(self, now: float) -> None:
        """Opens the driver anew where GPUs have come or gone: it counts them only then. Raises DriverGone."""
        lost = any(gpu.handle is None for gpu in self.gpus)
        if not lost:
            self._reopen_s, self._reopen_at = REOPEN_S, 0.0
        if self._listing() == self._listed and not (lost and now >= self._reopen_at):
            return
        self._reopen_at = now + self._reopen_s
        self._reopen_s = min(REOPEN_S_MAX, self._reopen_s * 2)
        self.close()
        self.open()
        self._slow_at = now + self.slow_s

    def _listing(self) -> list[str]:
        try:
            return sorted(os.listdir(self.proc / "driver/nvidia/gpus"))
        except OSError:
            return []

    def _happened(self, uuid: str, xid: int | None) -> None:
        """On the thread of events."""
        if xid is None:
            self._slow_at = 0.0  # counters and row remapping are worth a look now
        elif xid <= GPU_SAMPLES.columns["xid"].high:
            self._xids[uuid] = (xid, self._clock())


def _lost(gpu: Gpu, at_s: float) -> list[dict[str, Any]]:
    said = {"at_s": at_s, "status": "lost"}
    parts = [{"gpu": one.index, "parent": gpu.index, **said} for one in gpu.instances]
    return [{"gpu": gpu.index, **said}, *parts]


_FAMILY = re.compile(
    r"\b(GB300|GB200|GH200|B300|B200|H200|H100|H800|H20|A100|A800|A10G|A10|A30|A40|A16|A2|L40S|L40|L4|T4|V100|P100|"
    r"A6000|RTX PRO 6000)\b",
    re.IGNORECASE,
)


def gpu_type(name: str) -> str:
    """Product family as price lists name it (`NVIDIA H100 80GB HBM3` -> `H100`), else the name without its maker."""
    found = _FAMILY.search(name.replace("-", " "))
    if found is not None:
        family = found[1].upper().replace(" ", "-")
        return "A100-80GB" if family == "A100" and "80GB" in name else family
    plain = re.sub(r"^(NVIDIA|Tesla)\s+", "", name).replace("/", "-").strip()
    return "".join(c for c in plain if c.isprintable())[:200] or "unknown"
