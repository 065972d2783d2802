"""A level's process with the counting fold, as the tests start, stop, kill and suspend it."""

from __future__ import annotations

import asyncio
import sys

from streams.deployment import read_deployment
from streams.level import LevelApp
from streams.logs import setup_logs
from streams.settings import load_settings
from tests.integration.counting import CountFold


async def main() -> int:
    settings = load_settings()
    setup_logs(settings)
    return await LevelApp("node", CountFold, settings, await read_deployment(settings)).run()


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
