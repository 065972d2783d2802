"""The objects of `fleet.config`: reading what holds, and applying changes as new revisions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import ValidationError

from schemas.base import decode, refusal
from schemas.config import SPECS, ConfigObject
from schemas.errors import InvalidInput, InvalidRecord, UnavailableError
from schemas.topics import FLEET_CONFIG, ce_type
from streams.producer import EdgeProducer
from streams.reader import read_to_end
from streams.settings import Settings

SEND_WITHIN_S = 30.0
WORDS = ("kind", "name", "spec", "deleted")
"""What a document may hold."""


class Change(NamedTuple):
    """What applying an object does."""

    key: str
    what: Literal["created", "changed", "deleted", "unchanged"]
    revision: int
    fields: dict[str, tuple[Any, Any]]
    """Field -> (before, after)."""


async def read_config(settings: Settings) -> dict[str, ConfigObject]:
    """key -> object of the greatest revision, deleted ones included (their revisions go on)."""
    found: dict[str, ConfigObject] = {}
    async for record in read_to_end(settings, FLEET_CONFIG):
        if not record.value:
            continue
        try:
            item = decode(ConfigObject, record.value)
        except InvalidRecord:
            continue  # the config agent dead-letters it
        if item.key not in found or found[item.key].revision < item.revision:
            found[item.key] = item
    return found


def read_objects(path: Path) -> list[dict[str, Any]]:
    """YAML documents `kind, name, spec` of a file. Raises InvalidInput naming field, value and remedy."""
    try:
        documents = [d for d in yaml.safe_load_all(path.read_text(encoding="utf-8")) if d is not None]
    except OSError as error:
        raise InvalidInput("file", str(path), f"name a readable file ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidInput(str(path), "", f"write valid YAML: {error}") from None
    for number, document in enumerate(documents, 1):
        where = f"{path} document {number}"
        if not isinstance(document, dict) or not {"kind", "name"} <= document.keys():
            raise InvalidInput(where, document, "write kind, name and spec")
        kinds = [kind for kind in SPECS if kind != "deployment"]
        if document["kind"] not in kinds:
            raise InvalidInput(f"{where}: kind", document["kind"], f"write one of {', '.join(kinds)}")
        for word in document:
            if word not in WORDS:  # a `specs` that is passed over would leave every default in force
                raise InvalidInput(
                    f"{where}: {word}", document[word], f"known beside each other are {', '.join(WORDS)}"
                )
    named = [f"{document['kind']}/{document['name']}" for document in documents]
    for key in named:
        if named.count(key) > 1:
            raise InvalidInput(str(path), key, "name each object once: which of them holds would be chance")
    return documents


def build(
    document: dict[str, Any], current: dict[str, ConfigObject], actor: str, at_s: float
) -> tuple[ConfigObject, Change]:
    """The object that a document becomes, and what that changes. Fields that no schema knows are refused here:
    on the wire they would be ignored, and a person's typing error must not pass as a default.
    """
    kind, name = document["kind"], str(document["name"])
    deleted = document.get("deleted", False)
    spec = document.get("spec") or {}
    if not isinstance(deleted, bool):
        raise InvalidInput(f"{kind}/{name}: deleted", deleted, "write true or false")
    if not isinstance(spec, dict):
        raise InvalidInput(f"{kind}/{name}: spec", spec, "write the fields of the object, one a line")
    if not deleted:
        unknown = [field for field in spec if field not in SPECS[kind].model_fields]
        if unknown:
            known = ", ".join(SPECS[kind].model_fields)
            raise InvalidInput(f"{kind}/{name}: {unknown[0]}", spec[unknown[0]], f"no such field; known are {known}")
        try:
            spec = SPECS[kind].model_validate(spec).model_dump(mode="json")
        except ValidationError as error:
            raise refusal(f"{kind}/{name}", error) from None
    old = current.get(f"{kind}/{name}")
    before: dict[str, Any] = {}
    if old is not None and not old.deleted:
        # Through the class, so that a default made explicit is no change.
        before = SPECS[kind].model_validate(old.spec).model_dump(mode="json")
    after = {} if deleted else spec
    fields = {f: (before.get(f), after.get(f)) for f in {**before, **after} if before.get(f) != after.get(f)}
    revision = (old.revision if old else 0) + 1
    try:
        item = ConfigObject(
            object_kind=kind,
            name=name,
            revision=revision,
            deleted=deleted,
            at_s=at_s,
            actor=actor,
            spec=spec if not deleted else {},
        )
    except ValidationError as error:
        raise refusal(f"{kind}/{name}", error) from None
    exists = old is not None and not old.deleted
    if deleted:
        return item, Change(item.key, "deleted" if exists else "unchanged", revision, fields)
    if exists and not fields:
        return item, Change(item.key, "unchanged", old.revision if old else 0, {})
    return item, Change(item.key, "changed" if exists else "created", revision, fields)


async def send_objects(settings: Settings, objects: Sequence[ConfigObject]) -> None:
    """Publishes objects and waits until the broker has them. Raises UnavailableError."""
    async with EdgeProducer(settings, "fleetloop apply") as producer:
        for item in objects:
            producer.send(
                FLEET_CONFIG,
                item.key,
                item.encode(),
                type=ce_type(item.kind),
                id=f"{item.key}@{item.revision}",
            )
        if not await producer.flush(SEND_WITHIN_S):
            raise UnavailableError(
                f"FLEETLOOP_BOOTSTRAP_SERVERS: {settings.bootstrap_servers!r} did not take the objects within "
                f"{SEND_WITHIN_S:.0f} s: is the broker up?"
            )
