"""What is carried out, what is not, and what is answered: without a broker and without a network."""

from __future__ import annotations

import asyncio

import pytest

from executors.target import ActionFailed, NewerInForce, TryAgain
from tests.executors.making import FakeTarget, Stage, decision


async def test_a_dispatched_decision_is_carried_out_once() -> None:
    """The same dispatch read again, or already answered in the log, is not acted on again."""
    stage = Stage(FakeTarget())
    stage.acting.note_answer("b".ljust(8, "."), 9)
    for _ in range(2):
        stage.acting.take(decision("a", 7))
        stage.acting.take(decision("b", 9, pool="other"))
        await stage.acting.idle()
    assert stage.target.asked == [("a", False)]
    assert stage.outcomes == [("a", "executed")]


@pytest.mark.parametrize("state", ["superseded", "expired", "executed", "failed"])
async def test_what_is_no_longer_dispatched_is_left_alone(state: str) -> None:
    """A decision in any other state is no order; its epoch still counts against older ones."""
    stage = Stage(FakeTarget())
    stage.acting.take(decision("a", 7, state=state))  # type: ignore[arg-type]
    stage.acting.take(decision("b", 5))
    await stage.acting.idle()
    assert stage.target.asked == []
    assert stage.outcomes == [("b", "skipped")]
    assert "older than 7" in stage.answers[0][2]


async def test_an_older_epoch_of_another_target_or_kind_is_its_own() -> None:
    """Epochs are compared per target and kind only."""
    stage = Stage(FakeTarget())
    stage.acting.take(decision("a", 7))
    stage.acting.take(decision("b", 5, pool="other"))
    await stage.acting.idle()
    assert sorted(stage.outcomes) == [("a", "executed"), ("b", "executed")]


async def test_an_expired_decision_is_skipped_by_the_executors_own_clock() -> None:
    """Past its expiry nothing is done, whatever the log still says."""
    stage = Stage(FakeTarget())
    stage.acting.take(decision("a", expires_s=1.0))
    await stage.acting.idle()
    assert stage.target.asked == []
    assert stage.outcomes == [("a", "skipped")]


async def test_operating_errors_are_tried_again_and_bounded() -> None:
    """TryAgain is tried again up to attempts_max; then it has failed with the last error in words."""
    stage = Stage(FakeTarget(*[TryAgain("busy")] * 3))
    stage.acting.take(decision("a"))
    await stage.acting.idle()
    assert stage.outcomes == [("a", "executed")]
    assert len(stage.target.asked) == 4
    stage = Stage(FakeTarget(*[TryAgain("busy")] * 9))
    stage.acting.take(decision("b"))
    await stage.acting.idle()
    assert stage.answers == [("b", "failed", "gave up: busy")]
    assert len(stage.target.asked) == 4


@pytest.mark.parametrize(
    ("trouble", "outcome"),
    [(ActionFailed("no such pool"), "failed"), (NewerInForce("epoch 9"), "skipped"), (KeyError("bug"), "failed")],
)
async def test_a_refusal_is_not_tried_again(trouble: Exception, outcome: str) -> None:
    """A refusal, a newer epoch at the target and a bug of the target's code are answered at once."""
    stage = Stage(FakeTarget(trouble))
    stage.acting.take(decision("a"))
    await stage.acting.idle()
    assert stage.outcomes == [("a", outcome)]
    assert len(stage.target.asked) == 1


async def test_an_attempt_that_hangs_is_given_up() -> None:
    """An attempt has its own time-out; the action then fails in words."""
    stage = Stage(FakeTarget(hold=True), attempt_timeout_s=0.01)
    stage.acting.take(decision("a"))
    await stage.acting.idle()
    assert stage.outcomes == [("a", "failed")]
    assert "too long" in stage.answers[0][2]


async def test_the_newest_of_a_target_is_what_is_done() -> None:
    """While one is under way, of those that come only the newest is carried out; the others are skipped."""
    target = FakeTarget(TryAgain("busy"), hold=True)
    stage = Stage(target)
    for id, epoch in (("a", 1), ("b", 2), ("c", 3)):
        stage.acting.take(decision(id, epoch))
        await asyncio.sleep(0)
    target.go.set()
    await stage.acting.idle()
    assert stage.outcomes == [("b", "skipped"), ("a", "skipped"), ("c", "executed")]
    assert [id for id, _ in target.asked] == ["a", "c"]


async def test_a_withdrawn_decision_is_neither_tried_again_nor_answered() -> None:
    """Once the log says that it is no longer dispatched, its attempts end and nothing is said."""
    target = FakeTarget(TryAgain("busy"), hold=True)
    stage = Stage(target)
    stage.acting.take(decision("a", 1))
    await asyncio.sleep(0)
    stage.acting.take(decision("a", 1, state="failed", version=2))
    target.go.set()
    await stage.acting.idle()
    assert stage.answers == []
    assert len(target.asked) == 1


async def test_one_target_that_hangs_does_not_hold_up_another() -> None:
    """Targets and kinds are acted on side by side."""
    target = FakeTarget(hold=True)
    stage = Stage(target)
    stage.acting.take(decision("a", 1))
    stage.acting.take(decision("b", 2, pool="other"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert sorted(id for id, _ in target.asked) == ["a", "b"]
    await stage.acting.stop(0)
    assert stage.answers == []


async def test_dry_run_reaches_the_target() -> None:
    """The target is told that nothing shall change."""
    stage = Stage(FakeTarget(), dry_run=True)
    stage.acting.take(decision("a"))
    await stage.acting.idle()
    assert stage.target.asked == [("a", True)]


async def test_what_is_remembered_is_bounded() -> None:
    """Epochs and answers beyond their bounds are forgotten, oldest first, and counted."""
    stage = Stage(FakeTarget(), slots_max=2, answered_max=3)
    for i in range(6):
        stage.acting.take(decision(f"d{i}", i, pool=f"p{i}"))
    await stage.acting.idle()
    assert len(stage.acting._in_force) == 2
    assert len(stage.acting._taken) == 3
    found = {
        sample.labels["what"]: sample.value
        for metric in stage.acting.metrics.collect()
        for sample in metric.samples
        if sample.name == "fleetloop_executor_overflow_total"
    }
    assert found == {"slots": 4.0, "answers": 3.0}
