"""What really happened to a small simulated fleet, by plain sums over the producers' ledger; and what was published.

Nothing here asks a fold of ours: the ledger is the file that the simulator writes each row to, the bill is the
simulator's own, and of what was published only the codec is used, and the rule that the greatest version counts.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from schemas.columns import Columns
from schemas.signals import WindowName
from schemas.topics import COST_WINDOWS, POOL_SIGNALS, TOPICS
from simulator.scenario import Scenario
from streams.reader import header, read_to_end
from streams.settings import Settings

WINDOW_S = 10
Cell = tuple[str, str, str, int]
"""(pool, tenant, class, start of the window in Unix s)."""
Name = tuple[str, str, str]
"""(topic, ce_type, ce_id) of a record."""

COUNTS = (
    "arrivals", "ends", "ok", "errors", "rejected", "slo_judged", "slo_good", "input_tokens", "cached_tokens",
    "output_tokens", "ttft_count",
)  # fmt: skip

ENGINE = {"d0_ms": 28.8, "d1_ms": 0.264, "d2_ms": 0.101, "p1_ms": 95.6}


def scenario(duration_s: float) -> Scenario:
    """Three pools with too few replicas, one of which is slow for a while and one dies; load for `duration_s`."""
    engine = {**ENGINE, "timeout_s": 120}
    small = {"d0_ms": 4.87, "d1_ms": 0.199, "d2_ms": 0.102, "p1_ms": 34.7, "chunk_tokens": 512, "timeout_s": 60}
    h100 = {"gpu": "H100", "tp": 2, "engine": engine, "cold_start": {"mean_s": 20}, "model": "llama2-70b"}
    chat = {"route": "chat", "input_tokens": {"mean": 1000, "max": 8192}, "output_tokens": {"mean": 200, "max": 1024}}
    return Scenario.model_validate(
        {
            "name": "loop",
            "seed": 5,
            "gpus": {"H100": {"usd_per_gpu_hour": 6.88}, "A100": {"usd_per_gpu_hour": 3.4309}},
            "nodes": [
                {"prefix": "h100", "gpu": "H100", "gpus": 8, "count": 2},
                {"prefix": "a100", "gpu": "A100", "gpus": 4, "count": 1},
            ],
            "pools": [
                {"name": "chat", "route": "chat", "replicas": 3, "replicas_max": 6, "capacity_rps": 3.5, **h100},
                {"name": "code", "route": "code", "replicas": 1, "replicas_max": 2, "capacity_rps": 1.8, **h100},
                {
                    "name": "assist", "route": "assist", "model": "llama-3.2-1b", "gpu": "A100", "gpu_share": 0.25,
                    "replicas": 2, "replicas_max": 4, "capacity_rps": 18, "engine": small,
                    "cold_start": {"mean_s": 10},
                },
            ],
            "tenants": [{"name": "acme", "class": "interactive"}, {"name": "globex"}],
            "duration_s": duration_s,
            "load": [
                {"kind": "synthetic", "tenant": "acme", "rate_rps": 5, **chat},
                {"kind": "synthetic", "tenant": "globex", "rate_rps": 2, **chat},
                {
                    "kind": "synthetic", "tenant": "globex", "route": "code", "rate_rps": 1,
                    "input_tokens": {"mean": 2000}, "output_tokens": {"mean": 30, "max": 512},
                },
                {
                    "kind": "synthetic", "tenant": "acme", "route": "assist", "rate_rps": 6,
                    "input_tokens": {"mean": 600}, "output_tokens": {"mean": 60, "max": 512},
                },
            ],
            "faults": [
                {"kind": "slow", "pool": "chat", "replica": 1, "at_s": 130, "duration_s": 120, "factor": 3},
                {"kind": "death", "pool": "assist", "at_s": 200},
            ],
        }
    )  # fmt: skip


# -- the ledger ------------------------------------------------------------------------------------------------


def by_window(rows: Iterable[dict[str, Any]], scenario: Scenario) -> dict[Cell, dict[str, float]]:
    """Counts and tokens of the ledger's rows: an arrival in the window of its arrival, an end in that of its end."""
    slo = {pool.name: pool.slo for pool in scenario.pools}
    found: dict[Cell, Counter[str]] = defaultdict(Counter)
    for row in rows:
        cell = found[row["pool"], row["tenant"], row["class"], int(row["at_s"] // WINDOW_S) * WINDOW_S]
        if row["event"] == "arrival":
            cell["arrivals"] += 1
            continue
        target, ok = slo[row["pool"]], row["status"] == "ok"
        paced = row["tpot_s"] is None or row["tpot_s"] <= target.tpot_s
        cell["ends"] += 1
        cell["ok"] += ok
        cell["errors"] += row["status"] in ("error", "timeout")
        cell["rejected"] += row["status"] == "rejected"
        cell["slo_judged"] += 1
        cell["slo_good"] += ok and row["ttft_s"] <= target.ttft_s and paced
        cell["ttft_count"] += row["ttft_s"] is not None
        for tokens in ("input_tokens", "cached_tokens", "output_tokens"):
            cell[tokens] += row[tokens]
    return {cell: {name: float(sums[name]) for name in COUNTS} for cell, sums in found.items()}


def by_tenant(cells: dict[Cell, dict[str, float]]) -> dict[tuple[str, str, int], tuple[float, float, float]]:
    """(pool, tenant, start) -> (requests that ended, their input tokens, their output tokens), where any ended."""
    found: dict[tuple[str, str, int], tuple[float, float, float]] = {}
    for (pool, tenant, _, start), sums in cells.items():
        own = (sums["ends"], sums["input_tokens"], sums["output_tokens"])
        if any(own):
            known = found.get((pool, tenant, start), (0.0, 0.0, 0.0))
            found[pool, tenant, start] = (known[0] + own[0], known[1] + own[1], known[2] + own[2])
    return found


def tokens_by_replica(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Tokens generated by replica, of all that ended, however."""
    found: Counter[str] = Counter()
    for row in rows:
        if row["event"] == "end" and row["replica"] is not None:
            found[row["replica"]] += row["output_tokens"]
    return dict(found)


# -- what was published ----------------------------------------------------------------------------------------


async def published(settings: Settings) -> dict[str, dict[Name, str]]:
    """ce_source -> name of every record in every topic -> digest; fails where one name has two contents."""
    found: dict[str, dict[Name, str]] = defaultdict(dict)
    for topic in TOPICS:
        if topic.startswith("checkpoints."):
            continue
        async for record in read_to_end(settings, topic):
            name = (topic, header(record, "ce_type"), header(record, "ce_id"))
            if name[1] == "tick":
                continue
            content = hashlib.sha256(record.value or b"").hexdigest()
            known = found[header(record, "ce_source")].setdefault(name, content)
            assert known == content, f"{name} has two contents"
    return dict(found)


def greatest(names: Iterable[Name]) -> dict[Name, int]:
    """Name without its version -> greatest version; facts have none and stay as they are."""
    found: dict[Name, int] = {}
    for topic, kind, id in names:
        name, at, version = id.rpartition("@")
        key = (topic, kind, name if at else id)
        found[key] = max(found.get(key, -1), int(version) if at else 0)
    return found


async def windows(settings: Settings, kind: Columns) -> dict[tuple[str, int, str], Any]:
    """(pool, start, source) -> the rows of the greatest version."""
    best: dict[tuple[str, int, str], tuple[int, bytes]] = {}
    async for record in read_to_end(settings, POOL_SIGNALS):
        if header(record, "ce_type") == kind.type:
            subject, _, version = header(record, "ce_id").rpartition("@")
            _, pool, start, source = subject.split("/", 3)
            key = (pool, int(start), source)
            if key not in best or best[key][0] < int(version):
                best[key] = (int(version), record.value)
    found = {}
    for key, (version, value) in best.items():
        batch = kind.decode(value)
        name = WindowName.of(batch.meta)
        assert (name.pool, name.start_s, name.source, name.version) == (*key, version)
        found[key] = batch
    return found


def merged(requests: dict[tuple[str, int, str], Any]) -> dict[Cell, dict[str, float]]:
    """Request windows added up over their sources."""
    found: dict[Cell, dict[str, float]] = {}
    for (pool, start, _), batch in requests.items():
        labels = zip(batch.text("tenant"), batch.text("class"), strict=True)
        for i, (tenant, kind) in enumerate(labels):
            sums = found.setdefault((pool, str(tenant), str(kind), start), dict.fromkeys(COUNTS, 0.0))
            for name in COUNTS:
                sums[name] += float(batch.numbers[name][i])
    return found


def generated(engines: dict[tuple[str, int, str], Any]) -> dict[str, float]:
    """Tokens generated by replica, over all windows."""
    found: dict[str, float] = {}
    for batch in engines.values():
        for replica, tokens in zip(batch.text("replica"), batch.numbers["generation_tokens"].tolist(), strict=True):
            found[str(replica)] = found.get(str(replica), 0.0) + (0.0 if math.isnan(tokens) else tokens)
    return found


async def bills(settings: Settings) -> dict[tuple[str, str | None, int], dict[str, Any]]:
    """(pool, tenant or None, start) -> the greatest version of its cost."""
    best: dict[tuple[str, str | None, int], dict[str, Any]] = {}
    async for record in read_to_end(settings, COST_WINDOWS):
        row = json.loads(record.value)
        key = (row["pool"], row["tenant"], int(row["start_s"]))
        if key not in best or best[key]["version"] < row["version"]:
            best[key] = row
    return best
