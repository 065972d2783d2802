"""What the fault tests share: worker processes, a load with a ledger, and the judgement over what came out.

The judgement never asks our folds: what had to be counted is read from the log itself, and that the log has
everything that was sent is checked by id.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from schemas.topics import COST_WINDOWS, DEAD_LETTERS, NODE_SAMPLES
from streams.broker import LocalBroker
from streams.clients import admin_client, partition_of
from streams.deployment import ensure_deployment
from streams.producer import EdgeProducer
from streams.reader import header, read_to_end
from streams.replay import kept_checkpoints
from streams.settings import PREFIX, Settings, load_settings

KEYS = [f"key-{i}" for i in range(23)]
ROOT = Path(__file__).parents[2]


async def eventually(what: str, ready: Callable[[], bool], within_s: float = 90.0) -> None:
    """Waits until something holds; fails with its name when it does not."""
    deadline = time.monotonic() + within_s
    while not ready():
        assert time.monotonic() < deadline, f"not within {within_s:.0f} s: {what}"
        await asyncio.sleep(0.05)


class Worker:
    """One process; its log lines are kept."""

    def __init__(
        self, settings: Settings, folder: Path, name: str, *arguments: str, module: str = "tests.integration.worker"
    ) -> None:
        variables = {
            PREFIX + k.upper(): str(v)
            for k, v in settings.model_dump(exclude_defaults=True).items()
            if k != "sasl_password"
        }
        self.path = folder / f"{name}-{random.randrange(1 << 32):08x}.log"
        with self.path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=ROOT,
                env={**os.environ, **variables, PREFIX + "LOG_FORMAT": "json"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )

    def lines(self, event: str) -> list[dict[str, Any]]:
        """Its log lines of an event."""
        found = []
        for line in self.path.read_bytes().splitlines():
            if line.startswith(b"{") and line.endswith(b"}"):
                item = json.loads(line)
                if item.get("event") == event:
                    found.append(item)
        return found

    async def saw(self, event: str, times: int = 1, within_s: float = 90.0) -> None:
        """Waits until it logged an event so often."""

        def seen() -> bool:
            assert self.process.poll() is None or len(self.lines(event)) >= times, self.path.read_text()[-3000:]
            return len(self.lines(event)) >= times

        await eventually(f"{event!r} x {times} in {self.path.name}", seen, within_s)

    def signal(self, number: int) -> None:
        """Sends it a signal."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    async def terminate(self) -> int:
        """SIGTERM, and waits; gives its exit status."""
        self.signal(signal.SIGTERM)
        await eventually("ended after SIGTERM", lambda: self.process.poll() is not None)
        return int(self.process.returncode)


class Scene:
    """A deployment of its own on a broker, with workers and a load."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.workers: list[Worker] = []
        self.ids: set[str] = set()
        self._load: asyncio.Task[None] | None = None
        self._number = 0

    @classmethod
    async def make(
        cls, broker: LocalBroker, prefix: str, folder: Path, *, speed: float = 1.0, **settings: Any
    ) -> Scene:
        """With checkpoints each second and short sessions, so that faults take seconds."""
        options = {
            "bootstrap_servers": broker.bootstrap_servers,
            "topic_prefix": prefix,
            "health_port": 0,
            "checkpoint_interval_s": 1.0,
            "session_timeout_s": 3.0,
            **settings,
        }
        made = load_settings(**options)
        await ensure_deployment(made, local=True, speed=speed)
        return cls(made, folder)

    def start(self, name: str = "w", *arguments: str) -> Worker:
        """Starts a worker."""
        worker = Worker(self.settings, self.folder, name, *arguments)
        self.workers.append(worker)
        return worker

    def level(self, level: str) -> Worker:
        """Starts a level's own process, with its own fold."""
        worker = Worker(self.settings, self.folder, level, level, module="agents")
        self.workers.append(worker)
        return worker

    def load(self, rate: float = 1500.0) -> None:
        """Begins to send rows, some in batches, until `stop_load`."""
        self._load = asyncio.create_task(self._send_rows(rate))

    async def _send_rows(self, rate: float) -> None:
        async with EdgeProducer(self.settings, "ledger") as producer:
            try:
                while True:
                    for _ in range(int(rate * 0.02)):
                        self.send(producer, [{"k": random.choice(KEYS), "n": random.randrange(1000)}])
                    await asyncio.sleep(0.02)
            except asyncio.CancelledError:
                assert await producer.flush(60), "the producer did not get rid of its records"
                assert sum(producer.dropped.values()) == 0

    def send(self, producer: EdgeProducer, rows: list[dict[str, Any]]) -> str:
        """Sends one record of rows under an id of its own; rows of a record have one key."""
        self._number += 1
        name = f"r{self._number}"
        self.ids.add(name)
        producer.send(NODE_SAMPLES, str(rows[0].get("k")), json.dumps(rows).encode(), type="rows", id=name)
        return name

    async def send_now(self, *records: list[dict[str, Any]]) -> None:
        """Sends records and waits for the broker."""
        async with EdgeProducer(self.settings, "ledger") as producer:
            for rows in records:
                self.send(producer, rows)
            assert await producer.flush(60)

    async def stop_load(self) -> None:
        """Ends the load, with everything sent known to the broker."""
        assert self._load is not None
        self._load.cancel()
        await self._load
        self._load = None

    async def close(self) -> None:
        """Kills whatever still runs."""
        if self._load is not None:
            self._load.cancel()
            await asyncio.gather(self._load, return_exceptions=True)
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.signal(signal.SIGCONT)
                worker.kill()

    async def wanted(self) -> dict[str, tuple[int, int]]:
        """(rows, sum) per key, from the log; and that the log has every record sent."""
        counts: dict[str, tuple[int, int]] = {}
        seen = set()
        async for record in read_to_end(self.settings, NODE_SAMPLES):
            if header(record, "ce_type") != "rows":
                continue
            seen.add(header(record, "ce_id"))
            rows = json.loads(record.value)
            if any(row.get("raise") for row in rows):
                continue
            for row in rows:
                if "pad" in row:
                    continue
                n, total = counts.get(row["k"], (0, 0))
                counts[row["k"]] = (n + 1, total + row["n"])
        assert seen == self.ids, f"{len(self.ids - seen)} sent records are not in the log"
        return counts

    async def published(self) -> dict[str, tuple[int, int]]:
        """(rows, sum) per key, of the greatest versions; and that no version has two contents."""
        contents: dict[str, bytes] = {}
        best: dict[str, dict[str, Any]] = {}
        async for record in read_to_end(self.settings, COST_WINDOWS):
            name = header(record, "ce_id")
            assert contents.setdefault(name, record.value) == record.value, f"{name} has two contents"
            row = json.loads(record.value)
            known = best.get(row["name"])
            if known is None or known["version"] < row["version"]:
                best[row["name"]] = row
        return {name: (row["rows"], row["sum"]) for name, row in best.items()}

    async def judge(self, within_s: float = 90.0) -> None:
        """Nothing lost, nothing double, no version with two contents: waits until the results say so."""
        wanted = await self.wanted()
        assert wanted
        deadline = time.monotonic() + within_s
        while (got := await self.published()) != wanted:
            if time.monotonic() > deadline:
                wrong = {k: (wanted.get(k), got.get(k)) for k in wanted if wanted.get(k) != got.get(k)}
                logs = "\n".join(w.path.read_text()[-1500:] for w in self.workers)
                raise AssertionError(f"(wanted, got) rows and sums: {wrong}\n{logs}")
            await asyncio.sleep(0.3)

    async def until_published(self, wanted: dict[str, tuple[int, int]], within_s: float = 90.0) -> None:
        """Waits until these keys' greatest versions say so."""
        deadline = time.monotonic() + within_s
        while True:
            got = await self.published()
            if all(got.get(k) == v for k, v in wanted.items()):
                return
            assert time.monotonic() < deadline, {k: (v, got.get(k)) for k, v in wanted.items()}
            await asyncio.sleep(0.3)

    def partitions_of(self, keys: list[str]) -> dict[str, int]:
        """Key -> its partition in the log."""
        return {k: partition_of(k.encode(), 4) for k in keys}

    async def checkpointed(self, times: int = 1, dump_bytes: int = 0) -> None:
        """Waits until every partition has so many checkpoints of at least that size."""
        deadline = time.monotonic() + 90.0
        for partition in range(4):
            while True:
                kept = await kept_checkpoints(self.settings, "node", partition)
                if len([k for k in kept if k.dump_bytes >= dump_bytes]) >= times:
                    break
                assert time.monotonic() < deadline, f"no {times} checkpoints of partition {partition}: {kept}"
                await asyncio.sleep(0.2)

    async def alter(self, topic: str, name: str, value: str) -> None:
        """Changes a topic's configuration under everyone's feet."""
        admin = admin_client(self.settings)
        await admin.start()
        try:
            resource = ConfigResource(ConfigResourceType.TOPIC, self.settings.topic(topic), configs={name: value})
            await admin.alter_configs([resource])
        finally:
            await admin.close()

    async def dead_letters(self) -> list[dict[str, Any]]:
        """All dead letters."""
        return [json.loads(r.value) async for r in read_to_end(self.settings, DEAD_LETTERS)]


async def suspend_past_session(zombie: Worker, heir: Worker, rounds: int = 3) -> None:
    """Suspends a worker until its heir has its partitions, and continues it; its commit must be refused.

    Who comes back may learn of the rebalance before it has anything to commit: then it is suspended again.
    """
    for _ in range(rounds):
        restored, before = len(heir.lines("restored")), len(zombie.lines("restored"))
        zombie.signal(signal.SIGSTOP)
        await heir.saw("restored", restored + 1)
        await asyncio.sleep(1)
        zombie.signal(signal.SIGCONT)
        await zombie.saw("restored", before + 1)
        await heir.saw("restored", restored + 2)
        if zombie.lines("commit refused"):
            return
    raise AssertionError(f"{zombie.path.name}: no commit was refused in {rounds} rounds")
