"""Names and contents of rows: hashes and the table of what was seen."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from models.requests.ids import IdTable, SeenIds, hash_texts, row_contents, row_names
from schemas.requests import REQUEST_ROWS
from tests.models.requests.logs import arrival, end, record

texts = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=40)
names = st.lists(st.integers(0, 40), max_size=30)


def decoded(rows: list[dict[str, object]]):  # type: ignore[no-untyped-def]
    return REQUEST_ROWS.decode(record(1.0, rows).value)


@given(st.lists(texts, max_size=20, unique=True))
def test_hash_depends_on_the_text_alone(values: list[str]) -> None:
    """A text has the same hash alone and beside longer ones, and different texts have different ones."""
    together = hash_texts(values).tolist()
    assert together == [int(hash_texts([value])[0]) for value in values]
    assert len(set(together)) == len(values)


def test_hashes_are_for_ever() -> None:
    """Hashes are part of checkpoints: they may never change."""
    assert hash_texts(["", "a", "request-0001", "é" * 20]).tolist() == [
        11400714819323198485,
        7498637540085319664,
        17279654690447069592,
        18406104621569362197,
    ]


@given(names, names)
def test_table_finds_what_was_added(first: list[int], second: list[int]) -> None:
    """Every name that was added is found with its content, and no other."""
    table = IdTable(np.zeros(0, np.uint64), np.zeros(0, np.uint32))
    held: dict[int, int] = {}
    for part in (first, second):
        new = [n for n in dict.fromkeys(part) if n not in held]
        # multiples of 1024 collide in the smallest table
        table.add(np.array(new, np.uint64) * np.uint64(1024), np.array(new, np.uint32))
        held.update({n: n for n in new})
    place = table.find(np.arange(41, dtype=np.uint64) * np.uint64(1024))
    assert [n for n in range(41) if place[n] >= 0] == sorted(held)
    assert all(table.contents[place[n]] == n for n in held)


def test_table_grows() -> None:
    """Thousands of names in many calls are all found."""
    table = IdTable(np.zeros(0, np.uint64), np.zeros(0, np.uint32))
    for start in range(0, 20_000, 700):
        n = np.arange(start, start + 700, dtype=np.uint64)
        table.add(n, n.astype(np.uint32))
    assert (table.find(np.arange(20_300, dtype=np.uint64)) >= 0).all()
    assert (table.find(np.arange(20_300, 21_000, dtype=np.uint64)) < 0).all()


@given(st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), max_size=8), max_size=8))
def test_first_content_wins(batches: list[list[tuple[int, int]]]) -> None:
    """Within and across batches the first row of a name is fresh, equal ones are duplicates, others conflicts."""
    ids = SeenIds()
    held: dict[int, int] = {}
    for second, batch in enumerate(batches):
        seen, forgotten = ids.take(
            np.array([n for n, _ in batch], np.uint64), np.array([c for _, c in batch], np.uint32), second, 2, 1000
        )
        assert forgotten == 0
        for (name, content), fresh, conflict in zip(batch, seen.fresh, seen.conflict, strict=True):
            assert bool(fresh) == (name not in held)
            held.setdefault(name, content)
            assert bool(conflict) == (held[name] != content)
    again = SeenIds()
    again.restore(ids.state())
    assert len(again) == len(ids) == len(held)


def test_ids_are_bounded_and_forgotten() -> None:
    """Beyond the bound the oldest generation goes, then nothing more is remembered; old generations end by time."""
    ids = SeenIds()

    def take(start: int, count: int, second: int) -> int:
        n = np.arange(start, start + count, dtype=np.uint64)
        return ids.take(n, n.astype(np.uint32), second, 10, 100)[1]

    assert take(0, 60, 0) == 0
    assert take(100, 60, 10) == 60
    assert len(ids) == 60
    assert take(200, 60, 11) == 60
    assert len(ids) == 60
    ids.prune(30, 10.0)
    assert len(ids) == 0


def test_names_and_contents_of_rows() -> None:
    """A name is (event, request id); a content is everything else, unknown included, and zero is not unknown."""
    batch = decoded([end("a", 1.0), arrival("a", 1.0), end("b", 1.0), end("a", 1.0, cached_tokens=0.0)])
    assert len(set(row_names(batch).tolist())) == 3
    assert row_names(batch)[0] == row_names(batch)[3]
    contents = row_contents(batch).tolist()
    assert contents[0] == contents[2]
    assert contents[0] != contents[3]
    for change in ({"tenant": "x"}, {"at_s": 2.0}, {"status": "error"}, {"replica": "r"}, {"class": None}):
        assert row_contents(decoded([{**end("a", 1.0), **change}]))[0] != contents[0], change
