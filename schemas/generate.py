"""Writes `schemas/generated/` from the records and the topic registry, and tells where it has drifted.

Per JSON kind (and per kind of configuration object) a JSON Schema, per columnar kind a JSON Schema of one row and
its Arrow schema as text, and `asyncapi.yaml` over all topics. The same code gives the same bytes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

from schemas import config, costs, deadletters, decisions, findings, forecasts, node, requests, signals
from schemas.base import KINDS, MS_LIMIT_S, Record
from schemas.columns import COLUMNAR, ROWS_MAX, TEXT_MAX, Column, Columns
from schemas.config import SPECS
from schemas.log import CONTENT_ARROW, CONTENT_JSON
from schemas.topics import TOPICS, Topic, ce_type

FAMILIES = (config, costs, deadletters, decisions, findings, forecasts, node, requests, signals)
"""Importing them fills the registries of kinds; every module with records is named here."""

GENERATED = Path(__file__).parent / "generated"
CONTRACT_VERSION = "1.0.0"
"""Version of the wire contract. A second major version of a kind is a new `ce_type`."""
DIALECT = "https://json-schema.org/draft/2020-12/schema"
BINDING = "0.5.0"

FROM_OUTSIDE: dict[str, tuple[str, ...]] = {
    "node.samples": ("gpu.samples", "engine.samples", "node.inventory"),
    "request.traces": ("request.rows",),
    "fleet.config": ("config",),
    "decision.events": ("command", "executor.result"),
}
"""Topic -> kinds that others send; everything else is written by Fleetloop's own levels."""


def files() -> dict[str, str]:
    """Every generated file: name -> text."""
    out: dict[str, str] = {}
    for cls in KINDS.values():
        out[f"{cls.kind}.schema.json"] = _json(record_schema(cls.kind, cls))
    for name, cls in SPECS.items():
        out[f"config.{name}.schema.json"] = _json(record_schema(f"config.{name}", cls))
    for columns in COLUMNAR.values():
        out[f"{columns.kind}.schema.json"] = _json(row_schema(columns))
        out[f"{columns.kind}.arrow.txt"] = arrow_text(columns)
    out["asyncapi.yaml"] = yaml.safe_dump(asyncapi(), sort_keys=False, allow_unicode=True, width=110)
    return out


def write(folder: Path | str = GENERATED) -> list[str]:
    """Writes every file and removes those no longer generated; gives the names of what changed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    changed = [line.partition(":")[0] for line in check(folder)]
    wanted = files()
    for name in changed:
        if name in wanted:
            (folder / name).write_text(wanted[name], encoding="utf-8")
        else:
            (folder / name).unlink()
    return changed


def check(folder: Path | str = GENERATED) -> list[str]:
    """Differences between a folder and what would be written, `file: what`; empty when there is none."""
    folder = Path(folder)
    wanted = files()
    there = {p.name for p in folder.iterdir() if p.is_file()} if folder.is_dir() else set()
    out = [f"{name}: missing" for name in wanted if name not in there]
    out += [f"{name}: no longer generated" for name in sorted(there - set(wanted) - {"__init__.py"})]
    for name, text in wanted.items():
        if name not in there:
            continue
        found = (folder / name).read_text(encoding="utf-8", errors="replace")
        if found != text:
            out.append(f"{name}: {_first_difference(found, text)}")
    return out


def _first_difference(found: str, wanted: str) -> str:
    old, new = found.splitlines(), wanted.splitlines()
    for number, (a, b) in enumerate(zip(old, new, strict=False), 1):
        if a != b:
            return f"line {number} is {a.strip()[:80]!r}, would be {b.strip()[:80]!r}"
    return f"has {len(old)} lines, would have {len(new)}"


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


# -- JSON Schema ---------------------------------------------------------------------------------------------


def record_schema(kind: str, cls: type[Record]) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a JSON kind: what is accepted, with bounds and descriptions."""
    schema = cls.model_json_schema(mode="validation")
    _untitled(schema)
    return {"$schema": DIALECT, "title": kind, **schema}


def _untitled(schema: Any) -> None:
    """Removes the titles that only repeat a field's name, and gives every plain string its bound."""
    if isinstance(schema, list):
        for item in schema:
            _untitled(item)
    if not isinstance(schema, dict):
        return
    if isinstance(schema.get("title"), str):
        del schema["title"]
    if schema.get("type") == "string" and not {"maxLength", "enum", "const"} & schema.keys():
        schema["maxLength"] = Record.model_config["str_max_length"]
    for item in schema.values():
        _untitled(item)


def row_schema(columns: Columns) -> dict[str, Any]:
    """JSON Schema of one row of a columnar kind, as a JSON producer sends it."""
    return {
        "$schema": DIALECT,
        "title": columns.kind,
        "description": columns.doc,
        "type": "object",
        "required": [c.name for c in columns.columns.values() if c.required],
        "properties": {c.name: _cell(c) for c in columns.columns.values()},
    }


def _cell(column: Column) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    if column.type == "text":
        schema |= {"type": "string", "minLength": 1, "maxLength": TEXT_MAX}
        schema["pattern"] = (
            r"^[^\u0000-\u001f\u007f-\u009f/]*$" if column.plain else r"^[^\u0000-\u001f\u007f-\u009f]*$"
        )
        if column.choices:
            schema = {"type": "string", "enum": list(column.choices)}
    elif column.type == "pairs":
        schema |= {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**32 - 1}}
    else:
        schema |= {"type": "integer" if column.type == "i64" else "number", "minimum": column.low}
        if column.high != math.inf:
            schema["maximum"] = column.high
        elif column.is_time:
            schema["exclusiveMaximum"] = MS_LIMIT_S
    for bound in ("minimum", "maximum", "exclusiveMaximum"):
        if bound in schema and float(schema[bound]).is_integer():
            schema[bound] = int(schema[bound])
    if not column.required:
        schema["type"] = [schema["type"], "null"]
        if "enum" in schema:
            schema["enum"] = [*schema["enum"], None]
    if column.unit:
        schema["x-unit"] = column.unit
    return {"description": column.doc, **schema}


# -- Arrow ---------------------------------------------------------------------------------------------------


def arrow_text(columns: Columns) -> str:
    """The Arrow schema of a columnar kind for people: a line a column with type, unit, bounds and meaning."""
    lines = [
        f"# {columns.kind}: {columns.doc}",
        "#",
        f"# Kafka headers: ce_type: {columns.type}; content-type: {CONTENT_ARROW}"
        + (f" (or {CONTENT_JSON}: one row or an array of rows)" if columns.json_too else ""),
        f"# Value: an Arrow IPC stream of at most {ROWS_MAX} rows. Any integer or float type is taken for a number,",
        "# plain or dictionary-encoded utf8 for text. Null is unknown, 0 is a measured zero; NaN is refused. Columns that",
        "# are not named here are ignored; columns without `not null` may be left out.",
        "#",
        "# Schema metadata (text):",
        f"#   kind: {columns.kind}",
        *(f"#   {name}: {doc}" for name, doc in columns.meta.items()),
        "",
    ]
    fields = {f.name: f for f in columns.arrow_schema()}
    for c in columns.columns.values():
        field = fields[c.name]
        unit = f" [{c.unit}]" if c.unit else ""
        lines.append(f"{c.name}: {field.type}{'' if field.nullable else ' not null'}{unit}  # {c.doc}{_bounds(c)}")
    return "\n".join(lines) + "\n"


def _bounds(column: Column) -> str:
    if column.type == "text":
        return f" One of: {', '.join(column.choices)}." if column.choices else ""
    if column.type == "pairs":
        return ""
    high = MS_LIMIT_S if column.is_time else column.high
    return f" {column.low:g} or more." if high == math.inf else f" {column.low:g} to {high:g}."


# -- AsyncAPI ------------------------------------------------------------------------------------------------


def asyncapi() -> dict[str, Any]:
    """AsyncAPI 3.0.0 over every topic of the registry, from Fleetloop's point of view."""
    kinds = dict.fromkeys(kind for topic in TOPICS.values() for kind in topic.kinds)
    messages: dict[str, Any] = {}
    for kind in kinds:
        messages |= _messages(kind)
    operations: dict[str, Any] = {}
    for topic in TOPICS.values():
        operations |= _operations(topic)
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Fleetloop",
            "version": CONTRACT_VERSION,
            "description": "Telemetry of GPU inference fleets in; explained, approved, executed and verified decisions "
            "out. `send` and `receive` are from Fleetloop's point of view.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": CONTENT_JSON,
        "servers": {
            "local": {
                "host": "127.0.0.1:9092",
                "protocol": "kafka",
                "description": "`fleetloop broker`; any Kafka by FLEETLOOP_BOOTSTRAP_SERVERS.",
            }
        },
        "channels": {topic.name: _channel(topic) for topic in TOPICS.values()},
        "operations": operations,
        "components": {
            "messages": messages,
            "schemas": {"cloudEventsHeaders": _HEADERS},
            "parameters": {
                "prefix": {
                    "description": "FLEETLOOP_TOPIC_PREFIX, so that deployments can share a cluster.",
                    "default": "",
                }
            },
        },
    }


_HEADERS = {
    "type": "object",
    "description": "CloudEvents in Kafka's binary mode. Header values are UTF-8 text.",
    "required": ["ce_type"],
    "properties": {
        "ce_specversion": {"type": "string", "const": "1.0"},
        "ce_type": {"type": "string", "description": "Kind and major version of the record."},
        "ce_id": {
            "type": "string",
            "description": "Names a fact: the first content of an id wins. Results: their name and version.",
        },
        "ce_source": {"type": "string", "description": "Who sent it; for results topic/partition folded from."},
        "ce_time": {
            "type": "string",
            "format": "date-time",
            "description": "Log time, where Fleetloop wrote it.",
        },
        "content-type": {"type": "string", "default": CONTENT_JSON},
    },
}


def _message_names(kind: str) -> list[str]:
    columns = COLUMNAR.get(ce_type(kind))
    return [kind, f"{kind}.json"] if columns is not None and columns.json_too else [kind]


def _channel(topic: Topic) -> dict[str, Any]:
    names = [name for kind in topic.kinds for name in _message_names(kind)]
    settings: dict[str, Any] = topic.config()
    settings |= {k: int(settings[k]) for k in ("retention.ms", "max.message.bytes")}
    settings["cleanup.policy"] = settings["cleanup.policy"].split(",")
    return {
        "address": "{prefix}" + topic.name,
        "title": topic.name,
        "description": f"{topic.doc} Key: {topic.key}."
        + (f" Log of the level `{topic.level}`." if topic.level else ""),
        "parameters": {"prefix": {"$ref": "#/components/parameters/prefix"}},
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in names},
        "bindings": {
            "kafka": {
                "topic": topic.name,
                "partitions": topic.partitions,
                "topicConfiguration": settings,
                "x-partitions-local": topic.partitions_local,
                "bindingVersion": BINDING,
            }
        },
    }


def _operations(topic: Topic) -> dict[str, Any]:
    outside = FROM_OUTSIDE.get(topic.name, ())
    own = [kind for kind in topic.kinds if kind not in outside]
    pairs = [("send", own)] if own else []
    if topic.level or outside:
        pairs.insert(0, ("receive", list(topic.kinds)))
    out = {}
    for action, kinds in pairs:
        out[f"{action}.{topic.name}"] = {
            "action": action,
            "channel": {"$ref": f"#/channels/{topic.name}"},
            "summary": f"The {topic.level} level reads its log." if action == "receive" else topic.doc,
            "messages": [
                {"$ref": f"#/channels/{topic.name}/messages/{name}"} for kind in kinds for name in _message_names(kind)
            ],
        }
    return out


def _messages(kind: str) -> dict[str, Any]:
    type = ce_type(kind)
    columns, record = COLUMNAR.get(type), KINDS.get(type)
    if columns is not None:
        row = {"$ref": f"./{kind}.schema.json"}
        arrow = _message(kind, type, columns.doc, CONTENT_ARROW)
        arrow["x-arrow-schema"] = f"{kind}.arrow.txt"
        arrow["payload"] = {"type": "array", "maxItems": ROWS_MAX, "items": row, "description": "Rows, as columns."}
        out = {kind: arrow}
        if columns.json_too:
            json_too = _message(f"{kind}.json", type, columns.doc, CONTENT_JSON)
            json_too["payload"] = {"oneOf": [row, {"type": "array", "maxItems": ROWS_MAX, "items": row}]}
            out[f"{kind}.json"] = json_too
        return out
    if record is not None:
        message = _message(kind, type, _first_line(record.__doc__), CONTENT_JSON)
        message["payload"] = {"$ref": f"./{kind}.schema.json"}
        return {kind: message}
    doc, payload = _OPAQUE[kind]
    message = _message(kind, type, doc, "application/octet-stream")
    message["payload"] = payload
    return {kind: message}


_OPAQUE: dict[str, tuple[str, dict[str, Any]]] = {
    "tick": (
        "An empty record by which a silent partition's log time moves on.",
        {"type": "string", "maxLength": 0},
    ),
    "checkpoint": (
        "State of one partition at one offset; read by the level that wrote it alone.",
        {"type": "string", "format": "binary"},
    ),
}
"""Kinds that are no record of ours: what they are, and their payload."""


def _message(name: str, type: str, doc: str, content_type: str) -> dict[str, Any]:
    kind_header = {"type": "object", "properties": {"ce_type": {"const": type}}}
    return {
        "name": name,
        "title": name,
        "summary": doc,
        "contentType": content_type,
        "headers": {"allOf": [{"$ref": "#/components/schemas/cloudEventsHeaders"}, kind_header]},
        "bindings": {"kafka": {"key": {"type": "string"}, "bindingVersion": BINDING}},
    }


def _first_line(doc: str | None) -> str:
    return (doc or "").strip().partition("\n")[0]
