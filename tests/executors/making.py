"""Decisions as they come on the topic, and a target that does as a test says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from executors.acting import Acting, Answer
from executors.metrics import ExecutorMetrics
from executors.settings import ExecutorOptions
from executors.target import Acted
from schemas.decisions import (
    Action,
    Decision,
    Expected,
    Proposal,
    RerouteAction,
    ScaleAction,
    State,
    Target,
    Transition,
)

QUICK = {"backoff_s": 0.001, "backoff_s_max": 0.002, "attempts_max": 4}


def decision(
    id: str = "a",
    epoch: int = 7,
    *,
    state: State = "dispatched",
    pool: str = "big",
    action: Action | None = None,
    expires_s: float | None = None,
    executor: str = "simulator",
    version: int | None = None,
) -> Decision:
    """A decision that was dispatched at `epoch`; by default it expires in a minute."""
    now = time.time()
    action = action or ScaleAction(replicas=3)
    path: list[State] = ["proposed", "approved", "dispatched"]
    if state not in path:
        path.append(state)
    return Decision(
        id=id.ljust(8, "."),
        version=epoch if version is None else version,
        state=state,
        mode="automatic",
        epoch=epoch,
        executor=executor,
        history=[Transition(state=s, at_s=now, offset=epoch, cause="test") for s in path],
        proposal=Proposal(
            id=id.ljust(8, "."),
            decision_kind="reroute" if isinstance(action, RerouteAction) else "scale",
            target=Target(pool=pool),
            action=action,
            reason="test",
            expected=Expected(),
            confidence=1.0,
            at_s=now,
            trigger_s=now,
            evidence_s=now,
            expires_s=now + 60 if expires_s is None else expires_s,
            policy_revision=1,
        ),
    )


class FakeTarget:
    """Keeps what it was asked; raises what `trouble` holds, one per attempt."""

    name = "simulator"

    def __init__(self, *trouble: Exception, hold: bool = False) -> None:
        self.trouble = list(trouble)
        self.asked: list[tuple[str, bool]] = []
        self.go, self.entered = asyncio.Event(), asyncio.Event()
        if not hold:
            self.go.set()

    async def open(self) -> None:
        """Nothing to open."""

    async def close(self) -> None:
        """Nothing to close."""

    async def act(self, decision: Decision, dry_run: bool) -> Acted:
        self.asked.append((decision.id.rstrip("."), dry_run))
        self.entered.set()
        await self.go.wait()
        if self.trouble:
            raise self.trouble.pop(0)
        return Acted({"replicas": 2}, {"replicas": 3})


class Stage:
    """An Acting over a fake target, with its answers."""

    def __init__(
        self, target: FakeTarget, dry_run: bool = False, now_s: Callable[[], float] = time.time, **options: Any
    ) -> None:
        self.target = target
        self.answers: list[tuple[str, str, str]] = []
        self.acting = Acting(
            target,
            ExecutorOptions(**(QUICK | options)),
            now_s,
            1.0,
            self._answer,
            ExecutorMetrics("simulator"),
            dry_run,
        )

    def _answer(self, decision: Decision, answer: Answer, took_s: float) -> None:
        self.answers.append((decision.id.rstrip("."), answer.outcome, answer.detail))

    @property
    def outcomes(self) -> list[tuple[str, str]]:
        return [(id, outcome) for id, outcome, _ in self.answers]
