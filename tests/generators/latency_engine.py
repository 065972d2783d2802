"""One replica of a queueing model with continuous batching, by step times of another form than models/ has.

step = (weights^3 + compute^3)^(1/3) + attention with a knee + host time, batches rounded up to multiples of 8 as CUDA
graphs are, 3 % noise. Chunked prefill, KV limit with recomputation of the youngest. Times in s, sizes in tokens.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from heapq import heappop, heappush

import numpy as np


@dataclass(frozen=True)
class Traits:
    """A model on a GPU, and how its engine is set."""

    floor_s: float
    token_s: float
    kv_s: float
    knee: float
    host_s: float
    sequence_s: float
    chunk: int
    batch_max: int


@dataclass(eq=False)
class Request:
    """One request and its fate."""

    arrival_s: float
    prompt: int
    """Tokens to compute; what the prefix cache holds is not among them."""
    cached: int
    output: int
    admitted_s: float = -1.0
    first_s: float = -1.0
    last_s: float = -1.0
    done: int = 0
    finish: int = -1


@dataclass
class Counters:
    """What the engine counts, in all."""

    prompt_tokens: float = 0.0
    cached_tokens: float = 0.0
    generation_tokens: float = 0.0
    requests: float = 0.0
    preemptions: float = 0.0
    iterations: float = 0.0
    ttft_s_sum: float = 0.0
    ttft_count: float = 0.0
    tpot_s_sum: float = 0.0
    tpot_count: float = 0.0
    itl_s_sum: float = 0.0
    itl_count: float = 0.0
    queue_s_sum: float = 0.0
    queue_count: float = 0.0
    prefill_s_sum: float = 0.0
    prefill_count: float = 0.0


@dataclass
class Replica:
    """One engine. `slow`, `clock`, `kv_max` may be changed between calls of `advance`."""

    traits: Traits
    kv_max: float
    rng: np.random.Generator
    now_s: float = 0.0
    slow: float = 1.0
    clock: float = 1.0
    waiting: deque[Request] = field(default_factory=deque)
    running: dict[Request, None] = field(default_factory=dict)
    partial: Request | None = None
    left: int = 0
    batch: int = 0
    kv: float = 0.0
    count: Counters = field(default_factory=Counters)
    ended: list[Request] = field(default_factory=list)
    _heap: list[tuple[int, int, Request]] = field(default_factory=list)
    _noise: list[float] = field(default_factory=list)
    _pushed: int = 0

    @property
    def in_flight(self) -> int:
        """Requests that it holds."""
        return len(self.waiting) + len(self.running)

    def advance(self, until_s: float) -> None:
        """Steps until `until_s` is reached or passed; arrivals lie in `waiting`, in order."""
        while self.now_s < until_s:
            if not self.running:
                if not self.waiting or self.waiting[0].arrival_s >= until_s:
                    self.now_s = until_s
                    return
                self.now_s = max(self.now_s, self.waiting[0].arrival_s)
            self._step()

    def kill(self) -> None:
        """It dies with all that it holds."""
        self.waiting.clear()
        self.running.clear()
        self._heap.clear()
        self.partial, self.batch, self.kv = None, 0, 0.0
        self.count = Counters()

    def _step_s(self, prefill: int, context: float) -> float:
        t = self.traits
        if not self._noise:
            self._noise = self.rng.lognormal(0.0, 0.03, 1024).tolist()
        rounded = -(-self.batch // 8) * 8
        weights = t.floor_s * (0.75 + 0.25 / self.clock) * (1 + 0.12 * (rounded / 256) ** 0.5)
        compute = (rounded + prefill) * t.token_s / self.clock + prefill * context * t.token_s * 5e-5
        attention = t.kv_s * (self.kv + 0.6 * max(self.kv - t.knee, 0.0))
        base = (weights**3 + compute**3) ** (1 / 3) + attention + t.host_s + t.sequence_s * self.batch
        return base * self.slow * self._noise.pop()

    def _step(self) -> None:
        preempted = False
        while self.kv + self.batch > self.kv_max and len(self.running) > 1:
            self._preempt()
            preempted = True
        budget = self.traits.chunk - self.batch
        prefill, context, first = 0, 0.0, []
        while budget > 0:
            if self.partial is None and (preempted or not self._admit()):
                break
            assert self.partial is not None
            n = min(self.left, budget)
            prefill, context, budget, self.left = prefill + n, context + n * self.left, budget - n, self.left - n
            if self.left == 0:
                first.append(self.partial)
                self.partial = None
        step_s = self._step_s(prefill, context / prefill if prefill else 0.0)
        self.now_s += step_s
        c = self.count
        c.iterations += 1
        c.generation_tokens += self.batch
        c.itl_s_sum += step_s * self.batch
        c.itl_count += self.batch
        self.kv += self.batch
        for request in first:
            self._first(request)
        while self._heap and self._heap[0][0] <= c.iterations:
            due, _, request = heappop(self._heap)
            if request.finish == due and request in self.running:
                self._finish(request)

    def _admit(self) -> bool:
        waiting = self.waiting
        if not waiting or waiting[0].arrival_s > self.now_s or len(self.running) >= self.traits.batch_max:
            return False
        request = waiting[0]
        need = request.prompt + request.cached + request.done
        if self.running and self.kv + need > 0.98 * self.kv_max:
            return False
        waiting.popleft()
        self.running[request] = None
        self.partial, self.left = request, request.prompt + request.done
        self.kv += need
        if request.admitted_s < 0:
            request.admitted_s = self.now_s
        return True

    def _first(self, request: Request) -> None:
        c, now = self.count, self.now_s
        if request.first_s < 0:
            request.first_s = now
            c.prompt_tokens += request.prompt + request.cached
            c.cached_tokens += request.cached
            c.ttft_s_sum += now - request.arrival_s
            c.ttft_count += 1
        else:
            c.itl_s_sum += now - request.last_s
            c.itl_count += 1
        request.done += 1
        c.generation_tokens += 1
        self.kv += 1
        self.batch += 1
        request.finish = int(c.iterations) + request.output - request.done
        self._pushed += 1
        heappush(self._heap, (request.finish, self._pushed, request))

    def _finish(self, request: Request) -> None:
        c, now = self.count, self.now_s
        del self.running[request]
        self.batch -= 1
        self.kv -= request.prompt + request.cached + request.output
        request.last_s = now
        self.ended.append(request)
        c.requests += 1
        if request.output > 1:
            c.tpot_s_sum += (now - request.first_s) / (request.output - 1)
            c.tpot_count += 1
        c.queue_s_sum += request.admitted_s - request.arrival_s
        c.queue_count += 1
        c.prefill_s_sum += request.first_s - request.admitted_s
        c.prefill_count += 1

    def _preempt(self) -> None:
        request = next(reversed(self.running))
        del self.running[request]
        if request is self.partial:
            self.partial = None
            self.kv -= request.prompt + request.cached + request.done
        else:
            request.done = request.output - (request.finish - int(self.count.iterations))
            request.finish, request.last_s = -1, self.now_s
            self.batch -= 1
            self.kv -= request.prompt + request.cached + request.done
        self.count.preemptions += 1
        self.waiting.appendleft(request)
