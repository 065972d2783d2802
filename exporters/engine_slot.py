"""What is kept of one target between its scrapes."""

from __future__ import annotations

import asyncio

from exporters.adapters.base import RowPlan
from exporters.pages import PageReader
from exporters.targets import Target

DCGM = "dcgm"
"""Engine name of dcgm-exporter."""


class Slot:
    """One target: how its pages are read, and the scrape that is under way."""

    def __init__(self, target: Target, node: str, phase: float, reader: PageReader, now: float) -> None:
        self.target, self.node, self.phase, self.reader = target, node, phase, reader
        self.scrapes = 0
        self.since_s: float | None = None
        """Fleet time of the last answer."""
        self.answered_at = now
        """When the last scrape that was answered began."""
        self.histogram_at = 0.0
        self.engine = target.engine
        self.replicas: list[str] = []
        """Replicas of the last answer."""
        self.failure = ""
        self.dead = False
        self.due = 0.0
        self.timer: asyncio.TimerHandle | None = None
        self.task: asyncio.Task[None] | None = None

    @property
    def is_gpu(self) -> bool:
        """Whether it is about GPUs (dcgm-exporter) and no replica."""
        return self.engine == DCGM

    @property
    def state(self) -> str:
        """waiting, ok or dead."""
        return "dead" if self.dead else "waiting" if self.since_s is None else "ok"

    def node_of(self, plan: RowPlan) -> str:
        """The node that a row is filed under: the one that it names, else the target's."""
        return plan.node or self.node
