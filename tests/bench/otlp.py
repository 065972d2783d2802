"""CPU that the intake takes a span: decode, map, split, encode and hand to the producer.

`python -m tests.bench.otlp [--spans N] [--batch N]` prints one line a convention and encoding: spans/s of one core, by
CPU time of this process, on export requests as a collector sends them. Kafka and HTTP are not part of it.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

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


def bodies(name: str, spans: int, size: int) -> list[ExportTraceServiceRequest]:
    """Export requests of one convention."""
    return [request(name, size, first=start) for start in range(0, spans, size)]


async def measure(name: str, encoding: str, spans: int, size: int) -> float:
    """CPU seconds a span."""
    edge.EdgeProducer = Producer  # type: ignore[misc, assignment] - takes batches and drops them
    deployment = Deployment(origin_ms=0, partitions=partition_counts(False))
    intake = Intake(Settings(), deployment, IntakeOptions.of(default_pool="chat"))
    reader = OtlpReader(intake.mapper, 50_000)
    made = bodies(name, spans, size)
    sent = [as_json(m) if encoding == "json" else m.SerializeToString() for m in made]
    read = reader.json if encoding == "json" else reader.protobuf
    began = time.process_time()
    gathered = 0
    for body in sent:
        taken = of_spans(read(body, {}))
        assert taken.batch.rows == 2 * size
        intake.sink.batcher.add(intake.sink.batcher.split(taken.batch))
        gathered += size
        if gathered >= 1000:  # 50 ms at 20,000 spans/s
            intake.sink.batcher.flush()
            Producer.made[-1].records.clear()
            gathered = 0
    intake.sink.batcher.flush()
    return (time.process_time() - began) / spans


def main() -> None:
    """Every convention as protobuf, and as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spans", type=int, default=20_480)
    parser.add_argument("--batch", type=int, default=512)
    given: Any = parser.parse_args()
    for encoding in ("protobuf", "json"):
        for name in EXAMPLES:
            cost_s = asyncio.run(measure(name, encoding, given.spans, given.batch))
            print(f"{encoding:8} {name:14} {1 / cost_s:9.0f} spans/s a core, {cost_s * 1e6:6.1f} us a span")


if __name__ == "__main__":
    main()
