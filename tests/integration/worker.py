"""A level's process with the counting fold, as the tests start, stop, kill and suspend it.

`--supervised N`: N of them under the supervisor.
"""

from __future__ import annotations

import asyncio
import sys

from streams.deployment import read_deployment
from streams.level import LevelApp
from streams.logs import setup_logs
from streams.settings import load_settings
from streams.supervisor import Supervisor
from tests.integration.counting import CountFold


async def main(arguments: list[str]) -> int:
    settings = load_settings()
    setup_logs(settings)
    if arguments:
        command = [sys.executable, "-m", "tests.integration.worker"]
        return await Supervisor({f"w{i}": command for i in range(int(arguments[1]))}, settings).run()
    return await LevelApp("node", CountFold, settings, await read_deployment(settings)).run()


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))
