"""From decisions to actions: one at a time per target and kind, the newest epoch wins, retries within a deadline.

Knows no Kafka: decisions are given in the order of their topic, answers go to a function.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import structlog

from executors.metrics import ExecutorMetrics
from executors.settings import ExecutorOptions
from executors.target import ActionFailed, ActionTarget, NewerInForce, TryAgain
from schemas.decisions import Decision

log = structlog.get_logger(__name__)


class Answer(NamedTuple):
    """What became of one dispatch."""

    outcome: Literal["executed", "failed", "skipped"]
    detail: str = ""
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None


def slot_of(decision: Decision) -> str:
    """What at most one decision is in force for: target and kind."""
    return f"{decision.proposal.target.key}/{decision.proposal.decision_kind}"


@dataclass(slots=True)
class _Slot:
    current: Decision | None = None
    waiting: Decision | None = None
    withdrawn: bool = False
    """The current one has meanwhile left the state `dispatched`: nobody waits for its answer."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class Acting:
    """Carries out decisions on a target.

    Parameters
    ----------
    now_s: fleet time, Unix s. speed: fleet seconds per wall second.
    answer: called once per dispatch that was acted on or skipped, with the wall seconds it took.
    """

    def __init__(
        self,
        target: ActionTarget,
        options: ExecutorOptions,
        now_s: Callable[[], float],
        speed: float,
        answer: Callable[[Decision, Answer, float], None],
        metrics: ExecutorMetrics,
        dry_run: bool = False,
    ) -> None:
        self.target, self.options, self.now_s, self.speed = target, options, now_s, speed
        self.answer, self.metrics, self.dry_run = answer, metrics, dry_run
        self._in_force: OrderedDict[str, int] = OrderedDict()
        """Slot -> greatest epoch dispatched."""
        self._taken: OrderedDict[tuple[str, int], None] = OrderedDict()
        """(decision, epoch) that were taken or have been answered."""
        self._slots: dict[str, _Slot] = {}
        self._room = asyncio.Semaphore(options.concurrency_max)

    def note(self, decision: Decision) -> None:
        """Remembers the epoch of a decision that was dispatched, whatever became of it."""
        if not any(step.state == "dispatched" for step in decision.history):
            return
        slot = slot_of(decision)
        self._in_force[slot] = max(decision.epoch, self._in_force.get(slot, -1))
        self._in_force.move_to_end(slot)
        while len(self._in_force) > self.options.slots_max:
            self._in_force.popitem(last=False)
            self.metrics.overflow("slots")

    def note_answer(self, decision_id: str, epoch: int) -> None:
        """A dispatch that must not be acted on again."""
        self._taken[(decision_id, epoch)] = None
        while len(self._taken) > self.options.answered_max:
            self._taken.popitem(last=False)
            self.metrics.overflow("answers")

    def take(self, decision: Decision) -> None:
        """One version of a decision of this executor, in the order of the topic."""
        self.note(decision)
        name = slot_of(decision)
        if decision.state != "dispatched":
            self._withdraw(name, decision.id)
            return
        if (decision.id, decision.epoch) in self._taken:
            return
        self.note_answer(decision.id, decision.epoch)
        in_force = self._in_force.get(name, decision.epoch)
        if decision.epoch < in_force:
            self._skip(decision, f"epoch {decision.epoch} is older than {in_force}, which is in force")
            return
        slot = self._slots.setdefault(name, _Slot())
        if slot.waiting is not None:
            self._skip(slot.waiting, f"replaced by epoch {decision.epoch} before its turn came")
        slot.waiting = decision
        slot.changed.set()
        if slot.task is None:
            slot.task = asyncio.create_task(self._work(name, slot))

    async def stop(self, within_s: float) -> None:
        """Gives what is under way time to end; what has not ended is found again at the next start."""
        tasks = [slot.task for slot in self._slots.values() if slot.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=within_s)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def idle(self) -> None:
        """Waits until nothing is under way."""
        while self._slots:
            await asyncio.gather(*(slot.task for slot in self._slots.values() if slot.task is not None))

    def _withdraw(self, name: str, decision_id: str) -> None:
        slot = self._slots.get(name)
        if slot is None:
            return
        if slot.waiting is not None and slot.waiting.id == decision_id:
            slot.waiting = None
        if slot.current is not None and slot.current.id == decision_id:
            slot.withdrawn = True
            slot.changed.set()

    async def _work(self, name: str, slot: _Slot) -> None:
        try:
            while slot.waiting is not None:
                async with self._room:
                    decision, slot.waiting, slot.withdrawn = slot.waiting, None, False
                    if decision is None:  # withdrawn while there was no room
                        break
                    slot.current = decision
                    began = time.monotonic()
                    answer = await self._carry_out(decision, slot)
                    slot.current = None
                    if answer is not None:
                        self._say(decision, answer, time.monotonic() - began)
        finally:
            del self._slots[name]

    async def _carry_out(self, decision: Decision, slot: _Slot) -> Answer | None:
        """Attempts until it is done, refused, out of time, or overtaken. None: nobody waits for the answer."""
        deadline = time.monotonic() + self.options.deadline_s
        backoff, last = self.options.backoff_s, "no attempt was made"
        for attempt in range(1, self.options.attempts_max + 1):
            slot.changed.clear()
            left_s = deadline - time.monotonic()
            fresh_s = (decision.proposal.expires_s - self.now_s()) / self.speed
            if slot.withdrawn:
                return None
            if slot.waiting is not None:
                return Answer("skipped", f"replaced by epoch {slot.waiting.epoch}; last: {last}")
            if fresh_s < 0:
                return Answer("skipped", f"expired {-fresh_s * self.speed:.1f} s ago by the executor's clock; {last}")
            if left_s <= 0:
                break
            self.metrics.attempt()
            try:
                async with asyncio.timeout(min(self.options.attempt_timeout_s, left_s, max(fresh_s, 0.01))):
                    acted = await self.target.act(decision, self.dry_run)
                return Answer("executed", acted.detail, acted.before, acted.after)
            except TryAgain as error:
                last = str(error)
            except TimeoutError:
                last = f"attempt {attempt} took too long"
            except NewerInForce as error:
                return Answer("skipped", str(error))
            except ActionFailed as error:
                return Answer("failed", str(error))
            except Exception as error:  # a target's bug must not end the others' actions
                log.exception("target raised", executor=self.target.name, decision=decision.id)
                return Answer("failed", f"{type(error).__name__}: {error}")
            log.warning("action not done yet", decision=decision.id, attempt=attempt, error=last)
            if attempt < self.options.attempts_max:
                await self._pause(slot, min(backoff, max(0.0, deadline - time.monotonic())))
                backoff = min(backoff * 2, self.options.backoff_s_max)
        return Answer("failed", f"gave up: {last}")

    async def _pause(self, slot: _Slot, wait_s: float) -> None:
        """Waits before the next attempt, shorter when something newer comes."""
        try:
            async with asyncio.timeout(wait_s):
                await slot.changed.wait()
        except TimeoutError:
            return

    def _skip(self, decision: Decision, words: str) -> None:
        self._say(decision, Answer("skipped", words), 0.0)

    def _say(self, decision: Decision, answer: Answer, took_s: float) -> None:
        since_s = decision.history[-1].at_s if decision.history else decision.proposal.at_s
        self.metrics.answered(answer.outcome, took_s, self.now_s() - since_s)
        self.answer(decision, answer, took_s)
