"""Producers of the edges: exporters, intakes, executors, simulator. Bounded, and alive through a broker outage.

A record that is sent is held until the broker has it. While the broker is away records wait up to
`edge_buffer_bytes`; beyond it the oldest are dropped and counted, so that the next batch can say so.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from datetime import UTC, datetime
from typing import NamedTuple

import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, MessageSizeTooLargeError, RecordListTooLargeError

from schemas.log import CONTENT_JSON
from schemas.topics import TOPICS
from streams.clients import client_options
from streams.settings import Settings

log = structlog.get_logger(__name__)

REQUEST_TIMEOUT_MS = 10_000
RETRY_S_MIN, RETRY_S_MAX = 0.2, 3.0
RECORD_OVERHEAD = 128
IN_FLIGHT_SHARE = 4  # 1/4 of the buffer may be with the client, where it can't be dropped any more
IN_FLIGHT_BYTES_MAX = 8 * 1024 * 1024
BATCH_BYTES = 256 * 1024


class _Pending(NamedTuple):
    sequence: int
    topic: str
    key: bytes | None
    value: bytes
    headers: list[tuple[str, bytes]]
    partition: int | None
    ack: asyncio.Future[bool] | None = None

    def settle(self, acked: bool) -> None:
        """Tells the sender how it ended, if it asked and still waits."""
        if self.ack is not None and not self.ack.done():
            self.ack.set_result(acked)

    @property
    def size(self) -> int:
        return len(self.value) + len(self.key or b"") + RECORD_OVERHEAD


def ce_headers(
    type: str, id: str, source: str, at_ms: int | None = None, content_type: str = CONTENT_JSON
) -> list[tuple[str, bytes]]:
    """CloudEvents binary-mode headers; `ce_time` (RFC 3339) only where a log time is given."""
    headers = [
        ("ce_specversion", b"1.0"),
        ("ce_type", type.encode()),
        ("ce_id", id.encode()),
        ("ce_source", source.encode()),
        ("content-type", content_type.encode()),
    ]
    if at_ms is not None:
        headers.append(("ce_time", rfc3339(at_ms).encode()))
    return headers


def rfc3339(at_ms: int) -> str:
    """Unix ms as RFC 3339 in UTC with milliseconds."""
    seconds, ms = divmod(at_ms, 1000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{ms:03d}Z"


class EdgeProducer:
    """Sends records without ever blocking its caller; an async context manager.

    Attributes
    ----------
    sent, acked, dropped, refused: records by topic (without prefix): taken from the caller; known to the broker;
        dropped because the buffer was full; too large for their topic.
    buffered_bytes: bytes taken and neither acked nor dropped.
    """

    def __init__(self, settings: Settings, source: str) -> None:
        self.settings, self.source = settings, source
        self.sent: Counter[str] = Counter()
        self.acked: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.buffered_bytes = 0
        self.connected = False
        self._waiting: deque[_Pending] = deque()
        self._in_flight: dict[int, _Pending] = {}
        self._in_flight_bytes = 0
        self._in_flight_bytes_max = min(IN_FLIGHT_BYTES_MAX, settings.edge_buffer_bytes // IN_FLIGHT_SHARE)
        self._sequence = 0
        self._changed = asyncio.Event()
        self._progress = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._failed = False
        self._backoff_s = RETRY_S_MIN
        self._client: AIOKafkaProducer | None = None

    async def __aenter__(self) -> EdgeProducer:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Begins to connect in the background: the broker need not be there yet."""
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(lambda _: self._progress.set())  # who waits for progress learns that it ended

    async def stop(self, timeout_s: float = 5.0) -> bool:
        """Flushes for at most `timeout_s` and disconnects; True if nothing was left."""
        done = await self.flush(timeout_s)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._disconnect()
        for item in self._waiting:
            item.settle(False)
        return done

    def send(
        self,
        topic: str,
        key: str | bytes | None,
        value: bytes,
        *,
        type: str,
        id: str,
        content_type: str = CONTENT_JSON,
        partition: int | None = None,
        at_ms: int | None = None,
        ack: asyncio.Future[bool] | None = None,
    ) -> None:
        """Takes a record for a topic of the registry. Never blocks: a full buffer drops its oldest record.

        `ack`, if given, becomes True once the broker has acknowledged the record, False once it never will be: it was
        dropped, refused, or left when the producer stopped. It never raises.

        Raises ValueError for a record larger than its topic takes (counted in `refused`).
        """
        item = _Pending(
            self._sequence,
            topic,
            key.encode() if isinstance(key, str) else key,
            value,
            ce_headers(type, id, self.source, at_ms, content_type),
            partition,
            ack,
        )
        if item.size + 512 > TOPICS[topic].max_message_bytes:
            self.refused[topic] += 1
            raise ValueError(f"{topic}: {len(value)} bytes do not fit its {TOPICS[topic].max_message_bytes}: send less")
        self._sequence += 1
        self.sent[topic] += 1
        self._waiting.append(item)
        self.buffered_bytes += item.size
        while self.buffered_bytes > self.settings.edge_buffer_bytes and len(self._waiting) > 1:
            oldest = self._waiting.popleft()
            self.buffered_bytes -= oldest.size
            self.dropped[oldest.topic] += 1
            oldest.settle(False)
        self._changed.set()

    async def room(self) -> None:
        """Waits until the buffer is less than half full: back-pressure for sources that can wait."""
        while self.buffered_bytes * 2 > self.settings.edge_buffer_bytes:
            await self._wait_for_progress()

    async def flush(self, timeout_s: float = 10.0) -> bool:
        """Waits until the broker has everything; False if it has not within `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.buffered_bytes:
                    await self._wait_for_progress()
        except TimeoutError:
            return False
        return True

    async def _wait_for_progress(self) -> None:
        if self._task is not None and self._task.done():
            self._task.result()  # our bugs end the caller, which would wait for ever
        self._progress.clear()
        await self._progress.wait()

    async def _run(self) -> None:
        while True:
            try:
                await self._connect()
                await self._pump()
            except (KafkaError, OSError) as error:
                if self.connected:
                    log.warning("broker not reachable; records wait", error=str(error), source=self.source)
                await self._disconnect()
                await asyncio.sleep(self._backoff_s)
                self._backoff_s = min(RETRY_S_MAX, self._backoff_s * 2)

    async def _connect(self) -> None:
        if self._client is not None:
            return
        client = AIOKafkaProducer(
            **client_options(self.settings),
            acks="all",
            compression_type="lz4",
            linger_ms=self.settings.edge_linger_ms,
            max_batch_size=BATCH_BYTES,
            max_request_size=9 * 1024 * 1024,
            request_timeout_ms=REQUEST_TIMEOUT_MS,
        )
        self._client = client
        await client.start()
        self.connected = True

    async def _disconnect(self) -> None:
        client, self._client, self.connected = self._client, None, False
        if client is not None:
            try:
                async with asyncio.timeout(2.0):
                    await client.stop()
            except (KafkaError, OSError, TimeoutError) as error:
                log.debug("disconnect", error=str(error))
        self._requeue(list(self._in_flight.values()))

    def _requeue(self, items: list[_Pending]) -> None:
        for item in sorted(items, key=lambda i: i.sequence, reverse=True):
            if self._in_flight.pop(item.sequence, None) is not None:
                self._in_flight_bytes -= item.size
                self._waiting.appendleft(item)
        self._changed.set()

    async def _pump(self) -> None:
        """Hands waiting records to the client until one fails."""
        client = self._client
        assert client is not None
        while True:
            while self._waiting and self._in_flight_bytes < self._in_flight_bytes_max:
                item = self._waiting.popleft()
                self._in_flight[item.sequence] = item
                self._in_flight_bytes += item.size
                try:
                    future = await client.send(
                        self.settings.topic(item.topic),
                        item.value,
                        key=item.key,
                        partition=item.partition,
                        headers=item.headers,
                    )
                except MessageSizeTooLargeError:
                    self._finish(item, self.refused)
                    continue
                future.add_done_callback(lambda f, item=item: self._on_done(f, item))
            self._changed.clear()
            # `_failed` may have been set while a send was awaited: it must not wait for the next record.
            if not self._failed and (not self._waiting or self._in_flight_bytes >= self._in_flight_bytes_max):
                await self._changed.wait()
            if self._failed:
                self._failed = False
                raise KafkaError("a batch was not acknowledged")

    def _finish(self, item: _Pending, counter: Counter[str]) -> None:
        if self._in_flight.pop(item.sequence, None) is None:
            return  # already queued again
        self._in_flight_bytes -= item.size
        self.buffered_bytes -= item.size
        counter[item.topic] += 1
        item.settle(counter is self.acked)
        self._progress.set()
        self._changed.set()

    def _on_done(self, future: asyncio.Future[object], item: _Pending) -> None:
        if future.cancelled():
            return
        error = future.exception()
        if item.sequence not in self._in_flight:
            return  # queued again already
        if error is None:
            self._backoff_s = RETRY_S_MIN
            self._finish(item, self.acked)
        elif isinstance(error, MessageSizeTooLargeError | RecordListTooLargeError):
            self._finish(item, self.refused)
        else:
            self._failed = True
            self._changed.set()


async def send_once(
    settings: Settings,
    topic: str,
    *,
    key: str,
    value: bytes,
    type: str,
    id: str,
    at_ms: int | None = None,
    content_type: str = CONTENT_JSON,
    partition: int | None = None,
    source: str = "fleetloop",
) -> int:
    """Sends one record, waits for the broker and gives its offset. Raises KafkaError."""
    producer = AIOKafkaProducer(**client_options(settings), acks="all", request_timeout_ms=REQUEST_TIMEOUT_MS)
    try:
        await producer.start()
        metadata = await producer.send_and_wait(
            settings.topic(topic),
            value,
            key=key.encode(),
            partition=partition,
            headers=ce_headers(type, id, source, at_ms, content_type),
        )
        return int(metadata.offset)
    finally:
        await producer.stop()
