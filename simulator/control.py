"""HTTP control of a running simulator: absolute, idempotent actions with epochs; state and ledger.

PUT needs the bearer token; without one configured every PUT is refused. Bodies and answers are JSON.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from schemas.errors import InvalidInput
from simulator.events import Outcome
from simulator.fleet import Fleet

BODY_BYTES_MAX = 64 * 1024
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    epoch: int = Field(ge=0)
    dry_run: bool = False


class ScaleBody(_Body):
    """Body of a scale action."""

    replicas: int = Field(ge=0)


class WeightsBody(_Body):
    """Body of a weights action, of replicas or of pools."""

    weights: dict[str, float] = Field(max_length=10_000)


def make_app(
    fleet: Fleet,
    token: str,
    state: Callable[[], Mapping[str, Any]],
    ledger: Callable[[], Mapping[str, Any]],
    unready: Callable[[], str],
    registry: CollectorRegistry,
) -> web.Application:
    """The application. `unready` gives why the process is not ready, empty when it is."""

    async def scale(request: web.Request) -> web.Response:
        body = ScaleBody.model_validate_json(await request.read())
        pool = request.match_info["pool"]
        before = {"replicas": fleet.pools[pool].desired} if pool in fleet.pools else {}
        outcome = fleet.scale(pool, body.replicas, body.epoch, body.dry_run)
        return _answer(outcome, body, before, {"replicas": body.replicas})

    async def replica_weights(request: web.Request) -> web.Response:
        body = WeightsBody.model_validate_json(await request.read())
        pool = request.match_info["pool"]
        before = {"weights": dict(fleet.pools[pool].weights)} if pool in fleet.pools else {}
        outcome = fleet.set_replica_weights(pool, body.weights, body.epoch, body.dry_run)
        return _answer(outcome, body, before, {"weights": body.weights})

    async def pool_weights(request: web.Request) -> web.Response:
        body = WeightsBody.model_validate_json(await request.read())
        route = request.match_info["route"]
        before = {"weights": dict(fleet.routes[route])} if route in fleet.routes else {}
        outcome = fleet.set_pool_weights(route, body.weights, body.epoch, body.dry_run)
        return _answer(outcome, body, before, {"weights": body.weights})

    async def get_state(_: web.Request) -> web.Response:
        return web.json_response(state())

    async def get_ledger(_: web.Request) -> web.Response:
        return web.json_response(ledger())

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        why = unready()
        return web.Response(text=(why or "ready") + "\n", status=503 if why else 200)

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application(middlewares=[_guard(token)], client_max_size=BODY_BYTES_MAX)
    app.add_routes(
        [
            web.put("/v1/pools/{pool}/scale", scale),
            web.put("/v1/pools/{pool}/weights", replica_weights),
            web.put("/v1/routes/{route}/weights", pool_weights),
            web.get("/v1/state", get_state),
            web.get("/v1/ledger", get_ledger),
            web.get("/healthz", healthz),
            web.get("/readyz", readyz),
            web.get("/metrics", metrics),
        ]
    )
    return app


def _guard(token: str) -> Any:
    """Checks the token of every PUT, and turns refusals into answers that name the field."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method == "PUT":
            given = request.headers.get("Authorization", "").removeprefix("Bearer ")
            right = hmac.compare_digest(given.encode("utf-8", "surrogateescape"), token.encode())
            if not token or not right:
                remedy = "send Authorization: Bearer with the token of FLEETLOOP_SIMULATOR_TOKEN"
                return _refusal(
                    401, "Authorization", "", remedy if token else f"no token is set here; set it, then {remedy}"
                )
        try:
            return await handler(request)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            field = ".".join(str(part) for part in first["loc"]) or "body"
            return _refusal(422, field, repr(first.get("input"))[:120], first["msg"])
        except InvalidInput as error:
            status = 404 if error.field in ("pool", "route") else 422
            return _refusal(status, error.field, error.value, error.remedy)

    return guard


def _refusal(status: int, field: str, value: str, remedy: str) -> web.Response:
    return web.json_response({"field": field, "value": value, "remedy": remedy}, status=status)


def _answer(outcome: Outcome, body: _Body, before: dict[str, Any], after: dict[str, Any]) -> web.Response:
    """200, or 409 where the epoch is older than what holds. `before`, `after`: what was and what is asked for."""
    answer = {**outcome._asdict(), "epoch": body.epoch, "dry_run": body.dry_run, "before": before, "after": after}
    return web.json_response(answer, status=200 if outcome.accepted else 409)
