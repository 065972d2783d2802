"""What the engine exporter costs: CPU of its process, on pages of a real vLLM run that a second process serves.

    FLEETLOOP_DATA=... python -m tests.bench.scrape --targets 200 --seconds 60 [--broker host:port]

Three processes: this one measures; one serves `vllm-cpu-run`, a port a target, each scrape the next second of the run;
one is `EngineExporter` as it ships. With --broker its batches go to a Kafka whose deployment exists; without, they are
encoded and thrown away, and the cost of the client is missing in the figure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
from aiohttp import web

from exporters import edge
from exporters.engines import EngineExporter, EngineOptions
from schemas.config import Deployment
from streams.deployment import read_deployment
from streams.settings import load_settings
from streams.topics import partition_counts
from tests.recorded import scrapes

WARM_S = 8.0


def serve(count: int, folder: Path, told: Connection) -> None:
    """Serves `count` targets, a port each, until it is ended."""
    found = [page.encode() for _, page in scrapes(folder) if page is not None]

    async def main() -> None:
        ports = []
        for number in range(count):
            at = iter(range(number, 10**9))

            async def metrics(request: web.Request, at: Any = at) -> web.Response:
                return web.Response(body=found[next(at) % len(found)], content_type="text/plain")

            server = web.Server(metrics)
            runner = web.ServerRunner(server, access_log=None)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            ports.append(runner.addresses[0][1])
        told.send(ports)
        await asyncio.Event().wait()

    asyncio.run(main())


class Nowhere:
    """Stands in for EdgeProducer: counts, and throws away."""

    connected, buffered_bytes = True, 0

    def __init__(self, settings: Any, source: str) -> None:
        self.sent: Counter[str] = Counter()
        self.acked: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()

    def send(self, topic: str, key: str, value: bytes, **more: Any) -> None:
        self.sent[topic] += 1

    async def start(self) -> None:
        """Nothing to connect to."""

    async def stop(self, timeout_s: float) -> bool:
        return True


def scrape(ports: list[int], nodes: int, broker: str, told: Connection) -> None:
    """Runs the exporter; answers each message with its metrics."""
    if not broker:
        edge.EdgeProducer = Nowhere  # type: ignore[misc, assignment]
    targets = [f"r{n}=http://127.0.0.1:{port}/metrics;node=n{n % nodes};pool=chat" for n, port in enumerate(ports)]

    async def main() -> None:
        settings = load_settings(**({"bootstrap_servers": broker} if broker else {}))
        deployment = (
            await read_deployment(settings)
            if broker
            else Deployment(origin_ms=0, speed=1.0, local=True, partitions=partition_counts(True))
        )
        exporter = EngineExporter(settings, deployment, EngineOptions.of(targets=targets))

        def answer() -> None:
            told.recv()
            own = [*exporter.edge.metrics.collect(), *exporter.collect()]
            found = {f"{s.name}{sorted(s.labels.items())[1:]}": s.value for m in own for s in m.samples}
            told.send({**found, "process_cpu_s": time.process_time()})

        asyncio.get_running_loop().add_reader(told.fileno(), answer)
        await exporter.run(asyncio.Event())

    asyncio.run(main())


def measure(process: psutil.Process, told: Connection, seconds: float) -> dict[str, Any]:
    """CPU of a process over a time, and what its metrics say of it."""
    before, cpu, at = _asked(told), process.cpu_times(), time.monotonic()
    time.sleep(seconds)
    after, then, took = _asked(told), process.cpu_times(), time.monotonic() - at
    used = then.user + then.system - cpu.user - cpu.system
    grown = {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}
    return {
        "core_percent": round(100 * used / took, 1),
        "user_s": round(then.user - cpu.user, 2),
        "system_s": round(then.system - cpu.system, 2),
        "seconds": round(took, 1),
        "rss_mb": round(process.memory_info().rss / 1e6, 1),
        "grown": {name: round(value, 3) for name, value in grown.items()},
    }


def _asked(told: Connection) -> dict[str, float]:
    told.send("metrics")
    found: dict[str, float] = told.recv()
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, default=200)
    parser.add_argument("--nodes", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--broker", default="")
    given = parser.parse_args()
    folder = Path(os.environ["FLEETLOOP_DATA"]) / "engine-metrics" / "vllm-cpu-run"
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=serve, args=(given.targets, folder, there), daemon=True)
    server.start()
    ports = here.recv()
    mine, yours = context.Pipe()
    scraper = context.Process(target=scrape, args=(ports, given.nodes, given.broker, yours), daemon=True)
    scraper.start()
    time.sleep(WARM_S)
    try:
        print(json.dumps(measure(psutil.Process(scraper.pid), mine, given.seconds), indent=1))
    finally:
        scraper.terminate()
        server.terminate()


if __name__ == "__main__":
    main()
