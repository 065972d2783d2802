"""Scale-downs: what holds them, and what must not."""

from __future__ import annotations

from tests.models.pool.signals import T0
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
