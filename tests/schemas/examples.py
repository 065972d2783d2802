"""An example of every kind, made from its own schema, for tests that go over all kinds."""

from __future__ import annotations

import json
from typing import Any

from schemas import generate
from schemas.base import KINDS
from schemas.columns import COLUMNAR, Column, Columns
from schemas.config import SPECS
from schemas.topics import ce_type

JSON_KINDS = [cls.kind for cls in KINDS.values()]
COLUMNAR_KINDS = [c.kind for c in COLUMNAR.values()]
AT_S = 1_764_000_000.0


def sample(schema: dict[str, Any], root: dict[str, Any], key: str = "") -> Any:
    """A value that a JSON Schema of ours accepts, every property present."""
    if "$ref" in schema:
        return sample(root["$defs"][schema["$ref"].rpartition("/")[2]], root, key)
    for word in ("const", "enum"):
        if word in schema:
            return schema[word] if word == "const" else schema[word][0]
    for word in ("anyOf", "oneOf"):
        if word in schema:
            return sample(schema[word][0], root, key)
    match schema.get("type"):
        case "object":
            extra = schema.get("additionalProperties")
            own = {k: sample(v, root, k) for k, v in schema.get("properties", {}).items()}
            return own or ({"name": sample(extra, root)} if isinstance(extra, dict) else {})
        case "array":
            return [sample(schema["items"], root)] if "items" in schema else []
        case "string":
            return "x" * max(schema.get("minLength", 0), 8)
        case "integer" | "number":
            if key.endswith("_s") and schema.get("exclusiveMaximum"):
                return AT_S
            return max(schema.get("minimum", 0), schema.get("exclusiveMinimum", -1) + 1)
        case "boolean":
            return False
        case "null":
            return None
    return {}


def record(kind: str) -> dict[str, Any]:
    """An example of a JSON kind as plain values."""
    schema = generate.record_schema(kind, KINDS[ce_type(kind)])
    out: dict[str, Any] = sample(schema, schema)
    if kind == "config":
        out |= {"object_kind": "pool", "spec": spec("pool")}
    return out


def spec(name: str) -> dict[str, Any]:
    """An example of a configuration object."""
    schema = generate.record_schema(name, SPECS[name])
    out: dict[str, Any] = sample(schema, schema)
    return out


def encoded(kind: str) -> bytes:
    """The same as bytes."""
    return json.dumps(record(kind)).encode()


def cell(column: Column, row: int) -> Any:
    """A value that a column accepts."""
    if column.type == "text":
        return column.choices[row % len(column.choices)] if column.choices else f"{column.name}-{row % 3}"
    if column.type == "pairs":
        return [row, 1, row + 7, 2]
    if column.type == "bins":
        return [0.1, 1.0, 0.5 + row, 3.0, 4.0]
    if column.is_time:
        return AT_S + row
    value = min(column.high, max(column.low, 1.0 + row))
    return int(value) if column.type == "i64" else value


def rows(columns: Columns, count: int) -> list[dict[str, Any]]:
    """So many rows that a columnar kind accepts, no cell empty."""
    return [{name: cell(c, i) for name, c in columns.columns.items()} for i in range(count)]


def meta(columns: Columns) -> dict[str, str]:
    """Schema metadata of a batch."""
    text = {"node": "node-1", "pool": "pool-1", "source": "node.samples/0"}
    return {name: text.get(name, "1") for name in columns.meta}


def batch(columns: Columns, data: list[dict[str, Any]]) -> bytes:
    """Rows as an Arrow stream."""
    return columns.encode({name: [row.get(name) for row in data] for name in columns.columns}, meta(columns))
