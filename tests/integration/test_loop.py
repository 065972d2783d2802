"""The whole loop on a real broker, its processes killed, suspended, joined and ended under load, and the broker killed:
what came out equals the producers' own ledger, and the folds run once in one process."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from agents import LEVELS, make_fold
from executors.runtime import run_executor
from executors.simulator import SimulatorTarget
from models.fleet.audit import broken_at
from schemas.base import decode
from schemas.config import ConfigObject, LimitsSpec
from schemas.decisions import AuditEntry
from schemas.signals import ENGINE_WINDOWS, REQUEST_WINDOWS
from schemas.topics import AUDIT, DEAD_LETTERS, DECISIONS, FLEET_CONFIG, LEVEL_TOPIC, ce_type
from simulator.process import STRIDE_S, SimulatorOptions, run_simulator
from simulator.publish import scenario_config
from simulator.scenario import Scenario
from streams.broker import LocalBroker
from streams.clients import admin_client, partition_of
from streams.deployment import read_deployment
from streams.producer import EdgeProducer
from streams.reader import LogReader, header, read_to_end
from streams.replay import kept_checkpoints, replay
from streams.settings import PREFIX
from tests.integration import truth
from tests.integration.conftest import Stage, together
from tests.integration.harness import ROOT, Scene, Worker, eventually, suspend_past_session

SPEED = 10.0
LOAD_S = 420.0
"""Fleet time that the load lasts."""
OUTAGE_S = 300.0
"""Grace for node samples: the broker is away for some seconds, which are ten times as many of fleet time."""
TOKEN = "loop"
FOLDS = ("node", "requests", "pool", "fleet")


class Crew:
    """The workers. One that ends unasked is started again, as the supervisor does."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.workers: dict[str, Worker] = {}
        """`level`, or `level/anything` for another of that level."""
        self._watch = asyncio.create_task(self._restart())

    def start(self, name: str) -> Worker:
        """Starts one."""
        worker = self.workers[name] = self.scene.level(name.split("/")[0])
        return worker

    async def kill(self, *names: str) -> None:
        """kill -9 of some, which come back."""
        killed = [self.workers[name] for name in names]
        for worker in killed:
            worker.kill()
        for name, old in zip(names, killed, strict=True):
            await eventually(f"{name} started again", lambda n=name, o=old: self.workers[n] is not o)  # type: ignore[misc]
            await self.workers[name].saw("restored")

    async def leave(self, name: str) -> None:
        """SIGTERM of one that does not come back."""
        worker = self.workers.pop(name)
        assert await worker.terminate() == 0, worker.path.read_text()[-3000:]

    async def _restart(self) -> None:
        while True:
            for name, worker in list(self.workers.items()):
                if worker.process.poll() is not None:
                    self.start(name)
            await asyncio.sleep(0.2)

    async def end(self) -> None:
        """Nobody is started again."""
        self._watch.cancel()
        await asyncio.gather(self._watch, return_exceptions=True)


class Fleet:
    """The simulated fleet and its executor, in this process."""

    def __init__(self, scene: Scene, scenario: Scenario) -> None:
        self.scene, self.scenario = scene, scenario
        self.ledger = scene.folder / "ledger.ndjson"
        self._stop = asyncio.Event()

    async def start(self) -> None:
        """Starts both."""
        settings, port = self.scene.settings, asyncio.get_running_loop().create_future()
        deployment = await read_deployment(settings)
        options = SimulatorOptions(port=0, token=TOKEN, record=self.ledger, on_started=port.set_result)
        simulator = run_simulator(settings, deployment, self.scenario, options, self._stop)
        self._simulator = asyncio.create_task(simulator)
        self.url = f"http://127.0.0.1:{await asyncio.wait_for(port, 30)}"
        target = SimulatorTarget(self.url, TOKEN)
        self._executor = asyncio.create_task(run_executor(settings, deployment, target, self._stop))

    async def get(self, path: str) -> Any:
        """What its control port says."""
        async with aiohttp.ClientSession() as session, session.get(self.url + path) as answer:
            return await (answer.text() if path == "/metrics" else answer.json())

    async def bill(self) -> tuple[float, dict[str, float]]:
        """Fleet time in s, and by pool what was allocated up to then in USD: the simulator's own integral."""
        at_s, usd = 0.0, {}
        for family in text_string_to_metric_families(await self.get("/metrics")):
            for sample in family.samples:
                if sample.name == "fleetloop_simulator_fleet_seconds":
                    at_s = sample.value
                elif sample.name == "fleetloop_simulator_cost_usd_total":
                    usd[sample.labels["pool"]] = sample.value
        return at_s, usd

    async def stop(self) -> list[dict[str, Any]]:
        """Ends both; gives the ledger's rows, every one of which the broker has."""
        self._stop.set()
        report, _ = await asyncio.gather(self._simulator, self._executor)
        assert report["dropped_records"] == {}
        with self.ledger.open() as lines:
            return [json.loads(line) for line in lines]

    async def cancel(self) -> None:
        """Ends both at once, whatever they do."""
        self._stop.set()
        tasks = [getattr(self, name, None) for name in ("_simulator", "_executor")]
        await asyncio.gather(*(task for task in tasks if task), return_exceptions=True)


@partial(together, first=True)
async def test_the_loop_through_faults(stage: Stage) -> None:
    """Nothing is lost, nothing counted twice, no version has two contents; decisions are executed and verified."""
    broker = await stage.own_broker()
    scene = await stage.scene(broker, speed=SPEED)
    scenario = truth.scenario(LOAD_S)
    crew, fleet = Crew(scene), Fleet(scene, scenario)
    try:
        await _begin(scene, scenario, crew)
        await fleet.start()
        await _faults(scene, broker, crew)
        bill = await _ended(fleet)
        rows = await fleet.stop()
        ends = await _drained(scene, crew)
    finally:
        await fleet.cancel()
        await crew.end()
    await _check_ledger(scene, scenario, rows)
    await _check_money(scene, scenario, bill)
    await _check_decisions(scene)
    await _check_folds(scene, ends)
    await _check_replays(scene)


# -- what happens ----------------------------------------------------------------------------------------------


async def _begin(scene: Scene, scenario: Scenario, crew: Crew) -> None:
    """One process a level, with the configuration in every log."""
    limits = LimitsSpec(grace_node_s=OUTAGE_S).model_dump(mode="json")
    objects = scenario_config(scenario)
    objects.append(ConfigObject(object_kind="limits", name="limits", revision=1, spec=limits))
    ids = {f"{item.key}@1" for item in objects}
    async with EdgeProducer(scene.settings, "test") as producer:
        for item in objects:
            producer.send(FLEET_CONFIG, item.key, item.encode(), type=ce_type(item.kind), id=f"{item.key}@1")
        assert await producer.flush(60)
    for level in LEVELS:
        crew.start(level)
    for level in FOLDS:
        await crew.workers[level].saw("restored")
        await _until(f"configuration in {level}", partial(_configured, scene, level, ids))


async def _configured(scene: Scene, level: str, ids: set[str]) -> bool:
    async with LogReader(scene.settings, LEVEL_TOPIC[level]) as reader:
        found: dict[int, set[str]] = {partition: set() for partition in reader.positions}
        async for record in reader.to_end():
            found[record.partition].add(header(record, "ce_id"))
    return all(ids <= seen for seen in found.values())


async def _until(what: str, ready: Callable[[], Awaitable[bool]], within_s: float = 90.0) -> None:
    deadline = time.monotonic() + within_s
    while not await ready():
        assert time.monotonic() < deadline, f"not within {within_s:.0f} s: {what}"
        await asyncio.sleep(0.2)


async def _faults(scene: Scene, broker: LocalBroker, crew: Crew) -> None:
    """Two join, every level is killed -9, one becomes a zombie, the broker is killed, the two leave."""
    joined = [crew.start(name) for name in ("node/2", "requests/2")]
    for worker in joined:
        await worker.saw("restored")
    await asyncio.sleep(1)
    await crew.kill("node", "requests")
    await asyncio.sleep(1)
    await crew.kill("pool", "fleet")
    await asyncio.sleep(1)
    zombie, heir = crew.workers["node/2"], crew.workers["node"]
    await suspend_past_session(zombie, heir)
    broker.kill()
    await asyncio.sleep(1)
    await asyncio.to_thread(broker.restart)
    for level in FOLDS:
        await _folded(scene, level)
    for name in ("node/2", "requests/2"):
        await crew.leave(name)


async def _folded(scene: Scene, level: str) -> None:
    """Waits until a level has folded and kept all that its log has now."""
    async with LogReader(scene.settings, LEVEL_TOPIC[level]) as reader:
        wanted = await reader.ends()

    async def folded() -> bool:
        ends = await _committed(scene, level)
        return all(ends.get(partition, 0) >= end for partition, end in wanted.items())

    await _until(f"{level} has folded its log", folded)


async def _ended(fleet: Fleet) -> tuple[int, dict[str, float]]:
    """Waits for the end of the load and of every request. Gives a window's start, Unix s, and what had been allocated
    until then, after which fleet time went on for long enough that it is billed."""

    async def done() -> bool:
        return bool((await fleet.get("/v1/ledger"))["done"])

    await _until("the load has ended", done)
    state = await fleet.get("/v1/state")
    base_s = state["log_s"] - state["fleet_s"]
    readings = [await fleet.bill()]
    while True:
        await asyncio.sleep(0.5)
        readings.append(await fleet.bill())
        if len(readings) < 4:
            continue
        (t0, c0), (t1, c1), (t2, c2), (t3, c3) = readings = readings[-4:]
        start_s = int((base_s + t2) // 10) * 10
        at_s = start_s - base_s
        steady = all(
            abs((c1[p] - c0[p]) / (t1 - t0) - (c3[p] - c2[p]) / (t3 - t2)) < 1e-9 * c0[p] for p in c0
        )  # the allocation did not change meanwhile: between two readings the bill is a straight line
        if steady and t1 <= at_s <= t2:
            usd = {p: c1[p] + (c2[p] - c1[p]) * (at_s - t1) / (t2 - t1) for p in c1}
            break
    await _until("that is billed", lambda: _past(fleet, at_s + 20))
    return start_s, usd


async def _past(fleet: Fleet, at_s: float) -> bool:
    return (await fleet.bill())[0] >= at_s


async def _drained(scene: Scene, crew: Crew) -> dict[str, dict[int, int]]:
    """Ends level after level when it has folded all; gives what each has folded: partition -> end."""
    for level in FOLDS:
        await _folded(scene, level)
        await crew.leave(level)
    await crew.leave("config")
    return {level: await _committed(scene, level) for level in FOLDS}


async def _committed(scene: Scene, level: str) -> dict[int, int]:
    admin = admin_client(scene.settings)
    await admin.start()
    try:
        offsets = await admin.list_consumer_group_offsets(scene.settings.group(level))
        return {tp.partition: found.offset for tp, found in offsets.items()}
    finally:
        await admin.close()


# -- what came of it -------------------------------------------------------------------------------------------


async def _check_ledger(scene: Scene, scenario: Scenario, rows: list[dict[str, Any]]) -> None:
    """Level 1, and the bills' requests, against the ledger."""
    cells = truth.by_window(rows, scenario)
    assert {row["event"] for row in rows} == {"arrival", "end"}
    assert truth.merged(await truth.windows(scene.settings, REQUEST_WINDOWS)) == cells
    found = {
        (pool, tenant, start): (float(row["requests"]), row["input_tokens"], row["output_tokens"])
        for (pool, tenant, start), row in (await truth.bills(scene.settings)).items()
        if tenant is not None
    }
    assert found == truth.by_tenant(cells)
    assert [record async for record in read_to_end(scene.settings, DEAD_LETTERS)] == []
    tokens = truth.generated(await truth.windows(scene.settings, ENGINE_WINDOWS))
    wanted = truth.tokens_by_replica(rows)
    alive = await _alive(scene)
    assert alive <= set(tokens)
    for replica, count in tokens.items():
        # a counter's growth is spread over windows, whose sum is then right but for rounding
        if replica in alive:
            assert abs(count - wanted.get(replica, 0.0)) <= 1e-6 * max(1.0, count), replica
        else:  # what it did after its last scrape nobody has seen
            assert count <= wanted.get(replica, 0.0) * (1 + 1e-6), replica
    assert set(tokens) > alive, "one has died"


async def _alive(scene: Scene) -> set[str]:
    """Replicas that the last inventory of each node names as ready."""
    last: dict[str, dict[str, Any]] = {}
    async for record in read_to_end(scene.settings, LEVEL_TOPIC["node"]):
        if header(record, "ce_type") == ce_type("node.inventory"):
            item = json.loads(record.value)
            last[item["node"]] = max(item, last.get(item["node"], item), key=lambda i: i["at_s"])
    return {r["replica"] for item in last.values() for r in item["replicas"] if r["state"] == "ready"}


async def _check_money(scene: Scene, scenario: Scenario, bill: tuple[int, dict[str, float]]) -> None:
    """What all windows before a moment cost is what the simulator had allocated until then."""
    until_s, wanted = bill
    gone = set(truth.generated(await truth.windows(scene.settings, ENGINE_WINDOWS))) - await _alive(scene)
    found = dict.fromkeys(wanted, 0.0)
    parts = dict.fromkeys(wanted, 0.0)
    for (pool, tenant, start), row in (await truth.bills(scene.settings)).items():
        if start < until_s:
            assert row["usd_total"] is not None, (pool, tenant, start)
            if tenant is None:
                found[pool] += row["usd_total"]
                parts[pool] += row["usd_idle"]
            else:
                parts[pool] += row["usd_direct"]
    for pool in scenario.pools:
        usd_per_s = scenario.gpus[pool.gpu].usd_per_gpu_hour * pool.tp * pool.gpu_share / 3600
        # exact, but that a replica that goes away is billed to the inventory that says so, a stride later at most
        slack = STRIDE_S * usd_per_s * sum(name.startswith(f"{pool.name}-") for name in gone)
        assert -1e-6 <= found[pool.name] - wanted[pool.name] <= slack + 1e-6, (pool.name, found, wanted)
        assert abs(parts[pool.name] - found[pool.name]) <= 1e-6 * found[pool.name]


async def _check_decisions(scene: Scene) -> None:
    """The audit is whole, and something was executed and found good."""
    entries: dict[int, AuditEntry] = {}
    async for record in read_to_end(scene.settings, AUDIT):
        entry = decode(AuditEntry, record.value)
        assert entries.setdefault(entry.sequence, entry) == entry
    assert broken_at(entries[number] for number in sorted(entries)) is None
    assert sorted(entries) == list(range(len(entries)))
    done = set()
    async for record in read_to_end(scene.settings, DECISIONS):
        states = [step["state"] for step in json.loads(record.value)["history"]]
        if "executed" in states and "verified" in states:
            done.add(json.loads(record.value)["id"])
    assert done, "no decision was executed and verified"


async def _check_folds(scene: Scene, ends: dict[str, dict[int, int]]) -> None:
    """Each fold run once over the final log says what was published, and nothing else was."""
    live = await truth.published(scene.settings)
    once: dict[str, dict[truth.Name, str]] = {}
    for found in await asyncio.gather(*(_once(scene, level, ends[level]) for level in FOLDS)):
        once.update(found)
    for source, results in once.items():
        said = live.get(source, {})
        different = {name for name in results if said.get(name, results[name]) != results[name]}
        assert not different, (source, sorted(different)[:5])
        assert truth.greatest(said) == truth.greatest(results), source
        assert said == results, (source, sorted(set(said) ^ set(results))[:5])
    levels = {source for source in live if source.split("/")[0] in {LEVEL_TOPIC[level] for level in FOLDS}}
    assert levels <= set(once)
    assert {source.split("/")[0] for source in once} == {LEVEL_TOPIC[level] for level in FOLDS}


async def _once(scene: Scene, level: str, ends: dict[int, int]) -> dict[str, dict[truth.Name, str]]:
    variables = {PREFIX + k.upper(): str(v) for k, v in scene.settings.model_dump(exclude_defaults=True).items()}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.integration.once", level),
        *(f"{partition}={end}" for partition, end in ends.items()),
        cwd=ROOT,
        env={**os.environ, **variables},
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, level
    found: dict[str, dict[truth.Name, str]] = {}
    for line in output.splitlines():
        source, topic, kind, id, content = json.loads(line)
        results = found.setdefault(source, {})
        assert results.setdefault((topic, kind, id), content) == content, f"{id} has two contents"
    return found


async def _check_replays(scene: Scene) -> None:
    """`replay --compare` agrees, from the beginning and from a kept checkpoint, which leads to the same state."""
    deployment = await read_deployment(scene.settings)
    keys = {"node": "h100-0", "pool": "chat"}
    for level in FOLDS:
        count = deployment.partitions[LEVEL_TOPIC[level]]
        partition = partition_of(keys[level].encode(), count) if level in keys else 0
        fold = partial(make_fold, level)
        again = partial(replay, scene.settings, deployment, level, fold, partition, compare=True)
        whole = await again()
        assert whole.same, (whole.missing, whole.different)
        assert whole.fold_errors == []
        kept = await kept_checkpoints(scene.settings, level, partition)
        part = await again(from_checkpoint=kept[len(kept) // 2].offset)
        assert part.same, (part.missing, part.different)
        assert 0 < part.records < whole.records
        assert part.dump_sha256 == whole.dump_sha256
