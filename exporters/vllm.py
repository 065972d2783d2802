"""What vLLM's `/metrics` mean, over its versions (v0 and v1, with `_total` or without), as columns of ENGINE_SAMPLES.

A name that is absent gives None, never 0. Proved on recorded outputs of vLLM 0.4.3 and 0.32.0 and of
llm-d-inference-sim 0.10.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from schemas.node import ENGINE_SAMPLES


def _counter(name: str) -> tuple[str, ...]:
    return (f"{name}_total", name)


SUMS: dict[str, tuple[str, ...]] = {
    "running": ("vllm:num_requests_running",),
    "waiting": ("vllm:num_requests_waiting",),
    "prompt_tokens": _counter("vllm:prompt_tokens"),
    "cached_tokens": (
        *_counter("vllm:prompt_tokens_cached"),
        *_counter("vllm:prefix_cache_hits"),
        *_counter("vllm:gpu_prefix_cache_hits"),
    ),
    "generation_tokens": _counter("vllm:generation_tokens"),
    "requests": _counter("vllm:request_success"),
    "preemptions": _counter("vllm:num_preemptions"),
    "iterations": ("vllm:iteration_tokens_total_count", "vllm:iteration_tokens_count"),
}
"""Column -> names, best first; summed over series (models, reasons)."""
MEANS: dict[str, tuple[str, ...]] = {"kv_usage_ratio": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")}
"""The same, as the mean over engines: 0 to 1 despite the names."""
HISTOGRAMS: dict[str, tuple[str, ...]] = {
    "ttft": ("vllm:time_to_first_token_seconds",),
    # Per request first: with speculative decoding the inter-token histogram counts messages, not tokens.
    "tpot": (
        "vllm:request_time_per_output_token_seconds",
        "vllm:time_per_output_token_seconds",
        "vllm:inter_token_latency_seconds",
    ),
    "e2e": ("vllm:e2e_request_latency_seconds",),
    "queue": ("vllm:request_queue_time_seconds",),
}
"""`x` -> families, best first: `x_s_sum` and `x_count` come from the same one."""
START = "process_start_time_seconds"
CREATED = ("vllm:generation_tokens_created", "vllm:num_preemptions_created")
"""When the process, or else its counters, began: Unix s."""

WANTED = frozenset(
    {
        START,
        *CREATED,
        *(name for names in (*SUMS.values(), *MEANS.values()) for name in names),
        *(f"{name}_{part}" for names in HISTOGRAMS.values() for name in names for part in ("sum", "count")),
    }
)


class Point(NamedTuple):
    """One series at one scrape."""

    name: str
    engine: str
    """The `engine` label; empty where there is none (v0, proxies)."""
    value: float


def points(text: str) -> list[Point]:
    """The series we know, in order. Raises ValueError where one of those is not valid exposition format.

    Only their lines are parsed: a page's other families may be invalid, and buckets are most of its length.
    """
    lines = "\n".join(_wanted_lines(text))
    out = []
    for family in text_string_to_metric_families(lines + "\n"):
        for sample in family.samples:
            out.append(Point(sample.name, sample.labels.get("engine", ""), sample.value))
    return out


def _wanted_lines(text: str) -> Iterator[str]:
    for line in text.splitlines():
        end = line.find("{")
        name = line[:end] if end >= 0 else line.partition(" ")[0]
        if name in WANTED:
            yield line


class VllmAdapter:
    """Turns scrapes of one endpoint into columns; once it has taken a name for a column it stays with it.

    Families appear on first use in some versions: without that memory a counter would jump from one meaning to
    another. A restart of the engine forgets.
    """

    def __init__(self) -> None:
        self._chosen: dict[str, str] = {}
        self._start: float | None = None
        self.refused: dict[str, int] = {}
        """Column -> values beyond its bounds (NaN, negative): given as None."""

    def columns(self, text: str) -> dict[str, dict[str, float | None]]:
        """Engine label -> columns of ENGINE_SAMPLES (without replica, at_s, status). Empty: no engine is seen.

        Raises ValueError for text that is not valid exposition format where it matters.
        """
        found = points(text)
        start = _start(found)
        if start != self._start:
            self._start, self._chosen = start, {}
        engines = list(dict.fromkeys(p.engine for p in found if p.name != START))
        values = {engine: _by_name(p for p in found if p.engine == engine) for engine in engines}
        names = {p.name for p in found}
        out: dict[str, dict[str, float | None]] = {}
        for engine in engines:
            if any(name.startswith("vllm:") and name not in CREATED for name in values[engine]):
                out[engine] = {"start_s": start, **self._one(values[engine], names)}
        return out

    def _one(self, values: dict[str, list[float]], names: set[str]) -> dict[str, float | None]:
        out: dict[str, float | None] = {}
        for column, options in SUMS.items():
            out[column] = _sum(values.get(self._choose(column, options, names)))
        for column, options in MEANS.items():
            series = values.get(self._choose(column, options, names))
            out[column] = math.fsum(series) / len(series) if series else None
        for column, families in HISTOGRAMS.items():
            family = self._choose(column, families, names, "_count")
            out[f"{column}_s_sum"] = _sum(values.get(f"{family}_sum"))
            out[f"{column}_count"] = _sum(values.get(f"{family}_count"))
        return {column: self._within(column, value) for column, value in out.items()}

    def _choose(self, column: str, options: Iterable[str], names: set[str], suffix: str = "") -> str:
        chosen = self._chosen.get(column)
        if chosen is not None and chosen + suffix in names:
            return chosen
        for name in options:
            if name + suffix in names:
                self._chosen[column] = name
                return name
        return ""

    def _within(self, name: str, value: float | None) -> float | None:
        column = ENGINE_SAMPLES.columns[name]
        if value is None or (column.low <= value <= column.high and math.isfinite(value)):
            return value
        self.refused[name] = self.refused.get(name, 0) + 1
        return None


def together(engines: dict[str, dict[str, float | None]]) -> dict[str, float | None]:
    """Engines behind one port as one replica: sums, and means where a column is a ratio. None where one is unknown."""
    rows = list(engines.values())
    out: dict[str, float | None] = {"start_s": rows[0]["start_s"]}
    for column in rows[0]:
        values = [row[column] for row in rows]
        known = [v for v in values if v is not None]
        if column != "start_s":
            total = sum(known) if len(known) == len(values) else None
            out[column] = total / len(values) if total is not None and column in MEANS else total
    return out


def _by_name(found: Iterable[Point]) -> dict[str, list[float]]:
    out: dict[str, list[float]] = {}
    for point in found:
        out.setdefault(point.name, []).append(point.value)
    return out


def _sum(values: list[float] | None) -> float | None:
    return math.fsum(values) if values else None


def _start(found: list[Point]) -> float | None:
    for wanted in (START, *CREATED):
        values = [p.value for p in found if p.name == wanted and math.isfinite(p.value) and p.value > 0]
        if values:
            return min(values)
    return None
