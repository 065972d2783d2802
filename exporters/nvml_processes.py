"""Which processes hold a GPU, as the driver counts them. Whose they are: see `exporters.processes`.

The driver's traps: a sizing call that fails when there is nothing, growth between two calls, samples of process 0,
stale or future time stamps, utilisation beyond 100 % - all of them dropped, none of them an error.
"""

from __future__ import annotations

import time
from ctypes import byref, c_uint, c_ulonglong
from statistics import median_high
from typing import Any, NamedTuple

import pynvml as nv

from exporters.nvml_library import UNSUPPORTED, Asking, function

ROOM, ROOM_MAX = 128, 4096
STALE_S = 60.0
"""A time stamp further from the last good one than this, and the time that has passed, is garbage."""
LISTS = (
    ("nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetComputeRunningProcesses_v2"),
    ("nvmlDeviceGetGraphicsRunningProcesses_v3", "nvmlDeviceGetGraphicsRunningProcesses_v2"),
    ("nvmlDeviceGetMPSComputeRunningProcesses_v3", "nvmlDeviceGetMPSComputeRunningProcesses_v2"),
)
"""Each a list, by the newest function first: compute, graphics, and clients of a multi-process server."""


class Held(NamedTuple):
    """What a process takes of a GPU. `pid` is the driver's, which may be one of a container."""

    pid: int
    holds: bool
    """Has memory there; else it only used the GPU since the read before."""
    mem_bytes: float | None
    sm_util_pct: float | None
    mem_util_pct: float | None


class Listing:
    """Processes of one GPU, or of a MIG instance, which may have several handles."""

    def __init__(self, handles: list[Any], asking: Asking) -> None:
        self._handles, self._asking = handles, asking
        self._lists = {names[0]: function(*names) for names in LISTS}
        self._use = function("nvmlDeviceGetProcessUtilization")
        self._room = ROOM
        self._seen_us = 0
        """Greatest good time stamp: an opaque clock of the driver's."""
        self._read_s: float | None = None
        self._good_s = 0.0

    def read(self) -> list[Held] | None:
        """Processes with memory on the GPU, and those that used it since the read before.

        None: the driver does not say who they are. Raises NVMLError where GPU or driver are gone.
        """
        memory = self._memory()
        used = self._utilisation()
        if memory is None:
            return None
        out = []
        for pid in dict.fromkeys([*memory, *(used or ())]):
            sm, mem = (None, None) if used is None else used.get(pid, (0.0, 0.0))  # only who used it is listed
            out.append(Held(pid, pid in memory, memory.get(pid), sm, mem))
        return out

    def _memory(self) -> dict[int, float | None] | None:
        """pid -> bytes, None where the driver does not say how many. None: it does not say who."""
        found: dict[int, float | None] = {}
        said = False
        for name, call in self._lists.items():
            for handle in self._handles if name not in self._asking.unsupported else ():
                code, rows = self._filled(
                    nv.c_nvmlProcessInfo_v2_t, lambda rows, n, call=call, handle=handle: call(handle, n, rows)
                )
                if code:
                    self._asking.judge(name, code)
                    if code not in UNSUPPORTED:
                        return None
                    break
                said = True
                _merge(found, rows)
        found.pop(0, None)
        return found if said else None

    def _utilisation(self) -> dict[int, tuple[float, float]] | None:
        """pid -> SM and memory %, since the read before. None: not known."""
        if "process_utilisation" in self._asking.unsupported:
            return None
        now_s = time.monotonic()
        before_s, self._read_s = self._read_s, now_s
        code, rows = self._filled(
            nv.c_nvmlProcessUtilizationSample_t,
            lambda rows, n: self._use(self._handles[0], rows, n, c_ulonglong(self._seen_us)),
        )
        if code not in (nv.NVML_SUCCESS, nv.NVML_ERROR_NOT_FOUND):  # not found: nobody used it
            self._asking.judge("process_utilisation", code)
            return None
        newest = self._good(rows, now_s)
        if newest:
            self._seen_us, self._good_s = max(at for at, _, _ in newest.values()), now_s
        elif now_s - self._good_s > STALE_S:
            self._seen_us = 0  # the clock may have been set back: begin anew
        if before_s is None:
            return None  # all that the driver kept, since nobody knows when
        return {pid: (sm, mem) for pid, (_, sm, mem) in newest.items()}

    def _good(self, rows: list[Any], now_s: float) -> dict[int, tuple[int, float, float]]:
        if self._seen_us:
            now_us = self._seen_us + (now_s - self._good_s) * 1e6
        else:
            now_us = median_high([row.timeStamp for row in rows] or [0])
        latest_us = now_us + STALE_S * 1e6
        newest: dict[int, tuple[int, float, float]] = {}
        for row in rows:
            at_us = row.timeStamp
            if not row.pid or not self._seen_us < at_us <= latest_us or row.smUtil > 100 or row.memUtil > 100:
                continue
            if row.pid not in newest or at_us > newest[row.pid][0]:
                newest[row.pid] = (at_us, float(row.smUtil), float(row.memUtil))
        return newest

    def _filled(self, type: Any, call: Any) -> tuple[int, list[Any]]:
        """(error, rows) of a call that fills an array, with more room as long as it asks for it."""
        while True:
            rows, count = (type * self._room)(), c_uint(self._room)
            code = call(rows, byref(count))
            if code != nv.NVML_ERROR_INSUFFICIENT_SIZE or self._room >= ROOM_MAX:
                return code, [] if code else rows[: min(count.value, self._room)]
            self._room = min(ROOM_MAX, max(self._room * 2, count.value + 8))


def _merge(found: dict[int, float | None], rows: list[Any]) -> None:
    """A process on several lists holds the same memory on each."""
    for row in rows:
        if row.usedGpuMemory == nv.NVML_VALUE_NOT_AVAILABLE_ulonglong.value:
            found.setdefault(row.pid, None)
        else:
            found[row.pid] = max(float(row.usedGpuMemory), found.get(row.pid) or 0.0)
