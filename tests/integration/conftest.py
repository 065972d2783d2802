"""A scene: a deployment of its own on the shared broker, ended with its processes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from streams.broker import LocalBroker
from tests.integration.harness import Scene

MakeScene = Callable[..., Awaitable[Scene]]


@pytest.fixture
async def scene(broker: LocalBroker, topic_prefix: str, tmp_path: Path) -> AsyncIterator[MakeScene]:
    """Makes the scene with settings of its own."""
    made: list[Scene] = []

    async def make(**settings: Any) -> Scene:
        made.append(await Scene.make(broker, topic_prefix, tmp_path, **settings))
        return made[-1]

    yield make
    for one in made:
        await one.close()
