"""The folder with vLLM's environment, and exporters in this process without a broker."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.exporters.conftest import deployment, producers, settings
from tests.real_engine.environment import Environment

__all__ = ["deployment", "environment", "producers", "settings"]


@pytest.fixture(scope="session")
def environment() -> Environment:
    """Of the folder that REAL_ENGINE_DIR names; made there where it is not yet."""
    folder = os.environ.get("REAL_ENGINE_DIR")
    if not folder:
        pytest.skip("REAL_ENGINE_DIR is not set: `make test-vllm` runs a real vLLM, which takes 6 GB")
    found = Environment(Path(folder))
    found.make()
    return found
