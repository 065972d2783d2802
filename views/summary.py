"""The one object that the page polls: the fleet in a strip, pools, tenants, findings, decisions. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from schemas.decisions import ENDED
from views.recent import Served
from views.rows import Row, Rows

REPLICAS_MAX = 64
TENANTS_MAX = 50
NODES_MAX = 50
FINDINGS_MAX = 50
DECISIONS_MAX = 40
LETTERS_SHOWN = 5
_SHORT = ("candidates", "replica_weights")


def summary(rows: Rows, now_s: float, speed: float) -> dict[str, Any]:
    """What the page shows. `now_s`: fleet time, Unix s."""
    log_s = rows.log_ms / 1000
    served = rows.requests.pools()
    return {
        "now_s": now_s,
        "log_s": log_s or None,
        "speed": speed,
        "stale_s": max(0.0, now_s - log_s) if log_s else None,
        "stale": bool(log_s) and now_s - log_s > max(30.0, 15.0 * speed),
        "fleet": _fleet(rows, served),
        "pools": [_pool(rows, row, served, now_s) for _, row in sorted(rows.tables["pools"].items())],
        "tenants": tenants(rows),
        "nodes": _nodes(rows),
        "findings": _findings(rows),
        "decisions": [_decision(row) for row in newest_decisions(rows, DECISIONS_MAX)],
        "dead_letters": {
            "rows": sum(rows.refused.values()),
            "reasons": [
                {"topic": topic, "reason": reason, "rows": n} for (topic, reason), n in rows.refused.most_common(10)
            ],
            "newest": list(rows.letters)[-LETTERS_SHOWN:][::-1],
        },
    }


def total(values: Iterable[float | None]) -> float | None:
    """Sum of what is known; None where nothing is."""
    known = [v for v in values if v is not None]
    return sum(known) if known else None


def _fleet(rows: Rows, served: dict[str, Served]) -> Row:
    pools = list(rows.tables["pools"].values())
    fleet = rows.config.get("fleet/fleet")
    spec = fleet.spec if fleet is not None else {}
    gpus: dict[str, float] = {}
    for row in pools:
        if row["gpus_allocated"] is not None:
            gpus[row["gpu_type"]] = gpus.get(row["gpu_type"], 0.0) + row["gpus_allocated"]
    open_findings = [f for f in rows.tables["findings"].values() if f["open"]]
    together = _merge(served.values())
    costs = [row["cost"] or {} for row in pools]
    idle, usd = total(c.get("usd_idle") for c in costs), total(c.get("usd_total") for c in costs)
    return {
        "usd_per_hour": total(row["usd_per_hour"] for row in pools),
        "usd_day_to_date": total(row["usd_day_to_date"] for row in pools),
        "usd_per_hour_max": spec.get("usd_per_hour_max"),
        "idle_ratio": idle / usd if idle is not None and usd else None,
        "requests_per_s": total(row["requests_per_s"] for row in pools),
        "slo_attainment": together.slo_attainment,
        "requests_judged": together.judged,
        "replicas_ready": total(row["replicas_ready"] for row in pools),
        "replicas_target": total(row["replicas_target"] for row in pools),
        "gpus": [
            {"gpu_type": kind, "allocated": n, "max": (spec.get("gpus_max") or {}).get(kind)}
            for kind, n in sorted(gpus.items())
        ],
        "gpus_seen": len(rows.tables["gpus"]),
        "findings_open": len(open_findings),
        "findings_usd_per_hour": total(f["usd_per_hour"] for f in open_findings),
        "decisions_pending": sum(1 for d in rows.tables["decisions"].values() if d["state"] == "pending"),
        "decisions_open": sum(1 for d in rows.tables["decisions"].values() if d["state"] not in ENDED),
        "mode": spec.get("mode"),
        "paused": rows.paused.get(None),
    }


def _pool(rows: Rows, row: Row, served: dict[str, Served], now_s: float) -> Row:
    pool = row["pool"]
    replicas = [r for r in rows.tables["replicas"].values() if r["pool"] == pool]
    replicas.sort(key=lambda r: r["replica"])
    recent = served.get(pool, Served())
    evidence = row["evidence_s"]
    fresh = (row["spec"] or {}).get("freshness_s", 30.0)
    return {k: v for k, v in row.items() if k not in _SHORT} | {
        "slo_attainment": recent.slo_attainment if recent.judged else row["slo_attainment"],
        "requests_judged": recent.judged,
        "evidence_age_s": max(0.0, now_s - evidence) if evidence is not None else None,
        "stale": evidence is None or now_s - evidence > max(fresh, 15.0),
        "paused": rows.paused.get(pool),
        "replicas_total": len(replicas),
        "replicas": [_replica(r, row["replica_weights"]) for r in replicas[:REPLICAS_MAX]],
        "forecasts": [
            {k: f[k] for k in ("horizon_s", "model", "matured", "mae", "mae_last", "coverage_p90")}
            for f in sorted(rows.tables["forecasts"].values(), key=lambda f: f["horizon_s"])
            if f["pool"] == pool
        ],
    }


def _replica(row: Row, weights: dict[str, float]) -> Row:
    names = ("replica", "node", "state", "gpus", "kv_usage_ratio_mean", "running_mean", "waiting_last", "tpot_s_mean")
    return {k: row[k] for k in names} | {"weight": weights.get(row["replica"], 1.0)}


def tenants(rows: Rows) -> list[Row]:
    """Tenants over all pools, the dearest first; `pools` holds the parts."""
    parts: dict[str, list[Row]] = {}
    for _, row in sorted(rows.tables["tenants"].items()):
        parts.setdefault(row["tenant"], []).append(row)
    found = [_tenant(rows, tenant, of) for tenant, of in parts.items()]
    bill = total(row["usd_total"] for row in found)
    for row in found:
        row["share"] = row["usd_total"] / bill if bill and row["usd_total"] is not None else None
    found.sort(key=lambda row: (-(row["usd_total"] or 0.0), row["tenant"]))
    return found[:TENANTS_MAX]


def _tenant(rows: Rows, tenant: str, parts: list[Row]) -> Row:
    served = _merge(rows.requests.of(row["pool"], tenant) for row in parts)
    tokens = sum(row["input_tokens"] + row["output_tokens"] for row in parts)
    direct, usd = total(row["usd_direct"] for row in parts), total(row["usd_total"] for row in parts)
    spec = rows.config.get(f"tenant/{tenant}")
    return {
        "tenant": tenant,
        "tier": spec.spec.get("tier") if spec is not None else None,
        "requests": sum(row["requests"] for row in parts),
        "tokens": tokens,
        "usd_direct": direct,
        "usd_idle": total(row["usd_idle"] for row in parts),
        "usd_total": usd,
        "usd_per_million_tokens_direct": direct / tokens * 1e6 if direct is not None and tokens else None,
        "usd_per_million_tokens": usd / tokens * 1e6 if usd is not None and tokens else None,
        "slo_attainment": served.slo_attainment,
        "pools": [
            {
                k: row[k]
                for k in ("pool", "requests", "usd_total", "usd_per_million_tokens_direct", "usd_per_million_tokens")
            }
            for row in parts
        ],
    }


def _merge(values: Iterable[Served]) -> Served:
    result = Served()
    for value in values:
        result = result.plus(value)
    return result


def _nodes(rows: Rows) -> list[Row]:
    """Nodes with their GPUs, and the replicas there that are slowed by a neighbour; those with something lost first."""
    found = sorted(rows.tables["nodes"].values(), key=lambda n: (-n["gpus_lost"], n["node"], n["gpu_type"] or ""))
    names = ("gpu", "pool", "status", "util_gpu_pct_mean")
    shown = {(n["node"], n["gpu_type"]): n | {"gpus_of": [], "victims": []} for n in found[:NODES_MAX]}
    for gpu in sorted(rows.tables["gpus"].values(), key=lambda g: g["gpu"]):
        if (node := shown.get((gpu["node"], gpu["gpu_type"]))) is not None:
            node["gpus_of"].append({k: gpu[k] for k in names})
    for victim in rows.tables["interference"].values():
        if victim["victim"]:
            of = next((n for at, n in shown.items() if at[0] == victim["node"]), None)
            if of is not None:
                of["victims"].append({k: victim[k] for k in ("replica", "antagonist", "slowdown")})
    return list(shown.values())


def _findings(rows: Rows) -> list[Row]:
    """Open ones first, by what they cost and how severe they are; then those that have ended, newest first."""
    found = list(rows.tables["findings"].values())
    opened = sorted((f for f in found if f["open"]), key=lambda f: (-(f["usd_per_hour"] or 0.0), -f["severity"]))
    closed = sorted((f for f in found if not f["open"]), key=lambda f: -f["at_s"])
    return (opened + closed)[:FINDINGS_MAX]


def newest_decisions(rows: Rows, most: int) -> list[Row]:
    """Those that wait for a person first, then by last change, newest first."""
    found = sorted(rows.tables["decisions"].values(), key=lambda d: (d["state"] != "pending", -d["changed_s"], d["id"]))
    return found[:most]


def _decision(row: Row) -> Row:
    """A decision without its evidence and alternatives: those are asked for one by one."""
    proposal = row["proposal"]
    names = ("id", "version", "state", "mode", "pool", "decision_kind", "action", "reason", "at_s", "changed_s")
    return {k: row[k] for k in (*names, "constraints", "history", "executor", "reverted_by")} | {
        "cluster": proposal["target"]["cluster"],
        "replicas_from": proposal["replicas_from"],
        "undo": proposal["undo"],
        "expected": proposal["expected"],
        "confidence": proposal["confidence"],
        "trigger_s": proposal["trigger_s"],
        "expires_s": proposal["expires_s"],
        "reverts": proposal["reverts"],
        "verdict": row.get("verdict"),
    }
