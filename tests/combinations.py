"""A generator of whole configs: choices of all groups with values of their keys, each of which is right by itself."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping

Values = Mapping[str, tuple[str, ...]]
SWITCH = ("true", "false")

DATASETS: Mapping[str, tuple[str, ...]] = {
    "ellipse": (
        "dataset.train_points=70",
        "dataset.val_points=20",
        "dataset.test_points=20",
        "dataset.batch_size=16",
    ),
    "digits": ("dataset.batch_size=16",),
    # A tiny file of pictures in colour, or of vectors; {folder} is where they are.
    "hdf5 of pictures": ("dataset.path={folder}/pictures.h5", "dataset.batch_size=16"),
    "hdf5 of vectors": ("dataset.path={folder}/vectors.h5", "dataset.batch_size=16"),
}
MODELS = ("resnet", "antisymmetric", "hamiltonian", "leapfrog")
STRATEGIES = ("backprop", "blend", "delayed", "dni", "local", "multilevel", "pvd")

DATASET_KEYS: Values = {
    "dataset.batch_size": ("1", "7", "16", "64"),
    "dataset.augment": SWITCH,
    "dataset.standardise": SWITCH,
    "dataset.validation_fraction": ("0.1", "0.5"),
    "dataset.noise": ("0.0", "0.2"),
}
MODEL_KEYS: Values = {
    "model.kernel": ("dense", "conv", "conv"),
    "model.steps": ("1", "2", "4", "8"),
    "model.channels": ("1", "4", "8", "[4,8]", "[4,4,8]", "[8,4]"),
    "model.horizon": ("1.0", "4.0"),
    "model.kernel_size": ("1", "3", "5", "9"),
    "model.activation": ("tanh", "relu"),
    "model.gamma": ("0.0", "0.0", "0.1"),
    "model.initial_velocity": ("zero", "zero", "paper"),
    "model.normalisation": ("none", "batch", "group", "layer"),
    "model.groups": ("1", "2"),
    "model.opening": ("pad", "repeat", "linear", "conv"),
    "model.opening_normalisation": ("none", "none", "none", "batch"),
    "model.connector": ("pad", "linear"),
    "model.pool": SWITCH,
    "model.head": ("flatten", "flatten", "pool"),
    "model.reversible": SWITCH,
    "model.init": ("random", "smooth", "identity", "zeros"),
    "model.init_scale": ("0.0", "0.5"),
}
OPTIMIZER = {
    "name": ("adam", "adamw", "nadam", "sgd"),
    "lr": ("0.001", "0.01"),
    "weight_decay": ("0.0", "0.01"),
    "momentum": ("0.0", "0.9"),
    "nesterov": SWITCH,
    "betas": ("[0.9,0.99]", "[0.0,0.5]"),
}
STRATEGY_KEYS: Values = {
    "strategy.stages": ("1", "2", "2", "3", "4"),
    "strategy.cuts": ("null", "null", "[2]", "[1,2,3]"),
    "strategy.microbatches": ("null", "1", "2", "4", "16"),
    "strategy.slack": ("0", "1"),
    "strategy.backward": ("stashed", "replayed", "rebuilt"),
    "strategy.exact_epochs": ("0.0", "0.5", "1"),
    "strategy.lag": ("0", "1", "3"),
    "strategy.source": ("local", "synthetic"),
    "strategy.blend": ("0.0", "0.5", "1.0"),
    "strategy.blend_last": ("null", "0.0", "1.0"),
    "strategy.blend_epochs": ("null", "0.5", "2"),
    "strategy.arrival": ("wait", "late"),
    "strategy.ensemble": SWITCH,
    "strategy.levels": ("1", "2", "3"),
    "strategy.level.epochs": ("null", "1", "[1,null]"),
    "strategy.level.mode": ("null", "exact", "dni", "delayed", "local", "[exact,dni]", "[delayed,exact]"),
    "strategy.level.lr": ("null", "0.01", "[0.01,0.001]"),
    "strategy.level.microbatches": ("null", "2", "[1,4]"),
    "strategy.prolongation": ("linear", "constant"),
    "strategy.moments": ("reset",),
    "strategy.processors": ("1", "2", "3", "4"),
    "strategy.forget_me_not": SWITCH,
    "strategy.directions": ("null", "gradient", "normalised", "rms"),
    "strategy.local_solver": ("first_order", "lbfgs"),
    "strategy.local_steps": ("1", "2"),
    "strategy.synchronisation": ("best", "average", "affine"),
    "strategy.synchronisation_steps": ("1", "4"),
    "strategy.objective_samples": ("null", "1", "30", "1000"),
    "strategy.chunk_samples": ("1", "30"),
    "strategy.target_accuracy": ("null", "0.5"),
    "strategy.min_decrease": ("null", "0.1"),
    "strategy.estimator.name": ("linear", "mlp", "conv"),
    "strategy.estimator.hidden": ("[]", "[8]", "[8,4]"),
    "strategy.estimator.conditional": SWITCH,
    "strategy.estimator.kernel_size": ("1", "3", "5"),
    "strategy.estimator.every_n_batches": ("1", "2", "100"),
    "strategy.estimator.form": ("direct", "residual", "sobolev"),
    "strategy.head.name": ("linear", "mlp", "conv"),
    "strategy.head.hidden": ("[]", "[8]", "[8,4]"),
    "strategy.head.pool": ("1", "2", "4", "100"),
    "strategy.head.loss": ("classify", "predsim"),
    "strategy.head.similarity": ("0.0", "0.5", "1.0"),
    "strategy.clip_norm": ("null", "1.0"),
    "strategy.diagnose_every_n_batches": ("0", "1", "3"),
    "strategy.scheduler.name": ("none", "cosine", "step", "exponential", "plateau"),
    "strategy.scheduler.warmup_epochs": ("0", "1", "5"),
    "strategy.scheduler.step_epochs": ("1", "3"),
    "strategy.scheduler.min_factor": ("0.0", "0.1"),
    "strategy.loss.name": ("cross_entropy", "mse"),
    "strategy.loss.label_smoothing": ("0.0", "0.1"),
    "strategy.loss.class_weights": ("null", "[1,2]", "[1,2,3]"),
    "strategy.regularisation.smoothness": ("0.0", "0.01"),
    "strategy.regularisation.classifier_smoothness": ("0.0", "0.0", "0.01"),
    **{f"strategy.optimizer.{key}": values for key, values in OPTIMIZER.items()},
    **{f"strategy.estimator.optimizer.{key}": values for key, values in OPTIMIZER.items()},
    **{f"strategy.head.optimizer.{key}": values for key, values in OPTIMIZER.items()},
}
TRAINER_KEYS: Values = {
    "trainer.max_epochs": ("1", "2", "3"),
    "trainer.max_steps": ("null", "1", "3"),
    "trainer.precision": ("32-true", "64-true", "bf16-mixed"),
    "trainer.limit_train_batches": ("1", "3", "0.5", "1.0"),
    "trainer.limit_val_batches": ("1", "0.5"),
    "trainer.limit_test_batches": ("1", "0.5"),
    "trainer.check_val_every_n_epoch": ("1", "2"),
    "trainer.val_check_interval": ("null", "1", "2", "0.5", "1.0"),
    "trainer.overfit_batches": ("null", "1", "2", "0.5"),
    "trainer.log_every_n_steps": ("1", "10"),
    "trainer.detect_anomaly": SWITCH,
    "trainer.deterministic": SWITCH,
    "trainer.fast_dev_run": ("false", "true", "2"),
    "trainer.profiler": ("null", "simple"),
    "trainer.show_schedule": SWITCH,
    "callbacks.early_stopping.enabled": SWITCH,
    "callbacks.early_stopping.patience": ("1", "10"),
    "callbacks.checkpoint.every_n_epochs": ("1", "2"),
    "callbacks.checkpoint.monitor": ("val/acc", "train/acc"),
    "callbacks.stability.enabled": SWITCH,
    "callbacks.stability.samples": ("1", "8"),
}


def combinations(count: int, seed: int) -> Iterator[tuple[list[str], dict[str, str]]]:
    """So many configs: the choices of groups with their small data, and values of keys.

    A key that a choice does not have is to be left out.
    """
    generator = random.Random(seed)
    for k in range(count):
        data = generator.choice(list(DATASETS))
        choices = [f"dataset={data.split()[0]}", *DATASETS[data]]
        choices += [f"model={generator.choice(MODELS)}", f"strategy={STRATEGIES[k % len(STRATEGIES)]}"]
        values: dict[str, str] = {"model.channels": "4", "model.steps": "4", "trainer.max_epochs": "2"}
        if data in ("digits", "hdf5 of pictures") and generator.random() < 0.6:
            values["model.kernel"] = "conv"
        for keys, most in ((DATASET_KEYS, 1), (MODEL_KEYS, 3), (STRATEGY_KEYS, 8), (TRAINER_KEYS, 3)):
            for key in generator.sample(sorted(keys), len(keys) if keys is STRATEGY_KEYS else most):
                if keys is not STRATEGY_KEYS or generator.random() < 0.15:
                    values[key] = generator.choice(keys[key])
        if values["model.channels"].startswith("[") and generator.random() < 0.5:
            segments = values["model.channels"].count(",") + 1
            values["model.steps"] = str([generator.choice((2, 4)) for _ in range(segments)]).replace(" ", "")
        yield choices, values
