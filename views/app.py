"""The views service: a Faust app that reads the result topics into Faust tables and serves them.

Each process reads everything under a consumer group of its own, so that a second one beside it shows the same
fleet, not the other half of it. The group commits nothing, so that the brokers forget it soon after its end. What a
process keeps is bounded (`views.settings`), and nothing of it is precious.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import secrets
import signal
import time
from typing import Any

import structlog
from aiohttp import web
from aiokafka.errors import KafkaError
from faust.types import TP
from faust.web.base import BlueprintManager
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

from schemas.config import Deployment
from schemas.errors import SettingsError, UnavailableError
from streams.commands import make_command, send_command
from streams.deployment import fleet_now_ms, read_deployment
from streams.faustapp import begin_at, build_app, fetch_at_leisure, highwater
from streams.logs import setup_logs
from streams.reader import log_record
from streams.settings import Settings
from streams.signing import load_key_file
from streams.watchdog import Watchdog
from views.actions import Actions, Order, Send
from views.api import LOOPBACK_NAMES, State, add_routes
from views.metrics import RowsCollector
from views.records import SOURCES, latest
from views.rows import TABLES, Rows
from views.settings import PREFIX, ViewsSettings, load_views_settings
from views.start import find_places
from views.tables import HereRouter, RowTable, RowTables

log = structlog.get_logger(__name__)

CATCH_UP_LAG_MAX = 2_000
SLICE_S = 0.02
SEND_WITHIN_S = 10.0
BEAT_S = 0.5
FETCH_WAIT_MS, FETCH_BYTES_MIN = 500, 256 * 1024
"""People look no oftener; and of the early looks at a window that come together only the last is decoded."""


class ViewsApp:
    """The service. `run` until SIGTERM or SIGINT.

    Attributes
    ----------
    rows: current rows, in Faust tables.
    group: its consumer group, of this process alone.
    """

    def __init__(self, settings: Settings, views: ViewsSettings, deployment: Deployment) -> None:
        self.settings, self.views, self.deployment = settings, views, deployment
        name = f"views.{secrets.token_hex(4)}"
        self.group = settings.group(name)
        names = {settings.topic(name): name for name in SOURCES}
        self.app = build_app(
            settings,
            name,
            *names,
            Router=HereRouter,
            Table=RowTable,
            TableManager=RowTables,
            web_enabled=True,
            web_bind=settings.web_host,
            web_port=views.port,
            web_in_thread=False,
            web_tables_enabled=True,
            stream_recovery_delay=0.0,
        )
        fetch_at_leisure(self.app, FETCH_WAIT_MS, FETCH_BYTES_MIN)
        tables = {name: self.app.Table(name, help=text) for name, text in TABLES.items()}
        self.rows = Rows(tables, rows_max=views.rows_max, decisions_max=views.decisions_max, history_s=views.history_s)
        self._names = names
        self._applied: dict[TP, int] = {}
        self._starts: dict[TP, int] = {}
        self._ends: dict[TP, int] = {}
        self._beat_at = self._moved_at = time.monotonic()
        self._lag_seen = 0
        self._reading = False
        self._stopping = asyncio.Event()
        self._wire()
        self._serve()

    def _wire(self) -> None:
        topic = self.app.topic(*self._names, key_type=None, value_type=None, acks=False)

        async def take(stream: Any) -> None:
            async for event in stream.events():
                await self._take(event.message)

        self.app.agent(topic, name="fleetloop.views", concurrency=1)(take)
        self._receivers = (self._on_rebalanced,)  # Faust holds signal receivers weakly
        self.app.on_rebalance_complete.connect(self._on_rebalanced)

    async def _on_rebalanced(self, app: Any, **_: Any) -> None:
        self._reading = True

    async def _take(self, message: Any) -> None:
        """Applies a coalesced batch; yields to the web server every few records."""
        name = self._names[message.topic]
        began = time.monotonic()
        records = [log_record(record, self.deployment.log_ms(record.timestamp)) for record in message.value]
        needed = latest(records)
        self.rows.records[name] += len(records) - len(needed)
        for record in needed:
            self.rows.apply(name, record)
            if time.monotonic() - began > SLICE_S:
                await asyncio.sleep(0)
                began = time.monotonic()
        self._applied[TP(message.topic, message.partition)] = message.offset + 1
        self._moved_at = began

    # ---- the web side

    def _serve(self) -> None:
        token = self.views.secret()
        self.actions = Actions(self.rows, token, self._sender())
        registry = CollectorRegistry()
        registry.register(RowsCollector(self.rows, self.actions, self.lag))
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        state = State(
            rows=self.rows,
            now_s=lambda: fleet_now_ms(self.deployment) / 1000,
            speed=self.deployment.speed,
            ready=self.ready,
            registry=registry,
            act=self.actions.closed,
            hosts=self._hosts(),
        )
        server = self.app.web
        # Of Faust's own pages only the tables; "/" is ours.
        server.blueprints = BlueprintManager([("/table", "faust.web.apps.tables.blueprint")])
        application: web.Application = server.web_app
        add_routes(application, state)
        self.actions.add_routes(application)

    def _hosts(self) -> frozenset[str] | None:
        allowed = self.views.allowed_hosts
        if "*" in allowed or (not allowed and self.settings.web_host not in LOOPBACK_NAMES):
            return None
        return LOOPBACK_NAMES | frozenset(self.views.allowed_hosts)

    def _sender(self) -> Send | None:
        if self.views.key_file is None:
            return None
        key = load_key_file(self.views.key_file)

        async def send(order: Order) -> dict[str, Any]:
            command = make_command(
                self.deployment,
                order.command,
                key,
                self.views.key_id,
                actor=order.actor,
                comment=order.comment,
                decision_id=order.decision_id,
                pool=order.pool,
            )
            try:
                async with asyncio.timeout(SEND_WITHIN_S):
                    offset = await send_command(self.settings, command)
            except KafkaError as error:
                raise UnavailableError(repr(error)) from error
            log.info("order", command=order.command, decision=order.decision_id, pool=order.pool, actor=order.actor)
            return {"command_id": command.id, "offset": offset}

        return send

    def lag(self) -> int | None:
        """Records not read yet; None before it reads."""
        if not self._reading:
            return None
        total = 0
        for tp, end in self._ends.items():
            total += max(0, max(end, highwater(self.app, tp) or 0) - self._applied.get(tp, self._starts[tp]))
        return total

    def ready(self) -> list[str]:
        """Why this process does not show the present; empty when it does."""
        lag = self.lag()
        if lag is None:
            return ["not reading yet"]
        return [f"{lag} records behind"] if lag > CATCH_UP_LAG_MAX else []

    def unhealthy(self) -> str:
        """Why the watchdog should end this process; empty while it should not. Called on another thread."""
        now, most = time.monotonic(), self.settings.stall_timeout_s
        if now - self._beat_at > most:
            return f"event loop stalled for {now - self._beat_at:.0f} s"
        if self._lag_seen and now - self._moved_at > most:
            return f"{self._lag_seen} records behind, none read for {now - self._moved_at:.0f} s"
        return ""

    async def _beat(self) -> None:
        while True:
            self._beat_at = time.monotonic()
            self._lag_seen = self.lag() or 0
            if not self._lag_seen:
                self._moved_at = self._beat_at
            await asyncio.sleep(BEAT_S)

    # ---- life

    async def run(self) -> int:
        """Until SIGTERM or SIGINT, or until the app crashes; gives the exit status.

        Raises SettingsError for a port that is taken, UnavailableError where the broker cannot be reached.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        back_s = self.views.history_s / self.deployment.speed
        self._starts, self._ends = await find_places(
            self.settings, list(self._names), back_s, self.views.start_records_max
        )
        begin_at(self.app, self._starts)
        watchdog = Watchdog(self.unhealthy)
        tasks = [loop.create_task(self._beat())]
        try:
            await self._start()
            watchdog.start()
            log.info("serving", url=f"http://{self.settings.web_host}:{self.views.port}/", group=self.group)
            tasks += [loop.create_task(self._stopping.wait()), loop.create_task(self.app.wait_until_stopped())]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not self._stopping.is_set():
                log.error("ends", reason=repr(self.app.crash_reason))
                return 1
        finally:
            for task in tasks:
                task.cancel()
            watchdog.expect_end(self.settings.stop_timeout_s)
            await self.app.stop()
            watchdog.done()
        return 0

    async def _start(self) -> None:
        try:
            await self.app.start()
        except OSError as problem:
            if problem.errno != errno.EADDRINUSE:
                raise
            raise SettingsError(
                f"{PREFIX}PORT: {self.settings.web_host}:{self.views.port} is taken: choose a free port"
            ) from problem

    def stop(self) -> None:
        """Begins to stop."""
        self._stopping.set()


async def serve(settings: Settings, views: ViewsSettings) -> int:
    """Runs the views of the deployment that the settings name."""
    deployment = await read_deployment(settings)
    return await ViewsApp(settings, views, deployment).run()


def run_views(settings: Settings, views: ViewsSettings | None = None) -> int:
    """Runs the views until SIGTERM or SIGINT; gives the exit status."""
    setup_logs(settings, app="views")
    logging.getLogger("views.tables").setLevel(logging.WARNING)  # they are Faust's services and say so
    return asyncio.run(serve(settings, views or load_views_settings()))
