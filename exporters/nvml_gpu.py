"""What is asked of one GPU: each second, and each half minute."""

from __future__ import annotations

from collections import Counter
from ctypes import byref, c_uint, c_ulonglong
from typing import Any

import pynvml as nv

from exporters.nvml_fields import FAST, SLOW, Fields
from exporters.nvml_gpm import Activity
from exporters.nvml_library import Asking, Either, Scalar, Source, Values
from exporters.nvml_mig import Instance
from exporters.nvml_processes import Listing
from schemas.node import GpuEntry

FALLBACKS = {
    "power_w": ("nvmlDeviceGetPowerUsage", c_uint),
    "energy_j": ("nvmlDeviceGetTotalEnergyConsumption", c_ulonglong),
}
"""Columns that have a function of their own (mW, mJ) where the grouped call does not give them."""
THERMAL = tuple(f"throttle_{kind}_thermal_ns" for kind in ("sw", "hw", "any"))
"""Counters of which the first two together, or else the last, are the column."""


class Gpu:
    """One GPU as it was found. `handle` is None while it is lost."""

    def __init__(self, handle: Any, entry: GpuEntry, failures: Counter[str]) -> None:
        self.entry, self.index, self.uuid = entry, entry.gpu, entry.uuid
        self.failures = failures
        self.asking = Asking(failures)
        self.instances: list[Instance]
        self.handle: Any = None
        self.latency_us = 0
        """Time that the driver says it spent on the grouped calls, total."""
        self._slow: Values = {}
        self.found(handle)

    def found(self, handle: Any) -> None:
        """(Again) there: everything is asked for anew."""
        self.handle = handle
        self.asking.unsupported.clear()
        self._fields, self._slow_fields = Fields("fields", handle, FAST), Fields("slow_fields", handle, SLOW)
        self._fast = _fast(handle)
        self._rarely = _rarely(handle)
        self._others = {name: _milli(name, handle) for name in FALLBACKS}
        self.activity = Activity(handle)
        self.listing = Listing([handle], self.asking)
        self.instances = []

    def lost(self) -> None:
        """No longer there: what the driver holds for us is given back where it still takes it."""
        self.handle = None
        self._slow = {}
        self.activity.free()
        for instance in self.instances:
            instance.activity.free()

    def slowly(self) -> None:
        """Takes what seldom changes; it is repeated in each reading. Raises NVMLError."""
        values = self.asking.ask(self._slow_fields)
        self.latency_us += self._slow_fields.latency_us
        for source in self._rarely:
            values.update(self.asking.ask(source))
        self._slow = self.asking.within(values)

    def read(self) -> Values:
        """Columns of GPU_SAMPLES. Raises NVMLError where GPU or driver are gone."""
        asking = self.asking
        values = asking.ask(self._fields)
        self.latency_us += self._fields.latency_us
        soft, hard, either = (values.pop(name, None) for name in THERMAL)
        if not asking.unsupported.isdisjoint(THERMAL[:2]):
            values["throttle_thermal_ns"] = either
        else:  # of a counter that is missing once the other one does not take the place: it would jump, and back
            values["throttle_thermal_ns"] = None if soft is None or hard is None else soft + hard
        for name, source in self._others.items():
            if values.get(name) is None:
                values.update(asking.ask(source))
        for source in self._fast:
            values.update(asking.ask(source))
        values.update(asking.ask(self.activity))
        return {**self._slow, **asking.within(values)}


def memory(handle: Any) -> Source:
    """Version 2 tells reserved from used memory; drivers before 510 only know version 1."""
    new, old = nv.c_nvmlMemory_v2_t(), nv.c_nvmlMemory_t()
    new.version = nv.nvmlMemory_v2
    return Either(
        Scalar(
            "memory",
            ("nvmlDeviceGetMemoryInfo_v2",),
            (handle, byref(new)),
            lambda: {
                "mem_used_bytes": new.used,
                "mem_reserved_bytes": new.reserved,
                "mem_total_bytes": new.total,
            },
        ),
        Scalar(
            "memory_old",
            ("nvmlDeviceGetMemoryInfo",),
            (handle, byref(old)),
            lambda: {"mem_used_bytes": old.used, "mem_total_bytes": old.total},
        ),
    )


def _fast(handle: Any) -> list[Source]:
    busy, reasons = nv.c_nvmlUtilization_t(), c_ulonglong()
    new, old = nv.c_nvmlTemperature_v1_t(), c_uint()
    new.version, new.sensorType = nv.nvmlTemperature_v1, nv.NVML_TEMPERATURE_GPU
    return [
        Scalar(
            "utilisation",
            ("nvmlDeviceGetUtilizationRates",),
            (handle, byref(busy)),
            lambda: {"util_gpu_pct": busy.gpu, "util_mem_pct": busy.memory},
        ),
        memory(handle),
        Either(
            Scalar(
                "temperature",
                ("nvmlDeviceGetTemperatureV",),
                (handle, byref(new)),
                lambda: {"temp_c": new.temperature},
            ),
            Scalar(
                "temperature_old",
                ("nvmlDeviceGetTemperature",),
                (handle, nv.NVML_TEMPERATURE_GPU, byref(old)),
                lambda: {"temp_c": old.value},
            ),
        ),
        _clock("sm_clock_mhz", "nvmlDeviceGetClockInfo", handle, nv.NVML_CLOCK_SM),
        _clock("mem_clock_mhz", "nvmlDeviceGetClockInfo", handle, nv.NVML_CLOCK_MEM),
        Scalar(
            "reasons",
            ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"),
            (handle, byref(reasons)),
            lambda: {"throttle_mask": reasons.value},
        ),
    ]


def _rarely(handle: Any) -> list[Source]:
    limit = c_uint()
    return [
        Scalar(
            "power_limit",
            ("nvmlDeviceGetEnforcedPowerLimit",),
            (handle, byref(limit)),
            lambda: {"power_limit_w": limit.value * 1e-3},
        ),
        _clock("sm_clock_max_mhz", "nvmlDeviceGetMaxClockInfo", handle, nv.NVML_CLOCK_SM),
    ]


def _clock(column: str, function: str, handle: Any, clock: int) -> Source:
    out = c_uint()
    return Scalar(column, (function,), (handle, clock, byref(out)), lambda: {column: out.value})


def _milli(column: str, handle: Any) -> Source:
    function, type = FALLBACKS[column]
    out = type()
    return Scalar(f"{column}_old", (function,), (handle, byref(out)), lambda: {column: out.value * 1e-3})
