"""Commands of people: whether one counts at all, and what it may do. Unsigned ones change nothing."""

from __future__ import annotations

import hashlib
from typing import Literal

from models.fleet.signatures import problem
from models.fleet.states import Refused
from schemas.config import SignerSpec
from schemas.decisions import Command, CommandName
from schemas.errors import InvalidRecord

LIFE_S_MAX = 3600.0
"""A command may count for so long, s: its id is remembered until then, so that it never counts twice."""
ROLES: dict[CommandName, tuple[str, ...]] = {
    "approve": ("approver", "admin"),
    "reject": ("approver", "admin"),
    "revert": ("approver", "admin"),
    "pause": ("admin",),
    "resume": ("admin",),
}


class Seen:
    """Ids of signed commands until they expire, bounded."""

    def __init__(self) -> None:
        self.ids: dict[str, tuple[str, float]] = {}
        """Id -> (hash of the content, expiry in Unix s)."""

    def take(self, command: Command, now_s: float, most: int) -> Literal["new", "again"]:
        """Remembers a command. Raises InvalidRecord where its id is known with other content, or there is no room."""
        content = hashlib.sha256(command.encode()).hexdigest()
        known = self.ids.get(command.id)
        if known is not None:
            if known[0] == content:
                return "again"
            raise InvalidRecord("conflict", "id", command.id, "the first content of an id wins: use a new id")
        if len(self.ids) >= most:
            self.forget(now_s)
        if len(self.ids) >= most:
            raise InvalidRecord("overflow", "id", command.id, f"{most} commands are remembered: send it again later")
        self.ids[command.id] = (content, command.expires_s)
        return "new"

    def forget(self, now_s: float) -> None:
        """Drops what has expired: such a command is refused by its own expiry."""
        self.ids = {id: kept for id, kept in self.ids.items() if kept[1] >= now_s}


def check_signature(command: Command, signers: dict[str, SignerSpec]) -> SignerSpec:
    """The signer. Raises InvalidRecord (`unsigned`)."""
    signer = signers.get(command.key_id)
    wrong = problem(command, signer)
    if wrong is not None or signer is None:
        raise InvalidRecord(
            "unsigned", "signature_base64", command.key_id, f"{wrong}: sign with the key of a configured signer"
        )
    return signer


def check_time(command: Command, now_s: float) -> None:
    """Raises InvalidRecord for a command that is over, or that would have to be remembered too long.

    Such a one is not even audited: whoever can write to the log could say it again and again.
    """
    if now_s > command.expires_s:
        raise InvalidRecord("too_late", "expires_s", command.expires_s, f"log time is {now_s:.1f}: order it again")
    if command.expires_s - command.issued_s > LIFE_S_MAX:
        remedy = f"a command may count for at most {LIFE_S_MAX:g} s: let it expire sooner"
        raise InvalidRecord("out_of_bounds", "expires_s", command.expires_s, remedy)


def check_rights(command: Command, signer: SignerSpec, now_s: float, future_s: float) -> None:
    """Raises Refused where a signed command may not do what it says."""
    if signer.role not in ROLES[command.command]:
        needed = " or ".join(ROLES[command.command])
        raise Refused(f"{command.command} needs the role {needed}; {command.key_id} has {signer.role}")
    if command.issued_s > now_s + future_s:
        raise Refused(f"the command was issued {command.issued_s - now_s:.1f} s ahead of log time")


def revert_id(decision_id: str, again: str = "") -> str:
    """Id of the decision that reverts another. `again`: the command, where an earlier revert came to nothing."""
    text = f"revert|{decision_id}" + (f"|{again}" if again else "")
    return hashlib.sha256(text.encode()).hexdigest()[:32]
