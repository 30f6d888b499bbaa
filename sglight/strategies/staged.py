"""The LightningModule of a network in stages: validation, test, prediction and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from typing_extensions import override

from sglight.archive import DATA
from sglight.compat.lightning import trainer_of
from sglight.strategies import contents, flight, naming
from sglight.strategies.core import Batch, InStages, Shared
from sglight.strategies.evaluation import hits
from sglight.strategies.training import StagedTraining, limited

__all__ = ["Batch", "InStages", "Shared", "StagedModule", "limited"]


class StagedModule(StagedTraining):
    """A network cut into stages, trained in the order of a schedule with gradients from a source.

    The gradients that stages exchange are those of the loss summed over the samples, so that they do not depend on
    the batch size. Those of the parameters are divided by the batch size before the update: the mean loss is minimised.

    The stages may be in several processes; `place` sets which of them are here. All processes get the same batches in
    the same order, and the trained network does not depend on the placement.

    The module uses Lightning's manual optimisation. Callbacks get ``on_before_optimizer_step`` once for each stage
    here and each batch, and no ``on_after_backward``.

    Args:
        network: the fields of `NetworkSpec`, as plain containers.
        optimizer: of each stage, which has its own: ``name, lr, ...``, the keys of ``strategy.optimizer``.
        scheduler: of its learning rate: the keys of ``strategy.scheduler``.
        clip_norm: the largest norm of a stage's gradient; None for no limit.
        regularisation: the weights of the penalties: the keys of ``strategy.regularisation``.
        loss: the keys of ``strategy.loss``.
        stages: M, the number of stages.
        cuts: the first time steps of stages 1 to M - 1; None for stages of nearly equal cost.
        schedule: the order in which the stages act; by default one after the other.
        source: where their gradients come from; by default true gradients.
        diagnose_every_n_batches: compare the gradients that stages use with exact ones so often; 0 for never.
        multiple: a number of steps of which all cuts must be multiples.

    Attributes:
        arguments: those with which the module was constructed.
        plan: all of the above.
        level: how often the network has been refined; losses before and after a refinement do not compare.
        part: what a stage is called in messages.
        inputs_everywhere: whether all workers need the inputs, not only the worker with the first stage.
    """

    # Evaluation.

    @override
    def on_validation_start(self) -> None:
        self.average_statistics()

    @override
    def on_validation_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        if batch_idx == 0:
            self._compare_batches(batch, sum(self.trainer.num_val_batches), "the validation")

    @override
    def on_test_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        if batch_idx == 0:
            self._compare_batches(batch, sum(self.trainer.num_test_batches), "the test")

    @override
    def on_validation_model_zero_grad(self) -> None:
        """Keep the gradients: a validation within an epoch may come between the pieces that are summed."""

    def evaluate(self, batch: Batch) -> None:
        """Compute the stages here for this replica's part of a batch; the last stage adds up loss and hits."""
        x, labels = batch
        share = self.placement.replicas.share
        own, x = share(labels), None if x is None else share(x)
        for i, stage in self.own_stages() if len(own) else ():
            output = stage(self.runtime.enter(i, x, len(own)))
            if i < self.plan.last:
                self.runtime.send_state(i, output)
            else:
                self.evaluation.add(self.plan.loss.total(output, own), hits(output, own))
            self.evaluate_stage(i, output, own)
        self.evaluation.count(self.plan.loss.normaliser(labels), len(labels))

    def evaluate_stage(self, i: int, output: Tensor, labels: Tensor) -> None:
        """Is called with the output of stage i for each batch of an evaluation; override it to measure something."""

    def _log_evaluation(self, prefix: str) -> dict[str, float]:
        """Log mean loss and accuracy over all batches since the last call, on every worker."""
        means = {f"{prefix}/{name}": value for name, value in self.evaluation_means().items()}
        for name, value in means.items():
            self.log(name, value, prog_bar=name == "val/acc")
        return means

    def evaluation_means(self) -> dict[str, float]:
        """The values to log of all batches since the last call, on every worker."""
        return self.evaluation.take(self.placement.peers)

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluate(batch)

    @override
    def on_validation_epoch_end(self) -> None:
        accuracy = self._log_evaluation("val")["val/acc"]
        if self.trainer.sanity_checking:
            return
        for scheduler in self.schedulers():
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(accuracy)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluate(batch)

    @override
    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Probabilities ``[B, classes]`` of a batch with or without labels: ``x`` or ``(x, labels)``."""
        x = batch[0] if isinstance(batch, Sequence) else batch
        logits: Tensor = self(x)
        return logits.softmax(1)

    # Checkpoints.

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.average_statistics()
        checkpoint["sglight"] = self.identity()
        checkpoint["sglight_training"] = self.training_identity()
        checkpoint["progress"] = self.progress()
        checkpoint["in_flight"] = flight.state(self.runtime)
        checkpoint[DATA] = contents.plain_or_nothing(
            contents.of_data(getattr(self.trainer, "datamodule", None))
        )
        checkpoint[contents.ARGUMENTS] = contents.plain_or_nothing(self.arguments)
        naming.by_name(checkpoint, self.optimizer_names())

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trainer = trainer_of(self)
        training = self.training_identity() if trainer and trainer.state.fn == TrainerFn.FITTING else None
        path = getattr(trainer, "ckpt_path", None)
        name = f"ckpt_path={path}" if path else "this"
        naming.check(checkpoint, self.identity(), training, name)
        self.restore_progress(checkpoint["progress"])
        self._build()
        flight.restore(self.runtime, checkpoint.get("in_flight", {}))
        own = self.state_dict()
        naming.check_shapes(checkpoint["state_dict"], own, name)
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in own}
        naming.by_number(checkpoint, self.optimizer_names())

    def progress(self) -> dict[str, Any]:
        """The state of a training besides its parameters, in plain containers and tensors; the same on all workers."""
        return {
            "batch": self.runtime.batch, "round": self.runtime.round, "next_diagnosis": self.diagnosis.next,
        }  # fmt: skip

    def restore_progress(self, progress: Mapping[str, Any]) -> None:
        """Restore the state that `progress` returned; call it before the parameters are loaded."""
        self.runtime.begin(progress["batch"], progress["round"])
        self.diagnosis.next = progress["next_diagnosis"]

    def identity(self) -> dict[str, Any]:
        """The settings that must be the same in a checkpoint and in the module that loads it, by config key."""
        return naming.identity(type(self).__name__.lower(), self.plan)

    def training_identity(self) -> dict[str, Any]:
        """The settings that must also be the same for the training to continue from the checkpoint, by config key."""
        return naming.training_identity(self.plan)
