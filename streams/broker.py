"""A real Apache Kafka on this machine, without Docker: one JVM, one node, loopback only.

For `fleetloop broker`, the demo and the tests. Production uses the operator's own cluster, so nothing else
in Fleetloop may know this module: it knows a broker by its address alone.

Who ends the JVM: `stop`, and where this process dies without saying so (kill -9, a lost terminal) the watcher
that is started with it. The watcher is a shell in the JVM's session that reads a pipe whose other end only
this process holds: the kernel closes it however we die. PR_SET_PDEATHSIG would be shorter and wrong: it fires
when the *thread* that started the JVM ends, it needs code between fork and exec, and only Linux has it. The
watcher signals by process group: being a member itself, it keeps that number from being given to another.
"""

from __future__ import annotations

import asyncio
import base64
import fcntl
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from schemas.errors import UnavailableError
from streams.jars import Progress, find_java, kafka_jars

HOST = "127.0.0.1"
HEAP_MB = 512
START_TIMEOUT_S = 60.0  # a warm start takes 2 s; one after a kill recovers its logs first
STOP_TIMEOUT_S = 10.0
OTHERWISE = "without a local Kafka: name a running one in FLEETLOOP_BOOTSTRAP_SERVERS"
FORMAT_TIMEOUT_S = 60.0
PORT_TRIES = 100
START_TRIES = 3
LOG_KEPT_BYTES = 1 << 20

# Below every usual range of ephemeral ports. A client that keeps trying a port of that range while the broker
# is away would sooner or later be given that very port to connect *from*, connect to itself, and keep it.
PORT_FIRST, PORT_LAST = 20_000, 32_000

# Where paths are relative, to the data folder, in which the JVM runs: Kafka splits `log.dirs` at commas.
# A static quorum of one, because a dynamic one would keep the controller's port in its storage. A node that
# was killed is let in again when its former session has passed, so that is short (its default is 9 s).
PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@{host}:{controller_port}
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://{host}:{port},CONTROLLER://{host}:{controller_port}
advertised.listeners=PLAINTEXT://{host}:{port}
log.dirs={log_dir}
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
auto.create.topics.enable=false
message.max.bytes=8388608
replica.fetch.max.bytes=8388608
num.network.threads=2
num.io.threads=4
log.cleaner.dedupe.buffer.size=8388608
offsets.topic.num.partitions=4
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.num.partitions=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
"""

# $$ is this shell, then the JVM that replaces it. The watcher ignores the signal that it sends to its own
# group, gives the JVM 10 s, and leaves at once where the JVM is gone already.
LAUNCH = """
exec 3<&0 </dev/null
(
  trap '' TERM INT HUP
  read -r _ <&3
  kill -s TERM -- -$$ 2>/dev/null
  tenths=100
  while [ $tenths -gt 0 ] && kill -0 $$ 2>/dev/null; do sleep 0.1; tenths=$((tenths - 1)); done
  kill -0 $$ 2>/dev/null && kill -s KILL -- -$$
) &
exec "$@" 3<&-
"""


class LocalBroker:
    """One Kafka node in a JVM, with its data in `data_dir`.

    Args:
        data_dir: created where it does not exist; topics in it survive `stop`, `kill` and `restart`.
        port: of the listener on 127.0.0.1; None takes a free one at the first start and keeps it.
        heap_mb: the JVM's heap in MiB (about 230 MB are resident with the default).
        properties: lines after Kafka's properties of ours, over which they win; `{host}`, `{port}` and
            `{controller_port}` are filled in. The plain listener must stay: that it answers is how we see the start.
        format_arguments: further ones for the formatting of new storage, e.g. `--add-scram=...` for users.

    `with LocalBroker(...) as broker: broker.start()` stops it at the end, also where `start` was interrupted.
    All calls block; they are not meant to be called from two threads at once.
    """

    def __init__(
        self,
        data_dir: Path,
        port: int | None = None,
        heap_mb: int = HEAP_MB,
        *,
        properties: str = "",
        format_arguments: Sequence[str] = (),
    ) -> None:
        self.data_dir = data_dir.absolute()
        self._properties = PROPERTIES + properties
        self._format_arguments = tuple(format_arguments)
        self.heap_mb = heap_mb
        self.log_file = self.data_dir / "kafka.log"
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None
        self._lock_file: IO[bytes] | None = None
        self._log_from = 0

    @property
    def bootstrap_servers(self) -> str:
        """`127.0.0.1:PORT`, for clients. A port that was left open is known after the first start."""
        if self._port is None:
            raise RuntimeError("a LocalBroker without a port has an address only after start()")
        return f"{HOST}:{self._port}"

    @property
    def pid(self) -> int:
        """The JVM's process id."""
        if self._process is None:
            raise RuntimeError("this LocalBroker is not started")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the JVM is there (it may be stopped by a signal, and still be there)."""
        return self._process is not None and self._process.poll() is None

    def start(self, progress: Progress | None = None) -> None:
        """Start Kafka and return once it answers; `progress` gets a line for what takes long.

        Raises UnavailableError, with the remedy, when Java or the jars cannot be had, the port is taken, or
        Kafka ends or does not answer within 60 s (with the end of its log).
        """
        if self.running:
            raise RuntimeError("this LocalBroker runs already")
        self._release()
        tell = progress or (lambda line: None)
        classpath = f"{kafka_jars(tell)}/*"
        java = find_java()
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self._lock()
        try:
            self._start(java, classpath)
        except BaseException:  # Ctrl-C too: what is half started is not left behind
            self.stop()
            raise

    def _start(self, java: Path, classpath: str) -> None:
        self._format(java, classpath)
        if self._port is not None:
            _check_free(self._port)
        for left in reversed(range(START_TRIES)):
            port = self._port if self._port is not None else _free_port()
            controller_port = _free_port(other_than=port)
            self._write_properties("server.properties", port, controller_port, "log")
            self._launch(java, classpath)
            try:
                self._wait(port)
            except UnavailableError:
                # Between our look and Kafka's bind another process may have taken one of the ports.
                if not left or "Address already in use" not in self._log_end():
                    raise
                self._terminate()
            else:
                self._port = port
                return

    def stop(self) -> None:
        """SIGTERM, and SIGKILL after 10 s. Nothing happens where it is not running."""
        self._terminate()
        self._release()

    def kill(self) -> None:
        """SIGKILL: what a crashed machine does to a broker, except that its page cache survives."""
        if self._process is not None:
            self._process.kill()
        self._release()

    def restart(self) -> None:
        """Stop if running, then start on the same port and the same data."""
        self.stop()
        self.start()

    def __enter__(self) -> LocalBroker:
        """Starts nothing, so that `start` can be given its progress; the end of the block stops the broker."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _terminate(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._reap()

    def _release(self) -> None:
        """Give up what belongs to a running broker."""
        self._reap()
        if self._lock_file is not None:
            self._lock_file.close()
            self._lock_file = None

    def _reap(self) -> None:
        """Take note of the JVM's end and dismiss its watcher, which ends when its pipe does."""
        if self._process is None:
            return
        self._process.wait(STOP_TIMEOUT_S)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process = None

    def _lock(self) -> None:
        """One broker on these data: Kafka's own lock comes only after we have written to the folder."""
        lock_file = (self.data_dir / "lock").open("wb")
        try:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock_file.close()
            raise UnavailableError(
                f"another local Kafka runs on {self.data_dir}: stop it, choose another folder,"
                " or name it in FLEETLOOP_BOOTSTRAP_SERVERS"
            ) from error
        self._lock_file = lock_file

    def _format(self, java: Path, classpath: str) -> None:
        """Give new storage its identity, in a folder of another name, so that it is whole or not there."""
        if (self.data_dir / "log").is_dir():
            return
        shutil.rmtree(self.data_dir / "log.part", ignore_errors=True)
        # The ports of this file are never bound: formatting only reads the roles and the folder.
        self._write_properties("format.properties", PORT_FIRST, PORT_LAST, "log.part")
        cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        tool = self._java(java, classpath, "kafka.tools.StorageTool")
        # One word, because an id may begin with a hyphen.
        arguments = ["format", f"--cluster-id={cluster_id}", "--config", "format.properties"]
        arguments += self._format_arguments
        with self._open_log() as log:
            try:
                formatted = subprocess.run(
                    [*tool, *arguments],
                    cwd=self.data_dir,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    timeout=FORMAT_TIMEOUT_S,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                formatted = -signal.SIGKILL
        if formatted != 0:
            raise UnavailableError(f"Kafka could not format {self.data_dir}:\n{self._log_end()}\n{OTHERWISE}")
        (self.data_dir / "log.part").rename(self.data_dir / "log")

    def _write_properties(self, name: str, port: int, controller_port: int, log_dir: str) -> None:
        text = self._properties.format(host=HOST, port=port, controller_port=controller_port, log_dir=log_dir)
        (self.data_dir / name).write_text(text)

    def _java(self, java: Path, classpath: str, main: str) -> list[str]:
        return [
            str(java),
            f"-Xmx{self.heap_mb}m",
            "-XX:+UseSerialGC",  # the small collector and the quick compiler: this JVM is to start fast
            "-XX:TieredStopAtLevel=1",
            "-XX:-UsePerfData",  # which would leave files in /tmp after a kill, as the native codecs would
            "-Djava.io.tmpdir=tmp",
            "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
            "-Dorg.slf4j.simpleLogger.showDateTime=true",
            "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSSZ",
            "-cp",
            classpath,
            main,
        ]

    def _launch(self, java: Path, classpath: str) -> None:
        shutil.rmtree(self.data_dir / "tmp", ignore_errors=True)
        (self.data_dir / "tmp").mkdir()
        command = [*self._java(java, classpath, "kafka.Kafka"), "server.properties"]
        with self._open_log() as log:
            self._process = subprocess.Popen(
                ["sh", "-c", LAUNCH, "kafka", *command],
                cwd=self.data_dir,
                stdin=subprocess.PIPE,  # held open by us: see the module's docstring
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us: workers want to commit before their broker goes
            )

    def _wait(self, port: int) -> None:
        """Until a client sees the broker as a member of its own cluster."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            if not self.running:
                raise UnavailableError(f"Kafka ended while starting:\n{self._log_end()}\n{OTHERWISE}")
            if _answers(port):
                return
            time.sleep(0.05)
        late = f"Kafka did not answer on {HOST}:{port} within {START_TIMEOUT_S:.0f} s"
        raise UnavailableError(f"{late}:\n{self._log_end()}\n{OTHERWISE}")

    def _open_log(self) -> IO[bytes]:
        if self.log_file.exists() and self.log_file.stat().st_size > LOG_KEPT_BYTES:
            self.log_file.replace(self.log_file.with_suffix(".log.old"))
        log = self.log_file.open("ab")
        self._log_from = log.tell()
        return log

    def _log_end(self, size_bytes: int = 2000) -> str:
        """The end of what the last JVM wrote."""
        with self.log_file.open("rb") as log:
            log.seek(max(self._log_from, self.log_file.stat().st_size - size_bytes))
            return log.read().decode(errors="replace").strip()


def _free_port(other_than: int | None = None) -> int:
    for _ in range(PORT_TRIES):
        port = random.randint(PORT_FIRST, PORT_LAST)
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
        if port != other_than:
            return port
    raise UnavailableError(f"no free port found from {PORT_FIRST} to {PORT_LAST}: {OTHERWISE}")


def _check_free(port: int) -> None:
    """Raise UnavailableError where another process listens on the port."""
    with socket.socket() as probe:
        # As Kafka does it: what remains of closed connections (TIME_WAIT) is no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UnavailableError(
                f"port {port} cannot be had ({error.strerror}): choose another, or, if a Kafka runs there,"
                f" set FLEETLOOP_BOOTSTRAP_SERVERS={HOST}:{port}"
            ) from error


def _answers(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=1).close()
    except OSError:
        return False  # not even listening: no reason to trouble a client, which would log it as an error
    seen: list[int] = []

    # In a thread of its own, since the caller's may run an event loop, in which asyncio.run refuses to work.
    def ask() -> None:
        seen.append(asyncio.run(_brokers(f"{HOST}:{port}")))

    thread = threading.Thread(target=ask, name="broker-probe")
    thread.start()
    thread.join()
    return bool(seen and seen[0])


async def _brokers(bootstrap_servers: str) -> int:
    """How many brokers the cluster counts; 0 while it cannot say."""
    client = AIOKafkaAdminClient(bootstrap_servers=bootstrap_servers, request_timeout_ms=5000)
    try:
        await client.start()
        return len((await client.describe_cluster())["brokers"])
    except KafkaError:
        return 0
    finally:
        await client.close()
