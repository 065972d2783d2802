"""What applying a document does, decided without a broker."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.base import decode
from schemas.config import SPECS, ConfigObject
from schemas.errors import InvalidInput
from streams.config_store import build
from tests.schemas.examples import spec

KINDS = [kind for kind in SPECS if kind != "deployment"]


def document(kind: str, **more: Any) -> dict[str, Any]:
    example = {"public_key_base64": "A" * 43 + "="} if kind == "signer" else {}
    name = kind if kind in ("fleet", "limits") else "a"  # of these there is one
    return {"kind": kind, "name": name, "spec": spec(kind) | example | more}


@pytest.mark.parametrize("kind", KINDS)
def test_applying_the_same_again_changes_nothing(kind: str) -> None:
    """Created at revision 1; the same document is unchanged, and stays at that revision."""
    first, change = build(document(kind), {}, "me", 1.0)
    assert (change.what, change.revision, first.revision) == ("created", 1, 1)
    assert decode(ConfigObject, first.encode()) == first
    _, again = build(document(kind), {first.key: first}, "you", 2.0)
    assert (again.what, again.revision, again.fields) == ("unchanged", 1, {})


def test_a_default_that_is_written_out_is_no_change() -> None:
    """What counts is what holds, not what was typed."""
    short, _ = build({"kind": "fleet", "name": "fleet", "spec": {}}, {}, "me", 1.0)
    long = {"kind": "fleet", "name": "fleet", "spec": {"mode": "automatic", "gpus_max": {}}}
    assert build(long, {short.key: short}, "me", 2.0)[1].what == "unchanged"


def test_a_change_names_its_fields() -> None:
    """Field, before, after, at the next revision; nothing else of the object moves."""
    old, _ = build(document("price", usd_per_gpu_hour=2.0), {}, "me", 1.0)
    new, change = build(document("price", usd_per_gpu_hour=3.0), {old.key: old}, "you", 2.0)
    assert change.what == "changed"
    assert change.fields == {"usd_per_gpu_hour": (2.0, 3.0)}
    assert (new.revision, new.actor, new.at_s) == (2, "you", 2.0)


def test_a_deleted_object_comes_back_at_a_greater_revision() -> None:
    """Revisions go on through a deletion, or the deletion would win for ever."""
    old, _ = build(document("price"), {}, "me", 1.0)
    gone, change = build({"kind": "price", "name": "a", "deleted": True}, {old.key: old}, "me", 2.0)
    assert (change.what, gone.revision, gone.deleted, gone.spec) == ("deleted", 2, True, {})
    assert build({"kind": "price", "name": "a", "deleted": True}, {gone.key: gone}, "me", 3.0)[1].what == "unchanged"
    back, change = build(document("price"), {gone.key: gone}, "me", 3.0)
    assert (change.what, back.revision) == ("created", 3)


def test_deleting_what_never_was_is_no_change() -> None:
    """Nothing is sent."""
    assert build({"kind": "price", "name": "a", "deleted": True}, {}, "me", 1.0)[1].what == "unchanged"


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=8,
)


def refusal(document: dict[str, Any]) -> InvalidInput | None:
    """Why a document is refused; None: it is taken, and can be read from the wire again."""
    try:
        item, _ = build(document, {}, "me", 1.0)
    except InvalidInput as error:
        return error
    assert decode(ConfigObject, item.encode()) == item
    return None


@given(
    kind=st.sampled_from(KINDS),
    name=anything,
    field=st.sampled_from(sorted({f for k in KINDS for f in SPECS[k].model_fields})) | st.text(max_size=5),
    value=anything,
    deleted=anything,
)
def test_whatever_a_person_writes_is_taken_or_refused_with_a_reason(
    kind: str, name: Any, field: str, value: Any, deleted: Any
) -> None:
    """Nothing but our own error, with field and remedy."""
    found = refusal({"kind": kind, "name": name, "spec": {field: value}, "deleted": deleted})
    assert found is None or (found.field and found.remedy)


@given(value=anything)
def test_a_spec_of_any_shape_is_taken_or_refused(value: Any) -> None:
    """A list, a number, a text where fields should be."""
    found = refusal({"kind": "fleet", "name": "fleet", "spec": value})
    assert found is None or found.remedy
