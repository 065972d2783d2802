"""Reader of recorded traces: CSV with TIMESTAMP, ContextTokens, GeneratedTokens (Azure LLM inference, 2023).

`scale` K superposes K copies, each request moved by up to +/- jitter so that copies do not coincide; the
fraction of K is a thinned copy. Bursts of the copies stay together: no pooling gain, which is the harder case.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np

from schemas.errors import InvalidInput

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
ROWS_MAX = 50_000_000
"""Requests after scaling; more would not fit into memory."""


class Trace(NamedTuple):
    """Requests in order of time."""

    at_s: np.ndarray
    """float64, s since the first request of the file."""
    input_tokens: np.ndarray
    """int64."""
    output_tokens: np.ndarray
    """int64."""

    @property
    def duration_s(self) -> float:
        """From 0 to the last request."""
        return float(self.at_s[-1]) if len(self.at_s) else 0.0


def read_trace(path: str | Path) -> Trace:
    """A trace file. Raises InvalidInput that names line, value and remedy."""
    times: list[str] = []
    sizes: list[tuple[int, int]] = []
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file)
            header = next(rows, [])
            if tuple(header[:3]) != COLUMNS:
                raise InvalidInput("header", ",".join(header), f"the first line must be {','.join(COLUMNS)}")
            for line, row in enumerate(rows, 2):
                try:
                    stamp, context, generated = row[:3]
                    sizes.append((int(context), int(generated)))
                    times.append(stamp.strip())
                except ValueError:
                    raise InvalidInput(f"line {line}", row, "send a time and two whole numbers") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidInput("trace", str(path), f"name a readable CSV file ({error})") from None
    if not times:
        raise InvalidInput("trace", str(path), "the file has no requests")
    try:
        stamps = np.array(times, dtype="datetime64[ns]").astype(np.int64)
    except ValueError as error:
        raise InvalidInput("TIMESTAMP", str(path), f"write times as 2023-11-16 18:15:46.680 ({error})") from None
    at_s = (stamps - stamps.min()) / 1e9
    order = np.argsort(at_s, kind="stable")
    tokens = np.maximum(np.array(sizes, np.int64), 1)  # an engine reads and gives at least one
    return Trace(at_s[order], tokens[order, 0], tokens[order, 1])


def scale_trace(trace: Trace, scale: float, jitter_s: float, seed: int, duration_s: float | None = None) -> Trace:
    """`scale` copies of a trace; the first keeps its times, the others are moved by up to +/- `jitter_s`."""
    if scale * len(trace.at_s) > ROWS_MAX:
        raise InvalidInput("scale", scale, f"at most {ROWS_MAX / len(trace.at_s):.0f} for this trace")
    rng = np.random.default_rng([seed, 1])
    n = len(trace.at_s)
    parts_t: list[np.ndarray] = []
    parts_i: list[np.ndarray] = []
    whole = int(scale)
    for copy in range(whole + 1):
        chosen = np.arange(n) if copy < whole else np.flatnonzero(rng.random(n) < scale - whole)
        at = trace.at_s[chosen]
        if copy > 0:
            at = np.abs(at + rng.uniform(-jitter_s, jitter_s, len(at)))  # what falls before 0 is mirrored
        parts_t.append(at)
        parts_i.append(chosen)
    at_s, index = np.concatenate(parts_t), np.concatenate(parts_i)
    if duration_s is not None:
        keep = at_s < duration_s
        at_s, index = at_s[keep], index[keep]
    order = np.argsort(at_s, kind="stable")
    index = index[order]
    return Trace(at_s[order], trace.input_tokens[index], trace.output_tokens[index])
