"""Replay gives again what was published: same ids, same bytes, from the beginning and from any kept checkpoint."""

from __future__ import annotations

import base64
import json

import pytest

from schemas.errors import CheckpointMismatch, SettingsError
from schemas.topics import COST_WINDOWS
from streams.deployment import read_deployment
from streams.producer import send_once
from streams.reader import header, read_to_end
from streams.replay import kept_checkpoints, replay
from tests.integration.conftest import Stage, together
from tests.integration.counting import CountFold
from tests.integration.harness import KEYS


class OtherFold(CountFold):
    """Computes something else."""

    def _rows(self, rows: list[dict[str, object]]) -> None:
        super()._rows([{**row, "n": 1} for row in rows])


class LaterFold(CountFold):
    """Of a version that keeps more in its state."""

    def load(self, data: bytes) -> None:
        super().load(data)
        raise KeyError("more")


@together
async def test_replay(stage: Stage) -> None:
    """A replay of what a worker did, through a restart and a raising fold, matches it; another fold does not."""
    s = await stage.scene()
    s.load(400)
    worker = s.start()
    await s.checkpointed()
    await s.send_now([{"k": KEYS[0], "n": 1, "raise": True}])
    await worker.saw("record dead-lettered: the fold raises at it")
    worker.kill()
    again = s.start()
    await s.checkpointed(3)
    await s.stop_load()
    await s.judge()
    assert await again.terminate() == 0
    deployment = await read_deployment(s.settings)
    poisoned = s.partitions_of(KEYS)[KEYS[0]]
    for partition in range(4):
        scratch = stage.folder / f"replay-{partition}.ndjson"
        whole = await replay(s.settings, deployment, "node", CountFold, partition, compare=True, scratch=scratch)
        assert whole.same, (whole.missing, whole.different)
        assert whole.matched > 0
        assert whole.gone == 0
        assert len(whole.fold_errors) == (1 if partition == poisoned else 0)
        lines = [json.loads(line) for line in scratch.read_text().splitlines()]
        assert len(lines) == whole.results
        published = {
            (header(r, "ce_id"), r.value)
            async for r in read_to_end(s.settings, COST_WINDOWS)
            if header(r, "ce_source") == f"node.samples/{partition}"
        }
        assert {(x["id"], base64.b64decode(x["value"])) for x in lines} == published
        kept = await kept_checkpoints(s.settings, "node", partition)
        assert len(kept) >= 2
        for checkpoint in (kept[0], kept[-2]):
            part = await replay(
                s.settings, deployment, "node", CountFold, partition, from_checkpoint=checkpoint.offset, compare=True
            )
            assert part.same
            assert part.first == checkpoint.offset + 1
            assert part.dump_sha256 == whole.dump_sha256
    other = await replay(s.settings, deployment, "node", OtherFold, 0, compare=True)
    assert not other.same
    assert other.different
    with pytest.raises(CheckpointMismatch, match=r"KeyError.*this version has written"):
        await replay(s.settings, deployment, "node", LaterFold, 3, from_checkpoint=kept[0].offset)
    with pytest.raises(SettingsError, match="kept are"):
        await replay(s.settings, deployment, "node", CountFold, 0, from_checkpoint=1 << 40)
    with pytest.raises(SettingsError, match="partition 4"):
        await replay(s.settings, deployment, "node", CountFold, 4)


@together
async def test_one_id_with_two_contents_is_found(stage: Stage) -> None:
    """A published record under a known id with other bytes is told."""
    s = await stage.scene()
    await s.send_now(*([{"k": key, "n": 1}] for key in KEYS))
    worker = s.start()
    await worker.saw("restored")
    await s.judge()
    assert await worker.terminate() == 0
    async for record in read_to_end(s.settings, COST_WINDOWS):
        source = header(record, "ce_source")
        await send_once(
            s.settings, COST_WINDOWS, key="x", value=b"{}", type="count", id=header(record, "ce_id"), source=source
        )
        break
    deployment = await read_deployment(s.settings)
    report = await replay(s.settings, deployment, "node", CountFold, int(source[-1]), compare=True)
    assert not report.same
    assert len(report.different) == 1
