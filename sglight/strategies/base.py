"""What all strategies share: building stages, a stage's descent, evaluation, optimisers and logging."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from typing_extensions import override

from sglight.networks import NetworkSpec, Stage
from sglight.networks.network import ExtraCost
from sglight.networks.regularisers import penalty
from sglight.strategies.optim import make_optimizer, make_scheduler

Batch = tuple[Tensor, Tensor]

# Fields of a network that may change between a checkpoint and its resumption: they shape no parameter and no state.
FREE = ("seed", "reversible", "init", "init_scale")


class StagedModule(pl.LightningModule):
    """A network in one or more stages, trained with manual optimisation.

    Gradients are those of the summed loss on their way through the network, and divided by the batch size where
    they meet the parameters: the mean loss is minimised, and what crosses a boundary does not depend on the
    batch size.

    Callbacks see ``on_before_optimizer_step`` once a batch, for the first stage here, and no ``on_after_backward``.

    Args:
        network: the fields of `NetworkSpec`, as plain containers.
        optimizer, scheduler: see `optim.py`; every stage has its own.
        clip_norm: largest norm of a stage's gradient; None for no limit.
        regularisation: weights of the penalties in `sglight.networks.regularisers.penalty`.
        stages: M.
    """

    def __init__(
        self,
        network: Mapping[str, Any],
        optimizer: Mapping[str, Any],
        scheduler: Mapping[str, Any] | None = None,
        clip_norm: float | None = None,
        regularisation: Mapping[str, float] | None = None,
        stages: int = 1,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.spec = NetworkSpec(**network)
        self.optimizer_config = dict(optimizer)
        self.scheduler_config = dict(scheduler or {"name": "none"})
        self.clip_norm = clip_norm
        self.regularisation = dict(regularisation or {})
        self.cuts = self.spec.cuts(stages, self.extra_cost())
        self.stages = nn.ModuleDict()
        self._sums: Tensor | None = None
        self._seen = 0

    def extra_cost(self) -> ExtraCost:
        """What a stage spends besides its own forward pass, for the balance of the cuts."""
        return 0.0

    def describe(self) -> str:
        """The strategy in a line, for the summary of a run."""
        o, schedule = self.optimizer_config, self.scheduler_config["name"]
        rate = f"{o['lr']:g}" + (f" ({schedule})" if schedule != "none" else "")
        return f"{type(self).__name__.lower()}, {o['name']}, rate {rate}"

    def estimator_parameters(self, i: int) -> int:
        """How many parameters the estimator behind stage i has; 0 without one."""
        return 0

    @override
    def configure_model(self) -> None:
        # Lightning may call this more than once.
        if not self.stages:
            for i in range(len(self.cuts) - 1):
                self.stages[str(i)] = Stage(self.spec, self.cuts[i], self.cuts[i + 1])

    def stage(self, i: int) -> Stage:
        """Stage i."""
        stage = self.stages[str(i)]
        assert isinstance(stage, Stage)
        return stage

    def own_stages(self) -> Iterator[tuple[int, Stage]]:
        """The stages that live here, in order."""
        for key in self.stages:
            yield int(key), self.stage(int(key))

    @override
    def configure_optimizers(self) -> Any:
        epochs = self.trainer.max_epochs or 1
        # Loads the data: `num_training_batches` is not known yet.
        batches = max(int(self.trainer.estimated_stepping_batches) // epochs, 1)
        configured = []
        for name, optimizer in self.make_optimizers():
            scheduler = make_scheduler(self.scheduler_config, optimizer, epochs, batches)
            configured.append(
                {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "name": f"lr/{name}"}}
            )
        return configured

    def make_optimizers(self) -> list[tuple[str, Optimizer]]:
        """Named optimisers: the stages' first, then what a strategy adds."""
        return [
            (f"stage_{i}", make_optimizer(self.optimizer_config, stage.parameters()))
            for i, stage in self.own_stages()
        ]

    def descend(self, i: int, output: Tensor, gradient: Tensor | None, count: int) -> None:
        """Backpropagate through stage i from ``gradient`` at ``output`` (None: a loss), and update the stage.

        ``count`` is the batch size B by which the summed gradient is divided.
        """
        stage = self.stage(i)
        output.backward(gradient)
        parameters = [p for p in stage.parameters() if p.grad is not None]
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1 / count)
        extra = penalty([stage], **self.regularisation)
        if extra is not None:
            extra.backward()
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        self.step_optimizer(i)

    def step_optimizer(self, i: int) -> None:
        """Update stage i and clear its gradients.

        Only the first optimiser steps through Lightning's wrapper: that is what counts `global_step`, so that it
        counts batches however many optimisers there are.
        """
        index = list(self.stages).index(str(i))
        optimizer: Any = self.wrapped_optimizers()[index]
        if index > 0:
            optimizer = optimizer.optimizer
        optimizer.step()
        optimizer.zero_grad()

    def wrapped_optimizers(self) -> list[Any]:
        """Lightning's wrappers of all optimisers."""
        optimizers = self.optimizers()
        return optimizers if isinstance(optimizers, list) else [optimizers]

    def schedulers(self) -> list[Any]:
        """All learning-rate schedules."""
        schedulers = self.lr_schedulers()
        return [] if schedulers is None else schedulers if isinstance(schedulers, list) else [schedulers]

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["sglight"] = self.identity()

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on with the module that loads it, by the keys that set it."""
        network = {
            f"model.{name}": plain(value) for name, value in vars(self.spec).items() if name not in FREE
        }
        return {"strategy": type(self).__name__.lower(), "strategy.stages": len(self.cuts) - 1, **network}

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        for scheduler in self.schedulers():
            if isinstance(scheduler, LRScheduler) and not isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step()

    @override
    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            return
        for scheduler in self.schedulers():
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(self.trainer.callback_metrics["val/acc"])

    def record(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch's summed loss and hits to the running means, and log these every ``log_every_n_steps``."""
        hits = (logits.detach().argmax(1) == labels).sum()
        now = torch.stack([loss.detach().float(), hits.float()])
        self._sums = now if self._sums is None else self._sums + now
        self._seen += len(labels)
        if self.is_logging:
            mean_loss, accuracy = (self._sums / self._seen).tolist()
            self.log("train/loss", mean_loss, prog_bar=True)
            self.log("train/acc", accuracy, prog_bar=True)
            self._sums, self._seen = None, 0

    @property
    def is_logging(self) -> bool:
        """Whether Lightning writes what is logged in this batch (asked after the optimiser's step)."""
        trainer: Any = self.trainer  # Lightning does not declare the attribute
        return self.global_step % trainer.log_every_n_steps == 0

    @override
    def forward(self, x: Tensor) -> Tensor:
        for _, stage in self.own_stages():
            x = stage(x)
        return x

    def _evaluate(self, batch: Batch, prefix: str) -> None:
        x, labels = batch
        logits = self(x)
        accuracy = (logits.argmax(1) == labels).float().mean()
        self.log(f"{prefix}/loss", F.cross_entropy(logits, labels), batch_size=len(labels))
        self.log(f"{prefix}/acc", accuracy, batch_size=len(labels), prog_bar=prefix == "val")

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test")


def plain(value: Any) -> Any:
    """Tuples as lists, as they come back from a file."""
    return list(value) if isinstance(value, tuple) else value
