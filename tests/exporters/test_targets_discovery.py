"""Sources that are asked again and again: what they say takes effect, and what they said stays when they fail."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import structlog

from exporters.discovery import Discovery
from exporters.engine_options import EngineOptions
from exporters.targets import SourceError, Target
from schemas.errors import SettingsError
from tests.exporters.conftest import until


class Scripted:
    """A source that says one thing after another; an exception is raised. The last one is said for ever."""

    name, period_s = "scripted", 0.01

    def __init__(self, *says: Any) -> None:
        self.says = list(says)
        self.odd: dict[str, str] = {}
        self.asked = 0

    async def targets(self) -> list[Target]:
        self.asked += 1
        one = self.says.pop(0) if len(self.says) > 1 else self.says[0]
        if isinstance(one, Exception):
            raise one
        return list(one)


def _discovery(**given: Any) -> tuple[Discovery, list[dict[str, Target]], list[str]]:
    changes: list[dict[str, Target]] = []
    failures: list[str] = []
    return Discovery(EngineOptions.of(**given), changes.append, failures.append), changes, failures


async def test_what_a_source_last_said_stays_when_it_fails() -> None:
    """Each change is told once, in the order of the sources; a failure is counted and named, and no change."""
    a, b = Target("a", "http://a/"), Target("b", "http://b/")
    discovery, changes, failures = _discovery(targets="s=http://s/metrics")
    source = Scripted([a], [a], [a, b], SourceError("away"), SourceError("away"), [b])
    source.odd = {"pod": "no port"}
    discovery.sources = [source]
    with structlog.testing.capture_logs() as logs:
        running = asyncio.create_task(discovery.run())
        await until(lambda: source.asked >= 8)
    running.cancel()
    assert [list(change) for change in changes] == [["s"], ["s", "a"], ["s", "a", "b"], ["s", "b"]]
    assert failures == ["discovery"] * 2
    warned = [(one["event"], one.get("error")) for one in logs if one["log_level"] == "warning"]
    assert warned == [
        ("not every target can be one", None),
        ("targets cannot be read; the last ones stay", "away"),
    ]
    assert discovery.failed == {}
    assert discovery.set.left_out == {"invalid": 1}


async def test_one_source_does_not_wait_for_another() -> None:
    """A source that hangs keeps its own targets from being known, and no others."""
    discovery, changes, _ = _discovery(targets="s=http://s/metrics")
    quick = Scripted([Target("a", "http://a/")])

    class Hangs(Scripted):
        name = "hangs"

        async def targets(self) -> list[Target]:
            await asyncio.Event().wait()
            return []

    discovery.sources = [Hangs([]), quick]
    running = asyncio.create_task(discovery.run())
    await until(lambda: quick.asked >= 3)
    running.cancel()
    assert [list(change) for change in changes] == [["s"], ["s", "a"]]


def test_sources_are_made_of_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names in DNS out of the list, files, URLs, pods; outside of a cluster pods need a kubeconfig."""
    discovery, _, _ = _discovery(
        targets="a=http://a/metrics,b=dns+http://b:1/metrics",
        file_sd=f"{tmp_path}/*.json, {tmp_path}/b.yaml",
        http_sd="http://sd/",
    )
    names = [source.name for source in discovery.sources]
    assert names == [
        "dns dns+http://b:1/metrics",
        f"file {tmp_path}/*.json",
        f"file {tmp_path}/b.yaml",
        "url http://sd/",
    ]
    assert list(discovery.set.targets()) == ["a"]
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(SettingsError, match="FLEETLOOP_ENGINES_KUBERNETES_CONFIG"):
        _discovery(kubernetes_selector="app=chat")


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({}, "FLEETLOOP_ENGINES_TARGETS: nothing to scrape"),
        ({"http_sd": "ftp://x/"}, "FLEETLOOP_ENGINES_HTTP_SD"),
        ({"http_sd": "http://me:hush@x/"}, "FLEETLOOP_ENGINES_HTTP_SD"),
        ({"targets": "a=http://a/", "labels": "colour=red"}, "FLEETLOOP_ENGINES_LABELS"),
    ],
)
def test_wrong_options_are_named(given: dict[str, Any], why: str) -> None:
    """Each by its variable, none with a password."""
    with pytest.raises(SettingsError, match=why) as error:
        EngineOptions.of(**given)
    assert "hush" not in str(error.value)
