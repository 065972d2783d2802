"""Who sends: by bearer token, client certificate, or, where neither is asked for, address."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Any

from exporters.intake_options import IntakeOptions

Certificate = Mapping[str, Any]
"""A client's certificate, verified, as `ssl` describes it."""
BEARER = b"bearer "


class Clients:
    """Tokens and their clients. `open`: nothing is asked for."""

    def __init__(self, options: IntakeOptions) -> None:
        self._tokens = {token.encode(): name for token, name in options.tokens().items()}
        self.certificates = options.tls_client_ca_file is not None
        self.open = not self._tokens and not self.certificates

    def name(self, authorization: str, certificate: Certificate | None, address: str) -> str | None:
        """Name of the client; None: it may not send.

        Parameters: the header `Authorization`, the verified certificate as `ssl` describes it, the peer's address.
        """
        if self._tokens:
            given = authorization.encode("utf-8", "replace")
            given = given[len(BEARER) :].strip() if given[: len(BEARER)].lower() == BEARER else b""
            found = None
            for token, name in self._tokens.items():  # all of them: how long it takes says nothing
                if hmac.compare_digest(given, token):
                    found = name
            return found
        if self.certificates:
            return _common_name(certificate)
        return address


def _common_name(certificate: Certificate | None) -> str | None:
    if not certificate:
        return None
    subject = [pair for part in certificate.get("subject", ()) for pair in part]
    return next((f"cn:{value}" for key, value in subject if key == "commonName"), "cn:")
