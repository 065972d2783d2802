"""The watchdog ends a process that no longer works, and no other."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

START = """
import time
from streams.logs import setup_logs
from streams.settings import load_settings
from streams.watchdog import Watchdog
setup_logs(load_settings())
w = Watchdog(lambda: {why})
w.start()
print(1, flush=True)
"""


def start(why: str, code: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", START.format(why=why) + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    return process


def test_ends_an_unhealthy_process_with_its_stacks() -> None:
    """The process ends with status 70 and says where each thread was."""
    process = start("'stalled'", "time.sleep(600)")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 70
    assert "stalled" in said
    assert "Current thread" in said or "Thread 0x" in said


def test_spares_a_healthy_and_a_finished_process() -> None:
    """Health goes on, and `done` lets the process end by itself."""
    process = start("''", "time.sleep(2.5); w.done(); w.join(); print('end')")
    said, _ = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "end\n")


def test_ends_a_process_that_does_not_stop() -> None:
    """After `expect_end` only the time counts."""
    process = start("''", "w.expect_end(0.2); time.sleep(600)")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 70
    assert "stopping took too long" in said


def test_does_not_judge_a_process_just_resumed() -> None:
    """What looks stalled because the process was suspended gets time to catch up."""
    code = "beat = time.monotonic()\nwhile time.monotonic() - start < 60:\n  beat = time.monotonic(); time.sleep(0.05)"
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import time; from streams.watchdog import Watchdog\nstart = beat = time.monotonic()\n"
            "Watchdog(lambda: 'stalled' if time.monotonic() - beat > 3 else '').start()\nprint('on', flush=True)\n"
            + code,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    time.sleep(5)
    process.send_signal(signal.SIGCONT)
    time.sleep(4)
    assert process.poll() is None
    process.kill()
    process.communicate()
