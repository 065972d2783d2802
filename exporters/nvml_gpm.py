"""SM, tensor and DRAM activity by NVML's GPU performance monitoring: Hopper and later."""

from __future__ import annotations

import contextlib
from typing import Any

import pynvml as nv

METRICS: dict[str, int] = {
    "sm_active_ratio": nv.NVML_GPM_METRIC_SM_UTIL,
    "sm_occupancy_ratio": nv.NVML_GPM_METRIC_SM_OCCUPANCY,
    "tensor_active_ratio": nv.NVML_GPM_METRIC_ANY_TENSOR_UTIL,
    "dram_active_ratio": nv.NVML_GPM_METRIC_DRAM_BW_UTIL,
}
"""Column -> metric; NVML gives percent of the time between two samples."""


class Activity:
    """Two samples a GPU that are taken in turn: the window is the time between two reads (> 100 ms needed)."""

    def __init__(self) -> None:
        self._before: Any = None
        self._after: Any = None

    def free(self) -> None:
        """Gives the samples back; the next read begins anew."""
        for sample in (self._before, self._after):
            if sample is not None:
                with contextlib.suppress(nv.NVMLError):  # the driver that made them may be gone
                    nv.nvmlGpmSampleFree(sample)
        self._before = self._after = None

    def read(self, handle: Any) -> dict[str, float | None]:
        """Ratios since the read before; nothing at the first. Raises NVMLError, NOT_SUPPORTED before Hopper."""
        if self._after is None:
            if not nv.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice:
                raise nv.NVMLError(nv.NVML_ERROR_NOT_SUPPORTED)
            self._before, self._after = nv.nvmlGpmSampleAlloc(), nv.nvmlGpmSampleAlloc()
            nv.nvmlGpmSampleGet(handle, self._after)
            return {}
        self._before, self._after = self._after, self._before
        nv.nvmlGpmSampleGet(handle, self._after)
        asked = nv.c_nvmlGpmMetricsGet_t()
        asked.version = nv.NVML_GPM_METRICS_GET_VERSION
        asked.numMetrics = len(METRICS)
        asked.sample1, asked.sample2 = self._before, self._after
        for i, metric in enumerate(METRICS.values()):
            asked.metrics[i].metricId = metric
        nv.nvmlGpmMetricsGet(asked)
        return {
            name: asked.metrics[i].value / 100 if asked.metrics[i].nvmlReturn == nv.NVML_SUCCESS else None
            for i, name in enumerate(METRICS)
        }
