"""The local solvers on functions with known minima: how many steps, of which length, and what is kept of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sglight.strategies.pvd import PVD
from sglight.strategies.pvd.local import LBFGS, SOLVERS, Closure, FirstOrder, LocalSolver, Step
from tests.strategies.common import ADAM, NETWORK, batches, fit

SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.0}
CENTRE = torch.tensor([3.0, -4.0, 0.5])
CURVATURE = torch.tensor([1.0, 2.0, 4.0])


class Bowl:
    """f(x) = 1/2 sum_i c_i (x_i - centre_i)^2 over a block and scalars, as a processor's variables are."""

    def __init__(self) -> None:
        self.variables = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
        self.calls = 0

    @property
    def x(self) -> Tensor:
        return torch.cat([v.detach() for v in self.variables])

    def value(self) -> float:
        return 0.5 * float((CURVATURE * (self.x - CENTRE).square()).sum())

    def closure(self) -> float:
        """Gives the variables their gradients."""
        self.calls += 1
        gradient = CURVATURE * (self.x - CENTRE)
        self.variables[0].grad, self.variables[1].grad = gradient[:2].clone(), gradient[2:].clone()
        return self.value()


def step(optimizer: Optimizer, closure: Closure) -> None:
    optimizer.step(closure)


def descend(solver: LocalSolver, bowl: Bowl, batches: int = 1) -> Optimizer:
    """Take the solver's steps on so many batches; returns the optimiser."""
    optimizer = solver.optimizer(bowl.variables)
    for _ in range(batches):
        solver.descend(optimizer, bowl.closure, step)
    return optimizer


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("config", [SGD, ADAM], ids=["sgd", "adam"])
def test_every_solver_goes_down(name: str, config: dict[str, Any]) -> None:
    bowl = Bowl()
    before = bowl.value()
    descend(SOLVERS[name](config, 3, None), bowl, batches=2)
    assert bowl.value() < before


@pytest.mark.parametrize(("name", "steps"), [("first_order", 3), ("lbfgs", 1)])
def test_steps_are_taken_by_what_is_given(name: str, steps: int) -> None:
    bowl, taken = Bowl(), list[Optimizer]()
    solver = SOLVERS[name](SGD, 3, None)
    optimizer = solver.optimizer(bowl.variables)
    solver.descend(optimizer, bowl.closure, lambda optimizer, closure: taken.append(optimizer))
    assert taken == [optimizer] * steps
    assert not bowl.x.any() and not bowl.calls


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_first_order_takes_so_many_steps(steps: int) -> None:
    bowl = Bowl()
    descend(FirstOrder(SGD, steps, None), bowl)
    assert bowl.calls == steps
    # Gradient descent on a parabola: the error falls by 1 - lr c a step.
    torch.testing.assert_close(bowl.x - CENTRE, -CENTRE * (1 - 0.1 * CURVATURE) ** steps)


def test_first_order_clips_the_gradient_of_all_variables_at_every_step() -> None:
    bowl = Bowl()
    gradient = CURVATURE * -CENTRE
    descend(FirstOrder({**SGD, "lr": 1.0}, 1, 0.5), bowl)
    torch.testing.assert_close(bowl.x, -0.5 * gradient / gradient.norm())
    before = bowl.x
    descend(FirstOrder({**SGD, "lr": 1.0}, 2, 0.5), bowl)
    assert float((bowl.x - before).norm()) == pytest.approx(1.0, rel=0.05)


def test_a_gradient_within_the_norm_is_not_clipped() -> None:
    free, clipped = Bowl(), Bowl()
    descend(FirstOrder(SGD, 2, None), free)
    descend(FirstOrder(SGD, 2, 100.0), clipped)
    assert torch.equal(free.x, clipped.x)


def test_first_order_leaves_the_decay_to_the_objective() -> None:
    plain, decayed = Bowl(), Bowl()
    descend(FirstOrder(SGD, 3, None), plain)
    descend(FirstOrder({**SGD, "weight_decay": 0.5}, 3, None), decayed)
    assert torch.equal(plain.x, decayed.x)


def test_first_order_keeps_its_moments_over_batches() -> None:
    together, apart = Bowl(), Bowl()
    descend(FirstOrder(ADAM, 4, None), together)
    descend(FirstOrder(ADAM, 1, None), apart, batches=4)
    assert torch.equal(together.x, apart.x)


def test_l_bfgs_finds_the_minimum_with_more_steps_than_variables() -> None:
    reached = []
    for steps in (1, 3, 12):
        bowl = Bowl()
        descend(LBFGS(SGD, steps, None), bowl)
        reached.append(bowl.value())
    assert reached[0] > reached[1] > reached[2]
    torch.testing.assert_close(bowl.x, CENTRE, rtol=1e-3, atol=1e-3)


def test_l_bfgs_begins_anew_on_each_batch() -> None:
    bowl, again = Bowl(), Bowl()
    optimizer = descend(LBFGS(SGD, 2, None), bowl)
    assert not optimizer.state
    descend(LBFGS(SGD, 2, None), again, batches=2)
    # A fresh solver from the same point goes the same way.
    descend(LBFGS(SGD, 2, None), bowl)
    assert torch.equal(bowl.x, again.x)


def test_l_bfgs_refuses_to_clip() -> None:
    with pytest.raises(
        ValueError, match=r"strategy\.clip_norm does not go with strategy\.local_solver=lbfgs"
    ):
        LBFGS(ADAM, 1, 1.0)


@pytest.mark.parametrize(
    ("config", "moment"), [({**SGD, "momentum": 0.9}, "momentum_buffer"), (ADAM, "exp_avg")]
)
def test_a_restart_forgets_the_way_but_not_the_size(config: dict[str, Any], moment: str) -> None:
    solver = FirstOrder(config, 3, None)
    optimizer = descend(solver, Bowl())
    sizes = {p: state["exp_avg_sq"].clone() for p, state in optimizer.state.items() if "exp_avg_sq" in state}
    assert all(state[moment].any() for state in optimizer.state.values())
    solver.restart(optimizer)
    assert not any(state[moment].any() for state in optimizer.state.values())
    assert all(torch.equal(optimizer.state[p]["exp_avg_sq"], size) for p, size in sizes.items())


@pytest.mark.parametrize("name", SOLVERS)
def test_a_restart_goes_on_after_an_overflow(name: str) -> None:
    solver, bowl = SOLVERS[name](ADAM, 3, None), Bowl()
    optimizer = descend(solver, bowl)
    bowl.variables[0].data.fill_(1e30)
    solver.descend(optimizer, bowl.closure, step)
    bowl.variables[0].data.zero_()
    solver.restart(optimizer)
    before = bowl.value()
    solver.descend(optimizer, bowl.closure, step)
    assert bowl.value() < before


@pytest.mark.parametrize(
    ("name", "optimizer", "directions"),
    [
        ("first_order", "adam", "rms"), ("first_order", "adamw", "rms"), ("first_order", "sgd", "normalised"),
        ("lbfgs", "adam", "normalised"),
    ],
)  # fmt: skip
def test_directions_are_of_the_size_of_the_steps(name: str, optimizer: str, directions: str) -> None:
    assert SOLVERS[name]({**ADAM, "name": optimizer}, 1, None).directions == directions


def test_a_solver_is_added_as_a_class_and_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float | None, int]] = []

    class Signs(LocalSolver):
        """Steps against the signs of the gradient."""

        name = "signs"

        def optimizer(self, variables: Any) -> Optimizer:
            return torch.optim.SGD(variables, lr=self.config["lr"])

        def descend(self, optimizer: Optimizer, closure: Closure, step: Step) -> None:
            def signs() -> float:
                value = closure()
                seen.append((self.clip_norm, self.steps))
                for group in optimizer.param_groups:
                    for p in group["params"]:
                        p.grad = p.grad.sign()
                return value

            step(optimizer, signs)

    monkeypatch.setitem(SOLVERS, "signs", Signs)
    module = PVD(NETWORK, {**ADAM, "lr": 1e-3}, local_solver="signs", local_steps=2, clip_norm=3.0)
    report = fit(module, batches(3)).callback_metrics
    assert seen == [(3.0, 2)] * 3 * 2
    assert all(report[f"pvd/candidate_{i}"] < report["pvd/objective_before"] for i in range(2))
    assert module.describe().startswith("pvd, signs; 2 processors, normalised directions")
