"""The fleet level: its fold, bound to `decision.events`."""

from models.fleet.fold import FleetFold

__all__ = ["FleetFold"]
