"""The keys of every config group except `dataset`, with types and defaults, as dataclasses; imports no torch.

The comments in `conf/` explain the keys. `model.dynamics` and `strategy.estimator.name` are one of the names here, or a
class of the user's given as ``package.module.Class``. A field marked `*` is a number, or a list with one per segment.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from omegaconf import II, MISSING

Mode = StrEnum("Mode", ["fit", "test", "predict", "export"])
ExportFormat = StrEnum("ExportFormat", ["torch", "safetensors", "onnx"])
Dynamics = StrEnum("Dynamics", ["euler", "antisymmetric", "hamiltonian", "leapfrog"])
MODELS = {"euler": "resnet"}  # model=resnet has the dynamics euler; the others have the same names
Kernel = StrEnum("Kernel", ["dense", "conv"])
Activation = StrEnum("Activation", ["tanh", "relu"])
Velocity = StrEnum("Velocity", ["zero", "paper"])
Normalisation = StrEnum("Normalisation", ["none", "batch", "group", "layer"])
OpeningNormalisation = StrEnum("OpeningNormalisation", ["none", "batch"])
Opening = StrEnum("Opening", ["pad", "repeat", "linear", "conv"])
Connector = StrEnum("Connector", ["pad", "linear"])
Head = StrEnum("Head", ["flatten", "pool"])
Init = StrEnum("Init", ["random", "smooth", "identity", "zeros"])
OptimizerName = StrEnum("OptimizerName", ["adam", "adamw", "nadam", "sgd"])
SchedulerName = StrEnum("SchedulerName", ["none", "cosine", "step", "exponential", "plateau"])
Directions = StrEnum("Directions", ["gradient", "normalised", "rms"])
BlendSource = StrEnum("BlendSource", ["local", "synthetic"])
Arrival = StrEnum("Arrival", ["wait", "late"])
HeadName = StrEnum("HeadName", ["linear", "mlp", "conv"])
HeadLoss = StrEnum("HeadLoss", ["classify", "predsim"])
LocalSolver = StrEnum("LocalSolver", ["first_order", "lbfgs"])
Synchronisation = StrEnum("Synchronisation", ["best", "average", "affine"])
EstimatorForm = StrEnum("EstimatorForm", ["direct", "residual", "sobolev"])
EstimatorName = StrEnum("EstimatorName", ["linear", "mlp", "conv"])
Prolongation = StrEnum("Prolongation", ["linear", "constant"])
Balance = StrEnum("Balance", ["model", "measured"])
Backward = StrEnum("Backward", ["stashed", "replayed", "rebuilt"])
LateMoments = StrEnum("LateMoments", ["reset", "keep"])
Moments = StrEnum("Moments", ["prolong", "reset"])
Accelerator = StrEnum("Accelerator", ["auto", "cpu", "gpu", "cuda", "mps"])
Monitoring = StrEnum("Monitoring", ["min", "max"])
Layout = StrEnum("Layout", ["pipelines", "replicas"])


def default_estimator(kernel: str) -> str:
    """The default of ``strategy.estimator.name`` for a network with this ``model.kernel``."""
    return EstimatorName.conv if kernel == Kernel.conv else EstimatorName.mlp


@dataclass
class ModelConfig:
    """A stable network: the fields of `sglight.networks.NetworkSpec`."""

    dynamics: str = MISSING
    kernel: Kernel = Kernel.dense
    steps: Any = 8  # *
    horizon: Any = 4.0  # *
    channels: Any = 64  # *
    kernel_size: int = 3
    activation: Activation = Activation.tanh
    gamma: float = 0.0
    initial_velocity: Velocity = Velocity.zero
    normalisation: Normalisation = Normalisation.none
    groups: int = 8
    opening: Opening = Opening.linear
    opening_normalisation: OpeningNormalisation = OpeningNormalisation.none
    connector: Connector = Connector.pad
    pool: bool = True
    head: Head = Head.flatten
    reversible: bool = False
    init: Init = Init.random
    init_scale: float = 1.0


@dataclass
class OptimizerConfig:
    """The optimiser of each stage, or of each estimator."""

    name: str = field(default="adam", metadata={"names": OptimizerName})
    lr: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.9
    nesterov: bool = False
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    delay_momentum: float = 0.99
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class SchedulerConfig:
    """The learning rate as a function of the epoch."""

    name: str = field(default="none", metadata={"names": SchedulerName})
    warmup_epochs: int = 0
    step_epochs: int = 10
    gamma: float = 0.1
    patience: int = 5
    min_factor: float = 0.0
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class RegularisationConfig:
    """Weights of the penalties that are added to the loss."""

    smoothness: float = 0.0
    classifier_smoothness: float = 0.0


@dataclass
class LossConfig:
    """The loss that is minimised."""

    name: str = "cross_entropy"
    label_smoothing: float = 0.0
    class_weights: list[float] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class StrategyConfig:
    """The keys of all strategies."""

    _target_: str = MISSING
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    clip_norm: float | None = None
    regularisation: RegularisationConfig = field(default_factory=RegularisationConfig)


@dataclass
class BackpropConfig(StrategyConfig):
    """Backpropagation: true gradients through the whole network."""

    _target_: str = "sglight.strategies.backprop.Backprop"
    stages: int = 1
    cuts: list[int] | None = None
    balance: Balance = Balance.model
    microbatches: int | None = None
    diagnose_every_n_batches: int = 0


@dataclass
class EstimatorConfig:
    """The estimators, which predict the gradient at each boundary between stages."""

    name: str = II("sglight_estimator:${model.kernel}")
    hidden: list[int] = field(default_factory=lambda: [64])
    conditional: bool = True
    kernel_size: int = 3
    every_n_batches: int = 1
    form: EstimatorForm = EstimatorForm.direct
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass
class HeadConfig:
    """The local heads, which classify the states at each boundary; their losses train the stages before them."""

    name: HeadName = HeadName.mlp
    hidden: list[int] = field(default_factory=lambda: [64])
    pool: int = 4
    loss: HeadLoss = HeadLoss.classify
    similarity: float = 0.99
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


@dataclass
class LocalConfig(StrategyConfig):
    """Local learning: each stage minimises the loss of a head of its own."""

    _target_: str = "sglight.strategies.local.Local"
    stages: int = 2
    cuts: list[int] | None = None
    head: HeadConfig = field(default_factory=HeadConfig)
    ensemble: bool = False
    diagnose_every_n_batches: int = 50


@dataclass
class DNIConfig(StrategyConfig):
    """Decoupled training with synthetic gradients between stages."""

    _target_: str = "sglight.strategies.dni.DNI"
    stages: int = 2
    cuts: list[int] | None = None
    lag: int = 1
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)
    diagnose_every_n_batches: int = 50


@dataclass
class BlendConfig(StrategyConfig):
    """True gradients blended with those of local heads or estimators."""

    _target_: str = "sglight.strategies.blend.Blend"
    stages: int = 2
    cuts: list[int] | None = None
    source: BlendSource = BlendSource.local
    blend: float = 0.5
    blend_last: float | None = None
    blend_epochs: float | None = None
    arrival: Arrival = Arrival.wait
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    diagnose_every_n_batches: int = 50


@dataclass
class DelayedConfig(StrategyConfig):
    """True gradients that arrive late, so that no stage waits."""

    _target_: str = "sglight.strategies.delayed.Delayed"
    stages: int = 2
    cuts: list[int] | None = None
    balance: Balance = Balance.model
    microbatches: int | None = None
    slack: int = 0
    backward: Backward = Backward.stashed
    exact_epochs: float = 0.0
    moments: LateMoments = LateMoments.reset
    diagnose_every_n_batches: int = 100


@dataclass
class LevelConfig:
    """The levels of a multilevel training: each key is one value for all, or a list with one per level."""

    epochs: Any = None
    mode: Any = None
    lr: Any = None
    estimator_lr: Any = None
    microbatches: Any = None


@dataclass
class MultilevelConfig(DNIConfig):
    """Training from a shallow network to a deep one."""

    _target_: str = "sglight.strategies.multilevel.Multilevel"
    levels: int = 2
    level: LevelConfig = field(default_factory=LevelConfig)
    prolongation: Prolongation = Prolongation.linear
    moments: Moments | None = None
    microbatches: int | None = None
    slack: int = 0
    backward: Backward = Backward.stashed
    head: HeadConfig = field(default_factory=HeadConfig)


@dataclass
class PVDConfig(StrategyConfig):
    """Parallel variable distribution over blocks of time steps."""

    _target_: str = "sglight.strategies.pvd.PVD"
    processors: int = 2
    forget_me_not: bool = True
    directions: Directions | None = None
    local_solver: LocalSolver = LocalSolver.first_order
    local_steps: int = 1
    synchronisation: Synchronisation = Synchronisation.affine
    synchronisation_steps: int = 4
    objective_samples: int | None = None
    chunk_samples: int = 1024
    target_accuracy: float | None = None
    min_decrease: float | None = None


@dataclass
class TrainerConfig:
    """Arguments of Lightning's Trainer, and settings of the workers."""

    accelerator: Accelerator = Accelerator.auto
    devices: int = II(".replicas")
    num_nodes: int = 1
    replicas: int = 1
    layout: Layout = Layout.pipelines
    sync_batchnorm: bool = False
    max_epochs: int = 20
    max_steps: int | None = None
    max_time: str | None = None
    precision: str = "32-true"
    limit_train_batches: int | float | None = None
    limit_val_batches: int | float | None = None
    limit_test_batches: int | float | None = None
    log_every_n_steps: int = 10
    check_val_every_n_epoch: int = 1
    val_check_interval: int | float | None = None
    overfit_batches: int | float | None = None
    detect_anomaly: bool = False
    deterministic: bool = False
    fast_dev_run: bool | int = False
    profiler: str | None = None
    enable_progress_bar: bool = True
    threads: int | None = None
    share_devices: bool = False
    idle_timeout_s: float = 10.0
    show_schedule: bool = False


@dataclass
class CheckpointConfig:
    """Which checkpoint is the best one, and how often the last one is written."""

    monitor: str = "val/acc"
    mode: Monitoring = Monitoring.max
    every_n_epochs: int = 1


@dataclass
class EarlyStoppingConfig:
    """When to stop before the last epoch."""

    _target_: str = "sglight.callbacks.record.PatientStopping"
    enabled: bool = False
    monitor: str = "val/acc"
    mode: Monitoring = Monitoring.max
    patience: int = 10
    min_delta: float = 0.0


@dataclass
class FiguresConfig:
    """Pictures of two-dimensional data sets."""

    _target_: str = "sglight.callbacks.figures.PlanarFigures"
    enabled: bool = True
    every_n_epochs: int | None = None


@dataclass
class ProgressConfig:
    """The progress bar."""

    _target_: str = "pytorch_lightning.callbacks.RichProgressBar"
    enabled: bool = True
    refresh_rate: int = 10


@dataclass
class TimelineConfig:
    """The recorded timeline of the workers in the first batches."""

    _target_: str = "sglight.callbacks.timeline.Timeline"
    enabled: bool = True
    batches: int = 8


@dataclass
class LRMonitorConfig:
    """The learning rates in the log."""

    _target_: str = "pytorch_lightning.callbacks.LearningRateMonitor"
    enabled: bool = True
    logging_interval: str = "epoch"


@dataclass
class GradientQualityConfig:
    """The picture of how well estimators predict."""

    _target_: str = "sglight.callbacks.gradient_quality.GradientQuality"
    enabled: bool = True


@dataclass
class StabilityConfig:
    """Jacobians, norms and reversal errors of the network on a few samples."""

    _target_: str = "sglight.callbacks.stability.StabilityMonitor"
    enabled: bool = False
    every_n_epochs: int = 1
    samples: int = 8
    exact_up_to: int = 256
    iterations: int = 12


@dataclass
class TimingConfig:
    """The seconds of each epoch in the log."""

    enabled: bool = True


@dataclass
class MemoryConfig:
    """The peak memory after each epoch in the log."""

    enabled: bool = True


@dataclass
class PredictConfig:
    """The input of `mode=predict`."""

    input: str | None = None
    batch_size: int = 256


@dataclass
class ExportConfig:
    """The output of `mode=export`."""

    format: ExportFormat = ExportFormat.torch


@dataclass
class Config:
    """One run; `dataset` and `strategy` have a schema per choice, or the user's own without one."""

    mode: Mode = Mode.fit
    seed: int = 1
    ckpt: str | None = None
    skip_completed: bool = False
    data_dir: str = II("oc.env:SGLIGHT_DATA_DIR,'~/.cache/sglight'")
    dataset: Any = MISSING
    model: ModelConfig = MISSING
    strategy: Any = MISSING
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    callbacks: Any = MISSING  # `CALLBACKS` and the user's own
    logger: Any = MISSING
    predict: PredictConfig = field(default_factory=PredictConfig)
    export: ExportConfig = field(default_factory=ExportConfig)


STRATEGIES: dict[str, type[StrategyConfig]] = {
    "base_backprop": BackpropConfig,
    "base_blend": BlendConfig,
    "base_delayed": DelayedConfig,
    "base_dni": DNIConfig,
    "base_local": LocalConfig,
    "base_multilevel": MultilevelConfig,
    "base_pvd": PVDConfig,
}


# Callbacks by key. Those without a `_target_` are settings of callbacks that every run has.
CALLBACKS: dict[str, type] = {
    "checkpoint": CheckpointConfig,
    "early_stopping": EarlyStoppingConfig,
    "figures": FiguresConfig,
    "progress": ProgressConfig,
    "lr_monitor": LRMonitorConfig,
    "timeline": TimelineConfig,
    "gradient_quality": GradientQualityConfig,
    "stability": StabilityConfig,
    "timing": TimingConfig,
    "memory": MemoryConfig,
}
