"""What the HTTP targets share: which addresses may be used, and what an answer's status means."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from executors.target import ActionFailed, NewerInForce, TryAgain
from schemas.errors import SettingsError
from streams.settings import is_loopback

ANSWER_BYTES_MAX = 256 * 1024
DETAIL_MAX = 500
BUSY = (408, 423, 425, 429)


def checked_url(url: str, what: str) -> str:
    """The address without a slash at its end. Raises SettingsError: https is required, except on loopback."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SettingsError(f"{what}: {url!r}: no address; write e.g. https://host/path")
    if parts.username or parts.password:
        raise SettingsError(f"{what}: an address must not carry a password: use the secret's own variable")
    if parts.scheme == "http" and not is_loopback(parts.hostname):
        raise SettingsError(f"{what}: {url!r}: use https; plain http is only for loopback addresses")
    return url.rstrip("/")


def secret(variable: str) -> str:
    """A secret from an environment variable, or from the file named by `<variable>_FILE`; empty where neither is set.

    Raises SettingsError where the file cannot be read.
    """
    path = os.environ.get(f"{variable}_FILE")
    if path:
        try:
            return Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"{variable}_FILE: {path!r}: cannot be read ({error})") from None
    return os.environ.get(variable, "")


async def request(
    session: aiohttp.ClientSession, method: str, url: str, body: bytes, headers: Mapping[str, str]
) -> dict[str, Any]:
    """One request; its answer's JSON object (empty where it is none).

    Raises NewerInForce for 409, TryAgain where it cannot be reached, is busy or failed itself (5xx), ActionFailed else.
    """
    try:
        async with session.request(method, url, data=body, headers=headers, allow_redirects=False) as answer:
            raw = await answer.content.read(ANSWER_BYTES_MAX)
            status = answer.status
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise TryAgain(f"{method} {url}: {error or type(error).__name__}") from None
    if 200 <= status < 300:
        try:
            found = json.loads(raw)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}
    words = f"{method} {url}: {status}: {raw[:DETAIL_MAX].decode('utf-8', 'replace')}"
    if status == 409:
        raise NewerInForce(words)
    if status in BUSY or status >= 500:
        raise TryAgain(words)
    raise ActionFailed(words)
