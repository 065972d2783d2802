"""The dcgm-exporter adapter on recorded pages, held against a plain reader; later names from DCGM's field list."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporters.planned import Read
from schemas.node import GPU_SAMPLES
from tests.exporters.adapters.pages import Plain, known, layout_of, read, text_of

MIB = 2**20
BOARD = {
    "power_w": ("DCGM_FI_DEV_POWER_USAGE", 1.0),
    "energy_j": ("DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION", 1e-3),
    "temp_c": ("DCGM_FI_DEV_GPU_TEMP", 1.0),
    "mem_temp_c": ("DCGM_FI_DEV_MEMORY_TEMP", 1.0),
    "sm_clock_mhz": ("DCGM_FI_DEV_SM_CLOCK", 1.0),
    "mem_clock_mhz": ("DCGM_FI_DEV_MEM_CLOCK", 1.0),
}
OWN = {
    "tensor_active_ratio": ("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE", 1.0),
    "dram_active_ratio": ("DCGM_FI_PROF_DRAM_ACTIVE", 1.0),
    "mem_used_bytes": ("DCGM_FI_DEV_FB_USED", MIB),
}
WHOLE = {
    "util_gpu_pct": ("DCGM_FI_DEV_GPU_UTIL", 1.0),
    "util_mem_pct": ("DCGM_FI_DEV_MEM_COPY_UTIL", 1.0),
    "remap_failed": ("DCGM_FI_DEV_ROW_REMAP_FAILURE", 1.0),
}


def expected(page: Plain, table: dict[str, tuple[str, float]], **labels: str) -> dict[str, float]:
    return {column: page.all(name, **labels)[0] * scale for column, (name, scale) in table.items()}


def by_gpu(rows: list[Read]) -> dict[int, Read]:
    return {int(row.values["gpu"] or 0): row for row in rows}


def test_mig_and_whole_gpus(data_dir: Path) -> None:
    """Eight A800, the first in three MIG instances: instances have their own memory and activity and nothing of the
    board's, which is said once, for the board; a line that is no valid exposition spoils nothing."""
    text = text_of(data_dir, "dcgm-exporter-a800-mig-dcp.prom")
    page = Plain(text)
    assert layout_of(text).bad_lines == text.count("ERROR - FAILED TO CONVERT TO STRING") == 10
    rows = by_gpu(read(text))
    assert list(rows) == [0, 19, 21, 22, 1, 2, 3, 4, 5, 6, 7]
    for gpu in range(1, 8):
        mine = {"gpu": str(gpu)}
        assert known(rows[gpu]) == pytest.approx({"gpu": gpu, **expected(page, BOARD | OWN | WHOLE, **mine)})
        entry = rows[gpu].plan.gpu
        assert entry is not None
        assert (entry.gpu, entry.gpu_type, entry.parent, entry.mig_profile) == (gpu, "A800", None, "")
        assert text.count(entry.uuid) > 10
    for instance in (3, 5, 6):
        index = 16 + instance
        mine = {"gpu": "0", "GPU_I_ID": str(instance)}
        assert known(rows[index]) == {"gpu": index, "parent": 0, **expected(page, OWN, **mine)}
        entry = rows[index].plan.gpu
        assert entry is not None
        assert (entry.gpu, entry.parent, entry.mig_profile) == (index, 0, "2g.20gb")
    assert known(rows[0]) == pytest.approx({"gpu": 0, **expected(page, BOARD, gpu="0", GPU_I_ID="3")})
    assert {row.plan.node for row in rows.values()} == {"msxf-hpc-64-35-ai"}
    assert known(rows[1])["energy_j"] == 187554.325


def test_several_hosts_on_a_page_and_series_without_labels(data_dir: Path) -> None:
    """A row a host and GPU; series that name no GPU are nobody's, whatever their value; pods by their labels."""
    text = text_of(data_dir, "dcgm-exporter-t4-edited.prom")
    page = Plain(text)
    first, second, third = read(text)
    table = {**BOARD, **OWN, **WHOLE}
    for column in ("mem_temp_c", "tensor_active_ratio", "dram_active_ratio", "remap_failed"):
        del table[column]  # without labels there
    assert known(first) == pytest.approx({"gpu": 0, **expected(page, table, Hostname="424773df46e0")})
    assert known(second) == {
        "gpu": 0,
        "power_limit_w": 70,
        "throttle_mask": 1,
        "mem_total_bytes": page.one("DCGM_FI_DEV_FB_TOTAL") * MIB,
        "mem_reserved_bytes": page.one("DCGM_FI_DEV_FB_RESERVED") * MIB,
    }
    assert known(third) == {"gpu": 0, "dram_active_ratio": 3e-6}
    assert [row.plan.node for row in (first, second, third)] == ["424773df46e0", "551bdf382151", "ip-11111"]
    assert [row.plan.pod for row in (first, second, third)] == ["", "", "ray-llm:ray-1111111"]
    types = [row.plan.gpu.gpu_type for row in (first, second, third) if row.plan.gpu]
    assert types == ["T4", "T4", "A10G"]


def test_every_row_is_taken_by_the_log(data_dir: Path) -> None:
    """Rows are valid records of gpu.samples."""
    for name in ("dcgm-exporter-a800-mig-dcp.prom", "dcgm-exporter-t4-edited.prom"):
        for row in read(text_of(data_dir, name)):
            sample = {"at_s": 1.0, **row.plan.texts, **known(row)}
            encoded = GPU_SAMPLES.encode({column: [value] for column, value in sample.items()})
            assert GPU_SAMPLES.decode(encoded).refused == []


WHO = 'gpu="3",UUID="GPU-a",modelName="NVIDIA H100 80GB HBM3",hostname="n1"'
LINE = "DCGM_FI_{name}{{" + WHO + "{more}}} {value}\n"


def page(*given: tuple[str, str], more: str = "") -> str:
    return "".join(LINE.format(name=name, value=value, more=more) for name, value in given)


def test_names_of_dcgm_4_7_have_base_units() -> None:
    """Hertz, joules, bytes and ratios, as exporter 4.9 prints them."""
    (row,) = read(
        page(
            ("DEV_SM_CLOCK_HERTZ", "1980000000"),
            ("DEV_MEMORY_CLOCK_HERTZ", "2619000000"),
            ("DEV_GPU_ENERGY_JOULES_TOTAL", "187554"),
            ("DEV_FB_USED_BYTES", "1048576"),
            ("DEV_FB_CAPACITY_BYTES", "85899345920"),
            ("DEV_GPU_UTIL_RATIO", "0.5"),
            ("DEV_MEMORY_UTIL_RATIO", "0.25"),
            ("DEV_BOARD_POWER_WATTS", "312.5"),
            ("DEV_GPU_TEMP_CELSIUS", "61"),
            ("DEV_GPU_POWER_THROTTLE_SECONDS_TOTAL", "2.5"),
            ("PROF_SM_UTIL_RATIO", "0.75"),
            ("PROF_DRAM_UTIL_RATIO", "0.5"),
        )
    )
    assert known(row) == pytest.approx(
        {
            "gpu": 3,
            "sm_clock_mhz": 1980,
            "mem_clock_mhz": 2619,
            "energy_j": 187554,
            "mem_used_bytes": 1048576,
            "mem_total_bytes": 85899345920,
            "util_gpu_pct": 50,
            "util_mem_pct": 25,
            "power_w": 312.5,
            "temp_c": 61,
            "throttle_power_ns": 2.5e9,
            "sm_active_ratio": 0.75,
            "dram_active_ratio": 0.5,
        }
    )
    assert row.plan.node == "n1"


@pytest.mark.parametrize(
    ("others", "value", "percent"),
    [
        ((("DEV_FB_USED", "10"),), "87", 87),  # DCGM 4.6: the new name, the old unit
        ((("DEV_FB_USED_BYTES", "10"),), "0.87", 87),
        ((), "0.87", None),
        ((("DEV_FB_USED", "10"), ("DEV_GPU_UTIL", "42")), "0.87", 42),
    ],
)
def test_a_utilisation_ratio_is_read_by_the_units_of_its_page(
    others: tuple[tuple[str, str], ...], value: str, percent: float | None
) -> None:
    """The same name is percent in DCGM 4.6 and a ratio since 4.7; where nothing tells which, it is unknown."""
    (row,) = read(page(("DEV_GPU_UTIL_RATIO", value), *others))
    assert row.values.get("util_gpu_pct") == (percent if percent is None else pytest.approx(percent))


@pytest.mark.parametrize("sentinel", ["9223372036854775794", "9223372036854775792", "2147483632", "140737488355328"])
def test_sentinels_are_unknown(sentinel: str) -> None:
    """What DCGM gives for a field that it cannot read is null, of whole, 32-bit and real fields."""
    body = page(("DEV_POWER_USAGE", sentinel), ("DEV_FB_USED", sentinel), ("PROF_SM_ACTIVE", sentinel))
    lines = body.encode().split(b"\n")
    layout = layout_of(body)
    values = layout.values(lines, True)
    assert values is not None
    (row,) = layout.rows(values, True, [])
    assert known(row) == {"gpu": 3}


def test_rates_are_not_taken_for_counters() -> None:
    """PROF_PCIE and NVLINK_BANDWIDTH are rates, whatever type is printed; bytes come from what DCGM counts."""
    rates = page(("PROF_PCIE_TX_BYTES", "143341"), ("DEV_NVLINK_BANDWIDTH_TOTAL", "7"), ("DEV_SM_CLOCK", "210"))
    for kind in ("counter", "gauge"):
        (row,) = read(f"# TYPE DCGM_FI_PROF_PCIE_TX_BYTES {kind}\n{rates}")
        assert known(row) == {"gpu": 3, "sm_clock_mhz": 210}
    (row,) = read(page(("PROF_PCIE_TX_BYTES_TOTAL", "5"), ("DEV_NVLINK_COUNT_RX_BYTES", "6")))
    assert known(row) == {"gpu": 3, "pcie_tx_bytes": 5, "nvlink_rx_bytes": 6}


def test_a_shared_gpu_is_not_counted_twice() -> None:
    """The same series once a pod, and series of single processes: one value, and no pod that holds it alone."""
    pods = [page(("DEV_FB_USED", "10"), more=f',namespace="a",pod="{pod}"') for pod in ("x", "y")]
    processes = page(("DEV_FB_USED", "3"), more=',pid="77"')
    (row,) = read("".join(pods) + processes)
    assert known(row) == {"gpu": 3, "mem_used_bytes": 10 * MIB}
    assert row.plan.pod == ""
    (row,) = read(pods[0])
    assert row.plan.pod == "a:x"


def test_memory_of_all_and_throttling_are_added_up_only_where_every_part_is_known() -> None:
    """Used, free and reserved; software and hardware heat. An Xid of 0 is none."""
    (row,) = read(page(("DEV_FB_USED", "1"), ("DEV_FB_FREE", "2"), ("DEV_FB_RESERVED", "3")))
    assert known(row)["mem_total_bytes"] == 6 * MIB
    (row,) = read(page(("DEV_FB_USED", "1"), ("DEV_FB_FREE", "2")))
    assert "mem_total_bytes" not in known(row)
    heat = [(f"DEV_CLOCKS_EVENT_REASON_{kind}_THERM_SLOWDOWN_NS", "4") for kind in ("SW", "HW")]
    assert known(read(page(*heat, ("DEV_FB_USED", "1")))[0])["throttle_thermal_ns"] == 8
    assert "throttle_thermal_ns" not in known(read(page(heat[0], ("DEV_FB_USED", "1")))[0])
    assert "xid" not in known(read(page(("DEV_XID_ERRORS", "0")))[0])
    assert known(read(page(("DEV_XID_ERROR", "79")))[0])["xid"] == 79


@pytest.mark.parametrize("gpu", ["", "x", "-1", "63", "1.5"])
def test_a_gpu_with_no_index_of_ours_is_left_out(gpu: str) -> None:
    """Its series are nobody's; the others are read."""
    body = page(("DEV_FB_USED", "1")) + f'DCGM_FI_DEV_FB_USED{{gpu="{gpu}"}} 5\n'
    assert [row.values["gpu"] for row in read(body)] == [3]


def test_a_label_of_nvlink_metrics_names_the_gpu_too() -> None:
    """`gpu_uuid` and `model_name` stand for `UUID` and `modelName` there."""
    body = 'DCGM_FI_DEV_NVLINK_COUNT_TX_BYTES{gpu="1",gpu_uuid="GPU-b",model_name="NVIDIA L4",hostname="n1"} 9\n'
    (row,) = read(body)
    assert row.plan.gpu is not None
    assert (row.plan.gpu.uuid, row.plan.gpu.gpu_type) == ("GPU-b", "L4")
