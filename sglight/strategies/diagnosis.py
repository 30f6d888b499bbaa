"""How good the gradients are that stages use, against exact ones, now and then and without a trace in the training.

For a batch that is looked at, a stage's exact gradient is that of backpropagation through all stages, with their
weights just before the stage's update by that batch. Estimators are compared in the same pass.
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

# Of the parameters' gradient of a stage; staleness is in updates.
MEASURED = ("cosine", "relative_error", "staleness")


@dataclass
class _Look:
    """A batch that is looked at.

    Attributes:
        x, labels: the batch. stages: of which the gradient is measured. round: in which they update.
        staleness: of each. exact: their exact gradients, once known.
        used: by boundary, the gradients of its pieces that stages have used. at: the exact ones there, once known.
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
    """Looks at gradients in batches that are logged, and at least ``every`` batches apart; 0 for never.

    An exact pass costs about as much as a batch, and each worker waits for its neighbours in it. Where stages update in
    different rounds, which would take a pass for each, they are looked at in turn.

    Attributes:
        next: the first batch in which that may be. count: how often it has been.
    """

    def __init__(self, every: int) -> None:
        self.every, self.next, self.count = every, 0, 0
        self._look: _Look | None = None

    def is_due(self, batch: int, log_every: int) -> bool:
        """Whether to look at this batch, the training's ``batch``-th."""
        if self._look is not None or not (self.every and log_every):
            return False
        if (batch + 1) % log_every or batch < self.next:
            return False
        self.next = batch + self.every
        return True

    def forget(self) -> None:
        """Look at no batch any more."""
        self._look = None

    def begin(self, runtime: Runtime, x: Tensor | None, labels: Tensor) -> None:
        """Look at the batch that comes next."""
        schedule, last = runtime.plan.schedule, runtime.plan.last
        pieces = range(runtime.round, runtime.round + schedule.pieces)
        rounds: defaultdict[int, list[int]] = defaultdict(list)
        for i in range(last + 1):
            for n in range(pieces[-1], pieces[-1] + schedule.latency(last) + 1):
                if Action("update", i, pieces[-1]) in set(schedule.actions(n, range(i, i + 1), last)):
                    rounds[n].append(i)
        chosen = sorted(rounds)[self.count % len(rounds)]
        staleness = {i: fmean(schedule.staleness(i, p, last) for p in pieces) for i in rounds[chosen]}
        self._look = _Look(x, labels, rounds[chosen], chosen, runtime.batch, staleness)
        self.count += 1

    @override
    def before_round(self, runtime: Runtime, n: int) -> None:
        """Find the exact gradients if it is the round in which the stages update."""
        if self._look is not None and self._look.round == n:
            self._look.exact, self._look.at = exact_pass(runtime, self._look.x, self._look.labels)

    @override
    def on_gradient(self, i: int, passage: Passage, gradient: Tensor) -> None:
        """Remember what a stage uses for a batch that is looked at."""
        look = self._look
        if look is not None and passage.batch == look.batch and i in look.stages:
            look.used[i].append(gradient.clone())

    @override
    def before_update(self, runtime: Runtime, i: int, n: int, normaliser: float) -> None:
        """Compare what a stage is about to use with what would be exact."""
        look = self._look
        if look is None or look.round != n or i not in look.stages:
            return
        parameters = [p for p in runtime.stage(i).parameters() if p.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        used = torch.cat([g.flatten() for g in gradients]) / normaliser
        exact = look.exact.pop(i)
        known = compare(used[None], exact[None])
        measured = {"cosine": known["cosine"], "relative_error": known["relative_error"]}
        runtime.comparisons |= {f"stage_{i}/{kind}": value for kind, value in measured.items()}
        runtime.comparisons[f"stage_{i}/staleness"] = torch.tensor(look.staleness[i])
        if i in look.used:
            at_boundary = compare(torch.cat(look.used[i]), look.at[i]).items()
            runtime.comparisons |= {f"boundary_{i}/{kind}": value for kind, value in at_boundary}

    @override
    def after_round(self, n: int) -> None:
        """Be done with the batch if its stages have updated."""
        if self._look is not None and self._look.round <= n:
            self._look = None


def exact_pass(
    runtime: Runtime, x: Tensor | None, labels: Tensor
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """The exact gradients of the stages here, flat, of the mean loss over a batch with the weights as they are now.

    And those of the summed loss with respect to the states at the boundaries here.

    One pass forward and back through all stages for each piece of the batch, in which each worker waits for its
    neighbours. Estimators that predict are compared on the way: see `Runtime.comparisons`.
    """
    runtime.collect()
    pieces, replicas = runtime.plan.schedule.pieces, runtime.placement.replicas
    inputs = [None] * pieces if x is None else x.tensor_split(pieces)
    totals: dict[int, Tensor] = {}
    at: defaultdict[int, list[Tensor]] = defaultdict(list)
    with own_statistics(runtime.stages):
        for piece, y in zip(inputs, labels.tensor_split(pieces), strict=True):
            if len(mine := replicas.share(y)):
                part = None if piece is None else replicas.share(piece)
                for i, gradient in _exact_piece(runtime, part, mine, at).items():
                    totals[i] = gradient if i not in totals else totals[i] + gradient
    for i in runtime.placement.own if replicas.size > 1 else ():
        if i not in totals:  # no sample of the batch is this replica's
            totals[i] = (
                torch.cat([p.flatten() for p in runtime.stage(i).parameters() if p.requires_grad]).detach()
                * 0
            )
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
            runtime.hand_down(i, outputs[i].detach())
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
            runtime.hand_up(i, gradients[0])
            gradients = gradients[1:]
        found[i] = torch.cat([g.flatten() for g in gradients])
    return found
