"""Latency findings in an operator's words: what was seen, what is usual, and who."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from models.pool.latency_causes import CAUSES, Parts, Slow, Usual
from models.pool.latency_norms import ln
from models.pool.latency_signals import Seen, Whole

SAID_MIN = 0.05
"""Shares below this are summed up."""


def clauses(
    whole: Whole, seen: Sequence[Seen], slow: Mapping[str, Slow], shares_of_load: Mapping[str, float], usual: Usual
) -> dict[str, str]:
    """Cause -> its figures in this window."""
    return {
        "queueing": _queueing(whole, usual),
        "prefill": f"{_tokens(whole.prompt)} prompt tokens a request{_usually(usual.of('prompt'))}",
        "batch": _batch(whole, seen, usual),
        "kv": _kv(seen, usual),
        "interference": _interference(seen),
        "throttling": _throttling(seen, usual),
        "cold_start": _cold_start(whole, slow),
        "skew": _skew(shares_of_load),
        "unexplained": _unexplained(slow),
    }


def sentence(
    what: str, p99_s: float, target_s: float | None, norm_s: float | None, end_s: int, shares: Parts,
    said: Mapping[str, str],
) -> str:  # fmt: skip
    """`TTFT p99 was 6.1 s (target 2 s, usually 0.8 s) at 14:20 UTC: 71 % queueing (...), 18 % long prompts (...).`"""
    known = [] if target_s is None else [f"target {_s(target_s)}"]
    known += [] if norm_s is None else [f"usually {_s(norm_s)}"]
    at = datetime.fromtimestamp(end_s, UTC)
    parts, rest = [], 0.0
    for cause, share in ranked(shares):
        if share < SAID_MIN:
            rest += share
            continue
        figures = said.get(cause, "")
        parts.append(f"{100 * share:.0f} % {NAMES[cause]}" + (f": {figures}" if figures else ""))
    if rest >= 0.01:
        parts.append(f"{100 * rest:.0f} % other causes")
    return f"{what} p99 was {_s(p99_s)} ({', '.join(known)}) at {at:%H:%M} UTC: {'; '.join(parts)}."


NAMES = {
    "queueing": "queueing",
    "prefill": "long prompts",
    "batch": "batch size",
    "kv": "KV pressure and preemption",
    "interference": "interference",
    "throttling": "throttling",
    "cold_start": "cold start",
    "skew": "routing skew",
    "unexplained": "unexplained",
}
assert tuple(NAMES) == CAUSES


def ranked(shares: Parts) -> list[tuple[str, float]]:
    """Causes with a share, greatest first; of equals the one that stands first in CAUSES."""
    return sorted(((c, shares[c]) for c in CAUSES if shares.get(c, 0.0) > 0), key=lambda item: -item[1])


def untold(seen: Sequence[Seen]) -> list[str]:
    """What no replica told, so that the shares know less: a cause that only this would show is unexplained."""
    told = {
        "time in the queue": any(one.queue_s is not None for one in seen),
        "time a token": any(one.token_s is not None for one in seen),
        "engine steps": any(one.stepped for one in seen),
        "KV use": any(one.held is not None for one in seen),
        "clocks": any(one.clock is not None or one.throttled_s is not None for one in seen),
    }
    return [what for what, known in told.items() if not known]


def _queueing(whole: Whole, usual: Usual) -> str:
    text = f"{whole.waiting:.0f} wait; arrivals {whole.arrivals_rps:.3g}/s against {whole.carried_rps:.3g}/s carried"
    before = _arrivals_rps(whole, usual)
    return text if before is None else f"{text} (usually {before:.3g}/s come)"


def _batch(whole: Whole, seen: Sequence[Seen], usual: Usual) -> str:
    batch = max((one.load.batch for one in seen), default=0.0)
    text = f"up to {batch:.0f} run at a time on a replica"
    if usual.above("output", ln(whole.output)) > 0:
        text += f", {_tokens(whole.output)} tokens generated a request{_usually(usual.of('output'))}"
    before = _arrivals_rps(whole, usual)
    if before is not None and usual.above("pressure", whole.pressure) > 0:
        text += f", arrivals {whole.arrivals_rps:.3g}/s (usually {before:.3g}/s)"
    return text


def _arrivals_rps(whole: Whole, usual: Usual) -> float | None:
    """What usually comes to so many replicas."""
    before = usual.of("pressure")
    return None if before is None else math.exp(before) * (whole.ready + whole.loading)


def _kv(seen: Sequence[Seen], usual: Usual) -> str:
    full = [one for one in seen if one.kv_full > 0]
    if not full:
        return ""
    worst = max(full, key=lambda one: one.kv_full + one.preempted)
    text = f"KV cache full on {len(full)} of {len(seen)} replicas"
    before = usual.of("held")
    if worst.held is not None and before is not None:
        text += f", a running request holds {math.exp(worst.held - before):.1f} x the usual"
    if worst.preempted > 0:
        text += f", {worst.preempted:.2f} preemptions a request on {worst.name}"
    return text


def _interference(seen: Sequence[Seen]) -> str:
    slowed = [one for one in seen if one.slowdown > 0]
    if not slowed:
        return ""
    worst = max(slowed, key=lambda one: one.slowdown)
    by = f" by {worst.antagonist}" if worst.antagonist else ""
    text = f"{worst.name} slowed {math.exp(worst.slowdown):.2f} x{by}"
    return text + (f" and {len(slowed) - 1} more" if len(slowed) > 1 else "")


def _throttling(seen: Sequence[Seen], usual: Usual) -> str:
    before = usual.of("clock")
    clocked = [one for one in seen if one.clock is not None]
    if clocked and before is not None:
        worst = min(clocked, key=lambda one: one.clock or 0.0)
        now, then = 100 * math.exp(worst.clock or 0.0), 100 * math.exp(before)
        return f"{worst.name}'s SM clock at {now:.0f} % of the highest (usually {then:.0f} %)"
    hot = [one for one in seen if one.throttled_s]
    if not hot:
        return ""
    worst = max(hot, key=lambda one: one.throttled_s or 0.0)
    return f"{worst.name} slowed by power or heat for {worst.throttled_s:.0f} of 10 s"


def _cold_start(whole: Whole, slow: Mapping[str, Slow]) -> str:
    fresh = [name for name, one in slow.items() if one.cold_start > 0]
    text = f"{whole.loading} of {whole.ready + whole.loading} replicas still load" if whole.loading else ""
    if fresh:
        text += f"{', ' if text else ''}{', '.join(fresh[:3])} just started"
    return text


def _skew(shares_of_load: Mapping[str, float]) -> str:
    if not shares_of_load:
        return ""
    name = max(shares_of_load, key=lambda one: shares_of_load[one])
    return f"{name} gets {shares_of_load[name]:.1f} x an equal share"


def _unexplained(slow: Mapping[str, Slow]) -> str:
    apart = {name: one.unexplained for name, one in slow.items() if one.unexplained > SAID_MIN}
    if not apart:
        return ""
    name = max(apart, key=lambda one: apart[one])
    return f"{name} {math.exp(apart[name]):.2f} x slower than its load explains"


def _tokens(value: float | None) -> str:
    return "an unknown number of" if value is None else f"{value:,.0f}"


def _usually(value_ln: float | None) -> str:
    return "" if value_ln is None else f" (usually {math.exp(value_ln):,.0f})"


def _s(value_s: float) -> str:
    return f"{value_s:.3g} s" if value_s >= 1 else f"{1000 * value_s:.0f} ms"
