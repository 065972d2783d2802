"""What the engine exporter publishes: under which node, how covered, how often, and for which targets."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from exporters.engine_batches import ROWS_MAX, Batches
from exporters.engines import EngineExporter, EngineOptions
from exporters.planned import BOUNDS_MAX
from schemas.base import decode
from schemas.config import Deployment
from schemas.log import CONTENT_ARROW
from schemas.node import ENGINE_HISTOGRAMS, ENGINE_SAMPLES, GPU_SAMPLES, NodeInventory
from schemas.topics import NODE_SAMPLES, ce_type
from streams.settings import Settings
from tests.exporters.conftest import Producer, until

VLLM = """\
process_start_time_seconds 1764000000
vllm:num_requests_running{engine="0",model_name="org/m"} 3
vllm:time_to_first_token_seconds_bucket{engine="0",le="1.0",model_name="org/m"} 2
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf",model_name="org/m"} 5
vllm:time_to_first_token_seconds_count{engine="0",model_name="org/m"} 5
vllm:time_to_first_token_seconds_sum{engine="0",model_name="org/m"} 9
"""
DCGM = """\
DCGM_FI_DEV_GPU_UTIL{gpu="1",UUID="GPU-b",device="nvidia1",modelName="NVIDIA H100",Hostname="node-9",\
namespace="serving",pod="chat-1"} 40
DCGM_FI_DEV_POWER_USAGE{gpu="1",UUID="GPU-b",device="nvidia1",modelName="NVIDIA H100",Hostname="node-9",\
namespace="serving",pod="chat-1"} 300
DCGM_FI_DEV_GPU_UTIL{gpu="0",UUID="GPU-a",device="nvidia0",modelName="NVIDIA H100",Hostname="node-9"} 5
"""


class Fleet:
    """Pages by path; a path without a page is answered 503."""

    def __init__(self) -> None:
        self.pages: dict[str, str] = {}
        self.asked: dict[str, int] = defaultdict(int)
        self.address = ""

    async def handle(self, request: web.BaseRequest) -> web.Response:
        self.asked[request.path] += 1
        page = self.pages.get(request.path)
        return web.Response(status=503) if page is None else web.Response(text=page)

    def url(self, path: str) -> str:
        return f"http://{self.address}{path}"


@pytest.fixture
async def fleet() -> AsyncIterator[Fleet]:
    one = Fleet()
    runner = web.ServerRunner(web.Server(one.handle), access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    one.address = f"127.0.0.1:{runner.addresses[0][1]}"
    yield one
    await runner.cleanup()


class Running:
    """An exporter at work."""

    def __init__(self, settings: Settings, deployment: Deployment) -> None:
        self.settings, self.deployment = settings, deployment
        self.exporter: EngineExporter
        self.stop = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def begin(self, **given: Any) -> EngineExporter:
        options = EngineOptions.of(**({"period_s": 0.1, "dead_after_s": 0.3, "timeout_s": 5.0} | given))
        self.exporter = EngineExporter(self.settings, self.deployment, options)
        self.task = asyncio.create_task(self.exporter.run(self.stop))
        return self.exporter

    def gauge(self, name: str, value: str) -> float:
        samples = [s for metric in self.exporter.collect() for s in metric.samples]
        return sum(s.value for s in samples if s.name == name and value in s.labels.values())


@pytest.fixture
async def running(settings: Settings, deployment: Deployment) -> AsyncIterator[Running]:
    one = Running(settings, deployment)
    yield one
    one.stop.set()
    if one.task is not None:
        await one.task


def rows(kind: Any = ENGINE_SAMPLES) -> list[dict[str, Any]]:
    """Every row of a kind so far, with the node that it is filed under."""
    out = []
    for record in Producer.made[0].records if Producer.made else []:
        if record.type != kind.type:
            continue
        batch = record.batch()
        assert batch.meta["node"] == record.key
        texts = {name: batch.text(name) for name in batch.codes}
        for i in range(batch.rows):
            numbers = {name: None if v[i] != v[i] else v[i] for name, v in batch.numbers.items()}
            bins = {name: lists[i] for name, lists in batch.pairs.items()}
            out.append({"node": record.key, **{k: v[i] for k, v in texts.items()}, **numbers, **bins})
    return out


def of(replica: str, kind: Any = ENGINE_SAMPLES) -> list[dict[str, Any]]:
    return [row for row in rows(kind) if row["replica"] == replica]


async def test_a_row_says_what_it_covers(fleet: Fleet, running: Running) -> None:
    """Scrapes are numbered, each names the answer before it; a failed one leaves a gap in the numbers."""
    fleet.pages["/r"] = VLLM
    running.begin(targets=f"r={fleet.url('/r')};pool=chat", dead_after_s=60)
    await until(lambda: len(of("r")) >= 3)
    del fleet.pages["/r"]
    asked = fleet.asked["/r"]
    await until(lambda: fleet.asked["/r"] >= asked + 3)
    count = len(of("r"))
    fleet.pages["/r"] = VLLM
    await until(lambda: len(of("r")) > count + 1)
    found = of("r")
    assert found[0]["scrape"] == 1
    assert found[0]["since_s"] is None
    assert [b["since_s"] for b in found[1:]] == [a["at_s"] for a in found[:-1]]
    steps = [b["scrape"] - a["scrape"] for a, b in itertools.pairwise(found)]
    assert max(steps) >= 3
    assert {(r["engine"], r["pool"], r["model"], r["start_s"]) for r in found} == {
        ("vllm", "chat", "org/m", 1764000000)
    }


async def test_distributions_come_at_first_and_then_seldom(fleet: Fleet, running: Running) -> None:
    """With the first answer, as of its row; then not with every one."""
    fleet.pages["/r"] = VLLM
    running.begin(targets=f"r={fleet.url('/r')}", histogram_s=30)
    await until(lambda: len(of("r")) >= 4)
    (found,) = of("r", ENGINE_HISTOGRAMS)
    assert found["metric"] == "ttft_s"
    assert found["bins"].tolist() == [1.0, 2.0, 5.0]
    assert found["start_s"] == 1764000000
    assert found["at_s"] == of("r")[0]["at_s"]
    assert of("r")[0]["ttft_count"] == 5


async def test_distributions_come_again(fleet: Fleet, running: Running) -> None:
    """Each `histogram_s`."""
    fleet.pages["/r"] = VLLM
    running.begin(targets=f"r={fleet.url('/r')}", histogram_s=0.2)
    await until(lambda: len(of("r", ENGINE_HISTOGRAMS)) >= 3)
    assert len(of("r", ENGINE_HISTOGRAMS)) < len(of("r"))


async def test_each_node_has_batches_of_its_own(fleet: Fleet, running: Running) -> None:
    """Node by the target, else by the option, else this host where the target is on it; `-` with the pool elsewhere."""
    fleet.pages |= {"/a": VLLM, "/b": VLLM}
    host = fleet.address.replace("127.0.0.1", "127.0.0.2")  # not known to be this host
    running.begin(targets=f"a={fleet.url('/a')};node=n1,b={fleet.url('/b')},c=http://{host}/c;pool=chat;model=m")
    await until(lambda: of("a") and of("b") and of("c"))
    assert of("a")[0]["node"] == "n1"
    assert of("b")[0]["node"] == running.exporter.host
    assert {(r["node"], r["status"], r["pool"], r["model"]) for r in of("c")} == {("-", "dead", "chat", "m")}
    assert {r.topic for r in Producer.made[0].records} == {NODE_SAMPLES}


async def test_rows_that_come_together_are_one_batch(settings: Settings, deployment: Deployment) -> None:
    """A batch a node and kind; too many rows are several batches, each with its own number."""
    exporter = EngineExporter(settings, deployment, EngineOptions.of(targets="r=http://127.0.0.1:1/metrics"))
    batches = Batches(exporter.edge)
    for i in range(ROWS_MAX + 2):
        batches.add(ENGINE_SAMPLES, "n1", {"replica": f"r{i}", "at_s": 1.0})
    batches.add(ENGINE_SAMPLES, "n2", {"replica": "x", "at_s": 1.0, "running": 2.0})
    batches.add(GPU_SAMPLES, "n2", {"gpu": 0, "at_s": 1.0})
    batches.flush_all()
    records = Producer.made[0].records
    assert [(r.key, r.type, r.batch().rows) for r in records] == [
        ("n1", ENGINE_SAMPLES.type, ROWS_MAX),
        ("n1", ENGINE_SAMPLES.type, 2),
        ("n2", ENGINE_SAMPLES.type, 1),
        ("n2", GPU_SAMPLES.type, 1),
    ]
    assert [r.batch().meta["seq"] for r in records] == ["1", "2", "3", "4"]
    assert max(len(r.value) for r in records) < 512 * 1024
    assert {r.content_type for r in records} == {CONTENT_ARROW}


async def test_distributions_of_many_buckets_fit_their_topic(settings: Settings, deployment: Deployment) -> None:
    """However many rows of the most buckets come together: no batch is refused, and no scrape fails of it."""
    exporter = EngineExporter(settings, deployment, EngineOptions.of(targets="r=http://127.0.0.1:1/metrics"))
    batches = Batches(exporter.edge)
    bins = [float(i) for i in range(2 * BOUNDS_MAX + 1)]
    for i in range(ROWS_MAX - 1):
        batches.add(ENGINE_HISTOGRAMS, "n1", {"replica": f"r{i}", "at_s": 1.0, "metric": "ttft_s", "bins": bins})
    batches.flush_all()
    assert sum(r.batch().rows for r in Producer.made[0].records) == ROWS_MAX - 1
    assert max(len(r.value) for r in Producer.made[0].records) < 512 * 1024


def test_rows_and_columns_are_encoded_alike() -> None:
    """The short way from rows gives the bytes that the way by columns gives."""
    found = [{"replica": "a", "at_s": 1.0, "running": None, "scrape": 3}, {"replica": "b", "at_s": 2, "waiting": 0.0}]
    columns = {name: [row.get(name) for row in found] for name in ("replica", "at_s", "running", "scrape", "waiting")}
    meta = {"node": "n", "seq": "1"}
    assert ENGINE_SAMPLES.encode_rows(found, meta) == ENGINE_SAMPLES.encode(columns, meta)
    bins = [{"replica": "a", "at_s": 1.0, "metric": "ttft_s", "bins": [1.0, 2.0, 5.0]}]
    assert ENGINE_HISTOGRAMS.decode(ENGINE_HISTOGRAMS.encode_rows(bins)).pairs["bins"][0].tolist() == [1, 2, 5]


async def test_targets_come_and_go_without_a_restart(fleet: Fleet, running: Running, tmp_path: Path) -> None:
    """One that is added is scraped; one that is removed is asked no more and never said to be dead."""
    fleet.pages |= {"/a": VLLM, "/b": VLLM}
    path = tmp_path / "targets.json"

    def write(*names: str) -> None:
        groups = [
            {"targets": [fleet.address], "labels": {"replica": name, "__metrics_path__": f"/{name}"}} for name in names
        ]
        path.write_text(json.dumps(groups))

    write("a")
    exporter = running.begin(file_sd=str(path), targets_max=2)
    await until(lambda: of("a"))
    write("a", "b", "c")
    await until(lambda: of("b"))
    assert exporter.edge.unready == []
    assert running.gauge("fleetloop_exporter_targets", "ok") == 2
    assert running.gauge("fleetloop_exporter_targets_left_out", "bound") == 1
    first = of("a")[0]["scrape"]
    write("b")
    await until(lambda: set(exporter.slots) == {"b"})
    asked, count = fleet.asked["/a"], len(of("b"))
    await until(lambda: len(of("b")) >= count + 6)
    assert fleet.asked["/a"] <= asked + 1  # a request may have been under way
    assert {row["status"] for row in of("a")} == {"ok"}
    path.write_text("{")
    await until(lambda: exporter.discovery.failed)
    count = len(of("b"))
    await until(lambda: len(of("b")) > count)
    write()
    await until(lambda: exporter.edge.unready == ["no targets are known"])
    assert first == 1


async def test_an_engine_that_says_nothing_yet_is_alive(fleet: Fleet, running: Running) -> None:
    """A known engine's page without what makes a row is a row of nulls, not a dead target."""
    fleet.pages["/r"] = "triton_nothing 1\nnv_energy_consumption 1\n"
    running.begin(targets=f"r={fleet.url('/r')};engine=triton")
    await until(lambda: of("r"))
    assert of("r")[0]["status"] == "ok"
    assert of("r")[0]["running"] is None


async def test_gpus_of_dcgm_exporter(fleet: Fleet, running: Running) -> None:
    """Rows of GPUs under the host that they name; no replica is said to be alive, nor dead when it goes away."""
    fleet.pages["/d"] = DCGM
    running.begin(targets=f"d={fleet.url('/d')}")
    await until(lambda: len(rows(GPU_SAMPLES)) >= 4)
    del fleet.pages["/d"]
    await until(lambda: running.gauge("fleetloop_exporter_targets", "dead") == 1)
    found = {(row["node"], row["gpu"]): row for row in rows(GPU_SAMPLES)}
    assert set(found) == {("node-9", 0), ("node-9", 1)}
    assert found["node-9", 1]["util_gpu_pct"] == 40
    assert found["node-9", 1]["power_w"] == 300
    assert found["node-9", 0]["power_w"] is None
    assert rows() == []


def _inventories() -> list[NodeInventory]:
    records = Producer.made[0].records if Producer.made else []
    return [decode(NodeInventory, r.value) for r in records if r.type == ce_type(NodeInventory.kind)]


async def test_who_is_on_a_node(
    fleet: Fleet, running: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From targets that name node and pool: state, GPUs by the pod that dcgm-exporter names, else by their number."""
    monkeypatch.setattr("exporters.engine_inventory.LOOK_S", 0.05)
    fleet.pages |= {"/d": DCGM, "/chat-1": VLLM, "/c2": VLLM}
    node = {"pool": "chat", "node": "node-9"}

    def group(path: str, **labels: str) -> dict[str, Any]:
        return {"targets": [fleet.address], "labels": {"replica": path, "__metrics_path__": f"/{path}", **labels}}

    pod = {"__meta_kubernetes_namespace": "serving", "__meta_kubernetes_pod_name": "chat-1"}
    groups = [
        group("d", engine="dcgm", node="node-9"),
        group("c2", gpus="1", **node),
        group("chat-1", gpus="1", **node, **pod),
        group("late", gpus="1", **node),
        group("nowhere", pool="chat", node="-"),
        group("no-pool"),
    ]
    path = tmp_path / "targets.json"
    path.write_text(json.dumps(groups))
    exporter = running.begin(file_sd=str(path), inventory="targets", cluster="eu")
    wanted = {"c2": ("ready", [0]), "chat-1": ("ready", [1]), "late": ("starting", [])}
    await until(lambda: _last("node-9", lambda i: {r.replica: (r.state, r.gpus) for r in i.replicas} == wanted))
    (found,) = [i for i in _inventories() if i.node == "node-9"][-1:]
    assert found.cluster == "eu"
    assert [(g.gpu, g.uuid) for g in found.gpus] == [(0, "GPU-a"), (1, "GPU-b")]
    assert {r.pool for r in found.replicas} == {"chat"}
    since = {r.replica: r.since_s for r in found.replicas}
    del fleet.pages["/c2"]
    await until(lambda: _last("node-9", lambda i: _states(i).get("c2") == "failed"))
    (after,) = [i for i in _inventories() if i.node == "node-9"][-1:]
    assert {r.replica for r in after.replicas if r.since_s > since[r.replica]} == {"c2"}
    assert {i.node for i in _inventories()} <= {"node-9", exporter.host}


async def test_a_pod_that_is_said_to_hold_more_gpus_than_a_replica_may(
    fleet: Fleet, running: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first ones are its own: inventories go on."""
    monkeypatch.setattr("exporters.engine_inventory.LOOK_S", 0.05)
    line = 'DCGM_FI_DEV_FB_USED{{gpu="{}",GPU_I_ID="{}",Hostname="node-9",namespace="serving",pod="chat-1"}} 1\n'
    fleet.pages |= {"/d": "".join(line.format(i // 16, i % 16) for i in range(100)), "/chat-1": VLLM}
    pod = {"__meta_kubernetes_namespace": "serving", "__meta_kubernetes_pod_name": "chat-1"}
    labels = [
        {"replica": "d", "__metrics_path__": "/d", "engine": "dcgm", "node": "node-9"},
        {"replica": "chat-1", "__metrics_path__": "/chat-1", "pool": "chat", "node": "node-9", **pod},
    ]
    path = tmp_path / "targets.json"
    path.write_text(json.dumps([{"targets": [fleet.address], "labels": one} for one in labels]))
    running.begin(file_sd=str(path), inventory="targets")
    await until(lambda: _last("node-9", lambda i: [len(r.gpus) for r in i.replicas] == [64]))


async def test_gpus_that_nobody_names_are_counted(
    fleet: Fleet, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without dcgm-exporter a target has as many GPUs as it says, of the type it says; several engines share them."""
    monkeypatch.setattr("exporters.engine_inventory.LOOK_S", 0.05)
    fleet.pages |= {"/a": VLLM, "/b": VLLM + VLLM.replace('engine="0"', 'engine="1"')}
    known = "pool=chat;node=n1;gpus=2"
    running.begin(
        targets=f"a={fleet.url('/a')};{known};gpu_type=H100,b={fleet.url('/b')};{known}",
        inventory="targets",
        engines="apart",
    )
    await until(lambda: _last("n1", lambda i: list(_states(i).values()) == ["ready"] * 3))
    (found,) = [i for i in _inventories() if i.node == "n1"][-1:]
    assert [(g.gpu, g.gpu_type) for g in found.gpus] == [(0, "H100"), (1, "H100"), (2, "unknown"), (3, "unknown")]
    shares = {r.replica: (r.gpus, r.gpu_share) for r in found.replicas}
    assert shares == {"a:0": ([0, 1], 1.0), "b:0": ([2, 3], 0.5), "b:1": ([2, 3], 0.5)}


async def test_a_node_without_targets_is_said_once_to_be_empty(
    fleet: Fleet, running: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Then it is forgotten; GPUs that dcgm-exporter no longer speaks of are, after a while."""
    monkeypatch.setattr("exporters.engine_inventory.LOOK_S", 0.05)
    monkeypatch.setattr("exporters.engine_inventory.FORGET_S", 0.3)
    fleet.pages["/d"] = DCGM
    path = tmp_path / "targets.json"
    labels = {"replica": "d", "engine": "dcgm", "__metrics_path__": "/d"}
    path.write_text(json.dumps([{"targets": [fleet.address], "labels": labels}]))
    exporter = running.begin(file_sd=str(path), inventory="targets")
    await until(lambda: _last("node-9", lambda i: len(i.gpus) == 2))
    path.write_text("[]")
    await until(lambda: _last("node-9", lambda i: i.gpus == []))
    assert exporter.inventory is not None
    await until(lambda: exporter.inventory is not None and not exporter.inventory._sent)
    assert [len(i.gpus) for i in _inventories() if i.node == "node-9"] == [2, 0]


def _states(inventory: NodeInventory) -> dict[str, str]:
    return {r.replica: r.state for r in inventory.replicas}


def _last(node: str, where: Callable[[NodeInventory], bool]) -> NodeInventory | None:
    found = [i for i in _inventories() if i.node == node]
    return found[-1] if found and where(found[-1]) else None
