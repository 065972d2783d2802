"""The web side over made-up rows: JSON, headers, refusals, orders."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client.parser import text_string_to_metric_families

from schemas.errors import UnavailableError
from tests.views.feed import POOLS, TENANTS
from tests.views.served import TOKEN, Served
from views.rows import TABLES

BEARER = {"Authorization": f"Bearer {TOKEN}"}
Serve = Callable[..., Awaitable[tuple[Served, TestClient[Any, Any]]]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Serves made-up rows; arguments as of `Served`."""
    clients = []

    async def start(seconds: int = 60, **arguments: Any) -> tuple[Served, TestClient[Any, Any]]:
        served = Served(seconds, **arguments)
        client: TestClient[Any, Any] = TestClient(TestServer(served.app))
        await client.start_server()
        clients.append(client)
        return served, client

    yield start
    for client in clients:
        await client.close()


async def get(client: TestClient[Any, Any], path: str) -> Any:
    async with client.get(path) as answer:
        assert answer.status == 200, await answer.text()
        return await answer.json()


def decision_in(served: Served, state: str) -> str:
    return next(key for key, row in served.rows.tables["decisions"].items() if row["state"] == state)


async def test_every_table_is_served(serve: Serve) -> None:
    """Each table comes as JSON with its keys; a limit cuts it and says how many there are."""
    served, client = await serve()
    for table in TABLES:
        answer = await get(client, f"/api/{table}")
        assert answer["total"] == len(served.rows.tables[table]) == len(answer["rows"])
        assert {row["key"] for row in answer["rows"]} == set(served.rows.tables[table])
    cut = await get(client, "/api/gpus?limit=2")
    assert len(cut["rows"]) == 2 < cut["total"]
    one = await get(client, f"/api/replicas?pool={POOLS[0].name}")
    assert {row["pool"] for row in one["rows"]} == {POOLS[0].name}


async def test_summary_holds_what_the_page_shows(serve: Serve) -> None:
    """The strip adds up over pools, tenants' shares add up to one, and every pool has its targets."""
    _, client = await serve(120)
    found = await get(client, "/api/summary")
    assert {p["pool"] for p in found["pools"]} == {p.name for p in POOLS}
    assert found["fleet"]["usd_per_hour"] == pytest.approx(sum(p["usd_per_hour"] for p in found["pools"]))
    assert found["fleet"]["requests_judged"] == sum(p["requests_judged"] for p in found["pools"])
    assert 0.9 < found["fleet"]["slo_attainment"] <= 1
    assert [t["tenant"] for t in found["tenants"]] == list(TENANTS)
    assert sum(t["share"] for t in found["tenants"]) == pytest.approx(1.0)
    for tenant in found["tenants"]:
        assert tenant["usd_direct"] + tenant["usd_idle"] == pytest.approx(tenant["usd_total"])
        assert sum(p["requests"] for p in tenant["pools"]) == tenant["requests"]
    assert found["pools"][0]["spec"]["slo_ttft_s"] == 2.0
    nodes = {n["node"]: n for n in found["nodes"]}
    assert [g["gpu"] for g in nodes["node-0"]["gpus_of"]] == list(range(8))
    assert [v["antagonist"] for v in nodes["node-0"]["victims"]] == ["batch-0"]
    assert not nodes["node-1"]["victims"]
    assert found["fleet"]["findings_open"] == 1
    assert found["dead_letters"]["rows"] == 2
    assert found["service"]["actions"] is True
    assert found["stale"] is False


async def test_waiting_decisions_come_first(serve: Serve) -> None:
    """A decision that waits for a person is at the top, whatever was decided since."""
    served, client = await serve(700)
    states = [d["state"] for d in (await get(client, "/api/summary"))["decisions"]]
    assert states[0] == "pending"
    assert states == sorted(states, key=lambda s: s != "pending")
    assert "evidence" not in json.dumps((await get(client, "/api/summary"))["decisions"])
    one = await get(client, f"/api/decisions/{decision_in(served, 'pending')}")
    assert one["proposal"]["evidence"]
    assert one["proposal"]["alternatives"]


async def test_old_data_is_called_old(serve: Serve) -> None:
    """When fleet time runs on without records, the summary and every pool say that they are stale."""
    served, client = await serve()
    served.late_s = 500.0
    found = await get(client, "/api/summary")
    assert found["stale"] is True
    assert found["stale_s"] == pytest.approx(501, abs=11)
    assert all(p["stale"] for p in found["pools"])


async def test_nothing_yet_is_an_answer(serve: Serve) -> None:
    """Before any record the summary is complete, and what is unknown is null, not zero."""
    _, client = await serve(0)
    found = await get(client, "/api/summary")
    assert found["pools"] == found["tenants"] == found["decisions"] == found["findings"] == []
    assert found["fleet"]["usd_per_hour"] is None
    assert found["fleet"]["slo_attainment"] is None
    assert found["stale_s"] is None


async def test_history_since(serve: Serve) -> None:
    """A pool's history comes whole, or from a moment on."""
    _, client = await serve(300)
    path = f"/api/pools/{POOLS[0].name}/history"
    whole = await get(client, path)
    assert [p["t"] for p in whole["points"]] == sorted(p["t"] for p in whole["points"])
    assert set(whole["forecasts"]) == {"60", "180", "240"}
    later = await get(client, f"{path}?since={whole['points'][-3]['t']}")
    assert later["points"] == whole["points"][-3:]


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("/api/decisions/nonsense", 404, "nonsense"),
        ("/api/pools/nonsense/history", 404, "nonsense"),
        ("/api/gpus?limit=0", 400, "limit"),
        ("/api/gpus?limit=x", 400, "limit"),
        ("/api/gpus?limit=nan", 400, "limit"),
        (f"/api/pools/{POOLS[0].name}/history?since=-1", 400, "since"),
        ("/api/nonsense", 404, "Not Found"),
    ],
)
async def test_refusals_name_what_is_wrong(serve: Serve, path: str, status: int, says: str) -> None:
    """A wrong question is answered by JSON that names it."""
    _, client = await serve(20)
    async with client.get(path) as answer:
        assert answer.status == status
        assert says in (await answer.json())["error"]


@pytest.mark.parametrize(
    "path", ["/", "/static/app.js", "/static/style.css", "/api/summary", "/api/nonsense", "/nothing"]
)
async def test_every_answer_has_the_security_headers(serve: Serve, path: str) -> None:
    """Pages, files, JSON and refusals alike forbid other origins, inline code, frames and guessing of types."""
    _, client = await serve(0)
    async with client.get(path) as answer:
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "Set-Cookie" not in answer.headers


async def test_a_foreign_name_is_refused(serve: Serve) -> None:
    """A host name that is not ours (a page that points its own name at loopback) gets nothing."""
    _, client = await serve(0)
    async with client.get("/api/summary", headers={"Host": "evil.example"}) as answer:
        assert answer.status == 421
        assert "FLEETLOOP_VIEWS_ALLOWED_HOSTS" in (await answer.json())["error"]
    async with client.get("/api/summary", headers={"Host": "localhost:6066"}) as answer:
        assert answer.status == 200


async def test_the_page_refers_to_nothing_elsewhere(serve: Serve) -> None:
    """The page and its files are self-contained: no other origin, no inline script or style."""
    _, client = await serve(0)
    async with client.get("/") as answer:
        page = await answer.text()
    assert "http" not in page.replace("http-equiv", "")
    assert "style=" not in page
    assert "<script>" not in page
    for name in (
        "app.js",
        "chart.js",
        "decisions.js",
        "dom.js",
        "format.js",
        "orders.js",
        "pools.js",
        "tenants.js",
        "nodes.js",
    ):
        async with client.get(f"/static/{name}") as answer:
            assert answer.status == 200
            assert answer.content_type == "text/javascript"
            text = await answer.text()
        assert "innerHTML" not in text
        assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


async def test_health(serve: Serve) -> None:
    """Alive while it answers; ready when it shows the present, and else says why not."""
    served, client = await serve(0)
    for path in ("/healthz", "/readyz"):
        async with client.get(path) as answer:
            assert answer.status == 200
    served.not_ready = ["9000 records behind"]
    async with client.get("/readyz") as answer:
        assert answer.status == 503
        assert "9000 records behind" in await answer.text()


async def test_metrics(serve: Serve) -> None:
    """Gauges by pool, tenant and GPU, all with our prefix and a help; the unknown is left out."""
    served, client = await serve(120)
    served.rows.tables["pools"][POOLS[1].name]["usd_per_hour"] = None
    async with client.get("/metrics") as answer:
        families = {f.name: f for f in text_string_to_metric_families(await answer.text())}
    assert all(name.startswith("fleetloop_") and family.documentation for name, family in families.items())
    priced = {s.labels["pool"] for s in families["fleetloop_pool_cost_usd_per_hour"].samples}
    assert priced == {POOLS[0].name, POOLS[2].name}
    assert len(families["fleetloop_tenant_cost_usd"].samples) == len(TENANTS) * len(POOLS)
    states = {s.labels["state"] for s in families["fleetloop_pool_replicas"].samples}
    assert states == {"ready", "allocated", "target"}
    assert sum(s.value for s in families["fleetloop_decisions"].samples) == len(served.rows.tables["decisions"])
    assert families["fleetloop_refused_rows"].samples[0].value == 2


# ---- orders


async def test_an_order_reaches_the_log(serve: Serve) -> None:
    """With the token, a pending decision is approved in the name and with the comment given."""
    served, client = await serve(700)
    id = decision_in(served, "pending")
    body = {"comment": " looks   right ", "name": "Ada"}
    async with client.post(f"/api/decisions/{id}/approve", headers=BEARER, json=body) as answer:
        assert answer.status == 202
        assert (await answer.json())["command_id"]
    assert served.orders == [("approve", id, None, "Ada (page)", "looks right")]
    assert served.actions.counts == {("approve", "sent"): 1}


@pytest.mark.parametrize("path", [f"/api/pools/{POOLS[0].name}/pause", f"/api/pools/{POOLS[0].name}/resume"])
async def test_a_pool_is_paused_and_resumed(serve: Serve, path: str) -> None:
    """Pools take pause and resume; a body is not needed."""
    served, client = await serve(20)
    async with client.post(path, headers=BEARER) as answer:
        assert answer.status == 202
    assert served.orders[0].pool == POOLS[0].name
    assert served.orders[0].actor == "page"


async def test_the_fleet_is_paused(serve: Serve) -> None:
    """An order to the fleet names no pool."""
    served, client = await serve(20)
    async with client.post("/api/fleet/pause", headers=BEARER) as answer:
        assert answer.status == 202
    assert served.orders[0].pool is None


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": "Bearer \udce9"},
        {"Cookie": f"token={TOKEN}"},
    ],
)
async def test_without_the_token_nothing_is_ordered(serve: Serve, headers: dict[str, str]) -> None:
    """A missing, wrong or otherwise carried token is refused and counted."""
    served, client = await serve(20)
    async with client.post("/api/fleet/pause", headers=headers) as answer:
        assert answer.status == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert not served.orders
    assert served.actions.counts == {("pause", "refused"): 1}


@pytest.mark.parametrize(
    "headers", [{"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}]
)
async def test_other_sites_cannot_order(serve: Serve, headers: dict[str, str]) -> None:
    """A request that a browser makes for another site is refused even with the token."""
    served, client = await serve(20)
    async with client.post("/api/fleet/pause", headers=BEARER | headers) as answer:
        assert answer.status == 403
    assert not served.orders


@pytest.mark.parametrize(
    ("arguments", "says"),
    [({"token": None}, "FLEETLOOP_VIEWS_TOKEN"), ({"send": False}, "FLEETLOOP_VIEWS_KEY_FILE")],
)
async def test_without_token_or_key_actions_are_off(serve: Serve, arguments: dict[str, Any], says: str) -> None:
    """Where no token or no key is set, orders are refused with the remedy, and the summary says so too."""
    _, client = await serve(20, **arguments)
    async with client.post("/api/fleet/pause", headers=BEARER) as answer:
        assert answer.status == 403
        assert says in (await answer.json())["error"]
    service = (await get(client, "/api/summary"))["service"]
    assert service["actions"] is False
    assert says in service["actions_remedy"]


async def test_an_order_that_makes_no_sense_is_refused(serve: Serve) -> None:
    """Unknown decisions and pools, and states in which an order cannot count, are told at once."""
    served, client = await serve(700)
    pending, verified = decision_in(served, "pending"), decision_in(served, "verified")
    for path, status in (
        ("/api/decisions/nonsense/approve", 404),
        ("/api/pools/nonsense/pause", 404),
        (f"/api/decisions/{verified}/approve", 409),
        (f"/api/decisions/{pending}/revert", 409),
        (f"/api/decisions/{pending}/destroy", 404),
    ):
        async with client.post(path, headers=BEARER) as answer:
            assert answer.status == status, path
    assert not served.orders
    async with client.post(f"/api/decisions/{verified}/revert", headers=BEARER) as answer:
        assert answer.status == 202


@pytest.mark.parametrize(
    "body", ["[1]", "{", '{"comment": 7}', json.dumps({"comment": "x" * 2001}), json.dumps({"name": "x" * 101})]
)
async def test_a_wrong_body_is_refused(serve: Serve, body: str) -> None:
    """What is no object, or too long, is refused by name."""
    served, client = await serve(20)
    async with client.post("/api/fleet/pause", headers=BEARER, data=body) as answer:
        assert answer.status == 400
    assert not served.orders


async def test_a_log_that_is_away_is_told(serve: Serve) -> None:
    """When the order cannot be appended, the person is told to try again, and it is counted as failed."""
    served, client = await serve(20)
    served.fail = UnavailableError("no broker")
    async with client.post("/api/fleet/pause", headers=BEARER) as answer:
        assert answer.status == 503
        assert "no broker" in (await answer.json())["error"]
    assert served.actions.counts == {("pause", "failed"): 1}


async def test_orders_are_posts(serve: Serve) -> None:
    """A link or an image cannot order anything."""
    served, client = await serve(20)
    async with client.get("/api/fleet/pause", headers=BEARER) as answer:
        assert answer.status == 405
    assert not served.orders
