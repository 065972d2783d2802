"""Records of pool.signals for tests, and a small world that writes them as the levels below do."""

from __future__ import annotations

from typing import Any

import numpy as np

from models.pool.fold import PoolFold
from models.sketches import Histogram
from schemas.base import Record
from schemas.config import ConfigObject
from schemas.log import CONTENT_ARROW, LogRecord
from schemas.signals import ENGINE_WINDOWS, GPU_WINDOWS, REQUEST_WINDOWS, WindowName
from schemas.topics import ce_type

T0 = 1_700_000_000
"""A multiple of 10 s at which test worlds begin, Unix s."""
PARTITIONS = {"request.traces": 4, "node.samples": 4, "pool.signals": 4}


def pool_fold() -> PoolFold:
    """An empty fold."""
    return PoolFold("pool.signals", 0, PARTITIONS)


def at(second: float, type: str, value: bytes, key: str = "", content: str = "application/json") -> LogRecord:
    """A record at log time `second` (Unix s)."""
    return LogRecord(0, round(second * 1000), type, key, value, content)


def json_record(second: float, record: Record) -> LogRecord:
    """A JSON record at log time `second`."""
    return at(second, ce_type(record.kind), record.encode())


def config(second: float, kind: str, name: str, spec: dict[str, Any], revision: int = 1) -> LogRecord:
    """A configuration object at log time `second`."""
    return json_record(second, ConfigObject(object_kind=kind, name=name, revision=revision, spec=spec))  # type: ignore[arg-type]


def pool_config(second: float, name: str = "chat", revision: int = 1, **spec: Any) -> LogRecord:
    """A pool: H100, 4 GPUs a replica, 1 req/s each, automatic, unless said otherwise."""
    base = {
        "model": "m",
        "gpu_type": "H100",
        "gpus_per_replica": 4,
        "capacity_rps": 1.0,
        "mode": "automatic",
        "cold_start_s": 60.0,
        "replicas_max": 100,
    }
    return config(second, "pool", name, {**base, **spec}, revision)


def request_window(
    second: float,
    start_s: int,
    version: int,
    rows: list[dict[str, Any]],
    pool: str = "chat",
    source: str = "request.traces/0",
    closed: bool = True,
    until_s: float | None = None,
) -> LogRecord:
    """One source's request window; a row needs `tenant`, all else is 0. `ttft`, `tpot`: values for histograms."""
    data: dict[str, Any] = {name: [] for name in REQUEST_WINDOWS.columns}
    for row in rows:
        for name, column in REQUEST_WINDOWS.columns.items():
            if column.type == "pairs":
                values = row.get(name[: name.index("_s_hist")])
                hist = None if values is None else Histogram.of(np.array(values, float)).to_pairs().tolist()
                data[name].append(hist if closed else None)
            elif column.type == "text":
                data[name].append(row.get(name, "default"))
            else:
                data[name].append(row.get(name, 0))
    name = WindowName(pool, source, start_s, version, second if until_s is None else until_s, closed)
    value = REQUEST_WINDOWS.encode(data, name.meta())
    return at(second, REQUEST_WINDOWS.type, value, pool, CONTENT_ARROW)


def engine_window(
    second: float,
    start_s: int,
    version: int,
    rows: list[dict[str, Any]],
    pool: str = "chat",
    source: str = "node.samples/0",
    closed: bool = True,
    until_s: float | None = None,
) -> LogRecord:
    """One source's engine window; a row needs `replica`, the rest is a busy ready one with 4 H100."""
    base: dict[str, Any] = {
        "node": "n0",
        "state": "ready",
        "billed": 1,
        "gpus": 4.0,
        "gpu_type": "H100",
        "allocated_s": 10.0,
        "samples": 10,
        "covered_s": 10.0,
        "resets": 0,
        "running_mean": 2.0,
        "waiting_mean": 0.0,
        "running_last": 2.0,
        "waiting_last": 0.0,
    }
    full = [{**base, **row} for row in rows]
    data = {name: [row.get(name) for row in full] for name in ENGINE_WINDOWS.columns}
    name = WindowName(pool, source, start_s, version, second if until_s is None else until_s, closed)
    value = ENGINE_WINDOWS.encode(data, name.meta())
    return at(second, ENGINE_WINDOWS.type, value, pool, CONTENT_ARROW)


def gpu_window(
    second: float, start_s: int, version: int, util_pct: list[float | None], pool: str = "chat", lost: int = 0
) -> LogRecord:
    """One source's GPU window; the first `lost` GPUs no longer answer."""
    n = len(util_pct)
    data = {
        "node": ["n0"] * n,
        "gpu": list(range(n)),
        "gpu_type": ["H100"] * n,
        "status": ["lost" if i < lost else "ok" for i in range(n)],
        "samples": [10] * n,
        "covered_s": [10.0] * n,
        "util_gpu_pct_mean": util_pct,
    }
    name = WindowName(pool, "node.samples/0", start_s, version, second, True)
    return at(second, GPU_WINDOWS.type, GPU_WINDOWS.encode(data, name.meta()), pool, CONTENT_ARROW)


def world(
    rates: list[float],
    replicas: int = 4,
    tenants: tuple[str, ...] = ("acme", "zen"),
    start_s: int = T0,
    **spec: Any,
) -> list[LogRecord]:
    """A pool `chat` with so many arrivals per 10 s window and second; early rows each second, closed ones at +2 s.

    `rates`: arrivals per s by window. Every request ends where it arrived, with 100 tokens in and 50 out.
    """
    records = [
        pool_config(start_s, **spec),
        config(start_s, "price", "H100", {"usd_per_gpu_hour": 3.6}),
    ]
    names = [{"replica": f"r{i}"} for i in range(replicas)]
    version = 0
    for second in range(start_s + 1, start_s + 10 * len(rates) + 4):
        starts = [second // 10 * 10]
        if second % 10 <= 2:
            starts.insert(0, starts[0] - 10)
        for begin in starts:
            index = (begin - start_s) // 10
            if not 0 <= index < len(rates):
                continue
            closed = second >= begin + 12
            share = min(second - begin, 10)
            if share <= 0:
                continue
            version += 1
            rows = [_tenant(tenant, rates[index] * share / len(tenants)) for tenant in tenants]
            records.append(request_window(second, begin, version, rows, closed=closed))
            engines = [{**row, "allocated_s": float(share), "covered_s": float(share)} for row in names]
            records.append(engine_window(second, begin, version, engines, closed=closed))
    return [record._replace(offset=offset) for offset, record in enumerate(records)]


def _tenant(tenant: str, requests: float) -> dict[str, Any]:
    n = int(requests)
    return {
        "tenant": tenant,
        "arrivals": n,
        "ends": n,
        "ok": n,
        "slo_judged": n,
        "slo_good": n,
        "input_tokens": 100.0 * n,
        "output_tokens": 50.0 * n,
        "arrival_input_tokens": 100.0 * n,
        "ttft_s_sum": 0.5 * n,
        "ttft_count": n,
        "tpot_s_sum": 0.05 * n,
        "tpot_count": n,
        "ttft": [0.5] * min(n, 20),
        "tpot": [0.05] * min(n, 20),
    }
