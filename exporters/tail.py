"""SGLang's request export files, followed as they grow: one JSON line a request, a file an hour.

How far a file was read is kept in a small file, and only once the broker has what was read up to there. A line that is
not yet whole waits; a file that is another one than before, or shorter, is read from its beginning.
Source: sglang/srt/observability/request_metrics_exporter.py (`--export-metrics-to-file`).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from exporters.conventions_rows import (
    ID_MAX,
    Call,
    Cells,
    Mapper,
    NotARequest,
    batch_of,
    duration,
    error_kind,
    number,
    text,
    whole,
)
from exporters.edge import Edge, ticks
from exporters.intake_letters import Letters, RefusedSpan
from exporters.intake_options import IntakeOptions
from exporters.intake_sink import NotStored, Sink
from schemas.errors import SettingsError

log = structlog.get_logger(__name__)

PATTERN = "sglang-request-metrics-*.log"
STATE_FILE = ".fleetloop-tail.json"
PERIOD_S = 0.5
CHUNK_BYTES = 1024 * 1024
LINE_BYTES_MAX = 4 * CHUNK_BYTES
"""A longer line is refused: it holds a prompt that nobody wants here (SGLang can leave out `text`)."""
FILES_MAX = 1_000
_FINISHED = {"abort": "cancelled", "error": "error"}


class Position(NamedTuple):
    """How far a file was read. `inode`: which file it was."""

    inode: int
    offset: int


class Tail:
    """Follows the files of one folder."""

    def __init__(self, options: IntakeOptions, edge: Edge, sink: Sink, mapper: Mapper, letters: Letters) -> None:
        assert options.tail_dir is not None
        self.options, self.edge, self.sink, self.letters = options, edge, sink, letters
        self.folder = options.tail_dir
        self.state_file = options.tail_state_file or self.folder / STATE_FILE
        self.reader = SglangReader(mapper, options)
        self.positions = self._load()
        self.chunk_bytes = min(CHUNK_BYTES, max(4096, sink.bytes_max // 4))
        self.waiting_bytes = 0
        """Read and not yet a whole line, of the file looked at last."""

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop` is set."""
        async for _ in ticks(PERIOD_S, stop):
            try:
                while await self.step() and not stop.is_set():
                    pass
            except NotStored as why:
                self.edge.metrics.failed("unstored")
                log.debug("tail waits", why=why.why)
            except OSError as error:
                self.edge.metrics.failed("tail")
                log.warning("tail", folder=str(self.folder), error=error.strerror)

    async def step(self) -> bool:
        """Takes at most a chunk of each file; True where there may be more. Raises NotStored, OSError."""
        more = False
        found = await asyncio.to_thread(self._files)
        failed: OSError | None = None
        for path, inode, size in found:
            try:
                more |= await self._follow(path, inode, size)
            except OSError as error:  # one that cannot be read keeps none of the others back
                failed = error
        gone = [name for name in self.positions if name not in {path.name for path, _, _ in found}]
        for name in gone:
            del self.positions[name]
        if gone:
            await asyncio.to_thread(self._save)
        if failed is not None:
            raise failed
        return more

    async def _follow(self, path: Path, inode: int, size: int) -> bool:
        known = self.positions.get(path.name, Position(inode, 0))
        start = known.offset if known.inode == inode and known.offset <= size else 0
        if start == size:
            return False
        began = time.monotonic()
        chunk = await asyncio.to_thread(_read, path, start, self.chunk_bytes)
        end = chunk.rfind(b"\n") + 1
        self.waiting_bytes = len(chunk) - end
        if not end and len(chunk) < LINE_BYTES_MAX:
            return False  # its writer is not done with the line
        lines = chunk[:end] if end else chunk
        taken = await asyncio.to_thread(self.reader.read, lines, not end)
        await self.sink.put(await asyncio.to_thread(self.sink.batcher.split, taken.batch))
        self.letters.write(taken.refused, "sglang.request")
        self.edge.metrics.read(taken.batch.rows, time.monotonic() - began)
        if taken.refused:
            self.edge.metrics.failed("rows", len(taken.refused))
        self.positions[path.name] = Position(inode, start + len(lines))
        await asyncio.to_thread(self._save)
        return start + len(lines) < size

    def _files(self) -> list[tuple[Path, int, int]]:
        """(path, inode, size) of the newest files, oldest first: their names carry the hour."""
        found = sorted(self.folder.glob(PATTERN))[-FILES_MAX:]
        return [(path, (stat := path.stat()).st_ino, stat.st_size) for path in found]

    def _load(self) -> dict[str, Position]:
        try:
            found = json.loads(self.state_file.read_text(encoding="utf-8"))
            return {str(name): Position(int(inode), int(offset)) for name, (inode, offset) in found.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise SettingsError(
                f"FLEETLOOP_INTAKE_TAIL_STATE_FILE: {self.state_file}: {type(error).__name__}: mend it, or remove it "
                "to read every file again (rows have ids: those of the last 15 min do no harm)"
            ) from None

    def _save(self) -> None:
        """In one step, so that a crash leaves the old positions or the new ones."""
        temporary = self.state_file.with_name(f"{self.state_file.name}.new")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(self.positions, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.state_file)


def _read(path: Path, start: int, size: int) -> bytes:
    """About `size` bytes, and more where the first line is longer."""
    with path.open("rb") as file:
        file.seek(start)
        chunk = file.read(size)
        while b"\n" not in chunk and len(chunk) < LINE_BYTES_MAX and (more := file.read(size)):
            chunk += more
        return chunk


class Lines(NamedTuple):
    """What was made of lines."""

    batch: Any
    refused: list[RefusedSpan]


class SglangReader:
    """Lines of an export file to request rows. Of `request_parameters` only sizes and flags are taken."""

    def __init__(self, mapper: Mapper, options: IntakeOptions) -> None:
        self.mapper, self.options = mapper, options

    def read(self, lines: bytes, cut: bool = False) -> Lines:
        """`cut`: it is the beginning of a line that is too long."""
        calls: list[tuple[Cells, Cells]] = []
        kept: list[bytes] = []
        refused: list[RefusedSpan] = []
        for line in [lines] if cut else lines.split(b"\n"):
            if not line.strip():
                continue
            try:
                calls.append(self._call(_parsed(line, cut)).rows(self.mapper.fleet_s))
                kept.append(line)
            except NotARequest as why:
                refused.append(_refused(line, why.reason, why.field, why.remedy))
        batch, bad = batch_of(calls)
        return Lines(batch, [*refused, *(_refused(kept[i], *why) for i, why in bad.items())])

    def _call(self, found: Mapping[str, Any]) -> Call:
        parameters = _object(found.get("request_parameters"))
        sampling = _object(parameters.get("sampling_params"))
        id = text(found.get("id")) or text(parameters.get("rid"))
        if id is None or len(id) > ID_MAX:
            raise NotARequest("invalid", "id", f"an id of 1 to {ID_MAX} characters is needed")
        start, end = number(found.get("request_received_ts")), number(found.get("request_finished_ts"))
        latency = duration(found.get("e2e_latency"))
        sent = number(found.get("response_sent_to_client_ts"))
        end = end if end is not None else sent
        if end is None and start is not None and latency is not None:
            end = start + latency
        if start is None and end is not None and latency is not None:
            start = end - latency
        if start is None or end is None or not 0 < start <= end:
            raise NotARequest("invalid", "request_received_ts", "times are needed: SGLang writes them with metrics on")
        model = text(parameters.get("model")) or text(parameters.get("lora_path"))
        finish = _object(found.get("finish_reason"))
        why = text(finish.get("type")) or text(found.get("finish_reason"))
        attributes = {name: value for name, value in parameters.items() if isinstance(value, str | int)}
        stream = parameters.get("stream")
        status = _FINISHED.get(why or "", "ok")
        return Call(
            id=id,
            start_s=start,
            end_s=end,
            status=status,
            pool=self.options.tail_pool or self.mapper.pool(model),
            reporter="engine",
            tenant=self.mapper.said_tenant(attributes, {}, {}) or self.options.default_tenant,
            request_class=self.mapper.class_of(
                self.mapper.said_class(attributes, {}, {}),
                stream if isinstance(stream, bool) else None,
                number(sampling.get("max_new_tokens")),
            ),
            model=model,
            priority=whole(parameters.get("priority"), -1_000_000, 1_000_000),
            replica=self.options.tail_replica,
            error_type=error_kind(finish.get("err_type")) if status != "ok" else None,
            input_tokens=number(found.get("prompt_tokens")),
            output_tokens=number(found.get("completion_tokens")),
            cached_tokens=number(found.get("cached_tokens")),
            queue_s=duration(found.get("queue_time")),
            ttft_s=duration(found.get("first_token_latency")),
            e2e_s=latency,
        )


def _parsed(line: bytes, cut: bool) -> Mapping[str, Any]:
    if cut:
        raise NotARequest(
            "too_large", "line", f"lines of at most {LINE_BYTES_MAX} bytes: leave `text` out of the export"
        )
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise NotARequest("undecodable", "line", "a JSON object a line is needed")
    return found


def _object(value: Any) -> Mapping[str, Any]:
    """An object, also where it was written as JSON text (as `request_parameters` is)."""
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
    return value if isinstance(value, dict) else {}


def _refused(line: bytes, reason: str, field: str, remedy: str) -> RefusedSpan:
    try:
        found = json.loads(line) if len(line) < LINE_BYTES_MAX else None
    except (ValueError, RecursionError):
        found = None
    names = tuple(found) if isinstance(found, dict) else ()
    return RefusedSpan(reason, field, remedy, hashlib.sha256(line).hexdigest(), len(line), names)
