"""State of one pool and its replicas: who serves, what is wanted, what it cost."""

from __future__ import annotations

from collections import deque

from simulator.engine import Engine
from simulator.nodes import Slot
from simulator.request import Request
from simulator.router import Draws, Router
from simulator.scenario import PoolSpec


class Epoch:
    """The newest accepted action of a kind: an older one, or another of the same epoch, is refused."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._content: object = None

    def check(self, number: int, content: object) -> str:
        """Why it is refused; empty when it is not."""
        if self.number is None or number > self.number or (number == self.number and content == self._content):
            return ""
        return f"epoch {number} is not newer than {self.number}"

    def accept(self, number: int, content: object) -> None:
        """Remembers an accepted action."""
        self.number, self._content = number, content


class Replica:
    """One engine with its place and life: starting, ready, draining, then gone (or failed, cancelled)."""

    __slots__ = (
        "allocated_s", "engine", "fault_slow", "load", "name", "neighbour_slow", "pool", "ready_s", "released_s",
        "seen_busy_s", "since_s", "slot", "state", "weight",
    )  # fmt: skip

    def __init__(self, name: str, pool: str, slot: Slot, engine: Engine, allocated_s: float, ready_s: float) -> None:
        self.name = name
        self.pool = pool
        self.slot = slot
        self.engine = engine
        self.state = "starting"
        self.allocated_s = self.since_s = allocated_s
        self.ready_s = ready_s
        self.released_s: float | None = None
        self.weight = 1.0
        self.load = 0
        """Requests that the router believes it holds."""
        self.fault_slow = self.neighbour_slow = 1.0
        self.seen_busy_s = 0.0


class Pool:
    """A pool's replicas in order of their start."""

    def __init__(self, spec: PoolSpec, usd_per_s: float, draws: Draws) -> None:
        self.spec = spec
        self.usd_per_s = usd_per_s
        """Cost of one allocated replica: GPUs x share x price."""
        self.desired = spec.replicas
        self.replicas: list[Replica] = []
        self.serving: list[Replica] = []
        """Ready and draining."""
        self.dirty = False
        self.weights: dict[str, float] = {}
        self.scale_epoch = Epoch()
        self.weights_epoch = Epoch()
        self.router = Router(spec.router, draws)
        self.backlog: deque[Request] = deque()
        self.refused_total = 0
        self._spec = spec.engine.spec()
        self._started = 0
        self._released_usd = 0.0

    @property
    def staying(self) -> list[Replica]:
        """Starting and ready: what counts against `desired`."""
        return [r for r in self.replicas if r.state != "draining"]

    @property
    def in_flight(self) -> int:
        """Requests in the pool."""
        return len(self.backlog) + sum(r.engine.in_flight for r in self.serving)

    def cost_usd(self, now_s: float) -> float:
        """Released and present replicas, from their allocation on."""
        return self._released_usd + self.usd_per_s * sum(now_s - r.allocated_s for r in self.replicas)

    def add(self, slot: Slot, allocated_s: float, ready_s: float, stepwise: bool) -> Replica:
        """A new replica in a slot; names are never used twice."""
        replica = Replica(
            f"{self.spec.name}-{self._started}",
            self.spec.name,
            slot,
            Engine(self._spec, stepwise),
            allocated_s,
            ready_s,
        )
        self._started += 1
        self.replicas.append(replica)
        return replica

    def remove(self, replica: Replica, at_s: float) -> None:
        """Takes a replica out and books its cost."""
        self.replicas.remove(replica)
        replica.released_s = at_s
        self._released_usd += self.usd_per_s * (at_s - replica.allocated_s)

    def reroute(self) -> None:
        """After any change of states or weights."""
        self.dirty = False
        self.serving = [r for r in self.replicas if r.state in ("ready", "draining")]
        ready = [r for r in self.replicas if r.state == "ready"]
        for replica in ready:
            replica.weight = self.weights.get(replica.name, 1.0)
        self.router.set_targets(list(ready))

    def send(self, request: Request) -> bool:
        """To a replica, or into the backlog while none is ready. Gives whether it was sent."""
        replica = self.router.pick()
        if replica is None:
            self.backlog.append(request)
            return False
        assert isinstance(replica, Replica)
        replica.load += 1
        request.replica = replica.name
        replica.engine.submit(request)
        return True
