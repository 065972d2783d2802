"""The audit chain: one entry per accepted transition or command, each hashed over the one before."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from schemas.base import canonical
from schemas.decisions import AuditEntry

FIRST = "0" * 64
CAUSE_MAX = 2000


def cut(text: str, most: int = CAUSE_MAX) -> str:
    """A text of at most `most` characters; what is cut is said."""
    return text if len(text) <= most else text[: most - 3] + "..."


def entry_hash(entry: AuditEntry) -> str:
    """sha256(previous + canonical JSON of every field but `hash` and `previous`), hexadecimal."""
    rest = entry.model_dump(mode="json", exclude={"hash", "previous"})
    return hashlib.sha256(entry.previous.encode() + canonical(rest)).hexdigest()


def broken_at(entries: Iterable[AuditEntry], previous: str = FIRST, sequence: int = 0) -> int | None:
    """Sequence of the first entry that does not continue the chain; None where it holds.

    `previous`, `sequence`: where the entries begin; by default at the beginning of the chain.
    """
    for entry in entries:
        if entry.sequence != sequence or entry.previous != previous or entry.hash != entry_hash(entry):
            return sequence
        previous, sequence = entry.hash, sequence + 1
    return None


class Chain:
    """The end of the chain, and how it grows."""

    def __init__(self) -> None:
        self.sequence = 0
        self.previous = FIRST

    def append(self, **fields: Any) -> AuditEntry:
        """The next entry, from every field of AuditEntry but `sequence`, `previous` and `hash`."""
        entry = AuditEntry(sequence=self.sequence, previous=self.previous, hash="", **fields)
        entry = entry.model_copy(update={"hash": entry_hash(entry)})
        self.sequence, self.previous = self.sequence + 1, entry.hash
        return entry
