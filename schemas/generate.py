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
from schemas.asyncapi import asyncapi
from schemas.base import KINDS, MS_LIMIT_S, Record
from schemas.columns import BINS_MAX, COLUMNAR, ROWS_MAX, TEXT_MAX, Column, Columns
from schemas.config import SPECS
from schemas.log import CONTENT_ARROW, CONTENT_JSON

FAMILIES = (config, costs, deadletters, decisions, findings, forecasts, node, requests, signals)
"""Importing them fills the registries of kinds; every module with records is named here."""

GENERATED = Path(__file__).parent / "generated"
DIALECT = "https://json-schema.org/draft/2020-12/schema"


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
        # without an anchor: `$` means another place in Python than in ECMAScript
        forbidden = "[\\u0000-\\u001f\\u007f-\\u009f" + ("/]" if column.plain else "]")
        schema["not"] = {"type": "string", "pattern": forbidden}
        if column.choices:
            schema = {"type": "string", "enum": list(column.choices)}
    elif column.type == "pairs":
        schema |= {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**32 - 1}}
    elif column.type == "bins":
        schema |= {"type": "array", "items": {"type": "number"}, "minItems": 1, "maxItems": BINS_MAX}
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
    if column.type in ("pairs", "bins"):
        return ""
    high = MS_LIMIT_S if column.is_time else column.high
    return f" {column.low:g} or more." if high == math.inf else f" {column.low:g} to {high:g}."
