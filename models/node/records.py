"""What the records of a node partition say, checked and kept: samples, processes, distributions, inventories.

Everything is kept as it came, within the grace, so that windows can be computed anew from it in any order of arrival.
Notes which windows a record may have changed; `models.node.fold` computes them.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from models.fold import BaseFold
from models.node import engines, gpus
from models.node.histograms import METRICS, Histograms
from models.node.holdings import GPUS_MAX, Holdings
from models.node.processes import SPEAKS_S, TEXTS, Processes
from models.node.samples import Added, SampleStore
from models.node.texts import Texts, coded
from models.windows import WINDOW_S, window_start
from schemas.columns import Batch
from schemas.errors import InvalidRecord
from schemas.log import LogRecord
from schemas.node import ENGINE_HISTOGRAMS, ENGINE_SAMPLES, GPU_SAMPLES, PROCESS_SAMPLES, NodeInventory
from schemas.topics import ce_type


class NodeRecords(BaseFold):
    """The input side of the node fold."""

    level = "node"

    def __init__(self, topic: str, partition: int, partitions: dict[str, int]) -> None:
        super().__init__(topic, partition, partitions)
        self.handlers = {
            GPU_SAMPLES.type: self._gpus,
            PROCESS_SAMPLES.type: self._processes,
            ENGINE_SAMPLES.type: self._engines,
            ENGINE_HISTOGRAMS.type: self._histograms,
            ce_type(NodeInventory.kind): self._inventory,
        }
        self.holdings = Holdings()
        self.texts = Texts()
        self.gpu_samples = SampleStore(len(gpus.COLUMNS))
        self.engine_samples = SampleStore(len(engines.COLUMNS))
        self.processes = Processes()
        self.histograms = Histograms()
        self.batches: dict[str, list[int]] = {}
        """Id of a batch or inventory -> CRC-32 of its bytes, second of log time."""
        self.next_close: int | None = None
        """Start of the earliest window not yet closed, Unix s."""
        self.horizon = 0
        """Start of the earliest window that may still change, Unix s."""
        self.gpu_dirty: dict[int, bool] = {}
        self.engine_dirty: dict[int, bool] = {}
        self.slow_dirty: dict[int, bool] = {}
        """Starts of closed windows that have changed since. Those in `slow_dirty` wait for the next window to close:
        what is read every 5 s comes after its window has closed as a rule."""

    # -- records ---------------------------------------------------------------------------------------------

    def _gpus(self, record: LogRecord, batch: Batch) -> None:
        name = _node_name(record, batch.meta.get("node", ""))
        node = self._node(name)
        if self._seen(record, _batch_id("gpu", name, record, batch)):
            return
        _note_dropped(node, "gpu", batch)
        batch = self._listed(record, self.check_times(record, batch, self.limits.grace_node_s))
        subjects = node["code"] * GPUS_MAX + batch.numbers["gpu"]
        values = gpus.values_of(batch.numbers, _flags(batch, "lost"))
        # What the first sample of a GPU says of an error may be of a window before it.
        self._add(record, batch, self.gpu_samples, self.gpu_dirty, subjects, values, gpus.AT["xid_at_s"])

    def _listed(self, record: LogRecord, batch: Batch) -> Batch:
        """The rows whose GPU index is within bounds; others are refused."""
        beyond = batch.numbers["gpu"] >= self.limits.gpus_per_node_max
        if beyond.any():
            self.count("overflow_gpus_total", int(beyond.sum()))
            remedy = f"at most {self.limits.gpus_per_node_max} GPUs a node (limits.gpus_per_node_max)"
            shown = float(batch.numbers["gpu"][beyond][0])
            batch = self.refuse_rows(record, batch, beyond, "overflow", "gpu", shown, remedy)
        return batch

    def _processes(self, record: LogRecord, batch: Batch) -> None:
        name = _node_name(record, batch.meta.get("node", ""))
        node = self._node(name)
        if self._seen(record, _batch_id("process", name, record, batch)):
            return
        batch = self._listed(record, self.check_times(record, batch, self.limits.grace_node_s))
        codes = node["code"] * GPUS_MAX + batch.numbers["gpu"]
        subjects = self.processes.places(batch, node["code"], codes, self.limits.processes_per_node_max)
        beyond = np.isnan(subjects)
        if beyond.any():
            self.count("overflow_processes_total", int(beyond.sum()))
            remedy = f"at most {self.limits.processes_per_node_max} processes a node (limits.processes_per_node_max)"
            shown = float(batch.numbers["pid"][beyond][0])
            batch = self.refuse_rows(record, batch, beyond, "overflow", "pid", shown, remedy)
            subjects = subjects[~beyond]
        if not self._room(record, batch, self.processes.store.size):
            return
        texts = {column: self._coded(batch, column) for column in TEXTS}
        added = self.processes.add(subjects, batch, texts)
        if added.from_s < np.inf:  # a reading speaks for the time before it
            added = added._replace(from_s=min(added.from_s, float(batch.numbers["at_s"].min()) - SPEAKS_S))
        self._noted(batch, added, self.slow_dirty)

    def _engines(self, record: LogRecord, batch: Batch) -> None:
        name = _node_name(record, batch.meta.get("node", ""))
        self._node(name)
        if self._seen(record, _batch_id("engine", name, record, batch)):
            return
        _note_dropped(self.holdings.nodes[name], "engine", batch)
        batch = self.check_times(record, batch, self.limits.grace_node_s)
        subjects, batch = self._replicas(record, name, batch)
        made = {"status": _flags(batch, "dead"), "pool": self._coded(batch, "pool")}
        made |= {column: self._coded(batch, column) for column in engines.TEXTS}
        values = [made[column] if column in made else batch.numbers[column] for column in engines.COLUMNS]
        self._add(record, batch, self.engine_samples, self.engine_dirty, subjects, values, engines.START)

    def _histograms(self, record: LogRecord, batch: Batch) -> None:
        name = _node_name(record, batch.meta.get("node", ""))
        self._node(name)
        if self._seen(record, _batch_id("histogram", name, record, batch)):
            return
        wanted = np.array([metric in METRICS for metric in batch.values["metric"]], bool)
        batch = batch.keep(wanted[batch.codes["metric"]])
        subjects, batch = self._replicas(record, name, self.check_times(record, batch, self.limits.grace_node_s))
        most = self.limits.histogram_samples_max
        if not batch.rows or not self._room(record, batch, self.histograms.size, most, "histogram_samples_max"):
            return
        numbers = np.array([METRICS.index(metric) if metric in METRICS else 0 for metric in batch.values["metric"]])
        of = subjects * len(METRICS) + numbers[batch.codes["metric"]]
        at, start = batch.numbers["at_s"], batch.numbers["start_s"]
        flats = [bins for bins in batch.pairs["bins"] if bins is not None]  # the column is required: all
        done, left_out = self.histograms.add(of, at, start, flats, self.limits.histogram_layouts_max)
        for rows, added in done:
            self._noted(batch, added, self.slow_dirty, at[rows], start[rows])
        if left_out:
            self.count("overflow_histograms_total", len(left_out))
            bad = np.zeros(batch.rows, bool)
            bad[left_out] = True
            remedy = "give engines the same buckets, or raise limits.histogram_layouts_max"
            self.refuse_rows(record, batch, bad, "overflow", "bins", len(self.histograms.stores), remedy)

    def _replicas(self, record: LogRecord, node: str, batch: Batch) -> tuple[np.ndarray, Batch]:
        """Codes of the rows' replicas, given if new, and the rows that have one; others are refused."""
        subjects, _ = coded(batch, "replica", lambda name: self.holdings.replica(node, name, self.limits.replicas_max))
        beyond = np.isnan(subjects)
        if not beyond.any():
            return subjects, batch
        self.count("overflow_replicas_total", int(beyond.sum()))
        remedy = f"at most {self.limits.replicas_max} replicas a partition (limits.replicas_max)"
        shown = batch.values["replica"][int(batch.codes["replica"][beyond][0])]
        return subjects[~beyond], self.refuse_rows(record, batch, beyond, "overflow", "replica", shown, remedy)

    def _coded(self, batch: Batch, column: str) -> np.ndarray:
        """A text column as codes; what a bound keeps out is counted and unknown."""
        if column == "pool":
            found, lost = coded(batch, column, lambda name: self.holdings.pool(name, self.limits.pools_max))
            self.count("overflow_pools_total", lost)
        else:
            found, lost = coded(batch, column, lambda text: self.texts.code(text, self.limits.texts_max))
            self.count("overflow_texts_total", lost)
        return found

    def _add(
        self,
        record: LogRecord,
        batch: Batch,
        store: SampleStore,
        dirty: dict[int, bool],
        subjects: np.ndarray,
        values: list[np.ndarray],
        start: int | None = None,
    ) -> None:
        if not self._room(record, batch, store.size):
            return
        # `last_at_s` of a silent engine is in every later window too.
        speaks_s = np.inf if store is self.engine_samples else self.limits.sample_gap_s
        added = store.add(subjects, batch.numbers["at_s"], np.array(values), speaks_s)
        self._noted(batch, added, dirty, batch.numbers["at_s"], None if start is None else values[start])

    def _room(self, record: LogRecord, batch: Batch, held: int, most: int = 0, name: str = "node_samples_max") -> bool:
        """Whether a batch may be kept; where there are too many samples already it is refused."""
        if not batch.rows:
            return False
        if held + batch.rows <= (most or self.limits.node_samples_max):
            return True
        self.count("overflow_samples_total", batch.rows)
        remedy = f"send fewer samples, or raise limits.{name}"
        shown = float(batch.numbers["at_s"][0])
        self.refuse_rows(record, batch, np.ones(batch.rows, bool), "overflow", "at_s", shown, remedy)
        return False

    def _noted(
        self,
        batch: Batch,
        added: Added,
        dirty: dict[int, bool],
        at: np.ndarray | None = None,
        start: np.ndarray | None = None,
    ) -> None:
        """Counts samples that were kept and marks what they may have changed."""
        rows = batch.rows if at is None else len(at)
        self.count("duplicate_samples_total", added.duplicates)
        self.count("samples_total", rows - added.duplicates)
        from_s = added.from_s
        if at is not None and start is not None and len(added.new):
            # The first sample of a young engine counts from its start.
            begun = start[added.new]
            young = begun[at[added.new] - begun <= self.limits.grace_node_s]
            from_s = min(from_s, float(young.min(initial=np.inf)))
        self._mark(dirty, from_s, added.to_s)

    def _inventory(self, record: LogRecord, item: NodeInventory) -> None:
        if record.key and record.key != item.node:
            raise InvalidRecord("invalid", "node", item.node, f"must equal the key {record.key!r}")
        now_s = self.log_ms / 1000
        if item.at_s > now_s + self.limits.future_s:
            raise InvalidRecord("in_future", "at_s", item.at_s, f"log time is {now_s:.3f}: set the sender's clock")
        node = self._node(item.node)
        if self._seen(record, f"inventory/{item.node}/{item.at_s!r}"):
            return
        if item.at_s < node["at_s"]:
            self.count("inventory_outdated_total")  # absolute and overtaken: nothing is lost with it
            return
        if self.holdings.segments.shape[1] + len(item.replicas) > self.limits.node_segments_max:
            self.count("overflow_segments_total")
            raise InvalidRecord("overflow", "replicas", len(item.replicas), "raise limits.node_segments_max")
        beyond = sum(entry.gpu >= self.limits.gpus_per_node_max for entry in item.gpus)
        self.count("overflow_gpus_total", beyond)
        changed_s, left_out = self.holdings.take(node, item, now_s, self.limits)
        for metric, entries in left_out.items():
            self.count(metric, len(entries))
            reason = "overflow" if metric.startswith("overflow") else "invalid"
            remedy = "name a replica once, and keep within limits.replicas_max and limits.pools_max"
            refused = InvalidRecord(reason, f"replicas.{metric}", item.replicas[entries[0]].replica, remedy)
            self.refuse(record, refused, entries)
        if changed_s < np.inf:
            self._mark(self.engine_dirty, changed_s, now_s)
            self._mark(self.gpu_dirty, changed_s, now_s)

    def _node(self, name: str) -> dict[str, Any]:
        node = self.holdings.node(name, self.log_ms / 1000, self.limits.nodes_max)
        if node is None:
            self.count("overflow_nodes_total")
            raise InvalidRecord("overflow", "node", name, f"at most {self.limits.nodes_max} nodes a partition")
        return node

    def _seen(self, record: LogRecord, id: str) -> bool:
        """Whether a fact was taken before. Raises InvalidRecord where it then said something else."""
        if not id:
            return False
        crc = zlib.crc32(record.value)
        known = self.batches.get(id)
        if known is None:
            if len(self.batches) >= self.limits.node_batches_max:
                self.count("overflow_batches_total")
                del self.batches[next(iter(self.batches))]
            self.batches[id] = [crc, self.log_ms // 1000]
            return False
        if known[0] != crc:
            raise InvalidRecord("conflict", "id", id, "this id came before with other content: use each once")
        self.count("duplicate_batches_total")
        return True

    def _mark(self, dirty: dict[int, bool], from_s: float, to_s: float) -> None:
        """Notes that closed windows between two times may have changed."""
        if self.next_close is None or not from_s < self.next_close:
            return
        first = max(window_start(self.log_ms / 1000 - self.limits.grace_node_s), self.horizon)
        first = window_start(max(from_s, first))
        last = window_start(min(to_s, self.next_close - 1))
        for start in range(first, last + 1, WINDOW_S):
            dirty[start] = True


def _flags(batch: Batch, bad: str) -> np.ndarray:
    """1 where a row's status is `bad`, 0 where it is another, NaN where it is unknown."""
    flags: np.ndarray = np.array([*(float(value == bad) for value in batch.values["status"]), np.nan])
    flagged: np.ndarray = flags[batch.codes["status"]]
    return flagged


def _node_name(record: LogRecord, said: str) -> str:
    """The node of a batch: the key, which the metadata may repeat. Raises InvalidRecord where they differ."""
    name = said or record.key
    if record.key and name != record.key:
        raise InvalidRecord("invalid", "node", said, f"must equal the key {record.key!r}")
    if not name or len(name) > 200 or "/" in name or not name.isprintable():
        raise InvalidRecord("invalid", "node", name, "as key, send a node name of 1 to 200 characters, no slash")
    return name


def _batch_id(kind: str, node: str, record: LogRecord, batch: Batch) -> str:
    """What names a batch: node, exporter start and sequence; else the record's own id; empty where there is none."""
    if "start_s" in batch.meta and "seq" in batch.meta:
        return f"{kind}/{node}/{batch.meta['start_s']}/{batch.meta['seq']}"
    return f"{kind}/{node}/id/{record.id}" if record.id else ""


def _note_dropped(node: dict[str, Any], kind: str, batch: Batch) -> None:
    """Remembers how many batches a node's exporter says that it dropped since its start."""
    if "dropped" in batch.meta:
        start, dropped = float(batch.meta.get("start_s", 0.0)), int(batch.meta["dropped"])
        known = node["dropped"].get(kind)
        if known is None or start > known[0]:
            node["dropped"][kind] = [start, dropped]
        elif start == known[0]:
            known[1] = max(known[1], dropped)
