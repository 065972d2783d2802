"""SM, tensor and DRAM activity by NVML's GPU performance monitoring: Hopper and later, whole GPUs and MIG instances."""

from __future__ import annotations

import time
from ctypes import byref
from typing import Any

import pynvml as nv

from exporters.nvml_library import Asking, Values, function

METRICS: dict[str, int] = {
    "sm_active_ratio": nv.NVML_GPM_METRIC_SM_UTIL,
    "sm_occupancy_ratio": nv.NVML_GPM_METRIC_SM_OCCUPANCY,
    "tensor_active_ratio": nv.NVML_GPM_METRIC_ANY_TENSOR_UTIL,
    "dram_active_ratio": nv.NVML_GPM_METRIC_DRAM_BW_UTIL,
}
"""Column -> metric; NVML gives percent of the time between two samples."""
APART_S = 0.11
"""Samples nearer than 100 ms are refused by the driver."""


class Activity:
    """Two samples that are taken in turn: the window is the time between two reads.

    Parameters: `instance` is the id of a MIG GPU instance of the device; None: the whole device.
    """

    name = "activity"

    def __init__(self, handle: Any, instance: int | None = None) -> None:
        self._handle, self._instance = handle, instance
        self._samples: list[Any] = []
        """The one before and the last one; empty before the first read."""
        self._taken_s = 0.0
        self._asked: Any = None

    def free(self) -> None:
        """Gives the samples back; the next read begins anew."""
        give_back = function("nvmlGpmSampleFree")
        for sample in self._samples:
            give_back(sample)  # an error means that the driver that made it is gone: nothing is left to free
        self._samples = []

    def read(self, asking: Asking) -> Values:
        """Ratios since the read before; nothing at the first. Raises NVMLError, NOT_SUPPORTED before Hopper."""
        now_s = time.monotonic()
        if not self._samples:
            self._begin()
            self._take(1, now_s)
            return {}
        window_s = now_s - self._taken_s
        if window_s < APART_S:
            return {}
        self._samples.reverse()
        self._take(1, now_s)
        asked = self._asked
        asked.sample1, asked.sample2 = self._samples
        _check(self._metrics(byref(asked)))
        values: Values = {"activity_window_s": window_s}
        for i, name in enumerate(METRICS):
            one = asked.metrics[i]
            values[name] = one.value / 100 if one.nvmlReturn == nv.NVML_SUCCESS else None
        return values

    def _begin(self) -> None:
        if not nv.nvmlGpmQueryDeviceSupport(self._handle).isSupportedDevice:
            raise nv.NVMLError(nv.NVML_ERROR_NOT_SUPPORTED)
        self._metrics = function("nvmlGpmMetricsGet")
        self._sample = function("nvmlGpmSampleGet" if self._instance is None else "nvmlGpmMigSampleGet")
        self._asked = nv.c_nvmlGpmMetricsGet_t()
        self._asked.version, self._asked.numMetrics = nv.NVML_GPM_METRICS_GET_VERSION, len(METRICS)
        for i, metric in enumerate(METRICS.values()):
            self._asked.metrics[i].metricId = metric
        self._samples = [nv.nvmlGpmSampleAlloc(), nv.nvmlGpmSampleAlloc()]

    def _take(self, which: int, now_s: float) -> None:
        subject = (self._handle,) if self._instance is None else (self._handle, self._instance)
        _check(self._sample(*subject, self._samples[which]))
        self._taken_s = now_s


def _check(code: int) -> None:
    if code:
        raise nv.NVMLError(code)
