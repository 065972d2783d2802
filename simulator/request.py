"""What goes into an engine and what is seen of it: a request and its fate, the engine's configuration, a scrape.

Times in s of fleet time, sizes in tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

INF = math.inf


class Request:
    """One request and its fate. `status` is empty until it ended."""

    __slots__ = (
        "admitted_s", "arrival_s", "end_s", "finish_step", "first_token_s", "generated", "klass", "number",
        "output_tokens", "pool", "preemptions", "prompt_tokens", "replica", "route", "routed_s", "status",
        "tenant",
    )  # fmt: skip

    def __init__(
        self,
        number: int,
        arrival_s: float,
        route: str,
        tenant: str,
        klass: str,
        prompt_tokens: int,
        output_tokens: int,
    ) -> None:
        self.number = number
        self.arrival_s = arrival_s
        self.routed_s = arrival_s
        """When it reached its replica: later than `arrival_s` where it waited for one to be ready."""
        self.route = route
        self.tenant = tenant
        self.klass = klass
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.pool = ""
        self.replica = ""
        self.status = ""
        self.admitted_s = self.first_token_s = self.end_s = -1.0
        self.finish_step = -1
        """Step at whose end its last token comes; -1 while it does not decode."""
        self.generated = 0
        """Tokens generated, brought up to date when it is preempted or ends."""
        self.preemptions = 0

    @property
    def ttft_s(self) -> float | None:
        """Time to first token, s."""
        return self.first_token_s - self.arrival_s if self.first_token_s >= 0 else None

    @property
    def e2e_s(self) -> float | None:
        """End-to-end latency, s."""
        return self.end_s - self.arrival_s if self.status else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first, s; None with fewer than two tokens."""
        if self.first_token_s < 0 or self.generated < 2 or self.status != "ok":
            return None
        return (self.end_s - self.first_token_s) / (self.generated - 1)


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Step-time coefficients in ms (D2 and P1 per 1000 tokens) and the engine's configuration."""

    d0_ms: float
    d1_ms: float
    d2_ms: float
    p1_ms: float
    chunk_tokens: int = 2048
    """max_num_batched_tokens: decodes and prefill of one step."""
    seqs_max: int = 256
    kv_tokens_max: int = 450_000
    queue_max: int = 10_000
    """Requests that may wait; more are rejected."""
    timeout_s: float = INF
    """A request that was not admitted for so long ends as `timeout`."""


class EngineView(NamedTuple):
    """What a scrape would see. Counters since the engine's start."""

    running: int
    waiting: int
    kv_usage: float
    prompt_tokens: int
    generation_tokens: int
    requests: int
    preemptions: int
    iterations: int
    busy_s: float
    ttft_s_sum: float
    ttft_count: int
    tpot_s_sum: float
    tpot_count: int
    e2e_s_sum: float
    e2e_count: int
    queue_s_sum: float
    queue_count: int
    itl_s_sum: float
    itl_count: int
