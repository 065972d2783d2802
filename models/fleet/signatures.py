"""Who signed a command: Ed25519 over its canonical JSON, against the keys in the configuration. Pure."""

from __future__ import annotations

import base64
import binascii

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from schemas.config import SignerSpec
from schemas.decisions import Command


def problem(command: Command, signer: SignerSpec | None) -> str | None:
    """Why the signature does not count, in words; None where it does. `signer`: the object named by `key_id`."""
    if not command.signature_base64:
        return "there is no signature"
    if signer is None:
        return "no signer of that name is configured"
    try:
        public = Ed25519PublicKey.from_public_bytes(base64.b64decode(signer.public_key_base64, validate=True))
        signature = base64.b64decode(command.signature_base64, validate=True)
    except (binascii.Error, ValueError):
        return "the signer's key or the signature is not what its length and base64 should be"
    try:
        public.verify(signature, command.signed_bytes())
    except InvalidSignature:
        return "the signature does not fit the command and the signer's key"
    return None
