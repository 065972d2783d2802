"""Builds the stand-in for NVIDIA's library from nvml_stub.c, and writes what it answers."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_suffix(".c")
SONAME = "libnvidia-ml.so.1"
H100 = {
    "field.83": "5000000000000",
    "field.185": 412_500,
    "field.186": 430_000,
    "field.82": 71,
    "field.74": 10**9,
    "field.76": 2 * 10**9,
    "field.269": 3 * 10**9,
    "field.270": 4 * 10**9,
    "field.75": 5 * 10**9,
    "field.271": 6 * 10**9,
    "field.197": 123,
    "field.198": 456,
    "field.138": 7,
    "field.139": 8,
    "field.3": 12,
    "field.4": 1,
    "field.144": 1,
    "field.145": 0,
    "gpm.2": 62,
    "gpm.3": 31,
    "gpm.5": 20,
    "gpm.10": 44,
}
"""All that a Hopper GPU gives, by the stub's keys."""


def build(folder: Path, *flags: str) -> Path:
    """Compiles the library into a folder that LD_LIBRARY_PATH may name. Skips the test without a compiler."""
    if (gcc := shutil.which("gcc")) is None:
        pytest.skip("gcc is missing: it builds the stand-in for libnvidia-ml.so.1")
    library = folder / SONAME
    command = [gcc, "-Wall", "-Werror", "-O1", "-shared", "-fPIC", *flags, f"-Wl,-soname,{SONAME}"]
    done = subprocess.run(
        [*command, "-o", str(library), str(SOURCE), "-lpthread"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return library


class Stub:
    """The answers of a library, changed while it runs. Keys: nvml_stub.c; `key@gpu` for one GPU."""

    def __init__(self, path: Path, **answers: object) -> None:
        self.path = path
        self.answers: dict[str, object] = {**H100, **answers}
        self.library: ctypes.CDLL | None = None
        self._write()

    def set(self, answers: dict[str, object] | None = None, **more: object) -> None:
        """Other answers from now on; None takes one away."""
        self.answers.update(answers or {}, **more)
        self.answers = {key: value for key, value in self.answers.items() if value is not None}
        self._write()

    def calls(self, function: str) -> int:
        """How often it was called (in this process)."""
        assert self.library is not None
        return int(self.library.stub_calls(function.encode()))

    def calls_of_thread(self, native_id: int) -> int:
        """Calls by a thread of this process."""
        assert self.library is not None
        return int(self.library.stub_calls_of_thread(ctypes.c_long(native_id)))

    def _write(self) -> None:
        made = self.path.with_suffix(".new")
        made.write_text("".join(f"{key}={value}\n" for key, value in self.answers.items()))
        made.replace(self.path)
