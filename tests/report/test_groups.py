"""Groups over seeds against an independent count, and the columns that tell them apart."""

import itertools
from pathlib import Path

import pytest

from sglight.errors import UserError
from sglight.report.groups import show, tasks
from sglight.report.runs import Run, _flat
from tests.report.common import config


def run(name: str = "a", state: str = "finished", changed: float = 0.0, **keys) -> Run:
    """A run with the names that `read_config` derives."""
    flat = dict(_flat(config(**keys)))
    names = {
        "dataset": flat["dataset.name"],
        "model": flat["model.dynamics"],
        "strategy": flat["strategy._target_"].rpartition(".")[2],
    }
    return Run(Path(name), state, config={**names, **flat}, changed=changed)


def test_runs_that_differ_in_seeds_only_are_a_group():
    values = list(itertools.product(("backprop", "dni"), (4, 8), (1, 2, 3)))
    runs = [run(strategy=s, model__steps=n, seed=seed) for s, n, seed in reversed(values)]
    (task,) = tasks(runs)
    assert [dict(group.columns) for group in task.groups] == [
        {"strategy": s, "model.steps": n} for s in ("backprop", "dni") for n in (4, 8)
    ]
    assert all(sorted(r.seed for r in group.runs) == [1, 2, 3] for group in task.groups)
    assert [group.label for group in task.groups][1] == "backprop · steps 8"
    assert not any(group.mixed for group in task.groups)


def test_what_is_not_compared_does_not_separate_runs():
    same = [
        {},
        {"data_dir": "/other"},
        {"ckpt": "a/last.ckpt", "seed": 2},
        {"dataset__raw_dir": "/x", "seed": 3},
        {"callbacks": {"progress": {"enabled": False}}},
        {"callbacks": {"progress": {"enabled": True}}, "trainer__show_schedule": True},
    ]
    (task,) = tasks([run(**keys) for keys in same])
    assert len(task.groups) == 1 and not task.differences


def test_columns_have_the_shortest_names_that_say_which_key_it_is():
    def both(alone: bool, figures: bool):
        return run(callbacks={"a": {"enabled": alone}, "b": {"enabled": figures}}, strategy__lag=int(alone))

    (task,) = tasks([both(True, True), both(False, False)])
    assert task.groups[0].label == "backprop · lag 0 · a.enabled false · b.enabled false"


def test_labels_leave_out_what_most_groups_share():
    settings = [(4, 1), (8, 1), (16, 1), (16, 2)]
    (task,) = tasks([run(model__steps=steps, trainer__devices=n) for steps, n in settings])
    labels = [group.label for group in task.groups]
    assert labels == [f"backprop · steps {n}" for n in (4, 8, 16)] + ["backprop · steps 16 · devices 2"]
    (task,) = tasks([run(), run(strategy="dni")], ["model.steps"])
    assert [group.label for group in task.groups] == ["all runs"]


def test_tests_and_trials_stand_aside():
    trial = run(strategy="dni")
    trial = Run(trial.folder, trial.state, config={**trial.config, "debug": "limit"})
    (task,) = tasks([run(mode="test", ckpt="a.ckpt"), trial, run()])
    assert [group.label for group in task.groups] == ["backprop"]
    assert (trial.aside, run(mode="test").aside, run(state="failed").aside, run().aside) == (
        "debug=limit", "test", "failed", "",
    )  # fmt: skip


def test_settings_of_which_no_run_has_come_to_anything_are_left_out():
    (task,) = tasks([run(), run(strategy="dni", state="failed"), run(strategy="pvd", state="diverged")])
    assert [group.label for group in task.groups] == ["backprop", "pvd"]
    assert tasks([run(state="failed")]) == []


def test_only_equal_data_and_epochs_compare():
    settings = [
        {},
        {"trainer__max_epochs": 9},
        {"dataset__validation_fraction": 0.2},
        {"dataset__batch_size": 8},
    ]
    found = tasks([run(**each) for each in settings])
    assert [(task.dataset, len(task.groups)) for task in found] == [
        ("digits, 5 epochs", 2),
        ("digits, 9 epochs", 1),
        ("digits, validation_fraction 0.2, 5 epochs", 1),
    ]
    (task,) = tasks([run(**each) for each in settings[:2]], ["max_epochs"])
    assert len(task.groups) == 2


def test_of_paths_the_last_part_is_shown():
    assert show("/home/me/outputs/a/last.ckpt") == "last.ckpt"


def test_data_sets_are_apart_and_groups_are_numbered_through():
    runs = [run(dataset__name=name, strategy=s) for name in ("digits", "peaks") for s in ("backprop", "dni")]
    found = tasks(runs)
    assert [task.dataset for task in found] == ["digits", "peaks"]
    assert [group.number for task in found for group in task.groups] == [0, 1, 2, 3]


def test_keys_that_names_imply_are_no_differences_unless_they_vary_by_themselves():
    (task,) = tasks([run(), run(strategy="dni", model__dynamics="leapfrog")])
    assert not {"strategy._target_", "model.dynamics", "dataset.name"} & {*task.differences}
    odd = run(model__dynamics="leapfrog")
    odd = Run(odd.folder, odd.state, config={**odd.config, "model": "hamiltonian"})
    (task,) = tasks([run(), odd])
    assert "model.dynamics" in task.differences and len(task.groups) == 2
    assert [group.columns.get("model.dynamics") for group in task.groups] == ["hamiltonian", "leapfrog"]


def test_a_key_that_only_some_have_is_a_column_only_if_these_differ():
    two = [run("a"), run("b", "finished", 0.0, strategy="dni", strategy__stages=2)]
    assert [*tasks(two)[0].groups[1].columns] == ["strategy"]
    three = [*two, run("c", "finished", 0.0, strategy="dni", strategy__stages=4)]
    groups = tasks(three)[0].groups
    assert [dict(group.columns).get("strategy.stages") for group in groups] == [None, 2, 4]


def test_only_finished_runs_count_and_the_others_are_told():
    states = ["finished", "failed", "finished", "diverged", "running", "failed"]
    (task,) = tasks([run(str(i), state, seed=i) for i, state in enumerate(states)])
    (group,) = task.groups
    assert [r.seed for r in group.finished] == [0, 2]
    assert group.counted == {"finished": 2, "failed": 2, "diverged": 1, "running": 1}


def test_of_equal_runs_the_newest_counts():
    (task,) = tasks([run("old", changed=1.0), run("new", changed=3.0), run("b", changed=2.0, seed=2)])
    (group,) = task.groups
    assert [r.folder.name for r in group.finished] == ["new", "b"]
    assert group.counted == {"finished": 2, "repeated": 1}


def test_by_puts_together_what_is_equal_in_its_keys_and_says_what_is_not():
    runs = [run(strategy=s, model__steps=n) for s in ("backprop", "dni") for n in (4, 8)]
    (task,) = tasks(runs, ["strategy"])
    assert [(g.label, len(g.runs), g.mixed) for g in task.groups] == [
        ("backprop", 2, ["model.steps"]),
        ("dni", 2, ["model.steps"]),
    ]
    (task,) = tasks([run(model__dynamics="leapfrog"), run()], ["strategy"])
    assert task.groups[0].mixed == ["model"] and task.differences == ["model"]


def test_by_takes_the_last_part_of_a_key_and_refuses_what_no_run_has():
    assert [*tasks([run()], ["steps"])[0].groups[0].columns] == ["model.steps"]
    with pytest.raises(UserError, match="--by stepz: no run has this key"):
        tasks([run()], ["stepz"])
    twice = Run(Path("a"), "finished", config={**run().config, "a.rate": 1, "b.rate": 1})
    with pytest.raises(UserError, match=r"--by rate may be a\.rate or b\.rate"):
        tasks([twice], ["rate"])


def test_a_run_without_a_config_is_in_no_group():
    assert tasks([Run(Path("a"), "damaged")]) == []


@pytest.mark.parametrize(
    ("value", "text"), [(True, "true"), (None, "null"), ([1, 2.5], "[1, 2.5]"), (0.001, "0.001"), ("a", "a")]
)
def test_values_are_shown_as_on_the_command_line(value, text):
    assert show(value) == text
