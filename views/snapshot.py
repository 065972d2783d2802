"""Current rows read once from the topics themselves: for `fleetloop get`, where no views service need run."""

from __future__ import annotations

from typing import Any

from schemas.topics import (
    COST_WINDOWS,
    DEAD_LETTERS,
    DECISION_EVENTS,
    DECISIONS,
    FINDINGS,
    FLEET_CONFIG,
    LOAD_FORECASTS,
    POOL_SIGNALS,
)
from streams.deployment import read_deployment
from streams.reader import LogReader, log_record
from streams.settings import Settings
from views.rows import Rows

RECENT = 5_000
"""Records per partition that are enough for current rows of a topic whose rows come again every 10 s."""
NEEDS = {
    "pools": (DECISION_EVENTS, COST_WINDOWS, POOL_SIGNALS),
    "decisions": (DECISIONS, DECISION_EVENTS),
    "findings": (FINDINGS,),
    "tenants": (COST_WINDOWS, POOL_SIGNALS),
    "forecasts": (LOAD_FORECASTS,),
    "replicas": (POOL_SIGNALS,),
    "gpus": (POOL_SIGNALS,),
    "nodes": (POOL_SIGNALS,),
    "interference": (POOL_SIGNALS,),
    "dead-letters": (DEAD_LETTERS,),
}
"""What to show -> topics that it is made from."""


async def snapshot(settings: Settings, what: str) -> list[dict[str, Any]]:
    """The rows of a table of `views.rows`, or `dead-letters`, oldest first. Raises SettingsError, UnavailableError."""
    deployment = await read_deployment(settings)
    rows = Rows()
    for topic in (FLEET_CONFIG, *NEEDS[what]):
        async with LogReader(settings, topic) as reader:
            ends = await reader.ends()
        start = {p: end - RECENT for p, end in ends.items() if topic != FLEET_CONFIG and end > RECENT}
        async with LogReader(settings, topic, start=start) as reader:
            async for record in reader.to_end():
                rows.apply(topic, log_record(record, deployment.log_ms(record.timestamp)))
    if what == "dead-letters":
        return list(rows.letters)
    return [dict(row) for row in rows.tables[what].values()]
