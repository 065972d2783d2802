"""Targets by name: every address behind a name (A, AAAA) or every service of one (SRV), resolved again and again."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from collections.abc import Mapping
from urllib.parse import urlsplit, urlunsplit

import dns.asyncresolver
import dns.exception
import dns.rdatatype
import dns.resolver

from exporters.targets import SourceError, Target

LIFETIME_S = 5.0


class DnsSource:
    """`name=dns+http://host:port/metrics`: a replica `name-address` for each address of the host.

    `name=srv+http://_service._proto.host/metrics`: a replica `name-host:port` for each of its records.
    """

    def __init__(self, target: Target, period_s: float, resolver: dns.asyncresolver.Resolver | None = None) -> None:
        self.name, self.target, self.period_s = f"dns {target.url}", target, period_s
        self._resolver = resolver
        self.odd: Mapping[str, str] = {}

    async def targets(self) -> list[Target]:
        """See Source. A name that does not exist (any more) has no targets."""
        parts = urlsplit(self.target.url)
        kind, _, scheme = parts.scheme.partition("+")
        host = parts.hostname or ""
        places = await (self._services(host) if kind == "srv" else self._addresses(host, parts.port))
        out = []
        for place, suffix in places:
            url = urlunsplit((scheme, place, parts.path or "/metrics", parts.query, ""))
            out.append(dataclasses.replace(self.target, replica=f"{self.target.replica}-{suffix}"[:200], url=url))
        return out

    async def _addresses(self, host: str, port: int | None) -> list[tuple[str, str]]:
        try:
            async with asyncio.timeout(LIFETIME_S):
                found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except socket.gaierror as error:
            if error.errno == socket.EAI_NONAME:
                return []
            raise SourceError(f"{host}: {error.strerror}") from None
        except (OSError, TimeoutError, UnicodeError) as error:
            raise SourceError(f"{host}: {error or 'no answer'}") from None
        addresses = sorted({(family, str(place[0])) for family, _, _, _, place in found})
        after = f":{port}" if port else ""
        return [(f"[{a}]{after}" if family == socket.AF_INET6 else a + after, a) for family, a in addresses]

    async def _services(self, name: str) -> list[tuple[str, str]]:
        resolver = self._resolver or dns.asyncresolver.get_default_resolver()
        try:
            answer = await resolver.resolve(name, dns.rdatatype.SRV, lifetime=LIFETIME_S, search=True)
        except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
            return []
        except (dns.exception.DNSException, OSError) as error:
            raise SourceError(f"{name}: {str(error)[:200]}") from None
        found = sorted({(str(record.target).rstrip("."), int(record.port)) for record in answer})
        return [(f"{host}:{port}", f"{host}:{port}") for host, port in found]
