"""The two checkpoints of a run, of its best and of its last epoch. Neither file is ever incomplete."""

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.trainer.states import TrainerFn
from typing_extensions import override

from sglight import signals
from sglight.archive import check_whole, seal
from sglight.compat.lightning import RedirectedCheckpoint
from sglight.errors import Terminated, UserError
from sglight.files import replacing, temporary_of
from sglight.strategies.staged import StagedModule

BEST, LAST = "best.ckpt", "last.ckpt"


class BestCheckpoint(RedirectedCheckpoint):
    """Keeps ``best.ckpt``, written after the epoch with the best value of a metric, also when a run is resumed.

    When the network is refined the search begins anew, so that the best checkpoint is one of the present network. A
    run that resumes from a checkpoint in another folder copies the best checkpoint from there.

    Args:
        folder: of the checkpoint.
        monitor: the name of the metric.
        mode: ``max`` if larger values are better, otherwise ``min``.
    """

    def __init__(self, folder: Path, monitor: str = "val/acc", mode: str = "max") -> None:
        super().__init__(
            folder,
            Path(BEST).stem,
            monitor,
            mode=mode,
            enable_version_counter=False,
            save_on_train_epoch_end=True,
        )
        self._earlier: dict[str, Any] | None = None
        self.best_metrics: dict[str, float] = {}
        self._level = 0
        self.validated_level: int | None = None  # the level (of refinement) at the last validation
        self._fresh = False  # whether there was a validation in this epoch

    @property
    @override
    def state_key(self) -> str:
        # The same for every metric, because a run may be resumed with another one.
        return type(self).__qualname__

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        with warnings.catch_warnings():
            # "Checkpoint directory exists and is not empty" is normal for a run that is resumed in its own folder.
            warnings.simplefilter("ignore")
            super().setup(trainer, pl_module, stage)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Only kept here: Lightning loads states for a test as well, but only a training uses them.
        self._earlier = state_dict

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not trainer.global_step:  # a new training with the same callback
            self._forget()
            self.forget_step()
        self.take_over(trainer, trainer.ckpt_path)

    def take_over(self, trainer: pl.Trainer, resumed_from: Any) -> None:
        """Continues with the best checkpoint of the run that is resumed, if its file still exists.

        Args:
            trainer: that resumes.
            resumed_from: the path of the checkpoint that was loaded.
        """
        earlier, self._earlier = self._earlier, None
        # Another version may have written less.
        if earlier is None or earlier.get("best_model_score") is None:
            return
        if (earlier.get("monitor"), earlier.get("mode")) != (self.monitor, self.mode):
            return
        if trainer.strategy.broadcast(trainer.is_global_zero and self._adopt(earlier, resumed_from)):
            path, score = str(self.path), earlier["best_model_score"]
            self.best_model_path = self.kth_best_model_path = path
            self.best_model_score = self.kth_value = self.current_score = score
            self.best_k_models = {path: score}
            self.best_metrics = earlier.get("best_metrics", {})
            self._level = earlier.get("level", 0)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self.validated_level, self._fresh = getattr(pl_module, "level", 0), True
            if not trainer.is_last_batch and str(self.monitor).startswith("val/"):
                self.on_train_epoch_end(
                    trainer, pl_module
                )  # with val_check_interval, the present network is saved

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._forget_coarser(getattr(pl_module, "level", 0))
        fresh, self._fresh = self._fresh, False
        if not fresh and str(self.monitor).startswith("val/"):
            return  # Lightning still has the value of an earlier validation
        if self.monitor in trainer.callback_metrics:
            super().on_train_epoch_end(trainer, pl_module)
        elif self.validated_level is not None:
            raise UserError(
                f"callbacks.checkpoint.monitor={self.monitor} is not a metric of this run; choose one of "
                f"{', '.join(sorted(trainer.callback_metrics))}"
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "mode": self.mode, "best_metrics": self.best_metrics, "level": self._level,
        }  # fmt: skip

    def _forget_coarser(self, level: int) -> None:
        if level != self._level:
            self._level = level
            self._forget()

    def _forget(self) -> None:
        self.best_model_path = self.kth_best_model_path = ""
        self.best_model_score = self.current_score = None
        self.best_k_models, self.best_metrics = {}, {}

    @property
    def path(self) -> Path:
        """The path of the checkpoint."""
        return Path(str(self.dirpath)) / BEST

    def _adopt(self, earlier: dict[str, Any], resumed_from: Any) -> bool:
        """Copies the best checkpoint of the earlier run into this folder; returns whether it was found.

        It may have been moved together with the checkpoint from which the run resumes. One with another score than
        ``earlier`` says is from a later epoch, and is not used.
        """
        beside = [Path(resumed_from).parent / BEST] if resumed_from else []
        for path in [*beside, Path(earlier.get("best_model_path", ""))]:
            if path.is_file() and self._score(path) == float(earlier["best_model_score"]):
                if not self.path.exists() or not path.samefile(self.path):
                    copy_whole(path, self.path)
                return True
        return False

    def _score(self, path: Path) -> float | None:
        """The score with which a checkpoint was the best one."""
        try:
            check_whole(path, str(path))
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            return float(checkpoint["callbacks"][self.state_key]["best_model_score"])
        except Exception:
            # Damaged, of another program or of another version: then there is no earlier best checkpoint.
            return None

    @override
    def write_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        self.best_metrics = {
            name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")
        }
        with _whole(trainer, Path(filepath)) as temporary:
            super().write_checkpoint(trainer, str(temporary))


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt``, from which a run can be resumed: written after every n-th epoch and after the last one.

    When a signal asks the run to end, it is written after the present batch as well. The Trainer must get this callback
    after `BestCheckpoint`, so that it contains the best score up to its own epoch.

    Args:
        folder: of the checkpoint.
        every_n_epochs: n.
    """

    def __init__(self, folder: Path, every_n_epochs: int = 1) -> None:
        self.path = folder / LAST
        self.every_n_epochs = every_n_epochs
        self._waiting = ExitStack()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._waiting.enter_context(signals.waiting_for_batches())

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._waiting.close()  # raises `Terminated` for a signal behind the last checkpoint

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        with suppress(Terminated):  # the exception that there is says why the run ends
            self._waiting.close()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_last_batch:
            return
        stops = _stops(pl_module, 2 * trainer.global_step)
        if stops or trainer.global_step == trainer.max_steps:
            self.write(trainer)
        if stops:
            signals.end_if_pending()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        done, stops = trainer.current_epoch + 1, _stops(pl_module, 2 * trainer.global_step + 1)
        due = done % self.every_n_epochs == 0 or done == trainer.max_epochs or trainer.should_stop
        # Not if max_time has stopped the epoch in the middle: a resumed run repeats it from the checkpoint before.
        if trainer.is_last_batch and (due or stops):
            self.write(trainer)
        if stops:
            signals.end_if_pending()

    def write(self, trainer: pl.Trainer) -> None:
        """Writes the checkpoint now."""
        with _whole(trainer, self.path) as temporary:
            trainer.save_checkpoint(temporary)


def _stops(module: pl.LightningModule, point: int) -> bool:
    """Whether all workers end at this point because one of them got a signal."""
    assert isinstance(module, StagedModule)
    return module.placement.peers.stops(point, signals.pending()) is not None


def copy_whole(source: Path, target: Path) -> None:
    """Copies a file; the target is never incomplete."""
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)


@contextmanager
def _whole(trainer: pl.Trainer, path: Path) -> Iterator[Path]:
    """Context with a temporary name to which to write a checkpoint.

    When it is complete it is sealed and gets its own name; other workers see it after their next collective call. If
    anything fails the temporary file is removed.
    """
    temporary = temporary_of(path)
    try:
        yield temporary
        if trainer.is_global_zero:
            seal(temporary)
            os.replace(temporary, path)
    finally:
        if trainer.is_global_zero:
            temporary.unlink(missing_ok=True)
