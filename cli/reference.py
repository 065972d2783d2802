"""Builds docs/reference.md from the code: commands, settings, objects, topics, records, metrics."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from pydantic import BaseModel, SecretStr

from cli import collect
from cli.console import EXIT_CODES
from cli.meanings import FOLD_METRICS, REASONS

HEAD = """# Reference

Generated from the code by `make docs`; a test fails where it differs. How it all works:
[architecture](architecture.md); running it: [operations](operations.md); the life of a decision:
[decisions](decisions.md); producing records from any language: [formats](formats.md).
"""
BOUNDS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minLength": "≥ {} characters",
    "maxLength": "≤ {} characters",
    "maxItems": "≤ {} entries",
    "maxProperties": "≤ {} entries",
    "const": "{}",
}
"""Word of JSON Schema -> how it is shown."""


def reference() -> str:
    """The whole document."""
    from cli.main import app

    sections = (
        _commands(collect.commands(app)),
        _settings(),
        _objects(),
        _topics(),
        _records(),
        _metrics(),
    )
    return HEAD + "".join("\n" + "\n".join(section) + "\n" for section in sections)


def _table(columns: str, rows: Iterable[Iterable[object]]) -> Iterator[str]:
    names = columns.split("|")
    yield "| " + " | ".join(names) + " |"
    yield "|" + "---|" * len(names)
    for row in rows:
        cells = (str(cell).replace("|", "\\|").replace("\n", " ") for cell in row)
        yield "| " + " | ".join(cells) + " |"


def _code(value: object) -> str:
    return f"`{value}`" if str(value) else ""


# -- commands --------------------------------------------------------------------------------------------------


def _commands(commands: Iterable[collect.Command]) -> Iterator[str]:
    yield "## Commands\n"
    yield "Data goes to stdout, everything else to stderr. Exit codes:\n"
    yield from _table("code|means", EXIT_CODES.items())
    for command in commands:
        yield f"\n### `{command.name}`\n"
        yield re.sub(r"\[/?[a-z ]*\]", "", command.help)
        if command.parameters:
            yield ""
            yield from _table(
                "parameter|default|what it is",
                (
                    (_code(p.name), p.default, p.help + (f" Environment: `{p.variable}`." if p.variable else ""))
                    for p in command.parameters
                ),
            )


# -- settings and objects --------------------------------------------------------------------------------------


def _fields(cls: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, ...]]:
    """(name, default, bounds, description) of each field."""
    schema = cls.model_json_schema()
    for name, field in cls.model_fields.items():
        found = schema["properties"][name]
        shown = prefix + name.upper() if prefix else name
        yield _code(shown), _default(field), bounds(found, schema), field.description or ""


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    default = field.default
    unset = field.default_factory is not None or default is None or default == "" or isinstance(default, SecretStr)
    return "" if unset else _code(str(default).lower() if isinstance(default, bool) else default)


def bounds(schema: dict[str, Any], root: dict[str, Any]) -> str:
    """Bounds of a property in words, those of its parts included."""
    if "$ref" in schema:
        return bounds(root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    words = {word: schema[word] for word in BOUNDS if word in schema}
    found = [BOUNDS[word].format(f"{value:,}" if isinstance(value, int) else value) for word, value in words.items()]
    if "enum" in schema:
        found.append("one of " + ", ".join(_code(choice) for choice in schema["enum"]))
    for part in schema.get("anyOf", []):
        found.append(bounds(part, root))
    values = schema.get("additionalProperties")
    if isinstance(values, dict) and (inside := bounds(values, root)):
        found.append(f"values {inside}")
    return ", ".join(item for item in found if item)


def _settings() -> Iterator[str]:
    from streams.settings import ELSEWHERE

    yield "## Settings\n"
    yield (
        "A process is told only where it connects and its bounds. From the environment, or from the YAML file that "
        "`FLEETLOOP_SETTINGS_FILE` names (name without prefix, in lower case; only for the first table); "
        "the environment wins. What is computed with comes by `fleetloop apply` (next section)."
    )
    known = set()
    for cls in collect.settings_classes():
        prefix = cls.model_config["env_prefix"]
        yield f"\n### `{prefix}*`\n"
        yield (cls.__doc__ or "").split("\n")[0] + "\n"
        rows = list(_fields(cls, prefix))
        known |= {row[0].strip("`") for row in rows}
        yield from _table("variable|default|bounds|what it is", rows)
    yield "\n### Others\n"
    rest = {name: text for name, text in ELSEWHERE.items() if name not in known}
    yield from _table("variable|what it is", ((_code(name), rest[name]) for name in sorted(rest)))


def _objects() -> Iterator[str]:
    from schemas.config import SPECS

    yield "## Objects of configuration\n"
    yield (
        "YAML documents of `kind`, `name` and `spec` for `fleetloop apply`; `deleted: true` removes one. They go "
        "through the log, so a replay computes with what held then. `limits` are the bounds of every fold."
    )
    for kind, cls in SPECS.items():
        yield f"\n### `{kind}`\n"
        written = " Written by `fleetloop init`, not by `apply`." if kind == "deployment" else ""
        yield (cls.__doc__ or "").split("\n")[0] + written + "\n"
        yield from _table("field|default|bounds|what it is", _fields(cls))


# -- topics and records ----------------------------------------------------------------------------------------


def _topics() -> Iterator[str]:
    from schemas.topics import TOPICS

    yield "## Topics\n"
    yield (
        "Names are given without `FLEETLOOP_TOPIC_PREFIX`. Every topic has `message.timestamp.type=LogAppendTime`: "
        "the broker's append time is the clock.\n"
    )
    yield from _table(
        "topic|what it carries|key|kinds|partitions (local)|cleanup|kept|record at most",
        (
            (
                _code(t.name),
                t.doc,
                t.key,
                ", ".join(map(_code, t.kinds)),
                f"{t.partitions} ({t.partitions_local})",
                t.cleanup,
                "for ever" if t.retention_ms < 0 else f"{t.retention_ms / 86_400_000:g} d",
                f"{t.max_message_bytes // 1024:,} KiB",
            )
            for t in TOPICS.values()
        ),
    )


def _records() -> Iterator[str]:
    from schemas import generate
    from schemas.base import KINDS
    from schemas.columns import COLUMNAR
    from schemas.topics import TOPICS, ce_type

    yield "## Records\n"
    yield (
        "Header `ce_type` is `fleetloop.<kind>.v1`. JSON Schema of every kind, Arrow schemas and `asyncapi.yaml` lie "
        f"in `schemas/{generate.GENERATED.name}/` (`fleetloop schemas write`).\n"
    )
    rows = []
    for kind in dict.fromkeys(kind for topic in TOPICS.values() for kind in topic.kinds):
        columns, cls = COLUMNAR.get(ce_type(kind)), KINDS.get(ce_type(kind))
        if columns is not None:
            rows.append((_code(kind), "Arrow or JSON" if columns.json_too else "Arrow", columns.doc))
        elif cls is not None:
            rows.append((_code(kind), "JSON", (cls.__doc__ or "").split("\n")[0]))
    yield from _table("kind|encoding|what it is", rows)
    yield "\n### Why a record is refused\n"
    yield "It goes to `dead.letters` with reason, field, value, remedy, coordinates and its bytes.\n"
    yield from _table("reason|means", ((_code(name), text) for name, text in REASONS.items()))


# -- metrics ---------------------------------------------------------------------------------------------------


def _metrics() -> Iterator[str]:
    from streams import metrics

    yield "## Metrics\n"
    yield (
        "Prometheus, at `/metrics` of each process (see the ports in [operations](operations.md)), beside the usual "
        "`process_*` and `python_*`. A value that is unknown is left out, never 0."
    )
    yield "\n### Workers\n"
    level = [(f"fleetloop_{name}_total", text, "level, partition") for name, text in metrics.PARTITION_COUNTERS.items()]
    level += [(f"fleetloop_{name}", text, "level, partition") for name, text in metrics.PARTITION_GAUGES.items()]
    level += [(f"fleetloop_{name}", text, "level") for name, text in metrics.LEVEL_GAUGES.items()]
    yield from _table("metric|what it is|labels", ((_code(name), text, labels) for name, text, labels in level))
    yield "\n### Folds\n"
    yield "What a level's computation counts about its partition; labels level, partition.\n"
    yield from _table(
        "metric|levels|what it is",
        (
            (_code(metrics.FOLD_PREFIX + name), _levels(levels), FOLD_METRICS.get(name, "?"))
            for name, levels in collect.fold_metrics().items()
        ),
    )
    for package, found in process_metrics().items():
        yield f"\n### `{package}`\n"
        yield from _table("metric|what it is", ((_code(name), text) for name, text in found.items()))


def _levels(levels: set[str]) -> str:
    return "all" if "all" in levels else ", ".join(level for level in collect.LEVELS if level in levels)


def process_metrics() -> dict[str, dict[str, str]]:
    """Package -> metric -> help, of the processes at the edge."""
    found = {package: collect.edge_metrics(package) for package in ("views", "exporters", "executors", "simulator")}
    concrete = _views_metrics()
    patterns = [re.sub(r"<\w+>", r"\\w+", name) for name in found["views"] if "<" in name]
    rest = {name: text for name, text in found["views"].items() if "<" not in name}
    assert all(any(re.fullmatch(p, name) for name in concrete) for p in patterns), patterns
    found["views"] = dict(sorted({**rest, **concrete}.items()))
    return {package: metrics for package, metrics in found.items() if metrics}


def _views_metrics() -> dict[str, str]:
    """The views build names from tables: they are asked for them, with nothing to show."""
    from views.actions import Actions
    from views.metrics import RowsCollector
    from views.rows import Rows

    rows = Rows()
    families = RowsCollector(rows, Actions(rows, None, None), lambda: 0).collect()
    return {f.name + ("_total" if f.type == "counter" else ""): f.documentation for f in families}
