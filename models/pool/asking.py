"""Since when the evidence has asked for so many replicas: the start of the clock from load step to action."""

from __future__ import annotations

LEVELS_MAX = 64


class Asking:
    """Levels above the target that have been wanted without a break, each with the time before which they were not."""

    __slots__ = ("levels",)

    def __init__(self) -> None:
        self.levels: list[list[float]] = []
        """[replicas, since s], ascending in both."""

    def look(self, wanted: int, target: int, before_s: float) -> float:
        """One evaluation: `wanted` now, and not yet by what was known at `before_s`. Gives since when it is asked."""
        kept = [level for level in self.levels if target < level[0] <= wanted]
        fallen = [level for level in self.levels if level[0] > wanted]
        if wanted > target and (not kept or kept[-1][0] < wanted):
            kept.append([wanted, fallen[0][1] if fallen else before_s])
        self.levels = kept[-LEVELS_MAX:]
        return self.levels[-1][1] if wanted > target else before_s
