"""Texts that samples carry (engine, model, process, replica) as numbers, so that a sample is a row of numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from schemas.columns import Batch


class Texts:
    """Codes are given once and never again, so a forgotten text that comes back has another."""

    def __init__(self) -> None:
        self.next = 0
        self.codes: dict[str, int] = {}
        self.names: dict[int, str] = {}

    def code(self, text: str, texts_max: int) -> int | None:
        """Code of a text, given if new; None where there are too many."""
        code = self.codes.get(text)
        if code is None and len(self.codes) < texts_max:
            self.next += 1
            code = self.codes[text] = self.next
            self.names[code] = text
        return code

    def listed(self, codes: np.ndarray) -> list[str | None]:
        """Texts of codes; None where NaN."""
        return [None if code != code else self.names.get(int(code)) for code in codes.tolist()]

    def prune(self, used: np.ndarray) -> None:
        """Forgets all but the codes in `used` (NaN among them is nothing)."""
        kept = dict.fromkeys(used[~np.isnan(used)].astype(np.int64).tolist())
        self.codes = {text: code for text, code in self.codes.items() if code in kept}
        self.names = {code: text for text, code in self.codes.items()}

    def state(self) -> dict[str, Any]:
        """Plain values for a dump."""
        return {"next": self.next, "codes": self.codes}

    def restore(self, state: dict[str, Any]) -> None:
        """Replaces everything by what `state` gave."""
        self.next, self.codes = state["next"], state["codes"]
        self.names = {code: text for text, code in self.codes.items()}


def coded(batch: Batch, column: str, give: Callable[[str], int | None]) -> tuple[np.ndarray, int]:
    """A text column as codes that `give` gives (float64 by row, NaN = unknown), and the rows for which it gave none."""
    codes, values = batch.codes[column], batch.values[column]
    table = np.full(len(values) + 1, np.nan)  # the last one is for -1, unknown
    for value in np.unique(codes[codes >= 0]).tolist():
        code = give(values[value])
        table[value] = np.nan if code is None else code
    found: np.ndarray = table[codes]
    return found, int((np.isnan(found) & (codes >= 0)).sum())
