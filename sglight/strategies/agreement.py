"""Checks that a training in stages is possible: the right Trainer, and the same batches at all workers."""

from __future__ import annotations

from typing import Any
from zlib import crc32

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor

from sglight.errors import UserError
from sglight.link import Peers


def check_trainer(trainer: pl.Trainer) -> None:
    """Refuse a Trainer that would train wrongly without an error, because each stage steps its own optimiser.

    Only Lightning's `SingleDeviceStrategy` and strategies with `Peers` can train stages.

    Raises:
        UserError: for another strategy, or a precision that scales the loss.
    """
    strategy: Any = trainer.strategy
    if not isinstance(strategy, SingleDeviceStrategy) and not isinstance(
        getattr(strategy, "peers", None), Peers
    ):
        raise UserError(
            f"Trainer(strategy={type(strategy).__name__}) would train a network in each of its processes, and these "
            "would drift apart: stages step optimisers of their own, whose gradients it does not average; leave "
            "strategy out and give devices=1, or give strategy=sglight.parallel.strategy.StageStrategy()"
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise UserError(
            f"Trainer(precision={trainer.precision}) scales the loss of one optimiser, but every stage has its own; "
            "use bf16-mixed or 32-true"
        )


def check_batches(peers: Peers, labels: Tensor, batches: float, when: str) -> None:
    """Compare the labels of a batch, and the number of batches, between all workers; each waits for the others.

    Args:
        peers: all workers.
        labels: of the batch.
        batches: how many there are.
        when: what they are part of, for the message.

    Raises:
        UserError: if they differ.
    """
    if peers.size == 1:
        return
    known = peers.share((batches, list(labels.shape), checksum(labels)))
    counts = [count for count, *_ in known]
    if len(set(counts)) > 1:
        raise UserError(
            f"the workers have different numbers of batches in {when}, {', '.join(map(str, counts))}: give all of them "
            "the same data and limits"
        )
    if any(other != known[0] for other in known):
        raise UserError(
            f"the workers see different batches, by the labels of the first in {when}: give the DataLoader that "
            "shuffles a generator of its own, generator=torch.Generator().manual_seed(1), as workers may have drawn "
            "differently from the global one"
        )


def checksum(labels: Tensor) -> int:
    """A checksum of the bytes of labels."""
    return crc32(labels.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
