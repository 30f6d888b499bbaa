"""Figures of the literature stand beside the runs that they belong to, and beside no others."""

import re
from dataclasses import replace

import pytest

from sglight.report.groups import tasks
from sglight.report.literature import beside, references
from sglight.report.measures import MEASURES, compare
from tests.report.test_groups import run


def found(**keys):
    one = replace(run(**keys), metrics={"test/acc": 0.95})
    (task,) = tasks([replace(one, config={**one.config, "dataset": one.config["dataset.name"]})])
    return [(entry.reference.where, entry.reference.text, entry.ours) for entry in beside(compare(task))]


def test_every_entry_can_be_looked_up_and_is_a_part_of_one():
    metrics = {measure.key for measure in MEASURES}
    for entry in references():
        assert entry.metric in metrics and entry.source and entry.differs and entry.match
        assert re.search(r"table \d|\.log\b", entry.where, re.IGNORECASE)
        assert 0 < entry.value < 1


@pytest.mark.parametrize(("conditional", "text"), [(True, "82.20 %"), (False, "62.30 %")])
def test_a_run_finds_the_figure_of_its_method(conditional, text):
    settings = {"dataset__name": "cifar10", "model__kernel": "conv", "strategy": "dni"}
    estimator = {"strategy__estimator": {"conditional": conditional}}
    ((where, theirs, ours),) = found(**settings, **estimator, strategy__stages=4)
    assert (theirs, ours) == (text, "95.00 %") and "dni.log" in where
    assert found(**settings, **estimator, strategy__stages=1) == []


@pytest.mark.parametrize(
    "keys", [{}, {"dataset__name": "cifar10"}, {"dataset__name": "mnist", "strategy": "multilevel"}]
)
def test_other_runs_find_none(keys):
    assert found(**keys) == []
