"""What a run came to, from its result records."""

from __future__ import annotations

import random

import pytest

from schemas.decisions import Decision, RerouteAction, ScaleAction, Transition
from schemas.log import LogRecord
from schemas.topics import COST_WINDOWS, DECISIONS, POOL_SIGNALS
from tests.views.feed import ORIGIN_S, POOLS, SHARES, load, record, records
from tests.views.test_rows import cost, request_window
from views.tally import KEEP_S, Tally, percentile, step_to_action_s

FEED = records(400)


def tally_of(items: list[tuple[str, LogRecord]]) -> Tally:
    tally = Tally()
    for topic, item in items:
        tally.apply(topic, item)
    return tally


def test_requests_add_up() -> None:
    """Over closed windows, requests windowed and requests billed are both what was sent."""
    summary = tally_of([*FEED, *records(0)]).summary()
    closed = range(2, 400, 10)
    sent = sum(round(load(p, t) * 10 * s) for p in POOLS for t in closed for s in SHARES)
    assert summary["requests"]["billed"] == sent
    assert summary["requests"]["dead_letters"] == 2
    # the last window is still open: an early look at it does not count yet
    assert summary["requests"]["windowed"] == sent


@pytest.mark.parametrize("seed", range(3))
def test_order_and_repetition_change_nothing(seed: int) -> None:
    """The same records in any order and with repetitions give the same totals."""
    items = FEED + FEED[:500]
    random.Random(seed).shuffle(items)
    expected, found = tally_of(FEED).summary(), tally_of(items).summary()
    assert found.pop("records") != expected.pop("records")
    assert found.pop("cost_usd") == pytest.approx(expected.pop("cost_usd"))
    assert found == expected


def test_the_greatest_version_counts() -> None:
    """An early look, its final window and a revision count once, with what was said last."""
    items = [
        request_window(ORIGIN_S, 1, 0, 5, 5),
        request_window(ORIGIN_S, 9, 0, 10, 8),
        request_window(ORIGIN_S, 4, 0, 7, 7),
        request_window(ORIGIN_S, 1, 1, 10, 10),
        cost(ORIGIN_S, 1, 5, 0.1),
        cost(ORIGIN_S, 3, 20, 0.5),
        cost(ORIGIN_S, 3, 20, 0.5, tenant=None),
    ]
    summary = tally_of(items).summary()
    assert summary["requests"] == {"windowed": 20, "billed": 20, "dead_letters": 0}
    assert summary["slo_attainment"] == pytest.approx(18 / 20)
    assert summary["cost_usd"] == pytest.approx(1.0)
    assert summary["newest_window_s"] == {"request.windows": ORIGIN_S, "cost.windows": ORIGIN_S}
    assert summary["records"] == {COST_WINDOWS: 3, POOL_SIGNALS: 4}


def test_closed_windows_keep_their_sums() -> None:
    """What is older than two hours stays in the sums; a revision of it is counted and ignored."""
    items = [request_window(ORIGIN_S + k * 600, k + 1, 0, 10, 9) for k in range(30)]
    tally = tally_of(items)
    assert tally.summary()["requests"]["windowed"] == 300
    assert len(tally._requests._open) <= KEEP_S // 600 + 1
    tally.apply(*request_window(ORIGIN_S, 99, 0, 1000, 0))
    summary = tally.summary()
    assert summary["requests"]["windowed"] == 300
    assert summary["ignored"]["late_revisions"] == 1


def test_an_empty_run_has_no_attainment() -> None:
    """Where nothing was judged or executed, shares are None, not zero."""
    summary = Tally().summary()
    assert summary["slo_attainment"] is None
    assert summary["step_to_action_s"] == {"count": 0, "p50": None, "p99": None}
    assert summary["decisions"] == {}


def test_windows_without_a_price_are_told() -> None:
    """A window of unknown price adds nothing to the bill and is counted."""
    summary = tally_of([cost(ORIGIN_S, 1, 5, None, tenant=None), cost(ORIGIN_S + 10, 2, 5, 0.5, tenant=None)]).summary()
    assert summary["cost_usd"] == pytest.approx(1.0)
    assert summary["cost_windows_unpriced"] == 1


def decisions() -> list[Decision]:
    return [Decision.model_validate_json(r.value) for topic, r in FEED if topic == DECISIONS]


def test_step_to_action_is_of_executed_scale_ups() -> None:
    """From trigger to execution in log time; not for scale-downs, reroutes, reverts, or what was not executed."""
    up = next(
        d
        for d in decisions()
        if isinstance(d.proposal.action, ScaleAction) and any(s.state == "executed" for s in d.history)
    )
    raised = up.model_copy(
        update={"proposal": up.proposal.model_copy(update={"replicas_from": 1, "action": ScaleAction(replicas=3)})}
    )
    executed = next(s.at_s for s in up.history if s.state == "executed")
    assert step_to_action_s(raised) == pytest.approx(executed - up.proposal.trigger_s)

    def other(**changes: object) -> Decision:
        return raised.model_copy(update={"proposal": raised.proposal.model_copy(update=changes)})

    assert step_to_action_s(other(action=ScaleAction(replicas=1))) is None
    assert step_to_action_s(other(replicas_from=None)) is None
    assert step_to_action_s(other(reverts="12345678")) is None
    assert step_to_action_s(other(action=RerouteAction(weights={}))) is None
    assert step_to_action_s(raised.model_copy(update={"history": raised.history[:1]})) is None


def test_decisions_by_kind_and_state() -> None:
    """Each decision counts once, in its latest state."""
    first = decisions()[0]
    step = Transition(state="superseded", at_s=ORIGIN_S, offset=9_999_999, cause="x")
    later = first.model_copy(update={"version": 9_999_999, "state": "superseded", "history": [*first.history, step]})
    summary = tally_of([*FEED, (DECISIONS, record(1, ORIGIN_S, later)), *FEED[:50]]).summary()
    assert summary["decisions"][first.proposal.decision_kind]["superseded"] == 1
    assert sum(sum(states.values()) for states in summary["decisions"].values()) == len({d.id for d in decisions()})


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([], 0.5, None),
        ([1.0], 0.99, 1.0),
        ([1, 2, 3, 4], 0.5, 2),
        ([1, 2, 3, 4], 0.99, 4),
        (list(range(1, 101)), 0.99, 99),
    ],
)
def test_percentile(values: list[float], share: float, expected: float | None) -> None:
    """Nearest rank."""
    assert percentile(values, share) == expected


def test_garbage_is_counted_and_ignored() -> None:
    """What cannot be read changes no total."""
    tally = tally_of(FEED)
    before = tally.summary()
    tally.apply(COST_WINDOWS, LogRecord(1, 1, "fleetloop.cost.window.v1", "", b"{"))
    after = tally.summary()
    assert after["ignored"]["undecodable"] == 1
    assert after["requests"] == before["requests"]
