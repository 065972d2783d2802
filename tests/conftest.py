"""What all tests share: a real Kafka, the real traces, and the profile of hypothesis.

Environment: FLEETLOOP_REQUIRE_BROKER=1 makes a broker test that would be skipped fail (`make test` and CI set
it); FLEETLOOP_DATA names the folder with the real traces. Every other FLEETLOOP_* variable of the caller is
taken away, so that a developer's own deployment is neither used nor changed by a test.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from schemas.errors import UnavailableError
from streams.broker import LocalBroker

pytest_plugins = ["pytester"]

BROKER_REQUIRED = os.environ.get("FLEETLOOP_REQUIRE_BROKER") == "1"
for variable in [name for name in os.environ if name.startswith("FLEETLOOP_")]:
    if variable not in ("FLEETLOOP_DATA", "FLEETLOOP_LONG_TESTS"):
        del os.environ[variable]

hypothesis.settings.register_profile(
    "fleetloop",
    deadline=None,  # two busy cores say nothing about the code
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    derandomize="CI" in os.environ,  # there a failure must be the submission's, and come again
    print_blob=True,
)
hypothesis.settings.load_profile("fleetloop")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        fixtures = getattr(item, "fixturenames", [])
        if "broker" in fixtures or "own_broker" in fixtures:
            item.add_marker(pytest.mark.broker)
        if "data_dir" in fixtures:
            item.add_marker(pytest.mark.data)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Where a broker is required, a broker test that was skipped, for whatever reason, has failed."""
    report = yield
    if BROKER_REQUIRED and report.skipped and item.get_closest_marker("broker"):
        report.outcome = "failed"
        report.longrepr = f"a broker test was skipped where FLEETLOOP_REQUIRE_BROKER=1: {report.longrepr}"
    return report


def _started(broker: LocalBroker) -> LocalBroker:
    try:
        broker.start()
    except UnavailableError as error:
        pytest.skip(f"no local Kafka: {error}")
    return broker


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalBroker]:
    """One real Kafka for all tests that do not hurt it; keep them apart with `topic_prefix`."""
    with _started(LocalBroker(tmp_path_factory.mktemp("broker"))) as running:
        yield running


@pytest.fixture
def own_broker(tmp_path: Path) -> Iterator[Callable[[], LocalBroker]]:
    """Makes running brokers that a test may stop, kill and restart; each is stopped at the test's end."""
    made: list[LocalBroker] = []

    def make() -> LocalBroker:
        made.append(LocalBroker(tmp_path / f"broker-{len(made)}"))
        return _started(made[-1])

    yield make
    for one in made:
        one.stop()


@pytest.fixture
def topic_prefix() -> str:
    """A prefix for topics and groups that no other test has."""
    return f"t{uuid.uuid4().hex[:12]}-"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with the real traces."""
    if not (named := os.environ.get("FLEETLOOP_DATA")):
        pytest.skip("FLEETLOOP_DATA does not name the folder with the real traces")
    folder = Path(named)
    if not folder.is_dir():
        pytest.fail(f"FLEETLOOP_DATA={named} is not a folder")
    return folder
