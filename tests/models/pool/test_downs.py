"""Scale-downs: what holds them, and what must not."""

from __future__ import annotations

from tests.models.pool.signals import T0, engine_window
from tests.models.pool.test_verify import World


def test_a_scale_down_has_been_wanted_for_so_long() -> None:
    """With `stabilisation_s` a pool asks for fewer only once fewer have been wanted all that time, so that no proposal
    is made only to be blocked; what is left is the most that was wanted meanwhile."""
    first, reasons = [], []
    for stabilisation_s in (0.0, 120.0):
        world = World(20, stabilisation_s=stabilisation_s)
        world.run(9.0, 6)
        world.run(2.0, 84)
        downs = [one for one in world.of("decision.proposed") if one["action"]["replicas"] < 9]
        first.append(downs[0]["at_s"] - T0)
        reasons += [one["reason"] for one in world.of("decision.proposed")]
    assert 110 < first[1] - first[0] <= 130
    assert any("wanted in the last 120 s" in reason for reason in reasons)


def _silence(world: World, windows: int, running: float) -> None:
    """No request window comes any more; engines say that so many run on each."""
    for _ in range(windows):
        start = world.second
        world.second += 10
        rows = [{"replica": f"r{i}", "running_last": running, "running_mean": running} for i in range(world.replicas)]
        for at_s in (0.2, 1.2):
            world.apply([engine_window(world.second + at_s, start, world.offset + 1, rows)])


def test_traffic_that_ends_lets_replicas_go() -> None:
    """A source of requests falls silent and every engine is idle: that is no load, not missing data."""
    world = World(8, stabilisation_s=0.0)
    world.run(5.0, 62)
    _silence(world, 66, running=0.0)
    assert world.of("decision.proposed")[-1]["action"]["replicas"] <= 2
    assert "stale_data" not in [one["finding"] for one in world.of("finding")]


def test_a_source_that_falls_silent_while_engines_are_busy_holds() -> None:
    """The same silence with requests running is missing data: nothing is let go, and that is said."""
    world = World(8, stabilisation_s=0.0)
    world.run(5.0, 62)
    before = len(world.of("decision.proposed"))
    _silence(world, 66, running=2.0)
    assert len(world.of("decision.proposed")) == before
    assert "stale_data" in [one["finding"] for one in world.of("finding")]
