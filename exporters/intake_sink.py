"""Rows of the intake on their way to Kafka. Whoever puts rows learns when the broker has them, and not before."""

from __future__ import annotations

import asyncio

from exporters.edge import Edge
from exporters.rows import RowBatcher, Split

FLUSH_BYTES = 2 * 1024 * 1024
"""So much is sent before the time to gather is over."""


class NotStored(Exception):
    """Rows that the broker did not acknowledge. `status` as HTTP has it: 413, 429 or 503; the last two: send again.

    After a 503 the rows may still arrive: that is known by their ids, and does no harm.
    """

    def __init__(self, status: int, why: str) -> None:
        self.status, self.why = status, why
        super().__init__(why)


class Sink:
    """Gathers rows of many requests into batches, within the buffer's bound.

    Parameters
    ----------
    coalesce_s: rows are gathered for so long, s.
    ack_timeout_s: the broker has so long to acknowledge, s.
    """

    def __init__(self, edge: Edge, source: str, coalesce_s: float, ack_timeout_s: float) -> None:
        self.edge, self.coalesce_s, self.ack_timeout_s = edge, coalesce_s, ack_timeout_s
        self.batcher = RowBatcher(edge, source)
        self.bytes_max = edge.settings.edge_buffer_bytes // 2
        """Half of the producer's buffer, so that it never drops what somebody waits for."""
        self._gathering: asyncio.Future[bool] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def room(self) -> int:
        """Bytes that can be taken now."""
        return self.bytes_max - self.edge.producer.buffered_bytes - self.batcher.bytes

    async def put(self, rows: Split) -> None:
        """Returns when the broker has every row. Raises NotStored."""
        if not rows.parts:
            return
        if rows.bytes > self.bytes_max:
            raise NotStored(413, f"send fewer rows: these need {rows.bytes} bytes of a buffer of {self.bytes_max}")
        if not self.edge.producer.connected:
            raise NotStored(503, "the broker cannot be reached; send again later")
        if rows.bytes > self.room():
            raise NotStored(429, "the buffer is full; send again later")
        self.batcher.add(rows)
        loop = asyncio.get_running_loop()
        if self._gathering is None:
            self._gathering = loop.create_future()
            self._timer = loop.call_later(self.coalesce_s, self.flush)
        acked = self._gathering
        if self.batcher.bytes >= FLUSH_BYTES:
            self.flush()
        try:
            async with asyncio.timeout(self.ack_timeout_s):
                stored = await asyncio.shield(acked)
        except TimeoutError:
            stored = False
        if not stored:
            raise NotStored(503, f"not acknowledged by the broker within {self.ack_timeout_s:g} s; send again later")

    def flush(self) -> None:
        """Sends what was gathered."""
        gathered, self._gathering = self._gathering, None
        if self._timer is not None:
            self._timer.cancel()
        if gathered is None:
            return

        def settle(done: asyncio.Future[list[bool]]) -> None:
            if not gathered.done():  # the process ends
                gathered.set_result(not done.cancelled() and all(done.result()))

        asyncio.gather(*self.batcher.flush()).add_done_callback(settle)

    def close(self) -> None:
        """Sends what was gathered, and from now on at once what is put."""
        self.coalesce_s = 0.0
        self.flush()
