"""Processes as the driver counts them: lists, sizes, and everything that drivers are known to get wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pynvml as nv
import pytest

from exporters import nvml_events, nvml_processes
from exporters.nvml_processes import ROOM, Held
from exporters.nvml_reader import NvmlReader
from tests.exporters.nvml_stub import Stub

MB = 2**20


@pytest.fixture
def reader(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NvmlReader]:
    """One GPU, open."""
    monkeypatch.setattr(nvml_events, "WAIT_MS", 50)
    made = NvmlReader(proc=tmp_path)
    made.open()
    yield made
    made.close()


def look(reader: NvmlReader) -> dict[int, Held]:
    """Processes of GPU 0 by id."""
    return {held.pid: held for held in reader.processes()[0]}


def test_all_lists_are_one(stub: Stub, reader: NvmlReader) -> None:
    """Compute, graphics and clients of a multi-process server; a process on several lists counts once; memory that the
    driver does not say is null, never 0."""
    stub.set({"processes@0": f"10:{5 * MB},11:-1", "graphics@0": f"10:{6 * MB},12:{MB}", "mps@0": f"13:{2 * MB}"})
    memory = {pid: held.mem_bytes for pid, held in look(reader).items()}
    assert memory == {10: 6 * MB, 11: None, 12: MB, 13: 2 * MB}
    assert all(held.holds for held in look(reader).values())


def test_utilisation_is_since_the_look_before(stub: Stub, reader: NvmlReader) -> None:
    """The first look only says from when on; then who is not listed used nothing, which is 0 and not unknown."""
    stub.set({"processes@0": f"10:{MB},11:{MB}", "utilisation@0": "10:35:12"})
    assert look(reader)[10].sm_util_pct is None
    found = look(reader)
    assert (found[10].sm_util_pct, found[10].mem_util_pct) == (35, 12)
    assert (found[11].sm_util_pct, found[11].mem_util_pct) == (0, 0)


def test_an_idle_gpu_is_no_error(stub: Stub, reader: NvmlReader) -> None:
    """The driver says NOT_FOUND when nobody used it: everybody's share is 0."""
    stub.set({"processes@0": f"10:{MB}"})
    look(reader)
    assert look(reader)[10].sm_util_pct == 0
    assert reader.failures == {}


def test_nobody_at_all(stub: Stub, reader: NvmlReader) -> None:
    """No process is an empty list, not an unknown one."""
    assert reader.processes() == {0: []}


GARBAGE = {
    "process 0": "0:50:1",
    "more than all": "10:900:1",
    "more memory time than all": "10:1:101",
    "stale": "10:50:1:1000!",
    "in the far future": "10:50:1:-100000000",
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_is_dropped(stub: Stub, reader: NvmlReader, kind: str) -> None:
    """Samples that cannot be are nobody's; what comes with them, and after them, is still read."""
    stub.set({"processes@0": f"10:{MB},11:{MB}", "utilisation@0": "11:5:5"})
    look(reader)
    look(reader)
    stub.set({"utilisation@0": f"11:20:1,{GARBAGE[kind]}"})
    found = look(reader)
    assert (found[11].sm_util_pct, found[10].sm_util_pct) == (20, 0)
    assert 0 not in found
    stub.set({"utilisation@0": "11:21:1"})
    assert look(reader)[11].sm_util_pct == 21


def test_garbage_in_the_first_look_spoils_no_later_one(stub: Stub, reader: NvmlReader) -> None:
    """A time stamp of next year among good ones is not taken for the time."""
    stub.set({"processes@0": f"10:{MB}", "utilisation@0": "10:5:5,11:6:6,12:50:1:-30000000"})
    look(reader)
    stub.set({"utilisation@0": "10:33:1"})
    assert look(reader)[10].sm_util_pct == 33


def test_a_clock_set_back_is_overcome(stub: Stub, reader: NvmlReader, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a minute of nothing new, everything that the driver has is looked at again."""
    stub.set({"processes@0": f"10:{MB}", "utilisation@0": "10:5:5"})
    look(reader)
    look(reader)
    stub.set({"utilisation@0": "10:40:5:3600"})
    assert look(reader)[10].sm_util_pct == 0
    monkeypatch.setattr(nvml_processes, "STALE_S", -1.0)
    look(reader)
    monkeypatch.setattr(nvml_processes, "STALE_S", 60.0)
    assert look(reader)[10].sm_util_pct == 40


def test_who_only_used_it_is_told_apart(stub: Stub, reader: NvmlReader) -> None:
    """A process that ended since its last sample holds nothing."""
    stub.set({"utilisation@0": "10:5:5"})
    look(reader)
    assert look(reader)[10] == Held(10, False, None, 5, 5)


@pytest.mark.parametrize("count", [ROOM - 1, ROOM, ROOM + 1])
def test_any_number_of_processes(stub: Stub, reader: NvmlReader, count: int) -> None:
    """The room for the answer grows until it fits."""
    stub.set({"processes@0": ",".join(f"{i}:1" for i in range(1, count + 1))})
    assert len(look(reader)) == count


def test_the_room_has_a_bound(stub: Stub, reader: NvmlReader, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that always wants more is not given it: the list is unknown, and counted."""
    monkeypatch.setattr(nvml_processes, "ROOM_MAX", ROOM)
    stub.set({"processes@0": ",".join(f"{i}:1" for i in range(1, ROOM + 2))})
    assert reader.processes() == {}
    assert sum(reader.failures.values()) == 1


@pytest.mark.parametrize("kind", ["Compute", "Graphics"])
def test_a_list_that_fails_once_is_not_an_empty_one(stub: Stub, reader: NvmlReader, kind: str) -> None:
    """A replica must not seem to have gone because the driver was busy."""
    function = f"nvmlDeviceGet{kind}RunningProcesses_v3"
    stub.set({"processes@0": f"10:{MB}", f"error.{function}": nv.NVML_ERROR_UNKNOWN})
    assert reader.processes() == {}
    assert sum(reader.failures.values()) == 1
    stub.set({f"error.{function}": None})
    assert list(look(reader)) == [10]


def test_lists_that_the_driver_does_not_have(stub: Stub, reader: NvmlReader) -> None:
    """Without the graphics list the others are whole; without any it is not known who is there."""
    stub.set({"processes@0": f"10:{MB}", "error.nvmlDeviceGetGraphicsRunningProcesses_v3": nv.NVML_ERROR_NOT_SUPPORTED})
    assert list(look(reader)) == [10]
    for kind in ("Compute", "MPSCompute"):
        stub.set({f"error.nvmlDeviceGet{kind}RunningProcesses_v3": nv.NVML_ERROR_NO_PERMISSION})
    assert reader.processes() == {}


def test_a_share_is_unknown_where_the_driver_has_none(stub: Stub, reader: NvmlReader) -> None:
    """As on MIG instances."""
    stub.set({"processes@0": f"10:{MB}", "error.nvmlDeviceGetProcessUtilization": nv.NVML_ERROR_NOT_SUPPORTED})
    look(reader)
    assert (look(reader)[10].mem_bytes, look(reader)[10].sm_util_pct) == (MB, None)
    assert stub.calls("nvmlDeviceGetProcessUtilization") == 1


def test_processes_of_mig_instances_are_not_the_boards(stub: Stub, reader: NvmlReader) -> None:
    """Each is listed once, under its instance."""
    stub.set({"mig@0": "1:1g.10gb,2:1g.10gb", "processes@0": f"10:{MB}:1,11:{MB}:2"})
    reader.read(lambda: 0.0)
    found = reader.processes()
    assert {gpu: [held.pid for held in each] for gpu, each in found.items()} == {17: [10], 18: [11]}


def test_a_lost_gpu_has_no_list(stub: Stub, reader: NvmlReader) -> None:
    """Its processes are unknown, and it is noted as lost."""
    stub.set({"error.*@0": nv.NVML_ERROR_GPU_IS_LOST})
    assert reader.processes() == {}
    assert reader.read(lambda: 0.0)[0]["status"] == "lost"
