"""The views' web side over made-up rows, without Kafka: an aiohttp application as the service builds it."""

from __future__ import annotations

from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry

from tests.views.feed import ORIGIN_S, Feed
from views.actions import Actions, Order
from views.api import LOOPBACK_NAMES, State, add_routes
from views.metrics import RowsCollector
from views.rows import Rows

TOKEN = "a-token-of-the-tests"


class Served:
    """Rows of a feed read up to `seconds`, and the application that serves them.

    Attributes
    ----------
    orders: what was sent; `fail`: raised instead of sending.
    """

    def __init__(self, seconds: int = 60, *, token: str | None = TOKEN, send: bool = True, **rows: int) -> None:
        self.rows = Rows(**rows)
        self.feed = Feed()
        self.t = 0
        self.not_ready: list[str] = []
        self.orders: list[Order] = []
        self.fail: Exception | None = None
        self.late_s = 0.0
        self.advance(seconds)
        self.actions = Actions(self.rows, token, self._send if send else None)
        registry = CollectorRegistry()
        registry.register(RowsCollector(self.rows, self.actions, lambda: 0))
        self.app = web.Application()
        state = State(
            rows=self.rows,
            now_s=lambda: ORIGIN_S + self.t + self.late_s,
            speed=8.0,
            ready=lambda: self.not_ready,
            registry=registry,
            act=self.actions.closed,
            hosts=LOOPBACK_NAMES,
        )
        add_routes(self.app, state)
        self.actions.add_routes(self.app)

    def advance(self, seconds: int) -> None:
        """Reads further."""
        for _ in range(seconds):
            for topic, item in self.feed.second(self.t, early=False):
                self.rows.apply(topic, item)
            self.t += 1

    async def _send(self, order: Order) -> dict[str, Any]:
        if self.fail is not None:
            raise self.fail
        self.orders.append(order)
        return {"command_id": "c" * 32, "offset": 1}
