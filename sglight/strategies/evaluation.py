"""Mean loss and accuracy over batches, which are known to the worker with the last stage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from sglight.link import Peers


class RunningMeans:
    """Mean loss and accuracy of the training batches since the last call of `take`."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._normaliser = 0.0
        self._samples = 0

    def add(self, loss: Tensor, right: Tensor, normaliser: float, samples: int) -> None:
        """Adds a batch or a piece of one: its summed loss, and the number of samples classified correctly."""
        sums = torch.stack([loss.detach().float(), right.float()])
        self._sums = sums if self._sums is None else self._sums + sums
        self._normaliser += normaliser
        self._samples += samples

    def take(self) -> dict[str, Tensor]:
        """``loss`` and ``acc``, and begins anew; empty if no batch was added at this worker."""
        if self._sums is None:
            return {}
        loss, right = self._sums.unbind()
        means = {"loss": loss / self._normaliser, "acc": right / self._samples}
        self._sums, self._normaliser, self._samples = None, 0.0, 0
        return means

    @property
    def weights(self) -> dict[str, float]:
        """The weights of ``loss`` and ``acc`` in the means over several workers."""
        return {"loss": self._normaliser, "acc": float(self._samples)}

    def sum_of_losses(self) -> float:
        """The sum of the losses since then; 0 at a worker that does not know them."""
        return 0.0 if self._sums is None else float(self._sums[0])

    def state(self) -> dict[str, Any]:
        """The sums since then as plain values, for a checkpoint; may be empty."""
        if self._sums is None:
            return {}
        return {"sums": self._sums.tolist(), "normaliser": self._normaliser, "samples": self._samples}

    @classmethod
    def joined(cls, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The `state` for the samples of all workers, from the states of the workers."""
        whole = dict[str, Any]()
        if known := [state for state in states if "sums" in state]:
            whole["sums"] = [
                math.fsum(column) for column in zip(*(state["sums"] for state in known), strict=True)
            ]
            whole |= {name: sum(state[name] for state in known) for name in ("normaliser", "samples")}
        if epochs := [state["epoch"] for state in known if "epoch" in state]:
            whole["epoch"] = cls.joined(epochs)
        return whole

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continues from a `state`."""
        sums = state.get("sums")
        self._sums = None if sums is None else torch.tensor(sums, device=device)
        self._normaliser, self._samples = state.get("normaliser", 0.0), state.get("samples", 0)


class TrainingMeans(RunningMeans):
    """`RunningMeans`, with a second one for the whole epoch in the attribute ``epoch``."""

    def __init__(self) -> None:
        super().__init__()
        self.epoch = RunningMeans()

    @override
    def add(self, loss: Tensor, right: Tensor, normaliser: float, samples: int) -> None:
        super().add(loss, right, normaliser, samples)
        self.epoch.add(loss, right, normaliser, samples)

    @override
    def state(self) -> dict[str, Any]:
        epoch = self.epoch.state()
        return {**super().state(), "epoch": epoch} if epoch else {}

    @override
    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        super().load(state, device)
        self.epoch.load(state.get("epoch", {}), device)


class Evaluation:
    """Loss and accuracy of a validation or test: one worker adds them, all workers count the samples."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._normaliser = 0.0
        self._samples = 0

    def add(self, loss: Tensor, right: Tensor) -> None:
        """Adds a batch at one worker: its summed loss, and the number of samples classified correctly."""
        self._sums.append(torch.stack([loss, right.to(loss.dtype)]))

    def count(self, normaliser: float, samples: int) -> None:
        """Counts a batch, at every worker."""
        self._normaliser += normaliser
        self._samples += samples

    def take(self, peers: Peers) -> dict[str, float]:
        """``loss`` and ``acc`` over all batches, at every worker, and starts again at zero; waits for all workers."""
        sums = torch.stack(self._sums).double().cpu().tolist() if self._sums else [[0.0, 0.0]]
        columns = [math.fsum(column) for column in zip(*sums, strict=True)]
        loss, right = peers.total(columns).result()
        means = {"loss": loss / self._normaliser, "acc": right / self._samples}
        self._sums, self._normaliser, self._samples = [], 0.0, 0
        return means


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """The number of samples that are classified correctly.

    >>> hits(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    tensor(1)
    """
    return (logits.argmax(1) == labels).sum()
