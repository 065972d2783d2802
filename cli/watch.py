"""What a demo shows while it runs, when it is complete, and its summary."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import aiohttp
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cli.console import cell, err
from cli.plan import Plan
from schemas.topics import DECISION_EVENTS, DECISIONS
from streams.reader import LogReader, log_record
from views.records import SOURCES
from views.rows import Rows
from views.tally import Tally

REFRESH_S = 1.0
LINE_EVERY_S = 5.0
SETTLE_WALL_S = 90.0
DECISIONS_SHOWN = 12
ROW_TOPICS = (DECISIONS, DECISION_EVENTS)
"""What the table is made from; windows are for the tally alone, since decoding them twice would cost the loop CPU."""
STATE_STYLE = {
    "verified": "green",
    "executed": "cyan",
    "dispatched": "cyan",
    "pending": "yellow",
    "blocked": "magenta",
    "regressed": "red",
    "failed": "red",
    "expired": "dim",
    "superseded": "dim",
    "rejected": "dim",
}


class Watch:
    """Follows the result topics into a Tally, and the ledger; draws a table, or lines where nobody watches."""

    def __init__(self, plan: Plan, *, as_json: bool) -> None:
        self.plan = plan
        self.tally = Tally()
        self.rows = Rows()
        self.found: dict[str, Any] = self.tally.summary()
        self.ledger: dict[str, Any] = {}
        self.first_decision_s: float | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._live = None if as_json or not err.is_terminal else Live(console=err, auto_refresh=False, transient=False)
        self._said: dict[str, str] = {}
        self._line_at = 0.0
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Watch:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5))
        self._tasks = [asyncio.create_task(self._follow(topic)) for topic in SOURCES]
        if self._live is not None:
            self._live.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
        if self._live is not None:
            self._live.stop()

    async def _follow(self, topic: str) -> None:
        deployment = self.plan.deployment
        async with LogReader(self.plan.settings, topic) as reader:
            async for batch in reader.follow():
                for record in batch:
                    seen = log_record(record, deployment.log_ms(record.timestamp))
                    self.tally.apply(topic, seen)
                    if topic in ROW_TOPICS:
                        self.rows.apply(topic, seen)
                if batch:
                    await asyncio.sleep(0)  # other topics have their turn

    async def until_done(self, stop: asyncio.Event) -> bool:
        """Shows what happens until `stop`, or until the load has ended; True if it has ended by itself."""
        while not stop.is_set():
            await self._step()
            if self.plan.finite and self.ledger.get("done"):
                return True
            try:
                await asyncio.wait_for(stop.wait(), REFRESH_S)
            except TimeoutError:
                continue
        return False

    async def settle(self, stop: asyncio.Event) -> bool:
        """Waits until every request sent was windowed and billed; True when all were."""
        deadline = time.monotonic() + SETTLE_WALL_S
        while time.monotonic() < deadline and not stop.is_set():
            await self._step()
            if self.complete():
                return True
            await asyncio.sleep(REFRESH_S)
        return self.complete()

    @property
    def decisions(self) -> Mapping[str, dict[str, Any]]:
        """Decisions by id, in the order in which they were first seen."""
        return self.rows.tables["decisions"]

    def complete(self) -> bool:
        """sent = windowed + dead letters = billed + dead letters."""
        r = self.requests()
        return bool(r["sent"] == r["windowed"] + r["dead_letters"] == r["billed"] + r["dead_letters"] and r["sent"])

    def requests(self) -> dict[str, int]:
        """Requests sent (by the simulator's ledger), windowed, billed, dead-lettered."""
        return {
            "sent": int(self.ledger.get("ended", 0)),
            **self.found["requests"],
        }

    async def summary(self) -> dict[str, Any]:
        """The demo's result as plain values."""
        await self._read_ledger()
        found = self.found = self.tally.summary()
        return {
            "records": found["records"],
            "decisions": found["decisions"],
            "requests": self.requests(),
            "slo_attainment": found["slo_attainment"],
            "slo_attainment_truth": self.ledger.get("slo_attainment"),
            "cost_usd": found["cost_usd"],
            "cost_usd_truth": self.ledger.get("cost_usd"),
            "cost_usd_static_peak": self.ledger.get("cost_usd_static_peak"),
            "step_to_action_s": found["step_to_action_s"],
            "first_decision_wall_s": self.first_decision_s,
            "fleet_s": self.ledger.get("fleet_s"),
        }

    async def _read_ledger(self) -> None:
        assert self._session is not None
        try:
            async with self._session.get(f"{self.plan.control}/v1/ledger") as response:
                if response.status == 200:
                    self.ledger = await response.json()
        except (aiohttp.ClientError, TimeoutError):
            return  # not up yet, or busy: the next look shows it

    async def _step(self) -> None:
        self.plan.stack.check()
        for task in self._tasks:
            if task.done():
                task.result()
        await self._read_ledger()
        self.found = self.tally.summary()
        if self.first_decision_s is None and self.decisions:
            self.first_decision_s = round(time.monotonic() - self.plan.started, 1)
        if self._live is not None:
            self._live.update(Group(*self._screen()), refresh=True)
        else:
            self._lines()

    # -- drawing ---------------------------------------------------------------------------------------------

    def _headline(self) -> Text:
        seconds = int(self.ledger.get("fleet_s", 0) or 0)
        requests = self.requests()
        cost, peak = cell(self.ledger.get("cost_usd")), cell(self.ledger.get("cost_usd_static_peak"))
        return Text.assemble(
            (f"fleet time {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}", "bold"),
            f"   requests ended {requests['sent']:,}, windowed {requests['windowed']:,}, billed {requests['billed']:,}",
            f"   cost ${cost} (held at its peak ${peak})   page {self.plan.page}",
        )

    def _screen(self) -> list[Any]:
        pools = Table(box=None, pad_edge=False, header_style="bold")
        names = (
            "pool",
            "load req/s",
            "ready/ordered/wanted",
            "utilisation",
            "SLO 5 min",
            "TTFT p99",
            "TPOT p99",
            "$/h",
            "policy",
        )
        for name in names:
            pools.add_column(name, no_wrap=True)
        for s in self.rows.tables["pools"].values():
            replicas = "/".join(cell(s.get(k)) for k in ("replicas_ready", "replicas_target", "replicas_wanted"))
            pools.add_row(
                s["pool"],
                cell(s.get("requests_per_s")),
                replicas,
                _percent(s.get("utilisation_ratio")),
                _percent(s.get("slo_attainment"), 2),
                cell(s.get("ttft_s_p99")),
                cell(s.get("tpot_s_p99")),
                cell(s.get("usd_per_hour")),
                s.get("policy", ""),
            )
        decisions = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("at", "state", "pool", "action", "why"):
            decisions.add_column(name, no_wrap=True, overflow="ellipsis")
        for d in list(self.decisions.values())[-DECISIONS_SHOWN:]:
            p = d["proposal"]
            decisions.add_row(
                _clock(p["at_s"], self.plan),
                Text(d["state"], STATE_STYLE.get(d["state"], "")),
                p["target"]["pool"],
                _action(p),
                p["reason"],
            )
        if not self.decisions:
            decisions.add_row("", "", "", "", "no decisions yet: the planner acts when load, health or cost ask for it")
        return [self._headline(), Text(""), pools, Text(""), decisions]

    def _lines(self) -> None:
        for id, d in self.decisions.items():
            if self._said.get(id) != d["state"]:
                p = d["proposal"]
                if id not in self._said:
                    err.print(
                        f"{_clock(p['at_s'], self.plan)} {p['target']['pool']}: {_action(p)}: {p['reason']}",
                        highlight=False,
                    )
                elif d["state"] in ("verified", "regressed", "failed", "blocked"):
                    err.print(
                        f"{_clock(p['at_s'], self.plan)} {p['target']['pool']}: {_action(p)}: {d['state']}",
                        highlight=False,
                    )
                self._said[id] = d["state"]
        if time.monotonic() - self._line_at >= LINE_EVERY_S and self.ledger:
            self._line_at = time.monotonic()
            err.print(self._headline())

    def show_summary(self, summary: dict[str, Any]) -> None:
        """The summary for people."""
        requests, steps = summary["requests"], summary["step_to_action_s"]
        err.print(f"\nrequests {requests}")
        err.print(f"decisions {summary['decisions']}")
        err.print(
            f"SLO attainment {_percent(summary['slo_attainment'], 2)}; cost ${cell(summary['cost_usd'])}, "
            f"static peak ${cell(summary['cost_usd_static_peak'])}; step to action p50 {cell(steps['p50'])} s, "
            f"p99 {cell(steps['p99'])} s of fleet time"
        )


def _percent(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}%}"


def _clock(at_s: float, plan: Plan) -> str:
    seconds = int(at_s - plan.deployment.origin_ms / 1000)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _action(proposal: dict[str, Any]) -> str:
    action = proposal["action"]
    if action["type"] == "scale":
        return f"{cell(proposal.get('replicas_from'))} -> {action['replicas']} replicas"
    return "weights " + ", ".join(f"{k} {v:g}" for k, v in action["weights"].items())
