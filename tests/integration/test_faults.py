"""Workers that die, hang, join and leave: nothing is lost, nothing counted twice, no version has two contents."""

from __future__ import annotations

import asyncio
import os

from aiokafka import TopicPartition
from aiokafka.admin import RecordsToDelete
from aiokafka.protocol.admin import DeleteGroupsRequest

from schemas.topics import COST_WINDOWS, NODE_SAMPLES
from streams.clients import admin_client
from tests.integration.conftest import Stage, together
from tests.integration.harness import KEYS, suspend_past_session

LONG = os.environ.get("FLEETLOOP_LONG_TESTS") == "1"


@together
async def test_broker_killed(stage: Stage) -> None:
    """The broker is killed -9 under load and comes back; it is killed again, and away, while a worker joins."""
    broker = await stage.own_broker()
    s = await stage.scene(broker)
    s.load(800)
    first = s.start("first", "--supervised", "1")
    await s.checkpointed()
    broker.kill()
    await asyncio.sleep(1)
    await asyncio.to_thread(broker.restart)
    await s.checkpointed(3)
    joining = s.start("joining", "--supervised", "1")
    broker.kill()
    await asyncio.sleep(180 if LONG else 5)
    await asyncio.to_thread(broker.restart)
    await joining.saw("restored")
    await asyncio.sleep(1)
    await s.stop_load()
    await s.judge()
    assert await joining.terminate() == 0
    assert await first.terminate() == 0


@together
async def test_join_kill_restart_leave(stage: Stage) -> None:
    """A worker joins, one is killed -9 and started again, one leaves by SIGTERM in mid-send."""
    s = await stage.scene()
    s.load()
    first = s.start("first")
    await first.saw("restored")
    await asyncio.sleep(1.5)
    second = s.start("second")
    await first.saw("restored", 2)
    await second.saw("restored")
    await asyncio.sleep(1.5)
    first.kill()
    again = s.start("again")
    await again.saw("restored")
    await second.saw("restored", 2)
    await asyncio.sleep(1)
    assert await second.terminate() == 0
    await again.saw("restored", 2)
    await s.stop_load()
    await s.judge()


@together
async def test_zombie(stage: Stage) -> None:
    """A worker suspended for longer than its session comes back: the group refuses its commits."""
    s = await stage.scene()
    s.load()
    zombie = s.start("zombie")
    await s.checkpointed()
    heir = s.start("heir")
    await heir.saw("restored")
    await asyncio.sleep(1)
    await suspend_past_session(zombie, heir)
    await s.stop_load()
    await s.judge()


@together
async def test_checkpoint_in_chunks(stage: Stage) -> None:
    """A state that fills several checkpoint records comes back whole after kill -9."""
    s = await stage.scene(checkpoint_chunk_bytes=256 * 1024)
    for key in KEYS:
        await s.send_now([{"k": key, "pad": 1_500_000}, {"k": key, "n": 1}])
    s.load(300)
    first = s.start("first")
    await s.checkpointed(dump_bytes=1_500_000)
    first.kill()
    second = s.start("second")
    await second.saw("restored")
    assert max(second.lines("restored")[0]["applied"].values()) > 5
    assert not second.lines("checkpoint refused")
    await s.stop_load()
    await s.judge()


@together
async def test_fold_that_raises(stage: Stage) -> None:
    """The records at which a fold raises are dead-lettered and leave no trace in the state; the rest is counted."""
    s = await stage.scene()
    s.load(500)
    worker = s.start()
    await worker.saw("restored")
    for _ in range(2):
        await s.send_now(*([{"k": key, "n": 1, "raise": True}] for key in KEYS[:4]))
        await asyncio.sleep(1.5)
    await s.stop_load()
    await s.judge()
    letters = await s.dead_letters()
    assert {(x["partition"], x["offset"]) for x in letters}
    assert len(letters) == 8
    assert {x["reason"] for x in letters} == {"fold_error"}
    assert all("a poisonous row" in x["detail"] for x in letters)
    worker.kill()  # what raised before the checkpoint doesn't come again, what comes again is skipped again
    await s.start("again").saw("restored")
    await s.send_now([{"k": KEYS[0], "n": 5}])
    await s.judge()


@together
async def test_partition_that_raises_too_often_stops_alone(stage: Stage) -> None:
    """More exceptions than allowed stop that partition loudly; the others go on."""
    s = await stage.scene(fold_errors_per_hour_max=2)
    worker = s.start()
    await worker.saw("restored")
    await s.send_now(*([{"k": KEYS[0], "raise": True, "n": 1}] for _ in range(3)))
    await worker.saw("PARTITION STOPPED")
    stopped = worker.lines("PARTITION STOPPED")[0]["partition"]
    await s.send_now(*([{"k": key, "n": 2}] for key in KEYS))
    partitions = s.partitions_of(KEYS)
    others = {k for k in KEYS if partitions[k] != stopped}
    assert others
    assert len(others) < len(KEYS)
    await s.until_published(dict.fromkeys(others, (1, 2)))
    assert not set(await s.published()) - others
    assert len(worker.lines("PARTITION STOPPED")) == 1


@together
async def test_failed_sends(stage: Stage) -> None:
    """Results that the broker refuses restore the partition until they are taken; none is lost."""
    s = await stage.scene()
    s.load(300)
    worker = s.start()
    await s.checkpointed()
    await s.alter(COST_WINDOWS, "max.message.bytes", "60")
    await worker.saw("a send failed; partition restored", 2)
    await s.alter(COST_WINDOWS, "max.message.bytes", "1048576")
    await s.stop_load()
    await s.judge()


@together
async def test_lost_commits_and_lost_records(stage: Stage) -> None:
    """Without the group's offsets the newest checkpoint is taken; offsets that retention took are a counted hole."""
    s = await stage.scene()
    await s.send_now(*([{"k": key, "n": 3}] for key in KEYS for _ in range(20)))
    first = s.start("first")
    await first.saw("restored")
    await s.judge()
    assert await first.terminate() == 0
    admin = admin_client(s.settings)
    await admin.start()
    try:
        group = s.settings.group("node")
        coordinator = await admin.find_coordinator(group)
        response = await admin._send_request(DeleteGroupsRequest([group]), coordinator)
        assert response.results == [(group, 0)]
        second = s.start("second")
        await second.saw("no usable commit: newest checkpoint of the topic taken", 4)
        await s.send_now(*([{"k": key, "n": 4}] for key in KEYS))
        await s.judge()
        assert await second.terminate() == 0
        await s.send_now(*([{"k": KEYS[0], "n": 1}] for _ in range(5)))  # nobody will ever read these
        tps = [TopicPartition(s.settings.topic(NODE_SAMPLES), p) for p in range(4)]
        before = await s.published()
        await admin.delete_records({tp: RecordsToDelete(before_offset=-1) for tp in tps})
    finally:
        await admin.close()
    third = s.start("third")
    await third.saw("restored")
    await s.send_now([{"k": KEYS[0], "n": 7}])
    await third.saw("hole in the offsets")
    rows, total = before[KEYS[0]]
    await s.until_published({KEYS[0]: (rows + 1, total + 7)})
