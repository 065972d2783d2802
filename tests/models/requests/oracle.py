"""Drawn rows, how they come, and what the windows of them must say: a plain count, row by row, without the fold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from models.sketches import Histogram
from schemas.log import LogRecord
from schemas.signals import REQUEST_WINDOWS
from tests.models.law import tick
from tests.models.requests.logs import T0, arrival, end, record

Row = dict[str, Any]
Cell = tuple[str, int, str, str, str | None, int | None]
"""Pool, start of the window in Unix s, tenant, class, model, priority."""
STATUSES = ["ok", "ok", "ok", "error", "timeout", "rejected", "cancelled", None]
LATENCIES = ("ttft_s", "tpot_s", "e2e_s", "queue_s")
UNITS = ("image_units", "audio_s", "video_s")
MAYBE = (*UNITS, "arrival_input_tokens")
"""Null where no request gave it."""


def row(id: str, seed: int) -> Row:
    """A row made from the digits of a number: cheap to draw, and 0 is the plainest. Latencies are such that their sums
    depend on the order in plain floating point."""

    def pick(choices: Sequence[Any]) -> Any:
        nonlocal seed
        seed, digit = divmod(seed, len(choices))
        return choices[digit]

    is_end = pick([True, True, False])
    common = {
        "at_s": T0 + pick(range(320)) / 8,
        "tenant": pick(["acme", "zeta", None]),
        "class": pick(["fast", None]),
        "pool": pick(["chat", "code"]),
        "input_tokens": pick([*map(float, range(20)), None]),
        "model": pick([None, "m"]),
        "priority": pick([None, 3, -1]),
        "attempt": pick([None, 1, 2]),
    }
    if not is_end:
        return {**arrival(id, 0.0), **common}
    more = {
        "status": pick(STATUSES),
        "output_tokens": pick([5.0, 2.0, 1.0, 0.0, None]),
        "ttft_s": pick([*(n / 7 for n in range(20)), None]),
        "tpot_s": pick([None, *(n / 10 for n in range(13))]),
        "e2e_s": pick([None, 1.1, 3.3, 0.1]),
        "cached_tokens": pick([0.0, 3.0, None]),
        "queue_s": pick([None, 0.0, 0.7]),
        "image_units": pick([None, 1.0, 0.0]),
        "audio_s": pick([None, 1.7]),
        "video_s": None,
    }
    return {**end(id, 0.0), **common, **more}


def rows(most: int = 25) -> st.SearchStrategy[list[Row]]:
    """Rows with distinct ids."""
    seeds = st.lists(st.integers(0, 2**62), max_size=most)
    return seeds.map(lambda drawn: [row(f"q{number}", seed) for number, seed in enumerate(drawn)])


def deliver(sent: Sequence[Row], data: st.DataObject) -> list[LogRecord]:
    """Records of drawn sizes with these rows, in this order and within 300 s, and ticks until all windows are final."""
    records, left, now = [], list(sent), T0 + 1.0
    while left:
        size = data.draw(st.integers(1, 9))
        batch, left = left[:size], left[size:]
        now = max(now + 0.3, *(r["at_s"] for r in batch))  # none is from the future
        records.append(record(now, batch))
        now += data.draw(st.sampled_from([0.0, 1.0, 5.0]))
    return [*records, tick(now + 20), tick(now + 61)]


def cells_of(found: Mapping[tuple[str, int], list[Row]]) -> dict[Cell, Row]:
    """Final windows by cell, as `oracle` gives them: zero and unknown left out, so cells with nothing in them too."""
    cells: dict[Cell, Row] = {}
    for (pool, start_s), window in found.items():
        for got in window:
            key = (pool, start_s, got["tenant"], got["class"], got["model"], got["priority"])
            assert key not in cells
            values = {
                name: value for name, value in got.items() if name not in ("tenant", "class", "model", "priority")
            }
            assert [name for name in values if name not in REQUEST_WINDOWS.columns] == []
            for name in LATENCIES:
                values[f"{name}_hist"] = Histogram.from_pairs(values[f"{name}_hist"])
            cells[key] = plain(values)
    return {key: values for key, values in cells.items() if values}


def plain(values: Row) -> Row:
    """Without what is zero, null or empty; where null and zero are told apart, without nulls alone."""
    kept = {name: value for name, value in values.items() if value or (value == 0.0 and name in MAYBE)}
    return {name: value for name, value in kept.items() if not isinstance(value, Histogram) or value.count}


def tpot_s(r: Row) -> float | None:
    """As given, or by its definition where that can be told."""
    if r["tpot_s"] is not None or None in (r["output_tokens"], r["e2e_s"], r["ttft_s"]) or r["output_tokens"] < 2:
        return r["tpot_s"]
    return max(r["e2e_s"] - r["ttft_s"], 0.0) / (r["output_tokens"] - 1)


def oracle(
    given_rows: Sequence[Row], targets: Mapping[tuple[str, str], tuple[float, float]], default: tuple[float, float]
) -> dict[Cell, Row]:
    """What the windows of these rows must say. `targets`: (pool, tenant) -> (TTFT, TPOT) in s, or `default`."""
    cells: dict[Cell, Row] = {}
    for r in given_rows:
        start_s = int(r["at_s"]) // 10 * 10
        tenant, kind = r["tenant"] or "unknown", r["class"] or "default"
        cell = cells.setdefault((r["pool"], start_s, tenant, kind, r["model"], r["priority"]), {})

        def add(name: str, value: float, cell: Row = cell) -> None:
            cell[name] = cell.get(name, 0) + value

        if r["event"] == "arrival":
            add("arrivals", 1)
            add("retries", (r["attempt"] or 1) > 1)
            if r["input_tokens"] is not None:
                add("arrival_input_tokens", r["input_tokens"])
            continue
        add("ends", 1)
        add("enriched", r.get("enriched", False))
        status, output = r["status"], r["output_tokens"] or 0.0
        for name, members in (
            ("ok", ["ok"]),
            ("errors", ["error", "timeout", "cancelled"]),
            ("timeouts", ["timeout"]),
            ("cancelled", ["cancelled"]),
            ("rejected", ["rejected"]),
        ):
            add(name, status in members)
        for name in ("input_tokens", "cached_tokens", "output_tokens", *UNITS):
            if r[name] is not None:
                add(name, round(r[name] * 2**20) / 2**20)
        measured = r if r.get("settled") else {**r, "tpot_s": tpot_s(r)}  # no difference of two clocks
        for name in LATENCIES:
            if measured[name] is not None:
                add(f"{name}_sum", round(measured[name] * 2**20) / 2**20)
                add(f"{name[:-2]}_count", 1)
                cell.setdefault(f"{name}_hist", []).append(measured[name])
        judged, good = judgement(measured, *targets.get((r["pool"], tenant), default))
        add("slo_judged", judged)
        add("slo_good", good)
        add("good_output_tokens", output if good else 0.0)
    for cell in cells.values():
        for name in LATENCIES:
            if f"{name}_hist" in cell:
                cell[f"{name}_hist"] = Histogram.of(np.array(cell[f"{name}_hist"]))
    return {key: left for key, values in cells.items() if (left := plain(values))}


def judgement(r: Row, ttft_s: float, tpot_s: float) -> tuple[bool, bool]:
    """(judged, good) of an end."""
    if r["status"] in ("error", "timeout", "rejected"):
        return True, False
    if r["status"] != "ok" or r["ttft_s"] is None:
        return False, False
    if r["output_tokens"] is not None and r["output_tokens"] < 2:
        return True, r["ttft_s"] <= ttft_s
    if r["output_tokens"] is not None and r["tpot_s"] is None:
        return False, False
    return True, r["ttft_s"] <= ttft_s and (r["tpot_s"] is None or r["tpot_s"] <= tpot_s)
