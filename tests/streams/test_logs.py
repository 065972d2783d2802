"""Logs: machines get JSON, and other libraries only speak up when something is wrong."""

from __future__ import annotations

import json
import subprocess
import sys

CODE = """
import logging, structlog
from streams.logs import setup_logs
from streams.settings import load_settings
setup_logs(load_settings(log_format={format!r}), app="node")
log = structlog.get_logger("x")
log.info("hello", partition=3)
log.debug("not shown")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("bad")
logging.getLogger("faust.app").info("chatter")
logging.getLogger("aiokafka").warning("heard")
"""


def lines(format: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(format=format)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_json() -> None:
    """Without a terminal every line is one JSON object with the bound context; stdout stays free."""
    said = [json.loads(line) for line in lines("auto")]
    assert [(x["event"], x["level"]) for x in said] == [("hello", "info"), ("bad", "error"), ("heard", "warning")]
    assert all(x["app"] == "node" and x["timestamp"] for x in said)
    assert said[0]["partition"] == 3
    assert "ZeroDivisionError" in said[1]["exception"]


def test_console() -> None:
    """On request it is for people, without colours where there is no terminal."""
    text = "\n".join(lines("console"))
    assert "hello" in text
    assert "\x1b[" not in text
