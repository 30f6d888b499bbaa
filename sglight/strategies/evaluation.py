"""Means over batches that are known where the last stage is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from sglight.link import Peers


class RunningMeans:
    """Loss and accuracy of the training batches since the last time they were asked for."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._normaliser = 0.0
        self._samples = 0

    def add(self, loss: Tensor, right: Tensor, normaliser: float, samples: int) -> None:
        """A batch, or a piece of it, by its summed loss and the number of samples that are right."""
        sums = torch.stack([loss.detach().float(), right.float()])
        self._sums = sums if self._sums is None else self._sums + sums
        self._normaliser += normaliser
        self._samples += samples

    def take(self) -> dict[str, Tensor]:
        """``loss`` and ``acc``, or nothing if no batch was added here; begins anew."""
        if self._sums is None:
            return {}
        loss, right = self._sums.unbind()
        means = {"loss": loss / self._normaliser, "acc": right / self._samples}
        self._sums, self._normaliser, self._samples = None, 0.0, 0
        return means

    @property
    def weights(self) -> dict[str, float]:
        """Of how much ``loss`` and ``acc`` are means: by such weights those of several workers become one."""
        return {"loss": self._normaliser, "acc": float(self._samples)}

    def sum_of_losses(self) -> float:
        """Of what has been added since; 0 on a worker that does not know them."""
        return 0.0 if self._sums is None else float(self._sums[0])

    def state(self) -> dict[str, Any]:
        """What has been added since, in plain values; empty if nothing was."""
        if self._sums is None:
            return {}
        return {"sums": self._sums.tolist(), "normaliser": self._normaliser, "samples": self._samples}

    @classmethod
    def joined(cls, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The `state` of one worker that has seen all samples, from those of several."""
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
        """Go on from a `state`."""
        sums = state.get("sums")
        self._sums = None if sums is None else torch.tensor(sums, device=device)
        self._normaliser, self._samples = state.get("normaliser", 0.0), state.get("samples", 0)


class TrainingMeans(RunningMeans):
    """The same, and besides, as ``epoch``, over the batches since that was asked for."""

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
    """Loss and accuracy over the batches of a validation or test: one worker knows them, all count the samples."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._normaliser = 0.0
        self._samples = 0

    def add(self, loss: Tensor, right: Tensor) -> None:
        """What a batch has come to: its summed loss, and the number of samples that are right; on one worker."""
        self._sums.append(torch.stack([loss, right.to(loss.dtype)]))

    def count(self, normaliser: float, samples: int) -> None:
        """That there was a batch; on every worker."""
        self._normaliser += normaliser
        self._samples += samples

    def take(self, peers: Peers) -> dict[str, float]:
        """``loss`` and ``acc`` over all batches, at every worker, each of which waits for the others; begins anew."""
        sums = torch.stack(self._sums).double().cpu().tolist() if self._sums else [[0.0, 0.0]]
        columns = [math.fsum(column) for column in zip(*sums, strict=True)]
        loss, right = peers.total(columns).result()
        means = {"loss": loss / self._normaliser, "acc": right / self._samples}
        self._sums, self._normaliser, self._samples = [], 0.0, 0
        return means


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """How many are right."""
    return (logits.argmax(1) == labels).sum()
