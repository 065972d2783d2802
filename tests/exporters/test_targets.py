"""Targets by hand and by labels, and what several sources make together."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporters.targets import Rules, Target, TargetSet, parse_target, target


def test_a_target_by_hand() -> None:
    """The URL, then what is known, in any order."""
    assert parse_target("r=http://h:1/metrics?a=b") == Target("r", "http://h:1/metrics?a=b")
    found = parse_target("r=https://h/m;node=n;pool=p; gpus=2;model=org-m;engine=vllm;gpu_type=H100;")
    assert found == Target("r", "https://h/m", "p", "n", "org-m", "vllm", 2, "H100")
    assert parse_target("chat=srv+http://_metrics._tcp.chat.example/metrics;pool=p").pool == "p"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("r", "with a host"),
        ("r=ftp://h/", "with a host"),
        ("=http://h/", "no name"),
        ("a/b=http://h/", "without slash"),
        ("r=http://h/;x=1", "'x' is not known"),
        ("r=http://h/;gpus=many", "a number up to 64"),
        ("r=http://h/;gpus=65", "a number up to 64"),
        ("r=http://h/;pool=a/b", "without slash"),
        ("r=http://h/;pool=a\u200bb", "printable"),
        ("r=http://u:secret@h/", "no user or password"),
    ],
)
def test_what_is_wrong_is_said(text: str, why: str) -> None:
    """With the remedy, and never with a password."""
    with pytest.raises(ValueError, match=why) as error:
        parse_target(text)
    assert "write replica=http://host:port/metrics" in str(error.value)
    assert "secret" not in str(error.value)


def test_labels_say_what_a_target_is() -> None:
    """Ours before Prometheus' own; scheme, path and parameters make the URL; the address is the last name."""
    rules = Rules()
    assert rules.target({"__address__": "h:1"}) == Target("h:1", "http://h:1/metrics")
    found = rules.target(
        {
            "__address__": "10.0.0.1:8000",
            "__scheme__": "https",
            "__metrics_path__": "/x y",
            "__param_a": "b&c",
            "__meta_kubernetes_namespace": "ns",
            "__meta_kubernetes_pod_name": "chat-0",
            "__meta_kubernetes_pod_node_name": "node-7",
            "__meta_kubernetes_pod_label_app": "chat",
            "gpus": "2",
        }
    )
    assert found == Target("chat-0", "https://10.0.0.1:8000/x%20y?a=b%26c", "chat", "node-7", gpus=2, pod="ns:chat-0")
    assert rules.target({"__address__": "h:1", "instance": "http://h"}).replica == "http:--h"


def test_a_setting_says_which_label() -> None:
    """It comes before the usual ones, which stay for targets that lack it."""
    rules = Rules(["pool=team", "model=llm"])
    labels = {"__address__": "h:1", "pool": "usual", "llm": "m"}
    assert rules.target({**labels, "team": "own"}).pool == "own"
    assert rules.target(labels).pool == "usual"
    assert rules.target(labels).model == "m"
    for wrong in ("pool", "colour=red", "pool="):
        with pytest.raises(ValueError, match="write field=label"):
            Rules([wrong])


def test_sources_together() -> None:
    """The first source that names a replica has it; beyond the bound targets are counted, not scraped."""
    one, two, three = (Target(name, f"http://{name}/") for name in "abc")
    other = Target("a", "http://elsewhere/")
    found = TargetSet(2)
    found.put("static", [one])
    found.put("file", [other, one, two, three])
    assert found.targets() == {"a": one, "b": two}
    assert found.left_out == {"name_taken": 1, "bound": 1}
    found.put("file", [three])
    assert found.targets() == {"a": one, "c": three}
    assert found.left_out == {}
    found.put("static", [], invalid=3)
    assert list(found.targets()) == ["c"]
    assert found.left_out == {"invalid": 3}


KEYS = st.sampled_from(
    ["__address__", "__scheme__", "__metrics_path__", "pool", "replica", "gpus", "__param_x", "node"]
)


@given(st.dictionaries(KEYS, st.text(max_size=12) | st.sampled_from(["h:1", "http", "3"])))
def test_any_labels_give_a_target_or_are_refused(labels: dict[str, str]) -> None:
    """Nothing but ValueError, and what is taken can be scraped and named in the log."""
    try:
        found = Rules().target(labels)
    except ValueError:
        return
    assert found.url.startswith(("http://", "https://"))
    for text in (found.replica, found.pool, found.node):
        assert text is None or (0 < len(text) <= 200 and text.isprintable() and "/" not in text)


def test_unknown_is_none() -> None:
    """An empty text says nothing."""
    known: dict[str, Any] = {"replica": "r", "pool": "", "gpus": None}
    assert target("http://h/", known) == Target("r", "http://h/")
