"""Where the gradient at a stage's end comes from: the interface that all sources share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from sglight.networks import NetworkSpec, Stage
from sglight.networks.network import ExtraCost

COMPARED = ("cosine", "relative_error", "norm_ratio", "sign_agreement")


@dataclass(eq=False)
class Passage:
    """A piece of a batch in one stage, from its forward pass until nothing of it is needed any more.

    Attributes:
        piece: its number since the pipeline was last empty. batch: since the beginning of the training.
        labels: ``[B]``.
        entered: what the stage began with, samples or the state from the stage before; holds the gradient with respect
            to that state after the backward pass.
        output: of the stage, with autograd's graph, until the backward pass.
        state: the output without a graph, as the next stage gets it.
        normaliser: what the summed loss of its batch is divided by for the mean.
        weights: copies of the stage's parameters, by name, on which it went forward where an update comes before its
            backward pass; None for the parameters themselves.
        target: the true gradient of the summed loss with respect to the state, once it has been received.
        lesson: the loss by which the source has learnt from it, if it has in giving a gradient.
        ends: the outputs of the stage's segments, where its states are rebuilt from them.
    """

    piece: int
    batch: int
    labels: Tensor
    entered: Tensor | None
    output: Tensor | None
    state: Tensor
    normaliser: float = 1.0
    weights: dict[str, Tensor] | None = None
    target: Tensor | None = None
    lesson: Tensor | None = None
    ends: list[Tensor] | None = None


@dataclass(frozen=True)
class Boundary:
    """The cut behind a stage.

    Attributes:
        stage: its number. time: network time there, in [0, 1].
        estimator: what `GradientSource.make_estimator` has made for it, if anything.
    """

    stage: int
    time: float
    estimator: Any = None


class GradientSource(ABC):
    """Where the gradient at a stage's end comes from, for all stages but the last, which has the loss.

    Gradients are per sample: those of the loss summed over the samples. A source is a description without a state of
    its own: what learns is an estimator, which the strategy keeps.

    Attributes:
        lesson_every: estimators learn from every so manieth batch; 0 if there are none.
        predicts: whether `gradient` is computed here, which takes time, rather than received.
        stashes: whether a backward pass needs the weights of its forward pass.
        rebuilds: whether it rebuilds states from the stage's output.
        learns_together: whether the estimators of replicas learn the same, each from its part of a batch.
    """

    lesson_every: int = 0
    predicts: ClassVar[bool] = False
    stashes: ClassVar[bool] = False
    rebuilds: ClassVar[bool] = False
    learns_together: bool = True

    @abstractmethod
    def gradient(self, boundary: Boundary, passage: Passage, true: Tensor | None) -> Tensor:
        """The gradient with respect to ``passage.state``.

        Args:
            true: what the stage after the boundary has sent, where the schedule waits for it.
        """

    @abstractmethod
    def wants(self, batch: int) -> bool:
        """Whether the stage after a boundary has to send the true gradient of that batch."""

    def forward(self, stage: Stage, passage: Passage) -> Tensor:
        """The stage's output for ``passage.entered``, which the next one gets."""
        return stage(passage.entered)

    def output(self, stage: Stage, passage: Passage) -> Tensor:
        """What the backward pass goes through: the output with its graph, of the forward pass or computed again."""
        if passage.output is None:  # of a piece that was in flight when the training was interrupted
            return run(stage, passage, statistics=False)
        return passage.output

    def learn(self, boundary: Boundary, passage: Passage) -> Tensor:
        """Teach the estimator ``passage.target``; returns its loss before that."""
        raise AssertionError("this source has no estimators")

    def estimate(self, boundary: Boundary, passage: Passage) -> Tensor:
        """What the estimator says of a passage, whether or not it is used."""
        raise AssertionError("this source has no estimators")

    def make_estimator(self, spec: NetworkSpec, cuts: Sequence[int], stage: int) -> nn.Module | None:
        """What learns at the boundary behind a stage; None for nothing."""
        return None

    def estimator_optimizer(self) -> dict[str, Any]:
        """The optimiser of the estimators."""
        raise AssertionError("this source has no estimators")

    def cost(self, spec: NetworkSpec) -> ExtraCost:
        """What the source costs a stage for a batch, in units of its forward and backward passes together."""
        return 0.0

    def passes(self) -> tuple[float, float]:
        """How the parts of `cost`, for gradients and for lessons, are to each other: passes through an estimator."""
        return 0.0, 0.0

    def part(self, batch: int) -> float:
        """Of the true gradient, where it arrives later."""
        return 0.0

    @property
    def has_estimators(self) -> bool:
        """Whether something at the boundaries estimates gradients, used or not."""
        return self.predicts or self.lesson_every > 0

    def describe(self) -> str:
        """In a few words, for the summary of a run; empty if there is nothing to say."""
        return ""

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on for the estimators' parameters to fit, by the keys that set it."""
        return {}

    def training_identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on besides for a training to go on from it, by the keys that set it."""
        return {}


def compare(estimate: Tensor, true: Tensor) -> dict[str, Tensor]:
    """How two gradients ``[B, ...]`` agree.

    Mean cosine over the batch, relative error of the whole, ratio of the norms, share of entries with the same sign.
    """
    e, t = estimate.flatten(1), true.flatten(1)
    cosine = F.cosine_similarity(e, t, dim=1).mean()
    same = (e.sign() == t.sign()).to(e.dtype).mean()
    values = (cosine, (e - t).norm() / t.norm(), e.norm() / t.norm(), same)
    return dict(zip(COMPARED, values, strict=True))


def run(stage: Stage, passage: Passage, statistics: bool = True) -> Tensor:
    """A stage's output for what a passage entered with, by the passage's weights.

    Args:
        statistics: whether running statistics change.
    """
    with own_statistics(stage, statistics):
        if passage.weights is None:
            return stage(passage.entered)
        return functional_call(stage, passage.weights, (passage.entered,))


@contextmanager
def own_statistics(module: nn.Module, keep: bool = False) -> Iterator[None]:
    """Run forward passes in training mode on copies of the running statistics, which become theirs only if kept.

    So a graph stays good when later passes change them.
    """
    owners = [(m, name, buffer) for m in module.modules() for name, buffer in m.named_buffers(recurse=False)]
    for owner, name, buffer in owners:
        setattr(owner, name, buffer.clone())
    try:
        yield
    finally:
        for owner, name, buffer in owners:
            if keep:
                buffer.copy_(owner.get_buffer(name))
            setattr(owner, name, buffer)
