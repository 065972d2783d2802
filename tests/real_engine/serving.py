"""A real vLLM as a child process, and clients of it that write down what they see."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tests.real_engine.environment import Environment

SEATS, BLOCKS, BLOCK_TOKENS = 8, 100, 32
"""Largest batch; KV cache."""
CONTEXT = 2048
STARTS_WITHIN_S = 240.0
ATTEMPTS_MAX = 1000


class Engine:
    """vLLM on a port."""

    def __init__(self, environment: Environment, port: int, spans_to: str, log: Path) -> None:
        self.environment, self.port, self.spans_to, self.log = environment, port, spans_to, log
        self.process: asyncio.subprocess.Process | None = None
        self.url = f"http://127.0.0.1:{port}"

    async def start(self) -> None:
        """Returns once it answers. Raises TimeoutError, or RuntimeError where it ended."""
        command: list[Any] = [self.environment.python, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", self.environment.model, "--served-model-name", "tiny", "--host", "127.0.0.1"]
        command += ["--port", self.port, "--enforce-eager", "--block-size", BLOCK_TOKENS, "--max-num-seqs", SEATS]
        command += ["--num-gpu-blocks-override", BLOCKS, "--max-model-len", CONTEXT, "--enable-prompt-tokens-details"]
        command += ["--otlp-traces-endpoint", self.spans_to]
        more = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            "OTEL_SERVICE_NAME": "vllm",
            "OTEL_BSP_SCHEDULE_DELAY": "500",
        }
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *map(str, command), env={**os.environ, **more}, stdout=log, stderr=log, start_new_session=True
            )
        async with asyncio.timeout(STARTS_WITHIN_S), aiohttp.ClientSession() as session:
            while not await self._healthy(session):
                if self.process.returncode is not None:
                    raise RuntimeError(f"vLLM ended with {self.process.returncode}: see {self.log}")
                await asyncio.sleep(0.2)

    async def _healthy(self, session: aiohttp.ClientSession) -> bool:
        try:
            async with session.get(f"{self.url}/health") as answer:
                return answer.status == 200
        except aiohttp.ClientError:
            return False

    async def kill(self) -> float:
        """SIGKILL to it and its workers. Gives when."""
        assert self.process is not None
        at = time.time()
        with contextlib.suppress(ProcessLookupError):  # it has ended already, which is what was wanted
            os.killpg(self.process.pid, signal.SIGKILL)
        await self.process.wait()
        return at


@dataclass
class Seen:
    """One attempt of a request, by its client. Times are Unix s; NaN: it never came so far."""

    id: str
    arrival: float
    prompt: int
    asked: int
    """Most tokens that it may get."""
    first: float = math.nan
    end: float = math.nan
    output: int = 0
    cached: int = 0
    outcome: str = ""
    """ok, abort, refused, broken."""


@dataclass
class Clients:
    """Sends requests and keeps what came of each."""

    url: str
    session: aiohttp.ClientSession
    seen: list[Seen] = field(default_factory=list)
    random: random.Random = field(default_factory=lambda: random.Random(7))

    def prompt(self, tokens: int, shared: int = 0) -> list[int]:
        """Token ids; the first `shared` are always the same."""
        return [10 + i % 500 for i in range(shared)] + [
            self.random.randrange(300, 1900) for _ in range(tokens - shared)
        ]

    async def ask(self, prompt: list[int], tokens: int, give_up_after: int = 0) -> Seen:
        """One attempt; `give_up_after` tokens the client goes away."""
        name = f"req-{len(self.seen):05d}"
        one = Seen(name, time.time(), len(prompt), tokens)
        self.seen.append(one)
        body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "stream": True, "temperature": 1.0}
        body |= {"stream_options": {"include_usage": True}, "ignore_eos": self.random.random() < 0.8}
        try:
            async with self.session.post(
                f"{self.url}/v1/completions", json=body, headers={"X-Request-Id": name}
            ) as answer:
                one.outcome = "refused" if answer.status != 200 else await _read(answer, one, give_up_after)
        except (aiohttp.ClientError, OSError):
            one.outcome = "broken"
        one.end = time.time() if math.isnan(one.end) else one.end
        return one

    async def until_answered(self, prompt: list[int], tokens: int) -> None:
        """Attempt after attempt, as a client with retries makes them."""
        for _ in range(ATTEMPTS_MAX):
            if (await self.ask(prompt, tokens)).outcome == "ok":
                return
            await asyncio.sleep(0.5)

    async def load(self, clients: int, seconds: float, make: Callable[[], Awaitable[Any]]) -> None:
        """So many clients, each with a request after the other, for so long; then what they began ends."""
        until = time.monotonic() + seconds

        async def one() -> None:
            while time.monotonic() < until:
                await make()

        await asyncio.gather(*(one() for _ in range(clients)))


async def _read(answer: aiohttp.ClientResponse, one: Seen, give_up_after: int) -> str:
    async for line in answer.content:
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        now = time.time()
        if chunk.get("choices"):
            one.first = now if math.isnan(one.first) else one.first
            one.end = now
            one.output += 1
            if give_up_after and one.output >= give_up_after:
                return "abort"
        usage = chunk.get("usage")
        if usage:
            one.prompt, one.output = usage["prompt_tokens"], usage["completion_tokens"]
            one.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return "ok" if one.output else "broken"
