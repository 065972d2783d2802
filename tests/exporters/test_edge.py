"""What exporters share: options that explain themselves without telling secrets, ticks that are skipped, metrics."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Iterable
from typing import Any

import pytest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from exporters.edge import Edge, options_of, ticks
from schemas.config import Deployment
from schemas.errors import SettingsError
from streams.settings import Settings


class Options(BaseSettings):
    """Options of no exporter."""

    model_config = SettingsConfigDict(env_prefix="FLEETLOOP_NOBODY_")
    url: str = Field("", max_length=10, description="Where.")
    token: SecretStr = Field(SecretStr(""), max_length=3, description="What.")
    period_s: float = Field(1.0, gt=0, description="How often, s.")


def test_options_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is not given."""
    monkeypatch.setenv("FLEETLOOP_NOBODY_PERIOD_S", "5")
    assert options_of(Options, {"period_s": None}).period_s == 5
    assert options_of(Options, {"period_s": 2}).period_s == 2


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"period_s": -1}, "FLEETLOOP_NOBODY_PERIOD_S: -1: .*How often"),
        ({"token": "hush-hush"}, r"FLEETLOOP_NOBODY_TOKEN: \*\*\*: "),
        ({"url": "http://me:hush@host/path"}, r"FLEETLOOP_NOBODY_URL: 'http://\*\*\*@host/path'"),
    ],
)
def test_what_is_wrong_is_named_and_no_secret_is_told(given: dict[str, Any], shown: str) -> None:
    """The variable, the value, the remedy; of a secret or a URL with a password not the value."""
    with pytest.raises(SettingsError, match=shown) as error:
        options_of(Options, given)
    assert "hush" not in str(error.value)


async def test_ticks_that_were_missed_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A consumer that takes three periods and a half gets the next tick at the fourth, and not four at once."""
    loop = asyncio.get_running_loop()
    stop, seen = asyncio.Event(), []
    async for _ in ticks(0.05, stop):
        seen.append(loop.time())
        if len(seen) == 1:
            await asyncio.sleep(0.175)
        if len(seen) == 3:
            stop.set()
    steps = [(at - seen[0]) / 0.05 for at in seen]
    assert steps[1] >= 4
    assert steps[2] >= steps[1]
    assert len(seen) == 3


class More(Collector):
    """A metric of one exporter alone."""

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily("more", "help", 7.0)


async def test_an_exporter_may_have_metrics_of_its_own(settings: Settings, deployment: Deployment) -> None:
    """They are on /metrics beside those of every exporter."""
    async with Edge(settings, deployment, "nobody", "here", -1, collectors=[More()]) as edge:
        port = edge._health.port

        def get() -> str:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                return str(answer.read(), "utf-8")

        page = await asyncio.to_thread(get)
    assert "more 7.0" in page
    assert 'fleetloop_exporter_buffered_bytes{exporter="nobody"} 0.0' in page
