"""A driver in Python: what `pynvml` calls through ctypes, for as many GPUs as wanted, with errors injected by name."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

import pynvml as nv


class FakeGpu:
    """One GPU: its answers, and errors by call or field id."""

    def __init__(self, index: int, name: str = "NVIDIA H100 80GB HBM3") -> None:
        self.index, self.name, self.uuid = index, name, f"GPU-{index:08d}"
        self.util, self.temperature, self.used, self.total = 40 + index, 60, 70 * 2**30, 80 * 2**30
        self.fields: dict[int, float] = {
            nv.NVML_FI_DEV_POWER_AVERAGE: 412_500,
            nv.NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION: 5_000_000_000_000,
            nv.NVML_FI_DEV_MEMORY_TEMP: 71,
            nv.NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_POWER_CAP: 10**9,
            nv.NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_THERM_SLOWDOWN: 3 * 10**9,
            nv.NVML_FI_DEV_CLOCKS_EVENT_REASON_HW_THERM_SLOWDOWN: 4 * 10**9,
            nv.NVML_FI_DEV_PERF_POLICY_THERMAL: 5 * 10**9,
            nv.NVML_FI_DEV_PCIE_COUNT_TX_BYTES: 123,
            nv.NVML_FI_DEV_PCIE_COUNT_RX_BYTES: 456,
            nv.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX: 7,
            nv.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX: 8,
        }
        self.field_errors: dict[int, int] = {}
        self.errors: dict[str, int] = {}
        self.activity = {2: 62.0, 3: 31.0, 5: 20.0, 10: 44.0}
        self.gpm = True


class FakeNvml:
    """Assign to `pynvml.nvmlLib`. `errors`: by call, for every GPU. A missing attribute is a function unknown to it."""

    def __init__(self, *gpus: FakeGpu) -> None:
        self.gpus = list(gpus)
        self.errors: dict[str, int] = {}
        self.missing: set[str] = set()
        self.calls: list[str] = []
        self.threads: set[int] = set()
        self.block: threading.Event | None = None
        """Where set, readings wait for it: a driver that hangs."""

    def __getattr__(self, name: str) -> Callable[..., int]:
        method = getattr(type(self), "_" + name, None)
        if not name.startswith("nvml") or method is None or name in self.missing:
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            self.calls.append(name)
            self.threads.add(threading.get_ident())
            gpu = self._gpu(arguments[0]) if arguments else None
            error = self.errors.get(name) or (gpu.errors.get(name) if gpu else None)
            if error is None and gpu is not None:
                error = gpu.errors.get("*")
            return error if error else (method(self, *arguments) or 0)

        return call

    def _gpu(self, handle: Any) -> FakeGpu | None:
        if isinstance(handle, nv.c_nvmlDevice_t):
            address = ctypes.cast(handle, ctypes.c_void_p).value
            return self.gpus[(address or 1) - 1]
        return None

    def _nvmlInitWithFlags(self, flags: Any) -> None:
        """Nothing to load."""

    def _nvmlShutdown(self) -> None:
        """Nothing to let go."""

    def _nvmlDeviceGetCount_v2(self, out: Any) -> None:
        out._obj.value = len(self.gpus)

    def _nvmlDeviceGetHandleByIndex_v2(self, index: Any, out: Any) -> int:
        error = self.gpus[index.value].errors.get("nvmlDeviceGetHandleByIndex_v2", 0)
        self._handle(index.value, out)
        return error

    def _nvmlDeviceGetHandleByUUID(self, uuid: Any, out: Any) -> int:
        for i, gpu in enumerate(self.gpus):
            if gpu.uuid.encode() == uuid.value:
                self._handle(i, out)
                return gpu.errors.get("*", 0)
        return nv.NVML_ERROR_NOT_FOUND

    def _handle(self, index: int, out: Any) -> None:
        ctypes.cast(ctypes.byref(out._obj), ctypes.POINTER(ctypes.c_void_p))[0] = index + 1

    def _nvmlDeviceGetUUID(self, handle: Any, buffer: Any, size: Any) -> None:
        buffer.value = self._known(handle).uuid.encode()

    def _nvmlDeviceGetName(self, handle: Any, buffer: Any, size: Any) -> None:
        buffer.value = self._known(handle).name.encode()

    def _known(self, handle: Any) -> FakeGpu:
        gpu = self._gpu(handle)
        assert gpu is not None
        return gpu

    def _nvmlDeviceGetUtilizationRates(self, handle: Any, out: Any) -> None:
        if self.block is not None:
            self.block.wait(30)
        out._obj.gpu, out._obj.memory = self._known(handle).util, 11

    def _nvmlDeviceGetMemoryInfo_v2(self, handle: Any, out: Any) -> None:
        out._obj.total, out._obj.used = self._known(handle).total, self._known(handle).used

    def _nvmlDeviceGetMemoryInfo(self, handle: Any, out: Any) -> None:
        out._obj.total, out._obj.used = self._known(handle).total, self._known(handle).used + 1

    def _nvmlDeviceGetTemperatureV(self, handle: Any, out: Any) -> None:
        out._obj.temperature = self._known(handle).temperature

    def _nvmlDeviceGetTemperature(self, handle: Any, sensor: Any, out: Any) -> None:
        out._obj.value = self._known(handle).temperature

    def _nvmlDeviceGetClockInfo(self, handle: Any, clock: Any, out: Any) -> None:
        out._obj.value = 1755

    def _nvmlDeviceGetMaxClockInfo(self, handle: Any, clock: Any, out: Any) -> None:
        out._obj.value = 1980

    def _nvmlDeviceGetCurrentClocksEventReasons(self, handle: Any, out: Any) -> None:
        out._obj.value = 0x4

    def _nvmlDeviceGetPowerUsage(self, handle: Any, out: Any) -> None:
        out._obj.value = 300_000

    def _nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, out: Any) -> None:
        out._obj.value = 7_000_000

    def _nvmlDeviceGetFieldValues(self, handle: Any, count: Any, out: Any) -> None:
        gpu = self._known(handle)
        for i in range(count.value):
            one = out._obj[i]
            if error := gpu.field_errors.get(one.fieldId):
                one.nvmlReturn = error
            elif one.fieldId in gpu.fields:
                if one.fieldId in (nv.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, nv.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX):
                    assert one.scopeId == 0xFFFFFFFF
                one.nvmlReturn, one.valueType = nv.NVML_SUCCESS, nv.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG
                one.value.ullVal = int(gpu.fields[one.fieldId])
            else:
                one.nvmlReturn = nv.NVML_ERROR_NOT_SUPPORTED

    def _nvmlGpmQueryDeviceSupport(self, handle: Any, out: Any) -> None:
        out._obj.isSupportedDevice = int(self._known(handle).gpm)

    def _nvmlGpmSampleAlloc(self, out: Any) -> None:
        """A sample needs no memory here."""

    def _nvmlGpmSampleFree(self, sample: Any) -> None:
        """Nor gives any back."""

    def _nvmlGpmSampleGet(self, handle: Any, sample: Any) -> None:
        """What lies between two samples is always the same."""

    def _nvmlGpmMetricsGet(self, out: Any) -> None:
        asked = out._obj
        for i in range(asked.numMetrics):
            value = self.gpus[0].activity.get(asked.metrics[i].metricId)
            asked.metrics[i].nvmlReturn = nv.NVML_SUCCESS if value is not None else nv.NVML_ERROR_NOT_SUPPORTED
            asked.metrics[i].value = value or 0.0
