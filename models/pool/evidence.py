"""How new the evidence is, and who of those that should speak is silent. Missing data is not zero load."""

from __future__ import annotations

from collections.abc import Iterable

from models.pool.windows import R, Row, Windows

MISSING = 10.0
"""A source is silent when so many of its arrivals are overdue: by chance that happens once in 20,000 times."""
HEARD_S = 3.0
"""A source heard so recently is not silent: it speaks once a second while it has anything to say."""


def idle(rows: Iterable[Row]) -> bool:
    """Whether every replica that serves says that it has nothing to do."""
    serving = [row for row in rows if row[-3] in ("ready", "draining")]
    return bool(serving) and all(row[R["running_last"]] == 0 and row[R["waiting_last"]] == 0 for row in serving)


def evidence_s(windows: Windows, rows: Iterable[Row]) -> float | None:
    """Newest evidence on load, Unix s: request windows, or engines that say that there is none."""
    newest = max(windows.request_until.values(), default=None)
    if windows.engine_until and idle(rows):
        engines = max(windows.engine_until.values())
        return engines if newest is None else max(newest, engines)
    return newest


def silent(windows: Windows, rows: Iterable[Row], now_s: float) -> dict[str, float]:
    """Request sources of which more is overdue than chance explains, with how long they have been silent, s.

    None while every replica is idle: then the requests have ended, and not the word of them.
    """
    found: dict[str, float] = {}
    if idle(rows):
        return found
    for source, until_s in windows.request_until.items():
        age = now_s - until_s
        if age > HEARD_S and windows.source_arrivals(source, until_s) / 60.0 * age > MISSING:
            found[source] = age
    return found
