"""`fleetloop apply`: configuration objects from YAML. `fleetloop get`: what holds now."""

from __future__ import annotations

import getpass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.console import cell, emit, err, out, run, table
from schemas.errors import FleetloopError


class Thing(StrEnum):
    """What `get` can show."""

    pools = "pools"
    decisions = "decisions"
    findings = "findings"
    tenants = "tenants"
    forecasts = "forecasts"
    replicas = "replicas"
    gpus = "gpus"
    nodes = "nodes"
    interference = "interference"
    config = "config"
    dead_letters = "dead-letters"


COLUMNS = {
    Thing.pools: (
        "pool",
        "replicas_ready",
        "replicas_target",
        "requests_per_s",
        "utilisation_ratio",
        "slo_attainment",
        "ttft_s_p99",
        "tpot_s_p99",
        "usd_per_hour",
        "policy",
    ),
    Thing.decisions: ("id", "state", "decision_kind", "pool", "action", "reason"),
    Thing.findings: ("finding", "pool", "subject", "open", "severity", "usd_per_hour", "text"),
    Thing.tenants: (
        "pool",
        "tenant",
        "requests",
        "usd_direct",
        "usd_idle",
        "usd_per_million_tokens_direct",
        "usd_per_million_tokens",
    ),
    Thing.forecasts: (
        "pool",
        "horizon_s",
        "requests_per_s",
        "requests_per_s_p10",
        "requests_per_s_p90",
        "model",
        "mae",
        "mae_last",
    ),
    Thing.replicas: (
        "replica",
        "pool",
        "node",
        "state",
        "running_mean",
        "waiting_last",
        "kv_usage_ratio_mean",
    ),
    Thing.nodes: (
        "node",
        "gpu_type",
        "gpus",
        "gpus_allocated",
        "gpus_free",
        "gpus_lost",
        "replicas",
        "util_gpu_pct_mean",
        "sm_active_ratio_mean",
        "power_w_mean",
    ),
    Thing.interference: (
        "pool",
        "replica",
        "victim",
        "antagonist",
        "slowdown",
        "slowdown_low",
        "slowdown_high",
        "unexplained",
        "tpot_s",
        "expected_tpot_s",
    ),
    Thing.gpus: (
        "node",
        "gpu",
        "gpu_type",
        "pool",
        "status",
        "util_gpu_pct_mean",
        "power_w_mean",
        "mem_used_bytes_max",
    ),
    Thing.config: ("key", "revision", "actor", "spec"),
    Thing.dead_letters: (
        "topic",
        "partition",
        "offset",
        "reason",
        "field",
        "value",
        "remedy",
        "rows_refused",
    ),
}


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command("apply")(apply)
    app.command("get")(get)


def apply(
    file: Annotated[
        Path,
        typer.Option(
            "--file",
            "-f",
            help="YAML documents: kind (pool, price, tenant, fleet, signer, limits), name, spec.",
        ),
    ],
    dry_run: Annotated[bool, typer.Option(help="Only say what would change.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the changes as JSON.")] = False,
) -> None:
    """Apply configuration: pools, prices, tenants, bounds, signers. Unchanged objects are left alone.

    An object counts from its place in the log on. `deleted: true` beside the name removes it.
    """

    async def work() -> None:
        from streams.config_store import build, read_config, read_objects, send_objects
        from streams.deployment import fleet_now_ms, read_deployment
        from streams.settings import load_settings

        settings = load_settings()
        documents = read_objects(file)
        at_s = fleet_now_ms(await read_deployment(settings)) / 1000
        current = await read_config(settings)
        built = [build(document, current, getpass.getuser(), at_s) for document in documents]
        changes = [change for _, change in built]
        if not dry_run:
            wanted = [item for item, change in built if change.what != "unchanged"]
            await send_objects(settings, wanted)
            holds = await read_config(settings) if wanted else {}
            for item in wanted:
                if holds[item.key] != item and holds[item.key].revision == item.revision:
                    raise FleetloopError(
                        f"{item.key}: somebody changed it at the same moment and was first: apply again"
                    )

        def human() -> None:
            for change in changes:
                out.print(f"{change.key}: {'would be ' if dry_run and change.what != 'unchanged' else ''}{change.what}")
                if change.what == "changed":
                    for name, (before, after) in change.fields.items():
                        out.print(f"  {name}: {cell(before)} -> {cell(after)}")

        emit([change._asdict() for change in changes], as_json, human)

    run(work())


def get(
    what: Annotated[Thing, typer.Argument(help="What to show.")],
    pool: Annotated[str | None, typer.Option(help="Only this pool.")] = None,
    limit: Annotated[int, typer.Option(help="At most so many rows, newest last.", min=1)] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Show what holds now, read from the topics themselves (the views need not run)."""

    async def work() -> None:
        from streams.settings import load_settings

        rows = await _rows(load_settings(), what)
        if pool is not None:
            rows = [row for row in rows if row.get("pool") == pool]
        cut = rows[-limit:]
        if len(cut) < len(rows):
            err.print(f"{len(rows) - len(cut)} more; raise --limit")
        emit(cut, as_json, lambda: table(COLUMNS[what], cut, f"no {what.value} yet"))

    run(work())


async def _rows(settings: Any, what: Thing) -> list[dict[str, Any]]:
    if what is Thing.config:
        from streams.config_store import read_config

        return [{"key": key, **item.model_dump(mode="json")} for key, item in (await read_config(settings)).items()]
    from views.snapshot import snapshot

    return await snapshot(settings, what.value)
