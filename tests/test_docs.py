"""What the documentation says is so: nothing in the code is missing in it, and its examples are run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from typer.testing import CliRunner

from cli import collect, reference
from cli.main import app
from cli.meanings import FOLD_METRICS, REASONS
from exporters.inventory import Holdings
from models.node.fold import NodeFold
from models.pool.findings import HOLD
from models.requests.fold import RequestsFold
from schemas.base import KINDS
from schemas.columns import COLUMNAR
from schemas.config import SPECS
from schemas.deadletters import Reason
from schemas.findings import FindingKind
from schemas.log import CONTENT_JSON, LogRecord
from schemas.topics import DEAD_LETTERS, TOPICS, ce_type
from streams.clients import partition_of
from streams.config_store import build, read_objects
from streams.settings import ELSEWHERE, SETTINGS_FILE, load_settings

ROOT = Path(__file__).parents[1]
REFERENCE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGES = (*collect.EDGES, "models", "schemas")
BLOCK = re.compile(r"(?:<!-- example: (?P<what>\S+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)```", re.DOTALL)
AT_MS = 1_764_000_005_000


def pages() -> list[Any]:
    return [pytest.param(page, id=page.name) for page in PAGES]


def blocks(language: str) -> list[tuple[Path, str, str]]:
    """(page, what the example is of, text) of each block of code in a language."""
    found = [(page, match) for page in PAGES for match in BLOCK.finditer(page.read_text(encoding="utf-8"))]
    return [(page, m["what"] or "", m["text"]) for page, m in found if m["language"] == language]


def command_lines() -> list[Any]:
    """Every line of a shell block that calls `fleetloop`."""
    lines = [(page, line) for page, _, text in blocks("sh") for line in text.replace("\\\n", " ").splitlines()]
    return [pytest.param(line, id=f"{page.name}: {line}"[:60]) for page, line in lines if line.startswith("fleetloop ")]


def test_every_finding_is_explained() -> None:
    """docs/findings.md has a row for each kind of finding, and the times that it is held."""
    page = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    rows = {cells[1].strip(" `"): cells for line in page.splitlines() if (cells := line.split("|"))[1:2] != []}
    kinds = [kind for kind in rows if kind in get_args(FindingKind)]
    assert sorted(kinds) == sorted(get_args(FindingKind))
    for kind, (opens_s, closes_s) in HOLD.items():
        told = [_seconds(text) for text in rows[kind][5].split(",")]
        assert told == [opens_s, closes_s], kind


def _seconds(text: str) -> float:
    number, _, unit = text.strip().partition(" ")
    return 0.0 if number == "at" else float(number) * {"s": 1, "min": 60}[unit]


# -- nothing is missing ----------------------------------------------------------------------------------------


def test_the_reference_is_what_the_code_says() -> None:
    """docs/reference.md is generated: `make docs` writes it anew."""
    assert reference.reference() == REFERENCE, "run: make docs"


def test_every_variable_of_the_source_is_in_the_reference() -> None:
    """A FLEETLOOP_* name in the code, a Makefile or a container file is documented."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    files += [ROOT / name for name in ("Makefile", "Dockerfile", "docker-compose.yml", ".ci/run", "tests/conftest.py")]
    named = {name for path in files for name in collect.VARIABLE.findall(path.read_text(encoding="utf-8"))}
    prefixes = {c.model_config["env_prefix"].rstrip("_") for c in collect.settings_classes()}
    assert sorted(name for name in named - prefixes if f"`{name}`" not in REFERENCE) == []


def test_every_variable_of_the_pages_exists() -> None:
    """A page names no setting that nothing reads."""
    known = set(ELSEWHERE)
    for cls in collect.settings_classes():
        known |= {cls.model_config["env_prefix"] + name.upper() for name in cls.model_fields}
    named = {name for page in PAGES for name in collect.VARIABLE.findall(page.read_text(encoding="utf-8"))}
    prefixes = {c.model_config["env_prefix"].rstrip("_") for c in collect.settings_classes()}
    assert sorted(named - known - prefixes) == []


def test_every_topic_kind_and_object_is_in_the_reference() -> None:
    """Topics, record kinds, objects of configuration and all of their fields."""
    names = [*TOPICS, *SPECS, *(cls.kind for cls in KINDS.values()), *(c.kind for c in COLUMNAR.values())]
    names += [field for cls in SPECS.values() for field in cls.model_fields]
    assert [name for name in names if f"`{name}`" not in REFERENCE] == []


def test_every_counter_and_reason_has_a_meaning() -> None:
    """The tables of meanings have exactly what folds count and dead letters say."""
    assert sorted(set(collect.fold_metrics()) ^ set(FOLD_METRICS)) == []
    assert list(REASONS) == list(get_args(Reason))


def test_every_metric_of_the_source_is_in_the_reference() -> None:
    """A text in the code that looks like a whole metric name is one that is documented."""
    stems = {n for p in collect.EDGES for _, m in collect.sources(p) for n in map(collect.text_of, collect.ast.walk(m))}
    whole = {n for n in stems if n and re.fullmatch(r"fleetloop(_[a-z0-9]+)+", n)}
    assert sorted(n for n in whole if f"`{n}`" not in REFERENCE and f"`{n}_total`" not in REFERENCE) == []


def test_every_metric_of_the_pages_exists() -> None:
    """A page names no metric that no process exposes."""
    known = set(re.findall(r"`(fleetloop_[a-z0-9_<>]+)`", REFERENCE))
    named = {n for page in PAGES for n in re.findall(r"\bfleetloop_[a-z0-9_]*[a-z0-9]\b", page.read_text("utf-8"))}
    patterns = [re.sub(r"<\w+>", "[a-z_]+", name) for name in known]
    assert sorted(n for n in named if not any(re.fullmatch(p, n) for p in patterns) and n != "fleetloop_fold") == []


# -- examples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", command_lines())
def test_each_command_of_the_pages_can_be_given(line: str) -> None:
    """Command and options are known to `fleetloop`."""
    words = shlex.split(line.split(">")[0], comments=True)[1:]
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0, result.output


def test_each_make_target_of_the_pages_exists() -> None:
    """`make X` in a page is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"(?:`|^)make ([a-z]+)", page.read_text(), re.MULTILINE)}
    assert named
    assert named <= targets


def test_each_object_of_the_pages_can_be_applied(tmp_path: Path) -> None:
    """YAML marked `apply` is taken as `fleetloop apply` would take it."""
    examples = [(page, text) for page, what, text in blocks("yaml") if what == "apply"]
    assert examples
    kinds = set()
    for page, text in examples:
        file = tmp_path / f"{page.stem}.yaml"
        file.write_text(text, encoding="utf-8")
        for document in read_objects(file):
            item, change = build(document, {}, "docs", 0.0)
            assert change.what == "created", item
            kinds.add(document["kind"])
    assert {"pool", "price", "fleet", "signer"} <= kinds


def test_each_settings_file_of_the_pages_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """YAML marked `settings` is a settings file."""
    examples = [text for _, what, text in blocks("yaml") if what == "settings"]
    assert examples
    file = tmp_path / "settings.yaml"
    for text in examples:
        file.write_text(text, encoding="utf-8")
        monkeypatch.setenv(SETTINGS_FILE, str(file))
        found = load_settings().model_dump()
        assert yaml.safe_load(text).items() <= found.items()


def test_each_mapping_of_the_pages_can_be_read(tmp_path: Path) -> None:
    """YAML marked `mapping` is what `fleetloop export nvml --mapping` takes."""
    examples = [text for _, what, text in blocks("yaml") if what == "mapping"]
    assert examples
    file = tmp_path / "replicas.yaml"
    for text in examples:
        file.write_text(text, encoding="utf-8")
        holdings = Holdings(file)
        assert holdings.refresh(AT_MS / 1000)
        assert [replica.replica for replica in holdings.replicas()] == list(yaml.safe_load(text)["replicas"])


def test_every_yaml_and_json_block_is_marked() -> None:
    """An example that says what it is of is one that is tested."""
    unmarked = [(page.name, text[:40]) for kind in ("yaml", "json") for page, what, text in blocks(kind) if not what]
    assert unmarked == []


def test_the_records_of_the_pages_are_taken() -> None:
    """Each example record, with the headers that the page names, passes its fold without a dead letter."""
    examples = {what: text for _, what, text in blocks("json")}
    assert set(examples) == {"request.rows", "engine.samples", "node.inventory"}
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    for what, example in examples.items():
        assert f"`{ce_type(what)}`" in text
        rows = json.loads(example)
        key = rows.get("node", "gpu-host-7") if isinstance(rows, dict) else rows[0]["request_id"]
        topic = "request.traces" if what == "request.rows" else "node.samples"
        fold = (RequestsFold if topic == "request.traces" else NodeFold)(topic, 0, {topic: 1, "pool.signals": 1})
        record = LogRecord(0, AT_MS, ce_type(what), key, example.encode(), CONTENT_JSON)
        letters = [r for r in fold.apply([record]) if r.topic == DEAD_LETTERS]
        assert letters == []
        if what != "node.inventory":
            batch = COLUMNAR[ce_type(what)].decode(example.encode(), CONTENT_JSON)
            unknown = {name for row in (rows if isinstance(rows, list) else [rows]) for name in row}
            assert unknown <= set(COLUMNAR[ce_type(what)].columns)
            assert batch.rows == (len(rows) if isinstance(rows, list) else 1)


def test_the_partitions_of_the_page_are_those_of_kafka() -> None:
    """A producer in another language can check its partitioner with the page's own table."""
    table = re.findall(r"^\| `([^`]+)` \| (\d+) \|$", (ROOT / "docs" / "formats.md").read_text(), re.MULTILINE)
    assert len(table) >= 3
    assert [(key, int(number)) for key, number in table] == [(key, partition_of(key.encode(), 16)) for key, _ in table]


# -- links ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages())
def test_each_link_leads_somewhere(page: Path) -> None:
    """Files exist, and so do the headings that a link names."""
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, heading = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in slugs, target
