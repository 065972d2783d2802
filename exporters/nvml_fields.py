"""The grouped call: many values in one visit to the driver, each with an error and a cost of its own."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from ctypes import byref
from typing import Any, NamedTuple

import pynvml as nv

from exporters.nvml_library import Asking, Values, function

ALL_LINKS = 0xFFFFFFFF


class Field(NamedTuple):
    """A field of NVML: its id, what one of its units is in ours, and its scope."""

    id: int
    unit: float = 1.0
    scope: int = 0


FAST: dict[str, Field] = {
    "power_w": Field(nv.NVML_FI_DEV_POWER_AVERAGE, 1e-3),
    "power_instant_w": Field(nv.NVML_FI_DEV_POWER_INSTANT, 1e-3),
    "energy_j": Field(nv.NVML_FI_DEV_TOTAL_ENERGY_CONSUMPTION, 1e-3),
    "mem_temp_c": Field(nv.NVML_FI_DEV_MEMORY_TEMP),
    "throttle_power_ns": Field(nv.NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_POWER_CAP),
    "throttle_sync_ns": Field(nv.NVML_FI_DEV_CLOCKS_EVENT_REASON_SYNC_BOOST),
    "throttle_brake_ns": Field(nv.NVML_FI_DEV_CLOCKS_EVENT_REASON_HW_POWER_BRAKE_SLOWDOWN),
    "throttle_sw_thermal_ns": Field(nv.NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_THERM_SLOWDOWN),
    "throttle_hw_thermal_ns": Field(nv.NVML_FI_DEV_CLOCKS_EVENT_REASON_HW_THERM_SLOWDOWN),
    "throttle_any_thermal_ns": Field(nv.NVML_FI_DEV_PERF_POLICY_THERMAL),
    "pcie_tx_bytes": Field(nv.NVML_FI_DEV_PCIE_COUNT_TX_BYTES),
    "pcie_rx_bytes": Field(nv.NVML_FI_DEV_PCIE_COUNT_RX_BYTES),
    "nvlink_tx_bytes": Field(nv.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, 1024, ALL_LINKS),
    "nvlink_rx_bytes": Field(nv.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX, 1024, ALL_LINKS),
}
"""Column -> what is asked for each second. The three thermal counters become one column."""
SLOW: dict[str, Field] = {
    "ecc_corrected": Field(nv.NVML_FI_DEV_ECC_SBE_VOL_TOTAL),
    "ecc_uncorrected": Field(nv.NVML_FI_DEV_ECC_DBE_VOL_TOTAL),
    "remap_pending": Field(nv.NVML_FI_DEV_REMAPPED_PENDING),
    "remap_failed": Field(nv.NVML_FI_DEV_REMAPPED_FAILURE),
}
"""... and each half minute. ECC: since the driver was loaded (volatile)."""

_ROW = struct.Struct("=IIqqIiq")  # nvmlFieldValue_t: id, scope, time, latency, type, error, value
_DOUBLE, _WHOLE = struct.Struct("=d"), struct.Struct("=q")
_BITS_32, _BITS_64 = 2**32 - 1, 2**64 - 1
_VALUE: tuple[Callable[[int], float], ...] = (  # by nvmlValueType_t, of the 8 bytes of the union
    lambda raw: float(_DOUBLE.unpack(_WHOLE.pack(raw))[0]),
    lambda raw: raw & _BITS_32,
    lambda raw: raw & _BITS_64,
    lambda raw: raw & _BITS_64,
    lambda raw: raw,
    lambda raw: ((raw & _BITS_32) ^ 2**31) - 2**31,
    lambda raw: raw & 0xFFFF,
)


class Fields:
    """One grouped call of one GPU. What it says that it does not support is left out from then on."""

    def __init__(self, name: str, handle: Any, table: Mapping[str, Field]) -> None:
        self.name, self._handle = name, handle
        self._call = function("nvmlDeviceGetFieldValues")
        self.latency_us = 0
        """Time that the driver says it spent on the last call."""
        self._prepare(list(table.items()))

    def _prepare(self, table: list[tuple[str, Field]]) -> None:
        self._table = table
        self._values = (nv.c_nvmlFieldValue_t * len(table))()
        for value, (_, field) in zip(self._values, table, strict=True):
            value.fieldId, value.scopeId = field.id, field.scope
        self._out, self._bytes = byref(self._values), memoryview(self._values).cast("B")

    def read(self, asking: Asking) -> Values:
        """See Source. A field without a value is None. The unit is the column's."""
        self.latency_us = 0
        if not self._table:
            return {}
        code = self._call(self._handle, len(self._table), self._out)
        if code:
            raise nv.NVMLError(code)
        values: Values = {}
        # The bytes, not the binding's structures: their attributes cost more than the call.
        for (name, field), one in zip(self._table, _ROW.iter_unpack(self._bytes), strict=True):
            _, _, _, latency_us, type, code, raw = one
            self.latency_us += max(0, latency_us)
            if not code and type < len(_VALUE):
                values[name] = _VALUE[type](raw) * field.unit
            else:
                values[name] = None
                asking.judge(name, code or nv.NVML_ERROR_UNKNOWN)
        if not asking.unsupported.isdisjoint(values):
            self._prepare([item for item in self._table if item[0] not in asking.unsupported])
        return values
