"""Xid errors and other events of GPUs, on a thread of their own: the driver says each once, to whoever waits."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from typing import Any

import pynvml as nv
import structlog

from exporters.nvml_library import DRIVER

log = structlog.get_logger(__name__)

WAIT_MS = 1000
"""Longest time in the driver: after it the thread looks whether it should end."""
KINDS = {
    nv.nvmlEventTypeXidCriticalError: "xid",
    nv.nvmlEventTypeDoubleBitEccError: "double bit ECC error",
    nv.nvmlEventTypeGpuUnavailableError: "GPU unavailable",
    nv.nvmlEventTypeGpuRecoveryAction: "recovery action changed",
}


class Events:
    """Waits for events of the GPUs that it is started with.

    It holds the driver open for itself (NVML counts its users), so it never meets a set that somebody else freed.
    Parameters: `happened` is called on its thread with (uuid, Xid code or None for another event).
    """

    def __init__(self, happened: Callable[[str, int | None], None]) -> None:
        self._happened = happened
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, uuids: list[str]) -> None:
        """Begins to wait, on a new thread."""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(uuids, self._end), name="nvml-events", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread, or leaves it to the driver that does not let it go."""
        self._end.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * WAIT_MS / 1000)
            self._thread = None

    def _work(self, uuids: list[str], end: threading.Event) -> None:
        try:
            nv.nvmlInit()
            try:
                self._wait(uuids, end)
            finally:
                nv.nvmlShutdown()
        except nv.NVMLError as error:  # who reads the GPUs sees the same, and starts us again
            log.warning("no more events of GPUs", error=str(error))

    def _wait(self, uuids: list[str], end: threading.Event) -> None:
        waited = nv.nvmlEventSetCreate()
        try:
            known = {}
            for uuid in uuids:
                handle = _register(uuid, waited)
                if handle is not None:
                    known[_address(handle)] = uuid
            while known and not end.is_set():
                try:
                    event = nv.nvmlEventSetWait_v2(waited, WAIT_MS)
                except nv.NVMLError as error:
                    if error.value in DRIVER:
                        raise
                    if error.value != nv.NVML_ERROR_TIMEOUT:
                        log.warning("waiting for events of GPUs failed", error=str(error))
                        end.wait(WAIT_MS / 1000)
                    continue
                self._say(known.get(_address(event.device)), event)
        finally:
            nv.nvmlEventSetFree(waited)

    def _say(self, uuid: str | None, event: Any) -> None:
        if uuid is None:
            return
        kind = KINDS.get(event.eventType, str(event.eventType))
        xid = event.eventData if event.eventType == nv.nvmlEventTypeXidCriticalError else None
        log.warning("a GPU said something", uuid=uuid, kind=kind, data=event.eventData, at_s=round(time.time(), 3))
        self._happened(uuid, xid)


def _register(uuid: str, waited: Any) -> Any:
    """The handle of a GPU that has events we want; None: it has none."""
    try:
        handle = nv.nvmlDeviceGetHandleByUUID(uuid.encode())
        kinds = nv.nvmlDeviceGetSupportedEventTypes(handle) & sum(KINDS)
        if not kinds:
            return None
        nv.nvmlDeviceRegisterEvents(handle, kinds, waited)
    except nv.NVMLError as error:
        if error.value in DRIVER:
            raise
        log.info("no events of this GPU", uuid=uuid, error=str(error))
        return None
    return handle


def _address(handle: Any) -> int:
    return ctypes.cast(handle, ctypes.c_void_p).value or 0
