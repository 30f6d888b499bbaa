"""Figures of the literature stand beside the runs that they belong to, and beside no others."""

from dataclasses import replace

import pytest

from sglight.report.groups import tasks
from sglight.report.literature import beside, references
from sglight.report.measures import MEASURES, compare
from tests.report.test_groups import run


def found(**keys):
    one = replace(run(**keys), metrics={"test/acc": 0.95})
    (task,) = tasks([replace(one, config={**one.config, "dataset": one.config["dataset.name"]})])
    return [(entry.reference.setting, entry.reference.text, entry.ours) for entry in beside(compare(task))]


def test_every_entry_is_complete_and_a_part_of_one():
    metrics = {measure.key for measure in MEASURES}
    for entry in references():
        assert entry.metric in metrics and entry.source and entry.setting and entry.match
        assert all(0 < value < 1 for value in entry.values)
        assert isinstance(entry.exact, bool)


@pytest.mark.parametrize(
    ("conditional", "text"), [(True, "about 97.80 % to 98.40 %"), (False, "about 95.70 % to 98.10 %")]
)
def test_a_run_finds_the_figure_of_its_method(conditional, text):
    settings = {
        "dataset__name": "mnist",
        "strategy": "dni",
        "strategy__estimator": {"conditional": conditional},
    }
    ((_, theirs, ours),) = found(**settings, strategy__stages=4)
    assert (theirs, ours) == (text, "95.00 %")
    ((setting, theirs, _),) = found(**settings, strategy__stages=1)  # which is backpropagation
    assert setting.endswith("backpropagation") and theirs == "about 98.00 % to 98.20 %"


def test_a_public_log_is_exact_and_the_paper_is_quoted_from_memory():
    texts = [text for _, text, _ in found(dataset__name="cifar10", model__kernel="conv")]
    assert texts == ["about 82.10 % to 84.30 %", "84.70 %"]


def test_a_list_has_all_values_that_a_key_may_have():
    settings = {"strategy": "multilevel", "model__steps": 64}
    runs = [
        replace(run(**settings, strategy__levels=levels), metrics={"time/fit_s": time})
        for levels, time in ((1, 10.0), (2, 8.0), (5, 5.0))
    ]
    (task,) = tasks(runs)
    ((entry),) = beside(compare(task))
    assert entry.group.columns["strategy.levels"] == 2
    assert (entry.ours, entry.reference.text) == ("20.00 %", "about 40.00 %")


@pytest.mark.parametrize(
    "keys", [{}, {"dataset__name": "cifar10"}, {"dataset__name": "mnist", "strategy": "multilevel"}]
)
def test_other_runs_find_none(keys):
    assert found(**keys) == []
