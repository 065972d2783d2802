"""The real control port of a simulated fleet, without its process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from simulator.control import make_app
from simulator.fleet import Fleet
from simulator.scenario import load_scenario


@pytest.fixture
def demo_fleet() -> Callable[[], tuple[Any, Any]]:
    """Makes (fleet, its control application); the token is `t0ken`."""

    def make() -> tuple[Any, Any]:
        fleet = Fleet(load_scenario("demo"))
        return fleet, make_app(fleet, "t0ken", dict, dict, str, CollectorRegistry())

    return make
