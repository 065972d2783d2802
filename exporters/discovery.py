"""Keeps the set of targets as its sources say it: each is asked again and again, and what it last said stays."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import dns.asyncresolver
import structlog

from exporters.edge import ticks
from exporters.engine_options import EngineOptions
from exporters.fetch import tls
from exporters.targets import DNS_SCHEMES, Rules, Source, SourceError, Target, TargetSet, parse_target
from exporters.targets_dns import DnsSource
from exporters.targets_kubernetes import KubernetesSource, from_kubeconfig, in_cluster
from exporters.targets_prometheus import FileSource, HttpSource

log = structlog.get_logger(__name__)

STATIC = "targets"


class Discovery:
    """Targets of an engine exporter. `changed` is called with replica -> target whenever they are others.

    Attributes
    ----------
    set: what the sources said, and how many were left out.
    failed: source -> why it cannot be read now.
    """

    def __init__(
        self,
        options: EngineOptions,
        changed: Callable[[dict[str, Target]], None],
        failed: Callable[[str], None],
        resolver: dns.asyncresolver.Resolver | None = None,
    ) -> None:
        self._changed, self._count = changed, failed
        self.set = TargetSet(options.targets_max)
        named = [parse_target(item) for item in options.targets]
        by_name = [one for one in named if one.url.startswith(tuple(f"{s}://" for s in DNS_SCHEMES))]
        self.set.put(STATIC, [one for one in named if one not in by_name])
        self.sources = [*(DnsSource(one, options.refresh_s, resolver) for one in by_name), *_sources(options)]
        self.failed: dict[str, str] = {}
        self._odd: dict[str, Mapping[str, str]] = {}
        self._now: dict[str, Target] | None = None

    async def run(self) -> None:
        """Until it is cancelled."""
        self._apply()
        async with asyncio.TaskGroup() as group:
            for source in self.sources:
                group.create_task(self._follow(source))
            await asyncio.Event().wait()

    async def _follow(self, source: Source) -> None:
        async for _ in ticks(source.period_s, asyncio.Event()):
            try:
                found = await source.targets()
            except SourceError as error:
                self._count("discovery")
                if self.failed.get(source.name) != str(error):
                    self.failed[source.name] = str(error)
                    log.warning("targets cannot be read; the last ones stay", source=source.name, error=str(error))
                continue
            if self.failed.pop(source.name, None) is not None:
                log.info("targets can be read again", source=source.name)
            self.set.put(source.name, found, len(source.odd))
            if source.odd and self._odd.get(source.name) != source.odd:
                log.warning("not every target can be one", source=source.name, why=dict(list(source.odd.items())[:10]))
            self._odd[source.name] = source.odd
            self._apply()

    def _apply(self) -> None:
        found = self.set.targets()
        if found != self._now:
            self._now = found
            log.info("targets", count=len(found), **self.set.left_out)
            self._changed(found)


def _sources(options: EngineOptions) -> list[Source]:
    """Raises SettingsError."""
    rules = Rules(options.labels)
    ssl = tls(options.ca_file, options.cert_file, options.key_file) if options.http_sd else True
    out: list[Source] = [FileSource(pattern, rules) for pattern in options.file_sd]
    out += [HttpSource(url, rules, options.refresh_s, ssl) for url in options.http_sd]
    if options.kubernetes_selector:
        path = options.kubernetes_config
        access = from_kubeconfig(path) if path is not None else in_cluster()
        found = options.kubernetes_namespaces, options.kubernetes_port, rules, options.refresh_s
        out.append(KubernetesSource(access, options.kubernetes_selector, *found))
    return out
