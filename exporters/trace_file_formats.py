"""Published traces of LLM requests, each format as a stream of requests in order of time.

Sources: Azure LLM inference traces 2023 and 2024 (Azure/AzurePublicDataset); BurstGPT (HPMLL/BurstGPT) and its replays
against vLLM (liao4s/BurstGPT_test); Mooncake (kvcache-ai/Mooncake); ServeGen (alibaba/ServeGen).
"""

from __future__ import annotations

import csv
import gzip
import heapq
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TextIO, cast

import numpy as np

from schemas.errors import SettingsError

Refuse = Callable[[int, str], None]
"""Is told of lines that cannot be taken: their number in the file, counted from 1, and why. Never of their text."""
AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BURSTGPT = ("Timestamp", "Model", "Request tokens", "Response tokens")
SERVEGEN = ("client", "t_s", "rate_rps", "cv", "pattern", "p1", "p2")
REPLAY = ("record_time", "first_chunk_time", "total_chunk_time", "in_len")
WINDOW_S = 600.0
"""Of ServeGen's rates."""
BIN_REQUESTS_MAX = 5_000_000
SNIFF_BYTES = 64 * 1024


class Request(NamedTuple):
    """One request of a trace; None: the trace does not say. Times in s, `at_s` from wherever the trace counts."""

    at_s: float
    input_tokens: float | None = None
    output_tokens: float | None = None
    ttft_s: float | None = None
    e2e_s: float | None = None
    tenant: str | None = None
    model: str | None = None
    request_class: str | None = None
    status: str = "ok"


def opened(path: Path) -> TextIO:
    """The file's text, decompressed where it ends on .gz. What is no text becomes characters that are no numbers."""
    if path.suffix.lower() == ".gz":
        return cast(TextIO, gzip.open(path, "rt", encoding="utf-8-sig", errors="replace", newline=""))
    return path.open(encoding="utf-8-sig", errors="replace", newline="")


def format_of(path: Path) -> str:
    """The format by the file's beginning: a key of FORMATS, or `jsonl` for rows of our own."""
    try:
        with opened(path) as file:
            start = file.read(SNIFF_BYTES)
    except (OSError, EOFError) as error:
        raise SettingsError(f"FLEETLOOP_TRACE_FILE: {path}: {error}") from None
    first = start.lstrip().split("\n", 1)[0]
    header = tuple(name.strip() for name in first.split(","))
    if header[:3] == AZURE:
        return "azure"
    if set(BURSTGPT) <= set(header):
        return "burstgpt"
    if header == SERVEGEN or (len(header) == len(SERVEGEN) - 1 and header[3] in ("Gamma", "Weibull", "")):
        return "servegen"
    if path.name.lower().removesuffix(".gz").endswith(".csv"):
        raise SettingsError(
            f"{path}: the header is {list(header)[:10]}, needed is {','.join(AZURE)}, {','.join(BURSTGPT)} or "
            f"{','.join(SERVEGEN)}"
        )
    if '"total_chunk_time"' in first:
        return "burstgpt-replay"
    return "mooncake" if '"input_length"' in first else "jsonl"


def azure(path: Path, refuse: Refuse, seed: int) -> Iterator[Request]:
    """Azure 2023 and 2024: TIMESTAMP (UTC), ContextTokens, GeneratedTokens."""
    for number, row in _csv(path, AZURE):
        try:
            at = datetime.fromisoformat(row["TIMESTAMP"])
            at = at if at.tzinfo else at.replace(tzinfo=UTC)
            yield Request(at.timestamp(), _number(row["ContextTokens"]), _number(row["GeneratedTokens"]))
        except (TypeError, ValueError):
            refuse(number, "a time and two numbers are needed")


def burstgpt(path: Path, refuse: Refuse, seed: int) -> Iterator[Request]:
    """BurstGPT: Timestamp (s), Model, Request and Response tokens (0: it failed), Log Type; newer: Elapsed time (s)."""
    for number, row in _csv(path, BURSTGPT):
        try:
            output = _number(row["Response tokens"])
            elapsed = row.get("Elapsed time")
            yield Request(
                _number(row["Timestamp"]),
                _number(row["Request tokens"]),
                output,
                e2e_s=_number(elapsed) if elapsed else None,
                model=row["Model"] or None,
                request_class="interactive" if row.get("Log Type") == "Conversation log" else None,
                status="ok" if output else "error",
            )
        except (TypeError, ValueError):
            refuse(number, "a time and two numbers are needed")


def burstgpt_replay(path: Path, refuse: Refuse, seed: int) -> Iterator[Request]:
    """Requests of BurstGPT as a real vLLM served them: `record_time` is when one ended; `out_len` is not tokens."""
    with opened(path) as file:
        try:
            found = json.load(file)
        except (ValueError, RecursionError):
            found = None
    if not isinstance(found, dict):
        raise SettingsError(f"{path}: an object of requests by number is needed")
    requests: list[Request] = []
    for number, one in enumerate(found.values(), 1):
        try:
            ended, first, whole, tokens = (_number(one[name]) for name in REPLAY)
            requests.append(Request(ended - whole, tokens, ttft_s=first, e2e_s=whole))
        except (TypeError, ValueError, KeyError):
            refuse(number, f"{', '.join(REPLAY)} are needed as numbers")
    yield from sorted(requests, key=lambda one: one.at_s)


def mooncake(path: Path, refuse: Refuse, seed: int) -> Iterator[Request]:
    """Mooncake: a JSON object a line, timestamp (ms), input_length, output_length."""
    with opened(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                yield Request(
                    _number(row["timestamp"]) / 1000, _number(row["input_length"]), _number(row["output_length"])
                )
            except (ValueError, TypeError, KeyError, RecursionError):
                refuse(number, "timestamp, input_length and output_length are needed as numbers")


def servegen(path: Path, refuse: Refuse, seed: int) -> Iterator[Request]:
    """ServeGen's rates by client in windows of 600 s, as arrivals: the window's count, its gaps of the fitted shape.

    Gaps are drawn from the Gamma or Weibull distribution of shape `p1` and stretched so that the window's requests fill
    it: `rate_rps` holds exactly, which draws of the heavy tails that occur here (cv of 40) would not. A client's own
    file, without header, is one client; every client is a tenant.
    """
    windows: dict[float, list[tuple[str, float, str, float]]] = {}
    for number, row in _servegen_rows(path):
        try:
            at, rate, shape = _number(row["t_s"]), _number(row["rate_rps"]), _number(row["p1"])
            if rate > 0 and row["pattern"] not in ("Gamma", "Weibull"):
                raise ValueError
        except (TypeError, ValueError, KeyError):
            refuse(number, f"{','.join(SERVEGEN)} are needed, the pattern Gamma or Weibull")
            continue
        if rate > 0 and shape > 0:
            windows.setdefault(at, []).append((f"client-{row['client']}", rate, row["pattern"], shape))
        else:
            windows.setdefault(at, [])
    for at in sorted(windows):
        rng = np.random.default_rng([seed, int(at)])
        arrivals: list[tuple[float, str]] = []
        for client, rate, pattern, shape in windows[at]:
            arrivals += [(at + offset, client) for offset in _offsets(rng, rate, pattern, shape)]
            if len(arrivals) > BIN_REQUESTS_MAX:
                raise SettingsError(f"{path}: more than {BIN_REQUESTS_MAX} requests in the window at {at:.0f} s")
        for at_s, client in sorted(arrivals):
            yield Request(at_s, tenant=client)


def _offsets(rng: np.random.Generator, rate: float, pattern: str, shape: float) -> list[float]:
    count = math.floor(rate * WINDOW_S + rng.random())
    if not 0 < count <= BIN_REQUESTS_MAX:
        return [0.0] * min(count, BIN_REQUESTS_MAX + 1)
    gaps = rng.gamma(shape, 1.0, count + 1) if pattern == "Gamma" else rng.weibull(shape, count + 1)
    whole = gaps.sum()
    if not whole > 0:  # a shape so small that every gap is 0 in floating point
        return [0.0] * count
    return cast("list[float]", (np.cumsum(gaps)[:count] / whole * WINDOW_S).tolist())


def _servegen_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with opened(path) as lines:
        first = lines.readline()
        if tuple(name.strip() for name in first.split(",")) != SERVEGEN:
            client = path.name.split(".")[0].removeprefix("chunk-").removesuffix("-trace")
            for number, row in enumerate(csv.reader(_chained(first, lines)), 1):
                yield number, dict(zip(SERVEGEN, [client, *row], strict=False))
            return
        yield from enumerate(csv.DictReader(lines, fieldnames=SERVEGEN), 2)


def _chained(first: str, rest: Iterable[str]) -> Iterator[str]:
    yield first
    yield from rest


def _csv(path: Path, needed: tuple[str, ...]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line number, row) of a file with a header. Raises SettingsError for one that is another."""
    with opened(path) as lines:
        try:
            rows = csv.DictReader(lines)
            if not set(needed) <= set(rows.fieldnames or ()):
                raise SettingsError(f"{path}: the header is {rows.fieldnames}, needed is {','.join(needed)}")
            yield from enumerate(rows, 2)
        except csv.Error as error:
            raise SettingsError(f"{path}: no CSV ({error}): needed is {','.join(needed)}") from None


def _number(value: Any) -> float:
    """A finite number from 0. Raises ValueError, TypeError."""
    if isinstance(value, bool):
        raise TypeError
    found = float(value)
    if not 0 <= found < 1e15:
        raise ValueError
    return found


FORMATS: dict[str, Callable[[Path, Refuse, int], Iterator[Request]]] = {
    "azure": azure,
    "burstgpt": burstgpt,
    "burstgpt-replay": burstgpt_replay,
    "mooncake": mooncake,
    "servegen": servegen,
}
"""Name -> reader(file, refuse, seed)."""


def scaled(requests: Iterable[Request], scale: float, jitter_s: float, seed: int) -> Iterator[Request]:
    """`scale` copies of each request, in order of time: the first at its own time, so that the gaps stay.

    Others come up to `jitter_s` later, so that copies do not coincide; the fraction of `scale` is a thinned copy.
    """
    chance = random.Random(seed)
    later: list[tuple[float, int, Request]] = []
    count = 0
    for request in requests:
        while later and later[0][0] <= request.at_s:
            yield heapq.heappop(later)[2]
        copies = int(scale) + (chance.random() < scale % 1)
        if copies:
            yield request
        for _ in range(copies - 1):
            count += 1
            moved = request._replace(at_s=request.at_s + chance.uniform(0, jitter_s))
            heapq.heappush(later, (moved.at_s, count, moved))
    while later:
        yield heapq.heappop(later)[2]
