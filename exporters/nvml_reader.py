"""Reads GPUs by NVML. Synchronous: belongs on a thread of its own, never on an event loop.

What each number means, the classes of errors and their treatment: NVML API reference (nvml.h), 13.x. A value that a
GPU or driver does not give is None, is asked for once, and not again before the next `open`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import pynvml as nv

from exporters.nvml_gpm import Activity
from schemas.errors import UnavailableError
from schemas.node import GPU_SAMPLES, GpuEntry

T = TypeVar("T")

UNSUPPORTED = frozenset(
    {
        nv.NVML_ERROR_NOT_SUPPORTED,
        nv.NVML_ERROR_FUNCTION_NOT_FOUND,
        nv.NVML_ERROR_NO_PERMISSION,
        nv.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
        nv.NVML_ERROR_DEPRECATED,
        nv.NVML_ERROR_INVALID_ARGUMENT,
    }
)
LOST = frozenset(
    {nv.NVML_ERROR_GPU_IS_LOST, nv.NVML_ERROR_RESET_REQUIRED, nv.NVML_ERROR_IRQ_ISSUE, nv.NVML_ERROR_GPU_NOT_FOUND}
)
DRIVER = frozenset(
    {
        nv.NVML_ERROR_UNINITIALIZED,
        nv.NVML_ERROR_DRIVER_NOT_LOADED,
        nv.NVML_ERROR_LIBRARY_NOT_FOUND,
        nv.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
        nv.NVML_ERROR_OPERATING_SYSTEM,
    }
)
"""Everything else (time-out, no data, busy, unknown) is a value missing this once."""

ALL_LINKS = 0xFFFFFFFF
FIELDS: dict[str, tuple[int, int]] = {
    "power_mw": (nv.NVML_FI_DEV_POWER_AVERAGE, 0),
    "energy_mj": (nv.NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION, 0),
    "mem_temp_c": (nv.NVML_FI_DEV_MEMORY_TEMP, 0),
    "throttle_power_ns": (nv.NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_POWER_CAP, 0),
    "throttle_sw_thermal_ns": (nv.NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_THERM_SLOWDOWN, 0),
    "throttle_hw_thermal_ns": (nv.NVML_FI_DEV_CLOCKS_EVENT_REASON_HW_THERM_SLOWDOWN, 0),
    "throttle_any_thermal_ns": (nv.NVML_FI_DEV_PERF_POLICY_THERMAL, 0),
    "pcie_tx_bytes": (nv.NVML_FI_DEV_PCIE_COUNT_TX_BYTES, 0),
    "pcie_rx_bytes": (nv.NVML_FI_DEV_PCIE_COUNT_RX_BYTES, 0),
    "nvlink_tx_kib": (nv.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, ALL_LINKS),
    "nvlink_rx_kib": (nv.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX, ALL_LINKS),
}
"""What one grouped call asks for: name -> (field id, scope)."""
_VALUE = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")  # by nvmlValueType_t


class DriverGone(UnavailableError):
    """The driver or its library does not answer (any more): close, wait, open again."""


class Gpu:
    """One GPU as it was found. `handle` is None while it is lost."""

    def __init__(self, index: int, handle: Any, uuid: str, entry: GpuEntry) -> None:
        self.index, self.handle, self.uuid, self.entry = index, handle, uuid, entry
        self.unsupported: set[str] = set()
        self.activity = Activity()


class NvmlReader:
    """All GPUs of this host.

    Parameters: `types` maps an NVML product name to the name in the price list, where the usual one does not fit.
    """

    def __init__(self, types: Mapping[str, str] | None = None) -> None:
        self.types = dict(types or {})
        self.gpus: list[Gpu] = []
        self.failures: dict[str, int] = {}
        """Transient failures by field, since the start."""
        self._open = False

    def open(self) -> None:
        """Finds the driver and its GPUs. Raises DriverGone with the remedy. GPUs known before keep their index."""
        try:
            nv.nvmlInit()
            self._open = True
            handles = [self._handle(i) for i in range(nv.nvmlDeviceGetCount())]
        except nv.NVMLError as error:
            self.close()
            raise DriverGone(
                f"NVML: {_text(error)}: needs an NVIDIA driver on this host (does `nvidia-smi` work?); in a container, "
                "the GPUs and libnvidia-ml.so.1 passed in"
            ) from None
        known = {gpu.uuid: gpu.index for gpu in self.gpus}
        found = [gpu for i, handle in enumerate(handles) if handle and (gpu := self._identify(i, handle, known))]
        missing = [gpu for gpu in self.gpus if gpu.uuid not in {g.uuid for g in found}]
        for gpu in missing:
            gpu.handle = None
        self.gpus = sorted([*found, *missing], key=lambda gpu: gpu.index)

    def close(self) -> None:
        """Lets the driver go."""
        for gpu in self.gpus:
            gpu.activity.free()
        if self._open:
            self._open = False
            try:
                nv.nvmlShutdown()
            except nv.NVMLError:
                self._transient("shutdown")

    def inventory(self) -> list[GpuEntry]:
        """Who the GPUs are; lost ones too."""
        return [gpu.entry for gpu in self.gpus]

    def read(self, at_s: Callable[[], float]) -> list[dict[str, Any]]:
        """A row of GPU_SAMPLES a GPU, units as there. Raises DriverGone; a lost GPU is a row `lost`."""
        return [self._row(gpu, at_s) for gpu in self.gpus]

    def lost(self, at_s: float) -> list[dict[str, Any]]:
        """A row `lost` for every GPU known: what is to be said while the driver is gone."""
        return [{"gpu": gpu.index, "at_s": at_s, "status": "lost"} for gpu in self.gpus]

    # -- one GPU ---------------------------------------------------------------------------------------------

    def _handle(self, index: int) -> Any:
        try:
            return nv.nvmlDeviceGetHandleByIndex(index)
        except nv.NVMLError as error:
            if error.value in DRIVER:
                raise
            self._transient("handle")
            return None

    def _identify(self, index: int, handle: Any, known: Mapping[str, int]) -> Gpu | None:
        try:
            uuid = str(nv.nvmlDeviceGetUUID(handle))
            name = str(nv.nvmlDeviceGetName(handle))
        except nv.NVMLError:
            self._transient("identity")
            return None
        entry = GpuEntry(gpu=known.get(uuid, index), uuid=uuid, gpu_type=self.types.get(name) or gpu_type(name))
        gpu = Gpu(entry.gpu, handle, uuid, entry)
        if (memory := self._ask(gpu, "memory", lambda: _memory(handle))) is not None:
            gpu.entry = entry.model_copy(update={"mem_total_bytes": float(memory.total)})
        return gpu

    def _row(self, gpu: Gpu, at_s: Callable[[], float]) -> dict[str, Any]:
        now = at_s()
        try:
            if gpu.handle is None:
                gpu.handle = nv.nvmlDeviceGetHandleByUUID(gpu.uuid.encode())  # back after a reset?
                gpu.unsupported.clear()
            return {"gpu": gpu.index, "at_s": now, "status": "ok", **self._values(gpu)}
        except nv.NVMLError as error:
            if error.value in DRIVER:
                raise DriverGone(f"NVML: {_text(error)}") from None
            gpu.handle = None
            gpu.activity.free()
            return {"gpu": gpu.index, "at_s": now, "status": "lost"}

    def _values(self, gpu: Gpu) -> dict[str, float | None]:
        handle = gpu.handle
        fields = self._fields(gpu)
        utilisation = self._ask(gpu, "utilisation", lambda: nv.nvmlDeviceGetUtilizationRates(handle))
        memory = self._ask(gpu, "memory", lambda: _memory(handle))
        power_mw = fields["power_mw"]
        if power_mw is None:
            power_mw = self._ask(gpu, "power", lambda: nv.nvmlDeviceGetPowerUsage(handle))
        energy_mj = fields["energy_mj"]
        if energy_mj is None:
            energy_mj = self._ask(gpu, "energy", lambda: nv.nvmlDeviceGetTotalEnergyConsumption(handle))
        software, hardware = fields["throttle_sw_thermal_ns"], fields["throttle_hw_thermal_ns"]
        thermal = fields["throttle_any_thermal_ns"] if software is None or hardware is None else software + hardware
        values = {
            "util_gpu_pct": None if utilisation is None else utilisation.gpu,
            "util_mem_pct": None if utilisation is None else utilisation.memory,
            "mem_used_bytes": None if memory is None else memory.used,
            "mem_total_bytes": None if memory is None else memory.total,
            "power_w": _scaled(power_mw, 1e-3),
            "energy_j": _scaled(energy_mj, 1e-3),
            "temp_c": self._temperature(gpu),
            "mem_temp_c": fields["mem_temp_c"],
            "sm_clock_mhz": self._ask(gpu, "clock", lambda: nv.nvmlDeviceGetClockInfo(handle, nv.NVML_CLOCK_SM)),
            "sm_clock_max_mhz": self._ask(
                gpu, "clock_max", lambda: nv.nvmlDeviceGetMaxClockInfo(handle, nv.NVML_CLOCK_SM)
            ),
            "throttle_mask": self._ask(gpu, "reasons", lambda: nv.nvmlDeviceGetCurrentClocksEventReasons(handle)),
            "throttle_power_ns": fields["throttle_power_ns"],
            "throttle_thermal_ns": thermal,
            "pcie_tx_bytes": fields["pcie_tx_bytes"],
            "pcie_rx_bytes": fields["pcie_rx_bytes"],
            "nvlink_tx_bytes": _scaled(fields["nvlink_tx_kib"], 1024),
            "nvlink_rx_bytes": _scaled(fields["nvlink_rx_kib"], 1024),
            **(self._ask(gpu, "activity", lambda: gpu.activity.read(handle)) or {}),
        }
        return {name: self._within(name, value) for name, value in values.items()}

    def _temperature(self, gpu: Gpu) -> float | None:
        new = self._ask(gpu, "temperature", lambda: nv.nvmlDeviceGetTemperatureV(gpu.handle, nv.NVML_TEMPERATURE_GPU))
        if new is not None:
            return float(new)
        return self._ask(
            gpu, "temperature_old", lambda: nv.nvmlDeviceGetTemperature(gpu.handle, nv.NVML_TEMPERATURE_GPU)
        )

    def _fields(self, gpu: Gpu) -> dict[str, float | None]:
        """The grouped call: each value has an error of its own."""
        out: dict[str, float | None] = dict.fromkeys(FIELDS)
        wanted = [name for name in FIELDS if name not in gpu.unsupported]
        values = self._ask(
            gpu,
            "fields",
            lambda: nv.nvmlDeviceGetFieldValues(gpu.handle, [FIELDS[n] for n in wanted]) if wanted else [],
        )
        for name, value in zip(wanted, values or (), strict=False):
            code = value.nvmlReturn
            if code == nv.NVML_SUCCESS and value.valueType < len(_VALUE):
                out[name] = float(getattr(value.value, _VALUE[value.valueType]))
            else:
                self._judge(gpu, name, nv.NVMLError(code if code else nv.NVML_ERROR_UNKNOWN))
        return out

    def _ask(self, gpu: Gpu, name: str, call: Callable[[], T]) -> T | None:
        if name in gpu.unsupported:
            return None
        try:
            return call()
        except nv.NVMLError as error:
            self._judge(gpu, name, error)
            return None

    def _judge(self, gpu: Gpu, name: str, error: Any) -> None:
        """None for a value that is missing; raises where the GPU or the driver is."""
        if error.value in LOST or error.value in DRIVER:
            raise error
        if error.value in UNSUPPORTED:
            gpu.unsupported.add(name)
        else:
            self._transient(name)

    def _transient(self, name: str) -> None:
        self.failures[name] = self.failures.get(name, 0) + 1

    def _within(self, name: str, value: float | None) -> float | None:
        """None for a reading that cannot be (drivers do give 200 % and 0xffffffff)."""
        column = GPU_SAMPLES.columns[name]
        if value is None or column.low <= value <= column.high:
            return value
        self._transient(name)
        return None


def _memory(handle: Any) -> Any:
    """Version 2 tells reserved from used memory; drivers before 510 only know version 1."""
    try:
        return nv.nvmlDeviceGetMemoryInfo(handle, version=nv.nvmlMemory_v2)
    except nv.NVMLError as error:
        if error.value not in UNSUPPORTED:
            raise
        return nv.nvmlDeviceGetMemoryInfo(handle)


def _scaled(value: float | None, by: float) -> float | None:
    return None if value is None else value * by


def _text(error: Any) -> str:
    return f"{error} ({error.value})"


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
