"""CPU that the intake takes a span: decode, map, split, encode and hand to the producer.

`python -m tests.bench.otlp [--spans N] [--batch N] [--repeats N]` prints one line a convention and encoding: spans/s of
one core by CPU time of this process, of the least disturbed repeat and of the median one, on export requests as a
collector sends them. Kafka and HTTP are not part of it. With `--whole` they are: CPU of a whole `export traces` process
that takes them by HTTP and has them acknowledged by a Kafka on this machine, every answer checked.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from exporters import edge
from exporters.intake import Intake
from exporters.intake_endpoints import CONTENT_PROTOBUF, SPAN, of_calls
from exporters.intake_options import IntakeOptions
from exporters.otlp import OtlpReader
from schemas.config import Deployment
from streams.broker import LocalBroker
from streams.deployment import ensure_deployment
from streams.settings import Settings, load_settings
from streams.topics import partition_counts
from tests.exporters.conftest import Producer
from tests.exporters.otlp_examples import EXAMPLES, as_json, request

PORT = 8831


class Bench:
    """An intake without HTTP and Kafka: its producer takes batches and drops them."""

    def __init__(self) -> None:
        edge.EdgeProducer = Producer  # type: ignore[misc, assignment]
        deployment = Deployment(origin_ms=0, partitions=partition_counts(False))
        self.intake = Intake(Settings(), deployment, IntakeOptions.of(default_pool="chat"))
        self.reader = OtlpReader(self.intake.mapper, 50_000)

    def once(self, encoding: str, sent: list[bytes], size: int) -> float:
        """CPU seconds a span."""
        read = self.reader.json if encoding == "json" else self.reader.protobuf
        batcher = self.intake.sink.batcher
        gathered = 0
        began = time.process_time()
        for body in sent:
            taken = of_calls(read(body, {}), SPAN)
            assert taken.batch.rows == 2 * size
            batcher.add(batcher.split(taken.batch))
            gathered += size
            if gathered >= 1000:  # 50 ms at 20,000 spans/s
                batcher.flush()
                gathered = 0
        batcher.flush()
        took_s = time.process_time() - began
        Producer.made[-1].records.clear()
        return took_s / (len(sent) * size)


async def run(spans: int, size: int, repeats: int) -> None:
    """Prints a line a convention and encoding."""
    bench = Bench()
    for encoding in ("protobuf", "json"):
        for name in EXAMPLES:
            made = [request(name, size, first=start) for start in range(0, spans, size)]
            sent = [as_json(m) if encoding == "json" else m.SerializeToString() for m in made]
            costs = sorted(bench.once(encoding, sent, size) for _ in range(repeats))
            best, median = costs[0], costs[len(costs) // 2]
            print(
                f"{encoding:8} {name:14} best {1 / best:7.0f} spans/s a core ({best * 1e6:5.1f} us a span), "
                f"median {1 / median:7.0f}; {len(sent[0]) / size:5.0f} bytes a span",
                flush=True,
            )


async def whole(spans: int, size: int) -> None:
    """Prints a line a convention: the CPU of the process that takes them, by psutil."""
    with tempfile.TemporaryDirectory() as folder, LocalBroker(Path(folder)) as broker:
        broker.start()
        settings = load_settings(bootstrap_servers=broker.bootstrap_servers, topic_prefix="bench-")
        await ensure_deployment(settings, local=False)
        environment = os.environ | {
            "FLEETLOOP_BOOTSTRAP_SERVERS": broker.bootstrap_servers,
            "FLEETLOOP_TOPIC_PREFIX": "bench-",
            "FLEETLOOP_INTAKE_PORT": str(PORT),
            "FLEETLOOP_INTAKE_DEFAULT_POOL": "chat",
        }
        command = (sys.executable, "-m", "cli.main", "export", "traces")
        process = await asyncio.create_subprocess_exec(*command, env=environment)
        try:
            for number, name in enumerate(EXAMPLES):
                first = number * 10 * spans
                bodies = [request(name, size, first=first + i).SerializeToString() for i in range(0, spans, size)]
                await _sent(bodies[:2])
                before = sum(psutil.Process(process.pid).cpu_times()[:2])
                began = time.monotonic()
                await _sent(bodies[2:])
                took_s = time.monotonic() - began
                cpu_s = sum(psutil.Process(process.pid).cpu_times()[:2]) - before
                count = size * len(bodies[2:])
                rates = f"{count / cpu_s:7.0f} spans/s a core; {count / took_s:7.0f} spans/s here"
                print(f"whole    {name:14} {rates}", flush=True)
        finally:
            process.terminate()
            await process.wait()


async def _sent(bodies: list[bytes]) -> None:
    """Returns when every body was answered 200; four at a time."""
    waiting = list(bodies)

    async def send(session: aiohttp.ClientSession) -> None:
        while waiting:
            body = waiting.pop()
            while True:
                try:
                    async with session.post(
                        f"http://127.0.0.1:{PORT}/v1/traces", data=body, headers={"Content-Type": CONTENT_PROTOBUF}
                    ) as answer:
                        if answer.status == 200:
                            assert await answer.read() == b""
                            break
                        assert answer.status in (429, 503)
                except aiohttp.ClientConnectionError:
                    pass  # it has not started yet
                await asyncio.sleep(0.2)

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(send(session) for _ in range(4)))


def main() -> None:
    """Every convention as protobuf, and as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spans", type=int, default=5_120)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--whole", action="store_true")
    given: Any = parser.parse_args()
    if given.whole:
        asyncio.run(whole(given.spans, given.batch))
    else:
        asyncio.run(run(given.spans, given.batch, given.repeats))


if __name__ == "__main__":
    main()
