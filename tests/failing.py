"""A strategy with a bug, for tests of what a run says of it."""

from typing import Any

from sglight.strategies.dni import DNI


class FailingDNI(DNI):
    """Raises in batch 3 where the last stage lives."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3 and self.last in self.placement.own:
            raise ArithmeticError("this is the bug")
        super().training_step(batch, batch_idx)
