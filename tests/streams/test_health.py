"""Health and metrics over HTTP."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from schemas.errors import SettingsError
from streams.health import HealthServer


def get(server: HealthServer, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_pages() -> None:
    """Each page says what holds, and 503 with the reason when something is wrong."""
    wrong: list[str] = []
    server = HealthServer("127.0.0.1", -1, lambda: "".join(wrong), lambda: wrong)
    server.start()
    try:
        assert get(server, "/healthz") == (200, "ok\n")
        assert get(server, "/readyz") == (200, "ready\n")
        wrong.append("p/0 is 5 records behind")
        assert get(server, "/healthz") == (503, "p/0 is 5 records behind\n")
        assert get(server, "/readyz") == (503, "p/0 is 5 records behind\n")
        assert get(server, "/other")[0] == 404
        status, text = get(server, "/metrics")
        assert status == 200
        assert list(text_string_to_metric_families(text))
    finally:
        server.stop()


def test_port_in_use() -> None:
    """A port that is taken is an error that names the setting; port 0 serves nothing."""
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(SettingsError, match="FLEETLOOP_HEALTH_PORT"),
    ):
        HealthServer("127.0.0.1", taken.getsockname()[1], lambda: "", list)
    silent = HealthServer("127.0.0.1", 0, lambda: "", list)
    silent.start()
    silent.stop()
    assert silent.port == 0
