"""Which pods hold which GPUs: kubelet's pod-resources socket, and the names of pods by their uid.

The socket (gRPC, v1, List) gives name, namespace, and the devices of each container, but no uid and no container id;
kubelet's log folder has an entry `<namespace>_<name>_<uid>` for each pod. A process is known by its uid (cgroup).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from schemas.errors import SettingsError

log = structlog.get_logger(__name__)

METHOD = "/v1.PodResourcesLister/List"
TIMEOUT_S = 5.0
BYTES_MAX = 16 * 1024 * 1024
PODS_MAX = 4096
RESOURCES = "nvidia.com/"
"""How names of extended resources begin that are GPUs, MIG instances or shares of one."""


class Holder(NamedTuple):
    """A container of a pod, and the devices that kubelet gave it."""

    pod: str
    """`namespace:name`."""
    container: str
    devices: tuple[str, ...]
    """As the device plugin names them: GPU or MIG uuid, or a number."""


class Pods:
    """Asks kubelet on a thread of its own. Parameters: paths of its socket and of its log folder; None: not asked."""

    def __init__(self, socket: Path | None, logs: Path | None) -> None:
        self.socket, self.logs = socket, logs
        self.holders: list[Holder] | None = None
        """As last said. None: nothing was said yet."""
        self.failures = 0
        self._asking: threading.Thread | None = None
        self._uids: dict[str, str] = {}
        if socket is not None:
            _grpc()

    def refresh(self) -> None:
        """Begins to ask, unless the question before is still open. What comes is there at the next look."""
        if self.socket is None or (self._asking is not None and self._asking.is_alive()):
            return
        self._asking = threading.Thread(target=self._ask, name="pods", daemon=True)
        self._asking.start()

    def name_of(self, uid: str) -> str:
        """`namespace:name` of a pod; empty where it is not known."""
        if not uid or self.logs is None:
            return ""
        if uid not in self._uids:
            self._uids = self._named()
        return self._uids.setdefault(uid, "")

    def _named(self) -> dict[str, str]:
        try:
            entries = os.listdir(self.logs or "")
        except OSError as error:
            log.info(
                "pods have no names: kubelet's log folder cannot be read", path=str(self.logs), error=error.strerror
            )
            self.logs = None
            return {}
        parts = [entry.split("_") for entry in entries[: 4 * PODS_MAX]]
        return {uid: f"{namespace}:{name}" for namespace, name, uid in (p for p in parts if len(p) == 3)}

    def _ask(self) -> None:
        grpc = _grpc()
        try:
            options = [("grpc.max_receive_message_length", BYTES_MAX), ("grpc.default_authority", "localhost")]
            with grpc.insecure_channel(f"unix://{self.socket}", options=options) as channel:
                answer = channel.unary_unary(METHOD)(b"", timeout=TIMEOUT_S)
            found = [one for one in holders(answer) if one.devices][: 8 * PODS_MAX]
        except (grpc.RpcError, ValueError) as error:
            self.failures += 1
            reason = error.details() if hasattr(error, "details") else str(error)
            log.warning("kubelet does not say which pods hold GPUs", socket=str(self.socket), error=reason)
            return
        self.holders = found


def _grpc() -> Any:
    try:
        import grpc
    except ImportError:
        raise SettingsError(
            "the pod-resources socket needs gRPC: pip install 'fleetloop[kubernetes]', or set no socket"
        ) from None
    return grpc


# -- the answer: protobuf, k8s.io/kubelet/pkg/apis/podresources/v1/api.proto -------------------------------------


def holders(answer: bytes) -> Iterator[Holder]:
    """Containers of a ListPodResourcesResponse with their NVIDIA devices. Raises ValueError for no such message."""
    for pod in _nested(answer, 1):
        name, namespace = _text(pod, 1), _text(pod, 2)
        for container in _nested(pod, 3):
            devices = [
                id.decode()
                for device in _nested(container, 2)
                if _text(device, 1).startswith(RESOURCES)
                for id in _nested(device, 2)
            ]
            yield Holder(f"{namespace}:{name}", _text(container, 1), tuple(devices))


def _text(message: bytes, number: int) -> str:
    return next((value.decode() for value in _nested(message, number)), "")


def _nested(message: bytes, number: int) -> Iterator[bytes]:
    """Values of a field of wire type 2 (text, message)."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 2:
            size, at = _varint(message, at)
            if at + size > len(message):
                raise ValueError("truncated")
            if tag >> 3 == number:
                yield message[at : at + size]
            at += size
        elif kind == 0:
            _, at = _varint(message, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("truncated")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number that does not end")
