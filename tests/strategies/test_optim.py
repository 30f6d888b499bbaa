"""Learning-rate schedules against their definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from sglight.strategies.optim import make_optimizer, make_scheduler

SETTINGS = {"warmup_epochs": 0, "step_epochs": 2, "gamma": 0.1, "patience": 1, "min_factor": 0.1}


def rates(name: str, epochs: int = 6, batches: int = 5, **settings: Any) -> list[float]:
    """The rate in each batch of a run with base rate 1."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler: Any = make_scheduler({"name": name, **SETTINGS, **settings}, optimizer, epochs, batches)
    found = []
    for _ in range(epochs * batches):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_none_keeps_the_rate() -> None:
    assert set(rates("none")) == {1.0}


def test_cosine_falls_from_one_to_its_floor() -> None:
    found = rates("cosine")
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * t / 30)) for t in range(30)]
    assert found == pytest.approx(expected)


def test_step_and_exponential_change_between_epochs() -> None:
    assert rates("step")[::5] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert rates("exponential", gamma=0.5)[::5] == pytest.approx([1, 0.5, 0.25, 0.125, 0.0625, 0.03125])
    assert len(set(rates("exponential")[:5])) == 1


def test_warmup_rises_to_the_full_rate_once() -> None:
    found = rates("cosine", warmup_epochs=2)
    assert found[:10] == pytest.approx([(t + 1) / 10 for t in range(10)])
    assert max(found) == found[9] == found[10] == 1.0
    assert rates("none", warmup_epochs=1)[4:] == [1.0] * 26


def test_plateau_waits_for_its_patience() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler: Any = make_scheduler({"name": "plateau", **SETTINGS}, optimizer, 5, 5)
    for accuracy in (0.5, 0.5, 0.5):
        scheduler.step(accuracy)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    for _ in range(10):
        scheduler.step(0.5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)  # min_factor


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_a_cut_tensor_is_updated_like_the_whole(name: str) -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(1003), torch.randn(5, 1003)

    def train(a: int, b: int) -> torch.Tensor:
        parameter = nn.Parameter(start[a:b].clone())
        optimizer = make_optimizer({"name": name, "lr": 0.01, "weight_decay": 0.1}, [parameter])
        for gradient in gradients:
            parameter.grad = gradient[a:b].clone()
            optimizer.step()
        return parameter.detach()

    assert torch.equal(torch.cat([train(0, 3), train(3, 500), train(500, 1003)]), train(0, 1003))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="adam, adamw or sgd"):
        make_optimizer({"name": "rmsprop", "lr": 1}, [nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match=r"scheduler\.name=linear"):
        rates("linear")
