"""Replay: a level's fold run once more over recorded offsets, in one process, without Faust and without publishing.

From the partition's beginning or any kept checkpoint; results go to a scratch file, or are compared with what was
published: same ids, same bytes. It holds a digest per result, so memory grows with the range (about 300 bytes each).
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple

from aiokafka import TopicPartition
from aiokafka.errors import KafkaError

from schemas.config import Deployment
from schemas.errors import CheckpointMismatch, SettingsError
from schemas.log import Fold, LogRecord, Result
from schemas.topics import LEVEL_TOPIC, TOPICS
from streams import checkpoints
from streams.clients import admin_client, plain_consumer, unreachable
from streams.keeper import MakeFold
from streams.reader import LogReader, header, log_record
from streams.settings import Settings

EXAMPLES_MAX = 20
Name = tuple[str, str, str]
"""(topic, type, id) of a result."""


class Kept(NamedTuple):
    """A checkpoint that a replay can start from."""

    offset: int
    """Last offset of the log that it covers: what `from_checkpoint` takes."""
    at_ms: int
    """When it was appended, Unix ms of wall time."""
    dump_bytes: int


class Report(NamedTuple):
    """What a replay did and found. `same` is the verdict of a comparison."""

    level: str
    topic: str
    partition: int
    first: int
    """First offset folded."""
    last: int
    """Last offset folded."""
    records: int
    results: int
    fold_errors: list[int]
    """Offsets at which the fold raised."""
    results_sha256: str
    """Over all results in order: two replays of one range agree in it."""
    dump_sha256: str
    """Of the state at the end."""
    seconds: float
    compared: bool
    matched: int = 0
    gone: int = 0
    """Results no longer in a topic that was compacted or cut by retention."""
    missing: tuple[str, ...] = ()
    """Examples of results that were never published."""
    different: tuple[str, ...] = ()
    """Examples of results published with other bytes, or one id with two contents."""

    @property
    def same(self) -> bool:
        """True when nothing is missing and nothing differs."""
        return not self.missing and not self.different


async def kept_checkpoints(settings: Settings, level: str, partition: int) -> list[Kept]:
    """The checkpoints of a partition that are still in the topic, oldest first."""
    collector, found = checkpoints.Collector(), []
    async with LogReader(settings, f"checkpoints.{level}") as reader:
        async for record in reader.to_end():
            whole = collector.add(record)
            if whole is not None and (whole.topic, whole.partition) == (LEVEL_TOPIC[level], partition):
                found.append(Kept(whole.offset, record.timestamp, len(whole.dump)))
    return found


async def replay(
    settings: Settings,
    deployment: Deployment,
    level: str,
    make_fold: MakeFold,
    partition: int,
    *,
    from_checkpoint: int | None = None,
    until: int | None = None,
    compare: bool = False,
    scratch: Path | None = None,
) -> Report:
    """Folds a partition's records again.

    Parameters
    ----------
    from_checkpoint: offset of a kept checkpoint (`kept_checkpoints`); None: the partition's beginning.
    until: last offset folded; None: what the group has committed, or the end where it never did.
    scratch: file for the results, one JSON object a line with the value in base64.

    Raises SettingsError for a checkpoint, partition or level that there is not, CheckpointMismatch for a checkpoint
    that cannot be loaded.
    """
    if level not in LEVEL_TOPIC or partition >= deployment.partitions.get(LEVEL_TOPIC[level], 0):
        raise SettingsError(f"level {level!r}, partition {partition}: no such partition in this deployment")
    began = time.monotonic()
    if until is None:
        until = await _committed(settings, level, partition) - 1
    run = _Run(settings, deployment, level, make_fold, partition, until)
    start = None
    if from_checkpoint is not None:
        start = await _find(settings, level, partition, from_checkpoint)
    with _opened(scratch) as file:
        try:
            await run.fold(start, careful=False, file=file)
        except _FoldRaisedError:
            if file is not None:
                file.seek(0)
                file.truncate()
            await run.fold(start, careful=True, file=file)
    report = Report(
        level,
        LEVEL_TOPIC[level],
        partition,
        run.first,
        until,
        run.records,
        run.results,
        run.fold_errors,
        run.digest.hexdigest(),
        hashlib.sha256(run.state.dump()).hexdigest(),
        time.monotonic() - began,
        compare,
        different=tuple(run.conflicts[:EXAMPLES_MAX]),
    )
    return await _compare(settings, run, report) if compare else report


class _FoldRaisedError(Exception):
    pass


class _Run:
    def __init__(
        self,
        settings: Settings,
        deployment: Deployment,
        level: str,
        make_fold: MakeFold,
        partition: int,
        until: int,
    ) -> None:
        self.settings, self.deployment, self.topic = settings, deployment, LEVEL_TOPIC[level]
        self.partition, self.until = partition, until
        self._make_fold = make_fold
        self.first = 0

    @property
    def source(self) -> str:
        return f"{self.topic}/{self.partition}"

    def _fresh(self) -> Fold:
        return self._make_fold(self.topic, self.partition, dict(self.deployment.partitions))

    async def fold(self, start: checkpoints.Checkpoint | None, *, careful: bool, file: IO[str] | None) -> None:
        self.produced: dict[Name, bytes] = {}
        self.conflicts: list[str] = []
        self.digest = hashlib.sha256()
        self.records = self.results = 0
        self.fold_errors: list[int] = []
        self.state = self._fresh()
        if start is not None:
            self._load(start)
        begin = start.offset + 1 if start else 0
        async with LogReader(
            self.settings, self.topic, partitions=[self.partition], start={self.partition: begin}
        ) as reader:
            self.first = reader.positions[self.partition]
            async for chunk in _chunks(reader, self.partition, self.until, self.settings.coalesce_records):
                records = [log_record(r, self.deployment.log_ms(r.timestamp)) for r in chunk]
                self.records += len(records)
                for result in self._apply_carefully(records) if careful else self._apply(records):
                    self._take(result, file)

    def _load(self, start: checkpoints.Checkpoint) -> None:
        try:
            self.state.load(start.dump)
        except Exception as error:  # a mismatch, or whatever a dump of another version of the code makes `load` raise
            raise CheckpointMismatch(
                f"from_checkpoint: {start.offset}: cannot be loaded ({error!r}): take one that this version has "
                "written, or the beginning"
            ) from error

    def _apply(self, records: list[LogRecord]) -> list[Result]:
        try:
            return self.state.apply(records)
        except Exception as error:
            raise _FoldRaisedError from error

    def _apply_carefully(self, records: list[LogRecord]) -> Iterable[Result]:
        """As the keeper does: one at a time, and past one at which the fold raises as if it had not been there."""
        good, done = self.state.dump(), []
        for record in records:
            try:
                yield from self.state.apply([record])
            except Exception:
                self.fold_errors.append(record.offset)
                self.state = self._fresh()
                self.state.load(good)
                for earlier in done:
                    self.state.apply([earlier])
            else:
                done.append(record)

    def _take(self, result: Result, file: IO[str] | None) -> None:
        self.results += 1
        name = (result.topic, result.type, result.id)
        content = hashlib.sha256(result.value).digest()
        if self.produced.setdefault(name, content) != content:
            self.conflicts.append(f"{'/'.join(name)}: two contents in one replay")
        line = {
            **result._asdict(),
            "value": base64.b64encode(result.value).decode(),
        }
        text = json.dumps(line, separators=(",", ":"))
        self.digest.update(text.encode())
        if file is not None:
            file.write(text + "\n")


def _opened(path: Path | None) -> Any:
    if path is None:
        return contextlib.nullcontext()
    return path.open("w", encoding="utf-8")


async def _chunks(reader: LogReader, partition: int, until: int, size: int) -> AsyncIterator[list[Any]]:
    end = min(until + 1, (await reader.ends())[partition])
    chunk: list[Any] = []
    async for record in reader.to_end({partition: end}):
        chunk.append(record)
        if len(chunk) >= size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


async def _committed(settings: Settings, level: str, partition: int) -> int:
    """What the group has committed of a partition, or its end."""
    tp = TopicPartition(settings.topic(LEVEL_TOPIC[level]), partition)
    admin, consumer = admin_client(settings), plain_consumer(settings)
    try:
        await admin.start()
        await consumer.start()
        found = (await admin.list_consumer_group_offsets(settings.group(level), partitions=[tp])).get(tp)
        if found is not None and found.offset >= 0:
            return int(found.offset)
        return int((await consumer.end_offsets([tp]))[tp])
    except KafkaError as error:
        raise await unreachable(settings, error) from error
    finally:
        await consumer.stop()
        await admin.close()


async def _find(settings: Settings, level: str, partition: int, offset: int) -> checkpoints.Checkpoint:
    collector, others = checkpoints.Collector(), []
    async with LogReader(settings, f"checkpoints.{level}") as reader:
        async for record in reader.to_end():
            whole = collector.add(record)
            if whole is None or (whole.topic, whole.partition) != (LEVEL_TOPIC[level], partition):
                continue
            if whole.offset == offset:
                return whole
            others.append(whole.offset)
    raise SettingsError(
        f"from_checkpoint: {offset}: no such checkpoint of {level}/{partition}; kept are "
        f"{', '.join(map(str, others[-10:])) or 'none'}"
    )


async def _compare(settings: Settings, run: _Run, report: Report) -> Report:
    """Looks every result of the replay up among what this partition's live fold published."""
    left = dict(run.produced)
    different, matched, gone = list(report.different), 0, 0
    missing: list[str] = []
    for topic in sorted({name[0] for name in run.produced}):
        async with LogReader(settings, topic) as reader:
            cut = any(reader.beginnings.values()) or "compact" in TOPICS[topic].cleanup
            async for record in reader.to_end():
                if header(record, "ce_source") != run.source:
                    continue
                name = (topic, header(record, "ce_type"), header(record, "ce_id"))
                content = run.produced.get(name)
                if content is None:
                    continue  # of before the checkpoint, or after `until`
                if left.pop(name, None) is not None:
                    matched += 1
                if hashlib.sha256(record.value or b"").digest() != content:
                    different.append(f"{'/'.join(name)} at offset {record.offset}")
        absent = ["/".join(name) for name in left if name[0] == topic]
        if cut:
            gone += len(absent)
        else:
            missing += absent
    return report._replace(
        matched=matched,
        gone=gone,
        missing=tuple(missing[:EXAMPLES_MAX]),
        different=tuple(different[:EXAMPLES_MAX]),
    )
