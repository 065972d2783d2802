"""dcgm-exporter's `/metrics` as rows of gpu.samples: a row a GPU and MIG instance, and who they are.

Names before DCGM 4.6, those of 4.6 (renamed, old units) and of 4.7 (base units; printed by exporter 4.9). Sources: the
field identifiers of DCGM 4.3 to 4.7 and two recorded pages of dcgm-exporter; the names since 4.6 without a recording.

Not taken: `PROF_PCIE_*_BYTES` and `NVLINK_BANDWIDTH_TOTAL` are rates, whatever type the exporter's configuration prints
for them; bytes are only taken from families that DCGM counts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from exporters.adapters.base import Adapter, Chosen, Page, Reduce, RowPlan, Series, Values, number
from exporters.adapters.tables import slug
from exporters.nvml_reader import gpu_type
from schemas.node import GPU_SAMPLES, GpuEntry

SENTINEL = 9.223372036854e18
"""At or beyond: blank values of DCGM's 64-bit fields (0x7ffffffffffffff0 and on) ..."""
SENTINEL_DOUBLE = 2.0**47
"""... of its doubles ..."""
SENTINEL_SMALL = 2147483632.0
"""... and of its 32-bit ones (0x7ffffff0 and on): for all of which no true value comes near."""
MIB = float(2**20)


class Field(NamedTuple):
    """A field by one of its names."""

    name: str
    scale: float = 1.0
    limit: float = SENTINEL_SMALL


def _dev(*names: str, scale: float = 1.0, limit: float = SENTINEL_SMALL) -> tuple[Field, ...]:
    return tuple(Field(f"DCGM_FI_DEV_{name}", scale, limit) for name in names)


def _prof(*names: str) -> tuple[Field, ...]:
    return tuple(Field(f"DCGM_FI_PROF_{name}") for name in names)


BOARD: dict[str, tuple[Field, ...]] = {
    "power_w": _dev("POWER_USAGE", "BOARD_POWER_WATTS"),
    "power_instant_w": _dev("POWER_USAGE_INSTANT", "BOARD_POWER_RAW_WATTS"),
    "power_limit_w": _dev(
        "ENFORCED_POWER_LIMIT",
        "BOARD_POWER_LIMIT_ENFORCED_WATTS",
        "POWER_MGMT_LIMIT",
        "BOARD_POWER_LIMIT_REQUESTED_WATTS",
    ),
    "energy_j": (
        *_dev("TOTAL_ENERGY_CONSUMPTION", scale=1e-3, limit=SENTINEL),
        *_dev("GPU_ENERGY_JOULES_TOTAL", limit=SENTINEL),
    ),
    "temp_c": _dev("GPU_TEMP", "GPU_TEMP_CELSIUS"),
    "mem_temp_c": _dev("MEMORY_TEMP", "MEMORY_TEMP_CELSIUS"),
    "sm_clock_mhz": (*_dev("SM_CLOCK"), *_dev("SM_CLOCK_HERTZ", scale=1e-6, limit=SENTINEL)),
    "sm_clock_max_mhz": _dev("MAX_SM_CLOCK"),
    "mem_clock_mhz": (*_dev("MEM_CLOCK"), *_dev("MEMORY_CLOCK_HERTZ", scale=1e-6, limit=SENTINEL)),
    "throttle_mask": _dev("CLOCKS_EVENT_REASONS", "CLOCK_THROTTLE_REASONS", limit=SENTINEL),
    # Nanoseconds, although some releases print "(in us)": they come from NVML's counters.
    "throttle_power_ns": (
        *_dev("POWER_VIOLATION", "CLOCKS_EVENT_REASON_SW_POWER_CAP_NS", limit=SENTINEL),
        *_dev("GPU_POWER_THROTTLE_SECONDS_TOTAL", scale=1e9, limit=SENTINEL_DOUBLE),
    ),
    "throttle_thermal_ns": (
        *_dev("THERMAL_VIOLATION", limit=SENTINEL),
        *_dev("GPU_THERMAL_THROTTLE_SECONDS_TOTAL", scale=1e9, limit=SENTINEL_DOUBLE),
    ),
    "throttle_brake_ns": _dev("CLOCKS_EVENT_REASON_HW_POWER_BRAKE_SLOWDOWN_NS", limit=SENTINEL),
    "throttle_sync_ns": (
        *_dev("SYNC_BOOST_VIOLATION", "CLOCKS_EVENT_REASON_SYNC_BOOST_NS", limit=SENTINEL),
        *_dev("GPU_SYNC_BOOST_THROTTLE_SECONDS_TOTAL", scale=1e9, limit=SENTINEL_DOUBLE),
    ),
    "pcie_tx_bytes": (Field("DCGM_FI_PROF_PCIE_TX_BYTES_TOTAL", limit=SENTINEL),),
    "pcie_rx_bytes": (Field("DCGM_FI_PROF_PCIE_RX_BYTES_TOTAL", limit=SENTINEL),),
    "nvlink_tx_bytes": _dev("NVLINK_COUNT_TX_BYTES", "NVLINK_TX_BYTES_TOTAL", limit=SENTINEL),
    "nvlink_rx_bytes": _dev("NVLINK_COUNT_RX_BYTES", "NVLINK_RX_BYTES_TOTAL", limit=SENTINEL),
    "ecc_corrected": _dev("ECC_SBE_VOL_TOTAL", limit=SENTINEL),
    "ecc_uncorrected": _dev("ECC_DBE_VOL_TOTAL", limit=SENTINEL),
    "remap_pending": _dev("ROW_REMAP_PENDING"),
    "remap_failed": _dev("ROW_REMAP_FAILURE", "ROW_REMAP_FAILED"),
    "_xid": _dev("XID_ERRORS", "XID_ERROR"),
}
"""Of the whole board: repeated on each of its MIG instances, where it is not theirs."""
OWN: dict[str, tuple[Field, ...]] = {
    "sm_active_ratio": _prof("SM_ACTIVE", "SM_UTIL_RATIO"),
    "sm_occupancy_ratio": _prof("SM_OCCUPANCY", "SM_OCCUPANCY_RATIO"),
    "tensor_active_ratio": _prof("PIPE_TENSOR_ACTIVE", "TENSOR_UTIL_RATIO"),
    "dram_active_ratio": _prof("DRAM_ACTIVE", "DRAM_UTIL_RATIO"),
    "mem_used_bytes": (*_dev("FB_USED", scale=MIB), *_dev("FB_USED_BYTES", limit=SENTINEL)),
    "mem_reserved_bytes": (*_dev("FB_RESERVED", scale=MIB), *_dev("FB_RESERVED_BYTES", limit=SENTINEL)),
    "mem_total_bytes": (*_dev("FB_TOTAL", scale=MIB), *_dev("FB_CAPACITY_BYTES", limit=SENTINEL)),
    "_free": (*_dev("FB_FREE", scale=MIB), *_dev("FB_FREE_BYTES", limit=SENTINEL)),
}
"""Of a GPU, or of a MIG instance: its own."""
UTIL = {"util_gpu_pct": ("GPU_UTIL", "GPU_UTIL_RATIO"), "util_mem_pct": ("MEM_COPY_UTIL", "MEMORY_UTIL_RATIO")}
"""Column -> name in percent, and the name that is percent in DCGM 4.6 and a ratio since 4.7. Of whole GPUs only."""
SOFT_THERMAL, HARD_THERMAL = (f"DCGM_FI_DEV_CLOCKS_EVENT_REASON_{w}_THERM_SLOWDOWN_NS" for w in ("SW", "HW"))
NEW_UNITS = (
    "DCGM_FI_DEV_FB_CAPACITY_BYTES",
    "DCGM_FI_DEV_FB_USED_BYTES",
    "DCGM_FI_DEV_SM_CLOCK_HERTZ",
    "DCGM_FI_DEV_GPU_ENERGY_JOULES_TOTAL",
)
OLD_UNITS = (
    "DCGM_FI_DEV_FB_USED",
    "DCGM_FI_DEV_FB_FREE",
    "DCGM_FI_DEV_SM_CLOCK",
    "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION",
)
"""Names by which a page tells in which units it is."""
KNOWN = frozenset(
    {
        *(field.name for fields in (*BOARD.values(), *OWN.values()) for field in fields),
        *(f"DCGM_FI_DEV_{name}" for names in UTIL.values() for name in names),
    }
)
Labels = Mapping[str, str]


class Device(NamedTuple):
    """What the labels say of a series: whose it is."""

    host: str
    gpu: int
    instance: int | None


class Dcgm:
    """The dcgm-exporter adapter."""

    engine = "dcgm"

    def recognises(self, names: Collection[str]) -> bool:
        """Whether a family of DCGM is there."""
        return any(name.startswith(("DCGM_FI_DEV_", "DCGM_FI_PROF_")) for name in names)

    def plan(self, series: Sequence[Series], chosen: Chosen) -> list[RowPlan]:
        """A row a GPU; one a MIG instance too, with what is its own."""
        page = Page(series)
        places: dict[Device, dict[str, list[int]]] = {}
        for index, one in enumerate(series):
            device = _device(one)
            if device is not None:
                places.setdefault(device, {}).setdefault(one.name, []).append(index)
        return [_row(page, device, places, chosen) for device in _whole(places)]


def _device(one: Series) -> Device | None:
    """None: not of a GPU, or of one process only (`pid`)."""
    labels = one.labels
    if (one.name not in KNOWN and one.name not in (SOFT_THERMAL, HARD_THERMAL)) or "pid" in labels:
        return None
    gpu = number(labels.get("gpu"))
    instance = number(labels.get("GPU_I_ID"))
    if gpu is None or not 0 <= gpu < 63 or gpu != int(gpu):
        return None
    if instance is not None and (not 0 <= instance < 16 or instance != int(instance)):
        return None
    host = slug(labels.get("hostname") or labels.get("Hostname", ""))
    return Device(host, int(gpu), None if instance is None else int(instance))


def _whole(places: Mapping[Device, object]) -> Iterator[Device]:
    """All devices in order, and before the instances of a GPU that GPU itself."""
    seen: dict[Device, None] = {}
    for device in places:
        seen[device._replace(instance=None)] = None
        seen[device] = None
    yield from seen


def _row(page: Page, device: Device, places: Mapping[Device, Mapping[str, Sequence[int]]], chosen: Chosen) -> RowPlan:
    whole = device.instance is None
    mine = places.get(device, {})
    columns = dict(_columns(page, mine, OWN, chosen, device))
    fixed = {"gpu": float(device.gpu if whole else (device.gpu + 1) * 16 + (device.instance or 0))}
    if whole:
        columns |= _board(page, device, places, chosen)
        columns |= _utilisation(page, mine)
    else:
        fixed["parent"] = float(device.gpu)
    example = next((found for names in (mine, *_parts(device, places)) for found in names.values()), ())
    labels = page.series[example[0]].labels if example else {}
    return RowPlan(
        columns,
        key=f"{device.gpu}" if whole else f"{device.gpu}.{device.instance}",
        kind=GPU_SAMPLES,
        node=device.host,
        texts={"status": "ok"},
        fixed=fixed,
        finish=_finish,
        gpu=_entry(device, labels, int(fixed["gpu"])),
        pod=_pod(page, mine),
    )


def _parts(device: Device, places: Mapping[Device, Mapping[str, Sequence[int]]]) -> list[Mapping[str, Sequence[int]]]:
    """What is said on the MIG instances of a GPU."""
    if device.instance is not None:
        return []
    return [
        names
        for other, names in places.items()
        if other.instance is not None and other._replace(instance=None) == device
    ]


def _columns(
    page: Page, names: Mapping[str, Sequence[int]], table: Mapping[str, tuple[Field, ...]], chosen: Chosen, of: Device
) -> Iterator[tuple[str, Reduce]]:
    for column, fields in table.items():
        by_name = {field.name: field for field in fields}
        name = chosen.pick(f"{of}/{column}", by_name, names)
        if name is not None:
            # The same series comes once a pod where a GPU is shared: the first, never a sum.
            yield column, Reduce(tuple(names[name]), "first", by_name[name].scale, by_name[name].limit)


def _board(
    page: Page, device: Device, places: Mapping[Device, Mapping[str, Sequence[int]]], chosen: Chosen
) -> dict[str, Reduce]:
    """The board's own, from the GPU's series, or else from those that repeat it on its instances."""
    names: dict[str, list[int]] = {}
    for part in (places.get(device, {}), *_parts(device, places)):
        for name, found in part.items():
            names.setdefault(name, list(found))
    columns = dict(_columns(page, names, BOARD, chosen, device))
    if "throttle_thermal_ns" not in columns and SOFT_THERMAL in names and HARD_THERMAL in names:
        both = (names[SOFT_THERMAL][0], names[HARD_THERMAL][0])
        columns["throttle_thermal_ns"] = Reduce(both, "sum", 1.0, SENTINEL)
    return columns


def _utilisation(page: Page, names: Mapping[str, Sequence[int]]) -> dict[str, Reduce]:
    columns = {}
    for column, (percent, either) in UTIL.items():
        old, new = f"DCGM_FI_DEV_{percent}", f"DCGM_FI_DEV_{either}"
        scale = _ratio_scale(page)
        if old in names:
            columns[column] = Reduce(tuple(names[old]), "first", 1.0, SENTINEL_SMALL)
        elif new in names and scale is not None:
            columns[column] = Reduce(tuple(names[new]), "first", scale, SENTINEL_SMALL)
    return columns


def _ratio_scale(page: Page) -> float | None:
    """To percent, of a `..._UTIL_RATIO`. None: the page does not tell in which units it is."""
    if any(name in page.by_name for name in NEW_UNITS):
        return 100.0
    return 1.0 if any(name in page.by_name for name in OLD_UNITS) else None


def _finish(values: Values) -> dict[str, float | None]:
    """Memory of all is what is used, free and reserved; an Xid of 0 is none."""
    out: dict[str, float | None] = {}
    if values.get("mem_total_bytes") is None:
        parts = [values.get(name) for name in ("mem_used_bytes", "mem_reserved_bytes", "_free")]
        known = [part for part in parts if part is not None]
        out["mem_total_bytes"] = sum(known) if len(known) == len(parts) else None
    xid = values.get("_xid")
    if xid:
        out["xid"] = xid
    return out


def _entry(device: Device, labels: Labels, index: int) -> GpuEntry:
    model = labels.get("modelName") or labels.get("model_name", "")
    uuid = labels.get("UUID") or labels.get("gpu_uuid", "")
    own = device.instance is not None
    return GpuEntry(
        gpu=index,
        uuid="" if own else uuid[:100],  # an instance's own is not on the page
        gpu_type=gpu_type(model),
        parent=device.gpu if own else None,
        mig_profile=labels.get("GPU_I_PROFILE", "")[:100] if own else "",
    )


def _pod(page: Page, names: Mapping[str, Sequence[int]]) -> str:
    """The only pod that the GPU is said to be held by; '' for none, or several."""
    found: dict[str, None] = {}
    for indices in names.values():
        for index in indices:
            labels = page.series[index].labels
            if labels.get("pod"):
                found[f"{labels.get('namespace', '')}:{labels['pod']}"] = None
    return next(iter(found)) if len(found) == 1 else ""


DCGM: Adapter = Dcgm()
