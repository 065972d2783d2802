"""Keys and signatures of the services that authenticate people: the CLI and the page sign commands with them.

Only signs; whether a signature counts is for the fleet fold to say (`models.fleet.signatures`), by the public
keys in `fleet.config`.
"""

from __future__ import annotations

import base64
import binascii
import os
import stat
from pathlib import Path
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from schemas.config import ConfigObject, SignerSpec
from schemas.decisions import Command
from schemas.errors import SettingsError

Role = Literal["viewer", "approver", "admin"]
Key = Ed25519PrivateKey | Ed25519PublicKey


def generate_key() -> Ed25519PrivateKey:
    """A new private key."""
    return Ed25519PrivateKey.generate()


def create_key_file(path: Path) -> Ed25519PrivateKey:
    """Writes a new private key as PEM, mode 0600. Raises SettingsError: a key is never overwritten."""
    key = generate_key()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(pem)
    except FileExistsError:
        raise SettingsError(f"{path}: exists already: a key is never overwritten; name another file") from None
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}: name a file in a folder that can be written") from None
    return key


def load_key_file(path: Path) -> Ed25519PrivateKey:
    """A private key from a file with PEM (PKCS 8) or the base64 of its 32 bytes. Raises SettingsError."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(10_000).strip()
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}: name a readable file with an Ed25519 private key") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SettingsError(f"{path}: others may read it (mode {mode & 0o777:o}): `chmod 600` it")
    try:
        if data.startswith(b"-----"):
            key = load_pem_private_key(data, password=None)
        else:
            key = Ed25519PrivateKey.from_private_bytes(base64.b64decode(data, validate=True))
    except (ValueError, TypeError, binascii.Error):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise SettingsError(f"{path}: no Ed25519 private key: write PEM (PKCS 8) or the base64 of its 32 bytes")
    return key


def public_base64(key: Key) -> str:
    """The 32 bytes of the (public half of the) key in base64, as SignerSpec holds them."""
    if isinstance(key, Ed25519PrivateKey):
        key = key.public_key()
    return base64.b64encode(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).decode()


def sign(command: Command, key: Ed25519PrivateKey) -> Command:
    """The command with its signature: Ed25519 over the canonical JSON of all other fields."""
    signature = base64.b64encode(key.sign(command.signed_bytes())).decode()
    return command.model_copy(update={"signature_base64": signature})


def signer_object(
    key_id: str, role: Role, key: Key, *, revision: int = 1, at_s: float = 0.0, actor: str = ""
) -> ConfigObject:
    """The object of `fleet.config` by which commands signed with this key count."""
    spec = SignerSpec(public_key_base64=public_base64(key), role=role)
    return ConfigObject(
        object_kind="signer",
        name=key_id,
        revision=revision,
        at_s=at_s,
        actor=actor,
        spec=spec.model_dump(mode="json"),
    )
