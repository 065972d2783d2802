"""What the fleet level knows of one pool: its last status, what was ordered for it, when it last changed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from schemas.decisions import PoolStatus

STATUS_FIELDS = (
    "cluster",
    "at_s",
    "version",
    "gpu_type",
    "replicas_target",
    "replicas_wanted",
    "replicas_allocated",
    "replicas_ready",
    "gpus_allocated",
    "gpus_per_replica",
    "usd_day_to_date",
    "usd_month_to_date",
    "evidence_s",
)


@dataclass(slots=True)
class PoolView:
    """One pool. `None` = unknown throughout; times in Unix s of log time, counts in replicas."""

    status: dict[str, Any] | None = None
    """`STATUS_FIELDS` of the newest PoolStatus."""
    ordered: int | None = None
    """What the newest dispatched or executed scale decision asks for."""
    prior: int | None = None
    """While nobody knows whether that decision was carried out: the other count that may hold instead."""
    unsure_s: float | None = None
    """When an order ended without an answer: until newer evidence it may have been carried out or not."""
    up_s: float | None = None
    """Last executed scale-up."""
    change_s: float | None = None
    """Last executed scale decision."""
    down_since_s: float | None = None
    """Since when fewer replicas than ordered have been wanted without a break."""

    def base(self) -> int | None:
        """Replicas that the pool is meant to have: the last order, else what its status says."""
        if self.ordered is not None:
            return self.ordered
        if self.status is None:
            return None
        target: int | None = self.status["replicas_target"]
        return self.status["replicas_allocated"] if target is None else target

    def take(self, status: PoolStatus, gap_s_max: float) -> bool:
        """Takes a status; False where it is not newer than the one known.

        `gap_s_max`: after a longer silence nobody knows whether fewer replicas were wanted all the time.
        """
        before = self.status
        if before is not None and status.version <= before["version"]:
            return False
        self.status = {name: getattr(status, name) for name in STATUS_FIELDS}
        if self.unsure_s is not None and (status.evidence_s or 0.0) > self.unsure_s:
            self.prior, self.unsure_s = None, None
        base, wanted = self.base(), status.replicas_wanted
        if base is None or wanted is None or wanted >= base:
            self.down_since_s = None
        elif self.down_since_s is None or (before is not None and status.at_s - before["at_s"] > gap_s_max):
            self.down_since_s = status.at_s
        return True

    def order(self, replicas: int) -> None:
        """A scale decision was dispatched."""
        before = [n for n in (self.base(), self.prior) if n is not None]
        self.prior = max(before) if before else None
        self.ordered, self.unsure_s, self.down_since_s = replicas, None, None

    def executed(self, now_s: float) -> None:
        """The order was carried out."""
        if self.prior is not None and self.ordered is not None and self.ordered > self.prior:
            self.up_s = now_s
        self.change_s, self.prior = now_s, None

    def undone(self) -> None:
        """The order was not carried out: what held before holds."""
        self.ordered, self.prior = self.prior, None

    def unanswered(self, now_s: float) -> None:
        """Nobody knows whether the order was carried out: both counts may hold until newer evidence comes."""
        self.ordered, self.prior, self.unsure_s = self.prior, self.ordered, now_s

    def gpus(self, gpus_per_replica: float | None, replicas: int | None = None) -> float | None:
        """GPUs that the pool holds or was promised; None = unknown. `replicas`: count at least so many."""
        if self.status is None:
            return None
        each = gpus_per_replica if gpus_per_replica is not None else self.status["gpus_per_replica"]
        allocated: float | None = self.status["gpus_allocated"]
        if allocated is None and self.status["replicas_allocated"] is not None and each is not None:
            allocated = self.status["replicas_allocated"] * each
        promised = max(self.ordered or 0, self.prior or 0, replicas or 0)
        if allocated is None or (promised and each is None):
            return None
        return max(allocated, promised * (each or 0.0))

    def dump(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)
