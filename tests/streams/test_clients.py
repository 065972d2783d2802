"""Every client connects as the settings say."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

import pytest
from faust.auth import SASLCredentials, SSLCredentials
from faust.transport.drivers.aiokafka import credentials_to_aiokafka_auth

from streams.clients import client_options, faust_brokers, faust_credentials
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
