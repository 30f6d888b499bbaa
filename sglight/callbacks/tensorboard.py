"""Fills two pages of TensorBoard: custom scalars (curves grouped by topic) and hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pytorch_lightning.loggers import Logger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.tensorboard.summary import hparams

from sglight.compat.tensorboard import add_summary, name_columns

# Prefix of the tags of results. They need tags of their own, as the last point of `val/acc` need not be the result.
RESULT = "result/"
# The charts of each category, with regular expressions of their tags. A chart without data stays empty.
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
    "boundaries": {
        "cosine with the exact gradient": [r"^boundary_\d+/cosine$"],
        "relative error": [r"^boundary_\d+/relative_error$"],
        "ratio of the norms": [r"^boundary_\d+/norm_ratio$"],
        "agreement of signs": [r"^boundary_\d+/sign_agreement$"],
        "loss of estimators and heads": [r"^estimator_\d+/loss$"],
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
        "speed-up over backprop, measured": [r"^result/speedup/backprop$"],
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
    """Writes `LAYOUT` into the log of a run."""
    if isinstance(logger, TensorBoardLogger):
        charts = {
            category: {title: ["Multiline", tags] for title, tags in group.items()}
            for category, group in LAYOUT.items()
        }
        logger.experiment.add_custom_scalars(charts)


@rank_zero_only
def add_hyperparameters(logger: Logger, values: Mapping[str, Any], columns: Sequence[str]) -> None:
    """Logs hyperparameters; for TensorBoard with the names of the results beside them, see `add_results`.

    Lightning's own way would log a first value of each result as a point of a curve.

    Args:
        logger: of the run.
        values: the hyperparameters by name.
        columns: the names of the results.
    """
    logger.log_hyperparams(dict(values))
    if isinstance(logger, TensorBoardLogger):
        page, *rest = hparams(dict(values), dict.fromkeys([f"{RESULT}{name}" for name in columns], 0.0))
        name_columns(page, lambda tag: tag.removeprefix(RESULT))
        for summary in (page, *rest):
            add_summary(logger.experiment, summary)


@rank_zero_only
def add_results(logger: Logger, results: Mapping[str, float | None], step: int) -> None:
    """Logs the results in `metrics.json`, which the page of hyperparameters shows."""
    if isinstance(logger, TensorBoardLogger):
        logger.log_metrics({f"{RESULT}{k}": v for k, v in results.items() if v is not None}, step)
        logger.finalize("success")
