"""Who a process is, from a /proc made of files: containers, pods, process ids of namespaces, and who is gone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from exporters.processes import Processes, of_cgroup

ID, OTHER = "0123456789abcdef" * 4, "f" * 64
UID = "1b9a6a3e-2f4c-4f0e-9c1b-8d2e6a7f5c31"
UNDERSCORED = UID.replace("-", "_")
STATIC = "a1b2c3d4" * 4
TICKS = os.sysconf("SC_CLK_TCK")


class Host:
    """A /proc in a folder."""

    def __init__(self, folder: Path, ids: str = "1") -> None:
        self.proc = folder / "proc"
        own = self.proc / "self"
        own.mkdir(parents=True)
        (own / "status").write_text(f"Name:\tfleetloop\nNSpid:\t{ids}\n")
        self.process(1, name="systemd", command="init", parent=0, gpu=False)

    def process(
        self,
        pid: int,
        *,
        name: str = "engine",
        state: str = "S",
        threads: int = 4,
        cpu_ticks: int = 0,
        start: int = 100,
        cgroup: str = "0::/",
        command: str = "engine",
        parent: int = 1,
        ids: str = "",
        gpu: bool = True,
    ) -> None:
        """Starts a process, or changes one."""
        folder = self.proc / str(pid)
        (folder / "fd").mkdir(parents=True, exist_ok=True)
        stat = f"{pid} ({name}) {state} {parent} 1 1 0 -1 0 0 0 0 0 {cpu_ticks} 0 0 0 20 0 {threads} 0 {start} 0 0"
        (folder / "stat").write_text(stat)
        (folder / "status").write_text(f"Name:\t{name}\nPPid:\t{parent}\nNSpid:\t{ids or pid}\n")
        (folder / "cgroup").write_text(cgroup + "\n")
        (folder / "cmdline").write_bytes(command.replace(" ", "\0").encode())
        (folder / "fd" / "3").unlink(missing_ok=True)
        (folder / "fd" / "3").symlink_to("/dev/nvidia0" if gpu else "/dev/null")

    def end(self, pid: int) -> None:
        """Ends a process."""
        for path in sorted((self.proc / str(pid)).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        (self.proc / str(pid)).rmdir()


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


CGROUPS = {
    "docker, v1": (f"12:cpu,cpuacct:/docker/{ID}\n11:memory:/docker/{ID}", ID, ""),
    "docker, systemd, v2": (f"0::/system.slice/docker-{ID}.scope", ID, ""),
    "docker, rootless": (f"0::/user.slice/user-1000.slice/user@1000.service/user.slice/docker-{ID}.scope", ID, ""),
    "containerd, cgroupfs, v1": (f"3:memory:/kubepods/burstable/pod{UID}/{ID}", ID, UID),
    "containerd, systemd, v2": (
        f"0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{UNDERSCORED}.slice/cri-containerd-{ID}.scope",
        ID,
        UID,
    ),
    "containerd, guaranteed": (
        f"0::/kubepods.slice/kubepods-pod{UNDERSCORED}.slice/cri-containerd-{ID}.scope",
        ID,
        UID,
    ),
    "containerd under its own service": (
        f"1:name=systemd:/system.slice/containerd.service/kubepods-besteffort-pod{UNDERSCORED}.slice:cri-containerd:{ID}",
        ID,
        UID,
    ),
    "CRI-O": (f"0::/kubepods.slice/kubepods-pod{UNDERSCORED}.slice/crio-{ID}.scope/container", ID, UID),
    "CRI-O's monitor is not the container": (
        f"0::/kubepods.slice/kubepods-pod{UNDERSCORED}.slice/crio-conmon-{ID}.scope",
        "",
        UID,
    ),
    "static pod": (f"0::/kubepods.slice/kubepods-pod{STATIC}.slice/cri-containerd-{ID}.scope", ID, STATIC),
    "podman": (f"0::/machine.slice/libpod-{ID}.scope/container", ID, ""),
    "a cluster in a container": (
        f"0::/docker/{OTHER}/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{UNDERSCORED}.slice/cri-containerd-{ID}.scope",
        ID,
        UID,
    ),
    "seen from another cgroup namespace": (
        f"0::/../../kubepods-pod{UNDERSCORED}.slice/cri-containerd-{ID}.scope",
        ID,
        UID,
    ),
    "v1 and v2 together": (f"4:devices:/kubepods/pod{UID}/{ID}\n0::/system.slice/containerd.service", ID, UID),
    "none": ("0::/user.slice/user-1000.slice/session-3.scope", "", ""),
    "not read": ("", "", ""),
}


@pytest.mark.parametrize("form", CGROUPS)
def test_containers_and_pods_by_control_group(form: str) -> None:
    """Each runtime and driver names groups its own way."""
    text, container, pod = CGROUPS[form]
    assert of_cgroup(text) == (container, pod)


def test_a_process_with_its_commands_and_time(host: Host) -> None:
    """A name may hold brackets; commands go up to the parents, who have the arguments that workers lack."""
    host.process(40, name="vllm", command="vllm serve m --port 8001")
    host.process(
        41, name="VLLM::(W) 0", command="VLLM::Worker_TP0", parent=40, cpu_ticks=150, cgroup=CGROUPS["CRI-O"][0]
    )
    found = Processes(host.proc).look([41])[41]
    assert found is not None
    assert (found.pid, found.name, found.container, found.pod_uid) == (41, "VLLM::(W) 0", ID, UID)
    assert found.commands == ["VLLM::Worker_TP0", "vllm serve m --port 8001"]
    assert found.cpu_s == pytest.approx(150 / TICKS)
    assert "vllm serve" not in repr(found)


def test_cpu_time_goes_on_and_a_reused_id_is_another_process(host: Host) -> None:
    """Who a process is, is read once; an id whose start time changed is somebody else."""
    host.process(40, cpu_ticks=10, cgroup=CGROUPS["podman"][0])
    processes = Processes(host.proc)
    first = processes.look([40])[40]
    host.process(40, cpu_ticks=30, cgroup="0::/elsewhere")
    second = processes.look([40])[40]
    assert second is first
    assert second is not None
    assert (second.cpu_s, second.container) == (pytest.approx(30 / TICKS), ID)
    host.process(40, start=999, cpu_ticks=1, cgroup="0::/elsewhere")
    third = processes.look([40])[40]
    assert third is not None
    assert (third.start, third.container) == ("999", "")


def test_who_is_gone(host: Host) -> None:
    """Ended, or a zombie without threads; a leader whose threads live on is not gone."""
    host.process(40)
    host.process(41, state="Z", threads=1)
    host.process(42, state="Z", threads=3)
    found = Processes(host.proc).look([40, 41, 42, 43])
    assert {pid: one is not None for pid, one in found.items()} == {40: True, 42: True, 41: False, 43: False}
    processes = Processes(host.proc)
    processes.look([40])
    host.end(40)
    assert processes.look([40]) == {40: None}


def test_ids_of_our_own_namespace_are_translated(tmp_path: Path) -> None:
    """With the host's /proc mounted in a container the driver may give ids that only the container knows: a process of
    that id that has no GPU open is somebody else."""
    host = Host(tmp_path, ids="5000\t12")
    host.process(37, gpu=False)  # a kernel thread of the host
    host.process(5037, ids="5037\t37")
    host.process(6000, ids="6000\t37", gpu=False)
    host.process(40)
    processes = Processes(host.proc)
    assert processes.nested
    assert processes.whole
    found = processes.look([37, 40])
    assert {pid: one.pid for pid, one in found.items() if one} == {37: 5037, 40: 40}
    host.process(7000, ids="7000\t37")
    host.end(5037)
    assert processes.look([37, 40])[40] is not None


def test_ambiguous_ids_are_nobody(tmp_path: Path) -> None:
    """Two containers have a process with that id and a GPU: neither is taken."""
    host = Host(tmp_path, ids="5000\t12")
    host.process(5037, ids="5037\t37")
    host.process(6037, ids="6037\t37")
    assert Processes(host.proc).look([37]) == {37: None}


def test_in_a_namespace_of_its_own_nobody_is_gone(host: Host) -> None:
    """Where other containers' processes cannot be seen, one that is not there may well live."""
    (host.proc / "self/ns").mkdir()
    (host.proc / "self/ns/pid").symlink_to("pid:[4026532888]")
    processes = Processes(host.proc)
    assert not processes.whole
    host.process(40)
    assert list(processes.look([40, 41])) == [40]
    (host.proc / "self/ns/pid").unlink()
    (host.proc / "self/ns/pid").symlink_to("pid:[4026531836]")
    assert Processes(host.proc).look([41]) == {41: None}


def test_where_other_users_are_hidden_nobody_is_gone(host: Host) -> None:
    """A /proc mounted with hidepid shows only one's own: not even the first process."""
    host.end(1)
    assert Processes(host.proc).look([41]) == {}


def test_the_real_proc(tmp_path: Path) -> None:
    """This process, by the kernel's own files."""
    found = Processes().look([os.getpid()])[os.getpid()]
    assert found is not None
    assert found.cpu_s is not None
    assert found.cpu_s > 0
    assert any("pytest" in command for command in found.commands)
