"""One vLLM-like engine replica in fleet time: continuous batching, chunked prefill, KV growth, preemption.

A step takes `D0 + D1 B + D2 K/1000 + P1 p/1000` ms (B decoding sequences, K their KV tokens, p prefill
tokens), times a slowdown. Steps of pure decoding are skipped in closed form up to the next arrival, finish or
KV limit: `T(n) = t0 + n base + growth n (n-1) / 2`, always from the anchor t0, so that asking in small or large
strides gives the same bits.

Knows nothing of fleets, clocks, logs. Times in s, sizes in tokens.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from heapq import heappop, heappush

from simulator.request import INF, EngineSpec, EngineView, Request

KV_WATERMARK = 0.99
"""Admission leaves 1 % of the KV cache to the growth of what runs (vLLM's watermark)."""
TTFT_BOUNDS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
TPOT_BOUNDS_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
"""Upper bounds of the buckets in which it counts latencies: vLLM's."""


class Engine:
    """A replica. `submit` in order of arrival, then `advance`; requests that ended lie in `ended`."""

    __slots__ = (
        "_base", "_growth", "_heap", "_kv", "_limit", "_order", "_partial", "_partial_left", "_prefilled",
        "_reserved", "_run_end", "_stepwise", "_t0", "batch", "busy_s", "e2e_count", "e2e_s_sum", "ended",
        "generation_tokens", "inbox", "iterations", "itl_count", "itl_s_sum", "preemptions", "prompt_tokens",
        "queue_count", "queue_s_sum", "requests", "slow", "spec", "tpot_buckets", "tpot_count", "tpot_s_sum",
        "ttft_buckets", "ttft_count", "ttft_s_sum", "waiting",
    )  # fmt: skip

    def __init__(self, spec: EngineSpec, stepwise: bool = False) -> None:
        """`stepwise`: never skip, one step at a time (to check the closed form)."""
        self.spec = spec
        self._stepwise = stepwise
        self.slow = 1.0
        self.inbox: deque[Request] = deque()
        self.waiting: deque[Request] = deque()
        self.ended: list[Request] = []
        self._order: dict[Request, None] = {}  # running, oldest admission first
        self._heap: list[tuple[int, int, Request]] = []
        self._partial: Request | None = None  # the one whose prompt is not read to its end
        self._partial_left = 0
        self._prefilled: list[Request] = []  # get their first token at the end of this step
        self.batch = 0  # decoding sequences
        self._kv = 0  # their tokens at the start of the present run
        self._reserved = 0  # tokens of prompts being read
        self._t0 = self._base = self._growth = 0.0
        self._limit = 0  # steps of the present run; 0 = idle
        self._run_end = INF
        self.prompt_tokens = self.generation_tokens = self.requests = self.preemptions = self.iterations = 0
        self.busy_s = 0.0
        self.ttft_s_sum = self.tpot_s_sum = self.e2e_s_sum = self.queue_s_sum = 0.0
        self.ttft_count = self.tpot_count = self.e2e_count = self.queue_count = 0
        self.itl_s_sum, self.itl_count = 0.0, 0
        self.ttft_buckets = [0] * (len(TTFT_BOUNDS_S) + 1)
        self.tpot_buckets = [0] * (len(TPOT_BOUNDS_S) + 1)

    # ------------------------------------------------------------------ in
    def submit(self, request: Request) -> None:
        """A request that comes at its `routed_s`: not before the last one, nor the time advanced to."""
        self.inbox.append(request)

    def set_slow(self, factor: float, at_s: float) -> None:
        """Steps that begin from `at_s` on, to which it must be advanced, take `factor` times as long."""
        if factor == self.slow:
            return
        self.slow = factor
        if self._limit:
            self._truncate(at_s)

    def kill(self, at_s: float) -> None:
        """The replica dies: whatever it holds ends as `error`."""
        for request in [*self._order, *self.waiting, *self.inbox]:
            if request.finish_step >= 0:
                request.generated = self._generated(request, at_s)
            self._end(request, "error", at_s)
        self._order.clear()
        self.waiting.clear()
        self.inbox.clear()
        self._heap.clear()
        self._prefilled.clear()
        self._partial = None
        self.batch = self._kv = self._reserved = self._limit = 0
        self._run_end = INF

    # ------------------------------------------------------------------ out
    @property
    def in_flight(self) -> int:
        """Requests that it holds."""
        return len(self._order) + len(self.waiting) + len(self.inbox)

    @property
    def busy(self) -> bool:
        """Whether a step is in progress."""
        return self._limit > 0

    def busy_until(self, at_s: float) -> float:
        """Busy seconds since the start, up to `at_s`, to which it must be advanced."""
        return self.busy_s + (at_s - self._t0 if self._limit else 0.0)

    def due(self, until_s: float) -> bool:
        """Whether anything would happen up to `until_s`."""
        return self._run_end <= until_s or bool(self.inbox) or (bool(self.waiting) and self.spec.timeout_s < INF)

    def view(self, at_s: float) -> EngineView:
        """Gauges and counters at `at_s`, to which it must be advanced."""
        done = self._steps_done(at_s) if self._limit else 0
        kv = self._kv + self.batch * min(done, max(self._limit - 1, 0)) + self._reserved
        return EngineView(
            len(self._order),
            len(self.waiting),
            kv / self.spec.kv_tokens_max,
            self.prompt_tokens,
            self.generation_tokens + self.batch * done,
            self.requests,
            self.preemptions,
            self.iterations + done,
            self.busy_until(at_s),
            self.ttft_s_sum,
            self.ttft_count,
            self.tpot_s_sum,
            self.tpot_count,
            self.e2e_s_sum,
            self.e2e_count,
            self.queue_s_sum,
            self.queue_count,
            self.itl_s_sum + (self.batch * (self._time(done) - self._t0) if done else 0.0),
            self.itl_count + self.batch * done,
        )

    def advance(self, until_s: float) -> None:
        """Everything that happens up to and including `until_s`."""
        inbox, waiting, spec = self.inbox, self.waiting, self.spec
        while True:
            if inbox:
                arrival = inbox[0].routed_s
                if self._limit == 0 or arrival <= self._run_end:
                    request = inbox.popleft()
                    if waiting:
                        self._expire(arrival)
                    if (
                        len(waiting) >= spec.queue_max
                        or request.prompt_tokens + request.output_tokens >= spec.kv_tokens_max
                    ):
                        self._end(request, "rejected", arrival)
                        continue
                    waiting.append(request)
                    if self._limit == 0:
                        self._begin(arrival)
                    elif len(waiting) == 1 and len(self._order) < spec.seqs_max and self._limit > 1:
                        self._truncate(arrival)
                    continue
            if self._run_end > until_s:
                break
            self._finish_run()
        if waiting:
            self._expire(until_s)

    # ------------------------------------------------------------------ runs of equal steps
    def _time(self, n: int) -> float:
        return self._t0 + n * self._base + self._growth * (n * (n - 1) // 2)

    def _steps_done(self, at_s: float) -> int:
        """Steps of the present run that ended at or before `at_s`."""
        x = at_s - self._t0
        if x < self._base:
            return 0
        g = self._growth
        if g > 0:
            b = self._base - g / 2
            n = int((math.sqrt(b * b + 2 * g * x) - b) / g)
        else:
            n = int(x / self._base)
        while n > 0 and self._time(n) > at_s:  # the root is off by rounding at most
            n -= 1
        while self._time(n + 1) <= at_s:
            n += 1
        return min(n, self._limit)

    def _truncate(self, at_s: float) -> None:
        """The run ends with the step in progress at `at_s`: what comes then is seen by the next step."""
        n = self._steps_done(at_s)
        if n == 0 or self._time(n) < at_s:
            n += 1
        if n < self._limit:
            self._limit = n
            self._run_end = self._time(n)

    def _begin(self, t: float) -> None:
        """Schedules the step that starts at `t`, as vLLM does: what runs, then the queue, oldest first."""
        spec = self.spec
        waiting = self.waiting
        preempted = False
        while self._kv + self._reserved > spec.kv_tokens_max:
            self._preempt_last()
            preempted = True
        budget = spec.chunk_tokens - self.batch
        prefill = 0
        partial = self._partial
        if partial is not None:
            n = self._partial_left if self._partial_left < budget else budget
            prefill = n
            budget -= n
            self._partial_left -= n
            if self._partial_left == 0:
                self._prefilled.append(partial)
                self._partial = None
        if waiting:
            self._expire(t)
            if not preempted and self._partial is None:
                prefill += self._admit(t, budget)
        if prefill == 0 and self.batch == 0:
            self._limit = 0
            self._run_end = INF
            return
        batch, slow = self.batch, self.slow
        self._t0 = t
        self._base = (
            slow * (spec.d0_ms + spec.d1_ms * batch + spec.d2_ms * self._kv / 1000 + spec.p1_ms * prefill / 1000) / 1000
        )
        if prefill or preempted or self._stepwise:
            self._limit = 1
            self._growth = 0.0
            self._run_end = t + self._base
            return
        self._growth = slow * spec.d2_ms * batch * 1e-6
        heap = self._heap
        while heap[0][2].finish_step != heap[0][0]:  # preempted since
            heappop(heap)
        limit = heap[0][0] - self.iterations
        room = (spec.kv_tokens_max - self._reserved - self._kv) // batch + 1
        self._limit = limit if limit < room else room
        self._run_end = self._time(self._limit)

    def _admit(self, t: float, budget: int) -> int:
        """Moves requests from the queue into the batch; gives the prefill tokens of this step."""
        spec, waiting, order = self.spec, self.waiting, self._order
        prefill = 0
        watermark = spec.kv_tokens_max * KV_WATERMARK
        while waiting and budget > 0 and len(order) < spec.seqs_max:
            request = waiting[0]
            need = request.prompt_tokens + request.generated
            if order and self._kv + self._reserved + need >= watermark:
                break
            waiting.popleft()
            order[request] = None
            self._reserved += need + 1
            if request.admitted_s < 0:
                request.admitted_s = t
                self.queue_s_sum += t - request.arrival_s
                self.queue_count += 1
            n = need if need < budget else budget
            prefill += n
            budget -= n
            if n == need:
                self._prefilled.append(request)
            else:
                self._partial = request
                self._partial_left = need - n
        return prefill

    def _finish_run(self) -> None:
        end, n = self._run_end, self._limit
        self.iterations += n
        self.generation_tokens += self.batch * n
        # Time between tokens of what decodes. A preempted request's wait is left out: it gets no token meanwhile.
        self.itl_s_sum += self.batch * (end - self._t0)
        self.itl_count += self.batch * n
        self._kv += self.batch * n
        self.busy_s += end - self._t0
        heap, steps = self._heap, self.iterations
        while heap and heap[0][0] <= steps:
            step, _, request = heappop(heap)
            if request.finish_step == step:
                self._retire(request, end)
        for request in self._prefilled:
            self._first_token(request, end)
        self._prefilled.clear()
        self._begin(end)

    def _first_token(self, request: Request, at_s: float) -> None:
        """The end of a prefill gives one token: the first, or after a preemption the next."""
        held = request.prompt_tokens + request.generated + 1
        request.generated += 1
        self._reserved -= held
        self._kv += held
        self.batch += 1
        self.generation_tokens += 1
        if request.first_token_s < 0:
            request.first_token_s = at_s
            self.prompt_tokens += request.prompt_tokens
            self.ttft_s_sum += at_s - request.arrival_s
            self.ttft_count += 1
            self.ttft_buckets[bisect_left(TTFT_BOUNDS_S, at_s - request.arrival_s)] += 1
        request.finish_step = self.iterations + request.output_tokens - request.generated
        if request.generated >= request.output_tokens:
            self._retire(request, at_s)
        else:
            heappush(self._heap, (request.finish_step, request.number, request))

    def _retire(self, request: Request, at_s: float) -> None:
        request.generated = request.output_tokens
        request.finish_step = -1
        self._kv -= request.prompt_tokens + request.output_tokens
        self.batch -= 1
        del self._order[request]
        self.requests += 1
        self._end(request, "ok", at_s)
        self.e2e_s_sum += at_s - request.arrival_s
        self.e2e_count += 1
        if request.generated > 1:
            tpot_s = (at_s - request.first_token_s) / (request.generated - 1)
            self.tpot_s_sum += tpot_s
            self.tpot_count += 1
            self.tpot_buckets[bisect_left(TPOT_BOUNDS_S, tpot_s)] += 1

    def _preempt_last(self) -> None:
        """Recompute: the youngest gives back its KV and goes to the head of the queue."""
        request = self._order.popitem()[0]
        if request is self._partial:
            self._partial = None
            self._reserved -= request.prompt_tokens + request.generated + 1
        else:
            request.generated = request.output_tokens - (request.finish_step - self.iterations)
            request.finish_step = -1
            self._kv -= request.prompt_tokens + request.generated
            self.batch -= 1
        request.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(request)

    def _generated(self, request: Request, at_s: float) -> int:
        return request.output_tokens - (request.finish_step - self.iterations - self._steps_done(at_s))

    def _expire(self, at_s: float) -> None:
        """Ends what waited too long. A preempted request has been admitted once and stays at the head."""
        waiting, timeout = self.waiting, self.spec.timeout_s
        first = 0
        while first < len(waiting) and waiting[first].admitted_s >= 0:
            first += 1
        while first < len(waiting) and waiting[first].arrival_s + timeout <= at_s:
            request = waiting[first]
            del waiting[first]
            self._end(request, "timeout", request.arrival_s + timeout)

    def _end(self, request: Request, status: str, at_s: float) -> None:
        request.status = status
        request.end_s = at_s
        self.ended.append(request)
