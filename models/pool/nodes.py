"""Nodes, and GPUs that serve no pool: what stands free where nothing fits, who loses telemetry. Findings of pool `-`.

Windows of nodes come under the key `-`, so one partition has them all. Only what each source said last is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from models.pool import gpus
from models.pool.findings import Findings, Found
from models.pool.gpus import Fault
from schemas.columns import Batch
from schemas.config import PoolSpec
from schemas.findings import FindingKind
from schemas.signals import WindowName

NO_POOL = "-"
"""Key under which nodes come, and GPUs that serve no pool."""
FRESH_S = 40.0
"""A window is the present for so long."""
DROPPED_S = 300.0
"""A loss of telemetry is said for so long after the last."""


class Nodes:
    """All nodes of a deployment, in the partition of key `-`."""

    __slots__ = ("dropped", "findings", "gpus", "rows")

    def __init__(self) -> None:
        self.rows: dict[str, list[Any]] = {}
        """source -> [start of the newest window, version, [[node, GPU type, free GPUs, batches dropped], ...]]."""
        self.gpus: dict[str, list[Any]] = {}
        """source -> [start of the newest window, version, GPU -> what is wrong with it]."""
        self.dropped: dict[str, list[float]] = {}
        """node -> [batches dropped as last told, when last told, when last more were, how many those were]."""
        self.findings = Findings()

    def take_nodes(self, name: WindowName, batch: Batch, nodes_max: int) -> int:
        """Rows of node.windows; gives how many nodes found no room."""
        if not _newer(self.rows, name):
            return 0
        free, dropped = batch.numbers["gpus_free"].tolist(), batch.numbers["dropped"].tolist()
        rows = [list(row) for row in zip(batch.text("node"), batch.text("gpu_type"), free, strict=True)]
        self.rows[name.source] = [name.start_s, name.version, rows]
        over = 0
        for (node, *_), count in zip(rows, dropped, strict=True):
            if count == count and not self._lost(str(node), count, name.until_s, nodes_max):
                over += 1
        return over

    def _lost(self, node: str, count: float, at_s: float, nodes_max: int) -> bool:
        known = self.dropped.get(node)
        if known is None:
            if len(self.dropped) >= nodes_max:
                return False
            self.dropped[node] = [count, at_s, 0.0, 0.0]
            return True
        more = count - known[0] if count >= known[0] else count  # fewer: an exporter has started anew
        recent = known[3] if at_s - known[2] <= DROPPED_S else 0.0
        self.dropped[node] = [count, at_s, *((at_s, recent + more) if more > 0 else known[2:])]
        return True

    def take_gpus(self, name: WindowName, batch: Batch) -> None:
        """Rows of gpu.windows of GPUs that serve no pool."""
        if _newer(self.gpus, name):
            self.gpus[name.source] = [name.start_s, name.version, gpus.faults(batch)]

    def found(
        self, now_s: float, specs: Iterable[PoolSpec], prices: Mapping[str, float]
    ) -> dict[FindingKind, dict[str, Found]]:
        """What is wrong now, by kind; an empty kind closes what was open."""
        self._forget(now_s)
        fresh: list[dict[str, Fault]] = [entry[2] for entry in self.gpus.values() if now_s - entry[0] <= FRESH_S]
        return {
            **gpus.found(fresh, prices, "", served=False),
            "fragmentation": self._stranded(now_s, specs, prices),
            "telemetry_lost": self._losses(now_s),
        }

    def _forget(self, now_s: float) -> None:
        for held in (self.rows, self.gpus):
            for source in [source for source, entry in held.items() if now_s - entry[0] > 10 * FRESH_S]:
                del held[source]
        self.dropped = {node: entry for node, entry in self.dropped.items() if now_s - entry[1] <= 2 * DROPPED_S}

    def _stranded(self, now_s: float, specs: Iterable[PoolSpec], prices: Mapping[str, float]) -> dict[str, Found]:
        """Nodes whose free GPUs are fewer than a replica of any pool on that type needs."""
        needs: dict[str, int] = {}
        for spec in specs:
            need = math.ceil(spec.gpus_per_replica)
            needs[spec.gpu_type] = min(need, needs.get(spec.gpu_type, need))
        rows = [
            (str(node), str(kind), free)
            for start_s, _, entries in self.rows.values()
            if now_s - start_s <= FRESH_S
            for node, kind, free in entries
            if kind in needs and 0 < free < needs[kind]
        ]
        stranded: dict[str, float] = {}
        for _, kind, free in rows:
            stranded[kind] = stranded.get(kind, 0.0) + free
        found = {}
        for node, kind, free in rows:
            need, total = needs[kind], stranded[kind]
            text = f"{free:.0f} free {kind} on {node} serve nothing: the smallest replica needs {need} on one node"
            if total >= need:
                text += f"; {total:.0f} are stranded like this on all nodes, enough for {total // need:.0f} if packed"
            price = prices.get(kind)
            evidence = {"gpus_free": free, "gpus_needed": need, "gpus_stranded": total}
            found[f"{node} ({kind})"] = Found(text, free, None if price is None else price * free, evidence)
        return found

    def _losses(self, now_s: float) -> dict[str, Found]:
        return {
            node: Found(
                f"the exporters of {node} dropped {lost:.0f} batches within minutes: their buffer was full while the "
                "broker could not be reached; what they measured then is missing from every window",
                lost,
                None,
                {"batches_dropped": lost, "last_s": last_s},
            )
            for node, (_, _, last_s, lost) in self.dropped.items()
            if lost and now_s - last_s <= DROPPED_S
        }

    def state(self) -> list[Any]:
        """As plain values."""
        return [self.rows, self.gpus, self.dropped, self.findings.state()]

    def restore(self, state: list[Any]) -> None:
        """From `state`."""
        self.rows, self.gpus, self.dropped, findings = state
        self.findings.restore(findings)


def _newer(held: dict[str, list[Any]], name: WindowName) -> bool:
    known = held.get(name.source)
    return name.closed and (known is None or (name.start_s, name.version) > (known[0], known[1]))
