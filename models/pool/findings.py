"""What is wrong in a pool at present: each finding opens once, is updated at most once a minute, closes once.

What flaps is held: a kind in `HOLD` opens when it was seen without a break for so long, and closes when it was not seen
for so long. The finding says since when it really was.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from schemas.findings import Finding, FindingKind

UPDATE_S = 60.0
OPEN_MAX = 1000
"""Findings of one pool, open or about to be; more are counted, not said."""
HOLD: dict[FindingKind, tuple[float, float]] = {
    "idle_allocated": (0.0, 70.0),  # a replica is idle after a minute: one request in it does not end that
    "batching_collapse": (20.0, 30.0),
    "spread_collapse": (120.0, 60.0),
    "memory_held": (20.0, 20.0),
    "fragmentation": (60.0, 30.0),
    "gpu_throttled": (20.0, 60.0),
    "gpu_errors": (0.0, 600.0),  # events: they are said for as long as somebody may look
    "engine_dead": (0.0, 10.0),
    "node_unknown": (30.0, 10.0),
    "interference": (0.0, 60.0),
}
"""Kind -> (seen so long before it opens, not seen so long before it closes), s; others at once."""


class Found(NamedTuple):
    """One thing that is wrong now."""

    text: str
    severity: float
    usd_per_hour: float | None = None
    evidence: dict[str, Any] = {}  # noqa: RUF012 - a NamedTuple's default, never changed


class Findings:
    """Findings of one pool."""

    __slots__ = ("open", "soon")

    def __init__(self) -> None:
        self.open: dict[str, dict[str, list[Any]]] = {}
        """kind -> subject -> [since s, last said s, last severity, last text, last seen s]."""
        self.soon: dict[str, dict[str, float]] = {}
        """kind -> subject -> since when it is seen, Unix s."""

    def update(
        self, pool: str, kind: FindingKind, current: dict[str, Found], now_s: float, version: int
    ) -> tuple[list[Finding], int]:
        """All that is wrong of this kind now; gives what is to be said and how many did not fit."""
        opens_s, closes_s = HOLD.get(kind, (0.0, 0.0))
        known = self.open.setdefault(kind, {})
        seen = self.soon.pop(kind, {})
        said: list[Finding] = []
        for subject in [subject for subject in known if subject not in current]:
            since, _, severity, text, last_s = known[subject]
            if now_s - last_s >= closes_s:
                del known[subject]
                said.append(_finding(pool, kind, subject, False, since, now_s, version, Found(text, severity)))
        soon: dict[str, float] = {}
        over = 0
        for subject, found in current.items():
            held = known.get(subject)
            if held is None:
                since = seen.get(subject, now_s)
                if self._count() + len(soon) >= OPEN_MAX:
                    over += 1
                    continue
                if now_s - since < opens_s:
                    soon[subject] = since
                    continue
                held = known[subject] = [since, now_s, found.severity, found.text, now_s]
            else:
                held[4] = now_s
                if now_s - held[1] < UPDATE_S or found.text == held[3]:
                    continue
                held[1:4] = [now_s, found.severity, found.text]
            said.append(_finding(pool, kind, subject, True, held[0], now_s, version, found))
        if soon:
            self.soon[kind] = soon
        return said, over

    def _count(self) -> int:
        return sum(map(len, self.open.values())) + sum(map(len, self.soon.values()))

    def state(self) -> list[Any]:
        """As plain values."""
        return [self.open, self.soon]

    def restore(self, state: list[Any]) -> None:
        """From `state`."""
        self.open, self.soon = state


def _finding(
    pool: str,
    kind: FindingKind,
    subject: str,
    is_open: bool,
    since_s: float,
    now_s: float,
    version: int,
    found: Found,
) -> Finding:
    return Finding(
        finding=kind,
        pool=pool,
        subject=subject,
        open=is_open,
        since_s=since_s,
        at_s=now_s,
        version=version,
        text=found.text if is_open else f"over: {found.text}",
        severity=found.severity,
        usd_per_hour=found.usd_per_hour if is_open else None,
        evidence=found.evidence if is_open else {},
    )
