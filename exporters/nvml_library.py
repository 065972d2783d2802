"""What is common to all calls of NVML: classes of errors, and sources whose arguments are made once.

The binding makes its arguments anew with every call; here a GPU's calls are prepared when it is found, and a call costs
what the driver takes. What each number means, the classes of errors and their treatment: NVML API reference, 13.x.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import pynvml as nv

from schemas.errors import UnavailableError
from schemas.node import GPU_SAMPLES

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

Values = dict[str, float | None]


class DriverGone(UnavailableError):
    """The driver or its library does not answer (any more): close, wait, open again."""

    def __init__(self, error: Any) -> None:
        self.mismatch = error.value == nv.NVML_ERROR_LIB_RM_VERSION_MISMATCH
        super().__init__(f"NVML: {error} ({error.value}): {_MISMATCH if self.mismatch else _NO_DRIVER}")


_NO_DRIVER = (
    "needs an NVIDIA driver on this host (does `nvidia-smi` work?); in a container, the GPUs and libnvidia-ml.so.1 "
    "passed in"
)
_MISMATCH = (
    "libnvidia-ml.so.1 and the kernel module are of different driver versions: the driver was upgraded underneath. "
    "Restart this exporter (a container: create it again); if `nvidia-smi` says the same, reboot the host or reload "
    "the nvidia modules"
)


class Source(Protocol):
    """One question to a GPU. `read` gives columns; raises NVMLError where the whole question failed."""

    name: str

    def read(self, asking: Asking) -> Values: ...


class Asking:
    """What one GPU or MIG instance has said that it does not give: not asked for again before the next `open`."""

    def __init__(self, failures: Counter[str]) -> None:
        self.failures = failures
        """Values missing once, by name: counted for all GPUs together."""
        self.unsupported: set[str] = set()

    def ask(self, source: Source) -> Values:
        """What a source gives, {} where it gives nothing. Raises NVMLError where the GPU or the driver is gone."""
        if source.name in self.unsupported:
            return {}
        try:
            return source.read(self)
        except nv.NVMLError as error:
            self.judge(source.name, error.value)
            return {}

    def judge(self, name: str, code: int) -> None:
        """Remembers or counts a value that is missing; raises NVMLError where the GPU or the driver is."""
        if code in LOST or code in DRIVER:
            raise nv.NVMLError(code)
        if code in UNSUPPORTED:
            self.unsupported.add(name)
        else:
            self.failures[name] += 1

    def within(self, values: Mapping[str, float | None]) -> Values:
        """The values without those that cannot be (drivers do give 200 % and 0xffffffff)."""
        out: Values = {}
        for name, value in values.items():
            low, high = _BOUNDS[name]
            if value is not None and not low <= value <= high:
                self.failures[name] += 1
                value = None
            out[name] = value
        return out


_BOUNDS = {name: (column.low, column.high) for name, column in GPU_SAMPLES.columns.items()}


class Scalar:
    """One function with its arguments, and what is taken from them afterwards."""

    def __init__(
        self, name: str, functions: tuple[str, ...], arguments: tuple[Any, ...], take: Callable[[], Values]
    ) -> None:
        self.name, self._arguments, self._take = name, arguments, take
        self._call = function(*functions)

    def read(self, asking: Asking) -> Values:
        """See Source."""
        code = self._call(*self._arguments)
        if code:
            raise nv.NVMLError(code)
        return self._take()


class Either:
    """Asks the second source once the first is not supported."""

    def __init__(self, first: Source, second: Source) -> None:
        self.name = f"{first.name}, {second.name}"
        self._first, self._second = first, second

    def read(self, asking: Asking) -> Values:
        """See Source."""
        values = asking.ask(self._first)
        return asking.ask(self._second) if self._first.name in asking.unsupported else values


def function(*names: str) -> Callable[..., int]:
    """The first of the functions that the loaded library has; of none, one that says so."""
    for name in names:
        found = getattr(nv.nvmlLib, name, None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    return lambda *_: nv.NVML_ERROR_FUNCTION_NOT_FOUND
