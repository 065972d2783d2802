"""What all pools together may hold and spend: GPUs by type, USD per hour, per UTC day and per UTC month.

A pool counts with the largest of what is allocated to it, what was ordered for it, and what an unanswered order may
have left: first come, first served. A pool of higher priority that may act is counted with what it wants, so that
a later and lower one cannot take its GPUs. Scale-downs always pass. What is unknown blocks.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from models.fleet.case import Blocked, Case
from schemas.decisions import ScaleAction


def _kind(case: Case, pool: str) -> str:
    """GPU type of a pool: as configured, else as it says."""
    spec, view = case.fleet.specs.get(pool), case.fleet.views.get(pool)
    if spec is not None:
        return spec.gpu_type
    return str(view.status["gpu_type"]) if view is not None and view.status is not None else ""


def _held(case: Case, pool: str) -> float:
    """GPUs that another pool counts for. Raises Blocked where nobody knows."""
    spec, view = case.fleet.specs.get(pool), case.fleet.views.get(pool)
    reserved = 0
    if spec is not None and spec.priority > case.fleet.specs[case.pool].priority:
        wanted = view.status["replicas_wanted"] if view is not None and view.status is not None else None
        may_act = case.fleet.mode([pool]) in ("approve", "automatic") and not case.fleet.pause_of([pool])
        if wanted and may_act:
            reserved = min(wanted, spec.replicas_max)
    gpus = None if view is None else view.gpus(None if spec is None else spec.gpus_per_replica, reserved)
    if gpus is None:
        raise Blocked(
            f"budget: nobody knows how many GPUs pool {pool} holds; lifts when its pool.status says so, "
            "or its object is deleted"
        )
    return gpus


def _others(case: Case) -> list[str]:
    return [name for name in case.fleet.names() if name != case.pool]


def _fit(case: Case, most: float, words: str, lift: str) -> None:
    """Clamps a scale-up to `most` replicas; blocks where that is no scale-up."""
    assert isinstance(case.action, ScaleAction)
    fits = int(min(most, 1e9) + 1e-9) if most > 0 else 0
    if case.action.replicas <= fits:
        return
    if fits <= case.base:
        raise Blocked(f"{words}: that is {fits} replicas, pool {case.pool} has {case.base}; {lift}")
    case.clamp(fits, words)


def _grows(case: Case) -> bool:
    assert isinstance(case.action, ScaleAction)
    return case.action.replicas >= case.base


def gpu_budget(case: Case) -> None:
    """GPUs of the pool's type over all pools: at most `gpus_max`."""
    spec = case.fleet.specs[case.pool]
    limit = case.fleet.spec.gpus_max.get(spec.gpu_type)
    if limit is None or not _grows(case):
        return
    held = sum(_held(case, name) for name in _others(case) if _kind(case, name) == spec.gpu_type)
    _fit(
        case,
        (limit - held) / spec.gpus_per_replica,
        f"gpu budget: other pools hold or are due {held:g} of {limit:g} {spec.gpu_type} (fleet gpus_max)",
        "lifts when they shrink or gpus_max grows",
    )


def _price(case: Case, gpu_type: str) -> float:
    price = case.fleet.prices.get(gpu_type)
    if price is None:
        raise Blocked(
            f"money: the price of {gpu_type or 'an unnamed GPU type'} is unknown; lifts with its price object"
        )
    return price


def _usd_per_hour(case: Case, pool: str) -> float:
    """What another pool costs at what it holds or is due, USD/h."""
    gpus = _held(case, pool)
    return gpus * _price(case, _kind(case, pool)) if gpus else 0.0


def money_per_hour(case: Case) -> None:
    """USD per hour of all pools at the planned allocation: at most `usd_per_hour_max`."""
    limit = case.fleet.spec.usd_per_hour_max
    if limit is None or not _grows(case):
        return
    spec = case.fleet.specs[case.pool]
    each = spec.gpus_per_replica * _price(case, spec.gpu_type)
    others = sum(_usd_per_hour(case, name) for name in _others(case))
    if each:
        _fit(
            case,
            (limit - others) / each,
            f"money: other pools cost {others:.2f} of {limit:g} USD/h (fleet usd_per_hour_max), "
            f"a replica here {each:.2f}",
            "lifts when they cost less or usd_per_hour_max grows",
        )


def period(now_s: float, month: bool) -> tuple[float, float]:
    """(start, end) of the UTC day or month that holds `now_s`, Unix s."""
    start = datetime.fromtimestamp(now_s, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if not month:
        return start.timestamp(), (start + timedelta(days=1)).timestamp()
    start = start.replace(day=1)
    return start.timestamp(), (start + timedelta(days=32)).replace(day=1).timestamp()


def _spent(case: Case, field: str, start_s: float) -> float:
    """USD spent since `start_s` by all pools: as they say, and from then on at what they hold."""
    total = 0.0
    for name in case.fleet.names():
        view = case.fleet.views.get(name)
        rate = _usd_per_hour(case, name)
        status = None if view is None else view.status
        if status is None:
            raise Blocked(f"money: pool {name} has said nothing yet; lifts with its first pool.status")
        if status["at_s"] < start_s:  # it spoke last in the period before
            total += rate * (case.now_s - start_s) / 3600
            continue
        if status[field] is None:
            raise Blocked(f"money: nobody knows what pool {name} has spent; lifts when its status says ({field})")
        total += status[field] + rate * max(0.0, case.now_s - status["at_s"]) / 3600
    return total


def money_per_period(case: Case) -> None:
    """Spend to date and the planned allocation up to the end of the UTC day and month: at most the budgets."""
    fleet, spec = case.fleet.spec, case.fleet.specs[case.pool]
    for limit, month, field in (
        (fleet.usd_per_day_max, False, "usd_day_to_date"),
        (fleet.usd_per_month_max, True, "usd_month_to_date"),
    ):
        if limit is None or not _grows(case):
            continue
        start_s, end_s = period(case.now_s, month)
        hours = (end_s - case.now_s) / 3600
        each = spec.gpus_per_replica * _price(case, spec.gpu_type)
        others = sum(_usd_per_hour(case, name) for name in _others(case))
        spent = _spent(case, field, start_s)
        name = "usd_per_month_max" if month else "usd_per_day_max"
        if each:
            _fit(
                case,
                ((limit - spent) / hours - others) / each if hours > 0 else 0.0,
                f"money: {spent:.2f} of {limit:g} USD spent (fleet {name}), {others:.2f} USD/h in other pools, "
                f"a replica here {each:.2f}, for {hours:.1f} h more",
                "lifts when less is allocated, the period ends, or the budget grows",
            )
