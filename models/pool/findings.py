"""What is wrong in a pool at present: each finding opens once, is updated at most once a minute, closes once."""

from __future__ import annotations

from typing import Any, NamedTuple

from schemas.findings import Finding, FindingKind

UPDATE_S = 60.0
OPEN_MAX = 1000
"""Open findings of one pool; more are counted, not said."""


class Found(NamedTuple):
    """One thing that is wrong now."""

    text: str
    severity: float
    usd_per_hour: float | None = None
    evidence: dict[str, Any] = {}  # noqa: RUF012 - a NamedTuple's default, never changed


class Findings:
    """Open findings of one pool."""

    __slots__ = ("open",)

    def __init__(self) -> None:
        self.open: dict[str, dict[str, list[Any]]] = {}
        """kind -> subject -> [since s, last said s, last severity, last text]."""

    def update(
        self, pool: str, kind: FindingKind, current: dict[str, Found], now_s: float, version: int
    ) -> tuple[list[Finding], int]:
        """All that is wrong of this kind now; gives what is to be said and how many did not fit."""
        known = self.open.setdefault(kind, {})
        said: list[Finding] = []
        for subject in [subject for subject in known if subject not in current]:
            since, _, severity, text = known.pop(subject)
            said.append(_finding(pool, kind, subject, False, since, now_s, version, Found(text, severity)))
        over = 0
        for subject, found in current.items():
            held = known.get(subject)
            if held is None:
                if sum(map(len, self.open.values())) >= OPEN_MAX:
                    over += 1
                    continue
                held = known[subject] = [now_s, now_s, found.severity, found.text]
            elif now_s - held[1] >= UPDATE_S and found.text != held[3]:
                held[1:] = [now_s, found.severity, found.text]
            else:
                continue
            said.append(_finding(pool, kind, subject, True, held[0], now_s, version, found))
        return said, over


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
