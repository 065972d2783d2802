"""Every field of every record says what it is; everything from outside is bounded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from schemas import generate
from schemas.asyncapi import FROM_OUTSIDE
from schemas.base import KINDS, Record, decode
from schemas.columns import COLUMNAR
from schemas.config import SPECS
from schemas.topics import ce_type
from tests.schemas import examples

OUTSIDE = dict.fromkeys(kind for kinds in FROM_OUTSIDE.values() for kind in kinds)
STRING_MAX = Record.model_config["str_max_length"]


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        for field in annotation.model_fields.values():
            yield from _models(field.annotation)
    for part in getattr(annotation, "__args__", ()):
        yield from _models(part)


ALL = list(dict.fromkeys(m for cls in [*KINDS.values(), *SPECS.values()] for m in _models(cls)))


@pytest.mark.parametrize("cls", ALL, ids=lambda c: c.__name__)
def test_every_field_is_documented(cls: type[BaseModel]) -> None:
    """A record, and each of its fields, has a description that is a sentence."""
    assert cls.__doc__
    for name, field in cls.model_fields.items():
        assert field.description, f"{cls.__name__}.{name}"
        assert field.description.rstrip().endswith((".", "`", ")")), f"{cls.__name__}.{name}: {field.description}"


@pytest.mark.parametrize("columns", COLUMNAR.values(), ids=lambda c: c.kind)
def test_every_column_is_documented(columns: Any) -> None:
    """A columnar kind, its columns and its metadata are described; numbers have a unit or count things."""
    assert columns.doc
    for column in columns.columns.values():
        assert column.doc, column.name
        assert column.unit or column.type != "f64", f"{columns.kind}.{column.name} has no unit"
    for name, doc in columns.meta.items():
        assert doc, name


def _unbounded(schema: Any, where: str) -> Iterator[str]:
    if isinstance(schema, list):
        for item in schema:
            yield from _unbounded(item, where)
    if not isinstance(schema, dict):
        return
    kind = schema.get("type")
    if kind == "array" and "maxItems" not in schema:
        yield f"{where}: a list without a bound"
    if kind == "object" and "properties" not in schema and "maxProperties" not in schema:
        yield f"{where}: an object without a bound"
    if kind == "string" and schema.get("maxLength", 0) >= STRING_MAX:
        yield f"{where}: a string without a bound of its own"
    for name, item in schema.items():
        yield from _unbounded(item, f"{where}/{name}")


@pytest.mark.parametrize("name", [*(k for k in OUTSIDE if ce_type(k) in KINDS), *(f"config.{n}" for n in SPECS)])
def test_what_comes_from_outside_is_bounded(name: str) -> None:
    """No string, list or free object that others send is without a bound."""
    assert list(_unbounded(json.loads(generate.files()[f"{name}.schema.json"]), name)) == []


@pytest.mark.parametrize("kind", examples.JSON_KINDS)
def test_records_survive_their_encoding(kind: str) -> None:
    """decode(encode(x)) == x, and the bytes are the same again."""
    cls = KINDS[ce_type(kind)]
    first = decode(cls, examples.encoded(kind))
    again = decode(cls, first.encode())
    assert again == first
    assert again.encode() == first.encode()


@pytest.mark.parametrize("columns", COLUMNAR.values(), ids=lambda c: c.kind)
@pytest.mark.parametrize("count", [1, 3])
def test_batches_survive_their_encoding(columns: Any, count: int) -> None:
    """Every column and every metadata entry of a batch comes back as it was sent."""
    rows = examples.rows(columns, count)
    taken = columns.decode(examples.batch(columns, rows))
    assert taken.refused == []
    assert taken.rows == count
    assert taken.meta == examples.meta(columns)
    for name, column in columns.columns.items():
        sent = [row[name] for row in rows]
        if column.type == "text":
            assert taken.text(name) == sent
        elif column.type in ("pairs", "bins"):
            assert [p.tolist() for p in taken.pairs[name]] == sent
        else:
            assert taken.numbers[name].tolist() == sent
