"""Local losses: each stage learns from a classifier at its end, and no gradient crosses a boundary.

Belilovsky et al. 2020, Nøkland & Eidnes 2019. With theta_i the parameters of stage i, phi_i those of the head at its
end and l_i(h_i, y) the head's loss (at the last stage, that of the network):

    h_i = stage_i(h_{i-1})                          sent to stage i + 1, detached
    theta_i <- optimiser(theta_i, dl_i/dtheta_i)
    phi_i <- optimiser(phi_i, dl_i/dphi_i)          on the same batch
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from torch import Tensor
from typing_extensions import override

from sglight.gradients import LocalLoss
from sglight.strategies.evaluation import Evaluation, hits
from sglight.strategies.loss import Loss
from sglight.strategies.schedule import Unanswered
from sglight.strategies.staged import Batch, InStages, StagedModule


class Local(StagedModule):
    """M stages with a local head at each of the M - 1 boundaries.

    Args:
        network, optimizer, shared: see `StagedModule`.
        stages: M, from 1 to the number of steps.
        head: ``name, hidden, ...``, the keys of ``strategy.head`` in ``conf/strategy/local.yaml``.
        ensemble: whether evaluations also log the loss and accuracy of the mean of all logits, those of the heads and
            of the network, as ``val/ensemble_acc`` and so on.
        diagnose_every_n_batches: compare the gradients that stages use with exact ones so often; 0 for never.
    """

    def __init__(
        self,
        network: Mapping[str, Any],
        optimizer: Mapping[str, Any],
        stages: int = 2,
        head: Mapping[str, Any] | None = None,
        ensemble: bool = False,
        diagnose_every_n_batches: int = 50,
        **shared: Unpack[InStages],
    ) -> None:
        loss = Loss(**dict(shared.get("loss") or {}))
        super().__init__(
            network, optimizer, **shared, stages=stages, schedule=Unanswered(), source=LocalLoss.of(head, loss),
            diagnose_every_n_batches=diagnose_every_n_batches,
        )  # fmt: skip
        self.ensemble, self.together = ensemble, Evaluation()

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.together = Evaluation()

    @override
    def evaluate_stage(self, i: int, output: Tensor, labels: Tensor) -> None:
        if not self.ensemble:
            return
        head = self.estimator(i) if i < self.plan.last else None
        logits = output if head is None else head(output)
        if i > 0:  # the sum of the logits of earlier stages, which follows the state
            logits = logits + self.placement.states[i - 1].receive(logits.shape)
        if head is not None:
            self.runtime.send_state(i, logits)
            return
        mean = logits / (self.plan.last + 1)
        self.together.add(self.plan.loss.total(mean, labels), hits(mean, labels))

    @override
    def evaluate(self, batch: Batch) -> None:
        super().evaluate(batch)
        self.together.count(self.plan.loss.normaliser(batch[1]), len(batch[1]))

    @override
    def evaluation_means(self) -> dict[str, float]:
        means = super().evaluation_means()
        if not self.ensemble:
            return means
        together = self.together.take(self.placement.peers)
        return means | {f"ensemble_{name}": value for name, value in together.items()}
