"""Fault tests run beside each other: each waits most of its time for sessions to end and brokers to come back.

A test decorated with `together` is a scenario. With the first of them all that were chosen start, a few at once; each
test then awaits, and reports, its own.
"""

from __future__ import annotations

import asyncio
import inspect
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from streams.broker import LocalBroker
from tests.integration.harness import Scene

AT_ONCE = 3
Scenario = Callable[["Stage"], Awaitable[None]]


class Stage:
    """What a scenario gets: scenes on the shared broker, and brokers of its own."""

    def __init__(self, broker: LocalBroker, folder: Path) -> None:
        self.broker, self.folder = broker, folder
        self._ends = AsyncExitStack()

    async def scene(self, broker: LocalBroker | None = None, **settings: Any) -> Scene:
        """A deployment of its own."""
        prefix = f"t{uuid.uuid4().hex[:12]}-"
        made = await Scene.make(broker or self.broker, prefix, self.folder, **settings)
        self._ends.push_async_callback(made.close)
        return made

    async def own_broker(self) -> LocalBroker:
        """A running broker that may be hurt."""
        made = LocalBroker(self.folder / "broker")
        self._ends.push_async_callback(asyncio.to_thread, made.stop)
        await asyncio.to_thread(made.start)
        return made

    async def close(self) -> None:
        """Ends everything."""
        await self._ends.aclose()


def together(scenario: Scenario, *, first: bool = False) -> Any:
    """Makes a test of a scenario, which runs beside the others. `first`: a long one, begun before them."""

    async def run(scenarios: Callable[[Scenario], Awaitable[None]]) -> None:
        await scenarios(scenario)

    run.__name__, run.__doc__, run.__module__ = scenario.__name__, inspect.getdoc(scenario), scenario.__module__
    run.scenario, run.first = scenario, first  # type: ignore[attr-defined]
    return pytest.mark.asyncio(loop_scope="session")(pytest.mark.broker(run))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def scenarios(
    request: pytest.FixtureRequest, broker: LocalBroker, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Callable[[Scenario], Awaitable[None]]]:
    """Starts every chosen scenario and gives the way to await one."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def play(scenario: Scenario) -> None:
        async with gate:
            stage = Stage(broker, tmp_path_factory.mktemp(getattr(scenario, "__name__", "scenario")))
            try:
                await scenario(stage)
            finally:
                await stage.close()

    items = [getattr(item, "function", None) for item in request.session.items]
    found = sorted((f for f in items if hasattr(f, "scenario")), key=lambda f: not f.first)
    chosen = list(dict.fromkeys(f.scenario for f in found))
    tasks = {scenario: asyncio.create_task(play(scenario)) for scenario in chosen}

    async def outcome(scenario: Scenario) -> None:
        await tasks[scenario]

    yield outcome
    for task in tasks.values():
        task.cancel()
    await asyncio.gather(*tasks.values(), return_exceptions=True)
