"""Kafka over TLS and SASL, by nothing but FLEETLOOP_* settings: every kind of client, and what is said when it fails.

The broker is a real one with a SASL_SSL listener (SCRAM and PLAIN) and one that asks clients for certificates. Who
comes by SCRAM may do what docs/operations.md says that our processes need, and nothing else.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.protocol.admin import CreateAclsRequest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from schemas.errors import SettingsError, UnavailableError
from schemas.topics import FLEET_CONFIG, POOL_SIGNALS, REQUEST_TRACES, ce_type
from streams.broker import HOST, LocalBroker
from streams.clients import admin_client
from streams.deployment import ensure_deployment, read_deployment
from streams.producer import EdgeProducer
from streams.reader import LogReader, header, read_to_end
from streams.replay import kept_checkpoints
from streams.settings import PREFIX, Settings, load_settings

pytestmark = pytest.mark.broker

ROOT = Path(__file__).parents[2]
USER, PASSWORD = "alice", "correct-horse-battery"
EDGE_USER = "edge"
PLAIN_USER, PLAIN_PASSWORD = "bob", "staple-of-the-plain-kind"
WRONG_PASSWORD = "not-what-was-agreed"
RUN_WITHIN_S = 60.0
LISTENERS = """
listeners=PLAINTEXT://{{host}}:{{port}},CONTROLLER://{{host}}:{{controller_port}},\
SECURE://{{host}}:{secure},MUTUAL://{{host}}:{mutual}
advertised.listeners=PLAINTEXT://{{host}}:{{port}},SECURE://{{host}}:{secure},MUTUAL://{{host}}:{mutual}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SECURE:SASL_SSL,MUTUAL:SSL
inter.broker.listener.name=PLAINTEXT
ssl.keystore.type=PEM
ssl.keystore.location={folder}/server.pem
ssl.truststore.type=PEM
ssl.truststore.location={folder}/ca.pem
listener.name.mutual.ssl.client.auth=required
offsets.retention.check.interval.ms=500
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS;User:{user};User:CN=client
listener.name.secure.sasl.enabled.mechanisms=SCRAM-SHA-512,PLAIN
listener.name.secure.scram-sha-512.sasl.jaas.config=\
org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.secure.plain.sasl.jaas.config=\
org.apache.kafka.common.security.plain.PlainLoginModule required user_{user}="{password}";
"""

# Numbers of Kafka's protocol: kinds of resource, operations.
TOPIC, GROUP = 2, 3
READ, WRITE, CREATE, DESCRIBE, DESCRIBE_CONFIGS = 3, 4, 5, 8, 10
LITERAL, PREFIXED, ALLOW = 3, 4, 3

Key = ec.EllipticCurvePrivateKey


def certificate(name: str, key: Key, issuer: str, by: Key, *names: x509.GeneralName) -> bytes:
    """A certificate in PEM; without names it is an authority's."""
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=not names, path_length=None), critical=True)
    )
    if names:
        made = made.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return made.sign(by, SHA256()).public_bytes(Encoding.PEM)


def private(key: Key) -> bytes:
    """A key in PEM, not encrypted."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def make_files(folder: Path) -> None:
    """An authority, another one that nobody has to do with, certificates, and files of passwords."""
    ca, other, server, client = (ec.generate_private_key(ec.SECP256R1()) for _ in range(4))
    here = (x509.IPAddress(IPv4Address(HOST)), x509.DNSName("localhost"))
    files = {
        "ca.pem": certificate("ca", ca, "ca", ca),
        "other-ca.pem": certificate("other", other, "other", other),
        "server.pem": private(server) + certificate("kafka", server, "ca", ca, *here),
        "client.pem": certificate("client", client, "ca", ca, x509.DNSName("client")),
        "client.key": private(client),
        "password": PASSWORD.encode() + b"\n",
        "wrong-password": WRONG_PASSWORD.encode() + b"\n",
        "plain-password": PLAIN_PASSWORD.encode(),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
        (folder / name).chmod(0o600)


class Secure:
    """The broker's secure addresses, and environments of clients for them."""

    def __init__(self, folder: Path, broker: LocalBroker, secure_port: int, mutual_port: int) -> None:
        self.folder, self.broker = folder, broker
        self.mutual = f"{HOST}:{mutual_port}"
        self.address = f"{HOST}:{secure_port}"

    def environment(self, prefix: str, **changes: str | None) -> dict[str, str]:
        """Variables of a client that may connect; changed as wanted, None: not set."""
        wanted: dict[str, str | None] = {
            "bootstrap_servers": self.address,
            "topic_prefix": prefix,
            "security_protocol": "SASL_SSL",
            "sasl_username": USER,
            "sasl_password_file": str(self.folder / "password"),
            "ssl_ca_file": str(self.folder / "ca.pem"),
            "checkpoint_interval_s": "1",
            "session_timeout_s": "3",
            "health_port": "0",
            "log_level": "DEBUG",
            "log_format": "json",
        }
        return {PREFIX + name.upper(): value for name, value in (wanted | changes).items() if value is not None}

    def by_certificate(self, prefix: str, **changes: str | None) -> dict[str, str]:
        """The same for a client that shows a certificate instead of a password."""
        files = {"ssl_cert_file": str(self.folder / "client.pem"), "ssl_key_file": str(self.folder / "client.key")}
        nobody = {"sasl_username": None, "sasl_password_file": None}
        changes = {"bootstrap_servers": self.mutual, "security_protocol": "SSL", **nobody, **files, **changes}
        return self.environment(prefix, **changes)

    def wrong_password(self, prefix: str) -> dict[str, str]:
        """Of a client that does not know the password."""
        return self.environment(prefix, sasl_password_file=str(self.folder / "wrong-password"))

    def untrusted(self, prefix: str) -> dict[str, str]:
        """Of a client that trusts another authority than the broker's."""
        return self.environment(prefix, ssl_ca_file=str(self.folder / "other-ca.pem"))


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secure]:
    """A Kafka that is spoken to over TLS."""
    folder = tmp_path_factory.mktemp("secure")
    make_files(folder)
    with socket.socket() as one, socket.socket() as two:
        one.bind((HOST, 0))
        two.bind((HOST, 0))
        ports = one.getsockname()[1], two.getsockname()[1]
    properties = LISTENERS.format(
        secure=ports[0], mutual=ports[1], folder=folder, user=PLAIN_USER, password=PLAIN_PASSWORD
    )
    users = [f"--add-scram=SCRAM-SHA-512=[name={name},password={PASSWORD}]" for name in (USER, EDGE_USER)]
    with LocalBroker(folder / "broker", properties=properties, format_arguments=users) as broker:
        try:
            broker.start()
        except UnavailableError as error:
            pytest.skip(f"no local Kafka: {error}")
        yield Secure(folder, broker, *ports)


async def allow(secure: Secure, prefix: str) -> None:
    """What docs/operations.md asks for, for a deployment's own user and for an exporter's."""
    all_of = [(TOPIC, prefix, PREFIXED, what) for what in (CREATE, DESCRIBE, DESCRIBE_CONFIGS, READ, WRITE)]
    all_of += [(GROUP, f"{prefix}fleetloop.", PREFIXED, what) for what in (READ, DESCRIBE)]
    edge = [(TOPIC, prefix + REQUEST_TRACES, LITERAL, WRITE), (TOPIC, prefix + FLEET_CONFIG, LITERAL, READ)]
    admin = AIOKafkaAdminClient(bootstrap_servers=secure.broker.bootstrap_servers)
    await admin.start()
    try:
        for user, rights in ((USER, all_of), (EDGE_USER, edge)):
            for kind, name, pattern, operation in rights:
                request = CreateAclsRequest(kind, name, pattern, f"User:{user}", "*", operation, ALLOW)
                answer = await admin._send_request(request)
                assert [code for code, _ in answer.creation_responses] == [0], answer
    finally:
        await admin.close()


class Processes:
    """`fleetloop` as processes; whatever they write is kept, and searched for secrets at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.numbers = folder, itertools.count()
        self.started: list[tuple[asyncio.subprocess.Process, Path, Path]] = []

    async def start(self, environment: dict[str, str], *arguments: str) -> tuple[asyncio.subprocess.Process, Path]:
        """Starts `fleetloop ARGUMENTS`; gives the process and the file of its stderr."""
        number = next(self.numbers)
        out, err = (self.folder / f"{number}.{kind}" for kind in ("out", "err"))
        with out.open("wb") as to_out, err.open("wb") as to_err:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "cli.main", *arguments),
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=to_out,
                stderr=to_err,
            )
        self.started.append((process, out, err))
        return process, err

    async def run(self, environment: dict[str, str], *arguments: str) -> tuple[int, str, str]:
        """Runs it to its end: (exit code, stdout, stderr)."""
        process, err = await self.start(environment, *arguments)
        code = await asyncio.wait_for(process.wait(), RUN_WITHIN_S)
        return code, text_of(err.with_suffix(".out")), text_of(err)

    async def close(self) -> None:
        """Ends what still runs; no process may have written a secret."""
        for process, _, _ in self.started:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        written = b"".join(path.read_bytes() for _, *paths in self.started for path in paths)
        assert written
        for secret in (PASSWORD, WRONG_PASSWORD, PLAIN_PASSWORD):
            assert secret.encode() not in written
            assert base64.b64encode(secret.encode()) not in written


@pytest.fixture
async def fleetloop(tmp_path: Path) -> Any:
    """Processes of this test."""
    made = Processes(tmp_path)
    yield made
    await made.close()


async def eventually(what: str, holds: Callable[[], Any], log: Path) -> None:
    """Waits until the coroutine of `holds` gives True."""
    deadline = time.monotonic() + RUN_WITHIN_S
    while not await holds():
        assert time.monotonic() < deadline, f"not in time: {what}\n{text_of(log)[-3000:]}"
        await asyncio.sleep(0.1)


def text_of(file: Path) -> str:
    """What a process wrote."""
    return file.read_text()


def settings_of(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """What a process with this environment would load."""
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return load_settings()


async def send_rows(settings: Settings, names: range) -> None:
    """Requests that end now, a record each."""
    async with EdgeProducer(settings, "gateway") as producer:
        for n in names:
            at_s = datetime.now(UTC).timestamp()
            row = {"event": "end", "request_id": f"r{n}", "at_s": at_s, "pool": "chat", "status": "ok", "e2e_s": 0.1}
            value = json.dumps([row]).encode()
            producer.send(REQUEST_TRACES, f"r{n}", value, type=ce_type("request.rows"), id=f"r{n}")
        assert await producer.flush(30)


async def ends_of(settings: Settings) -> dict[int, int]:
    """Partition -> offset after the log's last record."""
    async with LogReader(settings, REQUEST_TRACES) as reader:
        return await reader.ends()


async def checkpointed(settings: Settings, ends: dict[int, int]) -> bool:
    """Whether checkpoints hold everything before these ends."""
    for partition, end in ends.items():
        kept = await kept_checkpoints(settings, "requests", partition)
        if end and not any(k.offset >= end - 1 for k in kept):
            return False
    return True


async def test_a_level_lives_over_tls_and_scram(
    secure: Secure, fleetloop: Processes, topic_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """init, an edge's producer, a level that takes records, checkpoints, dies and restores, and what it publishes."""
    await allow(secure, topic_prefix)
    edge = settings_of(secure.environment(topic_prefix, sasl_username=EDGE_USER), monkeypatch)
    environment = secure.environment(topic_prefix)
    settings = settings_of(environment, monkeypatch)
    code, _, err = await fleetloop.run(environment, "init", "--local")
    assert code == 0, err
    assert await read_deployment(edge) == await read_deployment(settings)
    await send_rows(edge, range(40))
    ends = await ends_of(settings)
    assert all(ends.values())
    first, log = await fleetloop.start(environment, "worker", "--level", "requests")
    await eventually("a checkpoint of everything", lambda: checkpointed(settings, ends), log)
    first.kill()
    await first.wait()
    await send_rows(edge, range(40, 60))
    ends = await ends_of(settings)
    second, log = await fleetloop.start(environment, "worker", "--level", "requests")
    await eventually("a checkpoint of the rest", lambda: checkpointed(settings, ends), log)

    async def published() -> bool:
        kinds = {header(r, "ce_type") async for r in read_to_end(settings, POOL_SIGNALS)}
        return ce_type("request.windows") in kinds

    await eventually("windows of requests", published, log)
    second.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(second.wait(), RUN_WITHIN_S) == 0
    code, out, err = await fleetloop.run(environment, "get", "config", "--json")
    assert code == 0, err
    assert [item["key"] for item in json.loads(out)] == ["deployment/deployment"]
    lines = [json.loads(line) for line in text_of(log).splitlines() if line.startswith("{")]
    restored = [line["applied"] for line in lines if line.get("event") == "restored"]
    assert any(offset >= 0 for applied in restored for offset in applied.values()), text_of(log)


async def test_views_over_tls_leave_nothing_with_the_broker(
    secure: Secure, fleetloop: Processes, topic_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The views' process serves; of its group, one per start, nothing stays once it has ended."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    environment = secure.environment(topic_prefix) | {"FLEETLOOP_VIEWS_PORT": str(port)}
    settings = settings_of(environment, monkeypatch)
    await allow(secure, topic_prefix)
    await ensure_deployment(settings, local=True)
    views, log = await fleetloop.start(environment, "views")
    admin = admin_client(settings)
    await admin.start()

    async def serves() -> bool:
        assert views.returncode is None, text_of(log)
        with suppress(aiohttp.ClientError):
            async with client.get(f"http://{HOST}:{port}/readyz") as answer:
                return answer.status == 200
        return False

    async def groups() -> list[str]:
        return [name for name, *_ in await admin.list_consumer_groups() if name.startswith(topic_prefix)]

    async def forgotten() -> bool:
        return not await groups()

    try:
        async with aiohttp.ClientSession() as client:
            await eventually("the page", serves, log)
        assert len(await groups()) == 1
        views.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(views.wait(), RUN_WITHIN_S) == 0
        await eventually("the group forgotten", forgotten, log)
    finally:
        await admin.close()


async def test_other_ways_in(secure: Secure, topic_prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SASL PLAIN, a certificate of the client's, and a host name of the broker's certificate serve as well."""
    plain = {"sasl_mechanism": "PLAIN", "sasl_username": PLAIN_USER}
    plain["sasl_password_file"] = str(secure.folder / "plain-password")
    made = await ensure_deployment(settings_of(secure.environment(topic_prefix, **plain), monkeypatch), local=True)
    for way in (
        secure.by_certificate(topic_prefix),
        secure.environment(topic_prefix, **plain, bootstrap_servers=secure.address.replace(HOST, "localhost")),
    ):
        assert await read_deployment(settings_of(way, monkeypatch)) == made


async def test_who_may_not_in_is_told_why(secure: Secure, topic_prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong is said with what the broker or TLS said of it, and with the setting to look at.

    A broker does not tell a topic that one may not see from one that is not there: for that both remedies are named.
    """
    stranger = settings_of(secure.environment(topic_prefix, sasl_username=EDGE_USER), monkeypatch)
    asked = asyncio.create_task(read_deployment(stranger))
    no_certificate = secure.by_certificate(topic_prefix, ssl_cert_file=None, ssl_key_file=None)
    cases: list[tuple[dict[str, str], str, str]] = [
        (secure.wrong_password(topic_prefix), "uthentication failed", "FLEETLOOP_SASL_PASSWORD_FILE"),
        (secure.untrusted(topic_prefix), "CERTIFICATE_VERIFY_FAILED", "FLEETLOOP_SSL_CA_FILE"),
        (
            secure.environment(topic_prefix, sasl_mechanism="SCRAM-SHA-256"),
            "UnsupportedSaslMechanism",
            "FLEETLOOP_SASL_MECHANISM",
        ),
        (secure.environment(topic_prefix, security_protocol="PLAINTEXT"), "", "FLEETLOOP_SECURITY_PROTOCOL"),
        (no_certificate, "", "FLEETLOOP_SSL_CERT_FILE"),
    ]
    for environment, reason, remedy in cases:
        settings = settings_of(environment, monkeypatch)
        for ask in (read_deployment, ensure_deployment):
            with pytest.raises(UnavailableError) as caught:
                await asyncio.wait_for(ask(settings), RUN_WITHIN_S)
            assert settings.bootstrap_servers in str(caught.value)
            assert reason in str(caught.value)
            assert remedy in str(caught.value)
            assert WRONG_PASSWORD not in str(caught.value)
    with pytest.raises(SettingsError, match=r"fleet\.config: no such topic.*fleetloop init.*allow this user"):
        await asked


async def test_processes_that_may_not_in_end(secure: Secure, fleetloop: Processes, topic_prefix: str) -> None:
    """A worker, which otherwise waits for its broker for ever, and a command end by themselves with 3."""
    wrong, untrusted = secure.wrong_password(topic_prefix), secure.untrusted(topic_prefix)
    cases = [(wrong, "worker --level requests"), (wrong, "init"), (untrusted, "worker --level requests")]
    runs = [fleetloop.run(environment, *command.split()) for environment, command in cases]
    for (environment, command), (code, out, err) in zip(cases, await asyncio.gather(*runs), strict=True):
        assert code == 3, (command, err)
        assert ("FLEETLOOP_SASL_PASSWORD_FILE" if environment is wrong else "FLEETLOOP_SSL_CA_FILE") in err
        assert "Traceback" not in err
        assert out == ""
