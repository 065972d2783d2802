"""Health and metrics of a process over HTTP, on a thread of its own so that a stalled loop does not stall them.

`/healthz`: whether it should go on living; `/readyz`: whether it does its work; `/metrics`: Prometheus.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from schemas.errors import SettingsError
from streams.settings import PREFIX


class HealthServer:
    """Serves the three pages; `port` 0 serves none, -1 any free port.

    Parameters
    ----------
    unhealthy: why the process should be ended, empty when it should not.
    ready: why it is not ready, empty when it is.
    """

    def __init__(
        self,
        host: str,
        port: int,
        unhealthy: Callable[[], str],
        ready: Callable[[], list[str]],
        *collectors: Collector,
    ) -> None:
        self.registry = CollectorRegistry()
        for collector in collectors:
            self.registry.register(collector)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._server: ThreadingHTTPServer | None = None
        self.port = 0
        if port == 0:
            return
        try:
            self._server = ThreadingHTTPServer((host, max(0, port)), _handler(self.registry, unhealthy, ready))
        except OSError as error:
            raise SettingsError(
                f"{PREFIX}HEALTH_PORT: {host}:{port}: {error.strerror}: choose a free base port, or 0 for none"
            ) from error
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]

    def start(self) -> None:
        """Begins to serve."""
        if self._server is not None:
            threading.Thread(
                target=self._server.serve_forever, kwargs={"poll_interval": 0.2}, name="health", daemon=True
            ).start()

    def stop(self) -> None:
        """Ends serving and frees the port."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


def _handler(
    registry: CollectorRegistry, unhealthy: Callable[[], str], ready: Callable[[], list[str]]
) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "fleetloop", ""
        timeout = 10  # a client that says nothing does not hold a thread for ever

        def do_GET(self) -> None:
            if self.path == "/healthz":
                why = unhealthy()
                self._answer(503 if why else 200, (why or "ok") + "\n")
            elif self.path == "/readyz":
                whys = ready()
                self._answer(503 if whys else 200, "\n".join(whys or ["ready"]) + "\n")
            elif self.path == "/metrics":
                self._answer(200, generate_latest(registry).decode(), CONTENT_TYPE_LATEST)
            else:
                self._answer(404, "/healthz, /readyz, /metrics\n")

        def _answer(self, status: int, text: str, kind: str = "text/plain; charset=utf-8") -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Requests are not logged."""

    return Handler
