"""Exporters without a broker: a producer that keeps what it is given."""

from __future__ import annotations

import asyncio
import ctypes
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pynvml
import pytest

from exporters import edge
from schemas.columns import COLUMNAR, Batch
from schemas.config import Deployment
from schemas.log import CONTENT_JSON
from streams.settings import Settings
from streams.topics import partition_counts
from tests.exporters.nvml_stub import Stub, build


class Sent(NamedTuple):
    """One record as the producer took it."""

    topic: str
    key: str
    value: bytes
    type: str
    id: str
    content_type: str
    partition: int | None

    def batch(self) -> Batch:
        """The record as a columnar batch, nothing refused."""
        taken = COLUMNAR[self.type].decode(self.value, self.content_type)
        assert taken.refused == []
        return taken


class Producer:
    """Stands in for EdgeProducer."""

    made: list[Producer] = []  # noqa: RUF012 - one a test, emptied by the fixture

    def __init__(self, settings: Settings, source: str) -> None:
        self.source = source
        self.records: list[Sent] = []
        self.sent: Counter[str] = Counter()
        self.acked: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.buffered_bytes = 0
        self.connected = True
        self.acknowledges = True
        """False: records wait for `settle`."""
        self.waiting: list[asyncio.Future[bool]] = []
        Producer.made.append(self)

    def send(
        self, topic: str, key: str, value: bytes, *, type: str, id: str, content_type: str = CONTENT_JSON, **more: Any
    ) -> None:
        self.records.append(Sent(topic, key, value, type, id, content_type, more.get("partition")))
        self.sent[topic] += 1
        if (ack := more.get("ack")) is not None:
            self.waiting.append(ack)
            if self.acknowledges:
                self.settle(True)

    def settle(self, acked: bool) -> None:
        """Every record so far is with the broker, or never will be."""
        for ack in self.waiting:
            if not ack.done():
                ack.set_result(acked)
        self.waiting.clear()

    async def start(self) -> None:
        """Nothing to connect to."""

    async def stop(self, timeout_s: float) -> bool:
        return True

    async def room(self) -> None:
        """Always."""

    async def flush(self, timeout_s: float) -> bool:
        return True


async def until(condition: Callable[[], Any]) -> None:
    """Waits for something that other tasks bring about; a generous deadline, no claim about time."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def producers(monkeypatch: pytest.MonkeyPatch) -> list[Producer]:
    """The producers that exporters of this test have made."""
    Producer.made = []
    monkeypatch.setattr(edge, "EdgeProducer", Producer)
    return Producer.made


@pytest.fixture
def settings() -> Settings:
    return Settings()


@pytest.fixture
def deployment() -> Deployment:
    return Deployment(origin_ms=1_764_000_000_000, speed=1.0, local=True, partitions=partition_counts(True))


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in for libnvidia-ml.so.1."""
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture(scope="session")
def nvml_library_old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without the functions of the last years."""
    return build(tmp_path_factory.mktemp("nvml-old"), "-DOLD")


@pytest.fixture
def stub(nvml_library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stub:
    """The stand-in in place of the library in this process; one GPU until told otherwise."""
    return use_stub(nvml_library, monkeypatch, tmp_path)


def use_stub(library: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Stub:
    """Has `pynvml` of this process call a stand-in."""
    made = Stub(folder / "nvml.stub")
    made.library = ctypes.CDLL(str(library))
    made.library.stub_reset()
    monkeypatch.setenv("NVML_STUB_FILE", str(made.path))
    monkeypatch.setattr(pynvml, "nvmlLib", made.library)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    return made
