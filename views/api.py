"""The page, JSON, health and metrics as aiohttp handlers over current rows. Knows neither Kafka nor Faust.

Reading needs no token (it is bound to loopback by default); acting is in `views.actions`.
"""

from __future__ import annotations

import json
import mimetypes
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from schemas.errors import InvalidInput
from views.rows import TABLES, Row, Rows
from views.summary import summary

STATIC = Path(__file__).parent / "static"
LIMIT_DEFAULT, LIMIT_MAX = 1_000, 10_000
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class State:
    """What the handlers read.

    Attributes
    ----------
    now_s: gives fleet time, Unix s.
    ready: why the service is not ready, empty when it is.
    act: whether actions are possible, and if not what to do about it.
    """

    rows: Rows
    now_s: Callable[[], float]
    speed: float
    ready: Callable[[], list[str]]
    registry: CollectorRegistry
    act: Callable[[], str]
    hosts: frozenset[str] | None = None
    """Host names that may be asked for; None: any."""
    started: dict[str, Any] = field(default_factory=dict)
    """Shown in the summary: version of the page and of the service."""


def add_routes(app: web.Application, state: State) -> None:
    """Puts the routes and middlewares into an application that has not started."""
    app.middlewares.append(_guard(state))
    app.router.add_get("/", _static("index.html"))
    for path in sorted(STATIC.iterdir()):
        if path.suffix in (".js", ".css", ".svg"):
            app.router.add_get(f"/static/{path.name}", _static(path.name))
    app.router.add_get("/favicon.ico", _static("icon.svg"))
    app.router.add_get("/api/summary", _json(lambda request: _summary(state)))
    for table in TABLES:
        app.router.add_get(f"/api/{table}", _json(lambda request, table=table: _table(state.rows, table, request)))
    app.router.add_get("/api/decisions/{id}", _json(lambda request: _decision(state.rows, request)))
    app.router.add_get("/api/pools/{pool}", _json(lambda request: _pool(state.rows, request)))
    app.router.add_get("/api/pools/{pool}/history", _json(lambda request: _history(state.rows, request)))
    app.router.add_get("/api/dead-letters", _json(lambda request: {"rows": list(state.rows.letters)[::-1]}))

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        why = state.ready()
        return web.Response(text="\n".join(why or ["ready"]) + "\n", status=503 if why else 200)

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(state.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", metrics)


def error(status: int, text: str, **headers: str) -> web.Response:
    """A refusal that says what to do, as JSON."""
    return web.json_response({"error": text}, status=status, headers=headers)


def _guard(state: State) -> Any:
    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if state.hosts is not None and (request.url.host or "").strip("[]") not in state.hosts:
            response: web.StreamResponse = error(
                421,
                f"this page is not served as {request.host!r}: ask for 127.0.0.1, or name the host in "
                "FLEETLOOP_VIEWS_ALLOWED_HOSTS",
            )
        else:
            try:
                response = await handler(request)
            except web.HTTPException as refusal:
                if not request.path.startswith("/api/") or refusal.status < 400:
                    refusal.headers.update(HEADERS)
                    raise
                response = error(refusal.status, refusal.text or refusal.reason)
            except InvalidInput as refusal:
                response = error(400, str(refusal))
        response.headers.update(HEADERS)
        return response

    return guard


def _static(name: str) -> Handler:
    path = STATIC / name
    body = path.read_bytes()
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"

    async def serve(_: web.Request) -> web.Response:
        return web.Response(body=body, content_type=kind, charset=None if kind.startswith("image/") else "utf-8")

    return serve


def _json(make: Callable[[web.Request], Any]) -> Handler:
    async def serve(request: web.Request) -> web.Response:
        return web.json_response(make(request), dumps=_dumps)

    return serve


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _summary(state: State) -> dict[str, Any]:
    refused = state.act()
    service = {**state.started, "ready": state.ready(), "actions": not refused, "actions_remedy": refused or None}
    return {**summary(state.rows, state.now_s(), state.speed), "service": service}


def _number(request: web.Request, name: str, default: float, low: float, high: float) -> float:
    text = request.query.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise InvalidInput(name, text, f"send a number from {low:g} to {high:g}")
    return value


def _table(rows: Rows, table: str, request: web.Request) -> dict[str, Any]:
    """`?pool=` narrows, `?limit=` cuts."""
    limit = int(_number(request, "limit", LIMIT_DEFAULT, 1, LIMIT_MAX))
    pool = request.query.get("pool")
    found: list[Row] = [
        {"key": key, **row}
        for key, row in sorted(rows.tables[table].items())
        if pool is None or pool == row["pool"] or pool in row.get("pools", ())
    ]
    return {"total": len(found), "rows": found[:limit]}


def _decision(rows: Rows, request: web.Request) -> Row:
    return _found(rows, "decisions", request.match_info["id"])


def _pool(rows: Rows, request: web.Request) -> Row:
    return _found(rows, "pools", request.match_info["pool"])


def _found(rows: Rows, table: str, key: str) -> Row:
    row = rows.tables[table].get(key)
    if row is None:
        raise web.HTTPNotFound(text=f"{key!r} is not among the {table} (see /api/{table})")
    return row


def _history(rows: Rows, request: web.Request) -> dict[str, Any]:
    """`?since=`: only points from that Unix s on."""
    pool = request.match_info["pool"]
    if pool not in rows.history:
        raise web.HTTPNotFound(text=f"{pool!r} has no history yet (see /api/pools)")
    return {"pool": pool, **rows.history[pool].values(_number(request, "since", 0.0, 0.0, 1e11))}
