"""What the GPU exporter costs: the whole process against a stand-in for the driver's library and a real Kafka.

    python -m tests.bench.nvml_cost --seconds 60

CPU is the process's own (user and system, /proc/<pid>/stat) after it has settled; memory is its resident set less that
of an interpreter which has only imported the same modules. The stand-in answers in microseconds, a driver may take
longer: NVML's own time on a real host is fleetloop_nvml_latency_seconds_total.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from streams.broker import LocalBroker
from streams.deployment import ensure_deployment
from streams.settings import load_settings
from tests.exporters.nvml_stub import Stub, build
from tests.exporters.test_pods import Kubelet, answer
from tests.exporters.test_processes import Host

SETTLE_S = 15
IDLE = "import cli.main, cli.processes, exporters.nvml, streams.logs, streams.deployment, time; {}; time.sleep(86_400)"
WITH_PODS = "import grpc, google.protobuf.message_factory"


def main() -> None:
    """Prints the figures as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--processes", type=int, default=2, help="a GPU")
    parser.add_argument("--mig", action="store_true", help="Cut every GPU into seven.")
    parser.add_argument("--pods", action="store_true", help="Ask a kubelet which pods hold the GPUs.")
    parser.add_argument("--health", action="store_true", help="Serve health and metrics (with their thread).")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, LocalBroker(Path(folder) / "broker") as broker:
        broker.start()
        print(json.dumps(measure(Path(folder), broker, given), indent=2))


def measure(folder: Path, broker: LocalBroker, given: argparse.Namespace) -> dict[str, float]:
    """Runs the exporter and gives its CPU, memory and time in the driver."""
    prefix, port = "cost.", 18_999
    settings = load_settings(bootstrap_servers=broker.bootstrap_servers, topic_prefix=prefix)
    asyncio.run(ensure_deployment(settings, local=True))
    library, stub, host = build(folder), Stub(folder / "stub", gpus=given.gpus), Host(folder)
    pids = [[1000 + gpu * 10 + i for i in range(given.processes)] for gpu in range(given.gpus)]
    for each in pids:
        for pid in each:
            host.process(pid, cpu_ticks=pid)
    for gpu, each in enumerate(pids):
        stub.set({f"processes@{gpu}": ",".join(f"{pid}:{2**30}:{1 + i % 7}" for i, pid in enumerate(each))})
        stub.set({f"utilisation@{gpu}": ",".join(f"{pid}:30:10" for pid in each)})
        if given.mig:
            stub.set({f"mig@{gpu}": ",".join(f"{i}:1g.10gb" for i in range(1, 8))})
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(library.parent),
        "NVML_STUB_FILE": str(stub.path),
        "FLEETLOOP_BOOTSTRAP_SERVERS": broker.bootstrap_servers,
        "FLEETLOOP_TOPIC_PREFIX": prefix,
        "FLEETLOOP_NVML_PROC": str(host.proc),
        "FLEETLOOP_NVML_HEALTH_PORT": str(port if given.health else 0),
    }
    if given.pods:
        kubelet = Kubelet(folder / "kubelet.sock")
        pods = (("a", f"pod-{gpu}", {"engine": {"nvidia.com/gpu": [f"GPU-{gpu:08d}"]}}) for gpu in range(given.gpus))
        kubelet.says = answer(*pods).SerializeToString()
        kubelet.start()
        environment["FLEETLOOP_NVML_POD_RESOURCES"] = str(kubelet.socket)
    command = [str(Path(sys.executable).with_name("fleetloop")), "export", "nvml", "--node", "cost"]
    process = subprocess.Popen(command, env=environment)
    idle = subprocess.Popen([sys.executable, "-c", IDLE.format(WITH_PODS if given.pods else "pass")])
    try:
        time.sleep(SETTLE_S)
        before, began = _cpu_s(process.pid), time.monotonic()
        time.sleep(given.seconds)
        cpu_s, wall_s = _cpu_s(process.pid) - before, time.monotonic() - began
        resident, baseline = _resident_mb(process.pid), _resident_mb(idle.pid)
        metrics = _metrics(port) if given.health else {}
    finally:
        process.terminate()
        idle.kill()
        process.wait(20)
        idle.wait(20)
    return {
        "gpus": given.gpus,
        "core_percent": round(100 * cpu_s / wall_s, 3),
        "cpu_ms_per_tick": round(1000 * cpu_s / wall_s, 2),
        "resident_mb": round(resident, 1),
        "imports_mb": round(baseline, 1),
        "beyond_imports_mb": round(resident - baseline, 1),
        **metrics,
    }


def _cpu_s(pid: int) -> float:
    values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK")


def _resident_mb(pid: int) -> float:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def _metrics(port: int) -> dict[str, float]:
    names = ("process_cpu_seconds_total", "process_resident_memory_bytes", "fleetloop_nvml_latency_seconds_total")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return {line.split("{")[0].split(" ")[0]: float(line.split()[-1]) for line in lines if line.startswith(names)}


if __name__ == "__main__":
    main()
