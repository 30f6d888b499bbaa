"""TensorBoard's pages of custom scalars, what belongs together over all runs, and of hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.tensorboard.summary import hparams

from sglight.compat.tensorboard import add_summary

# Keys of the config and metrics on the page of hyperparameters.
HYPERPARAMETERS = (
    "seed", "dataset.name", "dataset.batch_size", "model.dynamics", "model.kernel", "model.steps", "model.horizon",
    "model.channels", "strategy.stages", "strategy.cuts", "strategy.microbatches", "strategy.slack",
    "strategy.backward", "strategy.lag", "strategy.estimator.name", "strategy.processors",
    "strategy.synchronisation", "strategy.levels", "strategy.prolongation", "strategy.optimizer.name",
    "strategy.optimizer.lr", "trainer.max_epochs", "trainer.precision", "trainer.devices",
)  # fmt: skip
COLUMNS = ("val/acc", "val/loss", "test/acc", "test/loss", "time/epoch_s", "memory/peak_bytes")
# By category and chart, regular expressions of tags. A chart without data stays empty.
LAYOUT = {
    "accuracy": {
        "training": [r"^train/acc$"],
        "validation": [r"^val/acc$"],
        "test": [r"^test/acc$"],
    },
    "loss": {
        "training": [r"^train/loss$"],
        "validation": [r"^val/loss$"],
        "test": [r"^test/loss$"],
    },
    "stages": {
        "cosine of the gradient used with the exact one": [r"^stage_\d+/cosine$"],
        "relative error": [r"^stage_\d+/relative_error$"],
        "staleness in updates": [r"^stage_\d+/staleness$"],
        "error of rebuilt states": [r"^stage_\d+/drift$"],
    },
    "estimators": {
        "cosine with the true gradient": [r"^estimator_\d+/cosine$"],
        "relative error": [r"^estimator_\d+/relative_error$"],
        "ratio of the norms": [r"^estimator_\d+/norm_ratio$"],
        "agreement of signs": [r"^estimator_\d+/sign_agreement$"],
        "loss": [r"^estimator_\d+/loss$"],
    },
    "levels": {
        "level": [r"^level$"],
        "validation loss around a refinement": [r"^refinement/"],
    },
    "workers": {
        "busy [s an epoch]": [r"^worker_\d+/busy_s$"],
        "waiting [s an epoch]": [r"^worker_\d+/waiting_s$"],
        "communicating [s an epoch]": [r"^worker_\d+/communicating_s$"],
        "peak memory [bytes]": [r"^memory/"],
    },
    "time": {
        "an epoch [s]": [r"^time/epoch_s$"],
        "validation and overhead [s an epoch]": [r"^time/(validation|overhead)_s$"],
        "phases [s a batch]": [r"^time/(stage|processor)_\d+/"],
        "ideal speed-up over itself on one worker": [r"^speedup/theoretical$"],
    },
    "stability": {
        "largest singular value of each step": [r"^stability/step_\d+/sigma_max$"],
        "largest singular value of all steps, growth of a perturbation": [
            r"^stability/(flow_sigma_max|growth)$"
        ],
        "norms of the states": [r"^stability/step_\d+/state_norm$"],
        "norms of the gradients": [r"^stability/step_\d+/gradient_norm$"],
        "error of the reversal": [r"^stability/reversal_error$"],
    },
}


def add_layout(logger: Logger) -> None:
    """Write `LAYOUT` into the log of a run, where TensorBoard finds it whichever of the runs are shown."""
    if isinstance(logger, TensorBoardLogger):
        charts = {
            category: {title: ["Multiline", tags] for title, tags in group.items()}
            for category, group in LAYOUT.items()
        }
        logger.experiment.add_custom_scalars(charts)


def hyperparameters(plain: Mapping[str, Any]) -> dict[str, Any]:
    """`HYPERPARAMETERS` of a config, flat."""
    config = OmegaConf.create(dict(plain))
    values = {key: OmegaConf.select(config, key) for key in HYPERPARAMETERS}
    values["strategy"] = plain["strategy"]["_target_"].rpartition(".")[2].lower()
    return {
        key: str(value) if OmegaConf.is_config(value) else value
        for key, value in values.items()
        if value is not None
    }


@rank_zero_only
def add_hyperparameters(logger: Logger, values: Mapping[str, Any], columns: Sequence[str] = COLUMNS) -> None:
    """Log hyperparameters, for TensorBoard with the metrics that its page shows beside them.

    The run logs these metrics later. Lightning would log them now as well, as points of their curves.
    """
    logger.log_hyperparams(dict(values))
    if isinstance(logger, TensorBoardLogger):
        for summary in hparams(dict(values), dict.fromkeys(columns, 0.0)):
            add_summary(logger.experiment, summary)
