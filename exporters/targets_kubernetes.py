"""Targets that are Kubernetes pods, by label: the API server is asked again and again (`get`, `list` on pods)."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import yaml

from exporters.targets import Rules, SourceError, Target, setting_error
from exporters.targets_prometheus import bounded

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
PAGE_PODS = 250
PODS_MAX = 10_000
BYTES_MAX = 32 * 1024 * 1024
ENDED = ("Succeeded", "Failed")
ANNOTATION = "prometheus.io/"


class Access(NamedTuple):
    """How the API server is reached."""

    server: str
    token: str
    token_file: Path | None
    """Wins over `token`; read each time, for it is rotated."""
    ssl: ssl.SSLContext | bool

    def headers(self) -> dict[str, str]:
        """What authenticates. Raises OSError."""
        token = self.token_file.read_text(encoding="utf-8").strip() if self.token_file else self.token
        return {"Accept": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}


def in_cluster(account: Path = ACCOUNT) -> Access:
    """As a pod's service account. Raises SettingsError outside of a cluster."""
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host or not (account / "token").exists():
        raise setting_error("KUBERNETES_CONFIG", ValueError("outside of a cluster, name a kubeconfig file"))
    context = ssl.create_default_context(cafile=str(account / "ca.crt"))
    return Access(f"https://{f'[{host}]' if ':' in host else host}:{port}", "", account / "token", context)


def from_kubeconfig(path: Path) -> Access:
    """The current context of a kubeconfig file: token or client certificate. Raises SettingsError."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        context = _named(found, "contexts", found["current-context"])["context"]
        cluster = _named(found, "clusters", context["cluster"])["cluster"]
        user = _named(found, "users", context["user"]).get("user") or {}
        if unable := {"exec", "auth-provider", "username"} & set(user):
            raise ValueError(f"{sorted(unable)[0]} is not supported: use a token or a client certificate")
        token_file = (path.parent / user["tokenFile"]) if "tokenFile" in user else None
        return Access(str(cluster["server"]).rstrip("/"), user.get("token", ""), token_file, _tls(path, cluster, user))
    except yaml.YAMLError as error:  # its text quotes the line, which may hold the token
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark is not None else ""
        raise setting_error("KUBERNETES_CONFIG", ValueError(f"{path}: cannot be read as YAML{where}")) from None
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise setting_error("KUBERNETES_CONFIG", ValueError(f"{path}: {type(error).__name__}: {error}")) from None


def _named(found: Any, kind: str, name: str) -> Any:
    for item in found[kind]:
        if item["name"] == name:
            return item
    raise ValueError(f"{kind} has no {name!r}")


def _tls(path: Path, cluster: Any, user: Any) -> ssl.SSLContext | bool:
    if not str(cluster["server"]).startswith("https://"):
        return True
    if cluster.get("insecure-skip-tls-verify"):
        raise ValueError("insecure-skip-tls-verify is not supported: give certificate-authority")
    data = cluster.get("certificate-authority-data")
    file = cluster.get("certificate-authority")
    context = ssl.create_default_context(
        cafile=str(path.parent / file) if file else None, cadata=base64.b64decode(data).decode() if data else None
    )
    if "client-certificate-data" in user:
        raise ValueError("client-certificate-data is not supported: name files, or use a token")
    if "client-certificate" in user:
        context.load_cert_chain(path.parent / user["client-certificate"], path.parent / user["client-key"])
    return context


class KubernetesSource:
    """Pods with an address, by label selector.

    Parameters: `namespaces` empty is all; `port` is a container port's name or number, '' takes the annotation
    `prometheus.io/port`, else the port named `metrics`, else `http`, else the first. `prometheus.io/scheme` and `/path`
    are taken as well, and a pod with `prometheus.io/scrape: "false"` is none.
    """

    def __init__(
        self, access: Access, selector: str, namespaces: list[str], port: str, rules: Rules, period_s: float
    ) -> None:
        self.name, self.access, self.selector = f"pods {selector}", access, selector
        self.namespaces, self.port, self.rules, self.period_s = namespaces, port, rules, period_s
        self.odd: Mapping[str, str] = {}

    async def targets(self) -> list[Target]:
        """See Source."""
        paths = [f"/api/v1/namespaces/{name}/pods" for name in self.namespaces] or ["/api/v1/pods"]
        try:
            headers = self.access.headers()
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30), headers=headers) as session:
                pods = [pod for path in paths for pod in await self._list(session, path)]
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise SourceError(f"{self.access.server}: {error or type(error).__name__}") from None
        odd: dict[str, str] = {}
        found = list(self._targets(pods, odd))
        self.odd = odd
        return found

    async def _list(self, session: aiohttp.ClientSession, path: str) -> list[Any]:
        pods: list[Any] = []
        query = {"labelSelector": self.selector, "limit": str(PAGE_PODS)}
        while len(pods) < PODS_MAX:
            url = self.access.server + path
            async with session.get(url, params=query, ssl=self.access.ssl, allow_redirects=False) as answer:
                if answer.status != 200:
                    raise SourceError(f"{url}: status {answer.status}{_remedy(answer.status)}")
                found = await asyncio.to_thread(json.loads, await bounded(answer, BYTES_MAX))
            if not isinstance(found, dict) or not isinstance(found.get("items"), list):
                raise SourceError(f"{url}: the answer is no list of pods")
            pods += found["items"]
            onward = (found.get("metadata") or {}).get("continue")
            if not onward:
                break
            query["continue"] = str(onward)
        return pods[:PODS_MAX]

    def _targets(self, pods: list[Any], odd: dict[str, str]) -> Iterator[Target]:
        for pod in pods:
            try:
                labels = self._labels(pod)
                if labels is not None:
                    yield self.rules.target(labels)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                name = pod.get("metadata", {}).get("name") if isinstance(pod, dict) else None
                odd[str(name)] = f"{type(error).__name__}: {error}"

    def _labels(self, pod: Any) -> dict[str, str] | None:
        """A pod as Prometheus labels; None where there is nothing to scrape."""
        meta, spec, status = pod["metadata"], pod["spec"], pod["status"]
        notes = meta.get("annotations") or {}
        ip = status.get("podIP")
        if not ip or status.get("phase") in ENDED or notes.get(f"{ANNOTATION}scrape") == "false":
            return None
        containers = spec["containers"]
        prefix = "__meta_kubernetes_pod_"
        labels = {
            "__address__": f"{f'[{ip}]' if ':' in ip else ip}:{self._port(containers, notes)}",
            "__scheme__": notes.get(f"{ANNOTATION}scheme", "http"),
            "__metrics_path__": notes.get(f"{ANNOTATION}path", "/metrics"),
            "__meta_kubernetes_namespace": meta["namespace"],
            f"{prefix}name": meta["name"],
            f"{prefix}node_name": spec.get("nodeName") or "",
        }
        gpus = sum(int(((c.get("resources") or {}).get("limits") or {}).get("nvidia.com/gpu", 0)) for c in containers)
        if gpus:
            labels[f"{prefix}gpus"] = str(gpus)
        for kind, found in (("label", meta.get("labels") or {}), ("annotation", notes)):
            labels |= {f"{prefix}{kind}_{re.sub(r'[^a-zA-Z0-9_]', '_', key)}": str(v) for key, v in found.items()}
        return labels

    def _port(self, containers: list[Any], notes: dict[str, str]) -> int:
        ports = [port for container in containers for port in container.get("ports") or ()]
        if self.port.isdigit():
            return int(self.port)
        if not self.port and (said := notes.get(f"{ANNOTATION}port")):
            return int(said)
        for name in (self.port,) if self.port else ("metrics", "http"):
            for port in ports:
                if port.get("name") == name:
                    return int(port["containerPort"])
        if self.port or not ports:
            raise ValueError(f"it has no port {self.port or 'at all'}")
        return int(ports[0]["containerPort"])


def _remedy(status: int) -> str:
    return ": its account needs `get` and `list` on pods" if status in (401, 403) else ""
