"""Target `simulator`: a running `fleetloop simulate`, by its control port."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import aiohttp

from executors.http import checked_url, request, secret
from executors.settings import SIMULATOR_TOKEN
from executors.target import Acted
from schemas.decisions import Decision, ScaleAction
from schemas.errors import SettingsError


class SimulatorTarget:
    """Absolute PUTs that carry the epoch; the simulator refuses an older one by itself."""

    name = "simulator"

    def __init__(self, url: str, token: str) -> None:
        self.url, self._token = checked_url(url, "--url"), token
        self._session: aiohttp.ClientSession | None = None

    @classmethod
    def of(cls, url: str) -> SimulatorTarget:
        """With the token of the environment. Raises SettingsError without one."""
        token = secret(SIMULATOR_TOKEN)
        if not token:
            raise SettingsError(f"{SIMULATOR_TOKEN}: not set: give it the token that the simulator was started with")
        return cls(url, token)

    async def open(self) -> None:
        """See ActionTarget."""
        self._session = aiohttp.ClientSession()

    async def close(self) -> None:
        """See ActionTarget."""
        if self._session is not None:
            await self._session.close()

    async def act(self, decision: Decision, dry_run: bool) -> Acted:
        """See ActionTarget."""
        assert self._session is not None, "open() comes first"
        proposal, action = decision.proposal, decision.proposal.action
        asked: dict[str, Any]
        if isinstance(action, ScaleAction):
            path, asked = f"pools/{quote(proposal.target.pool, safe='')}/scale", {"replicas": action.replicas}
        else:
            kind = "pools" if action.scope == "replicas" else "routes"
            path, asked = f"{kind}/{quote(proposal.target.pool, safe='')}/weights", {"weights": action.weights}
        body = json.dumps(asked | {"epoch": decision.epoch, "dry_run": dry_run}).encode()
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        answer = await request(self._session, "PUT", f"{self.url}/v1/{path}", body, headers)
        before, after = answer.pop("before", {}), answer.pop("after", None)
        return Acted(
            before if isinstance(before, dict) else {},
            after if isinstance(after, dict) else asked | answer,
            str(answer.get("reason", "")),
        )
