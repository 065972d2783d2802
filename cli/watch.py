"""What a demo has come to while it runs, when it is complete, and its summary; how it looks is `cli.screen`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

import aiohttp
from rich.live import Live

from cli.console import cell, err
from cli.plan import Plan
from cli.screen import Shown, action, clock, headline, money, percent
from schemas.topics import DECISION_EVENTS, DECISIONS
from streams.deployment import fleet_now_ms
from streams.reader import LogReader, log_record
from views.records import SOURCES
from views.rows import Rows
from views.tally import Tally

REFRESH_S = 1.0
LINE_EVERY_S = 5.0
POLL_S = 0.2
SETTLE_WALL_S = 90.0
STATES_SAID = ("pending", "verified", "regressed", "failed", "blocked")
"""Where no terminal shows all, a decision is told with its reason, then when it reaches one of these."""
FETCH_WAIT_MS = 500
"""Longer than a worker's: who only watches need not ask nine topics for news twenty times a second each."""
ROW_TOPICS = (DECISIONS, DECISION_EVENTS)
"""What the table is made from; windows are for the tally alone, since decoding them twice would cost the loop CPU."""


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
        settings = self.plan.settings.model_copy(update={"fetch_max_wait_ms": FETCH_WAIT_MS})
        async with LogReader(settings, topic) as reader:
            async for batch in reader.follow():
                for record in batch:
                    seen = log_record(record, deployment.log_ms(record.timestamp))
                    self.tally.apply(topic, seen)
                    if topic in ROW_TOPICS:
                        self.rows.apply(topic, seen)
                if batch:
                    await asyncio.sleep(POLL_S)  # more come together at the next look

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
            self._live.update(self._shown(), refresh=True)
        else:
            self._lines(self._shown())

    # -- drawing ---------------------------------------------------------------------------------------------

    def _shown(self) -> Shown:
        plan = self.plan
        origin_s = plan.deployment.origin_ms / 1000
        fleet_s = fleet_now_ms(plan.deployment) / 1000 - origin_s
        pools = self.rows.tables["pools"]
        newest_s = self.found["newest_window_s"]["request.windows"]
        return Shown(
            plan.page, plan.speed, origin_s, fleet_s, self.requests(), self.ledger, pools, self.decisions, newest_s
        )

    def _lines(self, shown: Shown) -> None:
        for id, d in self.decisions.items():
            known, state, p = self._said.get(id), d["state"], d["proposal"]
            if known == state:
                continue
            if known is None or state in STATES_SAID:
                what = p["reason"] if known is None else state
                at = clock(p["at_s"] - shown.origin_s)
                err.print(f"{at} {p['target']['pool']}: {action(p)}: {what}", highlight=False)
            self._said[id] = state
        if len(self._said) > 2 * len(self.decisions):
            self._said = {id: state for id, state in self._said.items() if id in self.decisions}
        if time.monotonic() - self._line_at >= LINE_EVERY_S and self.ledger:
            self._line_at = time.monotonic()
            err.print(headline(shown))

    def show_summary(self, summary: dict[str, Any]) -> None:
        """The summary for people."""
        requests, steps, records = summary["requests"], summary["step_to_action_s"], summary["records"]
        err.print(f"\nrecords    {_counts(records)}")
        err.print(f"requests   {_counts(requests)}")
        for kind, states in summary["decisions"].items():
            err.print(f"{kind:<10} {_counts(states)}")
        cost, peak = money(summary["cost_usd"]), money(summary["cost_usd_static_peak"])
        err.print(f"SLO        {percent(summary['slo_attainment'], 2)} of requests within their targets")
        err.print(f"cost       {cost}, {peak} if sized for the peak")
        err.print(f"step to action: p50 {cell(steps['p50'])} s, p99 {cell(steps['p99'])} s of fleet time")


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in counts.items()) or "none"
