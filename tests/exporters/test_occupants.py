"""Who is on the GPUs: driver, /proc and kubelet joined into rows and replicas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exporters.inventory import Holdings
from exporters.nvml_processes import Held
from exporters.occupants import ROWS_MAX, Occupants
from exporters.pods import Holder, Pods
from exporters.processes import Processes
from schemas.node import PROCESS_SAMPLES, GpuEntry
from tests.exporters.test_processes import CGROUPS, ID, UID, Host

GPUS = [
    GpuEntry(gpu=0, uuid="GPU-0", gpu_type="H100"),
    GpuEntry(gpu=1, uuid="GPU-1", gpu_type="H100"),
    GpuEntry(gpu=33, uuid="MIG-1-1", gpu_type="H100", parent=1, mig_profile="1g.10gb"),
]
CONTAINERD = CGROUPS["containerd, systemd, v2"][0]
MAPPING = "match: [{pod: 'prod:(?P<pool>[a-z]+).*', pool: $pool}]"


class Scene:
    """A host with a mapping, and a kubelet that said something."""

    def __init__(self, folder: Path, mapping: str = MAPPING) -> None:
        self.host = Host(folder)
        self.logs = folder / "pods"
        self.logs.mkdir()
        path = folder / "mapping.yaml"
        path.write_text(mapping)
        self.holdings = Holdings(path, "node-1")
        self.holdings.refresh(0.0)
        self.pods = Pods(None, self.logs)
        self._made: Occupants | None = None

    def rows(self, held: dict[int, list[Held]]) -> list[dict[str, Any]]:
        """Rows that the schema takes, without what is null."""
        if self._made is None:
            self._made = Occupants("node-1", Processes(self.host.proc), self.pods, self.holdings)
        columns = self._made.look(held, GPUS, lambda: 1.0)
        batch = PROCESS_SAMPLES.decode(PROCESS_SAMPLES.encode(columns))
        assert batch.refused == []
        assert batch.rows == len(columns["gpu"])
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return [{name: value for name, value in row.items() if value is not None} for row in rows]


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_a_process_in_a_pod_by_its_uid(scene: Scene) -> None:
    """Container, pod, replica and pool follow from the control group and the name of the log folder."""
    (scene.logs / f"prod_chat-0_{UID}").mkdir()
    scene.host.process(40, cgroup=CONTAINERD, cpu_ticks=100)
    (row,) = scene.rows({0: [Held(40, True, 100.0, 30.0, 5.0)]})
    assert {name: row[name] for name in ("pod", "container", "replica", "gone", "mem_bytes", "sm_util_pct")} == {
        "pod": "prod:chat-0",
        "container": ID,
        "replica": "chat-0",
        "gone": 0,
        "mem_bytes": 100,
        "sm_util_pct": 30,
    }
    (replica,) = scene.holdings.replicas()
    assert (replica.replica, replica.pool, replica.gpus, replica.state) == ("chat-0", "chat", [0], "ready")


def test_a_process_in_the_only_pod_that_was_given_the_gpu(scene: Scene) -> None:
    """Without names by uid: kubelet says who has the device; where two share it, nobody is guessed."""
    scene.host.process(40, cgroup=CONTAINERD)
    scene.host.process(41)  # in no pod
    scene.pods.holders = [Holder("prod:chat-0", "vllm", ("GPU-0",))]
    held = {0: [Held(40, True, 1.0, None, None), Held(41, True, 1.0, None, None)]}
    assert [(row.get("pod"), row.get("replica")) for row in scene.rows(held)] == [
        ("prod:chat-0", "chat-0"),
        (None, None),
    ]
    scene.pods.holders = [Holder("prod:chat-0", "vllm", ("GPU-0::0",)), Holder("prod:chat-1", "vllm", ("GPU-0::1",))]
    assert [row.get("pod") for row in scene.rows(held)] == [None, None]
    assert [(one.replica, one.state, one.gpu_share) for one in scene.holdings.replicas()] == [
        ("chat-0", "starting", 0.5),
        ("chat-1", "starting", 0.5),
    ]


@pytest.mark.parametrize(
    ("device", "gpus"),
    [
        ("GPU-1", [1]),
        ("MIG-1-1", [33]),
        ("GPU-0::7", [0]),
        ("1", [1]),
        ("nvidia1", [1]),
        ("nvidia1/gi1", [33]),
        ("GPU-other", None),
        ("nvidia9", None),
    ],
)
def test_names_of_devices(scene: Scene, device: str, gpus: list[int] | None) -> None:
    """Device plugins name by uuid, by share, by number, and GKE's by device file."""
    scene.pods.holders = [Holder("prod:chat-0", "vllm", (device,))]
    scene.rows({})
    found = scene.holdings.replicas()
    assert (found[0].gpus if found else None) == gpus


def test_memory_of_the_dead_is_said_from_the_second_look_on(scene: Scene) -> None:
    """Once may be a process that is just ending; then `gone` is 1, with the memory, without an owner."""
    held = {0: [Held(99, True, 5e9, 0.0, 0.0)]}
    assert "gone" not in scene.rows(held)[0]
    (row,) = scene.rows(held)
    assert (row["pid"], row["gone"], row["mem_bytes"]) == (99, 1, 5e9)
    assert not {"name", "cpu_s", "replica"} & set(row)


def test_who_used_a_gpu_and_ended_is_no_row(scene: Scene) -> None:
    """A sample of a process that no longer exists and holds nothing is history."""
    scene.host.process(40)
    found = scene.rows({0: [Held(99, False, None, 7.0, 1.0), Held(40, False, None, 8.0, 1.0)]})
    assert [(row["pid"], row["sm_util_pct"]) for row in found] == [(40, 8)]


def test_a_gpu_that_did_not_answer_keeps_its_replicas(scene: Scene) -> None:
    """No list this time: no rows, and nobody has gone."""
    (scene.logs / f"prod_chat-0_{UID}").mkdir()
    scene.host.process(40, cgroup=CONTAINERD)
    scene.rows({0: [Held(40, True, 1.0, None, None)]})
    before = scene.holdings.replicas()
    assert scene.rows({}) == []
    assert scene.holdings.replicas() is before
    assert scene.rows({0: []}) == []
    assert scene.holdings.replicas() == []


def test_processes_that_cannot_be_seen_are_rows_without_a_name(scene: Scene) -> None:
    """In a namespace of its own the exporter says what the driver says, and claims nobody's death."""
    (scene.host.proc / "self/ns").mkdir()
    (scene.host.proc / "self/ns/pid").symlink_to("pid:[4026532888]")
    held = {0: [Held(40, True, 1.0, None, None)]}
    for _ in range(3):
        (row,) = scene.rows(held)
        assert row["pid"] == 40
        assert not {"gone", "name", "cpu_s"} & set(row)


def test_a_name_that_is_not_printable(scene: Scene) -> None:
    """A process can call itself anything; the row is not refused for it."""
    scene.host.process(40, name="a\x07b")
    assert scene.rows({0: [Held(40, True, 1.0, None, None)]})[0]["name"] == "ab"


def test_rows_are_bounded_and_counted(scene: Scene) -> None:
    """More processes than a record takes are left out, and counted; as many as it takes fit its topic."""
    held = [Held(pid, True, 1.0, None, None) for pid in range(1, ROWS_MAX + 11)]
    assert len(scene.rows({0: held})) == ROWS_MAX
    assert scene._made is not None
    assert scene._made.dropped == 10
