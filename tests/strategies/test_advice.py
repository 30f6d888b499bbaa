"""The advice follows the cost model: even cuts make pipelines worth it, one core makes nothing worth it."""

from __future__ import annotations

import re

import pytest

from sglight.networks import NetworkSpec
from sglight.strategies.advice import advise, options

EVEN = NetworkSpec((64,), 10, channels=64, steps=16, horizon=4.0)


def test_one_core_has_nothing_to_gain() -> None:
    assert advise(EVEN, 64, 1).startswith("Prefer strategy=backprop: there is one core")
    assert "one time step" in advise(NetworkSpec((64,), 10, channels=64, steps=1, horizon=1.0), 64, 4)


@pytest.mark.parametrize("workers", [2, 4])
def test_late_gradients_keep_equal_stages_busy_and_pipelines_that_empty_do_not(workers: int) -> None:
    found = options(EVEN, 64, workers)
    assert workers * 0.8 < found["delayed"].gain <= workers
    assert found["backprop"].gain < found["delayed"].gain
    assert (found["backprop"].staleness, found["delayed"].staleness) == (0, 1)
    assert found["dni"].gain < workers  # its estimators cost something


def test_two_sentences_name_the_command_and_the_gain() -> None:
    text = advise(EVEN, 64, 4)
    assert len(re.findall(r"[.;:](?= |$)", text)) >= 2 and text.count(". ") == 1
    assert "strategy=delayed strategy.stages=4 trainer.devices=4" in text
    assert f"{options(EVEN, 64, 4)['delayed'].gain:.2f} times" in text


def test_what_cannot_be_cut_evenly_stays_on_one_worker() -> None:
    wide = NetworkSpec((4096,), 10, channels=16, steps=2, horizon=1.0)  # all the work is in the opening
    assert advise(wide, 64, 2).startswith("Prefer strategy=backprop on one worker")
