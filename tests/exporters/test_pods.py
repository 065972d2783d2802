"""Which pods hold which GPUs: kubelet's socket served by a real gRPC server, and names by uid."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from exporters import pods as module
from exporters.pods import METHOD, Holder, Pods, messages

Devices = dict[str, list[str]]


def answer(*pods: tuple[str, str, dict[str, Devices]]) -> Any:
    """A ListPodResourcesResponse of (namespace, name, container -> resource -> device ids)."""
    made = messages()["ListPodResourcesResponse"]()
    for namespace, name, containers in pods:
        pod = made.pod_resources.add(namespace=namespace, name=name)
        for container, resources in containers.items():
            one = pod.containers.add(name=container)
            for resource, ids in resources.items():
                one.devices.add(resource_name=resource, device_ids=ids)
    return made


class Kubelet:
    """Serves pod-resources on a unix socket."""

    def __init__(self, socket: Path) -> None:
        self.socket, self.says, self.asked = socket, answer().SerializeToString(), 0
        self._server: Any = None

    def start(self) -> None:
        """Begins to listen, with a new socket."""

        def serve(request: bytes, context: Any) -> bytes:
            assert request == b""
            self.asked += 1
            return self.says

        service, method = METHOD[1:].split("/")
        self._server = grpc.server(ThreadPoolExecutor(2))
        handlers = {method: grpc.unary_unary_rpc_method_handler(serve)}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        self._server.add_insecure_port(f"unix://{self.socket}")
        self._server.start()

    def stop(self) -> None:
        """As when kubelet is restarted."""
        self._server.stop(None).wait()


@pytest.fixture
def kubelet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kubelet]:
    """A kubelet that is up; asked at every refresh."""
    monkeypatch.setattr(module, "PERIOD_S", 0.0)
    made = Kubelet(tmp_path / "kubelet.sock")
    made.start()
    yield made
    made.stop()


def ask(pods: Pods) -> list[Holder] | None:
    """Asks, and waits for the answer."""
    pods.refresh()
    assert pods._asking is not None
    pods._asking.join(20)
    return pods.holders


def test_holders_are_containers_with_gpus(kubelet: Kubelet) -> None:
    """GPUs, MIG instances and shares of one; other devices and containers without any are nobody's."""
    kubelet.says = answer(
        ("prod", "chat-7d9f-abcde", {"vllm": {"nvidia.com/gpu": ["GPU-1", "GPU-2"]}, "proxy": {}}),
        ("prod", "small-0", {"engine": {"nvidia.com/mig-1g.10gb": ["MIG-1"], "example.com/nic": ["nic0"]}}),
        ("dev", "notebook", {"jupyter": {"nvidia.com/gpu.shared": ["GPU-3::1"]}}),
        ("dev", "web", {"nginx": {"example.com/nic": ["nic1"]}}),
    ).SerializeToString()
    pods = Pods(kubelet.socket, None)
    assert pods.holders is None
    assert ask(pods) == [
        Holder("prod:chat-7d9f-abcde", "vllm", ("GPU-1", "GPU-2")),
        Holder("prod:small-0", "engine", ("MIG-1",)),
        Holder("dev:notebook", "jupyter", ("GPU-3::1",)),
    ]
    assert pods.failures == {}


def test_fields_that_are_not_known_are_skipped(kubelet: Kubelet) -> None:
    """A newer kubelet says more: cpu ids, topology, dynamic resources."""
    plain = answer(("a", "b", {"c": {"nvidia.com/gpu": ["GPU-1"]}})).SerializeToString()
    cpus = b"\x1a\x02\x01\x02"  # field 3 of a container: packed numbers
    container = b"\n\x01c" + b"\x12\x17\n\x0envidia.com/gpu\x12\x05GPU-1" + cpus
    pod = b"\n\x01b" + b"\x12\x01a" + b"\x1a" + bytes([len(container)]) + container
    kubelet.says = b"\n" + bytes([len(pod)]) + pod
    assert kubelet.says != plain
    assert ask(Pods(kubelet.socket, None)) == [Holder("a:b", "c", ("GPU-1",))]


def test_a_kubelet_that_restarts_is_asked_again(kubelet: Kubelet) -> None:
    """While it is away what it said last holds, and each failure is counted."""
    kubelet.says = answer(("a", "b", {"c": {"nvidia.com/gpu": ["GPU-1"]}})).SerializeToString()
    pods = Pods(kubelet.socket, None)
    first = ask(pods)
    kubelet.stop()
    assert ask(pods) == first
    assert pods.failures == {"pods": 1}
    kubelet.says = answer().SerializeToString()
    kubelet.start()
    assert ask(pods) == []


def test_an_answer_that_is_none_is_a_failure(kubelet: Kubelet) -> None:
    """Bytes that are no such message change nothing."""
    kubelet.says = b"\xff\xff\xff"
    pods = Pods(kubelet.socket, None)
    assert ask(pods) is None
    assert pods.failures == {"pods": 1}


def test_it_is_asked_in_its_own_time(kubelet: Kubelet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at processes does not ask each time, and never without a socket."""
    monkeypatch.setattr(module, "PERIOD_S", 3600.0)
    pods = Pods(kubelet.socket, None)
    ask(pods)
    ask(pods)
    assert kubelet.asked == 1
    Pods(None, None).refresh()
    assert kubelet.asked == 1


def test_names_by_uid(tmp_path: Path) -> None:
    """Kubelet's log folder names each pod; one that comes later is found when it is first asked for."""
    (tmp_path / "prod_chat-0_uid-1").mkdir()
    (tmp_path / "odd_entry").mkdir()
    pods = Pods(None, tmp_path)
    assert (pods.name_of("uid-1"), pods.name_of("uid-2"), pods.name_of("")) == ("prod:chat-0", "", "")
    (tmp_path / "dev_b_uid-3").mkdir()
    assert pods.name_of("uid-3") == "dev:b"
    missing = Pods(None, tmp_path / "missing")
    assert (missing.name_of("uid-1"), missing.logs) == ("", None)
