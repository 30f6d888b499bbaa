"""`stages.py --profile`: what the parts of a network cost, and what two stages cost for every cut, on one thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cases import ADAM, CASES, Batch, Case, make_batches
from contenders import dni
from machine import set_threads
from timing import Clock
from torch import Tensor, nn

from sglight.networks.network import Stage
from sglight.strategies.optim import make_optimizer

STAGE_0 = ("0 forward", "0 estimate", "0 backward", "0 update", "0 learn")
STAGE_1 = ("1 forward", "1 backward", "1 update")


def profile(network: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The costs of all parts and cuts; ``options`` are those of the command line."""
    set_threads(1)
    case, rounds = CASES[network], options["rounds"] or 30
    batches = make_batches(case, Path(options["raw_dir"]))
    return {
        "parts": profile_parts(case, batches, rounds),
        "cuts": profile_cuts(case, batches, rounds, options["around"]),
    }


class TwoStages:
    """Two stages with a cut at ``position``, trained as `DNI` does, in one process and without Lightning."""

    def __init__(self, case: Case, position: int, clock: Clock) -> None:
        spec, source = case.spec, dni(case).plan.source
        self.clock, self.position, self.time = clock, position, spec.time(position)
        self.first, self.second = Stage(spec, 0, position), Stage(spec, position)
        self.estimator: Any = source.make_estimator(spec, (0, position, spec.total_steps), 0)
        self.estimator.optimizer = make_optimizer(ADAM, self.estimator.parameters())
        self.optimizers = [make_optimizer(ADAM, stage.parameters()) for stage in (self.first, self.second)]
        self.buffer: Tensor | None = None

    def train(self, x: Tensor, y: Tensor) -> None:
        """One batch, every phase measured."""

        def phase(name: str, work: Callable[[], Any]) -> Any:
            return self.clock.time(f"{self.position} {name}", work)

        output = phase("0 forward", lambda: self.first(x))
        state = output.detach()
        if self.buffer is None:
            self.buffer = torch.empty_like(state)
        phase("copy", lambda: self.buffer.copy_(state))
        gradient = phase("0 estimate", lambda: self.estimator.estimate(state, y, self.time))
        phase("0 backward", lambda: output.backward(gradient))
        phase("0 update", lambda: self.update(0, len(y)))
        received = state.requires_grad_()
        logits = phase("1 forward", lambda: self.second(received))
        phase("1 backward", lambda: F.cross_entropy(logits, y, reduction="sum").backward())
        phase("1 update", lambda: self.update(1, len(y)))
        target = received.grad
        phase("0 learn", lambda: self.estimator.learn(state.detach(), y, target, self.time))

    def update(self, i: int, count: int) -> None:
        """Adam's step on the mean gradient."""
        optimizer = self.optimizers[i]
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        torch._foreach_mul_(gradients, 1 / count)
        optimizer.step()
        optimizer.zero_grad()

    def boundary(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """State and true gradient at the cut, as they lie in memory."""
        state = self.first(x).detach().requires_grad_()
        F.cross_entropy(self.second(state), y, reduction="sum").backward()
        assert state.grad is not None
        return state.detach(), state.grad


def profile_cuts(case: Case, batches: list[Batch], rounds: int, around: int) -> dict[int, dict[str, Any]]:
    """Phases of both stages, in turn for the chosen cut and ``around`` positions on either side of it."""
    steps, clock = case.spec.total_steps, Clock()
    chosen, cost = dni(case).cuts[1], dni(case).plan.source.cost(case.spec)
    positions = range(max(chosen - around, 1), min(chosen + around, steps - 1) + 1)
    splits = [TwoStages(case, position, clock) for position in positions]
    for x, y in islice(cycle(batches), rounds):
        for split in splits:
            split.train(x, y)
    times = clock.medians()
    return {
        p: {
            "chosen": p == chosen,
            "phases": {name: times[f"{p} {name}"] for name in (*STAGE_0, *STAGE_1, "copy")},
            "predicted": case.spec.stage_work([0, p, steps], cost),
        }
        for p in positions
    }


def profile_parts(case: Case, batches: list[Batch], rounds: int) -> dict[str, dict[str, float]]:
    """Forward + backward of a network's parts, and of the estimator at the chosen cut.

    A step is a quarter of the difference between stages of two and of six steps in the middle of the network.
    """
    position = dni(case).cuts[1]
    times = measure_parts(case, position, batches, rounds)
    six_steps, two_steps = times.pop("6 steps"), times.pop("2 steps")
    step = {kind: (six_steps[kind] - two_steps[kind]) / 4 for kind in six_steps}
    beside = {kind: two_steps[kind] - 2 * step[kind] for kind in step}
    parts = {"opening": times["opening"], "step": step, "beside the steps of a stage": beside, **times}
    counted = counted_work(case, position)
    for name in {*parts} & {*counted}:
        parts[name]["work"] = counted[name] * case.batch
        # What the cost model's count would have to be multiplied by.
        parts[name]["factor"] = parts[name]["cpu_ms"] / counted[name] * counted["step"] / step["cpu_ms"]
    return parts


def measure_parts(
    case: Case, position: int, batches: list[Batch], rounds: int
) -> dict[str, dict[str, float]]:
    """Medians of the parts, and of two and of six steps."""
    spec, clock = case.spec, Clock()
    split, middle = TwoStages(case, position, Clock()), spec.total_steps // 2
    two, six = Stage(spec, middle, middle + 2), Stage(spec, middle, middle + 6)
    whole = Stage(spec)
    state, gradient = split.boundary(*batches[0])
    assert whole.classifier is not None

    def both(module: nn.Module, forward: Callable[[], Tensor], gradient: Tensor | None) -> None:
        module.zero_grad()
        forward().backward(gradient)

    for x, y in islice(cycle(batches), rounds):
        leaf = state.clone().requires_grad_()
        works: list[tuple[str, Callable[[], Any]]] = [
            ("opening", lambda x=x: both(whole, lambda: whole.open(x), gradient)),
            ("2 steps", lambda s=leaf: both(two, lambda: two(s), gradient)),
            ("6 steps", lambda s=leaf: both(six, lambda: six(s), gradient)),
            (
                "classifier, loss",
                lambda s=leaf, y=y: both(whole, lambda: F.cross_entropy(whole.classifier(s), y), None),
            ),
            ("estimate", lambda y=y: split.estimator.estimate(state, y, split.time)),
            ("learn", lambda y=y: split.estimator.learn(state, y, gradient, split.time)),
        ]
        for name, work in works:
            leaf.grad = None
            clock.time(name, work)
    return clock.medians()


def counted_work(case: Case, position: int) -> dict[str, float]:
    """What the cost model counts for the parts, per sample: forward and backward are three passes."""
    spec = case.spec
    steps = spec.step_work()
    step = steps[spec.total_steps // 2]
    # The model's own count for an estimator is in units of 3 passes: one prediction, and one lesson.
    prediction = dni(case).plan.source.cost(spec)(spec.state_shape(position)) * 3 / 4  # type: ignore[operator]
    return {
        "opening": 3 * (steps[0] - step),
        "step": 3 * step,
        "classifier, loss": 3 * (steps[-1] - step),
        "estimate": prediction,
        "learn": 3 * prediction,
    }
