"""Commands of people: made, signed, appended to `decision.events`."""

from __future__ import annotations

import secrets
from typing import Any

from schemas.config import Deployment
from schemas.decisions import Command, CommandName
from schemas.topics import DECISION_EVENTS, ce_type
from streams.deployment import fleet_now_ms
from streams.producer import send_once
from streams.settings import Settings
from streams.signing import sign

VALID_WALL_S = 120.0
"""A command that has not reached the log so long (wall time) after it was given counts no more."""
KEY = "fleet"


def make_command(
    deployment: Deployment,
    name: CommandName,
    private_key: Any,
    key_id: str,
    *,
    actor: str,
    comment: str = "",
    decision_id: str | None = None,
    pool: str | None = None,
) -> Command:
    """A signed command with a fresh id, valid for two minutes of wall time."""
    now_s = fleet_now_ms(deployment) / 1000
    command = Command(
        id=secrets.token_hex(16),
        command=name,
        decision_id=decision_id,
        pool=pool,
        actor=actor,
        comment=comment,
        issued_s=now_s,
        expires_s=now_s + VALID_WALL_S * deployment.speed,
        key_id=key_id,
    )
    return sign(command, private_key)


async def send_command(settings: Settings, command: Command) -> int:
    """Appends a command; gives its offset."""
    return await send_once(
        settings, DECISION_EVENTS, key=KEY, value=command.encode(), type=ce_type(Command.kind), id=command.id
    )
