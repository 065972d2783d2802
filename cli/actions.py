"""What a person orders: approve, reject, revert, pause, resume. Signed, appended to decision.events."""

from __future__ import annotations

import getpass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cli.console import emit, out, run
from streams.settings import declare_variable

KEY_FILE, KEY_ID = "FLEETLOOP_SIGNING_KEY_FILE", "FLEETLOOP_SIGNING_KEY_ID"
declare_variable(KEY_FILE, "Ed25519 private key by which the command line signs (`fleetloop keygen`).")
declare_variable(KEY_ID, "Signer object with its public half, for the command line.")

Comment = Annotated[str, typer.Option("--comment", "-m", help="Why; kept in the audit.")]
Key = Annotated[Path, typer.Option(envvar=KEY_FILE, help="Your Ed25519 key (see `fleetloop keygen`).")]
KeyId = Annotated[
    str,
    typer.Option(envvar=KEY_ID, help="Name of the signer object with its public half."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the command as JSON.")]
Pool = Annotated[str | None, typer.Argument(help="Pool; leave out with --all.")]
Everything = Annotated[bool, typer.Option("--all", help="The whole fleet.")]
Id = Annotated[str, typer.Argument(help="Id of the decision (`fleetloop get decisions`).")]
DEFAULT_KEY_ID = "cli"


class Role(StrEnum):
    """Roles of signers."""

    viewer = "viewer"
    approver = "approver"
    admin = "admin"


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command("approve")(approve)
    app.command("reject")(reject)
    app.command("revert")(revert)
    app.command("pause")(pause)
    app.command("resume")(resume)
    app.command("keygen")(keygen)


def approve(id: Id, key: Key, key_id: KeyId = DEFAULT_KEY_ID, comment: Comment = "", as_json: AsJson = False) -> None:
    """Approve a pending decision: it is dispatched to its executor."""
    run(_order("approve", key, key_id, comment, as_json, decision_id=id))


def reject(id: Id, key: Key, key_id: KeyId = DEFAULT_KEY_ID, comment: Comment = "", as_json: AsJson = False) -> None:
    """Reject a pending decision."""
    run(_order("reject", key, key_id, comment, as_json, decision_id=id))


def revert(id: Id, key: Key, key_id: KeyId = DEFAULT_KEY_ID, comment: Comment = "", as_json: AsJson = False) -> None:
    """Undo an executed decision: a new decision that restores what was there."""
    run(_order("revert", key, key_id, comment, as_json, decision_id=id))


def pause(
    key: Key,
    pool: Pool = None,
    everything: Everything = False,
    key_id: KeyId = DEFAULT_KEY_ID,
    comment: Comment = "",
    as_json: AsJson = False,
) -> None:
    """Stop acting on a pool, or on everything (--all): proposals are still made, and blocked."""
    run(_order("pause", key, key_id, comment, as_json, pool=_one(pool, everything)))


def resume(
    key: Key,
    pool: Pool = None,
    everything: Everything = False,
    key_id: KeyId = DEFAULT_KEY_ID,
    comment: Comment = "",
    as_json: AsJson = False,
) -> None:
    """Act again on a pool, or on the fleet (--all)."""
    run(_order("resume", key, key_id, comment, as_json, pool=_one(pool, everything)))


def keygen(
    file: Annotated[Path, typer.Argument(help="Where the private key goes (mode 0600; never overwritten).")],
    key_id: Annotated[str, typer.Option(help="Name of the signer object.")] = DEFAULT_KEY_ID,
    role: Annotated[Role, typer.Option(help="What its commands may do.")] = Role.approver,
) -> None:
    """Make a signing key; prints the signer object to `fleetloop apply` so that its commands count."""
    from cli.console import guarded

    def work() -> None:
        from streams.signing import create_key_file, public_base64

        private = create_key_file(file)
        out.print(
            f"kind: signer\nname: {key_id}\nspec:\n  role: {role.value}\n  public_key_base64: {public_base64(private)}",
            highlight=False,
        )

    guarded(work)


def _one(pool: str | None, everything: bool) -> str | None:
    if (pool is None) != everything:
        raise typer.BadParameter("name a pool, or say --all")
    return pool


async def _order(
    name: str,
    key: Path,
    key_id: str,
    comment: str,
    as_json: bool,
    *,
    decision_id: str | None = None,
    pool: str | None = None,
) -> None:
    from streams.commands import make_command, send_command
    from streams.deployment import read_deployment
    from streams.settings import load_settings
    from streams.signing import load_key_file

    settings = load_settings()
    private = load_key_file(key)
    deployment = await read_deployment(settings)
    command = make_command(
        deployment,
        name,
        private,
        key_id,
        actor=getpass.getuser(),
        comment=comment,
        decision_id=decision_id,
        pool=pool,
    )
    offset = await send_command(settings, command)
    target = decision_id or pool or "the whole fleet"
    emit(
        command.model_dump(mode="json"),
        as_json,
        lambda: out.print(f"{name} of {target} sent (decision.events offset {offset}); see `fleetloop get decisions`"),
    )
