"""What is scraped: targets, from a list or from Prometheus-style labels, and the set that several sources make up."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote, urlencode, urlsplit

from pydantic import TypeAdapter, ValidationError

from schemas.base import Name
from schemas.errors import SettingsError

_NAME: TypeAdapter[str] = TypeAdapter(Name)
_SYNTAX = "write replica=http://host:port/metrics, then perhaps ;pool=..;node=..;model=..;engine=..;gpus=..;gpu_type=.."
GPUS_MAX = 64
_POD = "__meta_kubernetes_pod_"
LABELS: dict[str, tuple[str, ...]] = {
    "replica": ("replica", f"{_POD}name", "instance", "__address__"),
    "pool": (
        "pool",
        f"{_POD}annotation_fleetloop_pool",
        f"{_POD}label_fleetloop_pool",
        f"{_POD}label_app_kubernetes_io_name",
        f"{_POD}label_app",
    ),
    "node": ("node", f"{_POD}node_name", "nodename", "kubernetes_node"),
    "model": ("model", "model_name", f"{_POD}annotation_fleetloop_model", f"{_POD}label_model"),
    "engine": ("engine", f"{_POD}annotation_fleetloop_engine", f"{_POD}label_engine"),
    "gpus": ("gpus", f"{_POD}annotation_fleetloop_gpus", f"{_POD}gpus"),
    "gpu_type": ("gpu_type", f"{_POD}annotation_fleetloop_gpu_type", f"{_POD}label_gpu_type"),
}
"""What is known of a target -> labels that say it, best first."""
FIELDS = tuple(LABELS)
DNS_SCHEMES = ("dns+http", "dns+https", "srv+http", "srv+https")


class SourceError(Exception):
    """A source of targets cannot be read now; what it last said stays."""


@dataclass(frozen=True)
class Target:
    """One endpoint. None: not known."""

    replica: str
    url: str
    pool: str | None = None
    node: str | None = None
    model: str | None = None
    engine: str | None = None
    gpus: int | None = None
    gpu_type: str | None = None
    pod: str = ""
    """Kubernetes `namespace:pod`."""


class Source(Protocol):
    """Where targets come from."""

    name: str
    period_s: float
    odd: Mapping[str, str]
    """What it named that cannot be a target, and why; as of the last look."""

    async def targets(self) -> list[Target]:
        """As they are now. Raises SourceError."""


def target(url: str, known: Mapping[str, Any], pod: str = "") -> Target:
    """A target from what is known of it, by the names of FIELDS. Raises ValueError."""
    found: dict[str, Any] = {}
    for field in FIELDS:
        value = known.get(field)
        if value is None or value == "":
            continue
        if field == "gpus":
            if not re.fullmatch(r"\d{1,2}", str(value)) or not int(value) <= GPUS_MAX:
                raise ValueError(f"gpus {value!r}: write a number up to {GPUS_MAX}")
            found[field] = int(value)
            continue
        try:
            found[field] = _NAME.validate_python(value)
        except ValidationError:
            found[field] = "\n"
        if not found[field].isprintable():
            raise ValueError(f"{field} {value!r}: write 1 to 200 printable characters without slash")
    if "replica" not in found:
        raise ValueError("it has no name")
    return Target(url=url, pod=pod, **found)


def checked_url(url: str, schemes: Sequence[str] = ("http", "https")) -> str:
    """The URL. Raises ValueError (that never shows a password)."""
    parts = urlsplit(url)
    if parts.scheme not in schemes or not parts.hostname or parts.port == 0:
        raise ValueError(f"needed is one of {', '.join(schemes)} with a host")
    if "@" in parts.netloc:
        raise ValueError("no user or password in a URL: they have settings of their own")
    return url


def parse_target(text: str) -> Target:
    """`replica=url[;field=value]...`. Raises ValueError."""
    name, _, rest = text.partition("=")
    url, *more = rest.split(";")
    pairs = [item.partition("=") for item in more if item.strip()]
    known = {key.strip(): value.strip() for key, _, value in pairs}
    try:
        if unknown := set(known) - set(FIELDS[1:]):
            raise ValueError(f"{sorted(unknown)[0]!r} is not known")
        return target(checked_url(url, ("http", "https", *DNS_SCHEMES)), {**known, "replica": name.strip()})
    except ValueError as error:
        raise ValueError(f"{text.rpartition('@')[2]!r}: {error}: {_SYNTAX}") from None


class Rules:
    """Which labels say what. Parameters: `given` are `field=label` that come before the usual ones."""

    def __init__(self, given: Iterable[str] = ()) -> None:
        self._labels: dict[str, tuple[str, ...]] = dict(LABELS)
        for item in given:
            field, _, label = item.partition("=")
            if field not in LABELS or not label:
                raise ValueError(f"{item!r}: write field=label, with a field of {', '.join(FIELDS)}")
            self._labels[field] = (label, *self._labels[field])

    def target(self, labels: Mapping[str, str]) -> Target:
        """A target from Prometheus labels, `__address__` among them. Raises ValueError."""
        known = {
            field: next((labels[name] for name in names if labels.get(name)), None)
            for field, names in self._labels.items()
        }
        known["replica"] = (known["replica"] or "").replace("/", "-")
        address = labels.get("__address__", "")
        if not re.fullmatch(r"[\w.\-:\[\]%]+", address):
            raise ValueError(f"address {address!r}: write host:port")
        path = labels.get("__metrics_path__") or "/metrics"
        query = urlencode({k.removeprefix("__param_"): v for k, v in labels.items() if k.startswith("__param_")})
        scheme = labels.get("__scheme__") or "http"
        url = f"{scheme}://{address}{quote(path, safe='/%')}{'?' if query else ''}{query}"
        pod = labels.get(f"{_POD}name")
        return target(checked_url(url), known, f"{labels.get('__meta_kubernetes_namespace', '')}:{pod}" if pod else "")

    def groups(self, found: Any, source: str) -> list[Target]:
        """Targets of Prometheus target groups: `[{"targets": [...], "labels": {...}}]`. Raises SourceError."""
        out = []
        if not isinstance(found, list):
            raise SourceError(f"{source}: needed is a list of target groups")
        for group in found:
            if not isinstance(group, dict) or not isinstance(group.get("targets"), list):
                raise SourceError(f"{source}: a group needs a list `targets`")
            labels = group.get("labels", {})
            if not isinstance(labels, dict):
                raise SourceError(f"{source}: `labels` of a group must be a mapping")
            shared = {str(key): str(value) for key, value in labels.items()}
            for address in group["targets"]:
                try:
                    out.append(self.target({**shared, "__address__": str(address)}))
                except ValueError as error:
                    raise SourceError(f"{source}: {address!r}: {error}") from None
        return out


class TargetSet:
    """What all sources say together, bounded. A replica is taken from the first source that names it."""

    def __init__(self, targets_max: int) -> None:
        self.targets_max = targets_max
        self._by_source: dict[str, list[Target]] = {}
        self._invalid: dict[str, int] = {}
        self.left_out: Counter[str] = Counter()
        """Targets that are not scraped now: `bound`, `name_taken`, `invalid`."""

    def put(self, source: str, targets: list[Target], invalid: int = 0) -> None:
        """What a source says now, and how much of it cannot be a target."""
        self._by_source[source], self._invalid[source] = targets, invalid

    def targets(self) -> dict[str, Target]:
        """Replica -> target."""
        found: dict[str, Target] = {}
        self.left_out = +Counter({"invalid": sum(self._invalid.values())})
        for targets in self._by_source.values():
            for one in targets:
                if one.replica in found:
                    self.left_out["name_taken"] += found[one.replica] != one
                elif len(found) == self.targets_max:
                    self.left_out["bound"] += 1
                else:
                    found[one.replica] = one
        return found


def setting_error(name: str, error: ValueError) -> SettingsError:
    """A SettingsError of a source's setting."""
    return SettingsError(f"FLEETLOOP_ENGINES_{name}: {error}")
