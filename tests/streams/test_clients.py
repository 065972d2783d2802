"""Every client connects as the settings say."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faust.auth import SASLCredentials, SSLCredentials
from faust.transport.drivers.aiokafka import credentials_to_aiokafka_auth

from schemas.errors import SettingsError, UnavailableError
from streams import clients
from streams.clients import client_options, faust_brokers, faust_credentials
from streams.deployment import ensure_deployment, read_deployment
from streams.settings import Settings, load_settings

SECRET = {"sasl_username": "me", "sasl_password": "s3cret"}


@pytest.mark.parametrize("protocol", ["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"])
@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
def test_faust_connects_as_the_others_do(protocol: str, mechanism: str) -> None:
    """What Faust hands to its client is what our own clients get."""
    settings = load_settings(security_protocol=protocol, sasl_mechanism=mechanism, **SECRET)
    ours = client_options(settings)
    faust = dict(credentials_to_aiokafka_auth(faust_credentials(settings)))
    assert faust.pop("security_protocol") == ours["security_protocol"] == protocol
    assert isinstance(faust.pop("ssl_context", None), ssl.SSLContext) == ("SSL" in protocol)
    assert (ours["ssl_context"] is not None) == ("SSL" in protocol)
    assert faust == {k: v for k, v in ours.items() if k.startswith("sasl_")}
    assert ("sasl_mechanism" in ours) == protocol.startswith("SASL")
    credentials = faust_credentials(settings)
    assert credentials is None or isinstance(credentials, SASLCredentials | SSLCredentials)
    assert "s3cret" not in repr(credentials)


def test_brokers() -> None:
    """Every bootstrap server reaches Faust."""
    assert faust_brokers(load_settings(bootstrap_servers="a:1, b:2")) == "kafka://a:1;kafka://b:2"


def test_certificates_are_loaded(tmp_path: Path) -> None:
    """The files of the settings are what the TLS context trusts and shows."""
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x", "-keyout", key, "-out", cert],
        check=True,
        capture_output=True,
    )
    settings: Settings = load_settings(security_protocol="SSL", ssl_ca_file=cert, ssl_cert_file=cert, ssl_key_file=key)
    context = settings.ssl_context()
    assert context is not None
    assert len(context.get_ca_certs()) == 1
    assert context.verify_mode is ssl.CERT_REQUIRED


@pytest.mark.parametrize("what", ["no PEM", "another's key", "an encrypted key"])
def test_files_that_do_not_serve_are_named(what: str, tmp_path: Path) -> None:
    """A file that is none of TLS, or a key that needs a password, is an error of settings; nobody is asked for one."""
    keys = [tmp_path / f"key-{i}.pem" for i in range(2)]
    cert, other = tmp_path / "cert.pem", tmp_path / "no.pem"
    other.write_text("nothing")
    hidden = ["-passout", "pass:x"] if what == "an encrypted key" else ["-nodes"]
    for key in keys:
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", *hidden, "-subj", "/CN=x", "-keyout", key, "-out", cert],
            check=True,
            capture_output=True,
        )
    ca, key = (other, keys[1]) if what == "no PEM" else (cert, keys[0] if what == "another's key" else keys[1])
    settings = load_settings(security_protocol="SSL", ssl_ca_file=ca, ssl_cert_file=cert, ssl_key_file=key)
    with pytest.raises(SettingsError, match="FLEETLOOP_SSL_CA_FILE") as caught:
        settings.ssl_context()
    assert str(ca) in str(caught.value)


@pytest.mark.parametrize("protocol", ["PLAINTEXT", "SSL"])
@pytest.mark.parametrize("ask", [read_deployment, ensure_deployment])
async def test_a_port_that_never_answers_is_given_up(
    protocol: str, ask: Callable[[Settings], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What accepts connections and says nothing is an error that names address and remedy, within our own timeout."""
    monkeypatch.setattr(clients, "REQUEST_TIMEOUT_MS", 300)
    monkeypatch.setattr(clients, "PROBE_TIMEOUT_MS", 300)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        settings = load_settings(bootstrap_servers=address, security_protocol=protocol)
        with pytest.raises(UnavailableError, match="no answer") as caught:
            await asyncio.wait_for(ask(settings), 30)
    assert address in str(caught.value)
    assert "FLEETLOOP_SECURITY_PROTOCOL" in str(caught.value)
