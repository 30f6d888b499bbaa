"""Local losses: each stage learns from a classifier at its end, and no gradient crosses a boundary.

Belilovsky et al. 2020, Nøkland & Eidnes 2019. For batch t, stage i with parameters theta_i, head phi_i at its end:

    h_i = stage_i(h_{i-1})                          handed on, detached
    theta_i <- optimiser(theta_i, dl_i/dtheta_i)    l_i(h_i, y) the head's loss; the last stage has the network's
    phi_i <- optimiser(phi_i, dl_i/dphi_i)          in the same batch
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
    """M stages, heads at the M - 1 boundaries; arguments as in `StagedModule`, and

    Args:
        stages: M, from 1 to the number of steps.
        head: the settings of `LocalLoss`.
        ensemble: whether evaluations also log loss and accuracy of the mean of the heads' and the network's logits, as
            ``val/ensemble_acc`` and so on.
        diagnose_every_n_batches: least number of batches between two comparisons of the gradients that stages use with
            true ones, each at the cost of one locked pass; 0 for never.
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
        if i > 0:  # the sum of those before, behind the state
            logits = logits + self.placement.states[i - 1].receive(logits.shape)
        if head is not None:
            self.runtime.hand_down(i, logits)
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
