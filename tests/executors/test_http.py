"""The HTTP targets against a server: what is sent, and what each answer means."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from executors.http import checked_url, secret
from executors.simulator import SimulatorTarget
from executors.target import ActionFailed, NewerInForce, TryAgain
from executors.webhook import WebhookTarget, signature
from schemas.base import decode
from schemas.decisions import Decision, RerouteAction, ScaleAction
from schemas.errors import SettingsError
from tests.executors.making import decision

KEY = b"0123456789abcdef"


class Receiver:
    """Keeps requests; answers as told."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []
        self.status, self.answer = 200, {"before": {"replicas": 2}, "after": {"replicas": 3}, "applied": True}
        self.url = ""

    async def handle(self, request: web.Request) -> web.Response:
        self.requests.append((request.method, request.raw_path, dict(request.headers), await request.read()))
        return web.json_response(self.answer, status=self.status)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    made = Receiver()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", made.handle)
    async with TestServer(app) as server:
        made.url = str(server.make_url("/"))
        yield made


@pytest.fixture
async def simulator(receiver: Receiver) -> AsyncIterator[SimulatorTarget]:
    target = SimulatorTarget(receiver.url, "t0ken")
    await target.open()
    yield target
    await target.close()


@pytest.mark.parametrize(
    ("action", "path", "body"),
    [
        (ScaleAction(replicas=4), "/v1/pools/my%20pool/scale", {"replicas": 4}),
        (RerouteAction(weights={"r": 0.5}), "/v1/pools/my%20pool/weights", {"weights": {"r": 0.5}}),
        (
            RerouteAction(scope="pools", weights={"p": 1.0}),
            "/v1/routes/my%20pool/weights",
            {"weights": {"p": 1.0}},
        ),
    ],
)
async def test_the_simulator_is_told_the_absolute_action_and_its_epoch(
    receiver: Receiver, simulator: SimulatorTarget, action: Any, path: str, body: dict[str, Any]
) -> None:
    """Each action goes to its own address with epoch, dry-run and the token."""
    acted = await simulator.act(decision(pool="my pool", epoch=12, action=action), True)
    method, found, headers, sent = receiver.requests[0]
    assert (method, found) == ("PUT", path)
    assert json.loads(sent) == body | {"epoch": 12, "dry_run": True}
    assert headers["Authorization"] == "Bearer t0ken"
    assert (acted.before, acted.after) == ({"replicas": 2}, {"replicas": 3})


@pytest.mark.parametrize(
    ("status", "error"),
    [(500, TryAgain), (503, TryAgain), (429, TryAgain), (409, NewerInForce), (401, ActionFailed), (404, ActionFailed)],
)
async def test_what_an_answers_status_means(
    receiver: Receiver, simulator: SimulatorTarget, status: int, error: type[Exception]
) -> None:
    """Busy is tried again, a conflict means that something newer holds, the rest is a refusal; no secret in it."""
    receiver.status = status
    with pytest.raises(error, match=str(status)) as caught:
        await simulator.act(decision(), False)
    assert "t0ken" not in str(caught.value)


async def test_a_target_that_cannot_be_reached_is_tried_again(unused_tcp_port: int) -> None:
    """A refused connection is an operating error."""
    target = SimulatorTarget(f"http://127.0.0.1:{unused_tcp_port}", "t")
    await target.open()
    with pytest.raises(TryAgain):
        await target.act(decision(), False)
    await target.close()


async def test_a_webhook_post_can_be_verified_and_told_apart(receiver: Receiver) -> None:
    """The receiver can check body and time by the secret, and knows a repetition by its key."""
    target = WebhookTarget(receiver.url, KEY, "hook", clock=lambda: 1_700_000_000.9)
    await target.open()
    asked = decision("a", 12, executor="hook")
    for _ in range(2):
        await target.act(asked, False)
    await target.close()
    (_, _, headers, body), second = receiver.requests
    assert decode(Decision, body) == asked
    assert headers["X-Fleetloop-Timestamp"] == "1700000000"
    expected = hmac.new(KEY, b"1700000000." + body, hashlib.sha256).hexdigest()
    assert headers["X-Fleetloop-Signature"] == f"sha256={expected}"
    assert headers["Idempotency-Key"] == second[2]["Idempotency-Key"] == "a......./12"


def test_the_signature_is_the_published_one() -> None:
    """A fixed vector, computed with `openssl dgst -sha256 -hmac`, so that receivers can test theirs."""
    assert signature(KEY, "1700000000", b'{"id":"a"}') == (
        "sha256=7eefd6dab3572ab7b831fd0f3b0189166fd2d48edffb19b3bed33209454c06ad"
    )


@pytest.mark.parametrize(
    ("url", "good"),
    [
        ("https://example.org/hook", True),
        ("http://127.0.0.1:1/", True),
        ("http://[::1]:1", True),
        ("http://localhost:9", True),
        ("http://example.org", False),
        ("http://127.0.0.1.example.org", False),
        ("http://user:pw@127.0.0.1", False),
        ("ftp://127.0.0.1", False),
        ("example.org", False),
    ],
)
def test_plain_http_only_on_loopback(url: str, good: bool) -> None:
    """Anything but https is refused for addresses beyond this machine."""
    if good:
        assert checked_url(url, "--url") == url.rstrip("/")
    else:
        with pytest.raises(SettingsError):
            checked_url(url, "--url")


def test_secrets_come_from_the_environment_or_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The file wins; a missing file, a missing or short secret is a clear error."""
    with pytest.raises(SettingsError, match="FLEETLOOP_SIMULATOR_TOKEN"):
        SimulatorTarget.of("http://127.0.0.1:1")
    monkeypatch.setenv("FLEETLOOP_WEBHOOK_SECRET", "short")
    with pytest.raises(SettingsError, match="16"):
        WebhookTarget.of("http://127.0.0.1:1")
    (tmp_path / "s").write_text("from a file, long\n")
    monkeypatch.setenv("FLEETLOOP_WEBHOOK_SECRET_FILE", str(tmp_path / "s"))
    assert secret("FLEETLOOP_WEBHOOK_SECRET") == "from a file, long"
    monkeypatch.setenv("FLEETLOOP_WEBHOOK_SECRET_FILE", str(tmp_path / "none"))
    with pytest.raises(SettingsError, match="cannot be read"):
        secret("FLEETLOOP_WEBHOOK_SECRET")


async def test_the_simulators_own_control_port_understands_it(demo_fleet: Callable[[], tuple[Any, Any]]) -> None:
    """Against the real control port: scale and weights arrive, an older epoch is known as such."""
    fleet, app = demo_fleet()
    pool = next(iter(fleet.pools))
    async with TestServer(app) as server:
        target = SimulatorTarget(str(server.make_url("/")), "t0ken")
        await target.open()
        before = len(fleet.pools[pool].staying)
        acted = await target.act(decision("a", 9, pool=pool, action=ScaleAction(replicas=before + 1)), False)
        assert acted.after["replicas"] == before + 1
        assert len(fleet.pools[pool].staying) == before + 1
        with pytest.raises(NewerInForce):
            await target.act(decision("b", 8, pool=pool), False)
        with pytest.raises(ActionFailed):
            await target.act(decision("c", 10, pool="nope"), False)
        await target.close()
