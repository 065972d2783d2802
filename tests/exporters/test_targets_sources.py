"""Sources of targets: files and URLs of target groups, names in DNS, pods of an API server; each with its failures."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import dns.asyncresolver
import dns.message
import dns.rdatatype
import dns.rrset
import pytest
import yaml
from aiohttp import web

from exporters.targets import Rules, SourceError, parse_target
from exporters.targets_dns import DnsSource
from exporters.targets_kubernetes import Access, KubernetesSource, from_kubeconfig, in_cluster
from exporters.targets_prometheus import FileSource, HttpSource
from schemas.errors import SettingsError
from tests.exporters.certificates import Authority

GROUPS = [
    {"targets": ["10.0.0.1:8000", "10.0.0.2:8000"], "labels": {"pool": "chat", "node": "n1"}},
    {"targets": ["10.0.0.3:8000"], "labels": {"pool": "assist", "replica": "a-0", "gpus": 2}},
]


# -- files and URLs --------------------------------------------------------------------------------------------


async def test_files_are_read_again_when_they_change(tmp_path: Path) -> None:
    """JSON and YAML, by pattern; a file that comes, changes or goes takes effect; nothing there is no target."""
    source = FileSource(str(tmp_path / "*.*"), Rules())
    assert await source.targets() == []
    (tmp_path / "a.json").write_text(json.dumps(GROUPS))
    assert [t.replica for t in await source.targets()] == ["10.0.0.1:8000", "10.0.0.2:8000", "a-0"]
    assert (await source.targets())[2].gpus == 2
    (tmp_path / "b.yaml").write_text(yaml.safe_dump([{"targets": ["h:1"]}]))
    assert [t.replica for t in await source.targets()][3:] == ["h:1"]
    (tmp_path / "a.json").write_text("[]")
    assert [t.replica for t in await source.targets()] == ["h:1"]
    (tmp_path / "b.yaml").unlink()
    assert await source.targets() == []


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}",
        "[1]",
        '[{"targets": "h:1"}]',
        '[{"targets": ["h:1"], "labels": []}]',
        '[{"targets": ["a/b:1/c"]}]',
        '[{"targets": ["h:1"], "labels": {"gpus": "x"}}]',
        "\udc80",
        "[" * 100_000,
    ],
)
async def test_a_wrong_file_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    """Whatever is in it; and so is a named file that is missing."""
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SourceError, match=r"a\.json"):
        await FileSource(str(path), Rules()).targets()
    with pytest.raises(SourceError, match=r"b\.json: No such file"):
        await FileSource(str(tmp_path / "b.json"), Rules()).targets()


class Web:
    """An HTTP server that answers with what a test says."""

    def __init__(self) -> None:
        self.answer: Any = []
        self.status = 200
        self.asked: list[web.Request] = []
        self.url = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request)
        found = self.answer(request) if callable(self.answer) else self.answer
        return web.json_response(found, status=self.status)


@pytest.fixture
async def server() -> AsyncIterator[Web]:
    one = Web()
    runner = web.ServerRunner(web.Server(one.handle), access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    one.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield one
    await runner.cleanup()


async def test_a_url_is_polled(server: Web) -> None:
    """Target groups as JSON; another status, no JSON or no server is an error without the query of its URL."""
    server.answer = GROUPS
    source = HttpSource(f"{server.url}/sd?token=secret", Rules(), 10)
    assert [t.pool for t in await source.targets()] == ["chat", "chat", "assist"]
    server.status = 503
    with pytest.raises(SourceError, match="status 503") as error:
        await source.targets()
    assert "secret" not in str(error.value) + source.name
    server.status, server.answer = 200, {"not": "a list"}
    with pytest.raises(SourceError, match="a list of target groups"):
        await source.targets()
    with pytest.raises(SourceError, match=r"127\.0\.0\.1:1"):
        await HttpSource("http://127.0.0.1:1/", Rules(), 10).targets()


async def test_a_url_that_answers_no_http_is_shown_without_its_query() -> None:
    """The client's own text has the whole URL."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"220 mail.example ESMTP\r\n\r\n")
        writer.close()

    other = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with other:
        port = other.sockets[0].getsockname()[1]
        with pytest.raises(SourceError, match="/sd: Bad status line") as error:
            await HttpSource(f"http://127.0.0.1:{port}/sd?token=secret", Rules(), 10).targets()
    assert "secret" not in str(error.value)


# -- DNS -------------------------------------------------------------------------------------------------------


class NameServer(asyncio.DatagramProtocol):
    """Answers SRV questions from a table; a name that is not in it does not exist."""

    def __init__(self) -> None:
        self.records: dict[str, list[str]] = {}
        self.silent = False

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, address: Any) -> None:
        question = dns.message.from_wire(data)
        answer = dns.message.make_response(question)
        name = question.question[0].name
        found = self.records.get(str(name))
        if found is None:
            answer.set_rcode(dns.rcode.NXDOMAIN)
        elif found:
            answer.answer.append(dns.rrset.from_text(name, 5, "IN", "SRV", *found))
        if not self.silent:
            self.transport.sendto(answer.to_wire(), address)


@pytest.fixture
async def names() -> AsyncIterator[tuple[NameServer, dns.asyncresolver.Resolver]]:
    transport, protocol = await asyncio.get_running_loop().create_datagram_endpoint(
        NameServer, local_addr=("127.0.0.1", 0)
    )
    resolver = dns.asyncresolver.Resolver(configure=False)
    resolver.nameservers, resolver.port = ["127.0.0.1"], transport.get_extra_info("sockname")[1]
    yield protocol, resolver
    transport.close()


async def test_services_of_a_name(names: tuple[NameServer, dns.asyncresolver.Resolver]) -> None:
    """Each SRV record is a target; records that come and go are followed; a name that is gone has none."""
    server, resolver = names
    source = DnsSource(parse_target("chat=srv+https://_m._tcp.chat.example/metrics?x=1;pool=p"), 10, resolver)
    server.records["_m._tcp.chat.example."] = ["0 0 8001 b.example.", "0 0 8000 a.example."]
    found = await source.targets()
    assert [(t.replica, t.url) for t in found] == [
        ("chat-a.example:8000", "https://a.example:8000/metrics?x=1"),
        ("chat-b.example:8001", "https://b.example:8001/metrics?x=1"),
    ]
    assert {t.pool for t in found} == {"p"}
    server.records["_m._tcp.chat.example."].pop()
    assert [t.replica for t in await source.targets()] == ["chat-b.example:8001"]
    server.records["_m._tcp.chat.example."] = []
    assert await source.targets() == []
    server.records.clear()
    assert await source.targets() == []


async def test_a_name_server_that_is_silent_is_an_error(
    names: tuple[NameServer, dns.asyncresolver.Resolver], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No answer is no empty answer: the targets before stay."""
    server, resolver = names
    server.silent = True
    monkeypatch.setattr("exporters.targets_dns.LIFETIME_S", 0.2)
    with pytest.raises(SourceError, match=r"_m\._tcp"):
        await DnsSource(parse_target("chat=srv+http://_m._tcp.x/metrics"), 10, resolver).targets()


async def test_addresses_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each address, of both families, is a target; a name that does not exist has none, a resolver in trouble is an
    error."""
    loop = asyncio.get_running_loop()
    found: list[Any] = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.2", 8000)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", 8000)),
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fd00::1", 8000, 0, 0)),
    ]

    async def resolve(host: str, port: int | None, **more: Any) -> list[Any]:
        assert (host, port) == ("chat.example", 8000)
        if isinstance(found[0], Exception):
            raise found[0]
        return found

    monkeypatch.setattr(loop, "getaddrinfo", resolve)
    source = DnsSource(parse_target("chat=dns+http://chat.example:8000/metrics"), 10)
    assert [(t.replica, t.url) for t in await source.targets()] == [
        ("chat-10.0.0.1", "http://10.0.0.1:8000/metrics"),
        ("chat-10.0.0.2", "http://10.0.0.2:8000/metrics"),
        ("chat-fd00::1", "http://[fd00::1]:8000/metrics"),
    ]
    found.insert(0, socket.gaierror(socket.EAI_NONAME, "unknown"))
    assert await source.targets() == []
    found.insert(0, socket.gaierror(socket.EAI_AGAIN, "try again"))
    with pytest.raises(SourceError, match="try again"):
        await source.targets()


# -- Kubernetes ------------------------------------------------------------------------------------------------


def pod(name: str, ip: str | None = "10.1.0.1", **given: Any) -> dict[str, Any]:
    """A pod as the API server gives it."""
    container = {
        "name": "engine",
        "ports": given.get("ports", [{"name": "http", "containerPort": 8000}]),
        "resources": {"limits": {"nvidia.com/gpu": "2"}},
    }
    return {
        "metadata": {
            "name": name,
            "namespace": "serving",
            "labels": {"app": "chat", "fleetloop/pool": "chat-h100"},
            "annotations": given.get("annotations"),
        },
        "spec": {"nodeName": "node-7", "containers": [container, {"name": "sidecar"}]},
        "status": {"phase": given.get("phase", "Running"), **({"podIP": ip} if ip else {})},
    }


def _source(server: Web, port: str = "", namespaces: list[str] | None = None) -> KubernetesSource:
    access = Access(server.url, "hush", None, True)
    return KubernetesSource(access, "app=chat", namespaces or [], port, Rules(), 10)


async def test_pods_become_targets(server: Web) -> None:
    """Name, node, pool, GPUs and port of each that runs; ended ones, ones without address and ones that say no are
    none; what cannot be one is remembered with its reason."""
    server.answer = {
        "items": [
            pod("chat-0"),
            pod("chat-1", "fd00::2", annotations={"prometheus.io/port": "9000", "prometheus.io/path": "/m"}),
            pod("chat-2", ports=[{"containerPort": 1}, {"name": "metrics", "containerPort": 2}]),
            pod("done", phase="Succeeded"),
            pod("waiting", None),
            pod("no", annotations={"prometheus.io/scrape": "false"}),
            pod("odd", ports=[]),
            {"metadata": {}},
        ]
    }
    source = _source(server)
    found = await source.targets()
    assert [(t.replica, t.url) for t in found] == [
        ("chat-0", "http://10.1.0.1:8000/metrics"),
        ("chat-1", "http://[fd00::2]:9000/m"),
        ("chat-2", "http://10.1.0.1:2/metrics"),
    ]
    assert {(t.node, t.pool, t.gpus) for t in found} == {("node-7", "chat-h100", 2)}
    assert found[0].pod == "serving:chat-0"
    assert set(source.odd) == {"odd", "None"}
    (asked,) = server.asked
    assert asked.path == "/api/v1/pods"
    assert asked.query["labelSelector"] == "app=chat"
    assert asked.headers["Authorization"] == "Bearer hush"
    assert (await _source(server, "2222").targets())[0].url == "http://10.1.0.1:2222/metrics"
    assert [t.replica for t in await _source(server, "metrics").targets()] == ["chat-2"]


async def test_many_pods_come_in_pages(server: Web) -> None:
    """Followed to the end, namespace by namespace."""

    def answer(request: web.Request) -> Any:
        onward = request.query.get("continue")
        name = f"{request.path.split('/')[4]}-{onward or 'first'}"
        return {"items": [pod(name)], "metadata": {} if onward else {"continue": "second"}}

    server.answer = answer
    found = await _source(server, namespaces=["a", "b"]).targets()
    assert [t.replica for t in found] == ["a-first", "a-second", "b-first", "b-second"]


async def test_an_api_server_that_refuses_is_an_error(server: Web) -> None:
    """With what the account lacks; without its token."""
    server.status = 403
    with pytest.raises(SourceError, match="`get` and `list` on pods") as error:
        await _source(server).targets()
    assert "hush" not in str(error.value)
    server.status, server.answer = 200, {"kind": "Status"}
    with pytest.raises(SourceError, match="no list of pods"):
        await _source(server).targets()


def _kubeconfig(tmp_path: Path, cluster: dict[str, Any], user: dict[str, Any]) -> Path:
    path = tmp_path / "config"
    found = {
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        "clusters": [{"name": "k", "cluster": cluster}],
        "users": [{"name": "u", "user": user}],
    }
    path.write_text(yaml.safe_dump(found))
    return path


def test_kubeconfig(tmp_path: Path) -> None:
    """Token, token file that rotates, client certificate, authority as file or data; the rest says what to do."""
    authority = Authority(tmp_path)
    cert, key = authority.issue("client")
    data = base64.b64encode(authority.file.read_bytes()).decode()
    token = tmp_path / "token"
    token.write_text("one\n")
    https = {"server": "https://k:6443/", "certificate-authority-data": data}
    access = from_kubeconfig(_kubeconfig(tmp_path, https, {"tokenFile": "token"}))
    assert access.server == "https://k:6443"
    assert access.headers()["Authorization"] == "Bearer one"
    token.write_text("two")
    assert access.headers()["Authorization"] == "Bearer two"
    file = {"server": "https://k:6443", "certificate-authority": authority.file.name}
    mutual = {"client-certificate": cert.name, "client-key": key.name}
    assert "Authorization" not in from_kubeconfig(_kubeconfig(tmp_path, file, mutual)).headers()
    for cluster, user, why in (
        (https, {"exec": {}}, "exec is not supported"),
        (https, {"client-certificate-data": data}, "name files"),
        ({**https, "insecure-skip-tls-verify": True}, {}, "give certificate-authority"),
        ({}, {}, "KeyError"),
    ):
        with pytest.raises(SettingsError, match=f"FLEETLOOP_ENGINES_KUBERNETES_CONFIG: .*{why}"):
            from_kubeconfig(_kubeconfig(tmp_path, cluster, user))


def test_a_kubeconfig_that_cannot_be_read_is_not_quoted(tmp_path: Path) -> None:
    """The line at fault may hold the token."""
    path = tmp_path / "config"
    path.write_text("users:\n- name: u\n  user:\n    token: hush: hush\n")
    with pytest.raises(SettingsError, match=r"cannot be read as YAML \(line 4\)") as error:
        from_kubeconfig(path)
    assert "hush" not in str(error.value)


def test_in_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The account of the pod; elsewhere it says what to set."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(SettingsError, match="name a kubeconfig file"):
        in_cluster(tmp_path)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "6443")
    Authority(tmp_path).file.rename(tmp_path / "ca.crt")
    (tmp_path / "token").write_text("t")
    access = in_cluster(tmp_path)
    assert access.server == "https://[fd00::1]:6443"
    assert access.headers()["Authorization"] == "Bearer t"
