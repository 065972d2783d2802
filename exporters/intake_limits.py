"""How much each client may send: one token bucket a client, in a table that cannot grow."""

from __future__ import annotations

import math

BURST_S = 10.0
"""What a client did not use of so many seconds it may send at once."""
_SHARED = ""


class Limits:
    """Rows a second by client. A body may overdraw its bucket; the client then waits until it is paid back.

    Parameters
    ----------
    rows_per_s: what one client may send on average; 0: everything.
    clients_max: clients with a bucket of their own. Beyond it those who come share one, until another's is full again.
    """

    def __init__(self, rows_per_s: float, clients_max: int) -> None:
        self.rows_per_s, self.clients_max = rows_per_s, clients_max
        self._buckets: dict[str, tuple[float, float]] = {}
        """Client -> (rows that it may send, at what time, s), the one that was idle longest first."""

    def wait_s(self, client: str, now_s: float) -> int:
        """Whole seconds that a client must wait before it sends again; 0: it may send now."""
        if not self.rows_per_s:
            return 0
        level = self._level(self._key(client, now_s), now_s)
        return 0 if level > 0 else math.floor(-level / self.rows_per_s) + 1

    def spend(self, client: str, rows: int, now_s: float) -> None:
        """A client has sent rows; a body without any counts as one."""
        if not self.rows_per_s:
            return
        key = self._key(client, now_s)
        level = self._level(key, now_s)
        self._buckets.pop(key, None)
        self._buckets[key] = (level - max(1, rows), now_s)

    def _level(self, key: str, now_s: float) -> float:
        level, at_s = self._buckets.get(key, (math.inf, now_s))
        return min(self.rows_per_s * BURST_S, level + (now_s - at_s) * self.rows_per_s)

    def _key(self, client: str, now_s: float) -> str:
        if client in self._buckets or len(self._buckets) - (_SHARED in self._buckets) < self.clients_max:
            return client
        idle = next(key for key in self._buckets if key != _SHARED)
        if self._level(idle, now_s) >= self.rows_per_s * BURST_S:
            del self._buckets[idle]
            return client
        return _SHARED
