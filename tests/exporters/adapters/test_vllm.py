"""The vLLM adapter on pages as real engines gave them, held against a plain reader."""

from __future__ import annotations

import csv
import gzip
import itertools
from pathlib import Path

import pytest

from exporters.adapters import choose
from exporters.adapters.base import Chosen, Series
from exporters.adapters.vllm import Vllm
from exporters.planned import Read, together
from schemas.node import ENGINE_HISTOGRAMS, ENGINE_SAMPLES
from tests.exporters.adapters.pages import Plain, known, read, text_of
from tests.recorded import scrapes

TIMES = {
    "ttft": "vllm:time_to_first_token_seconds",
    "tpot": "vllm:request_time_per_output_token_seconds",
    "itl": "vllm:inter_token_latency_seconds",
    "e2e": "vllm:e2e_request_latency_seconds",
    "queue": "vllm:request_queue_time_seconds",
    "prefill": "vllm:request_prefill_time_seconds",
}
SIZES = {"input_tokens": "vllm:request_prompt_tokens", "output_tokens": "vllm:request_generation_tokens"}


def newest(page: Plain, engine: str) -> dict[str, float]:
    """What vLLM 0.32 says of one engine, in our columns."""
    mine = {"engine": engine}
    ended = {reason: page.one("vllm:request_success_total", finished_reason=reason, **mine) for reason in REASONS}
    return {
        "start_s": page.one("process_start_time_seconds"),
        "running": page.one("vllm:num_requests_running", **mine),
        "waiting": page.one("vllm:num_requests_waiting", **mine),
        "kv_usage_ratio": page.one("vllm:kv_cache_usage_perc", **mine),
        "kv_capacity_tokens": 100 * 32,
        "prompt_tokens": page.one("vllm:prompt_tokens_total", **mine),
        "cached_tokens": page.one("vllm:prompt_tokens_cached_total", **mine),
        "generation_tokens": page.one("vllm:generation_tokens_total", **mine),
        "requests": ended["stop"] + ended["length"] + ended["repetition"],
        "aborted": ended["abort"],
        "failed": ended["error"],
        "preemptions": page.one("vllm:num_preemptions_total", **mine),
        "iterations": page.one("vllm:iteration_tokens_total_count", **mine),
        **{f"{what}_s_sum": page.one(f"{family}_sum", **mine) for what, family in TIMES.items()},
        **{f"{what}_count": page.one(f"{family}_count", **mine) for what, family in TIMES.items()},
    }


REASONS = ("stop", "length", "abort", "error", "repetition")


@pytest.mark.parametrize("name", ["vllm-0.32.0-cpu-fresh-defaults.prom", "vllm-0.32.0-cpu-overload.prom"])
def test_vllm_0_32(data_dir: Path, name: str) -> None:
    """The v1 engine: every column as a plain reader finds it, aborts and errors apart from what finished."""
    text = text_of(data_dir, name)
    page = Plain(text)
    (row,) = read(text)
    assert known(row) == {**newest(page, "0"), "rejected": page.sum("vllm:admission_rejections_total")}
    assert row.plan.texts == {"model": "tiny-llama-random"}


def test_the_overload_in_figures(data_dir: Path) -> None:
    """Seven running, 37 waiting, 20 preemptions: as written down with the recording."""
    (row,) = read(text_of(data_dir, "vllm-0.32.0-cpu-overload.prom"))
    found = known(row)
    assert (found["running"], found["waiting"], found["preemptions"], found["iterations"]) == (7, 37, 20, 20562)
    assert (found["prompt_tokens"], found["generation_tokens"], found["requests"]) == (210951, 99045, 1034)
    assert found["kv_usage_ratio"] == pytest.approx(46 / 99)
    assert (found["itl_count"], found["tpot_count"]) == (98004, 1034)


def test_distributions_have_the_bounds_of_the_page(data_dir: Path) -> None:
    """Buckets as the engine counts them; none of our own."""
    for name in ("vllm-0.32.0-cpu-overload.prom", "vllm-0.32.0-cpu-fresh-defaults.prom"):
        text = text_of(data_dir, name)
        page = Plain(text)
        (row,) = read(text)
        families = {**{f"{what}_s": family for what, family in TIMES.items()}, **SIZES}
        assert row.bins == {what: page.bins(family) for what, family in families.items()}
    moved = text.replace('le="0.3"', 'le="0.123"')
    (row,) = read(moved)
    assert row.bins["queue_s"][0] == 0.123


def test_vllm_0_4(data_dir: Path) -> None:
    """The v0 engine: old names, no engine label, no queue histogram, no prefix cache, reasons on first use only."""
    text = text_of(data_dir, "vllm-v0.4-opt125m.prom")
    page = Plain(text)
    (row,) = read(text)
    assert known(row) == {
        "start_s": 1718140558.3,
        "running": 0,
        "waiting": 0,
        "kv_usage_ratio": 0,
        "kv_capacity_tokens": 7281 * 16,
        "prompt_tokens": 5,
        "generation_tokens": 7,
        "requests": 1,
        "preemptions": 0,
        "ttft_s_sum": 0.31326723098754883,
        "ttft_count": 1,
        "itl_s_sum": 0.19016313552856445,
        "itl_count": 6,
        "e2e_s_sum": 0.5034303665161133,
        "e2e_count": 1,
    }
    assert row.plan.texts == {"model": "facebook/opt-125m"}
    assert row.bins["itl_s"] == page.bins("vllm:time_per_output_token_seconds")
    assert row.bins["e2e_s"][0] == 1.0
    assert set(row.bins) == {"ttft_s", "itl_s", "e2e_s", "input_tokens", "output_tokens"}


def test_two_engines_behind_one_port(data_dir: Path) -> None:
    """Apart by their label; what only the server counts is neither's; together as sums and means."""
    text = text_of(data_dir, "vllm-0.32.0-cpu-dp2-busy.prom")
    page = Plain(text)
    rows = read(text)
    assert [row.plan.key for row in rows] == ["0", "1"]
    for row in rows:
        assert known(row) == newest(page, row.plan.key)
        assert row.bins["ttft_s"] == page.bins("vllm:time_to_first_token_seconds", engine=row.plan.key)
    both = known(together(rows))
    assert (both["prompt_tokens"], both["running"], both["kv_capacity_tokens"]) == (2891, 12, 6400)
    assert both["kv_usage_ratio"] == pytest.approx((51 / 99 + 49 / 99) / 2)
    assert both["start_s"] == 1795520653.32


def test_blocks_of_data_parallel_engines_are_said_as_their_sum() -> None:
    """A version without the size in tokens says for each of two engines the blocks of both."""
    config = 'vllm:cache_config_info{{engine="{0}",block_size="16",num_gpu_blocks="600"}} 1\n'
    running = 'vllm:num_requests_running{{engine="{0}"}} 1\n'
    one = read((config + running).format("0"))
    two = read("".join((config + running).format(engine) for engine in "01"))
    assert [row.values["kv_capacity_tokens"] for row in one] == [600 * 16]
    assert [row.values["kv_capacity_tokens"] for row in two] == [300 * 16, 300 * 16]


@pytest.mark.parametrize(
    "labels", ['block_size="None",num_gpu_blocks="7"', 'block_size="16",num_gpu_blocks="None"', ""]
)
def test_an_unknown_cache_is_unknown(labels: str) -> None:
    """Labels say None where the engine does not know yet."""
    (row,) = read(f"vllm:cache_config_info{{{labels}}} 1\nvllm:num_requests_running 0\n")
    assert known(row) == {"running": 0}


def test_speculative_decoding(data_dir: Path) -> None:
    """Time per output token by request; time between messages beside it, which is not by token here."""
    text = text_of(data_dir, "vllm-0.32.0-cpu-ngram-specdecode-excerpt.prom")
    page = Plain(text)
    (row,) = read(text)
    found = known(row)
    assert (found["draft_tokens"], found["accepted_tokens"]) == (15900, 58)
    assert (found["tpot_count"], found["itl_count"], found["generation_tokens"]) == (178, 16979, 17215)
    assert found["tpot_s_sum"] == page.one("vllm:request_time_per_output_token_seconds_sum")
    assert found["itl_s_sum"] == page.one("vllm:inter_token_latency_seconds_sum")
    assert "running" not in found
    assert "prompt_tokens" not in found
    # No process metrics in the excerpt: the start of its counters.
    assert found["start_s"] == page.one("vllm:generation_tokens_created")


def test_pages_of_others_are_not_vllms(data_dir: Path) -> None:
    """Other engines, proxies and exporters are not taken for vLLM, nor is Dynamo's worker, which has its names."""
    folder = data_dir / "engine-metrics"
    others = [path for path in sorted(folder.glob("*.prom")) if not path.name.startswith("vllm")]
    assert len(others) >= 12
    for path in others:
        found = choose({line.name for line in Plain(path.read_text(encoding="utf-8")).lines})
        assert found is None or found.engine != "vllm", path.name


def test_every_row_is_taken_by_the_log(data_dir: Path) -> None:
    """On every recorded page that speaks vLLM's names the row and its distributions are valid records."""
    pages = [*(data_dir / "engine-metrics").glob("vllm*.prom"), *(data_dir / "engine-metrics").glob("dynamo*.prom")]
    assert len(pages) >= 7
    for path in pages:
        for row in read(path.read_text(encoding="utf-8")):
            sample = {"replica": "r", "at_s": 1.0, "status": "ok", **row.plan.texts, **row.values}
            encoded = ENGINE_SAMPLES.encode({name: [value] for name, value in sample.items()})
            assert ENGINE_SAMPLES.decode(encoded).refused == []
            bins = [{"replica": "r", "at_s": 1.0, "metric": what, "bins": flat} for what, flat in row.bins.items()]
            encoded = ENGINE_HISTOGRAMS.encode({name: [one[name] for one in bins] for name in bins[0]})
            assert ENGINE_HISTOGRAMS.decode(encoded).refused == []


def _rows(folder: Path) -> list[Read]:
    chosen = Chosen()
    return [together(read(text, chosen=chosen)) for _, text in scrapes(folder) if text is not None]


def test_a_whole_run_agrees_with_its_clients(data_dir: Path) -> None:
    """331 scrapes of a real engine: counters never fall, and the final ones are what its clients counted."""
    folder = data_dir / "engine-metrics" / "vllm-cpu-run"
    rows = [known(row) for row in _rows(folder)]
    assert len(rows) == 331
    counters = ("prompt_tokens", "cached_tokens", "generation_tokens", "requests", "iterations", "ttft_count")
    for column in counters:
        values = [row[column] for row in rows]
        assert all(b >= a for a, b in itertools.pairwise(values)), column
    with gzip.open(folder / "requests.csv.gz", "rt", encoding="utf-8") as file:
        requests = list(csv.DictReader(file))
    answered = sum(r["outcome"] == "ok" for r in requests)
    assert rows[-1]["requests"] - rows[0]["requests"] == answered
    gone = sum(r["outcome"] == "client_abort" for r in requests)
    assert rows[-1]["ttft_count"] - rows[0]["ttft_count"] == answered + gone
    assert (rows[-1]["prompt_tokens"], rows[-1]["cached_tokens"]) == (392336, 107520)
    assert max(row["waiting"] for row in rows) == 37
    assert max(row["kv_usage_ratio"] for row in rows) == 1.0
    assert {row["kv_capacity_tokens"] for row in rows} == {3200}


def test_a_restart_is_another_start(data_dir: Path) -> None:
    """After SIGKILL the scrapes fail, then come with another start and counters that began again."""
    folder = data_dir / "engine-metrics" / "vllm-cpu-restart"
    failed = sum(text is None for _, text in scrapes(folder))
    starts: dict[float, list[float]] = {}
    for row in map(known, _rows(folder)):
        starts.setdefault(row["start_s"], []).append(row["generation_tokens"])
    assert failed == 21
    before, after = starts.values()
    assert before[-1] > after[0]


def test_the_simulators_deviations(data_dir: Path) -> None:
    """It names a family on first use only, without engine label, some without `_total`, and another label of reasons:
    what was unknown becomes known, and the source of a column never changes in between."""
    chosen = Chosen()
    names: dict[str, str] = {}
    rows = []
    for _, text in scrapes(data_dir / "engine-metrics" / "inference-sim-run"):
        assert text is not None
        (row,) = read(text, chosen=chosen)
        rows.append(known(row))
        for column, name in chosen._names.items():
            assert names.setdefault(column, name) == name
    assert len(rows) == 168
    assert "generation_tokens" not in rows[0]
    page = Plain(text)
    last = rows[-1]
    assert last["requests"] == 445 == page.sum("vllm:request_success_total")
    assert last["itl_count"] == page.one("vllm:inter_token_latency_seconds_count")
    assert "tpot_count" not in last
    assert last["cached_tokens"] == page.one("vllm:prefix_cache_hits")
    assert last["queue_count"] == 158
    assert "aborted" not in last


PAGE = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:generation_tokens_total{engine="0",model_name="a"} 10
vllm:generation_tokens_total{engine="0",model_name="b"} 32
"""


def test_missing_is_null_and_never_zero() -> None:
    """Only what the page has is known; models of one engine are summed."""
    (row,) = read(PAGE)
    assert known(row) == {"running": 3, "generation_tokens": 42}
    assert row.bins == {}


def test_a_better_name_that_appears_is_taken_after_a_restart_only() -> None:
    """A counter does not jump from one meaning to another while the process lives."""
    old = "vllm:prefix_cache_hits_total 50\n"
    new = "vllm:prompt_tokens_cached_total 2\n"
    chosen = Chosen()
    counts = []
    for page, forget in ((old, False), (new + old, False), (new + old, True)):
        if forget:
            chosen.forget()
        counts.append(read(page, chosen=chosen)[0].values["cached_tokens"])
    assert counts == [50, 50, 2]


def test_prefix_cache_hits_in_blocks_are_not_tokens() -> None:
    """`gpu_prefix_cache_hits` counts blocks in some versions and tokens in others: it is not taken."""
    (row,) = read("vllm:gpu_prefix_cache_hits_total 50\nvllm:num_requests_running 1\n")
    assert known(row) == {"running": 1}


def test_together_with_an_unknown_part_is_unknown() -> None:
    """The sum of a known and an unknown counter is unknown."""
    rows = read('vllm:generation_tokens_total{engine="0"} 5\nvllm:num_requests_running{engine="1"} 1\n')
    assert "generation_tokens" not in known(together(rows))


def test_an_engines_label_becomes_part_of_a_name() -> None:
    """What the label says is told apart without what a replica's name may not have."""
    series = [Series("vllm:num_requests_running", {"engine": engine}) for engine in ("0", "a/b", "/")]
    assert [plan.key for plan in Vllm().plan(series, Chosen())] == ["0", "a-b", ""]
