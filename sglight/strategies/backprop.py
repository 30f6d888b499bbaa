"""Backpropagation through the whole network: the reference for every other strategy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from typing_extensions import override

from sglight.strategies.base import TIMED_EVERY, Batch, StagedModule


class Backprop(StagedModule):
    """The true gradient, one stage; arguments as in `StagedModule`."""

    def __init__(
        self,
        network: Mapping[str, Any],
        optimizer: Mapping[str, Any],
        scheduler: Mapping[str, Any] | None = None,
        clip_norm: float | None = None,
        regularisation: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(network, optimizer, scheduler, clip_norm, regularisation)

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, labels = batch
        t = self.global_step
        self.recorder.begin(t, timed=t % TIMED_EVERY == 0, cuda=labels.is_cuda)
        with self.recorder.phase("forward", 0):
            logits = self.stage(0)(x)
            loss = F.cross_entropy(logits, labels, reduction="sum")
        with self.recorder.phase("backward", 0):
            loss.backward()
            self.update(0, len(labels))
        self.record(loss, logits, labels)
        self.end_batch()
