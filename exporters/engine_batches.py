"""Rows of several kinds and nodes on their way to node.samples: those that come close together go as one batch."""

from __future__ import annotations

import asyncio
from typing import Any

from exporters.edge import Edge
from schemas.columns import Columns
from schemas.log import CONTENT_ARROW
from schemas.node import ENGINE_HISTOGRAMS
from schemas.topics import NODE_SAMPLES

GATHER_S = 0.05
"""Rows of a node that come within this time of each other go into one batch."""
ROWS_MAX = 500
"""... unless there are so many: a batch stays far below 512 KiB."""
BINS_ROWS_MAX = 100
"""... of distributions, which may have 256 buckets each."""

Row = dict[str, Any]


class Batches:
    """Gathers rows by node and kind."""

    def __init__(self, edge: Edge) -> None:
        self.edge = edge
        self._rows: dict[str, dict[str, list[Row]]] = {}
        self._kinds: dict[str, Columns] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def add(self, kind: Columns, node: str, row: Row) -> None:
        """Takes a row; it is sent within GATHER_S."""
        self._kinds[kind.kind] = kind
        rows = self._rows.setdefault(node, {}).setdefault(kind.kind, [])
        rows.append(row)
        if len(rows) >= (BINS_ROWS_MAX if kind is ENGINE_HISTOGRAMS else ROWS_MAX):
            self.flush(node)
        elif node not in self._timers:
            self._timers[node] = asyncio.get_running_loop().call_later(GATHER_S, self.flush, node)

    def flush_all(self) -> None:
        """Sends everything."""
        for node in list(self._rows):
            self.flush(node)

    def flush(self, node: str) -> None:
        """Sends what is gathered of a node, a batch a kind."""
        timer = self._timers.pop(node, None)
        if timer is not None:
            timer.cancel()
        for name, rows in self._rows.pop(node, {}).items():
            kind = self._kinds[name]
            meta, id = self.edge.node_batch(node)
            value = kind.encode_rows(rows, meta)
            self.edge.producer.send(NODE_SAMPLES, node, value, type=kind.type, id=id, content_type=CONTENT_ARROW)
