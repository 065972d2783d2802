"""What people may order through the page: approve, reject, revert a decision; pause, resume a pool or the fleet.

A bearer token in a header is the whole authentication: no cookie is ever set or read, so another site's page
cannot act with it. Commands are signed here and appended to `decision.events`; whether they count is for the
fleet fold to say.
"""

from __future__ import annotations

import hmac
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from aiohttp import web

from schemas.decisions import CommandName
from schemas.errors import FleetloopError, InvalidInput
from views.api import error
from views.rows import Rows

NAME_MAX, COMMENT_MAX = 100, 2000
NEEDS_STATE: dict[str, tuple[str, ...]] = {
    "approve": ("pending",),
    "reject": ("pending",),
    "revert": ("executed", "verified", "regressed"),
}
"""States in which an order makes sense; the fleet fold judges by what holds when the order reaches it."""


class Order(NamedTuple):
    """What a person asked for, authenticated and not yet signed."""

    command: CommandName
    decision_id: str | None
    pool: str | None
    actor: str
    comment: str


Send = Callable[[Order], Awaitable[dict[str, Any]]]
"""Signs and appends an order; gives what is told to the person. Raises FleetloopError or OSError."""


class Actions:
    """The POST routes.

    Parameters
    ----------
    token: what a caller must present; None: nobody may act.
    send: None where there is no key to sign with.
    """

    def __init__(self, rows: Rows, token: str | None, send: Send | None) -> None:
        self.rows, self._token, self._send = rows, token, send
        self.counts: Counter[tuple[str, str]] = Counter()
        """(command, outcome) -> how often; outcome: sent, refused, failed."""

    def closed(self) -> str:
        """What to do before anyone can act; empty when one can."""
        if self._token is None:
            return "no token is set: start the views with FLEETLOOP_VIEWS_TOKEN_FILE (or FLEETLOOP_VIEWS_TOKEN)"
        if self._send is None:
            return (
                "no signing key is set: make one with `fleetloop keygen`, apply its signer object and start the "
                "views with FLEETLOOP_VIEWS_KEY_FILE"
            )
        return ""

    def add_routes(self, app: web.Application) -> None:
        """Puts the routes into an application that has not started."""
        app.router.add_post("/api/decisions/{id}/{command:approve|reject|revert}", self._on_decision)
        app.router.add_post("/api/pools/{pool}/{command:pause|resume}", self._on_pool)
        app.router.add_post("/api/fleet/{command:pause|resume}", self._on_pool)
        app.router.add_post("/api/token", self._on_token)

    async def _on_token(self, request: web.Request) -> web.Response:
        """Only checks the token, so that the page can say at once that it is wrong."""
        return self._refusal(request) or web.json_response({"ok": True})

    async def _on_decision(self, request: web.Request) -> web.Response:
        if (refused := self._refusal(request)) is not None:
            return self._count(request, refused, "refused")
        id, command = request.match_info["id"], request.match_info["command"]
        row = self.rows.tables["decisions"].get(id)
        if row is None:
            return self._count(
                request, error(404, f"{id!r} is not among the decisions (see /api/decisions)"), "refused"
            )
        if row["state"] not in NEEDS_STATE[command]:
            text = f"{command} needs a decision that is {' or '.join(NEEDS_STATE[command])}; {id} is {row['state']}"
            return self._count(request, error(409, text), "refused")
        if command == "revert" and row["proposal"]["undo"] is None:
            return self._count(
                request, error(409, f"{id} names no way to undo it: scale or reroute by hand"), "refused"
            )
        return await self._order(request, decision_id=id, pool=None)

    async def _on_pool(self, request: web.Request) -> web.Response:
        if (refused := self._refusal(request)) is not None:
            return self._count(request, refused, "refused")
        pool = request.match_info.get("pool")
        if pool is not None and pool not in self.rows.tables["pools"]:
            return self._count(request, error(404, f"{pool!r} is not among the pools (see /api/pools)"), "refused")
        return await self._order(request, decision_id=None, pool=pool)

    async def _order(self, request: web.Request, *, decision_id: str | None, pool: str | None) -> web.Response:
        assert self._send is not None  # _refusal
        try:
            actor, comment = await _body(request)
            told = await self._send(Order(request.match_info["command"], decision_id, pool, actor, comment))  # type: ignore[arg-type]
        except InvalidInput as problem:
            return self._count(request, error(400, str(problem)), "refused")
        except (FleetloopError, OSError, TimeoutError) as problem:
            text = f"the order did not reach the log ({problem or type(problem).__name__}): try again"
            return self._count(request, error(503, text), "failed")
        return self._count(request, web.json_response(told, status=202), "sent")

    def _refusal(self, request: web.Request) -> web.Response | None:
        if closed := self.closed():
            return error(403, closed)
        assert self._token is not None
        origin = request.headers.get("Origin")
        site = request.headers.get("Sec-Fetch-Site", "same-origin")
        if (origin is not None and origin.split("://")[-1] != request.host) or site not in ("same-origin", "none"):
            return error(403, "orders are taken from this service's own page, or from programs, not from other sites")
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        # Bytes: compare_digest takes no other than ASCII text, and what is given is anyone's.
        right = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), self._token.encode())
        if scheme.lower() != "bearer" or not right:
            return error(401, "send the token as `Authorization: Bearer ...`", **{"WWW-Authenticate": "Bearer"})
        return None

    def _count(self, request: web.Request, response: web.Response, outcome: str) -> web.Response:
        self.counts[(request.match_info["command"], outcome)] += 1
        return response


async def _body(request: web.Request) -> tuple[str, str]:
    """(actor, comment) of the JSON body, which may be missing. Raises InvalidInput."""
    text = await request.text()
    try:
        body = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise InvalidInput("body", text[:80], 'send a JSON object: {"comment": "...", "name": "..."}')
    found = []
    for field, most in (("name", NAME_MAX), ("comment", COMMENT_MAX)):
        value = body.get(field, "")
        if not isinstance(value, str) or len(value) > most:
            raise InvalidInput(field, value, f"send text of at most {most} characters")
        found.append(" ".join(value.split()))
    # Who holds the token is known, what they call themselves is only said: the audit shall show both.
    return (f"{found[0]} (page)" if found[0] else "page"), found[1]
