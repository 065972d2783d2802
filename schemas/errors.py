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
        self.field = _bounded(field, 200)
        self.value = _bounded(repr(value), 120)
        self.remedy = _bounded(remedy, 1000)
        super().__init__(f"{self.field}: {self.value}: {self.remedy}")


def _bounded(text: str, length: int) -> str:
    """Texts quote what a stranger sent: keep them short, and valid UTF-8."""
    text = text.encode("utf-8", "replace").decode()
    return text if len(text) <= length else text[: length - 3] + "..."


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
