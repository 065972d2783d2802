"""How a demo looks in a terminal: a headline, the pools, the newest decisions. Fits any size from 80 x 20 on.

Knows rows and a ledger, no Kafka and no clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from cli.console import cell

WIDE = 110
"""Narrower terminals show neither the pools' policies nor the number of replicas that the planner wants."""
ACTION_WIDTH_MAX = 30
BEHIND_S = 120.0
"""Behind by more fleet time than this is told."""
DECISIONS_MIN = 3
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


class Shown(NamedTuple):
    """What there is to see. `requests`: sent, windowed, billed; `ledger`: the simulator's, empty before it answers."""

    page: str
    speed: float
    origin_s: float
    """Fleet time is shown from here on, Unix s."""
    fleet_s: float
    """Fleet time now, from there on."""
    requests: Mapping[str, int]
    ledger: Mapping[str, Any]
    pools: Mapping[str, dict[str, Any]]
    decisions: Mapping[str, dict[str, Any]]
    newest_window_s: float | None = None
    """Start of the newest closed window of requests, Unix s."""

    @property
    def behind_s(self) -> float:
        """Fleet time since the newest closed window; a loop that keeps up is behind by a window and its lateness."""
        if self.newest_window_s is None:
            return 0.0
        return self.fleet_s - (self.newest_window_s - self.origin_s)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield headline(self, wide=options.max_width >= WIDE)
        yield from _waiting(self)
        yield Text("")
        yield _pools(self, options.max_width)
        yield Text("")
        room = options.size.height - len(self.pools) - 9
        yield _decisions(self, max(DECISIONS_MIN, room))


def headline(shown: Shown, wide: bool = True) -> Text:
    """One line: time, requests, money."""
    requests, ledger = shown.requests, shown.ledger
    measured = f"{requests['windowed']:,} measured, " if wide else ""
    peak = money(ledger.get("cost_usd_static_peak"))
    return Text.assemble(
        (clock(shown.fleet_s), "bold"),
        f" at {shown.speed:g}x   {requests['sent']:,} requests, {measured}{requests['billed']:,} billed   ",
        (money(ledger.get("cost_usd")), "bold"),
        f" spent, {peak} if sized for the peak" if wide else f" (peak {peak})",
        no_wrap=True,
        overflow="ellipsis",
    )


def _waiting(shown: Shown) -> RenderResult:
    if shown.behind_s > BEHIND_S and not shown.ledger.get("done"):
        text = f"the loop is {clock(shown.behind_s)} behind: this machine is too slow for {shown.speed:g}x, try --speed"
        yield Text(text, "red", no_wrap=True, overflow="ellipsis")
    waiting = sum(d["state"] == "pending" for d in shown.decisions.values())
    if waiting:
        what = "decision waits" if waiting == 1 else "decisions wait"
        yield Text(f"{waiting} {what} for you: approve or reject on {shown.page}", "yellow", no_wrap=True)
    else:
        yield Text(f"the page: {shown.page}", "dim", no_wrap=True)


def _pools(shown: Shown, width: int) -> Table:
    wide = width >= WIDE
    table = Table(box=None, pad_edge=False, header_style="bold", expand=wide)
    table.add_column("pool", no_wrap=True)
    for name in ("req/s", "replicas", "used", "SLO 5 min", "TTFT p99", "TPOT p99", "$/h"):
        table.add_column(name, no_wrap=True, justify="right")
    if wide:
        table.add_column("policy", ratio=1, no_wrap=True, overflow="ellipsis")
    for _, s in sorted(shown.pools.items()):
        slo = s.get("slo_attainment")
        table.add_row(
            s["pool"],
            _number(s.get("requests_per_s"), "{:.1f}"),
            _replicas(s, wide),
            percent(s.get("utilisation_ratio")),
            Text(percent(slo, 1), "" if slo is None or slo >= 0.99 else "red"),
            _number(s.get("ttft_s_p99"), "{:.2f} s"),
            _number(s.get("tpot_s_p99"), "{:.3f} s"),
            _number(s.get("usd_per_hour"), "{:,.2f}"),
            *([s.get("policy", "")] if wide else []),
        )
    return table


def _replicas(status: Mapping[str, Any], wide: bool) -> Text:
    """`3`, or `3 -> 4` while what is ready is not what was ordered; yellow while the planner wants another number."""
    ready, ordered, wanted = (status.get(f"replicas_{what}") for what in ("ready", "target", "wanted"))
    text = cell(ready) if ready == ordered else f"{cell(ready)} -> {cell(ordered)}"
    if wanted is not None and wanted != ordered:
        return Text(f"{text} (wants {wanted})" if wide else text, "yellow")
    return Text(text)


def _decisions(shown: Shown, most: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", expand=True)
    for name in ("at", "state", "pool", "action"):
        table.add_column(name, no_wrap=True, overflow="ellipsis", max_width=ACTION_WIDTH_MAX)
    table.add_column("why", ratio=1, no_wrap=True, overflow="ellipsis")
    for d in list(shown.decisions.values())[-most:]:
        p = d["proposal"]
        table.add_row(
            clock(p["at_s"] - shown.origin_s),
            Text(d["state"], STATE_STYLE.get(d["state"], "")),
            p["target"]["pool"],
            action(p),
            p["reason"],
        )
    if not shown.decisions:
        table.add_row("", "", "", "", "none yet: the planner acts when load, health or cost ask for it")
    return table


def action(proposal: Mapping[str, Any]) -> str:
    """What a proposal would do, shortly."""
    wanted = proposal["action"]
    if wanted["type"] == "scale":
        return f"{cell(proposal.get('replicas_from'))} -> {wanted['replicas']} replicas"
    return "weights " + ", ".join(f"{k} {v:g}" for k, v in wanted["weights"].items())


def clock(seconds: float) -> str:
    """Seconds of fleet time as h:mm:ss."""
    whole = max(0, int(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def percent(value: float | None, digits: int = 0) -> str:
    """A share; unknown is `-`."""
    return "-" if value is None else f"{value:.{digits}%}"


def money(value: float | None) -> str:
    """Dollars and cents; unknown is `-`."""
    return _number(value, "${:,.2f}")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
