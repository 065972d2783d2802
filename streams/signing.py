"""Keys and signatures of the services that authenticate people: the CLI and the page sign commands with them.

Only signs; whether a signature counts is for the fleet fold to say (`models.fleet.signatures`), by the public
keys in `fleet.config`.
"""

from __future__ import annotations

import base64
import binascii
import os
import secrets
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
from schemas.decisions import Command, CommandName
from schemas.errors import SettingsError

Role = Literal["viewer", "approver", "admin"]
COMMAND_LIFE_S = 600.0


def generate_key() -> Ed25519PrivateKey:
    """A new private key."""
    return Ed25519PrivateKey.generate()


def save_key(key: Ed25519PrivateKey, path: Path) -> None:
    """Writes a private key as PEM that only its owner may read. Raises FileExistsError: a key is never overwritten."""
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)


def load_key(path: Path) -> Ed25519PrivateKey:
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


def public_base64(key: Ed25519PublicKey) -> str:
    """The 32 bytes of a public key in base64, as SignerSpec holds them."""
    return base64.b64encode(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).decode()


def sign(command: Command, key: Ed25519PrivateKey) -> Command:
    """The command with its signature: Ed25519 over the canonical JSON of all other fields."""
    signature = base64.b64encode(key.sign(command.signed_bytes())).decode()
    return command.model_copy(update={"signature_base64": signature})


def signed_command(
    key: Ed25519PrivateKey,
    key_id: str,
    command: CommandName,
    *,
    actor: str,
    now_s: float,
    decision_id: str | None = None,
    pool: str | None = None,
    comment: str = "",
    life_s: float = COMMAND_LIFE_S,
) -> Command:
    """A new signed command with a random id. `now_s`: fleet time, Unix s; it counts for `life_s`."""
    made = Command(
        id=secrets.token_hex(16),
        command=command,
        decision_id=decision_id,
        pool=pool,
        actor=actor,
        comment=comment,
        issued_s=now_s,
        expires_s=now_s + life_s,
        key_id=key_id,
    )
    return sign(made, key)


def signer_object(
    key_id: str, role: Role, public: Ed25519PublicKey, *, revision: int = 1, at_s: float = 0.0, actor: str = ""
) -> ConfigObject:
    """The object of `fleet.config` by which commands signed with this key count."""
    spec = SignerSpec(public_key_base64=public_base64(public), role=role)
    return ConfigObject(
        object_kind="signer",
        name=key_id,
        revision=revision,
        at_s=at_s,
        actor=actor,
        spec=spec.model_dump(mode="json"),
    )
