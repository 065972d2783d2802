"""What a run came to: requests accounted for, service, cost, decisions and how quickly they were carried out.

Reads the same result records as the rows, and like them keeps the greatest version per name: reading a record
twice changes nothing, and request windows count once they have closed. Windows older than two hours of log time are
closed into sums, so that a run without end needs bounded memory; a revision after that is counted and ignored.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, NamedTuple

from schemas.base import Record
from schemas.columns import Batch
from schemas.costs import CostWindow
from schemas.deadletters import DeadLetter
from schemas.decisions import Decision, ScaleAction
from schemas.errors import InvalidRecord
from schemas.log import LogRecord
from schemas.signals import REQUEST_WINDOWS, WindowName
from schemas.topics import REQUEST_TRACES, ce_type
from views.records import WINDOW_S, decode_record, is_early, letter_id

KEEP_S = 7200
IDS_MAX = 1_000_000


class _Life(NamedTuple):
    version: int
    kind: str
    state: str
    step_to_action_s: float | None


class _Upserts:
    """Sums over named cells of windows: a cell's greatest version counts."""

    def __init__(self, width: int) -> None:
        self.newest_s = 0
        self.late = 0
        self.sums = [0.0] * width
        self._closed_to_s = 0
        self._open: dict[int, dict[tuple[Any, ...], tuple[int, tuple[float, ...]]]] = {}
        self._nothing = (-1, (0.0,) * width)

    def put(self, start_s: int, cell: tuple[Any, ...], version: int, values: tuple[float, ...]) -> None:
        if start_s < self._closed_to_s:
            self.late += 1
            return
        window = self._open.setdefault(start_s, {})
        known, before = window.get(cell, self._nothing)
        if known < version:
            window[cell] = (version, values)
            for i, value in enumerate(values):
                self.sums[i] += value - before[i]
        if start_s > self.newest_s:
            self.newest_s = start_s
            self._closed_to_s = max(self._closed_to_s, start_s - KEEP_S)
            for old in [s for s in self._open if s < self._closed_to_s]:
                del self._open[old]  # its values stay in the sums


class Tally:
    """`apply` every record of the result topics (others are only counted), then ask for the `summary`."""

    def __init__(self) -> None:
        self.records: Counter[str] = Counter()
        self.undecodable = 0
        self._requests = _Upserts(3)  # ends, judged, good
        self._billed = _Upserts(1)  # requests
        self._cost = _Upserts(2)  # usd, windows without a price
        self._letters: dict[str, None] = {}
        self._letter_rows = 0
        self._decisions: dict[str, _Life] = {}
        self._dropped = 0
        self._handlers = {
            REQUEST_WINDOWS.type: self._request_windows,
            ce_type(CostWindow.kind): self._cost_window,
            ce_type(DeadLetter.kind): self._letter,
            ce_type(Decision.kind): self._decision,
        }

    def apply(self, topic: str, record: LogRecord) -> None:
        """Takes one record of a topic (registry name). Never raises for what others sent."""
        self.records[topic] += 1
        handler = self._handlers.get(record.type)
        if handler is None or not record.value:
            return
        if record.type == REQUEST_WINDOWS.type and is_early(record):
            return  # nine in ten of them; what counts is what the window holds when it has closed
        try:
            handler(record, decode_record(record))
        except (InvalidRecord, KeyError):
            self.undecodable += 1

    def _request_windows(self, _: LogRecord, batch: Batch) -> None:
        name = WindowName.of(batch.meta)
        sums = tuple(float(batch.numbers[column].sum()) for column in ("ends", "slo_judged", "slo_good"))
        self._requests.put(name.start_s, (name.pool, name.source), name.version, sums)

    def _cost_window(self, _: LogRecord, window: Record) -> None:
        assert isinstance(window, CostWindow)
        if window.size_s != WINDOW_S:
            return
        start, cell = int(window.start_s), (window.pool, window.tenant)
        if window.tenant is not None:
            self._billed.put(start, cell, window.version, (window.requests,))
        else:
            usd = window.usd_total
            self._cost.put(start, cell, window.version, (usd or 0.0, float(usd is None)))

    def _letter(self, record: LogRecord, letter: Record) -> None:
        assert isinstance(letter, DeadLetter)
        id = letter_id(record, letter)
        if letter.topic != REQUEST_TRACES or id in self._letters:
            return
        if len(self._letters) >= IDS_MAX:
            self._dropped += 1
            return
        self._letters[id] = None
        self._letter_rows += letter.rows_refused

    def _decision(self, _: LogRecord, decision: Record) -> None:
        assert isinstance(decision, Decision)
        known = self._decisions.get(decision.id)
        if known is not None and known.version >= decision.version:
            return
        if known is None and len(self._decisions) >= IDS_MAX:
            self._dropped += 1
            return
        self._decisions[decision.id] = _Life(
            decision.version, decision.proposal.decision_kind, decision.state, step_to_action_s(decision)
        )

    def summary(self) -> dict[str, Any]:
        """The totals so far.

        `slo_attainment` is None where nothing was judged; `cost_usd` leaves out the windows counted in
        `cost_windows_unpriced`; `step_to_action_s` is over executed scale-ups, in s of log time.
        """
        ends, judged, good = self._requests.sums
        usd, unpriced = self._cost.sums
        decisions: dict[str, Counter[str]] = {}
        for life in self._decisions.values():
            decisions.setdefault(life.kind, Counter())[life.state] += 1
        steps = sorted(x.step_to_action_s for x in self._decisions.values() if x.step_to_action_s is not None)
        return {
            "records": dict(sorted(self.records.items())),
            "decisions": {kind: dict(sorted(states.items())) for kind, states in sorted(decisions.items())},
            "requests": {
                "windowed": int(ends),
                "billed": int(self._billed.sums[0]),
                "dead_letters": self._letter_rows,
            },
            "slo_attainment": good / judged if judged else None,
            "cost_usd": usd,
            "cost_windows_unpriced": int(unpriced),
            "step_to_action_s": {
                "count": len(steps),
                "p50": percentile(steps, 0.5),
                "p99": percentile(steps, 0.99),
            },
            "newest_window_s": {
                "request.windows": self._requests.newest_s or None,
                "cost.windows": self._cost.newest_s or None,
            },
            "ignored": {
                "undecodable": self.undecodable,
                "late_revisions": self._requests.late + self._billed.late + self._cost.late,
                "over_bound": self._dropped,
            },
        }


def step_to_action_s(decision: Decision) -> float | None:
    """From the moment the evidence asked for it to its execution, s of log time; None unless an executed scale-up
    that undoes nothing.
    """
    proposal = decision.proposal
    action = proposal.action
    if not isinstance(action, ScaleAction) or proposal.reverts is not None or proposal.replicas_from is None:
        return None
    if action.replicas <= proposal.replicas_from:
        return None
    executed = [step.at_s for step in decision.history if step.state == "executed"]
    return executed[0] - proposal.trigger_s if executed else None


def percentile(ordered: list[float], share: float) -> float | None:
    """Nearest rank: the smallest value with at least `share` of the values at or below it."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None
