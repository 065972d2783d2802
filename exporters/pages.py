"""The pages of one target, one after another: a layout learned once, verified now and then, forgotten on a restart."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from exporters.adapters.base import Chosen
from exporters.exposition import PageError
from exporters.layout import LIMITS, Layout, Limits, learn
from exporters.planned import Read

LEARN_SHARE = 0.05
"""Share of a core that a target may take for learning: one whose series change at every scrape is refused between."""


class PageReader:
    """Reads the pages of a target. Parameters: `engine` is what is known to run there; `verify_s` the time between two
    comparisons with the parser, of which the first comes after `phase` (0 to 1) of it."""

    def __init__(
        self, engine: str | None = None, verify_s: float = 60.0, phase: float = 1.0, limits: Limits = LIMITS
    ) -> None:
        self.engine, self.verify_s, self.limits = engine, verify_s, limits
        self.layout: Layout | None = None
        self.start_s: float | None = None
        """Start of the engine, as it says it."""
        self.counts: Counter[str] = Counter()
        """What was odd since the caller last emptied it: columns whose values were refused; `layout_learned`,
        `layout_differs`, `lines`."""
        self._new = True
        self._chosen = Chosen()
        self._phase: float | None = phase
        self._verify_at = 0.0
        self._learn_at = 0.0
        self._refusal: PageError | None = None

    def quick(self, lines: Sequence[bytes], histograms: bool) -> list[Read] | None:
        """The rows of a page that has the known layout, in about 0.1 ms; None: call `slow`, off the event loop."""
        return self._rows(lines, histograms)

    def slow(self, lines: Sequence[bytes], openmetrics: bool, histograms: bool, now: float) -> list[Read]:
        """The rows of a page whose layout must be learned. `now`: a monotonic time in s. Raises PageError."""
        if now < self._learn_at:
            raise self._refusal or PageError("unsteady", "its series change at every scrape")
        began = time.thread_time()
        try:
            for _ in range(2):  # the second time where the start has changed: names are chosen anew
                self._learn(lines, openmetrics, now)
                rows = self._rows(lines, histograms)
                if rows is not None:
                    return rows
            raise PageError("unsteady", "it cannot be read twice alike")
        finally:
            self._learn_at = now + (time.thread_time() - began) / LEARN_SHARE

    def _learn(self, lines: Sequence[bytes], openmetrics: bool, now: float) -> None:
        try:
            self.layout = learn(lines, openmetrics, self._chosen, self.engine, self.limits)
        except PageError as error:
            self._refusal, self.layout = error, None
            raise
        self._refusal = None
        self.counts["layout_learned"] += 1
        self.counts["lines"] += self.layout.bad_lines
        if self._phase is not None:
            self._verify_at, self._phase = now + self._phase * self.verify_s, None

    def to_verify(self, now: float) -> Layout | None:
        """The layout, where it is time to ask it, off the event loop, whether it `agrees` with the parser."""
        if now < self._verify_at:
            return None
        self._verify_at = now + self.verify_s
        return self.layout

    def verified(self, layout: Layout, agrees: bool) -> None:
        """Takes the answer: a layout that differs is counted and learned anew."""
        if not agrees:
            self.counts["layout_differs"] += 1
            if self.layout is layout:
                self.layout = None

    def _rows(self, lines: Sequence[bytes], histograms: bool) -> list[Read] | None:
        layout = self.layout
        values = layout.values(lines, histograms) if layout is not None else None
        if layout is None or values is None:
            return None
        bad: list[str] = []
        rows = layout.rows(values, histograms, bad)
        starts = [start for row in rows if (start := row.values.get("start_s")) is not None]
        start = min(starts) if starts else None
        restarted = start != self.start_s and not self._new
        self.start_s, self._new = start, False
        if restarted:
            self._chosen.forget()
            self.layout = None
            return None
        self.counts.update(bad)
        return rows
