"""A strategy with a bug and a slow data set, for tests of what a run makes of them."""

import os
from pathlib import Path
from time import sleep
from typing import Any

from sglight.data.planar import PlanarData
from sglight.strategies.dni import DNI


class FailingDNI(DNI):
    """Raises in batch 3 where the last stage lives."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3 and self.plan.last in self.placement.own:
            raise ArithmeticError("this is the bug")
        super().training_step(batch, batch_idx)


class SlowToPrepare(PlanarData):
    """Stands still when it is prepared the first time."""

    def prepare_data(self) -> None:
        flag = Path(os.environ["SGLIGHT_PREPARED"])
        if not flag.exists():
            sleep(4)
            flag.touch()
        super().prepare_data()
