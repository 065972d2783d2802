"""An executor on a real broker: acts on what is dispatched, once, also over a restart, and says so in the log."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from executors.acting import Answer
from executors.runtime import Executor, result_of
from executors.settings import ExecutorOptions, load_options
from schemas.base import decode
from schemas.config import Deployment
from schemas.decisions import Decision, ExecutorResult
from schemas.errors import SettingsError
from schemas.log import TICK
from schemas.topics import DECISION_EVENTS, DECISIONS, ce_type
from streams.broker import LocalBroker
from streams.deployment import ensure_deployment
from streams.producer import send_once
from streams.reader import header, read_to_end
from streams.settings import Settings, load_settings
from tests.executors.making import QUICK, FakeTarget, decision

WITHIN_S = 30.0


@pytest.fixture
async def place(broker: LocalBroker, topic_prefix: str) -> tuple[Settings, Deployment]:
    """A deployment in whose decision.events the epochs that tests use lie in the past."""
    settings = load_settings(bootstrap_servers=broker.bootstrap_servers, topic_prefix=topic_prefix)
    deployment = await ensure_deployment(settings, local=True)
    for offset in range(10):
        await send_once(settings, DECISION_EVENTS, key="fleet", value=b"", type=TICK, id=f"tick/{offset}")
    return settings, deployment


async def until(true: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not await true():  # noqa: ASYNC110 - what is waited for is on a broker
            await asyncio.sleep(0.05)


async def publish(settings: Settings, item: Decision) -> None:
    await send_once(
        settings,
        DECISIONS,
        key=item.id,
        value=item.encode(),
        type=ce_type(Decision.kind),
        id=f"{item.id}@{item.version}",
    )


async def results(settings: Settings) -> list[ExecutorResult]:
    return [
        decode(ExecutorResult, record.value)
        async for record in read_to_end(settings, DECISION_EVENTS)
        if header(record, "ce_type") == ce_type(ExecutorResult.kind)
    ]


async def run_until(
    place: tuple[Settings, Deployment], target: FakeTarget, answers: int, dry_run: bool = False
) -> None:
    """Runs an executor until the log has so many results."""
    stop = asyncio.Event()
    running = asyncio.create_task(Executor(*place, target, ExecutorOptions(**QUICK), dry_run).run(stop))

    async def enough() -> bool:
        return running.done() or len(await results(place[0])) >= answers

    await until(enough)
    stop.set()
    await running


async def test_what_is_dispatched_is_done_once_also_over_a_restart(place: tuple[Settings, Deployment]) -> None:
    """Acted on and answered; a second executor neither repeats it nor falls back behind its epoch."""
    settings, _ = place
    await publish(settings, decision("a", 7))
    await publish(settings, decision("x", 8, executor="another"))
    first = FakeTarget()
    await run_until(place, first, 1)
    assert first.asked == [("a", False)]
    [result] = await results(settings)
    assert (result.decision_id, result.epoch, result.outcome) == ("a.......", 7, "executed")
    assert result.id == "a......./7/executed"

    await publish(settings, decision("b", 5))
    await publish(settings, decision("c", 6, pool="other"))
    second = FakeTarget()
    await run_until(place, second, 3)
    assert second.asked == [("c", False)]
    outcomes = {r.decision_id[0]: r.outcome for r in await results(settings)}
    assert outcomes == {"a": "executed", "b": "skipped", "c": "executed"}


async def test_what_was_not_answered_before_a_crash_is_done_after_it(place: tuple[Settings, Deployment]) -> None:
    """Only an answer in the log ends a dispatch: one that was under way at a crash is acted on again."""
    settings, _ = place
    await publish(settings, decision("a", 7))
    hung = FakeTarget(hold=True)
    crashed = asyncio.create_task(
        Executor(*place, hung, ExecutorOptions(**(QUICK | {"stop_within_s": 0}))).run(asyncio.Event())
    )
    await asyncio.wait_for(hung.entered.wait(), WITHIN_S)
    crashed.cancel()
    await asyncio.gather(crashed, return_exceptions=True)
    assert await results(settings) == []
    target = FakeTarget()
    await run_until(place, target, 1)
    assert target.asked == [("a", False)]


async def test_a_dry_run_says_so_in_the_log(place: tuple[Settings, Deployment]) -> None:
    """The result is marked, and an executor that acts for real does it afterwards."""
    settings, _ = place
    await publish(settings, decision("a", 7))
    await run_until(place, FakeTarget(), 1, dry_run=True)
    assert [r.dry_run for r in await results(settings)] == [True]
    target = FakeTarget()
    await run_until(place, target, 2)
    assert target.asked == [("a", False)]


def test_a_result_fits_its_bounds() -> None:
    """Long words are cut; the id names decision, epoch and outcome."""
    made = result_of(decision("a", 7), "simulator", Answer("failed", "x" * 9999), -1.0, False)
    assert (len(made.detail), made.took_s, made.id) == (2000, 0.0, "a......./7/failed")


def test_a_wrong_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error has variable and value."""
    monkeypatch.setenv("FLEETLOOP_EXECUTOR_ATTEMPTS_MAX", "none")
    with pytest.raises(SettingsError, match="FLEETLOOP_EXECUTOR_ATTEMPTS_MAX: 'none'"):
        load_options()
