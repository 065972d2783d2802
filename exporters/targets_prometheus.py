"""Targets as Prometheus is told them: files of target groups (file_sd), and URLs that answer with such (http_sd)."""

from __future__ import annotations

import asyncio
import glob
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from exporters.fetch import said
from exporters.targets import Rules, SourceError, Target

BYTES_MAX = 16 * 1024 * 1024
FILES_MAX = 256


class FileSource:
    """Target groups in JSON or YAML files; read again when one changes. `pattern`: a path, * and ? allowed."""

    period_s = 1.0

    def __init__(self, pattern: str, rules: Rules) -> None:
        self.name, self.pattern, self.rules = f"file {pattern}", pattern, rules
        self._stamp: list[tuple[str, int, int]] = []
        self._last: list[Target] = []
        self.odd: Mapping[str, str] = {}

    async def targets(self) -> list[Target]:
        """See Source. A pattern without a file is no target; a named file that is missing is an error."""
        return await asyncio.to_thread(self._read)

    def _read(self) -> list[Target]:
        try:
            paths = sorted(glob.glob(self.pattern)) if glob.has_magic(self.pattern) else [self.pattern]
            status = [(path, Path(path).stat()) for path in paths[:FILES_MAX]]
            stamp = [(path, one.st_mtime_ns, one.st_size) for path, one in status]
            if stamp == self._stamp:
                return self._last
            if sum(size for _, _, size in stamp) > BYTES_MAX or len(paths) > FILES_MAX:
                raise SourceError(f"{self.pattern}: more than {BYTES_MAX} bytes or {FILES_MAX} files")
            found = [one for path in paths for one in self.rules.groups(_parsed(Path(path).read_bytes(), path), path)]
        except OSError as error:
            raise SourceError(f"{self.pattern}: {error.strerror or error}") from None
        self._stamp, self._last = stamp, found
        return found


class HttpSource:
    """Target groups that a URL answers with, polled."""

    def __init__(self, url: str, rules: Rules, period_s: float, ssl: Any = True) -> None:
        self.url, self.rules, self.period_s, self._ssl = url, rules, period_s, ssl
        self._shown = url.partition("?")[0]  # a query may hold a secret
        self.name = f"url {self._shown}"
        self.odd: Mapping[str, str] = {}

    async def targets(self) -> list[Target]:
        """See Source."""
        timeout = aiohttp.ClientTimeout(total=10)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.get(self.url, allow_redirects=False, ssl=self._ssl) as answer,
            ):
                if answer.status != 200:
                    raise SourceError(f"{self._shown}: status {answer.status}")
                body = await bounded(answer, BYTES_MAX)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise SourceError(f"{self._shown}: {said(error)}") from None
        return self.rules.groups(await asyncio.to_thread(_parsed, body, self._shown), self._shown)


async def bounded(answer: aiohttp.ClientResponse, bytes_max: int) -> bytes:
    """The body of an answer. Raises ValueError where it is longer."""
    body = bytearray()
    async for chunk in answer.content.iter_chunked(64 * 1024):
        body += chunk
        if len(body) > bytes_max:
            raise ValueError(f"more than {bytes_max} bytes")
    return bytes(body)


def _parsed(body: bytes, name: str) -> Any:
    try:
        return yaml.safe_load(body) if name.endswith((".yml", ".yaml")) else json.loads(body)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise SourceError(f"{name}: cannot be read: {str(error)[:200]}") from None
