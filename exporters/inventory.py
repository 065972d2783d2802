"""Which replica of which pool runs on which GPUs of a host: a YAML file that somebody, or something, keeps.

replicas:
  chat-0: {pool: chat, gpus: [0, 1]}
  chat-1: {pool: chat, gpus: [2], gpu_share: 0.5, state: starting}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from schemas.base import refusal
from schemas.errors import SettingsError
from schemas.node import ReplicaEntry

BYTES_MAX = 1024 * 1024
REPLICAS_MAX = 1024


class Holdings:
    """The replicas of a mapping file, with since when each has had its state. Without a file: none."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._stamp: tuple[int, int] | None = None
        self._replicas: dict[str, ReplicaEntry] = {}

    def replicas(self) -> list[ReplicaEntry]:
        """As the file last said, in its order."""
        return list(self._replicas.values())

    def refresh(self, now_s: float) -> bool:
        """Reads the file if it has changed (then True). `now_s`: fleet time. Raises SettingsError; what was stays."""
        if self.path is None:
            return False
        try:
            status = self.path.stat()
            stamp = (status.st_mtime_ns, status.st_size)
            if stamp == self._stamp:
                return False
            self._stamp = stamp
            if status.st_size > BYTES_MAX:
                raise SettingsError(f"{self.path}: {status.st_size} bytes: at most {BYTES_MAX}")
            found = yaml.safe_load(self.path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            raise SettingsError(f"{self.path}: cannot be read as YAML: {error}") from None
        self._replicas = self._checked(found, now_s)
        return True

    def _checked(self, found: Any, now_s: float) -> dict[str, ReplicaEntry]:
        entries = found.get("replicas") if isinstance(found, dict) else None
        if not isinstance(entries, dict) or len(entries) > REPLICAS_MAX:
            raise SettingsError(
                f"{self.path}: write `replicas:` with at most {REPLICAS_MAX} entries `name: {{pool: p, gpus: [0]}}`"
            )
        out = {}
        for name, entry in entries.items():
            if not isinstance(entry, dict):
                raise SettingsError(f"{self.path}: replicas.{name}: {entry!r}: write {{pool: p, gpus: [0]}}")
            before = self._replicas.get(str(name))
            state = entry.get("state", "ready")
            since = before.since_s if before is not None and before.state == state else now_s
            fields = {"state": state, "since_s": since, **entry, "replica": str(name)}
            try:
                out[str(name)] = ReplicaEntry.model_validate(fields)
            except ValidationError as error:
                raise SettingsError(f"{self.path}: replicas.{name}.{refusal('node.inventory', error)}") from None
        return out
