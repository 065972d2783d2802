"""Keys of signers: made once, readable by their owner alone, and what they sign counts."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from models.fleet.signatures import problem
from schemas.config import SignerSpec
from schemas.decisions import Command
from schemas.errors import SettingsError
from streams.signing import create_key_file, generate_key, load_key_file, public_base64, sign, signer_object

COMMAND = Command(
    id="c".ljust(8, "."), command="pause", actor="ann", issued_s=1.0, expires_s=2.0, key_id="k", comment="naïve ✓"
)


def test_what_is_signed_counts_by_the_signer_object() -> None:
    """The object made for a key verifies what the key signs, and nothing that another key signed."""
    key = generate_key()
    signer = signer_object("k", "admin", key).typed()
    assert isinstance(signer, SignerSpec)
    assert signer_object("k", "admin", key.public_key()).spec == signer.model_dump()
    signed = sign(COMMAND, key)
    assert problem(Command.model_validate_json(signed.encode()), signer) is None
    assert problem(sign(COMMAND, generate_key()), signer) is not None
    assert problem(COMMAND, signer) is not None
    assert problem(signed, None) is not None


@pytest.mark.parametrize("key", ["A" * 44, "!" * 44, "A" * 43 + "="])
def test_a_signer_without_a_real_key_verifies_nothing(key: str) -> None:
    """Whatever stands where the key should be, it is a refusal in words and no exception."""
    signed = sign(COMMAND, generate_key())
    assert problem(signed, SignerSpec(public_key_base64=key, role="admin"))
    assert problem(
        signed.model_copy(update={"signature_base64": "$$"}), SignerSpec(public_key_base64=key, role="admin")
    )


def test_a_key_file_is_its_owners_alone_and_never_overwritten(tmp_path: Path) -> None:
    """Mode 0600; read back it signs as the same signer; a second one to the same place is refused."""
    path = tmp_path / "folder" / "key"
    key = create_key_file(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert public_base64(load_key_file(path)) == public_base64(key)
    with pytest.raises(SettingsError, match="never overwritten"):
        create_key_file(path)


def test_raw_base64_is_read_too(tmp_path: Path) -> None:
    """The base64 of the 32 bytes is a key as well."""
    key, path = generate_key(), tmp_path / "key"
    path.write_bytes(base64.b64encode(key.private_bytes_raw()) + b"\n")
    path.chmod(0o600)
    assert public_base64(load_key_file(path)) == public_base64(key)


def test_what_is_no_key_is_a_clear_error(tmp_path: Path) -> None:
    """Missing, readable by others, garbage or of another kind: the error names file and remedy, never its content."""
    path = tmp_path / "key"
    with pytest.raises(SettingsError, match="No such file"):
        load_key_file(path)
    other = generate_private_key(SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for data in (b"", b"s3cret", base64.b64encode(b"short"), b"-----BEGIN s3cret", other):
        path.write_bytes(data)
        path.chmod(0o600)
        with pytest.raises(SettingsError, match="no Ed25519 private key") as error:
            load_key_file(path)
        assert "s3cret" not in str(error.value)
    path.chmod(0o640)
    with pytest.raises(SettingsError, match="chmod 600"):
        load_key_file(path)
