"""Who is who and who holds what: nodes, GPUs and replicas by the inventory, with the history that windows need.

What a replica is and holds is a chain of segments [from, to) in event time, so that time billed is split exactly
where the state changed. A silent node's segments stay open: GPUs cost money whether or not we see them. They end
when an inventory of that node no longer names the replica (a node taken away says so with an empty one).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from models.windows import overlap
from schemas.config import LimitsSpec
from schemas.node import NodeInventory, ReplicaEntry

GPUS_MAX = 1024
"""GPU indices are below this: a GPU's code is node code x GPUS_MAX + index."""
STATES = ("starting", "ready", "draining", "asleep", "failed", "unknown")
_REPLICA, _POOL, _FROM, _TO, _BILLED, _GPUS, _STATE = range(7)
_STARTING, _DRAINING = STATES.index("starting"), STATES.index("draining")
UNKNOWN = STATES.index("unknown")
_FAILED = STATES.index("failed")


class Held(NamedTuple):
    """What replicas held in a window, a row per (pool, replica), by pool. N rows."""

    pool: np.ndarray
    """int64 [N]: code."""
    replica: np.ndarray
    """int64 [N]: code."""
    state: np.ndarray
    """int64 [N]: index into STATES, as of the window's end (or of log time, if earlier)."""
    billed: np.ndarray
    """int64 [N]: 1 if paid for at that time."""
    gpus: np.ndarray
    """float64 [N]: GPUs billed to it; shares count as fractions."""
    allocated_s: np.ndarray
    """float64 [N]: time in the window that it was billed, s."""
    last: np.ndarray
    """bool [N]: false where the replica has gone over to another pool since: its samples count there."""
    loading_s: np.ndarray
    """float64 [N]: time in the window that it was billed and started, s."""
    draining_s: np.ndarray
    """float64 [N]: time in the window that it was billed and drained, s."""
    segment: np.ndarray
    """int64 [N]: number of its last segment; -1 where no inventory names it."""


class Use(NamedTuple):
    """A replica on a GPU, for a time."""

    pool: int
    replica: int
    from_s: float
    to_s: float
    state: int
    billed: bool
    share: float
    """Share of the GPU that is billed to it."""


class Holdings:
    """State; see the module. Codes are given once and never again."""

    def __init__(self) -> None:
        self.code = 0
        self.nodes: dict[str, dict[str, Any]] = {}
        """Node -> code, at_s (of its inventory), inventory_s and heard_s (log time), gpus: [[index, type, parent,
        memory in bytes], ...] (None: unknown), dropped: kind -> [start of the exporter, batches that it dropped]."""
        self.node_names: dict[int, str] = {}
        self.replicas: dict[str, int] = {}
        """`node/replica` -> code."""
        self.replica_names: dict[int, list[Any]] = {}
        """Code -> [replica, node, GPU type or None]."""
        self.pools: dict[str, int] = {}
        self.pool_names: dict[int, str] = {}
        self.segments = np.empty((7, 0))
        """One column a segment."""
        self.segment_gpus: list[list[int]] = []
        """GPU codes of each segment."""

    def _next(self) -> int:
        self.code += 1
        return self.code

    # -- nodes and replicas ----------------------------------------------------------------------------------

    def node(self, name: str, now_s: float, nodes_max: int) -> dict[str, Any] | None:
        """The node, made if new; None where there are too many."""
        node = self.nodes.get(name)
        if node is None:
            if len(self.nodes) >= nodes_max:
                return None
            node = {"code": self._next(), "at_s": -1.0, "inventory_s": -1.0, "heard_s": now_s, "gpus": []}
            node["dropped"] = {}
            self.nodes[name] = node
            self.node_names[node["code"]] = name
        node["heard_s"] = now_s
        return node

    def replica(self, node: str, name: str, replicas_max: int) -> int | None:
        """Code of a replica, made if new; None where there are too many."""
        key = f"{node}/{name}"
        code = self.replicas.get(key)
        if code is None and len(self.replicas) < replicas_max:
            code = self.replicas[key] = self._next()
            self.replica_names[code] = [name, node, None]
        return code

    def pool(self, name: str, pools_max: int) -> int | None:
        """Code of a pool, made if new; None where there are too many."""
        code = self.pools.get(name)
        if code is None and len(self.pools) < pools_max:
            code = self.pools[name] = self._next()
            self.pool_names[code] = name
        return code

    # -- inventory -------------------------------------------------------------------------------------------

    def take(
        self, node: dict[str, Any], item: NodeInventory, now_s: float, limits: LimitsSpec
    ) -> tuple[float, dict[str, list[int]]]:
        """Takes an inventory newer than the node's last. Gives the time from which on something changed (Unix s,
        infinite if nothing did), and metric -> numbers of the replica entries that were left out."""
        changed_s = math.inf
        left_out: dict[str, list[int]] = {}
        gpus = {g.gpu: g for g in item.gpus if g.gpu < limits.gpus_per_node_max}
        types = {g: entry.gpu_type for g, entry in gpus.items()}
        listed = [[g, types[g], gpus[g].parent, gpus[g].mem_total_bytes] for g in sorted(gpus)]
        node.update(at_s=item.at_s, inventory_s=now_s, gpus=listed)
        open_now = self._open(item.node)
        taken: dict[int, int] = {}
        for number, entry in enumerate(item.replicas):
            code = self.replica(item.node, entry.replica, limits.replicas_max)
            pool = self.pool(entry.pool, limits.pools_max)
            if code is None or pool is None or code in taken:
                bound = "overflow_replicas_total" if code is None else "overflow_pools_total"
                left_out.setdefault("duplicate_replicas_total" if code in taken else bound, []).append(number)
                continue
            taken[code] = number
            self.replica_names[code][2] = types.get(entry.gpus[0]) if entry.gpus else None
            on = [node["code"] * GPUS_MAX + g for g in entry.gpus]
            changed_s = min(changed_s, self._change(open_now.pop(code, None), code, pool, entry, on, item.at_s))
        for segment in open_now.values():
            self.segments[_TO, segment] = max(item.at_s, self.segments[_FROM, segment])
            changed_s = min(changed_s, item.at_s)
        return changed_s, left_out

    def _open(self, node: str) -> dict[int, int]:
        """Replica code -> its open segment, of one node."""
        found = np.flatnonzero(np.isinf(self.segments[_TO]))
        codes: list[int] = self.segments[_REPLICA, found].astype(np.int64).tolist()
        names = self.replica_names
        return {c: i for c, i in zip(codes, found.tolist(), strict=True) if names[c][1] == node}

    def _change(
        self, segment: int | None, code: int, pool: int, entry: ReplicaEntry, gpus: list[int], at_s: float
    ) -> float:
        """Begins a new segment where the replica is not what it was; gives from when on, or infinity."""
        state = STATES.index(entry.state)
        held = entry.gpu_share * len(gpus)
        from_s = min(entry.since_s, at_s)
        if segment is not None:
            old = self.segments[:, segment]
            same = old[_POOL] == pool and old[_BILLED] == entry.billed and old[_GPUS] == held
            if same and old[_STATE] == state and self.segment_gpus[segment] == gpus:
                return math.inf
            # `since_s` dates the state; any other change is dated by the inventory that first tells of it.
            from_s = max(from_s if old[_STATE] != state else at_s, float(old[_FROM]))
            self.segments[_TO, segment] = from_s
        row = [code, pool, from_s, math.inf, entry.billed, held, state]
        self.segments = np.concatenate((self.segments, np.array([row], np.float64).T), axis=1)
        self.segment_gpus.append(gpus)
        return from_s

    # -- windows ---------------------------------------------------------------------------------------------

    def held(self, start_s: float, end_s: float, now_s: float, stale_s: float) -> Held:
        """Who held what in [start, end), as far as log time `now_s`. A node without inventory for `stale_s` makes
        its replicas' state unknown, and what they hold goes on being counted."""
        end_s = min(end_s, now_s)
        segments = self.segments
        seen = (segments[_FROM] <= end_s) & (segments[_TO] > start_s) & (segments[_TO] > segments[_FROM])
        rows, index = segments[:, seen], np.flatnonzero(seen)
        order = np.lexsort((rows[_FROM], rows[_REPLICA], rows[_POOL]))
        rows, index = rows[:, order], index[order]
        n = rows.shape[1]
        begins = np.ones(n, bool)
        begins[1:] = (rows[_POOL, 1:] != rows[_POOL, :-1]) | (rows[_REPLICA, 1:] != rows[_REPLICA, :-1])
        group = np.cumsum(begins) - 1
        lies = overlap(rows[_FROM], rows[_TO], start_s, end_s) * rows[_BILLED]
        allocated_s, loading_s, draining_s = (
            np.bincount(group, lies * chosen, int(begins.sum()))
            for chosen in (np.ones(n), rows[_STATE] == _STARTING, rows[_STATE] == _DRAINING)
        )
        final = np.ones(n, bool)
        final[:-1] = begins[1:]
        rows, index = rows[:, final], index[final]
        over = rows[_TO] <= end_s
        state = rows[_STATE].astype(np.int64)
        # One that vanished while it served has failed; draining and asleep ones were meant to go.
        state[over & (state <= STATES.index("ready"))] = _FAILED
        replica = rows[_REPLICA].astype(np.int64)
        heard = [self.nodes[self.replica_names[code][1]]["inventory_s"] for code in replica.tolist()]
        state[end_s - np.array(heard, np.float64) > stale_s] = UNKNOWN
        latest: dict[int, float] = {}
        for code, from_s in zip(replica.tolist(), rows[_FROM].tolist(), strict=True):
            latest[code] = max(from_s, latest.get(code, from_s))
        last = rows[_FROM] == np.array([latest[code] for code in replica.tolist()], np.float64)
        billed = (rows[_BILLED] * ~over).astype(np.int64)
        pool = rows[_POOL].astype(np.int64)
        return Held(pool, replica, state, billed, rows[_GPUS], allocated_s, last, loading_s, draining_s, index)

    def uses(self, start_s: float, end_s: float) -> dict[int, list[Use]]:
        """GPU code -> what replicas were on it in [start, end), in order of their segments."""
        found: dict[int, list[Use]] = {}
        segments = self.segments
        seen = (segments[_FROM] < end_s) & (segments[_TO] > start_s) & (segments[_TO] > segments[_FROM])
        for i in np.flatnonzero(seen).tolist():
            replica, pool, from_s, to_s, billed, held, state = segments[:, i].tolist()
            gpus = self.segment_gpus[i]
            for gpu in gpus:
                use = Use(int(pool), int(replica), from_s, to_s, int(state), bool(billed), held / len(gpus))
                found.setdefault(gpu, []).append(use)
        return found

    def with_unnamed(self, held: Held, replicas: np.ndarray, pools: np.ndarray) -> Held:
        """With rows for replicas (codes) that no inventory names, in the pools (codes) that their samples say."""
        if not len(replicas):
            return held
        n = len(replicas)
        none, zero, true = np.zeros(n), np.zeros(n, np.int64), np.ones(n, bool)
        more = Held(pools, replicas, zero + UNKNOWN, zero, none, none, true, none, none, zero - 1)
        order = np.lexsort((np.append(held.replica, replicas), np.append(held.pool, pools)))
        return Held(*(np.append(a, b)[order] for a, b in zip(held, more, strict=True)))

    def held_codes(self) -> np.ndarray:
        """Codes of the replicas that are held now."""
        codes: np.ndarray = self.segments[_REPLICA, np.isinf(self.segments[_TO])]
        return codes

    # -- forgetting ------------------------------------------------------------------------------------------

    def prune(self, horizon_s: float, silent_since_s: float, sampled: set[int], labelled: np.ndarray) -> None:
        """Forgets segments that ended before `horizon_s`, replicas without segments and samples, pools without
        segments and samples, and nodes without replicas not heard of since `silent_since_s`. `sampled`: codes with
        samples; `labelled`: codes of the pools that samples name."""
        keep = self.segments[_TO] > horizon_s
        if not keep.all():
            self.segments = self.segments[:, keep]
            self.segment_gpus = [g for g, kept in zip(self.segment_gpus, keep.tolist(), strict=True) if kept]
        held = dict.fromkeys(self.segments[_REPLICA].astype(np.int64).tolist())
        self.replicas = {k: c for k, c in self.replicas.items() if c in held or c in sampled}
        self.replica_names = {c: self.replica_names[c] for c in self.replicas.values()}
        pools = dict.fromkeys(np.append(self.segments[_POOL], labelled).astype(np.int64).tolist())
        self.pools = {k: c for k, c in self.pools.items() if c in pools}
        self.pool_names = {c: k for k, c in self.pools.items()}
        busy = {names[1] for names in self.replica_names.values()}
        self.nodes = {
            name: node
            for name, node in self.nodes.items()
            if name in busy or node["heard_s"] > silent_since_s or node["code"] in sampled
        }
        self.node_names = {node["code"]: name for name, node in self.nodes.items()}

    def state(self) -> dict[str, Any]:
        """Plain values for a dump."""
        return {
            "code": self.code,
            "nodes": self.nodes,
            "replicas": self.replicas,
            "replica_names": self.replica_names,
            "pools": self.pools,
            "segments": self.segments,
            "segment_gpus": self.segment_gpus,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Replaces everything by what `state` gave."""
        self.code, self.nodes, self.replicas = state["code"], state["nodes"], state["replicas"]
        self.replica_names, self.pools = state["replica_names"], state["pools"]
        self.segments, self.segment_gpus = state["segments"], state["segment_gpus"]
        self.node_names = {node["code"]: name for name, node in self.nodes.items()}
        self.pool_names = {code: name for name, code in self.pools.items()}
