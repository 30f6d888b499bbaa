"""The interface of gradient sources: where the gradient at the end of a stage comes from."""

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
    """A microbatch on its way through one stage: everything that is kept of it from forward pass to last use.

    Attributes:
        piece: the number of the microbatch since the pipeline was last empty.
        batch: the number of the batch since the beginning of the training.
        labels: ``[B]``.
        entered: the input of the stage: samples, or the state from the stage before. After the backward pass its
            ``grad`` is the gradient with respect to that state.
        output: of the stage, with autograd's graph, until the backward pass.
        state: the output without a graph, as the next stage gets it.
        normaliser: the summed loss of its batch is divided by this for the mean.
        weights: copies of the parameters with which the forward pass was computed, if an update comes before the
            backward pass; None for the parameters themselves.
        target: the true gradient of the summed loss with respect to the state, once it has been received.
        lesson: the loss from which the estimator has learnt, if it learnt while it gave the gradient.
        ends: the outputs of the segments of the stage, if its states are rebuilt from them.
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
    """The boundary after a stage.

    Attributes:
        stage: the number of the stage.
        time: network time at the boundary, in [0, 1].
        estimator: what `GradientSource.make_estimator` returned for it.
    """

    stage: int
    time: float
    estimator: Any = None


class GradientSource(ABC):
    """Gives each stage except the last, which has the loss, the gradient dL/dh at its end.

    L is the loss summed over the samples, so that gradients are those of each sample. A source has no state: what
    learns is an estimator at each boundary, which the strategy keeps.

    Attributes:
        lesson_every: n, if estimators learn from every n-th batch; 0 if there are none.
        predicts: whether `gradient` is computed by the stage itself, not received from the next stage.
        stashes: whether a backward pass needs the weights of its forward pass.
        rebuilds: whether a backward pass rebuilds states from the output of the stage.
        learns_together: whether the estimators of replicas learn the same, each from its part of a batch.
    """

    lesson_every: int = 0
    predicts: ClassVar[bool] = False
    stashes: ClassVar[bool] = False
    rebuilds: ClassVar[bool] = False
    learns_together: bool = True

    @abstractmethod
    def gradient(self, boundary: Boundary, passage: Passage, true: Tensor | None) -> Tensor:
        """The gradient with respect to ``passage.state``, with the shape of that.

        Args:
            boundary: after the stage.
            passage: the microbatch.
            true: the gradient that the next stage has sent; None if the schedule does not wait for it.
        """

    @abstractmethod
    def wants(self, batch: int) -> bool:
        """Whether the stage after a boundary must send the true gradient of that batch."""

    def forward(self, stage: Stage, passage: Passage) -> Tensor:
        """The forward pass: the output of the stage for ``passage.entered``."""
        return stage(passage.entered)

    def output(self, stage: Stage, passage: Passage) -> Tensor:
        """The output through which the backward pass goes: that of the forward pass, or computed again."""
        if passage.output is None:  # the microbatch was in flight when the training was interrupted
            return run(stage, passage, statistics=False)
        return passage.output

    def learn(self, boundary: Boundary, passage: Passage) -> Tensor:
        """Let the estimator learn from ``passage.target``; returns its loss before that."""
        raise AssertionError("this source has no estimators")

    def estimate(self, boundary: Boundary, passage: Passage) -> Tensor:
        """The gradient that the estimator predicts, whether or not it is used."""
        raise AssertionError("this source has no estimators")

    def make_estimator(self, spec: NetworkSpec, cuts: Sequence[int], stage: int) -> nn.Module | None:
        """The estimator for the boundary after a stage; None for a source without estimators."""
        return None

    def estimator_optimizer(self) -> dict[str, Any]:
        """The settings of the optimiser of the estimators."""
        raise AssertionError("this source has no estimators")

    def cost(self, spec: NetworkSpec) -> ExtraCost:
        """The cost of the source for each stage, added to the cost of its time steps (see `NetworkSpec.cuts`)."""
        return 0.0

    def passes(self) -> tuple[float, float]:
        """How `cost` divides into predicting and learning: passes through an estimator for each."""
        return 0.0, 0.0

    def part(self, batch: int) -> float:
        """The weight of the true gradient when it arrives later than the prediction."""
        return 0.0

    @property
    def has_estimators(self) -> bool:
        """Whether there are estimators at the boundaries, used or not."""
        return self.predicts or self.lesson_every > 0

    def describe(self) -> str:
        """A short description for the summary of a run; may be empty."""
        return ""

    def identity(self) -> dict[str, Any]:
        """The config keys, with their values, that a checkpoint must share so that its estimators fit."""
        return {}

    def training_identity(self) -> dict[str, Any]:
        """Further config keys that a checkpoint must share so that a training can resume from it."""
        return {}


def compare(estimate: Tensor, true: Tensor) -> dict[str, Tensor]:
    """How well a gradient ``[B, ...]`` agrees with the true one.

    Returns:
        ``cosine``, the mean over the samples; ``relative_error`` ||estimate - true|| / ||true||; ``norm_ratio``
        ||estimate|| / ||true||; ``sign_agreement``, the part of entries with equal signs.

    >>> import torch
    >>> found = compare(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
    >>> {name: float(value) for name, value in found.items()}
    {'cosine': 1.0, 'relative_error': 1.0, 'norm_ratio': 2.0, 'sign_agreement': 1.0}
    """
    e, t = estimate.flatten(1), true.flatten(1)
    cosine = F.cosine_similarity(e, t, dim=1).mean()
    same = (e.sign() == t.sign()).to(e.dtype).mean()
    values = (cosine, (e - t).norm() / t.norm(), e.norm() / t.norm(), same)
    return dict(zip(COMPARED, values, strict=True))


def run(stage: Stage, passage: Passage, statistics: bool = True) -> Tensor:
    """The output of a stage for ``passage.entered``, with ``passage.weights`` if it has some.

    Args:
        stage: to be run.
        passage: the microbatch.
        statistics: whether to update running statistics of normalisation.
    """
    with own_statistics(stage, statistics):
        if passage.weights is None:
            return stage(passage.entered)
        return functional_call(stage, passage.weights, (passage.entered,))


@contextmanager
def own_statistics(module: nn.Module, keep: bool = False) -> Iterator[None]:
    """Context in which forward passes update copies of the running statistics, so that earlier graphs stay valid.

    Args:
        module: has the statistics.
        keep: whether to copy the updated values back at the end.
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
