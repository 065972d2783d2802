"""The committed schemas are what the code says, valid, complete and resolvable."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from schemas import generate
from schemas.asyncapi import FROM_OUTSIDE
from schemas.base import KINDS, decode
from schemas.columns import COLUMNAR, Column, Columns
from schemas.config import SPECS
from schemas.errors import InvalidRecord
from schemas.log import CONTENT_JSON
from schemas.topics import TOPICS, ce_type
from tests.schemas import examples

FILES = generate.files()
SCHEMAS = {name: json.loads(text) for name, text in FILES.items() if name.endswith(".json")}
ASYNCAPI: dict[str, Any] = yaml.safe_load(FILES["asyncapi.yaml"])


def test_committed_files_are_what_the_code_says() -> None:
    """Drift: whoever changes a record writes the schemas again."""
    assert generate.check() == []


def test_check_names_every_difference_and_write_mends_it(tmp_path: Path) -> None:
    """A missing, a changed and a stale file are each named; writing leaves no difference and changes nothing twice."""
    assert len(generate.check(tmp_path / "nowhere")) == len(FILES)
    generate.write(tmp_path)
    assert generate.write(tmp_path) == []
    (tmp_path / "command.schema.json").unlink()
    (tmp_path / "gone.schema.json").write_text("{}")
    changed = (tmp_path / "asyncapi.yaml").read_text().replace("asyncapi: 3.0.0", "asyncapi: 2.0.0")
    (tmp_path / "asyncapi.yaml").write_text(changed)
    (tmp_path / "finding.schema.json").write_text(FILES["finding.schema.json"] + "\n")
    differences = {line.partition(":")[0]: line for line in generate.check(tmp_path)}
    assert set(differences) == {"command.schema.json", "gone.schema.json", "asyncapi.yaml", "finding.schema.json"}
    assert "line 1" in differences["asyncapi.yaml"]
    assert set(generate.write(tmp_path)) == set(differences)
    assert generate.check(tmp_path) == []


def test_generation_is_deterministic() -> None:
    """Another process with another hash seed writes the same bytes."""
    program = "import hashlib, schemas.generate as g; print(hashlib.sha256(repr(g.files()).encode()).hexdigest())"
    seen = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(generate.__file__).parents[1])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_schema_is_valid_and_described(name: str) -> None:
    """Each is valid draft 2020-12, says what it is about, and describes every property."""
    schema = SCHEMAS[name]
    Draft202012Validator.check_schema(schema)
    assert schema["description"]
    for where, part in _walk(schema, name):
        for field, value in part.get("properties", {}).items() if isinstance(part, dict) else ():
            assert "$ref" in value or value.get("description"), f"{where}/{field}"


def _walk(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    yield where, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _walk(item, f"{where}/{key}")


def _resolve(ref: str, document: Any) -> Any:
    """What a reference points at, in this document or a file beside it. Raises where there is nothing."""
    name, _, pointer = ref.partition("#")
    found = SCHEMAS[name.removeprefix("./")] if name else document
    for part in pointer.split("/")[1:]:
        found = found[part.replace("~1", "/").replace("~0", "~")]
    return found


@pytest.mark.parametrize("name", [*SCHEMAS, "asyncapi.yaml"])
def test_every_reference_resolves(name: str) -> None:
    """No `$ref` points at nothing."""
    document = SCHEMAS.get(name, ASYNCAPI)
    for _, part in _walk(document, name):
        if isinstance(part, dict) and isinstance(part.get("$ref"), str):
            assert _resolve(part["$ref"], document) is not None


def test_asyncapi_has_every_topic_as_it_is_created() -> None:
    """Channels are the registry's topics, with address, partitions and configuration."""
    assert ASYNCAPI["asyncapi"] == "3.0.0"
    assert set(ASYNCAPI["channels"]) == set(TOPICS)
    for name, topic in TOPICS.items():
        channel = ASYNCAPI["channels"][name]
        kafka = channel["bindings"]["kafka"]
        assert channel["address"] == "{prefix}" + name
        assert kafka["partitions"] == topic.partitions
        config = kafka["topicConfiguration"]
        config["cleanup.policy"] = ",".join(config["cleanup.policy"])
        assert {k: str(v) for k, v in config.items()} == topic.config()
        kinds = {
            ASYNCAPI["components"]["messages"][m]["headers"]["allOf"][1]["properties"]["ce_type"]["const"]
            for m in channel["messages"]
        }
        assert kinds == {ce_type(kind) for kind in topic.kinds}


def test_asyncapi_operations_use_their_channels_messages() -> None:
    """Every topic is read or written by someone; an operation's messages are of its channel; names are unique."""
    used = set()
    for name, operation in ASYNCAPI["operations"].items():
        channel = operation["channel"]["$ref"]
        assert operation["action"] in ("send", "receive")
        assert name == f"{operation['action']}.{channel.removeprefix('#/channels/')}"
        assert operation["messages"]
        assert all(m["$ref"].startswith(f"{channel}/messages/") for m in operation["messages"])
        used |= {m["$ref"].rpartition("/messages/")[2] for m in operation["messages"]}
    assert used == set(ASYNCAPI["components"]["messages"])


def test_every_record_kind_is_on_a_topic_and_has_its_files() -> None:
    """Nothing is registered that no topic carries, or that has no schema."""
    carried = {ce_type(kind) for topic in TOPICS.values() for kind in topic.kinds}
    assert set(KINDS) | set(COLUMNAR) | {ce_type("tick"), ce_type("checkpoint")} == carried
    kinds = [*examples.JSON_KINDS, *examples.COLUMNAR_KINDS, *(f"config.{name}" for name in SPECS)]
    assert {f"{kind}.schema.json" for kind in kinds} == set(SCHEMAS)
    for topic, kinds_sent in FROM_OUTSIDE.items():
        assert set(kinds_sent) <= set(TOPICS[topic].kinds)


@pytest.mark.parametrize("columns", COLUMNAR.values(), ids=lambda c: c.kind)
def test_arrow_text_says_what_the_codec_does(columns: Columns) -> None:
    """Names, types, nullability and units of the text are those of the Arrow schema."""
    pattern = re.compile(r"^(\w+): (\S+(?:<.*?>)?)( not null)?(?: \[(.+?)\])?  # \S.*$")
    found = []
    for line in FILES[f"{columns.kind}.arrow.txt"].splitlines():
        if line and not line.startswith("#"):
            match = pattern.match(line)
            assert match, line
            found.append((match[1], match[2], match[3] is None, match[4] or ""))
    schema = columns.arrow_schema()
    assert found == [(f.name, str(f.type), f.nullable, columns.columns[f.name].unit) for f in schema]
    assert isinstance(schema, pa.Schema)


@pytest.mark.parametrize("kind", examples.JSON_KINDS)
def test_schema_and_codec_agree_on_an_example(kind: str) -> None:
    """An example made from the schema is taken; encoded again it satisfies the schema."""
    schema = SCHEMAS[f"{kind}.schema.json"]
    example = examples.record(kind)
    Draft202012Validator(schema).validate(example)
    taken = decode(KINDS[ce_type(kind)], json.dumps(example).encode())
    Draft202012Validator(schema).validate(json.loads(taken.encode()))


def _cells(column: Column) -> st.SearchStrategy[Any]:
    text = st.text(st.characters(codec="ascii", categories=["L", "N", "P", "Zs", "Cc"]), max_size=5)
    return st.one_of(
        st.just(examples.cell(column, 0)),
        st.none(),
        st.sampled_from([0, -1, 1, 0.5, 64, 1e11, 1e12, 2**40, True, "ok", "", "\n", "ok\n", "a/b", "x" * 201, [], {}]),
        st.floats(allow_nan=False, allow_infinity=False, width=32),
        st.integers(-(2**40), 2**40),
        text,
    )


@pytest.mark.parametrize("columns", [c for c in COLUMNAR.values() if c.json_too], ids=lambda c: c.kind)
@given(data=st.data())
@settings(max_examples=150)
def test_row_schema_and_codec_agree(columns: Columns, data: st.DataObject) -> None:
    """A JSON producer that validates against the schema is never refused, and one that does not is."""
    name = data.draw(st.sampled_from(list(columns.columns)))
    row = examples.rows(columns, 1)[0]
    row[name] = data.draw(_cells(columns.columns[name]))
    valid = Draft202012Validator(SCHEMAS[f"{columns.kind}.schema.json"]).is_valid(row)
    taken = columns.decode(json.dumps([row]).encode(), CONTENT_JSON)
    assert (taken.rows == 1) == valid, (row[name], taken.refused)


@given(data=st.data())
@settings(max_examples=150)
def test_record_schema_and_codec_agree(data: st.DataObject) -> None:
    """The same for JSON kinds from outside, one field at a time changed or left out."""
    kind = data.draw(st.sampled_from(["node.inventory", "command", "executor.result"]))
    example = examples.record(kind)
    name = data.draw(st.sampled_from(list(example)))
    if data.draw(st.booleans()):
        del example[name]
    else:
        texts = ["", "ready", "x" * 100, "a/b", "x" * 100_001]
        numbers = [0, -1, 2**40, 0.5, 10**12]  # whole ones without a point: strict, where JSON Schema is not
        values = [None, True, *numbers, *texts, [], [1], {}, {"a": 1}]
        example[name] = data.draw(st.sampled_from(values))
    valid = Draft202012Validator(SCHEMAS[f"{kind}.schema.json"]).is_valid(example)
    try:
        decode(KINDS[ce_type(kind)], json.dumps(example).encode())
        taken = True
    except InvalidRecord:
        taken = False
    assert taken == valid, (name, example.get(name))
