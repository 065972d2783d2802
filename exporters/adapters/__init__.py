"""One adapter an engine: tables from its metric names to our columns. See base.py for what an adapter is."""

from __future__ import annotations

from collections.abc import Collection

from exporters.adapters.base import Adapter

ADAPTERS: tuple[Adapter, ...] = ()
"""In order: the first that recognises a page is taken (dynamo before vllm: its workers emit `vllm:` names too)."""


def choose(names: Collection[str], engine: str | None = None) -> Adapter | None:
    """The adapter for a page with these metric names; with `engine` that one, whatever the names."""
    for adapter in ADAPTERS:
        if adapter.engine == engine if engine else adapter.recognises(names):
            return adapter
    return None
