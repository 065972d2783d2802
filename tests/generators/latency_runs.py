"""Runs of the generator through the pool fold, and how often the injected cause is named first."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from schemas.log import CONTENT_ARROW, LogRecord
from schemas.signals import INTERFERENCE_WINDOWS, WindowName
from tests.generators.latency import CAUSES, START_S, TAIL_S, WINDOW_S, Window, World, make, windows
from tests.models.pool.signals import T0, at, engine_window, pool_config, pool_fold, request_window

AFTER_S = 40.0
"""What is said so soon after a cause ended is still of it: requests tell when they end."""


class Run(NamedTuple):
    """One run and what was said of it."""

    causes: tuple[str, ...]
    seed: int
    world: World
    findings: list[dict[str, Any]]

    @property
    def of_it(self) -> list[dict[str, Any]]:
        """Findings of kind latency that were said while the cause was there, openings and updates."""
        first, last = T0 + START_S, T0 + START_S + self.world.length_s + AFTER_S
        return [body for body in self.findings if body["open"] and first <= body["at_s"] <= last]

    @property
    def ranking(self) -> list[str]:
        """Causes by their mean share over what was said; empty: nothing was said."""
        total = dict.fromkeys((*CAUSES, "unexplained"), 0.0)
        for body in self.of_it:
            for cause, share in body["evidence"]["shares"].items():
                total[cause] += share
        return sorted(total, key=lambda cause: -total[cause]) if self.of_it else []

    @property
    def unexplained(self) -> float:
        """Mean share that no cause explains."""
        said = self.of_it
        return sum(body["evidence"]["shares"]["unexplained"] for body in said) / len(said)


def records(world: World) -> Iterator[LogRecord]:
    """The pool's log: closed windows 2 s after their end, and ticks."""
    yield pool_config(T0, capacity_rps=1000.0, mode="observe")
    for version, window in enumerate(windows(world), 1):
        start, end = T0 + window.start_s, T0 + window.start_s + WINDOW_S
        yield engine_window(end + 2.2, start, version, window.engines)
        yield request_window(end + 2.3, start, version, [window.requests])
        if window.interference:
            yield interference_window(end + 2.4, start, version, window)
        yield at(end + 3.0, "fleetloop.tick", b"")


def interference_window(second: float, start_s: int, version: int, window: Window) -> LogRecord:
    """What level 1 says of replicas that share a GPU."""
    data = {name: [row.get(name) for row in window.interference] for name in INTERFERENCE_WINDOWS.columns}
    name = WindowName("chat", "node.samples/0", start_s, version, second, True)
    value = INTERFERENCE_WINDOWS.encode(data, name.meta())
    return at(second, INTERFERENCE_WINDOWS.type, value, "chat", CONTENT_ARROW)


def run(seed: int, causes: Sequence[str], tail_s: int = TAIL_S, misled: bool = False) -> Run:
    """One run."""
    world, fold = make(seed, causes, tail_s, misled), pool_fold()
    log = [record._replace(offset=offset) for offset, record in enumerate(records(world))]
    bodies = (json.loads(result.value) for result in fold.apply(log) if result.topic == "findings")
    return Run(tuple(causes), seed, world, [body for body in bodies if body["finding"] == "latency"])


def score(runs: Iterable[Run]) -> dict[str, Any]:
    """How often the one cause was named first (of two: both among the first two), over the runs with a finding."""
    seen = named = quiet = 0
    unexplained, firsts, said, silent = 0.0, 0, 0, []
    wrong: list[str] = []
    for one in runs:
        before = [body for body in one.findings if body["open"] and body["at_s"] < T0 + START_S]
        quiet += len(before)
        ranking = one.ranking
        if not ranking:
            silent.append(one.seed)
            continue
        seen += 1
        wanted = set(one.causes)
        right = set(ranking[: len(wanted)]) == wanted
        named += right
        if not right:
            wrong.append(f"{one.seed}: {' '.join(ranking[:3])}")
        unexplained += one.unexplained
        for body in one.of_it:
            said += 1
            firsts += set(body["evidence"]["causes"][: len(wanted)]) == wanted
    return {
        "runs": seen,
        "named": named / seen if seen else None,
        "named_in_each_finding": firsts / said if said else None,
        "unexplained": unexplained / seen if seen else None,
        "silent": silent,
        "before_the_cause": quiet,
        "wrong": wrong,
    }


def evaluate(seeds: Sequence[int], pairs: bool, misled: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Every cause alone and every pair, over the seeds; `single` and `pair`: shares over all runs with a finding.

    `misled`: a little of every other cause comes at the same time.
    """
    chosen = [(cause,) for cause in CAUSES]
    report: dict[str, Any] = {"seeds": list(seeds), "misled": misled}
    for what, name, sets in (("causes", "single", chosen), ("pairs", "pair", list(combinations(CAUSES, 2)))):
        if name == "pair" and not pairs:
            continue
        report[what], runs = {}, []
        for causes in sets:
            some = [run(seed, causes, misled=misled) for seed in seeds]
            runs += some
            report[what]["+".join(causes)] = found = score(some)
            say(f"{'+'.join(causes)}: named in {found['named']} of {found['runs']} runs")
        report[name] = score(runs)["named"]
    return report
