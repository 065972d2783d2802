"""Faust tables of current rows: without a changelog, all on this process.

The source topics are upserts themselves, so rows are rebuilt from their newest records in seconds. A changelog would
be a second copy of them, with a recovery, topics and partition counts of its own to go wrong.
"""

from __future__ import annotations

from typing import Any

from faust.app.router import Router
from faust.exceptions import SameNode
from faust.tables.manager import TableManager
from faust.tables.table import Table as FaustTable


class RowTable(FaustTable):
    """A Faust table without a changelog; it may be written from anywhere."""

    def on_key_set(self, key: Any, value: Any) -> None:
        self._sensor_on_set(self, key, value)

    def on_key_del(self, key: Any) -> None:
        self._sensor_on_del(self, key)

    async def on_start(self) -> None:
        await self.add_runtime_dependency(self.data)


class RowTables(TableManager):
    """Manages tables that have nothing to recover."""

    def add(self, table: Any) -> Any:
        self[table.name] = table
        return table

    async def _update_channels(self) -> None:
        self._tables_finalized.set()
        for table in self.values():
            await table.maybe_start()
        self._tables_registered.set()


class HereRouter(Router):
    """Every key is on this process."""

    async def route_req(self, table_name: str, key: Any, web: Any, request: Any) -> Any:
        raise SameNode()
