"""`python -m agents LEVEL`: what the supervisor starts. People use `fleetloop worker --level LEVEL`."""

from __future__ import annotations

import asyncio
import sys

from agents.run import run_level
from schemas.errors import FleetloopError
from streams.settings import load_settings

if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(run_level(sys.argv[1], load_settings())))
    except FleetloopError as error:
        print(f"fleetloop worker: {error}", file=sys.stderr)
        sys.exit(2)
