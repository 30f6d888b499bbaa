"""Compares the gradients that stages use with exact ones, on some batches, without any effect on the training.

The exact gradient of a stage is that of backpropagation through all stages, with the weights that they have just before
the stage updates with that batch. The predictions of estimators are compared in the same pass.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor
from typing_extensions import override

from sglight.gradients import Passage
from sglight.gradients.base import compare, own_statistics
from sglight.strategies.runtime import Observer, Runtime
from sglight.strategies.schedule import Action

# The comparisons for the gradient of a stage's parameters; staleness is in updates.
MEASURED = ("cosine", "relative_error", "staleness")


@dataclass
class _Comparison:
    """The comparison on one batch.

    Attributes:
        x, labels: the batch.
        stages: whose gradients are compared.
        round: in which these stages update.
        batch: the number of the batch.
        staleness: of each stage.
        exact: the exact gradient of each stage, once it is known.
        used: for each boundary, the gradients of the pieces that the stage used.
        at: for each boundary, the exact gradient, once it is known.
    """

    x: Tensor | None
    labels: Tensor
    stages: list[int]
    round: int
    batch: int
    staleness: dict[int, float]
    exact: dict[int, Tensor] = field(default_factory=dict)
    used: defaultdict[int, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    at: dict[int, Tensor] = field(default_factory=dict)


class Diagnosis(Observer):
    """Compares gradients on batches that are logged and at least ``every`` batches apart; 0 for never.

    An exact pass costs about as much as a batch, and each worker waits for its neighbours in it. If stages update in
    different rounds, each would need a pass of its own; then they are compared in turn.

    Attributes:
        next: the first batch on which the next comparison may be made.
        count: how many comparisons were made.
    """

    def __init__(self, every: int) -> None:
        self.every, self.next, self.count = every, 0, 0
        self._comparison: _Comparison | None = None

    def is_due(self, batch: int, log_every: int) -> bool:
        """Whether to compare on this batch; sets `next` if so."""
        if self._comparison is not None or not (self.every and log_every):
            return False
        if (batch + 1) % log_every or batch < self.next:
            return False
        self.next = batch + self.every
        return True

    def forget(self) -> None:
        """Drops a comparison that has begun."""
        self._comparison = None

    def begin(self, runtime: Runtime, x: Tensor | None, labels: Tensor) -> None:
        """Begins a comparison on the batch that comes next."""
        schedule, last = runtime.plan.schedule, runtime.plan.last
        pieces = range(runtime.round, runtime.round + schedule.pieces)
        rounds: defaultdict[int, list[int]] = defaultdict(list)
        for i in range(last + 1):
            for n in range(pieces[-1], pieces[-1] + schedule.latency(last) + 1):
                if Action("update", i, pieces[-1]) in set(schedule.actions(n, range(i, i + 1), last)):
                    rounds[n].append(i)
        chosen = sorted(rounds)[self.count % len(rounds)]
        staleness = {i: fmean(schedule.staleness(i, p, last) for p in pieces) for i in rounds[chosen]}
        self._comparison = _Comparison(x, labels, rounds[chosen], chosen, runtime.batch, staleness)
        self.count += 1

    @override
    def before_round(self, runtime: Runtime, n: int) -> None:
        """Computes the exact gradients in the round in which the stages update."""
        comparison = self._comparison
        if comparison is not None and comparison.round == n:
            comparison.exact, comparison.at = exact_pass(runtime, comparison.x, comparison.labels)

    @override
    def on_gradient(self, i: int, passage: Passage, gradient: Tensor) -> None:
        """Keeps the gradient that a stage uses at its boundary."""
        comparison = self._comparison
        if comparison is not None and passage.batch == comparison.batch and i in comparison.stages:
            comparison.used[i].append(gradient.clone())

    @override
    def before_update(self, runtime: Runtime, i: int, n: int, normaliser: float) -> None:
        """Compares the gradient with which a stage is about to update with the exact one."""
        comparison = self._comparison
        if comparison is None or comparison.round != n or i not in comparison.stages:
            return
        parameters = [p for p in runtime.stage(i).parameters() if p.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        used = torch.cat([g.flatten() for g in gradients]) / normaliser
        exact = comparison.exact.pop(i)
        known = compare(used[None], exact[None])
        measured = {"cosine": known["cosine"], "relative_error": known["relative_error"]}
        runtime.comparisons |= {f"stage_{i}/{kind}": value for kind, value in measured.items()}
        runtime.comparisons[f"stage_{i}/staleness"] = torch.tensor(comparison.staleness[i])
        if i in comparison.used:
            at_boundary = compare(torch.cat(comparison.used[i]), comparison.at[i]).items()
            runtime.comparisons |= {f"boundary_{i}/{kind}": value for kind, value in at_boundary}

    @override
    def after_round(self, n: int) -> None:
        """Ends the comparison when its stages have updated."""
        if self._comparison is not None and self._comparison.round <= n:
            self._comparison = None


def exact_pass(
    runtime: Runtime, x: Tensor | None, labels: Tensor
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """The exact gradients of a batch for the stages of this worker, with their present weights.

    They are computed by one forward and backward pass through all stages for each piece of the batch, in which each
    worker waits for its neighbours. The predictions of estimators are compared on the way, see `Runtime.comparisons`.

    Returns:
        for each stage, the gradient of the mean loss with respect to its parameters, as a vector; for each boundary,
        the gradient of the summed loss with respect to the states.
    """
    runtime.collect()
    replicas = runtime.placement.replicas
    totals: dict[int, Tensor] = {}
    at: defaultdict[int, list[Tensor]] = defaultdict(list)
    with own_statistics(runtime.stages):
        for part, mine in runtime.shares(x, labels):
            if len(mine):
                for i, gradient in _exact_piece(runtime, part, mine, at).items():
                    totals[i] = gradient if i not in totals else totals[i] + gradient
    for i in runtime.placement.own if replicas.size > 1 else ():
        if i not in totals:  # this replica has no samples of the batch
            trained = [p.detach().flatten() for p in runtime.stage(i).parameters() if p.requires_grad]
            totals[i] = torch.zeros_like(torch.cat(trained))
        replicas.sum(totals[i])
    normaliser = runtime.plan.loss.normaliser(labels)
    means = {i: total / normaliser for i, total in totals.items()}
    return means, {i: torch.cat(parts) for i, parts in at.items()}


def _exact_piece(
    runtime: Runtime, x: Tensor | None, labels: Tensor, at: defaultdict[int, list[Tensor]]
) -> dict[int, Tensor]:
    plan, own = runtime.plan, runtime.placement.own
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    found: dict[int, Tensor] = {}
    for i in own:
        inputs[i] = runtime.enter(i, x, len(labels)).detach().requires_grad_(i > 0)
        outputs[i] = runtime.stage(i)(inputs[i])
        if i < plan.last:
            runtime.send_state(i, outputs[i].detach())
    for i in reversed(own):
        state, gradient = outputs[i].detach(), None
        if i == plan.last:
            outputs[i] = plan.loss.total(outputs[i], labels)
        else:
            gradient = runtime.receive_gradient(i, len(labels))
            at[i].append(gradient.clone())
            if plan.source.predicts:
                runtime.compare_estimate(i, Passage(0, 0, labels, None, None, state), gradient)
        parameters = [p for p in runtime.stage(i).parameters() if p.requires_grad]
        wanted = [inputs[i], *parameters] if i > 0 else parameters
        gradients = torch.autograd.grad(outputs[i], wanted, gradient, materialize_grads=True)
        if i > 0:
            runtime.send_gradient(i, gradients[0])
            gradients = gradients[1:]
        found[i] = torch.cat([g.flatten() for g in gradients])
    return found
