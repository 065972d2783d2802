"""One page of one target over HTTP, within bounds on bytes (also when decompressed) and time."""

from __future__ import annotations

import base64
import ssl
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import aiohttp
from pydantic import SecretStr

from exporters.exposition import PageError
from schemas.errors import SettingsError

READ_CHUNK = 64 * 1024
SECRET_AGE_S = 10.0
"""A file with a secret is read again after so long."""
TEXT, OPENMETRICS = "text/plain", "application/openmetrics-text"
# Asking for OpenMetrics as well would get it, from prometheus_client at any weight: more bytes for the same numbers.
HEADERS = {"Accept": f"{TEXT};version=0.0.4,*/*;q=0.1", "Accept-Encoding": "identity", "User-Agent": "fleetloop"}


def said(error: Exception) -> str:
    """What an error of a request says, without the URL: its query may hold a secret."""
    match error:
        case aiohttp.ClientResponseError():
            text = error.message
        case aiohttp.InvalidURL():
            text = "no URL that can be asked"
        case _:
            text = str(error)
    return text or type(error).__name__


class PageBody(NamedTuple):
    """A page as it came."""

    body: bytes
    openmetrics: bool


class Credentials:
    """What targets are shown: nothing, a user with a password, or a bearer token. Files are read again now and then."""

    def __init__(self, username: str, password_file: Path | None, token_file: Path | None) -> None:
        self.username, self.file, self.bearer = username, token_file or password_file, token_file is not None
        self._header: dict[str, str] = {}
        self._read_at = -SECRET_AGE_S
        if self.file is not None:
            self.headers(0.0)

    def headers(self, now: float) -> dict[str, str]:
        """Headers of a request. Raises SettingsError where the file cannot be read."""
        if self.file is not None and now - self._read_at >= SECRET_AGE_S:
            try:
                secret = SecretStr(self.file.read_text(encoding="utf-8").strip())
            except (OSError, UnicodeDecodeError) as error:
                raise SettingsError(f"{self.file}: cannot be read: {error}") from None
            self._read_at = now
            text = secret.get_secret_value()
            if not text or not (text.isascii() and text.isprintable()):
                raise SettingsError(f"{self.file}: needed is one line of printable ASCII")
            basic = base64.b64encode(f"{self.username}:{text}".encode()).decode()
            self._header = {"Authorization": f"Bearer {text}" if self.bearer else f"Basic {basic}"}
        return self._header


def tls(ca_file: Path | None, cert_file: Path | None, key_file: Path | None) -> ssl.SSLContext | bool:
    """How https targets are verified. Raises SettingsError."""
    if ca_file is None and cert_file is None:
        return True
    try:
        context = ssl.create_default_context(cafile=str(ca_file) if ca_file else None)
        if cert_file is not None:
            context.load_cert_chain(cert_file, key_file)
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"{ca_file or cert_file}: cannot be used for TLS: {error}") from None
    return context


class Fetcher:
    """Gets pages. An async context manager."""

    def __init__(
        self, timeout_s: float, bytes_max: int, credentials: Credentials, ssl: ssl.SSLContext | bool = True
    ) -> None:
        self.bytes_max, self.credentials = bytes_max, credentials
        self._timeout, self._ssl = aiohttp.ClientTimeout(total=timeout_s), ssl
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Fetcher:
        connector = aiohttp.TCPConnector(limit=0, limit_per_host=0, ssl=self._ssl, keepalive_timeout=75)
        self._session = aiohttp.ClientSession(
            timeout=self._timeout,
            connector=connector,
            headers=HEADERS,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=READ_CHUNK,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def page(self, url: str) -> PageBody:
        """Raises PageError for an answer that cannot be taken; ClientError, OSError or TimeoutError for none.

        SettingsError where the file with the secret is gone.
        """
        assert self._session is not None
        headers = self.credentials.headers(time.monotonic())
        async with self._session.get(url, allow_redirects=False, headers=headers) as answer:
            if answer.status != 200:
                raise PageError("status", f"status {answer.status}")
            kind = answer.headers.get("Content-Type", TEXT).partition(";")[0].strip().lower()
            if kind not in (TEXT, OPENMETRICS):
                raise PageError("type", f"content type {kind[:100]!r}")
            if (answer.content_length or 0) > self.bytes_max:
                raise PageError("bytes", f"{answer.content_length} bytes, the bound is {self.bytes_max}")
            inflate = _inflater(answer.headers.get("Content-Encoding", "identity").strip().lower())
            chunks: list[bytes] = []
            size = 0
            async for chunk in answer.content.iter_any():
                if inflate is not None:
                    chunk = _inflated(inflate, chunk, self.bytes_max - size)
                size += len(chunk)
                if size > self.bytes_max:
                    raise PageError("bytes", f"more than {self.bytes_max} bytes")
                chunks.append(chunk)
            if inflate is not None and not inflate.eof:
                raise PageError("encoding", "its compressed data breaks off")
        return PageBody(b"".join(chunks), kind == OPENMETRICS)


def _inflater(encoding: str) -> zlib._Decompress | None:
    if encoding in ("", "identity"):
        return None
    if encoding in ("gzip", "deflate"):
        return zlib.decompressobj(zlib.MAX_WBITS | 32)  # either header
    raise PageError("encoding", f"content encoding {encoding[:100]!r}")


def _inflated(inflate: zlib._Decompress, chunk: bytes, room: int) -> bytes:
    try:
        return inflate.decompress(chunk, room + 1)  # one more than there is room for tells
    except zlib.error as error:
        raise PageError("encoding", f"it cannot be decompressed: {error}") from None
