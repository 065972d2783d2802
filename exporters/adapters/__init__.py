"""One adapter an engine: tables from its metric names to our columns. See base.py for what an adapter is."""

from __future__ import annotations

from collections.abc import Collection

from exporters.adapters.base import Adapter
from exporters.adapters.dcgm import DCGM
from exporters.adapters.dynamo import DYNAMO
from exporters.adapters.sglang import SGLANG
from exporters.adapters.tgi import TGI
from exporters.adapters.triton import TRITON
from exporters.adapters.vllm import VLLM

ADAPTERS: tuple[Adapter, ...] = (DYNAMO, VLLM, SGLANG, TGI, TRITON, DCGM)
"""In order: the first that recognises a page is taken (dynamo before vllm: its workers emit `vllm:` names too)."""


def choose(names: Collection[str], engine: str | None = None) -> Adapter | None:
    """The adapter for a page with these metric names; with `engine` that one, whatever the names."""
    for adapter in ADAPTERS:
        if adapter.engine == engine if engine else adapter.recognises(names):
            return adapter
    return None
