"""A learned layout reads what the parser reads, and notices when a page no longer has it."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from exporters import layout as layout_module
from exporters.adapters.base import KEYS_MAX, Chosen, Page, Reduce, RowPlan, Series, TooManyRows
from exporters.exposition import PageError, lines_of
from exporters.layout import Layout, Limits, learn


class Everything:
    """An adapter that wants every series, as inputs of its own."""

    engine = "everything"

    def recognises(self, names: Collection[str]) -> bool:
        return True

    def plan(self, series: Sequence[Series], chosen: Chosen) -> list[RowPlan]:
        return [RowPlan({f"_{i}": Reduce((i,)) for i in range(len(series))})]


class Some(Everything):
    """One that wants series of names that begin with `a`."""

    def plan(self, series: Sequence[Series], chosen: Chosen) -> list[RowPlan]:
        return [RowPlan({f"_{i}": Reduce((i,)) for i, one in enumerate(series) if one.name.startswith("a")})]


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every page is taken whole."""
    monkeypatch.setattr(layout_module, "choose", lambda names, engine: Everything())


@pytest.fixture
def some(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every page only names that begin with `a` are wanted."""
    monkeypatch.setattr(layout_module, "choose", lambda names, engine: Some())


def _values(body: bytes, layout: Layout | None = None, openmetrics: bool = False) -> list[float] | None:
    lines = lines_of(body)
    return (layout or learn(lines, openmetrics)).values(lines, True)


def _same(a: Sequence[float] | None, b: Sequence[float]) -> bool:
    return a is not None and len(a) == len(b) and all(x == y or (x != x and y != y) for x, y in zip(a, b, strict=True))


PAGES = [
    "dynamo-1.6.1-frontend",
    "dynamo-1.6.1-mocker-worker",
    "litellm-1.108.7-proxy",
    "sglang-0.4.3-llama8b-overload",
    "triton-2.51.0-cpu-fresh",
    "triton-2023-t4-summaries",
    "vllm-0.32.0-cpu-dp2-busy",
    "vllm-v0.4-opt125m",
]


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.usefixtures("everything")
def test_real_pages_are_read_as_the_parser_reads_them(data_dir: Path, name: str) -> None:
    """Every value of every series of a real page, in order; and the layout says that it agrees."""
    body = (data_dir / "engine-metrics" / f"{name}.prom").read_bytes()
    families = text_string_to_metric_families(body.decode())
    expected = [sample.value for family in families for sample in family.samples]
    layout = learn(lines_of(body))
    assert layout.bad_lines == 0
    assert _same(_values(body, layout), expected)
    assert layout.agrees(lines_of(body), False)


@pytest.mark.usefixtures("everything")
def test_invalid_lines_are_left_out_and_counted(data_dir: Path) -> None:
    """dcgm-exporter's `ERROR - FAILED TO CONVERT TO STRING`, for which a strict parser drops the whole page."""
    body = (data_dir / "engine-metrics" / "dcgm-exporter-a800-mig-dcp.prom").read_bytes()
    lines = lines_of(body)
    layout = learn(lines)
    invalid = sum(b"ERROR - FAILED" in line for line in lines)
    assert layout.bad_lines == invalid > 0
    values = layout.values(lines, True)
    assert values is not None
    assert len(values) == sum(bool(line) and not line.startswith(b"#") for line in lines) - invalid
    assert layout.agrees(lines, False)


@pytest.mark.usefixtures("everything")
def test_what_may_stand_around_a_value() -> None:
    """Timestamps, exemplars, tabs, several spaces, carriage returns, braces and spaces inside labels."""
    body = (
        b'a{x="} 7",y="\\"{ # "} 1 1764000000000\nb\t2\nc   3  \r\nd{} 4\ne{x="1",}5\n\n  \n# a comment\nf NaN\ng +Inf'
    )
    assert _same(_values(body), [1, 2, 3, 4, 5, math.nan, math.inf])
    assert learn(lines_of(body)).agrees(lines_of(body), False)


def _registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Gauge("a", "help", ["x"], registry=registry).labels('odd "} 1 # {').set(1.5)
    Counter("b", "help", registry=registry).inc(3, {"trace": "abc"})
    Histogram("c", "help", registry=registry).observe(0.3, {"trace": "def"})
    return registry


@pytest.mark.usefixtures("everything")
def test_openmetrics_is_read_by_its_own_parser() -> None:
    """Exemplars are no values, `# EOF` is none either; what is not valid OpenMetrics does not agree."""
    registry = _registry()
    body = generate_openmetrics(registry).replace(b'odd \\"} 1 # {', b"even")
    layout = learn(lines_of(body), openmetrics=True)
    values = layout.values(lines_of(body), True)
    assert values is not None
    assert values[:2] == [1.5, 3]
    assert layout.agrees(lines_of(body), True)
    assert not layout.agrees(lines_of(body.replace(b"# EOF", b"")), True)
    plain = generate_latest(registry)
    assert learn(lines_of(plain)).agrees(lines_of(plain), False)


@pytest.mark.usefixtures("some")
@pytest.mark.parametrize(
    "page",
    [
        b'a{x="1"} 1\nb 2\nb2 2\na{x="2"} 3\n',  # a line more
        b'a{x="1"} 1\na{x="2"} 3\n',  # a line less
        b'a{x="1"} 1\nb 2\na{x="3"} 3\n',  # another label
        b'a{x="2"} 3\nb 2\na{x="1"} 1\n',  # another order
        b'b 2\na{x="1"} 1\na{x="2"} 3\n',
        b"",
    ],
)
def test_a_page_of_another_shape_is_noticed(page: bytes) -> None:
    """Values are never read from the line of another series."""
    layout = learn(lines_of(b'a{x="1"} 1\nb 2\na{x="2"} 3\n'))
    assert _values(page, layout) is None


@pytest.mark.usefixtures("some")
def test_a_wanted_series_in_the_place_of_another_is_found_by_the_comparison() -> None:
    """The quick check sees lines that are wanted; what takes the place of one that is not, the comparison sees."""
    layout = learn(lines_of(b"a 1\nb 2\n"))
    page = b"a 1\nax 2\n"
    assert _values(page, layout) == [1.0]
    assert layout.agrees(lines_of(b"a 5\nb 7\n"), False)
    assert not layout.agrees(lines_of(page), False)


@pytest.mark.usefixtures("some")
def test_a_wanted_value_that_is_none_is_unknown() -> None:
    """A number that becomes text is NaN, and the comparison says so, for the parser no longer sees the series."""
    layout = learn(lines_of(b"a 1\nb 2\n"))
    page = b"a ERROR\nb 2\n"
    assert _same(_values(page, layout), [math.nan])
    assert not layout.agrees(lines_of(page), False)


@pytest.mark.usefixtures("everything")
def test_bounds() -> None:
    """Too many series and too long a line are refused by name; at the bound they are taken."""
    page = b"".join(b"a%d 1\n" % i for i in range(11))
    assert len(_values(page) or []) == 11
    with pytest.raises(PageError, match="more than 10 series"):
        learn(lines_of(page), limits=Limits(series=10))
    line = b'a{x="' + b"y" * 300 + b'"} 1'
    with pytest.raises(PageError, match="a line of 309 bytes"):
        learn([line], limits=Limits(line_bytes=308))
    assert learn([line], limits=Limits(line_bytes=309)).values([line], True) == [1]


class Broken(Everything):
    """An adapter with a bug, in its plan or in what it makes of values."""

    def __init__(self, late: bool) -> None:
        self.late = late

    def plan(self, series: Sequence[Series], chosen: Chosen) -> list[RowPlan]:
        assert self.late
        return [RowPlan({}, finish=lambda row: {"running": 1 / 0})]


def test_a_bug_of_an_adapter_harms_the_target_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a page that cannot be taken, with the bug as its cause."""
    monkeypatch.setattr(layout_module, "choose", lambda names, engine: Broken(late=False))
    with pytest.raises(PageError, match="everything: AssertionError") as error:
        learn(lines_of(b"a 1\n"))
    assert error.value.what == "adapter"
    monkeypatch.setattr(layout_module, "choose", lambda names, engine: Broken(late=True))
    layout = learn(lines_of(b"a 1\n"))
    with pytest.raises(PageError, match="everything: ZeroDivisionError"):
        layout.rows([], False, [])


@pytest.mark.usefixtures("everything")
def test_a_page_may_not_speak_for_any_number_of_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter's rows are bounded, and so is what it looks up to make them."""
    monkeypatch.setattr(Everything, "plan", lambda self, series, chosen: [RowPlan({}) for _ in series])
    assert len(learn([b"a 1"] * KEYS_MAX).plans) == KEYS_MAX
    with pytest.raises(PageError, match="257 rows, the bound is 256"):
        learn([b"a 1"] * (KEYS_MAX + 1))
    page = Page([Series("a", {"engine": str(i)}) for i in range(KEYS_MAX + 1)])
    with pytest.raises(TooManyRows, match="257 values of engine"):
        page.values_of("engine", ["a"])


def test_a_page_of_nobody_is_refused() -> None:
    """No adapter knows it; and one named by hand is taken whatever the names."""
    with pytest.raises(PageError, match="no metrics of a known engine"):
        learn(lines_of(b"node_load1 1\n"))
    assert learn(lines_of(b"node_load1 1\n"), engine="vllm").adapter.engine == "vllm"


NAMES = st.from_regex(r"[a-c][a-z_]{0,3}", fullmatch=True)
LABELS = st.dictionaries(
    st.sampled_from(["x", "y"]), st.text(st.sampled_from('ab "\\{}#,=é\n'), max_size=6), max_size=2
)
NUMBERS = st.floats() | st.integers(-5, 10**12)


def _line(name: str, labels: dict[str, str], value: float) -> str:
    inside = ",".join(
        f'{key}="{text}"'
        for key, raw in labels.items()
        for text in [raw.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")]
    )
    return f"{name}{{{inside}}} {value!r}" if labels else f"{name} {value!r}"


@given(st.lists(st.tuples(NAMES, LABELS, NUMBERS), max_size=8), st.data())
def test_any_valid_page_reads_as_written(found: list[tuple[str, dict[str, str], float]], data: st.DataObject) -> None:
    """Names, labels and values come back; with other values the same layout gives those."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout_module, "choose", lambda names, engine: Everything())
        body = "\n".join(_line(*one) for one in found).encode()
        layout = learn(lines_of(body))
        assert layout.bad_lines == 0
        assert _same(_values(body, layout), [float(value) for _, _, value in found])
        assert layout.agrees(lines_of(body), False)
        other = [(name, labels, data.draw(NUMBERS)) for name, labels, _ in found]
        again = "\n".join(_line(*one) for one in other).encode()
        assert _same(_values(again, layout), [float(value) for _, _, value in other])


@given(st.binary(max_size=200) | st.text('a{}"=, 1\n#', max_size=60).map(str.encode))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    """Nothing but PageError comes out; the parser reads the same series and values, and no others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout_module, "choose", lambda names, engine: Everything())
        try:
            layout = learn(lines_of(body))
        except PageError:
            return
        lines = lines_of(body)
        values = layout.values(lines, True)
        assert values is not None
        assert layout.agrees(lines, False)
