"""Rules that say which replica of which pool a process or a pod is, and whose."""

from __future__ import annotations

import re
from string import Template
from typing import Annotated, Any, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from schemas.base import Name, Ratio

CONTAINER_SHOWN = 12
_NAMES: TypeAdapter[str] = TypeAdapter(Name)


class Subject(NamedTuple):
    """What rules look at: a process, or a pod of which no process is known yet."""

    node: str
    pod: str = ""
    """`namespace:name`."""
    container: str = ""
    """Id: 64 hex digits."""
    container_name: str = ""
    process: str = ""
    commands: tuple[str, ...] = ()
    """Command lines of the process and of those above it."""


class Owner(NamedTuple):
    """What a rule says."""

    replica: str
    pool: str
    tenant: str | None = None
    gpu_share: float | None = None


def _compiled(text: str) -> str:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"no regular expression: {error}") from None
    return text


Pattern = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_compiled)]
Text = Annotated[str, Field(min_length=1, max_length=200)]


class Match(BaseModel):
    """Patterns, all of which must fit: `pod` and `container` the whole text, `command` a part of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pod: Pattern | None = None
    container: Pattern | None = None
    command: Pattern | None = None

    def patterns(self) -> list[str]:
        """Those that are given."""
        return [one for one in (self.pod, self.container, self.command) if one is not None]

    def groups(self, subject: Subject) -> dict[str, str] | None:
        """Named groups of the patterns where they fit; else None."""
        found: dict[str, str] = {}
        for pattern, texts, test in (
            (self.pod, (subject.pod, subject.pod.partition(":")[2]), re.fullmatch),
            (self.container, _containers(subject), re.fullmatch),
            (self.command, subject.commands, re.search),
        ):
            if pattern is None:
                continue
            fits = next((fit for text in texts if text and (fit := test(pattern, text))), None)
            if fits is None:
                return None
            found.update({name: value or "" for name, value in fits.groupdict().items()})
        return found


def _containers(subject: Subject) -> tuple[str, ...]:
    return subject.container_name, subject.container[:CONTAINER_SHOWN], subject.container


class Told(Match):
    """What an entry of `replicas` says beside the replica: its processes, and whose it is."""

    tenant: Name | None = None


_KNOWN = ("node", "namespace", "pod", "container", "process")


class Rule(Match):
    """What fits is a replica of `pool`.

    Texts may hold `$node`, `$namespace`, `$pod`, `$container`, `$process`, and named groups of the patterns.
    """

    pool: Text
    replica: Text | None = Field(None, description="Default: $pod.")
    tenant: Text | None = None
    gpu_share: Ratio | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if not self.patterns():
            raise ValueError("a rule needs `pod`, `container` or `command`")
        if self.replica is None and self.pod is None:
            raise ValueError("a rule without `pod` needs `replica`, e.g. $node-$port with a group (?P<port>...)")
        groups = {name for pattern in self.patterns() for name in re.compile(pattern).groupindex}
        for text in (self.pool, self.replica or "", self.tenant or ""):
            if not Template(text).is_valid():
                raise ValueError(f"{text!r}: write $$ for a dollar sign")
            if unknown := set(Template(text).get_identifiers()) - groups - set(_KNOWN):
                raise ValueError(f"${min(unknown)} is neither one of {', '.join(_KNOWN)} nor a group of its patterns")
        return self

    def owner(self, subject: Subject) -> Owner | None:
        """Who it is; None: it does not fit. Raises ValueError for a name that cannot be one."""
        groups = self.groups(subject)
        if groups is None:
            return None
        namespace, _, pod = subject.pod.partition(":")
        container = subject.container_name or subject.container[:CONTAINER_SHOWN]
        known: dict[str, Any] = dict(
            zip(_KNOWN, (subject.node, namespace, pod, container, subject.process), strict=True)
        )
        replica, pool, tenant = (
            None if text is None else _name(Template(text).substitute(known | groups))
            for text in (self.replica or "$pod", self.pool, self.tenant)
        )
        return Owner(replica or "", pool or "", tenant, self.gpu_share)


def _name(text: str) -> str:
    name = _NAMES.validate_python(text)
    if not name.isprintable():
        raise ValueError(f"{name!r} is no name")
    return name
