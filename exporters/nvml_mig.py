"""MIG: the parts that a GPU is cut into, each a row of its own.

Memory and processes come by the instance's handle, activity by GPM (Hopper and later). Power, energy, clocks,
temperature and utilisation are the board's: an instance's row has null there, never a share of it.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pynvml as nv

from exporters.nvml_gpm import Activity
from exporters.nvml_library import Asking, Source, Values
from exporters.nvml_processes import Listing
from schemas.node import GpuEntry

INSTANCES_MAX = 16
"""GPU instance ids below this have an index of their own."""


class Instance:
    """One GPU instance: of several compute instances on it the first speaks for its memory."""

    def __init__(
        self, parent: Any, handles: list[Any], entry: GpuEntry, memory: Source, failures: Counter[str]
    ) -> None:
        self.entry, self.index = entry, entry.gpu
        self.asking = Asking(failures)
        self.activity = Activity(parent, entry.gpu % INSTANCES_MAX)
        self.listing = Listing(handles, self.asking)
        self._memory = memory

    def read(self) -> Values:
        """Columns of GPU_SAMPLES. Raises NVMLError where GPU or driver are gone."""
        asking = self.asking
        return asking.within({**asking.ask(self._memory), **asking.ask(self.activity)})


def layout(parent: Any) -> dict[int, list[Any]]:
    """GPU instance id -> handles of its MIG devices; {} for a GPU that is not cut. Raises NVMLError."""
    try:
        if not nv.nvmlDeviceGetMigMode(parent)[0]:
            return {}
        count = nv.nvmlDeviceGetMaxMigDeviceCount(parent)
    except nv.NVMLError_NotSupported:
        return {}
    except nv.NVMLError_FunctionNotFound:
        return {}
    found: dict[int, list[Any]] = {}
    for number in range(count):
        try:
            handle = nv.nvmlDeviceGetMigDeviceHandleByIndex(parent, number)
            found.setdefault(nv.nvmlDeviceGetGpuInstanceId(handle), []).append(handle)
        except (nv.NVMLError_NotFound, nv.NVMLError_InvalidArgument):
            continue  # numbers have holes; an instance may go between the two calls
    return {id: handles for id, handles in sorted(found.items()) if id < INSTANCES_MAX}


def index_of(parent: int, instance: int) -> int:
    """Index on the node of a GPU instance."""
    return (parent + 1) * INSTANCES_MAX + instance


def profile(handle: Any) -> str:
    """Profile of a MIG device as its name ends (`... MIG 1g.10gb`), else from its attributes. Raises NVMLError."""
    named = re.search(r"MIG (\S+)$", str(nv.nvmlDeviceGetName(handle)))
    if named is not None:
        return named[1][:100]
    has = nv.nvmlDeviceGetAttributes_v2(handle)
    return f"{has.gpuInstanceSliceCount}g.{round(has.memorySizeMB / 1024)}gb"
