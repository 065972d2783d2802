"""SGLang's export files, followed: every request once the broker has it, through rotation, half lines and restarts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import exporters.tail as tail_module
from exporters.intake import Intake
from exporters.intake_options import IntakeOptions
from exporters.intake_sink import NotStored
from exporters.tail import LINE_BYTES_MAX, STATE_FILE, Tail
from schemas.base import decode
from schemas.config import Deployment
from schemas.deadletters import DeadLetter
from schemas.errors import SettingsError
from schemas.requests import REQUEST_ROWS
from schemas.topics import DEAD_LETTERS, REQUEST_TRACES
from streams.settings import Settings
from tests.exporters.cells import as_rows
from tests.exporters.conftest import Producer
from tests.exporters.otlp_examples import SECRET, START_S

HOUR = "sglang-request-metrics-20260101_{:02d}.log"
Named = dict[str, Any]


def line(number: int, **changes: Any) -> str:
    """One request as SGLang writes it."""
    parameters = {
        "rid": f"rid-{number}",
        "text": SECRET,
        "stream": False,
        "sampling_params": {"max_new_tokens": 4096, "temperature": 0.2},
        "priority": 3,
        "tenant": f"tenant-{number % 3}",
    }
    found = {
        "request_parameters": json.dumps(parameters | changes.pop("parameters", {})),
        "id": f"rid-{number}",
        "finish_reason": {"type": "stop", "matched": SECRET},
        "prompt_tokens": 500,
        "completion_tokens": 21,
        "cached_tokens": 128,
        "e2e_latency": 2.5,
        "queue_time": 0.1,
        "first_token_latency": 0.5,
        "num_retractions": 0,
        "request_received_ts": START_S + number + 0.25,
        "request_finished_ts": START_S + number + 2.75,
        "response_sent_to_client_ts": START_S + number + 2.76,
    }
    return json.dumps(found | changes) + "\n"


@pytest.fixture
def follow(settings: Settings, deployment: Deployment, tmp_path: Path) -> Callable[..., Tail]:
    """A tail of the test's folder, as an intake makes it; called again it is the next process."""

    def make(**given: Any) -> Tail:
        options = {"tail_dir": tmp_path, "tail_pool": "chat", "tail_replica": "sglang-0", "coalesce_s": 0, **given}
        tail = Intake(settings, deployment, IntakeOptions.of(**options)).tail
        assert tail is not None
        return tail

    return make


def taken() -> list[Named]:
    """Rows handed to the producer of the last process, nulls left out."""
    records = [r for r in Producer.made[-1].records if r.topic == REQUEST_TRACES]
    rows = [dict(zip(REQUEST_ROWS.columns, row, strict=True)) for r in records for row in as_rows(r.batch())]
    rows.sort(key=lambda row: (row["request_id"], row["event"]))
    return [{k: v for k, v in row.items() if v is not None} for row in rows]


def ids() -> list[str]:
    """Of ends."""
    return sorted(row["request_id"] for row in taken() if row["event"] == "end")


def append(folder: Path, hour: int, *lines: str) -> Path:
    path = folder / HOUR.format(hour)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(lines)
    return path


async def test_a_line_is_two_rows_of_an_engine(follow: Callable[..., Tail], tmp_path: Path) -> None:
    """Sizes and times as SGLang measured them; of its parameters only sizes, flags and who."""
    append(tmp_path, 7, line(1))
    await follow().step()
    arrival, end = taken()
    who = {
        "request_id": "rid-1",
        "pool": "chat",
        "tenant": "tenant-1",
        "class": "batch",
        "priority": 3.0,
        "reporter": "engine",
        "replica": "sglang-0",
        "input_tokens": 500.0,
    }
    assert arrival == {**who, "event": "arrival", "at_s": START_S + 1.25}
    sizes = {"output_tokens": 21, "cached_tokens": 128, "queue_s": 0.1, "ttft_s": 0.5, "tpot_s": 0.1, "e2e_s": 2.5}
    assert end == pytest.approx({**who, **sizes, "event": "end", "at_s": START_S + 3.75, "status": "ok"})


@pytest.mark.parametrize(
    ("finish", "status"),
    [({"type": "length"}, "ok"), ({"type": "abort", "message": SECRET}, "cancelled"), (None, "ok"), ("stop", "ok")],
)
async def test_how_requests_ended(follow: Callable[..., Tail], tmp_path: Path, finish: Any, status: str) -> None:
    """By finish reason."""
    append(tmp_path, 7, line(1, finish_reason=finish))
    await follow().step()
    assert taken()[1]["status"] == status


async def test_half_a_line_waits(follow: Callable[..., Tail], tmp_path: Path) -> None:
    """It is read once its writer has ended it, whole."""
    whole = line(2)
    append(tmp_path, 7, line(1), whole[:40])
    tail = follow()
    await tail.step()
    await tail.step()
    assert (ids(), tail.waiting_bytes) == (["rid-1"], 40)
    append(tmp_path, 7, whole[40:])
    await tail.step()
    assert ids() == ["rid-1", "rid-2"]


async def test_the_next_hour_and_the_end_of_the_one_before(follow: Callable[..., Tail], tmp_path: Path) -> None:
    """Both are followed: lines may still come to the older file."""
    append(tmp_path, 7, line(1))
    tail = follow()
    await tail.step()
    append(tmp_path, 8, line(2))
    append(tmp_path, 7, line(3))
    await tail.step()
    assert ids() == ["rid-1", "rid-2", "rid-3"]


async def test_a_restart_goes_on_where_the_broker_was(follow: Callable[..., Tail], tmp_path: Path) -> None:
    """Nothing twice after a clean stop; nothing lost that was not acknowledged."""
    append(tmp_path, 7, line(1), line(2))
    await follow().step()
    append(tmp_path, 7, line(3))
    tail = follow()
    Producer.made[-1].connected = False
    with pytest.raises(NotStored):
        await tail.step()
    tail = follow()
    await tail.step()
    assert ids() == ["rid-3"]
    await follow().step()
    assert ids() == []


async def test_the_position_moves_after_the_acknowledgement(follow: Callable[..., Tail], tmp_path: Path) -> None:
    """A record that the broker never acknowledged is read again by the next process."""
    append(tmp_path, 7, line(1))
    tail = follow(ack_timeout_s=0.05)
    Producer.made[-1].acknowledges = False
    with pytest.raises(NotStored):
        await tail.step()
    assert not (tmp_path / STATE_FILE).exists()
    await follow().step()
    assert ids() == ["rid-1"]
    assert json.loads((tmp_path / STATE_FILE).read_text()) == {
        HOUR.format(7): [os.stat(tmp_path / HOUR.format(7)).st_ino, len(line(1))]
    }


async def test_another_file_of_the_name_is_read_from_its_beginning(follow: Callable[..., Tail], tmp_path: Path) -> None:
    """Replaced, or shorter than it was read."""
    path = append(tmp_path, 7, line(1), line(2))
    tail = follow()
    await tail.step()
    path.write_text(line(3))
    await tail.step()
    assert ids() == ["rid-1", "rid-2", "rid-3"]
    (tmp_path / "new").write_text(line(4) + line(5) + line(6))
    (tmp_path / "new").replace(path)
    await tail.step()
    assert ids() == [f"rid-{i}" for i in range(1, 7)]


async def test_removed_files_are_forgotten(follow: Callable[..., Tail], tmp_path: Path) -> None:
    """So that the state does not grow for ever."""
    path = append(tmp_path, 7, line(1))
    tail = follow()
    await tail.step()
    path.unlink()
    await tail.step()
    assert json.loads((tmp_path / STATE_FILE).read_text()) == {}


async def test_a_file_that_cannot_be_read_keeps_none_back(
    follow: Callable[..., Tail], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error is said, and the files after it are read."""
    locked = append(tmp_path, 7, line(1))
    append(tmp_path, 8, line(2))
    read = tail_module._read

    def refuses(path: Path, start: int, size: int) -> bytes:
        if path == locked:
            raise PermissionError(13, "Permission denied")
        return read(path, start, size)

    monkeypatch.setattr(tail_module, "_read", refuses)
    tail = follow()
    with pytest.raises(PermissionError):
        await tail.step()
    assert ids() == ["rid-2"]


async def test_a_time_that_is_none_costs_its_line_at_any_speed(
    settings: Settings, deployment: Deployment, tmp_path: Path
) -> None:
    """Also where fleet time is not wall time, and the number too great for any."""
    options = IntakeOptions.of(tail_dir=tmp_path, tail_pool="chat", coalesce_s=0)
    tail = Intake(settings, deployment.model_copy(update={"speed": 2.0}), options).tail
    assert tail is not None
    append(tmp_path, 7, line(1, request_received_ts=1e306, request_finished_ts=1.5e306), line(2))
    await tail.step()
    assert ids() == ["rid-2"]


async def test_many_lines_come_in_pieces(settings: Settings, follow: Callable[..., Tail], tmp_path: Path) -> None:
    """A file longer than a chunk is read whole, every request once."""
    append(tmp_path, 7, *(line(i) for i in range(3000)))
    tail = follow()
    steps = 1
    while await tail.step():
        steps += 1
    assert steps > 1
    assert len(ids()) == len(set(ids())) == 3000


async def test_bad_lines_cost_themselves(follow: Callable[..., Tail], tmp_path: Path) -> None:
    """No JSON, no times, wrong numbers, endless lines: dead letters by name and hash, and the others are taken."""
    bad = ["{\n", "[1]\n", "\xff\n", line(8, request_received_ts=None, e2e_latency=None), line(9, prompt_tokens=-1)]
    append(tmp_path, 7, line(1), *bad, line(2), "x" * (LINE_BYTES_MAX + 10), "\n", line(3))
    tail = follow()
    while await tail.step():
        pass
    assert ids() == ["rid-1", "rid-2", "rid-3"]
    records = Producer.made[-1].records
    letters = [decode(DeadLetter, r.value) for r in records if r.topic == DEAD_LETTERS]
    assert sum(letter.rows_refused for letter in letters) == 7
    assert [r for r in records if SECRET.encode() in r.value] == []
    assert SECRET not in str(taken())


def test_a_broken_state_file_is_said(follow: Callable[..., Tail], tmp_path: Path) -> None:
    """Rather than everything read again without a word."""
    (tmp_path / STATE_FILE).write_text("{")
    with pytest.raises(SettingsError, match="TAIL_STATE_FILE"):
        follow()


def test_a_missing_folder_is_named() -> None:
    """With its variable."""
    with pytest.raises(SettingsError, match="FLEETLOOP_INTAKE_TAIL_DIR"):
        IntakeOptions.of(tail_dir="/nowhere")
