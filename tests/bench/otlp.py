"""CPU that the intake takes a span: decode, map, split, encode and hand to the producer.

`python -m tests.bench.otlp [--spans N] [--batch N] [--repeats N]` prints one line a convention and encoding: spans/s of
one core by CPU time of this process, of the least disturbed repeat and of the median one, on export requests as a
collector sends them. Kafka and HTTP are not part of it.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any

from exporters import edge
from exporters.intake import Intake
from exporters.intake_endpoints import of_spans
from exporters.intake_options import IntakeOptions
from exporters.otlp import OtlpReader
from schemas.config import Deployment
from streams.settings import Settings
from streams.topics import partition_counts
from tests.exporters.conftest import Producer
from tests.exporters.otlp_examples import EXAMPLES, as_json, request


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
            taken = of_spans(read(body, {}))
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


def main() -> None:
    """Every convention as protobuf, and as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spans", type=int, default=5_120)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9)
    given: Any = parser.parse_args()
    asyncio.run(run(given.spans, given.batch, given.repeats))


if __name__ == "__main__":
    main()
