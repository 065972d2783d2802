"""The requests fold over what the clients of a real vLLM measured, and over a public trace."""

from __future__ import annotations

import csv
import gzip
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.sketches import RELATIVE_ERROR, Histogram
from schemas.signals import REQUEST_WINDOWS
from tests.models.law import log, run, tick
from tests.models.node.logs import final
from tests.models.requests.logs import arrival, end, fold, pool_config, record


def test_latencies_of_a_real_engine(data_dir: Path) -> None:
    """Merged over windows, quantiles are within 1 % of the clients' and the SLO is what a plain count says."""
    with gzip.open(data_dir / "engine-metrics" / "vllm-cpu-run" / "requests.csv.gz", "rt") as file:
        requests = [r for r in csv.DictReader(file) if r["outcome"] == "ok"]
    rows: list[dict[str, Any]] = []
    for r in requests:
        at, ttft, e2e, tokens = float(r["t_arrival"]), float(r["ttft_s"]), float(r["e2e_s"]), float(r["output_tokens"])
        rows.append(arrival(r["id"], at))
        rows.append(end(r["id"], at + e2e, output_tokens=tokens, ttft_s=ttft, e2e_s=e2e, tpot_s=None))
    rows.sort(key=lambda row: row["at_s"])
    batches = [rows[i : i + 50] for i in range(0, len(rows), 50)]
    last = rows[-1]["at_s"]
    records = [pool_config(rows[0]["at_s"], slo_tpot_s=0.03)]
    records += [record(batch[-1]["at_s"] + 0.2, batch) for batch in batches]
    out = run(fold(), log(*records, tick(last + 13), tick(last + 14)))
    windows = [row for found in final(out, REQUEST_WINDOWS).values() for row in found]
    assert sum(w["arrivals"] for w in windows) == sum(w["ends"] for w in windows) == len(requests)
    for name in ("ttft_s", "e2e_s"):
        merged = Histogram.empty().merge(*(Histogram.from_pairs(w[f"{name}_hist"]) for w in windows))
        true = np.sort([float(r[name]) for r in requests])
        for q in (0.5, 0.9, 0.99):
            assert merged.quantile(q) == pytest.approx(true[int(q * (len(true) - 1))], rel=RELATIVE_ERROR)
        assert sum(w[f"{name}_sum"] for w in windows) == pytest.approx(true.sum())
    good = 0
    for r in requests:
        ttft, tokens = float(r["ttft_s"]), float(r["output_tokens"])
        slow = tokens >= 2 and (float(r["e2e_s"]) - ttft) / (tokens - 1) > 0.03
        good += ttft <= 2.0 and not slow
    assert sum(w["slo_judged"] for w in windows) == len(requests)
    assert sum(w["slo_good"] for w in windows) == good
    assert 0 < good < len(requests)


def test_a_public_trace_is_counted_whole(data_dir: Path) -> None:
    """Ten minutes of the Azure trace: arrivals and their tokens by window are those of the file."""
    wanted: dict[int, list[float]] = {}
    rows = []
    with (data_dir / "azure-llm-2023" / "AzureLLMInferenceTrace_conv.csv").open() as file:
        for number, r in enumerate(csv.DictReader(file)):
            at = datetime.fromisoformat(r["TIMESTAMP"][:26] + "+00:00").timestamp()
            if rows and at > rows[0]["at_s"] + 600:
                break
            rows.append(arrival(f"r{number}", at, input_tokens=float(r["ContextTokens"])))
            cell = wanted.setdefault(int(at) // 10 * 10, [0, 0.0])
            cell[0] += 1
            cell[1] += float(r["ContextTokens"])
    records = [record(rows[i : i + 200][-1]["at_s"] + 0.1, rows[i : i + 200]) for i in range(0, len(rows), 200)]
    last = rows[-1]["at_s"]
    found = final(run(fold(), log(*records, tick(last + 13), tick(last + 14))), REQUEST_WINDOWS)
    assert {start: [w["arrivals"], w["arrival_input_tokens"]] for (_, start), (w,) in found.items()} == wanted
