"""From a simulated fleet to records: requests, GPU and engine samples, inventory, and the objects of `fleet.config`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import IO, Any, Protocol

from schemas.base import Record
from schemas.config import ConfigObject, FleetSpec, PoolSpec, PriceSpec, TenantSpec
from schemas.log import CONTENT_ARROW, CONTENT_JSON
from schemas.node import ENGINE_HISTOGRAMS, ENGINE_SAMPLES, GPU_SAMPLES, PROCESS_SAMPLES, NodeInventory
from schemas.requests import REQUEST_ROWS
from schemas.topics import NODE_SAMPLES, REQUEST_TRACES, ce_type
from simulator.events import Events
from simulator.fleet import Fleet
from simulator.request import Request
from simulator.scenario import Scenario
from simulator.telemetry import NodeTelemetry
from streams.clients import partition_of

ROWS_PER_RECORD_MAX = 2000
"""About 300 KB: under the 512 KiB that a columnar record may have."""
SAMPLE_EVERY_S = 1.0
SLOW_EVERY = 5
"""Every so many samples processes and distributions are read too."""
INVENTORY_EVERY_S = 30.0
COLUMNS = (
    "event", "request_id", "at_s", "pool", "tenant", "class", "replica", "status", "input_tokens", "output_tokens",
    "cached_tokens", "ttft_s", "tpot_s", "e2e_s",
)  # fmt: skip


class Producer(Protocol):
    """What is needed of `streams.producer.EdgeProducer`."""

    dropped: Any

    def send(
        self,
        topic: str,
        key: str,
        value: bytes,
        *,
        type: str,
        id: str,
        content_type: str = CONTENT_JSON,
        partition: int | None = None,
    ) -> None: ...


def scenario_config(scenario: Scenario, revision: int = 1) -> list[ConfigObject]:
    """Pools, prices, tenants and the fleet's bounds of a scenario, as objects for `fleet.config`."""

    def made(kind: Any, name: str, spec: Record) -> ConfigObject:
        return ConfigObject(
            object_kind=kind,
            name=name,
            revision=revision,
            actor=f"scenario {scenario.name}",
            spec=spec.model_dump(mode="json"),
        )

    gpus: dict[str, float] = {}
    for group in scenario.nodes:
        gpus[group.gpu] = gpus.get(group.gpu, 0) + group.gpus * group.count
    objects = [
        made("price", name, PriceSpec(usd_per_gpu_hour=gpu.usd_per_gpu_hour, source=gpu.price_source))
        for name, gpu in scenario.gpus.items()
    ]
    objects += [made("tenant", t.name, TenantSpec(tier=t.klass)) for t in scenario.tenants]
    objects.append(made("fleet", "fleet", FleetSpec(mode="automatic", gpus_max=gpus)))
    for pool in scenario.pools:
        spec = PoolSpec(
            model=pool.model,
            cluster=scenario.cluster,
            route=pool.route,
            gpu_type=pool.gpu,
            gpus_per_replica=pool.tp * pool.gpu_share,
            slo_ttft_s=pool.slo.ttft_s,
            slo_tpot_s=pool.slo.tpot_s,
            capacity_rps=pool.capacity_rps,
            input_tokens_mean=pool.input_tokens_mean,
            output_tokens_mean=pool.output_tokens_mean,
            cold_start_s=pool.cold_start.mean_s,
            replicas_min=pool.replicas_min,
            replicas_max=pool.replicas_max,
            mode=pool.mode,
            executor="simulator",
        )
        objects.append(made("pool", pool.name, spec))
    return objects


class Publisher:
    """Turns events and readings of a fleet into records.

    Parameters
    ----------
    base_s: log time (Unix s) of fleet time 0.
    partitions: of `request.traces`.
    record: where every request row is also written as a JSON line, for checks against what was published.
    """

    def __init__(
        self, fleet: Fleet, producer: Producer, base_s: float, partitions: int, record: IO[str] | None = None
    ) -> None:
        self._fleet, self._producer, self._base_s = fleet, producer, base_s
        self._partitions = partitions
        self._record = record
        self._start = f"{base_s:.3f}"
        self._run = f"{fleet.scenario.name}-{round(base_s * 1000):x}"
        self._rows: list[list[tuple[Any, ...]]] = [[] for _ in range(partitions)]
        self._open: dict[int, int] = {}  # request number -> partition, from its arrival to its end
        self._nodes = [NodeTelemetry(fleet, i, base_s) for i in range(len(fleet.cluster.nodes))]
        count = len(self._nodes)
        # Staggered: not all exporters of a fleet read in the same moment.
        self._sample_at = [fleet.now_s + SAMPLE_EVERY_S * i / count for i in range(count)]
        self._samples = [0] * count
        self._inventory_at = [fleet.now_s] * count
        self._sequence: dict[str, int] = {}
        self.rows_published = 0

    # ------------------------------------------------------------------ requests
    def take(self, events: Events) -> None:
        """The events of one `Fleet.advance`."""
        for request in events.arrivals:
            partition = partition_of(self.request_id(request).encode(), self._partitions)
            self._open[request.number] = partition
            self._rows[partition].append(self._arrival(request))
        for request in events.ends:
            self._rows[self._open.pop(request.number)].append(self._ended(request))
        for event in events.replicas:
            self._inventory_at[event.slot.node] = self._fleet.now_s
            if event.state == "failed":
                self._nodes[event.slot.node].failed(event)

    def request_id(self, request: Request) -> str:
        """Unique over runs."""
        return f"{self._run}-{request.number}"

    def flush_requests(self) -> None:
        """Publishes the rows taken, one record or more a partition."""
        for partition, rows in enumerate(self._rows):
            for first in range(0, len(rows), ROWS_PER_RECORD_MAX):
                self._send_rows(partition, rows[first : first + ROWS_PER_RECORD_MAX])
            rows.clear()

    def _send_rows(self, partition: int, rows: list[tuple[Any, ...]]) -> None:
        columns = dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True))
        number = self._next("requests")
        meta = {"source": "simulator", "start_s": self._start, "seq": str(number)}
        self._producer.send(
            REQUEST_TRACES,
            columns["request_id"][0],
            REQUEST_ROWS.encode(columns, meta),
            type=REQUEST_ROWS.type,
            id=f"{self._run}/requests/{number}",
            content_type=CONTENT_ARROW,
            partition=partition,
        )
        self.rows_published += len(rows)
        if self._record is not None:
            self._record.writelines(json.dumps(dict(zip(COLUMNS, row, strict=True))) + "\n" for row in rows)

    def _arrival(self, r: Request) -> tuple[Any, ...]:
        at_s = self._base_s + r.arrival_s
        return (
            "arrival", self.request_id(r), at_s, r.pool, r.tenant, r.klass, r.replica or None, None,
            float(r.prompt_tokens), None, None, None, None, None,
        )  # fmt: skip

    def _ended(self, r: Request) -> tuple[Any, ...]:
        at_s = self._base_s + r.end_s
        return (
            "end", self.request_id(r), at_s, r.pool, r.tenant, r.klass, r.replica or None, r.status,
            float(r.prompt_tokens), float(r.generated), 0.0, r.ttft_s, r.tpot_s, r.e2e_s,
        )  # fmt: skip

    # ------------------------------------------------------------------ nodes
    def publish_nodes(self) -> None:
        """Inventory and samples of the nodes whose time has come."""
        now_s = self._fleet.now_s
        for i, node in enumerate(self._nodes):
            if self._inventory_at[i] <= now_s:
                self._inventory_at[i] = now_s + INVENTORY_EVERY_S
                self._send_inventory(node)
            if self._sample_at[i] <= now_s:
                # What a late process missed is gone, as with a real exporter.
                behind = (now_s - self._sample_at[i]) // SAMPLE_EVERY_S
                self._sample_at[i] += (behind + 1) * SAMPLE_EVERY_S
                gpu, engines = node.read()
                self._send_samples(node.name, GPU_SAMPLES, gpu)
                if engines:
                    self._send_samples(node.name, ENGINE_SAMPLES, engines)
                if self._samples[i] % SLOW_EVERY == 0:
                    for kind, columns in (
                        (PROCESS_SAMPLES, node.processes()),
                        (ENGINE_HISTOGRAMS, node.histograms()),
                    ):
                        if columns:
                            self._send_samples(node.name, kind, columns)
                self._samples[i] += 1

    def _send_samples(self, node: str, kind: Any, columns: dict[str, Any]) -> None:
        number = self._next(f"{node}/{kind.kind}")
        dropped = str(self._producer.dropped[NODE_SAMPLES])
        meta = {"node": node, "start_s": self._start, "seq": str(number), "dropped": dropped}
        self._producer.send(
            NODE_SAMPLES,
            node,
            kind.encode(columns, meta),
            type=kind.type,
            id=f"{self._run}/{node}/{kind.kind}/{number}",
            content_type=CONTENT_ARROW,
        )

    def _send_inventory(self, node: NodeTelemetry) -> None:
        number = self._next(f"{node.name}/inventory")
        self._producer.send(
            NODE_SAMPLES,
            node.name,
            node.inventory().encode(),
            type=ce_type(NodeInventory.kind),
            id=f"{self._run}/{node.name}/inventory/{number}",
        )

    def _next(self, what: str) -> int:
        number = self._sequence.get(what, 0)
        self._sequence[what] = number + 1
        return number


def ended_rows(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The end rows of a recorded ledger (JSON lines)."""
    return [row for row in map(json.loads, lines) if row["event"] == "end"]
