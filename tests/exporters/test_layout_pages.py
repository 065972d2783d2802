"""The pages of one target: learned once, verified, learned again where they change, forgotten on a restart."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporters import pages as pages_module
from exporters.exposition import PageError, lines_of
from exporters.pages import PageReader
from tests.recorded import scrapes

PAGE = """\
process_start_time_seconds {start}
vllm:num_requests_running{{engine="0"}} {running}
vllm:generation_tokens_total{{engine="0"}} 42
"""


def _page(running: float = 1, start: float = 100, more: str = "") -> list[bytes]:
    return lines_of((PAGE.format(running=running, start=start) + more).encode())


def _read(reader: PageReader, lines: list[bytes], now: float = 1.0) -> dict[str, float | None]:
    rows = reader.quick(lines, False)
    if rows is None:
        rows = reader.slow(lines, False, False, now)
    elif (layout := reader.to_verify(now)) is not None:
        reader.verified(layout, layout.agrees(lines, False))
    (row,) = rows
    return row.values


def test_a_layout_is_learned_once_and_again_when_it_changes() -> None:
    """Values are read without learning while the shape stays; a new series makes it learn, once."""
    reader = PageReader()
    assert [_read(reader, _page(n), 10.0 * n)["running"] for n in range(1, 5)] == [1, 2, 3, 4]
    assert reader.counts["layout_learned"] == 1
    more = 'vllm:num_requests_waiting{engine="0"} 7\n'
    assert _read(reader, _page(5, more=more), 50.0)["waiting"] == 7
    assert _read(reader, _page(6, more=more), 51.0)["running"] == 6
    assert reader.counts["layout_learned"] == 2


def test_the_parser_is_asked_every_so_often() -> None:
    """First after its phase of the period, then each period; where it agrees nothing is learned again."""
    reader = PageReader(verify_s=60, phase=0.5)
    _read(reader, _page(), 0.0)
    asked = [now for now in range(1, 200) if reader.to_verify(now) is not None]
    assert asked == [30, 90, 150]


def test_a_difference_is_counted_and_learned() -> None:
    """A wanted series in the place of one that is not, which the quick check does not see."""
    reader = PageReader(verify_s=60)
    _read(reader, _page(more="other 1\n"), 0.0)
    changed = _page(more='vllm:num_requests_waiting{engine="0"} 7\n')
    assert "waiting" not in _read(reader, changed, 59.0)
    assert "waiting" not in _read(reader, changed, 60.0)
    assert _read(reader, changed, 61.0)["waiting"] == 7
    assert reader.counts["layout_differs"] == 1
    _read(reader, changed, 200.0)
    assert (reader.counts["layout_differs"], reader.counts["layout_learned"]) == (1, 2)


def test_an_answer_about_a_layout_that_is_gone_changes_nothing() -> None:
    """It was asked about the page before."""
    reader = PageReader(phase=0.0)
    _read(reader, _page(), 0.0)
    before = reader.to_verify(1.0)
    assert before is not None
    _read(reader, _page(more="other 1\n"), 2.0)
    after = reader.layout
    reader.verified(before, False)
    assert reader.layout is after


def test_a_restart_forgets_the_names() -> None:
    """With the same series a better name is taken only once the start of the process is another."""
    plain, better = 'vllm:prompt_tokens{engine="0"} 5\n', 'vllm:prompt_tokens_total{engine="0"} 70\n'
    reader = PageReader()
    assert _read(reader, _page(more=plain), 0.0)["prompt_tokens"] == 5
    assert _read(reader, _page(more=plain + better), 10.0)["prompt_tokens"] == 5
    assert _read(reader, _page(start=200, more=plain + better), 20.0)["prompt_tokens"] == 70
    assert reader.start_s == 200


def test_what_changes_at_every_scrape_may_not_learn_at_every_scrape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learning that took 0.1 s of CPU is not done again for 2 s; then it is. A refusal is repeated till then."""
    clock = iter(range(100))
    monkeypatch.setattr(pages_module.time, "thread_time", lambda: next(clock) * 0.1)
    reader = PageReader()
    _read(reader, _page(more='x{n="1"} 1\n'), 0.0)
    with pytest.raises(PageError, match="change at every scrape"):
        _read(reader, _page(more='x{n="2"} 1\ny 1\n'), 1.0)
    assert _read(reader, _page(more='x{n="3"} 1\nz 1\n'), 5.0)["running"] == 1
    nobody = PageReader()
    with pytest.raises(PageError, match="no metrics"):
        _read(nobody, lines_of(b"other 1\n"), 0.0)
    with pytest.raises(PageError, match="no metrics"):
        _read(nobody, _page(), 1.0)
    assert _read(nobody, _page(), 9.0)["running"] == 1


def test_odd_values_are_counted_each_time() -> None:
    """A gauge that is NaN is null and counted; one that is missing is absent and not counted."""
    reader = PageReader()
    for now in range(3):
        assert _read(reader, _page("NaN"), now)["running"] is None  # type: ignore[arg-type]
    assert reader.counts["running"] == 3
    assert "waiting" not in reader.counts


@pytest.mark.parametrize("run", ["vllm-cpu-run", "vllm-cpu-restart", "vllm-cpu-dp2", "inference-sim-run"])
def test_a_recorded_run_reads_as_page_by_page(data_dir: Path, run: str) -> None:
    """Each page of a real run gives what a reader gives that has never seen another; few of them are learned."""
    reader = PageReader(verify_s=30, phase=0.1)
    count = 0
    pages = (page for _, page in scrapes(data_dir / "engine-metrics" / run) if page is not None)
    for count, page in enumerate(pages, 1):
        lines = lines_of(page.encode())
        now = count * 10.0
        rows = reader.quick(lines, True) or reader.slow(lines, False, True, now)
        if (layout := reader.to_verify(now)) is not None:
            reader.verified(layout, layout.agrees(lines, False))
        if count % 10 == 0:
            fresh = PageReader().slow(lines, False, True, 0.0)
            assert [(row.values, row.bins) for row in rows] == [(row.values, row.bins) for row in fresh]
    assert reader.counts["layout_differs"] == 0
    assert reader.counts["layout_learned"] <= 12 < count
