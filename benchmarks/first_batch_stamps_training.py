"""`strategy=backprop` that notes the beginning of each training batch; apart, because it imports torch."""

from __future__ import annotations

from typing import Any

from first_batch_stamps import stamp

from sglight.strategies import backprop


class Backprop(backprop.Backprop):
    """Backpropagation."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Is called by Lightning."""
        stamp("batch")
        super().on_train_batch_start(batch, batch_idx)
