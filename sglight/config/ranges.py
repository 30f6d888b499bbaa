"""The range of the numbers under each key; imports no torch.

The upper ends are far above anything useful. They catch typing mistakes that would overflow or take all memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from sglight.config.datasets import MOST_NOISE, MOST_POINTS
from sglight.errors import UserError


@dataclass(frozen=True)
class Range:
    """Numbers from ``least`` to ``most``.

    Attributes:
        least, most: the ends.
        above, below: whether the ends themselves are excluded.
        whole: whether the numbers must be whole.

    >>> 0.5 in Range(0, 1), 1 in Range(0, 1, below=True)
    (True, False)
    """

    least: float
    most: float
    above: bool = False
    below: bool = False
    whole: bool = False

    def __contains__(self, value: Any) -> bool:
        # A comparison with NaN is false.
        lower = value > self.least if self.above else value >= self.least
        upper = value < self.most if self.below else value <= self.most
        return bool(lower and upper)

    def __str__(self) -> str:
        lower = f"greater than {self.least:g}" if self.above else f"at least {self.least:g}"
        upper = f"less than {_show(self.most)}" if self.below else f"at most {_show(self.most)}"
        return f"{lower} and {upper}"


def _show(number: float) -> str:
    return str(int(number)) if number == int(number) and number < 1e15 else f"{number:g}"


def _whole(least: int, most: float) -> Range:
    return Range(least, most, whole=True)


COUNT, SIZE = _whole(1, 10**9), _whole(1, 2**20)
SEED = _whole(0, 2**32 - 1)  # what NumPy and Lightning take
RATE = Range(0, 1e6, above=True)
PART, FRACTION = Range(0, 1), Range(0, 1, below=True)
POSITIVE, WEIGHT = Range(0, 1e6, above=True), Range(0, 1e6)
OPTIMIZER = {
    "lr": RATE, "weight_decay": WEIGHT, "momentum": FRACTION, "betas": FRACTION, "delay_momentum": FRACTION,
}  # fmt: skip

RANGES: Mapping[str, Range] = {
    "seed": SEED,
    "dataset.seed": SEED,
    "dataset.data_seed": SEED,
    "dataset.batch_size": COUNT,
    "dataset.eval_batch_size": COUNT,
    "dataset.train_points": _whole(1, MOST_POINTS),
    "dataset.val_points": _whole(1, MOST_POINTS),
    "dataset.test_points": _whole(1, MOST_POINTS),
    "dataset.noise": Range(0, MOST_NOISE),
    "dataset.validation_fraction": Range(0, 1, above=True, below=True),
    "dataset.test_fraction": Range(0, 1, above=True, below=True),
    "dataset.max_megapixels": POSITIVE,
    "dataset.crop_padding": _whole(0, 4096),
    "dataset.memory_limit": POSITIVE,
    "dataset.size": _whole(1, 2**16),
    "dataset.channels": _whole(1, 4096),
    "model.steps": _whole(1, 10**6),
    "model.horizon": Range(0, 1e6, above=True),
    "model.channels": SIZE,
    "model.kernel_size": _whole(1, 4095),
    "model.gamma": WEIGHT,
    "model.groups": SIZE,
    "model.init_scale": WEIGHT,
    **{f"strategy.optimizer.{key}": value for key, value in OPTIMIZER.items()},
    **{f"strategy.estimator.optimizer.{key}": value for key, value in OPTIMIZER.items()},
    **{f"strategy.head.optimizer.{key}": value for key, value in OPTIMIZER.items()},
    "strategy.head.hidden": SIZE,
    "strategy.blend": PART,
    "strategy.blend_last": PART,
    "strategy.blend_epochs": Range(0, 1e9, above=True),
    "strategy.head.pool": _whole(1, 4096),
    "strategy.head.similarity": PART,
    "strategy.scheduler.warmup_epochs": _whole(0, 10**9),
    "strategy.scheduler.step_epochs": COUNT,
    "strategy.scheduler.gamma": Range(0, 10, above=True),
    "strategy.scheduler.patience": _whole(0, 10**9),
    "strategy.scheduler.min_factor": PART,
    "strategy.regularisation.smoothness": WEIGHT,
    "strategy.regularisation.classifier_smoothness": WEIGHT,
    "strategy.loss.label_smoothing": FRACTION,
    "strategy.loss.class_weights": POSITIVE,
    "strategy.clip_norm": Range(0, 1e12, above=True),
    "strategy.diagnose_every_n_batches": _whole(0, 10**9),
    "strategy.estimator.hidden": SIZE,
    "strategy.estimator.kernel_size": _whole(1, 4095),
    "strategy.estimator.every_n_batches": COUNT,
    "strategy.stages": _whole(1, 10**6),
    "strategy.cuts": _whole(1, 10**9),
    "strategy.lag": _whole(0, 10**6),
    "strategy.microbatches": SIZE,
    "strategy.slack": _whole(0, 1),
    "strategy.exact_epochs": Range(0, 1e9),
    "strategy.levels": _whole(1, 20),
    "strategy.level.epochs": COUNT,
    "strategy.level.lr": RATE,
    "strategy.level.estimator_lr": RATE,
    "strategy.processors": _whole(1, 10**6),
    "strategy.local_steps": _whole(1, 10**6),
    "strategy.synchronisation_steps": _whole(1, 10**6),
    "strategy.objective_samples": COUNT,
    "strategy.chunk_samples": COUNT,
    "strategy.target_accuracy": Range(0, 1, above=True),
    "strategy.min_decrease": Range(0, 1),
    "trainer.replicas": _whole(1, 4096),
    "trainer.devices": _whole(1, 4096),
    "trainer.num_nodes": _whole(1, 10**5),
    "trainer.max_epochs": COUNT,
    "trainer.limit_train_batches": Range(0, 1e9, above=True),
    "trainer.limit_val_batches": Range(0, 1e9, above=True),
    "trainer.limit_test_batches": Range(0, 1e9, above=True),
    "trainer.max_steps": COUNT,
    "trainer.val_check_interval": Range(0, 1e9, above=True),
    "trainer.overfit_batches": Range(0, 1e9, above=True),
    "trainer.log_every_n_steps": COUNT,
    "trainer.check_val_every_n_epoch": COUNT,
    "trainer.fast_dev_run": _whole(0, 10**9),
    "trainer.threads": _whole(1, 1024),
    "trainer.idle_timeout_s": Range(0, 1e9, above=True),
    "callbacks.checkpoint.every_n_epochs": COUNT,
    "callbacks.early_stopping.patience": COUNT,
    "callbacks.figures.every_n_epochs": COUNT,
    "callbacks.progress.refresh_rate": COUNT,
    "callbacks.timeline.batches": COUNT,
    "callbacks.stability.every_n_epochs": COUNT,
    "predict.batch_size": COUNT,
    "callbacks.stability.samples": SIZE,
    "callbacks.stability.exact_up_to": _whole(0, 2**16),
    "callbacks.stability.iterations": _whole(1, 10**4),
}


def check_ranges(cfg: DictConfig) -> None:
    """Refuse the first number that is out of its range; NaN and infinities are out of every range.

    Raises:
        UserError: that names its key.
    """
    for key, allowed in RANGES.items():
        value = OmegaConf.select(cfg, key)
        for number in _numbers(value):
            if number not in allowed:
                raise UserError(f"{key}={value} is not allowed; it must be {allowed}{_each(value)}")


def _numbers(value: Any) -> Iterator[float]:
    """The numbers in a value or a list of values; values of other types are checked elsewhere."""
    for each in value if isinstance(value, ListConfig) else [value]:
        if isinstance(each, int | float) and not isinstance(each, bool):
            yield each


def _each(value: Any) -> str:
    return ", each of them" if isinstance(value, ListConfig) else ""
