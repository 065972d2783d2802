"""A real vLLM without a GPU, under changing load, given up on, asked again and killed: what Fleetloop reports of it
agrees with what its clients measured.

Exporter and intake run in this process with a producer that keeps what it is given; the records go through the node
fold. Tolerances:

- counters are read once a second, so a window holds what happened between the scrapes inside it, and at most what
  happened between those around it;
- a client sees a token after the engine counted it: LAG_S, one period of the scraper, for HTTP, an event loop and two
  busy cores; vLLM's own spans are held against the same bound;
- what ended between the last scrape before the kill and the first one after it may be missing;
- of a quantile only its bucket is known.
"""

from __future__ import annotations

import asyncio
import math
import socket
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from exporters.engine_options import EngineOptions
from exporters.engines import run_engines
from exporters.intake import Intake
from exporters.intake_options import IntakeOptions
from models.windows import WINDOW_S
from schemas.config import Deployment
from schemas.log import LogRecord
from schemas.node import ENGINE_HISTOGRAMS, ENGINE_SAMPLES
from schemas.requests import REQUEST_ROWS
from streams.settings import Settings
from streams.topics import partition_counts
from tests.exporters.conftest import Producer
from tests.models.node.recorded import Row, between, bucket, folded, in_system, quantile, summed
from tests.real_engine.environment import Environment
from tests.real_engine.serving import BLOCK_TOKENS, BLOCKS, SEATS, Clients, Engine, Seen

LAG_S = 1.0
DEAD_WITHIN_S = 3.0
ANSWER_S = 1.0


@dataclass
class Outcome:
    """What happened, and what was reported."""

    seen: list[Seen]
    killed: float
    healthy: float
    samples: list[Row]
    windows: list[Row]
    ends: dict[str, list[Row]]
    """Part of a span's request id that is ours -> rows of its end."""

    @property
    def ok(self) -> list[Seen]:
        return [one for one in self.seen if one.outcome == "ok"]

    @property
    def started(self) -> list[Seen]:
        return [one for one in self.seen if not math.isnan(one.first)]

    @property
    def scrapes(self) -> list[float]:
        return [sample["at_s"] for sample in self.samples if sample["status"] == "ok"]

    @property
    def told(self) -> float:
        """The last scrape before the kill."""
        return max(at for at in self.scrapes if at < self.killed)

    @property
    def told_again(self) -> float:
        """The first scrape of the new process."""
        return min(at for at in self.scrapes if at > self.killed)

    def untold(self, at: float) -> bool:
        """Whether what happened at a time may be in no window: the old process never said it; or the new one had it
        counted when it was first read, which is spread over the time since its start, of which windows may be final."""
        return self.told - LAG_S < at <= self.told_again + LAG_S


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


async def _load(clients: Clients, engine: Engine) -> tuple[float, float]:
    """Changing load, aborts, refusals, a kill with clients that ask again. When it was killed and healthy again."""
    pick = clients.random

    def plain() -> tuple[list[int], int]:
        return clients.prompt(pick.randrange(20, 400)), pick.randrange(5, 80)

    def shared() -> tuple[list[int], int]:
        return clients.prompt(pick.randrange(290, 500), shared=256), pick.randrange(20, 90)

    await clients.load(2, 10, lambda: clients.ask(*plain()))
    await clients.load(16, 14, lambda: clients.ask(*shared()))
    await asyncio.gather(*(clients.ask(clients.prompt(200), 300, give_up_after=n) for n in (1, 5, 20, 30, 40, 60)))
    await asyncio.gather(*(clients.ask(clients.prompt(2200), 10) for _ in range(3)))
    await asyncio.sleep(3)
    asking = asyncio.create_task(clients.load(4, 30, lambda: clients.until_answered(*plain())))
    await asyncio.sleep(10)
    killed = await engine.kill()
    await asyncio.sleep(DEAD_WITHIN_S + 1)
    await engine.start()
    healthy = time.time()
    await asking
    await clients.load(4, 12, lambda: clients.ask(*plain()))
    return killed, healthy


@pytest.fixture(scope="module")
def outcome(environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The run, once for all tests here."""
    patch = pytest.MonkeyPatch()
    patch.setattr("exporters.edge.EdgeProducer", Producer)
    Producer.made = []
    try:
        return asyncio.run(_run(environment, tmp_path_factory.mktemp("vllm") / "vllm.log"))
    finally:
        patch.undo()


async def _run(environment: Environment, log: Path) -> Outcome:
    settings = Settings()
    deployment = Deployment(origin_ms=1_764_000_000_000, speed=1.0, local=True, partitions=partition_counts(True))
    intake = Intake(settings, deployment, IntakeOptions.of(port=_port(), default_pool="chat"))
    engine = Engine(environment, _port(), f"http://127.0.0.1:{intake.options.port}/v1/traces", log)
    options = EngineOptions.of(targets=[f"r1={engine.url}/metrics"], node="n1")
    stop = asyncio.Event()
    taking = asyncio.create_task(intake.run(stop))
    await intake.listening.wait()
    try:
        await engine.start()
        scraping = asyncio.create_task(run_engines(settings, deployment, options, stop))
        await asyncio.sleep(3)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
            clients = Clients(engine.url, session)
            killed, healthy = await _load(clients, engine)
        await asyncio.sleep(options.histogram_s + 3)
        stop.set()
        await asyncio.gather(scraping, taking)
    finally:
        stop.set()
        if engine.process is not None:
            await engine.kill()
    sent = [record for producer in Producer.made for record in producer.records]
    return _told(clients.seen, killed, healthy, sent)


def _told(seen: list[Seen], killed: float, healthy: float, sent: list[Any]) -> Outcome:
    samples: list[Row] = []
    records: list[LogRecord] = []
    ends: dict[str, list[Row]] = {}
    for record in sent:
        if record.type in (ENGINE_SAMPLES.type, ENGINE_HISTOGRAMS.type):
            rows = _rows(record.batch())
            samples += rows if record.type == ENGINE_SAMPLES.type else []
            at_ms = round(1000 * max(row["at_s"] for row in rows)) + 100
            records.append(LogRecord(0, at_ms, record.type, record.key, record.value, record.content_type))
        elif record.type == REQUEST_ROWS.type:
            for row in _rows(record.batch()):
                names = [one.id for one in seen if row["event"] == "end" and one.id in row["request_id"]]
                for name in names:
                    ends.setdefault(name, []).append(row)
    windows = folded(records, samples[0]["at_s"], samples[-1]["at_s"])
    return Outcome(seen, killed, healthy, samples, windows, ends)


def _rows(batch: Any) -> list[Row]:
    columns: dict[str, list[Any]] = {name: values.tolist() for name, values in batch.numbers.items()}
    columns |= {name: batch.text(name) for name in batch.codes}
    return [
        {name: None if value != value else value for name, value in zip(columns, cells, strict=True)}
        for cells in zip(*columns.values(), strict=True)
    ]


def _total(outcome: Outcome, column: str) -> float:
    return sum(window.get(column) or 0.0 for window in outcome.windows)


pytestmark = pytest.mark.timeout(1800)


def test_the_load_was_what_it_should_be(outcome: Outcome) -> None:
    """It queued, was given up on, refused, broken off and asked again: else the other tests would show little."""
    kinds = [one.outcome for one in outcome.seen]
    assert kinds.count("ok") > 60
    assert kinds.count("abort") == 6
    assert kinds.count("refused") == 3
    assert kinds.count("broken") > 4
    assert max(sample.get("waiting") or 0 for sample in outcome.samples) > 2


@pytest.mark.parametrize(
    ("column", "amount", "when"),
    [
        ("requests", lambda one: 1, "end"),
        ("e2e_count", lambda one: 1, "end"),
        ("ttft_count", lambda one: 1, "first"),
        ("prompt_tokens", lambda one: one.prompt, "first"),
        ("cached_tokens", lambda one: one.cached, "first"),
    ],
)
def test_totals(outcome: Outcome, column: str, amount: Any, when: str) -> None:
    """Over the run, two processes of the engine and the kill between them: what clients counted, less at most what
    happened between the last scrape of the one and the first of the other."""
    given = outcome.ok if when == "end" else outcome.started
    events = [(getattr(one, when), amount(one)) for one in given]
    most = sum(amount for _, amount in events)
    least = most - sum(amount for at, amount in events if outcome.untold(at))
    # What the client was not told of a request that broke or that it gave up: the prefix that was cached.
    hidden = sum(one.prompt for one in outcome.started if one.outcome != "ok") if column == "cached_tokens" else 0
    # A request that was given up, or broken off, when its answer was ready: the engine has finished it.
    hidden += sum(one.outcome != "ok" for one in outcome.started) if when == "end" else 0
    assert least - 1e-6 <= _total(outcome, column) <= most + hidden + 1e-6


def test_tokens_out(outcome: Outcome) -> None:
    """At least what finished requests got and was told, at most what all could have got."""
    ok = outcome.ok
    least = sum(one.output for one in ok if not one.first <= outcome.killed + LAG_S <= one.end + 2 * LAG_S)
    least -= sum(one.output for one in ok if outcome.untold(one.end))
    most = sum(one.output for one in ok)
    most += sum(one.asked for one in outcome.started if one.outcome != "ok")
    assert least <= _total(outcome, "generation_tokens") <= most + 1e-6


def test_every_window(outcome: Outcome) -> None:
    """Window by window, but for those in which it was down: finished requests, first tokens, prompts."""
    scrapes = outcome.scrapes
    down = [(a, b) for a, b in pairwise(scrapes) if b - a > DEAD_WITHIN_S]
    looked = 0
    for window in outcome.windows:
        start, end = window["start"], window["start"] + WINDOW_S
        if not scrapes[0] <= start <= scrapes[-1] - WINDOW_S or any(start < b and a < end for a, b in down):
            continue
        looked += 1
        for column, events in (
            ("requests", [(one.end, 1.0) for one in outcome.ok]),
            ("ttft_count", [(one.first, 1.0) for one in outcome.started]),
            ("prompt_tokens", [(one.first, float(one.prompt)) for one in outcome.started]),
        ):
            low, high = between(window, scrapes, sorted(events), LAG_S)
            assert low - 1e-6 <= window[column] <= high + 1e-6, (column, start)
    assert looked >= 4


def test_batch_and_queue(outcome: Outcome) -> None:
    """At each scrape running and waiting are together what clients had under way, and no more run than may."""
    served = [one for one in outcome.started if one.outcome in ("ok", "abort")]
    for sample in outcome.samples:
        if sample["status"] != "ok" or abs(sample["at_s"] - outcome.killed) < 3 * LAG_S:
            continue
        low, high = in_system(served, sample["at_s"], LAG_S)
        broken = sum(one.outcome == "broken" for one in outcome.seen)
        assert low <= sample["running"] + sample["waiting"] <= high + broken
        assert sample["running"] <= SEATS
        assert sample["kv_capacity_tokens"] == BLOCKS * BLOCK_TOKENS


@pytest.mark.parametrize("q", [0.5, 0.9])
@pytest.mark.parametrize("metric", ["ttft_s", "tpot_s"])
def test_quantiles(outcome: Outcome, metric: str, q: float) -> None:
    """The clients' quantile lies in the bucket that the windows say, but for the ranks of those never told and the lag
    of clients."""
    if metric == "ttft_s":
        known = [(one.first, one.first - one.arrival) for one in outcome.started]
    else:
        known = [(one.end, (one.end - one.first) / (one.output - 1)) for one in outcome.ok if one.output > 1]
    values = [value for _, value in known]
    low, high = bucket(summed(outcome.windows, f"{metric}_bins"), q)
    # Distributions are read every 5 s: those of the last before the kill were lost with it.
    lost = sum(outcome.killed - 6 - LAG_S < at <= outcome.killed + LAG_S for at, _ in known)
    lost += sum(one.output <= 1 for one in outcome.ok)
    slack = lost / len(values)
    lag = LAG_S if metric == "ttft_s" else LAG_S / 10  # ten tokens at least, in nine of ten requests
    assert low <= quantile(values, min(q + slack, 1.0)) + lag
    assert quantile(values, max(q - slack, 0.0)) <= high + lag


def test_the_kill_is_seen(outcome: Outcome) -> None:
    """One reset, no counter ever falls; dead within three seconds of the last answer, and until it answers again."""
    assert _total(outcome, "resets") == 1
    dead = [sample["at_s"] for sample in outcome.samples if sample["status"] == "dead"]
    after = [at for at in dead if at > outcome.killed]
    assert after
    assert min(after) - outcome.told <= DEAD_WITHIN_S + 0.5
    # Before the kill too, where it did not answer for as long: never while it does.
    for at in dead:
        # What was fetched less than the time-out ago may still be under way.
        assert at - max(scrape for scrape in outcome.scrapes if scrape <= at - ANSWER_S) >= 1.5
    assert _total(outcome, "missed") > 3
    for column in ("requests", "prompt_tokens", "generation_tokens", "ttft_count"):
        assert all((window.get(column) or 0.0) >= 0.0 for window in outcome.windows)


def test_what_vllm_does_not_count(outcome: Outcome) -> None:
    """Aborts and refusals may move no counter of this version: they show as first tokens without an end, and not at
    all."""
    assert _total(outcome, "failed") == 0
    lost = _total(outcome, "ttft_count") - _total(outcome, "requests") - _total(outcome, "aborted")
    # Those that the kill broke off had a first token, told or not; and those that ended just before were never told of.
    broken = sum(one.outcome == "broken" and one.arrival < outcome.killed for one in outcome.seen)
    untold = sum(outcome.untold(one.end) for one in outcome.ok)
    assert 6 - broken - untold - 1e-6 <= lost <= 6 + broken + untold + 1e-6


def test_spans(outcome: Outcome) -> None:
    """Every finished request has an end by its span, once, with the client's tokens and, within the lag, its times;
    those that ended in the second before the kill may have none."""
    safe = [one for one in outcome.ok if not outcome.killed - 3 < one.end < outcome.killed + LAG_S]
    assert len(safe) > 50
    for one in safe:
        (row,) = outcome.ends[one.id]
        assert (row["input_tokens"], row["output_tokens"], row["status"]) == (one.prompt, one.output, "ok")
        assert -0.05 <= (one.first - one.arrival) - row["ttft_s"] <= LAG_S
        assert -0.05 <= (one.end - one.arrival) - row["e2e_s"] <= LAG_S
