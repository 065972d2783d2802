"""Which replica of which pool runs on which GPUs of a host: what a file says, and what its rules find.

replicas:                                   # told: somebody, or something, keeps the file
  chat-0: {pool: chat, gpus: [0, 1]}
  chat-1: {pool: chat, gpus: [2], gpu_share: 0.5, state: starting, tenant: acme, command: "--port 8001"}
match:                                      # found: by pods that hold GPUs, and processes that run on them
  - {pod: "prod:(?P<pool>.+)-[a-z0-9]+-[a-z0-9]{5}", pool: $pool}
  - {command: 'vllm serve .*--port (?P<port>\\d+)', pool: chat, replica: "$node-$port"}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from exporters.matching import Owner, Rule, Subject, Told
from schemas.base import refusal
from schemas.errors import SettingsError
from schemas.node import ReplicaEntry, ReplicaState

BYTES_MAX = 1024 * 1024
REPLICAS_MAX = 1024
GPUS_MAX = 64
"""GPUs of one replica on a node."""
RULES_MAX = 256


class Seen(NamedTuple):
    """One process on one GPU (gone: without a subject), or a pod that was given it (`key` 0)."""

    gpu: int
    key: int
    """Process id on the host."""
    start: str
    subject: Subject
    holds: bool
    """It has memory on the GPU."""


@dataclass(slots=True)
class _Told:
    entry: ReplicaEntry
    match: Told


@dataclass(slots=True)
class _Found:
    owner: Owner
    gpus: dict[int, None] = field(default_factory=dict)
    holds: bool = False


class Holdings:
    """The replicas of a host, with since when each has had its state. Without a file: none."""

    def __init__(self, path: Path | None, node: str = "") -> None:
        self.path, self.node = path, node
        self.failures: Counter[str] = Counter()
        """What rules gave that cannot be, since the start."""
        self._stamp: tuple[int, int] | None = None
        self._told: dict[str, _Told] = {}
        self._rules: list[Rule] = []
        self._found: dict[str, ReplicaEntry] = {}
        self._adopted: dict[tuple[int, str], str] = {}
        self._judged: dict[Subject, Owner | None] = {}
        self._replicas: list[ReplicaEntry] = []

    def replicas(self) -> list[ReplicaEntry]:
        """Those that the file tells, in its order, then those found. Another list whenever one changes."""
        return self._replicas

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
            content = yaml.safe_load(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:  # ValueError: no text; no such date
            raise SettingsError(f"{self.path}: cannot be read as YAML: {error}") from None
        told, rules = self._checked(content, now_s)
        self._told, self._rules, self._judged = told, rules, {}
        self._publish()
        return True

    def observe(self, seen: Iterable[Seen], known: Iterable[int], now_s: float) -> dict[tuple[int, int], Owner]:
        """Takes what is on the GPUs now; gives (GPU, process id) -> whose it is, where that is known.

        `known`: GPUs whose processes the driver told. A replica on none of them counts as ready.
        """
        seen, owners, free = list(seen), {}, []
        found: dict[str, _Found] = {}
        subjects = {one.subject for one in seen}
        self._judged = {subject: owner for subject, owner in self._judged.items() if subject in subjects}
        for one in seen:
            if one.subject not in self._judged:
                self._judged[one.subject] = self._judge(one.subject)
            owner = self._judged[one.subject]
            if owner is None:
                free.append(one)
                continue
            owners[one.gpu, one.key] = owner
            if owner.replica not in self._told:
                self._add(found, owner, one)
        owners.update(self._adopt(free))
        self._settle(found, set(known), now_s)
        return owners

    # -- what is found ---------------------------------------------------------------------------------------

    def _judge(self, subject: Subject) -> Owner | None:
        for name, told in self._told.items():
            if told.match.patterns() and told.match.groups(subject) is not None:
                return Owner(name, told.entry.pool, told.match.tenant)
        for rule in self._rules:
            try:
                owner = rule.owner(subject)
            except ValueError:
                self.failures["match"] += 1  # what it made of this process is no name
                continue
            if owner is not None:
                return owner
        return None

    def _add(self, found: dict[str, _Found], owner: Owner, one: Seen) -> None:
        if owner.replica not in found:
            if len(found) + len(self._told) >= REPLICAS_MAX:
                self.failures["replicas"] += 1
                return
            found[owner.replica] = _Found(owner)
        into = found[owner.replica]
        if into.owner.pool != owner.pool:
            self.failures["pools"] += 1  # one name for replicas of two pools: the first keeps it
        elif len(into.gpus) < GPUS_MAX or one.gpu in into.gpus:
            into.gpus[one.gpu] = None
            into.holds |= one.holds

    def _adopt(self, free: list[Seen]) -> dict[tuple[int, int], Owner]:
        """Processes that fit nothing, on a GPU for which the file tells one replica: the first is its own.

        A second one beside it is somebody else's: that it belongs to the replica would hide who disturbs it.
        """
        out: dict[tuple[int, int], Owner] = {}
        adopted: dict[tuple[int, str], str] = {}
        on: dict[int, list[str]] = {}
        for name, told in self._told.items():
            if not told.match.patterns():
                for gpu in told.entry.gpus:
                    on.setdefault(gpu, []).append(name)
        for gpu, names in on.items():
            here = [one for one in free if one.gpu == gpu and one.key and len(names) == 1]
            groups = {one.subject.container or one.key for one in here}
            for one in here:
                name, process = names[0], (one.key, one.start)
                if len(groups) == 1 or self._adopted.get(process) == name:
                    adopted[process] = name
                    told = self._told[name]
                    out[gpu, one.key] = Owner(name, told.entry.pool, told.match.tenant)
        self._adopted = adopted
        return out

    def _settle(self, found: Mapping[str, _Found], known: set[int], now_s: float) -> None:
        crowd = Counter(gpu for one in found.values() for gpu in one.gpus)
        crowd.update(gpu for told in self._told.values() for gpu in told.entry.gpus)
        entries = {}
        for name, one in found.items():
            gpus = sorted(one.gpus)
            share = one.owner.gpu_share
            if share is None:
                share = sum(1 / crowd[gpu] for gpu in gpus) / len(gpus)
            state: ReplicaState = "ready" if one.holds or known.isdisjoint(gpus) else "starting"
            before = self._found.get(name)
            since_s = before.since_s if before is not None and before.state == state else now_s
            entries[name] = ReplicaEntry(
                replica=name, pool=one.owner.pool, gpus=gpus, gpu_share=share, state=state, since_s=since_s
            )
        if entries != self._found:
            self._found = entries
            self._publish()

    def _publish(self) -> None:
        self._replicas = [
            *(told.entry for told in self._told.values()),
            *(entry for name, entry in self._found.items() if name not in self._told),
        ]

    # -- what is told ----------------------------------------------------------------------------------------

    def _checked(self, content: Any, now_s: float) -> tuple[dict[str, _Told], list[Rule]]:
        content = content if isinstance(content, dict) else {}
        entries, rules = content.get("replicas", {}), content.get("match", [])
        if not isinstance(entries, dict) or len(entries) > REPLICAS_MAX or not {"replicas", "match"} & set(content):
            raise SettingsError(
                f"{self.path}: write `replicas:` with at most {REPLICAS_MAX} entries `name: {{pool: p, gpus: [0]}}`, "
                "or `match:` with rules"
            )
        if not isinstance(rules, list) or len(rules) > RULES_MAX:
            raise SettingsError(f"{self.path}: write `match:` with at most {RULES_MAX} rules `- {{pod: ..., pool: p}}`")
        told = {str(name): self._entry(str(name), entry, now_s) for name, entry in entries.items()}
        return told, [self._valid(Rule, rule, f"match[{i}]") for i, rule in enumerate(rules)]

    def _entry(self, name: str, entry: Any, now_s: float) -> _Told:
        where = f"replicas.{name}"
        if not isinstance(entry, dict):
            raise SettingsError(f"{self.path}: {where}: {entry!r}: write {{pool: p, gpus: [0]}}")
        before = self._told.get(name)
        state = entry.get("state", "ready")
        since = before.entry.since_s if before is not None and before.entry.state == state else now_s
        own = {key: value for key, value in entry.items() if key not in Told.model_fields}
        match = {key: value for key, value in entry.items() if key in Told.model_fields}
        fields = {"state": state, "since_s": since, **own, "replica": name}
        return _Told(self._valid(ReplicaEntry, fields, where), self._valid(Told, match, where))

    def _valid(self, cls: Any, content: Any, where: str) -> Any:
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise SettingsError(f"{self.path}: {where}.{refusal('node.inventory', error)}") from None
