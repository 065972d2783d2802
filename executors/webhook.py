"""Target `webhook`: every dispatched decision is posted to a service of the user's own, signed and idempotent.

`X-Fleetloop-Signature: sha256=<hex>` is the HMAC-SHA256 over `<X-Fleetloop-Timestamp>.<body>`; the receiver checks it
and that the timestamp (Unix s) is recent. `Idempotency-Key: <decision id>/<epoch>` is the same however often it is
posted. 2xx: done; 409: something newer is in force; 408, 423, 425, 429 and 5xx: it is tried again; else: refused.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable

import aiohttp

from executors.http import checked_url, request, secret
from executors.settings import WEBHOOK_SECRET
from executors.target import Acted
from schemas.decisions import Decision
from schemas.errors import SettingsError

SECRET_BYTES_MIN = 16


def signature(key: bytes, timestamp: str, body: bytes) -> str:
    """Value of X-Fleetloop-Signature: `sha256=` and the HMAC-SHA256 over `timestamp.body`, hexadecimal."""
    return "sha256=" + hmac.new(key, timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


class WebhookTarget:
    """Posts the whole decision as JSON, `dry_run` as a header of its own."""

    def __init__(self, url: str, key: bytes, name: str = "webhook", clock: Callable[[], float] = time.time) -> None:
        self.url, self.name = checked_url(url, "--url"), name
        if len(key) < SECRET_BYTES_MIN:
            raise SettingsError(f"{WEBHOOK_SECRET}: {len(key)} bytes: set a secret of {SECRET_BYTES_MIN} or more")
        self._key, self._clock = key, clock
        self._session: aiohttp.ClientSession | None = None

    @classmethod
    def of(cls, url: str, name: str = "webhook") -> WebhookTarget:
        """With the secret of the environment. Raises SettingsError."""
        return cls(url, secret(WEBHOOK_SECRET).encode(), name)

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
        body, timestamp = decision.encode(), str(int(self._clock()))
        headers = {
            "Content-Type": "application/json",
            "Idempotency-Key": f"{decision.id}/{decision.epoch}" + ("/dry" if dry_run else ""),
            "X-Fleetloop-Timestamp": timestamp,
            "X-Fleetloop-Signature": signature(self._key, timestamp, body),
            "X-Fleetloop-Dry-Run": "true" if dry_run else "false",
        }
        answer = await request(self._session, "POST", self.url, body, headers)
        before, after = answer.get("before"), answer.get("after")
        return Acted(
            before if isinstance(before, dict) else {},
            after if isinstance(after, dict) else decision.proposal.action.model_dump(mode="json"),
            str(answer.get("detail", ""))[:500],
        )
