"""The exception tree.

FleetloopError                  anything that we raise on purpose
├── InvalidInput                somebody else's data is wrong: field, value, remedy
│   └── InvalidRecord           ... and it came on a topic: also a reason code for dead.letters
├── SettingsError               a process cannot start with what it was told
├── UnavailableError            something outside cannot be reached or had
└── CheckpointMismatch          a dump of another level, topic, partition or format
"""

from __future__ import annotations


class FleetloopError(Exception):
    """Anything that Fleetloop raises on purpose. The text says what to do about it."""


class InvalidInput(FleetloopError):
    """Input from outside is wrong: names the field, the value and the remedy."""

    def __init__(self, field: str, value: object, remedy: str) -> None:
        shown = repr(value)
        self.field = field
        self.value = shown if len(shown) <= 120 else shown[:117] + "..."
        self.remedy = remedy
        super().__init__(f"{field}: {self.value}: {remedy}")


class InvalidRecord(InvalidInput):
    """A record that cannot be taken; `reason` is the code that goes to dead.letters."""

    def __init__(self, reason: str, field: str, value: object, remedy: str) -> None:
        self.reason = reason
        super().__init__(field, value, remedy)


class SettingsError(FleetloopError):
    """A process cannot start with what it was told."""


class UnavailableError(FleetloopError):
    """Something outside (a broker, a download, a driver) cannot be reached or had."""


class CheckpointMismatch(FleetloopError):
    """A dump belongs to another level, topic, partition or format than the fold that loads it."""
