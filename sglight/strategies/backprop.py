"""Backpropagation through the whole network: the reference for every other strategy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from sglight.strategies.staged import Shared, StagedModule


class Backprop(StagedModule):
    """The true gradient, one stage; arguments as in `StagedModule`."""

    def __init__(
        self,
        network: Mapping[str, Any],
        optimizer: Mapping[str, Any],
        diagnose_every_n_batches: int = 0,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(network, optimizer, **shared, diagnose_every_n_batches=diagnose_every_n_batches)
