"""A network in stages as a LightningModule: its parts, in which process they are, and its forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self, TypedDict

import pytorch_lightning as pl
from torch import Tensor, nn
from typing_extensions import override

from sglight.config.cuts import given_cuts
from sglight.gradients import GradientSource, TrainedEstimator, TrueGradient
from sglight.link import Placement
from sglight.networks import NetworkSpec, Stage
from sglight.networks.batchnorm import BatchNorm2d
from sglight.networks.segment import Segment
from sglight.strategies import agreement, contents, descent
from sglight.strategies.curves import Curves
from sglight.strategies.diagnosis import Diagnosis
from sglight.strategies.evaluation import Evaluation
from sglight.strategies.loss import Loss
from sglight.strategies.optim import (
    optimizer_settings,
    scheduler_settings,
)
from sglight.strategies.plan import Plan
from sglight.strategies.rates import Rates
from sglight.strategies.recorder import Recorder
from sglight.strategies.replication import average_statistics, check_estimators
from sglight.strategies.runtime import Runtime
from sglight.strategies.schedule import Locked, Schedule
from sglight.strategies.simulation import in_flight

# Inputs and labels; inputs are None at a worker without the first stage.
Batch = tuple[Tensor | None, Tensor]


class Shared(TypedDict, total=False):
    """The keywords of all strategies, see `StagedModule`."""

    scheduler: Mapping[str, Any] | None
    clip_norm: float | None
    regularisation: Mapping[str, float] | None
    loss: Mapping[str, Any] | None


class InStages(Shared, total=False):
    """The keywords of strategies whose stages are slices of the network."""

    cuts: Sequence[int] | None


class StagedNetwork(pl.LightningModule):
    """The stages of a network that are in this process, and the objects that train and evaluate them.

    See `StagedModule`.
    """

    arguments: dict[str, Any]
    level = 0
    part = "stage"
    inputs_everywhere = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Keeps the arguments of the constructor, for checkpoints."""
        module = super().__new__(cls)
        # `copy` calls this without arguments, and then copies the attributes of the original.
        module.__dict__["arguments"] = contents.arguments(cls, args, kwargs)
        return module

    def __init__(
        self,
        network: Mapping[str, Any],
        optimizer: Mapping[str, Any],
        scheduler: Mapping[str, Any] | None = None,
        clip_norm: float | None = None,
        regularisation: Mapping[str, float] | None = None,
        stages: int = 1,
        loss: Mapping[str, Any] | None = None,
        schedule: Schedule | None = None,
        source: GradientSource | None = None,
        diagnose_every_n_batches: int = 0,
        multiple: int = 1,
        cuts: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        spec, source = NetworkSpec(**network), source or TrueGradient()
        if cuts is None:
            positions = tuple(spec.cuts(stages, source.cost(spec), multiple))
        else:
            positions = given_cuts(cuts, spec.total_steps, stages, multiple)
        self.plan = Plan(
            spec, positions, optimizer_settings(optimizer), scheduler_settings(scheduler), clip_norm,
            dict(regularisation or {}), Loss(**dict(loss or {})), schedule or Locked(), source,
        )  # fmt: skip
        self.plan.loss.check(spec.classes)
        self.stages, self.estimators = nn.ModuleDict(), nn.ModuleDict()
        self.runtime = Runtime(self.plan, self.stages, self.estimators, self.step_stage)
        self.diagnosis = self.runtime.observer = Diagnosis(diagnose_every_n_batches)
        self.curves, self.rates = Curves(), Rates()
        self.evaluation = Evaluation()
        self._compared = False  # whether the workers have compared the first labels of this epoch

    def follow(self, plan: Plan) -> None:
        """Switches to another plan."""
        self.plan = self.runtime.plan = plan

    # What it is.

    @property
    def spec(self) -> NetworkSpec:
        """The present network."""
        return self.plan.spec

    @property
    def cuts(self) -> tuple[int, ...]:
        """The M + 1 positions of the cuts, from 0 to the number of steps."""
        return self.plan.cuts

    @property
    def is_finest(self) -> bool:
        """Whether the network has its final depth and will not be refined any more."""
        return True

    def describe(self) -> str:
        """The strategy in a line, for the summary of a run."""
        return "; ".join(filter(None, [*self.facts(), descent.describe(self.plan)]))

    def facts(self) -> list[str]:
        """The parts of `describe` that hold for the whole training; a part may be empty."""
        optimizer, schedule = self.plan.optimizer, self.plan.scheduler["name"]
        rate = f"{optimizer['lr']:g}" + (f" ({schedule})" if schedule != "none" else "")
        name = f"{type(self).__name__.lower()}, {optimizer['name']}, rate {rate}"
        stages = f"{self.plan.last + 1} stages, {self.plan.schedule.describe()}" if self.plan.last else ""
        replicas = self.placement.replicas.size
        shared = f"{replicas} replicas" if replicas > 1 else ""
        return [name, stages, shared, self.plan.source.describe(), self.plan.loss.describe()]

    def schedule(self, groups: int, replicas: int = 1) -> str:
        """The schedule as text, by the cost model, for so many groups of stages, each with so many replicas."""
        return self.plan.grid(groups, replicas)

    def groups(self, workers: int) -> list[range]:
        """The stages of each of ``workers`` processes; see `Plan.groups`."""
        return self.plan.groups(workers)

    def check_replicas(self, replicas: int) -> None:
        """Refuse replicas if the strategy cannot train with them.

        Raises:
            ValueError: about ``trainer.replicas``.
        """
        check_estimators(self.plan.source, replicas)

    def parameter_counts(self) -> dict[str, int]:
        """The number of parameters of each part in this process: ``stage_0``, ``estimator_0`` and so on."""
        parts = {"stage": self.stages, "estimator": self.estimators}
        return {
            f"{kind}_{key}": sum(p.numel() for p in part.parameters())
            for kind, those in parts.items()
            for key, part in those.items()
        }

    def results(self) -> dict[str, float]:
        """Results that a strategy adds to the metrics at the end of a training."""
        return {}

    # Where it is.

    @property
    def placement(self) -> Placement:
        """Which stages are in this process, and the channels to the others."""
        return self.runtime.placement

    @property
    def recorder(self) -> Recorder:
        """Measures the times of this worker."""
        return self.runtime.recorder

    @property
    def in_flight(self) -> int:
        """How many tensors a channel must hold so that no worker waits where the schedule does not."""
        return in_flight(self.plan.schedule, self.plan.last + 1)

    @property
    def local_stages(self) -> range:
        """The numbers of the stages whose parameters are in this process."""
        return self.placement.own

    def place(self, placement: Placement) -> None:
        """Sets which stages are in this process, and the channels to the others; other parts are dropped."""
        self.runtime.placement = placement
        for part in (self.stages, self.estimators):
            for key in [key for key in part if int(key) not in self.local_stages]:
                del part[key]
        self.share()

    def share(self) -> None:
        """Set the replicas of all stages and estimators that take means over their samples."""
        for part in self.stages.modules():
            if isinstance(part, Segment | BatchNorm2d):
                part.replicas = self.placement.statistics
        for part in self.estimators.modules():
            if isinstance(part, TrainedEstimator):
                part.replicas = self.placement.replicas

    @override
    def setup(self, stage: str) -> None:
        """Begins a training or an evaluation without anything of an earlier one, finished or failed."""
        # Called before a checkpoint is loaded.
        agreement.check_trainer(self.trainer)
        self.evaluation = Evaluation()
        if stage == "fit":
            self.runtime.forget()
            self.diagnosis.next = self.diagnosis.count = 0
            self.curves.forget()

    @override
    def configure_model(self) -> None:
        # Lightning may call this more than once.
        for i in self.local_stages:
            if str(i) not in self.stages:
                self.stages[str(i)] = Stage(self.spec, self.cuts[i], self.cuts[i + 1])
        for i in self.runtime.boundaries:
            if str(i) not in self.estimators and (estimator := self.make_estimator(i)) is not None:
                self.estimators[str(i)] = estimator
        self.share()

    def make_estimator(self, i: int) -> nn.Module | None:
        """The estimator for the boundary after stage i, or None; override it for another kind."""
        return self.plan.source.make_estimator(self.spec, self.cuts, i)

    def stage(self, i: int) -> Stage:
        """Stage i, which is in this process."""
        return self.runtime.stage(i)

    def estimator(self, i: int) -> Any:
        """The estimator at the boundary after stage i, which is in this process."""
        return self.estimators[str(i)]

    def own_stages(self) -> Iterator[tuple[int, Stage]]:
        """The stages of this process with their numbers, in order."""
        for key in self.stages:
            yield int(key), self.stage(int(key))

    @override
    def forward(self, x: Tensor) -> Tensor:
        """The logits of inputs. Before a training, stages are built when they are needed.

        Raises:
            RuntimeError: at a worker that does not have all stages.
        """
        self._build()
        if len(self.stages) <= self.plan.last:
            raise RuntimeError(
                f"of {self.plan.last + 1} stages only {', '.join(self.stages)} live in this process: call the module "
                "in one that has all of them, such as the one that has started the training"
            )
        for _, stage in self.own_stages():
            x = stage(x)
        return x

    def average_statistics(self) -> None:
        """Give all replicas the mean of their running statistics; all of them must call this."""
        average_statistics(self.stages, self.placement.replicas)

    def _build(self) -> None:
        """Builds the stages and estimators of this process, with the device, type and mode of the module."""
        if not self.stages:
            self.configure_model()
            for part in (self.stages, self.estimators):
                part.to(self.device).to(self.dtype).train(self.training)

    def step_stage(self, i: int) -> None:
        """Steps the optimiser of stage i."""
        raise NotImplementedError
