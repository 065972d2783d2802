"""The contract with other teams as AsyncAPI 3.0.0: channels are the registry's topics, messages the kinds of records.

Knows the registries as they are filled; `schemas.generate` fills them and writes the document.
"""

from __future__ import annotations

from typing import Any

from schemas.base import KINDS
from schemas.columns import COLUMNAR, ROWS_MAX
from schemas.log import CONTENT_ARROW, CONTENT_JSON
from schemas.topics import TOPICS, Topic, ce_type

CONTRACT_VERSION = "1.0.0"
"""Version of the wire contract. A second major version of a kind is a new `ce_type`."""
BINDING = "0.5.0"

FROM_OUTSIDE: dict[str, tuple[str, ...]] = {
    "node.samples": ("gpu.samples", "engine.samples", "node.inventory"),
    "request.traces": ("request.rows",),
    "fleet.config": ("config",),
    "decision.events": ("command", "executor.result"),
}
"""Topic -> kinds that others send; everything else is written by Fleetloop's own levels."""


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
