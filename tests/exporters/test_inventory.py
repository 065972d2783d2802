"""Replicas of a host: what a file tells, what its rules find in pods and processes, and for how long each is what."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporters.inventory import Holdings, Seen
from exporters.matching import Owner, Subject
from schemas.errors import SettingsError

AT_S = 1_764_000_000.0
ID = "0123456789abcdef" * 4


def holdings(tmp_path: Path, text: str) -> Holdings:
    """With that mapping file."""
    path = tmp_path / "mapping.yaml"
    path.write_text(text)
    made = Holdings(path, "node-1")
    made.refresh(AT_S)
    return made


def process(gpu: int, pid: int, *, holds: bool = True, **subject: object) -> Seen:
    return Seen(gpu, pid, "1", Subject("node-1", **subject), holds)  # type: ignore[arg-type]


def pod(gpu: int, name: str, container: str = "engine") -> Seen:
    return Seen(gpu, 0, "", Subject("node-1", name, "", container), False)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("- a", "replicas"),
        ("nothing: 1", "replicas"),
        ("replicas: {a: 1}", "replicas.a"),
        ("replicas: {a: {pool: p}}", r"replicas\.a\.gpus"),
        ("replicas: {a: {pool: p/q, gpus: [0]}}", r"replicas\.a\.pool"),
        ("replicas: {a: {pool: p, gpus: [0], state: odd}}", r"replicas\.a\.state"),
        ("replicas: {a: {pool: p, gpus: [0], command: '['}}", r"replicas\.a\.command.*no regular expression"),
        ("{", "YAML"),
        ("replicas: {a: {pool: p, gpus: [0], tenant: 2024-13-45}}", "YAML"),
        ("match: [{command: 'a{99999999999999999999}', pool: p, replica: r}]", "no regular expression"),
        ("match: 1", "match"),
        ("match: [{pool: p}]", r"match\[0\].*needs `pod`"),
        ("match: [{pod: a}]", r"match\[0\]\.pool"),
        ("match: [{pod: a, pool: p, wanted: 1}]", r"match\[0\]\.wanted"),
        ("match: [{command: a, pool: p}]", "needs `replica`"),
        ("match: [{pod: a, pool: $unknown}]", "unknown"),
        ("match: [{pod: a, pool: 'p$'}]", "dollar"),
        ("match: [{pod: '(', pool: p}]", "no regular expression"),
        ("match: [{pod: a, pool: p, gpu_share: 2}]", r"gpu_share"),
    ],
)
def test_a_bad_mapping_is_named(tmp_path: Path, text: str, match: str) -> None:
    """The error names file, entry, field and value; what was before holds."""
    made = holdings(tmp_path, "replicas: {before: {pool: p, gpus: [0]}}")
    made.path.write_text(text)  # type: ignore[union-attr]
    with pytest.raises(SettingsError, match=match) as refused:
        made.refresh(AT_S)
    assert str(made.path) in str(refused.value)
    assert [one.replica for one in made.replicas()] == ["before"]
    with pytest.raises(SettingsError):
        Holdings(made.path).refresh(AT_S)


def test_since_is_kept_while_the_state_is(tmp_path: Path) -> None:
    """A told replica's `since_s` changes with its state, not with the file."""
    path = tmp_path / "mapping.yaml"
    made = Holdings(path)
    for at_s, text, since_s in (
        (10.0, "replicas: {a: {pool: p, gpus: [0]}}", 10.0),
        (20.0, "replicas: {a: {pool: p, gpus: [0, 1]}}", 10.0),
        (30.0, "replicas: {a: {pool: p, gpus: [0, 1], state: draining}}", 30.0),
    ):
        path.write_text(text)
        assert made.refresh(at_s)
        assert made.replicas()[0].since_s == since_s
    assert not made.refresh(40.0)


DEPLOYMENTS = r"match: [{pod: 'prod:(?P<pool>.+)-[a-z0-9]+-[a-z0-9]{5}', pool: $pool}]"


def test_a_pod_is_a_replica_from_when_it_is_given_gpus(tmp_path: Path) -> None:
    """Starting until a process of it holds memory, then ready, starting again when that ends, and gone with the pod."""
    made = holdings(tmp_path, DEPLOYMENTS)
    pods = [pod(gpu, "prod:chat-7d9f-abcde") for gpu in (1, 0)]

    def look(seen: list[Seen], at_s: float) -> tuple[str, list[int], str, float] | None:
        made.observe(seen, [0, 1], at_s)
        found = made.replicas()
        return (found[0].replica, found[0].gpus, found[0].state, found[0].since_s) if found else None

    worker = process(0, 40, pod="prod:chat-7d9f-abcde")
    assert look(pods, 1.0) == ("chat-7d9f-abcde", [0, 1], "starting", 1.0)
    assert look([*pods, worker._replace(holds=False)], 2.0) == ("chat-7d9f-abcde", [0, 1], "starting", 1.0)
    assert look([*pods, worker], 3.0) == ("chat-7d9f-abcde", [0, 1], "ready", 3.0)
    assert look([*pods, worker], 4.0) == ("chat-7d9f-abcde", [0, 1], "ready", 3.0)
    assert look(pods, 5.0) == ("chat-7d9f-abcde", [0, 1], "starting", 5.0)
    assert look([pod(2, "dev:chat-7d9f-abcde")], 6.0) is None


def test_a_pod_whose_processes_cannot_be_seen_is_ready(tmp_path: Path) -> None:
    """Unknown is not starting: nothing would ever end it."""
    made = holdings(tmp_path, DEPLOYMENTS)
    made.observe([pod(0, "prod:chat-7d9f-abcde")], [], AT_S)
    assert made.replicas()[0].state == "ready"


def test_processes_by_command_and_container(tmp_path: Path) -> None:
    """The first rule that fits says replica, pool and tenant; a replica has all GPUs that its processes are on."""
    made = holdings(
        tmp_path,
        r"""
match:
  - {command: 'vllm serve .*--port (?P<port>\d+)', pool: chat, replica: $node-$port, tenant: acme}
  - {container: '0123456789ab', pool: batch, replica: $container}
  - {container: 'trainer', pod: 'dev:(?P<who>.*)', pool: train, replica: $namespace.$pod, tenant: $who}
""",
    )
    seen = [
        process(0, 40, commands=("VLLM::Worker_TP0", "python vllm serve m --port 8001")),
        process(1, 41, commands=("VLLM::Worker_TP1", "python vllm serve m --port 8001")),
        process(2, 42, container=ID),
        process(3, 43, pod="dev:ann", container="f" * 64, container_name="trainer"),
        process(4, 44, commands=("python notebook.py",)),
    ]
    owners = made.observe(seen, range(5), AT_S)
    chat = Owner("node-1-8001", "chat", "acme", None)
    assert owners == {
        (0, 40): chat,
        (1, 41): chat,
        (2, 42): Owner("0123456789ab", "batch", None, None),
        (3, 43): Owner("dev.ann", "train", "ann", None),
    }
    assert [(one.replica, one.gpus) for one in made.replicas()] == [
        ("node-1-8001", [0, 1]),
        ("0123456789ab", [2]),
        ("dev.ann", [3]),
    ]


def test_replicas_that_share_a_gpu_are_billed_for_it_once(tmp_path: Path) -> None:
    """Shares of a GPU sum to one where no rule says otherwise; a told replica counts among them."""
    made = holdings(tmp_path, "match: [{pod: '.*', pool: p}]")
    made.observe([pod(0, "a:x"), pod(0, "a:y"), pod(1, "a:x")], [], AT_S)
    assert {one.replica: one.gpu_share for one in made.replicas()} == {"x": 0.75, "y": 0.5}
    told = holdings(tmp_path, "{replicas: {t: {pool: p, gpus: [0]}}, match: [{pod: '.*', pool: p, gpu_share: 0.2}]}")
    told.observe([pod(0, "a:x")], [], AT_S)
    assert {one.replica: one.gpu_share for one in told.replicas()} == {"t": 1.0, "x": 0.2}


def test_a_told_replica_names_its_processes(tmp_path: Path) -> None:
    """By patterns; its GPUs and state stay as told."""
    made = holdings(
        tmp_path,
        "replicas: {chat-0: {pool: chat, gpus: [0], tenant: acme, command: 'port 8001'}, idle: {pool: p, gpus: [1]}}",
    )
    owners = made.observe([process(0, 40, commands=("port 8001",)), process(0, 41, commands=("port 9",))], [0], AT_S)
    assert owners == {(0, 40): Owner("chat-0", "chat", "acme")}
    assert [(one.replica, one.gpus, one.state) for one in made.replicas()] == [
        ("chat-0", [0], "ready"),
        ("idle", [1], "ready"),
    ]


def test_the_only_process_on_a_told_gpu_is_its_replica_and_a_second_one_is_not(tmp_path: Path) -> None:
    """Whoever comes later is a stranger: to take it for the replica would hide who disturbs it."""
    made = holdings(tmp_path, "replicas: {chat-0: {pool: chat, gpus: [0]}}")
    own = Owner("chat-0", "chat")
    assert made.observe([process(0, 40)], [0], AT_S) == {(0, 40): own}
    assert made.observe([process(0, 40), process(0, 41)], [0], AT_S) == {(0, 40): own}
    fresh = holdings(tmp_path, "replicas: {chat-0: {pool: chat, gpus: [0]}}")
    assert fresh.observe([process(0, 40), process(0, 41)], [0], AT_S) == {}
    together = [process(0, 40, container=ID), process(0, 41, container=ID)]
    assert fresh.observe(together, [0], AT_S) == {(0, 40): own, (0, 41): own}


def test_two_told_replicas_on_a_gpu_are_not_guessed(tmp_path: Path) -> None:
    """Without patterns nobody can say whose a process is."""
    made = holdings(tmp_path, "replicas: {a: {pool: p, gpus: [0]}, b: {pool: p, gpus: [0]}}")
    assert made.observe([process(0, 40)], [0], AT_S) == {}


def test_one_name_in_two_pools_is_counted(tmp_path: Path) -> None:
    """A replica is of one pool; names that cannot be are counted, too."""
    made = holdings(
        tmp_path, "match: [{pod: 'a:.*', pool: one, replica: same}, {pod: 'b:(?P<n>.*)', pool: two, replica: $n}]"
    )
    made.observe([pod(0, "a:x"), pod(1, "b:same"), pod(2, "b:c/d")], [], AT_S)
    assert [(one.replica, one.pool, one.gpus) for one in made.replicas()] == [("same", "one", [0])]
    assert made.failures == {"pools": 1, "match": 1}


def test_nothing_new_is_the_same_list(tmp_path: Path) -> None:
    """Another list only where something changed: so it is known when to publish."""
    made = holdings(tmp_path, DEPLOYMENTS)
    made.observe([pod(0, "prod:chat-7d9f-abcde")], [0], 1.0)
    before = made.replicas()
    made.observe([pod(0, "prod:chat-7d9f-abcde")], [0], 2.0)
    assert made.replicas() is before


@given(st.text(max_size=30), st.text(max_size=30), st.text(max_size=60))
def test_no_process_breaks_a_rule(pod_name: str, container: str, command: str) -> None:
    """Whatever a process is called: it fits with a valid name, or it is counted, or it does not fit."""
    from exporters.matching import Rule

    made = Holdings(None, "node-1")
    made._rules = [Rule(pod="(?P<p>.*)", command="(?P<c>.*)", pool="$p", replica="$c.$container")]
    seen = process(0, 40, pod=pod_name, container=container, commands=(command,))
    owners = made.observe([seen], [0], AT_S)
    assert len(made.replicas()) == len(owners)
    assert all(owner.replica.isprintable() and "/" not in owner.replica for owner in owners.values())
