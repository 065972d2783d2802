"""What is wrong with single GPUs: lost, slowed, broken, or holding memory for processes that are gone. Pure.

A GPU is named `node:index`. Of a window only the GPUs are kept that have something wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from models.pool.findings import Found
from schemas.columns import Batch
from schemas.findings import FindingKind

KEPT = (
    "covered_s", "mem_gone_bytes", "mem_total_bytes", "throttled_s", "throttled_power_s", "throttled_thermal_s",
    "sm_clock_ratio_mean", "ecc_uncorrected", "remap_pending", "remap_failed", "xid",
)  # fmt: skip
G = {name: i for i, name in enumerate(KEPT)}
LOST, GPU_TYPE = len(KEPT), len(KEPT) + 1
Fault = list[Any]
"""The numbers of `KEPT` (None = unknown), then whether the GPU is lost, then its type."""
THROTTLED = 0.2
"""A GPU that is slowed by power or heat for a larger share of the time is worth a word."""
GONE_BYTES = 256 * 2**20
"""Memory of dead processes below this is what a driver context leaves."""
XIDS = {
    13: "an exception in a kernel, most often of the application",
    31: "a memory access fault, most often of the application",
    43: "the application's channel was stopped",
    45: "work was preempted as a process was cleared away",
    48: "a double-bit memory error",
    62: "the GPU's microcontroller halted",
    63: "a memory row is to be remapped",
    64: "a memory row could not be remapped",
    74: "an NVLink error",
    79: "the GPU has fallen off the bus",
    92: "many corrected memory errors",
    94: "a contained memory error",
    95: "an uncontained memory error",
    119: "the GPU's system processor does not answer",
    120: "the GPU's system processor failed",
}
"""Meaning of the codes that say what to do (NVIDIA, "XID Errors")."""


def faults(batch: Batch) -> dict[str, Fault]:
    """GPU -> what is wrong with it, from rows of gpu.windows."""
    columns = [[None if v != v else v for v in batch.numbers[name].tolist()] for name in KEPT]
    found: dict[str, Fault] = {}
    names = zip(batch.text("node"), batch.numbers["gpu"].tolist(), strict=True)
    for (node, gpu), status, kind, numbers in zip(
        names, batch.text("status"), batch.text("gpu_type"), zip(*columns, strict=True), strict=True
    ):
        fault = [*numbers, int(status == "lost"), kind or ""]
        if fault[LOST] or _errors(fault) or throttled(fault) >= THROTTLED or _gone(fault):
            found[f"{node}:{int(gpu)}"] = fault
    return found


def throttled(fault: Fault) -> float:
    """Share of the time that it was slowed by power or heat."""
    slowed_s, covered_s = fault[G["throttled_s"]], fault[G["covered_s"]]
    return min(1.0, slowed_s / covered_s) if slowed_s and covered_s else 0.0


def _gone(fault: Fault) -> float:
    gone = fault[G["mem_gone_bytes"]] or 0.0
    return gone if gone >= GONE_BYTES else 0.0


def _errors(fault: Fault) -> list[str]:
    said = []
    if fault[G["xid"]] is not None:
        code = int(fault[G["xid"]])
        said.append(f"Xid {code}" + (f" ({XIDS[code]})" if code in XIDS else ""))
    if fault[G["ecc_uncorrected"]]:
        said.append(f"{fault[G['ecc_uncorrected']]:.0f} memory errors that could not be corrected")
    if fault[G["remap_failed"]]:
        said.append("a memory row could not be remapped: replace the GPU")
    elif fault[G["remap_pending"]]:
        said.append("memory rows wait to be remapped: drain and reset the GPU")
    return said


def found(
    seen: Iterable[Mapping[str, Fault]], prices: Mapping[str, float], fallback: str, served: bool
) -> dict[FindingKind, dict[str, Found]]:
    """Kinds of finding with their GPUs. `fallback`: type of GPUs that do not name theirs. `served`: they serve a pool;
    a GPU that serves none and whose memory is held cannot be given to anybody, so all of it is lost."""
    out: dict[FindingKind, dict[str, Found]] = {
        "gpu_lost": {}, "gpu_errors": {}, "gpu_throttled": {}, "memory_held": {}
    }  # fmt: skip
    for gpus in seen:
        for gpu, fault in gpus.items():
            usd = prices.get(fault[GPU_TYPE] or fallback)
            if fault[LOST]:
                out["gpu_lost"][gpu] = Found(f"GPU {gpu} no longer answers", 1.0, usd)
            errors = _errors(fault)
            if errors:
                out["gpu_errors"][gpu] = Found(f"GPU {gpu}: {'; '.join(errors)}", float(len(errors)))
            if throttled(fault) >= THROTTLED:
                out["gpu_throttled"][gpu] = _slowed(gpu, fault, usd)
            if _gone(fault):
                out["memory_held"][gpu] = _held(gpu, fault, usd, served)
    return out


def _slowed(gpu: str, fault: Fault, usd: float | None) -> Found:
    share, clock = throttled(fault), fault[G["sm_clock_ratio_mean"]]
    power_s, thermal_s = fault[G["throttled_power_s"]] or 0.0, fault[G["throttled_thermal_s"]] or 0.0
    cause = (
        "by heat: look at its cooling" if thermal_s > power_s else "by its power cap" if power_s else "by power or heat"
    )
    text = f"GPU {gpu} was slowed {cause}, {100 * share:.0f} % of the time"
    if clock is not None:
        text += f"; its clock was at {100 * clock:.0f} % of the highest"
    lost = None if usd is None or clock is None else usd * share * max(0.0, 1.0 - clock)
    evidence = {"throttled_power_s": power_s, "throttled_thermal_s": thermal_s, "sm_clock_ratio": clock}
    return Found(text, share, lost, evidence)


def _held(gpu: str, fault: Fault, usd: float | None, served: bool) -> Found:
    gone, total = fault[G["mem_gone_bytes"]], fault[G["mem_total_bytes"]]
    share = min(1.0, gone / total) if total else None
    text = f"GPU {gpu} holds {gone / 2**30:.1f} GiB" + ("" if share is None else f" ({100 * share:.0f} %)")
    text += " for processes that no longer exist"
    text += (
        ": end what is left of them, or drain and reset it" if served else ", and serves no pool: reset it to use it"
    )
    lost = usd if not served else None if usd is None or share is None else usd * share
    return Found(text, 1.0 if share is None else share, lost, {"mem_gone_bytes": gone})
