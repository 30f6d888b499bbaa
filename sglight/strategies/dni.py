"""Decoupled neural interfaces: stages learn from synthetic gradients and do not wait for each other.

Jaderberg et al. 2017. For batch t, with theta_i the parameters of stage i and SG_i the estimator at its end:

    h_i = stage_i(h_{i-1})                     sent to stage i + 1, detached
    d_i = SG_i(h_i, y)                         at the last stage, the gradient of the loss
    theta_i <- optimiser(theta_i, J_i^T d_i)   and dL/dh_{i-1} is sent to stage i - 1
    SG_i learns from (h_i, y, dL/dh_i) of batch t - lag
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from sglight.gradients import Synthetic
from sglight.strategies.loss import Loss
from sglight.strategies.schedule import Decoupled
from sglight.strategies.staged import InStages, StagedModule


class DNI(StagedModule):
    """M stages with an estimator at each of the M - 1 boundaries.

    Args:
        network, optimizer, shared: see `StagedModule`.
        stages: M, from 1 to the number of steps.
        lag: how many batches old the true gradient is from which an estimator learns.
        estimator: ``name, hidden, ...``, the keys of ``strategy.estimator`` in ``conf/strategy/dni.yaml``.
        diagnose_every_n_batches: compare the gradients that stages use with exact ones so often; 0 for never.

    >>> network = {"shape": (2,), "classes": 3, "channels": 4, "steps": 8}
    >>> print(DNI(network, {"name": "adam", "lr": 0.01}, stages=2).describe())
    dni, adam, rate 0.01; 2 stages, lag 1; mlp estimators that see the label
    """

    def __init__(
        self,
        network: Mapping[str, Any],
        optimizer: Mapping[str, Any],
        stages: int = 2,
        lag: int = 1,
        estimator: Mapping[str, Any] | None = None,
        diagnose_every_n_batches: int = 50,
        **shared: Unpack[InStages],
    ) -> None:
        super().__init__(
            network, optimizer, **shared, stages=stages, schedule=Decoupled(lag),
            source=Synthetic.of(estimator, network.get("kernel", "dense"), Loss(**dict(shared.get("loss") or {}))),
            diagnose_every_n_batches=diagnose_every_n_batches,
        )  # fmt: skip
