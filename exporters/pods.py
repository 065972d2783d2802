"""Which pods hold which GPUs: kubelet's pod-resources socket, and the names of pods by their uid.

The socket (gRPC, v1, List) gives name, namespace, and the devices of each container, but no uid and no container id;
kubelet's log folder has an entry `<namespace>_<name>_<uid>` for each pod. A process is known by its uid (cgroup).
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import structlog

log = structlog.get_logger(__name__)

METHOD = "/v1.PodResourcesLister/List"
PERIOD_S, TIMEOUT_S = 10.0, 5.0
BYTES_MAX = 16 * 1024 * 1024
PODS_MAX, HOLDERS_MAX = 16_384, 32_768
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
        self.failures: Counter[str] = Counter()
        self._ask_at = 0.0
        self._asking: threading.Thread | None = None
        self._uids: dict[str, str] = {}

    def refresh(self) -> None:
        """Begins to ask where that is due and the question before was answered: who comes is there at the next look."""
        now = time.monotonic()
        if self.socket is None or now < self._ask_at or (self._asking is not None and self._asking.is_alive()):
            return
        self._ask_at = now + PERIOD_S
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
        parts = [entry.split("_") for entry in entries[:PODS_MAX]]
        return {uid: f"{namespace}:{name}" for namespace, name, uid in (p for p in parts if len(p) == 3)}

    def _ask(self) -> None:
        import grpc  # it and protobuf take 20 MB that only nodes of Kubernetes need

        options = [("grpc.max_receive_message_length", BYTES_MAX), ("grpc.default_authority", "localhost")]
        try:
            with grpc.insecure_channel(f"unix://{self.socket}", options=options) as channel:
                parse = messages()["ListPodResourcesResponse"].FromString
                self.holders = _holders(
                    channel.unary_unary(METHOD, response_deserializer=parse)(b"", timeout=TIMEOUT_S)
                )
        except grpc.RpcError as error:
            self.failures["pods"] += 1
            log.warning("kubelet does not say who holds GPUs", socket=str(self.socket), error=error.details())


_MESSAGES = {
    "ListPodResourcesResponse": {"pod_resources": (1, "PodResources")},
    "PodResources": {"name": (1, ""), "namespace": (2, ""), "containers": (3, "ContainerResources")},
    "ContainerResources": {"name": (1, ""), "devices": (2, "ContainerDevices")},
    "ContainerDevices": {"resource_name": (1, ""), "device_ids": (2, "*")},
}
"""What we read of k8s.io/kubelet/pkg/apis/podresources/v1/api.proto: field -> number and message (text, `*`: texts)."""


@cache
def messages() -> dict[str, Any]:
    """The classes of the answer's messages, by name."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="podresources/v1/api.proto", package="v1", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, type) in fields.items():
            one = message.field.add(name=field, number=number, label=kinds.LABEL_REPEATED, type=kinds.TYPE_MESSAGE)
            if type in _MESSAGES:
                one.type_name = f".v1.{type}"
            else:
                one.type = kinds.TYPE_STRING
                one.label = kinds.LABEL_REPEATED if type else kinds.LABEL_OPTIONAL
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"v1.{name}")) for name in _MESSAGES}


def _holders(answer: Any) -> list[Holder]:
    """Containers of a ListPodResourcesResponse that have NVIDIA devices."""
    found = []
    for pod in answer.pod_resources:
        for container in pod.containers:
            devices = [one for one in container.devices if one.resource_name.startswith(RESOURCES)]
            ids = tuple(id for device in devices for id in device.device_ids)
            if ids:
                found.append(Holder(f"{pod.namespace}:{pod.name}", container.name, ids))
    return found[:HOLDERS_MAX]
