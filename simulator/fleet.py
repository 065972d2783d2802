"""A fleet of pools in fleet time, in process: no Kafka, no clock. Same scenario and actions, same events.

Requests are routed at the moment they arrive; lifecycles, faults, neighbours and the routers' view of loads
move on at every step of `scenario.step_s`. Actions are absolute and carry an epoch; an older one never
overwrites a newer.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from heapq import heappop, heappush

import numpy as np

from schemas.errors import InvalidInput
from simulator.engine import Engine
from simulator.events import Events, Outcome, ReplicaEvent
from simulator.load import Load
from simulator.nodes import Cluster, Node, Slot
from simulator.pool import Pool, Replica
from simulator.request import Request
from simulator.router import Draws, check_weights, picker
from simulator.scenario import Fault, Scenario


class Fleet:
    """The simulator. `now_s` is fleet time, from 0."""

    def __init__(self, scenario: Scenario, stepwise: bool = False) -> None:
        """`stepwise`: engines take every step singly (to check the closed form)."""
        self.scenario = scenario
        self.now_s = 0.0
        self.cluster = Cluster(
            [Node(f"{g.prefix}-{i}", g.gpu, g.gpus) for g in scenario.nodes for i in range(g.count)],
        )
        self.load = Load(scenario)
        self._stepwise = stepwise
        self._steps = 0
        self._draws = Draws([scenario.seed, 4])
        self._cold = np.random.default_rng([scenario.seed, 5])
        self.pools: dict[str, Pool] = {}
        for spec in scenario.pools:
            usd_per_s = scenario.gpus[spec.gpu].usd_per_gpu_hour * spec.tp * spec.gpu_share / 3600
            self.pools[spec.name] = Pool(spec, usd_per_s, self._draws)
        self.routes: dict[str, dict[str, float]] = {}
        for spec in scenario.pools:
            self.routes.setdefault(spec.route, {})[spec.name] = spec.route_weight
        self.route_epochs: dict[str, int] = {}
        self._pickers = {route: picker(weights) for route, weights in self.routes.items()}
        self.on_node: list[list[Replica]] = [[] for _ in self.cluster.nodes]
        """Replicas by node, in order of their start."""
        self._events = Events([], [], [])
        self._faults: list[tuple[float, int, str, Fault, Replica | None]] = []
        self._fault_number = 0
        for fault in scenario.faults:
            self._push_fault(fault.at_s, "start", fault, None)
        self._step_s = scenario.step_s
        for pool in self.pools.values():
            if short := self._start_missing(pool, 0.0, warm=True):
                remedy = f"{short} of them find no {pool.spec.gpu} node with {pool.spec.tp} free GPUs: add nodes"
                raise InvalidInput(f"pools.{pool.spec.name}.replicas", pool.spec.replicas, remedy)
            pool.reroute()

    # ------------------------------------------------------------------ time
    def advance(self, until_s: float) -> Events:
        """Everything up to and including `until_s` (not before `now_s`). Splits of the time do not matter."""
        if until_s < self.now_s:
            raise InvalidInput("until_s", until_s, f"fleet time is already {self.now_s}")
        events = self._events
        while self.now_s < until_s:
            step_s = (self._steps + 1) * self._step_s
            stop_s = min(step_s, until_s)
            self._slice(stop_s)
            self.now_s = stop_s
            if stop_s == step_s:
                self._steps += 1
                self._step(stop_s)
        self._events = Events([], [], [])
        events.ends.sort(key=lambda r: (r.end_s, r.number))
        return events

    @property
    def idle(self) -> bool:
        """Whether the load has ended and no request is left."""
        return self.now_s >= self.load.end_s and all(pool.in_flight == 0 for pool in self.pools.values())

    def cost_usd(self, pool: str | None = None) -> float:
        """What was allocated so far, loading and draining included: the integral that a bill must equal."""
        return sum(p.cost_usd(self.now_s) for name, p in self.pools.items() if pool in (None, name))

    # ------------------------------------------------------------------ actions
    def scale(self, pool: str, replicas: int, epoch: int, dry_run: bool = False) -> Outcome:
        """`replicas` shall serve or start. Fewer: starting ones are cancelled, newest first, then the least
        loaded drain."""
        p = self._pool(pool)
        if not 0 <= replicas <= 10_000:
            raise InvalidInput("replicas", replicas, "ask for 0 to 10000")
        refusal = p.scale_epoch.check(epoch, replicas)
        if refusal:
            return Outcome(False, False, False, refusal, p.desired)
        staying = p.staying
        missing = replicas - len(staying)
        if dry_run:
            fits = self._fits(p, missing) if missing > 0 else 0
            words = f"would start {fits} of {missing}" if missing > 0 else f"would stop {-missing}"
            return Outcome(True, fits == max(missing, 0), missing != 0, words, len(staying))
        p.scale_epoch.accept(epoch, replicas)
        changed = p.desired != replicas or missing != 0
        p.desired = replicas
        if missing < 0:
            self._stop(p, -missing)
        short = self._start_missing(p, self.now_s)
        p.refused_total += short
        p.reroute()
        reason = (
            f"{short} refused: no {p.spec.gpu} node has {p.spec.tp} free GPUs; tried again as they come"
            if short
            else "applied"
        )
        return Outcome(True, short == 0, changed, reason, len(p.staying))

    def set_replica_weights(
        self, pool: str, weights: Mapping[str, float], epoch: int, dry_run: bool = False
    ) -> Outcome:
        """Relative weights of a pool's replicas; those not named have 1, names that are gone are ignored."""
        p = self._pool(pool)
        check_weights(weights)
        refusal = p.weights_epoch.check(epoch, dict(weights))
        if refusal:
            return Outcome(False, False, False, refusal, len(p.weights))
        changed = p.weights != weights
        if dry_run:
            return Outcome(True, True, changed, "would apply", len(p.weights))
        p.weights_epoch.accept(epoch, dict(weights))
        p.weights = dict(weights)
        p.reroute()
        return Outcome(True, True, changed, "applied", len(weights))

    def set_pool_weights(self, route: str, weights: Mapping[str, float], epoch: int, dry_run: bool = False) -> Outcome:
        """Relative weights of the pools of a route; those not named have 1."""
        if route not in self.routes:
            raise InvalidInput("route", route, f"name one of {', '.join(self.routes)}")
        check_weights(weights)
        foreign = [name for name in weights if name not in self.routes[route]]
        if foreign:
            raise InvalidInput("weights", foreign[0], f"pools of {route} are {', '.join(self.routes[route])}")
        whole = {name: float(weights.get(name, 1.0)) for name in self.routes[route]}
        if not any(whole.values()):
            raise InvalidInput("weights", dict(weights), "give at least one pool a weight above 0")
        known = self.route_epochs.get(route)
        if known is not None and (epoch < known or (epoch == known and whole != self.routes[route])):
            return Outcome(False, False, False, f"epoch {epoch} is not newer than {known}", len(whole))
        changed = whole != self.routes[route]
        if dry_run:
            return Outcome(True, True, changed, "would apply", len(whole))
        self.route_epochs[route] = epoch
        self.routes[route] = whole
        self._pickers[route] = picker(whole)
        return Outcome(True, True, changed, "applied", len(whole))

    def _pool(self, name: str) -> Pool:
        if name not in self.pools:
            raise InvalidInput("pool", name, f"name one of {', '.join(self.pools)}")
        return self.pools[name]

    # ------------------------------------------------------------------ requests
    def _slice(self, until_s: float) -> None:
        """Arrivals to their replicas, then every engine up to `until_s`."""
        arrivals = self.load.take(until_s)
        self._events.arrivals.extend(arrivals)
        for request in arrivals:
            names, cumulative = self._pickers[request.route]
            if len(names) == 1:
                pool = self.pools[names[0]]
            else:
                index = bisect_right(cumulative, self._draws() * cumulative[-1])
                pool = self.pools[names[min(index, len(names) - 1)]]
            request.pool = pool.spec.name
            if not pool.send(request) and len(pool.backlog) > pool.spec.backlog_max:
                self._refuse(pool.backlog.pop(), "rejected", request.arrival_s)
        for pool in self.pools.values():
            for replica in pool.serving:
                engine = replica.engine
                if engine.due(until_s):
                    engine.advance(until_s)
                    self._collect(engine)

    def _collect(self, engine: Engine) -> None:
        if engine.ended:
            self._events.ends.extend(engine.ended)
            engine.ended.clear()

    def _refuse(self, request: Request, status: str, at_s: float) -> None:
        request.status, request.end_s = status, at_s
        self._events.ends.append(request)

    # ------------------------------------------------------------------ steps
    def _step(self, t: float) -> None:
        """Faults, lifecycles, replacements, backlog, neighbours, and what the routers see of loads."""
        while self._faults and self._faults[0][0] <= t:
            _, _, what, fault, replica = heappop(self._faults)
            self._fault(t, what, fault, replica)
        for pool in self.pools.values():
            for replica in list(pool.replicas):
                if replica.state == "starting" and replica.ready_s <= t:
                    self._become(replica, "ready", t)
                elif replica.state == "draining" and replica.engine.in_flight == 0:
                    self._release(pool, replica, t, "gone")
            self._start_missing(pool, t)
            if pool.dirty:
                pool.reroute()
            self._empty_backlog(pool, t)
        for pool in self.pools.values():
            for replica in pool.serving:
                if pool.spec.interference:
                    self._neighbours(pool, replica, t)
                replica.load = replica.engine.in_flight
        for pool in self.pools.values():
            for replica in pool.serving:
                replica.seen_busy_s = replica.engine.busy_until(t)

    def _empty_backlog(self, pool: Pool, t: float) -> None:
        waiting = pool.backlog
        timeout_s = pool.spec.engine.timeout_s
        if not waiting:
            return
        while waiting and timeout_s is not None and waiting[0].arrival_s + timeout_s <= t:
            self._refuse(waiting.popleft(), "timeout", t)
        if pool.router.targets:
            held = list(waiting)
            waiting.clear()
            for request in held:
                request.routed_s = t
                pool.send(request)

    def _neighbours(self, pool: Pool, replica: Replica, t: float) -> None:
        """Slowdown by co-located replicas: coefficient x their busy share of the last step, in quarters."""
        slow = 1.0
        for other in self._sharing(replica):
            coefficient = pool.spec.interference.get(other.pool)
            if coefficient:
                share = (other.engine.busy_until(t) - other.seen_busy_s) / self._step_s
                slow += coefficient * round(4 * min(max(share, 0.0), 1.0)) / 4
        replica.neighbour_slow = slow
        replica.engine.set_slow(slow * replica.fault_slow, t)

    def _sharing(self, replica: Replica) -> list[Replica]:
        """Other serving replicas that share a GPU with this one, each once."""
        gpus = replica.slot.gpus
        return [
            other
            for other in self.on_node[replica.slot.node]
            if other is not replica
            and other.state in ("ready", "draining")
            and not set(gpus).isdisjoint(other.slot.gpus)
        ]

    # ------------------------------------------------------------------ faults
    def _push_fault(self, at_s: float, what: str, fault: Fault, replica: Replica | None) -> None:
        self._fault_number += 1
        heappush(self._faults, (at_s, self._fault_number, what, fault, replica))

    def _fault(self, t: float, what: str, fault: Fault, replica: Replica | None) -> None:
        pool = self.pools[fault.pool]
        if what == "end":
            assert replica is not None
            replica.fault_slow = 1.0
            replica.engine.set_slow(replica.neighbour_slow, t)
            return
        if fault.every_s is not None:
            self._push_fault(t + fault.every_s, "start", fault, None)
        ready = [r for r in pool.replicas if r.state == "ready"]
        if not ready:
            return
        victim = ready[fault.replica % len(ready)]
        if fault.kind == "death":
            victim.engine.kill(t)
            self._collect(victim.engine)
            self._release(pool, victim, t, "failed")
        else:
            victim.fault_slow = fault.factor
            victim.engine.set_slow(victim.neighbour_slow * fault.factor, t)
            self._push_fault(t + fault.duration_s, "end", fault, victim)

    # ------------------------------------------------------------------ lifecycles
    def _become(self, replica: Replica, state: str, t: float) -> None:
        replica.state, replica.since_s = state, t
        self.pools[replica.pool].dirty = True
        self._events.replicas.append(ReplicaEvent(t, replica.pool, replica.name, state, replica.slot))

    def _start_missing(self, pool: Pool, t: float, warm: bool = False) -> int:
        """Starts what is missing as far as there are GPUs; gives what found none."""
        missing = pool.desired - len(pool.staying)
        for short in range(max(missing, 0), 0, -1):
            slot = self.cluster.take(pool.spec.gpu, pool.spec.tp, pool.spec.gpu_share)
            if slot is None:
                return short
            cold_s = 0.0 if warm else self._cold_start_s(pool)
            replica = pool.add(slot, t, t + cold_s, self._stepwise)
            self.on_node[slot.node].append(replica)
            self._become(replica, "ready" if warm else "starting", t)
        return 0

    def _cold_start_s(self, pool: Pool) -> float:
        cold = pool.spec.cold_start
        if cold.sd_s == 0 or cold.mean_s == 0:
            return cold.mean_s
        variance = float(np.log1p((cold.sd_s / cold.mean_s) ** 2))
        return float(self._cold.lognormal(np.log(cold.mean_s) - variance / 2, np.sqrt(variance)))

    def _stop(self, pool: Pool, count: int) -> None:
        starting = [r for r in pool.replicas if r.state == "starting"]
        for replica in reversed(starting[-count:]):
            self._release(pool, replica, self.now_s, "cancelled")
            count -= 1
        ready = [r for r in pool.replicas if r.state == "ready"]
        ready.sort(key=lambda r: r.engine.in_flight)  # stable: of equals the oldest
        for replica in ready[:count]:
            self._become(replica, "draining", self.now_s)

    def _release(self, pool: Pool, replica: Replica, t: float, state: str) -> None:
        """Gives the GPUs back and stops the bill."""
        self.on_node[replica.slot.node].remove(replica)
        self.cluster.give(replica.slot)
        pool.remove(replica, t)
        self._become(replica, state, t)

    def _fits(self, pool: Pool, count: int) -> int:
        """How many more replicas would find GPUs."""
        slots: list[Slot] = []
        while len(slots) < count:
            slot = self.cluster.take(pool.spec.gpu, pool.spec.tp, pool.spec.gpu_share)
            if slot is None:
                break
            slots.append(slot)
        for slot in slots:
            self.cluster.give(slot)
        return len(slots)
