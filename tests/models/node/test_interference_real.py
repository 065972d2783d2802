"""Interference on worlds that the model knows nothing of: generated ones, and real engines that were alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.generators.interference import generate
from tests.generators.interference_evaluate import real, without_harm
from tests.generators.interference_load import CONFOUNDERS, Setting
from tests.generators.interference_score import run, scores


def test_worlds_come_from_their_seeds_alone() -> None:
    """A replica is the same whoever is generated beside it."""
    setting = Setting(hours=0.5, confounders=CONFOUNDERS)
    alone, both = generate([7], setting), generate([3, 7], setting)
    for name, values in alone.load.items():
        np.testing.assert_array_equal(values[:, 0], both.load[name][:, 1], name)
    np.testing.assert_array_equal(alone.seen[:, 0], both.seen[:, 1])


def test_the_harm_is_what_was_asked_for() -> None:
    """While the antagonist works, time per token is the stated multiple of the same replica's without it."""
    setting = Setting(hours=3, slowdown=1.5)
    harmed, spared = generate(range(4), setting), generate(range(4), Setting(hours=3, slowdown=1.0))
    assert spared.slowdown.max() == 1.0
    for i in range(4):
        works = harmed.taken[:, i, 0] > 0.3
        assert harmed.slowdown[works, i].mean() == pytest.approx(1.5, rel=0.05)
        slower = harmed.load["tpot_s"][works, i] / spared.load["tpot_s"][works, i]
        assert np.nanmedian(slower) > 1.3  # and more batch, which costs time too


def test_harm_is_told_on_foreign_step_times() -> None:
    """Two replicas of four hours: the targets that hold on twelve of ten hours, with room for so few."""
    seeds, setting = (10, 11), Setting(hours=4)
    found = scores(run(seeds, setting), run(seeds, Setting(hours=4, slowdown=1.0)), setting.slowdown)
    assert found["auc"] > 0.95
    assert found["recall"] > 0.8
    assert found["antagonist_accuracy"] > 0.95
    assert found["median_severity_error"] < 0.05


@pytest.mark.parametrize("confounder", CONFOUNDERS)
def test_what_only_looks_like_harm_does_not_alarm(confounder: str) -> None:
    """Half a replica-day under each confounder without harm: no alarm."""
    assert without_harm(Setting(hours=4, confounders=(confounder,)), 0.5)["alarms"] == 0


def test_real_engines_that_were_alone(data_dir: Path) -> None:
    """Beside fictitious neighbours at most .5 % of windows are alarmed on; of an injected 1.2x at least .6 are."""
    for name, found in real(data_dir, 1.2, range(4), lambda _: None).items():
        assert found["false_windows"] <= 0.005, name
        assert found["recall"] >= 0.6, name
        assert found["antagonist_accuracy"] >= 0.95, name
