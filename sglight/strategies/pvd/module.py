"""Parallel variable distribution (PVD) as a strategy for Lightning; the other modules here have the method itself."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any, Unpack

import torch
from pytorch_lightning.callbacks import Callback
from torch.optim import Optimizer
from typing_extensions import override

from sglight.config.replicas import refuse_in_pvd
from sglight.errors import UserError
from sglight.networks.network import balanced
from sglight.strategies.evaluation import hits
from sglight.strategies.plan import Plan
from sglight.strategies.pvd.acceptance import ACCEPTANCES
from sglight.strategies.pvd.choices import chosen
from sglight.strategies.pvd.directions import Directions
from sglight.strategies.pvd.iteration import Iterations, Progress
from sglight.strategies.pvd.local import SOLVERS
from sglight.strategies.pvd.loop import PVDLoop
from sglight.strategies.pvd.objective import Objective
from sglight.strategies.pvd.processor import Processor
from sglight.strategies.pvd.samples import Samples, check_memory
from sglight.strategies.pvd.sharing import SharedObjective
from sglight.strategies.pvd.subproblem import Subproblem
from sglight.strategies.pvd.synchronisation import SYNCHRONISATIONS, Search
from sglight.strategies.staged import Batch, Shared, StagedModule


class PVD(StagedModule):
    """Trains blocks of the parameters in parallel, each by a processor, and combines the results in each iteration.

    The parameters x are cut into p blocks. In an iteration processor i minimises the objective f over block i, and
    perhaps over a step size for the directions of the other blocks; then a synchronisation chooses the next x from
    what the processors have found. One epoch of Lightning is one iteration, which `PVDLoop` sees to.

    >>> pl.Trainer().fit(PVD(network, optimizer, processors=2), datamodule)  # doctest: +SKIP

    Args:
        network: see `StagedModule`.
        optimizer: of the local solver; its weight decay is part of the objective, as decay/2 ||x||^2.
        processors: p, from 1 to the number of steps.
        forget_me_not: whether a processor also moves the other blocks along their directions.
        directions: ``gradient``, ``normalised`` or ``rms``, see `Directions`; None for those as large as the steps of
            the local solver: ``rms`` for Adam, otherwise ``normalised``.
        local_solver: ``first_order`` or ``lbfgs``, see `local.py`; the latter does not use the optimiser's settings.
        local_steps: the number of steps of the local solver for each batch; the largest number for ``lbfgs``.
        acceptance: ``no_worse``, see `acceptance.py`.
        synchronisation: ``best``, ``average`` or ``affine``, see `synchronisation.py`.
        synchronisation_steps: the largest number of iterations of the search for affine weights.
        objective_samples: the number of training samples of f, drawn again for each iteration; None for all.
        chunk_samples: the largest number of samples that pass the network at once.
        target_accuracy: ends the training when this share of the samples of f is classified correctly; None for never.
        min_decrease: ends the training when an iteration lowers f by less than this part of it; None for never.
        shared: see `StagedModule`.

    Attributes:
        report: the results of the last iteration, by name, until they are logged.

    Raises:
        ValueError: for choices that do not exist or do not go together; the text names the key.
    """

    part = "processor"
    inputs_everywhere = True

    def __init__(
        self,
        network: Mapping[str, Any],
        optimizer: Mapping[str, Any],
        processors: int = 2,
        forget_me_not: bool = True,
        directions: str | None = None,
        local_solver: str = "first_order",
        local_steps: int = 1,
        acceptance: str = "no_worse",
        synchronisation: str = "affine",
        synchronisation_steps: int = 4,
        objective_samples: int | None = None,
        chunk_samples: int = 1024,
        target_accuracy: float | None = None,
        min_decrease: float | None = None,
        **shared: Unpack[Shared],
    ) -> None:
        _check_counts(
            local_steps=local_steps,
            synchronisation_steps=synchronisation_steps,
            objective_samples=objective_samples,
            chunk_samples=chunk_samples,
        )
        try:
            super().__init__(network, optimizer, **shared, stages=processors)
        except ValueError as error:
            raise ValueError(str(error).replace("strategy.stages", "strategy.processors")) from error
        _check(self.plan)
        self.runtime.counter = 0
        self.processors = processors
        self.forget_me_not = forget_me_not
        self.local_solver, self.synchronisation = local_solver, synchronisation
        self.solver = chosen("local_solver", local_solver, SOLVERS)(
            self.plan.optimizer, local_steps, self.plan.clip_norm
        )
        self.acceptance = chosen("acceptance", acceptance, ACCEPTANCES)()
        self.directions = Directions(directions or self.solver.directions)
        self._rule = chosen("synchronisation", synchronisation, SYNCHRONISATIONS)
        self.synchronisation_steps = synchronisation_steps
        self.objective_samples, self.chunk_samples = objective_samples, chunk_samples
        self.target_accuracy, self.min_decrease = target_accuracy, min_decrease
        self._forget()

    def _forget(self) -> None:
        """Remove the state of an earlier training."""
        self.directions = Directions(self.directions.kind)
        self.report: dict[str, float] = {}
        self._progress = Progress()
        self._iterations: Iterations | None = None

    @override
    def describe(self) -> str:
        solver = f"pvd, {self.solver.name}" if self.solver.name else self.facts()[0]
        foreign = f", {self.directions.kind} directions" if self.forget_me_not else " without forget-me-not"
        rule = f"{self.processors} processors{foreign}, {self.synchronisation} synchronisation"
        clip = self.plan.clip_norm
        clipped = "" if clip is None else f"each processor's gradient clipped at {clip:g}"
        smooth = "smooth in time across cuts" if self.plan.regularisation.get("smoothness") else ""
        return "; ".join(filter(None, [solver, rule, self.plan.loss.describe(), clipped, smooth]))

    @override
    def groups(self, workers: int) -> list[range]:
        if workers > self.processors:
            raise ValueError(
                f"{workers} workers for {self.processors} processor(s): raise strategy.processors, or lower "
                "trainer.devices"
            )
        # All processors cost the same, since each computes the whole network.
        bounds = balanced([1.0] * self.processors, workers)
        return [range(a, b) for a, b in pairwise(bounds)]

    @override
    def check_replicas(self, replicas: int) -> None:
        refuse_in_pvd(replicas)

    @override
    def schedule(self, groups: int, replicas: int = 1) -> str:
        rows = []
        for rank, group in enumerate(self.groups(groups)):
            share = f"{len(group)}/{self.processors}"
            turns = ", then ".join(f"processor {i}" for i in group)
            rows.append(f"worker {rank}  {share} of the gradient | {turns} | {share} of the synchronisation")
        return "\n".join(rows)

    @property
    @override
    def local_stages(self) -> range:
        # Every worker has the whole network; what workers share out is the processors.
        return range(self.processors)

    @override
    def configure_callbacks(self) -> list[Callback]:
        trainer: Any = self.trainer  # Lightning does not declare the attribute
        # The Trainer may have a subclass of PVDLoop, which Lightning would not replace by this.
        return [] if any(isinstance(each, PVDLoop) for each in trainer.callbacks) else [PVDLoop()]

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        # Lightning calls it before it loads a checkpoint.
        if stage == "fit":
            self._forget()
            trainer: Any = self.trainer
            check_memory(trainer.datamodule, self.objective_samples)

    @override
    def make_optimizers(self) -> list[tuple[str, Optimizer]]:
        plan, stages = self.plan, [stage for _, stage in self.own_stages()]
        decay = plan.optimizer.get("weight_decay", 0.0)
        objective = Objective(stages, plan.loss, plan.regularisation, decay, self.recorder)
        shared = SharedObjective(objective, self.placement, self.processors, self.recorder)
        x = objective.read()
        problems = {i: Subproblem(i, x, self.forget_me_not) for i in self.placement.own}
        processors = {i: Processor(p, self.solver, self.acceptance, shared) for i, p in problems.items()}
        search = Search(shared.evaluate, shared.differentiate, self.synchronisation_steps)
        self._iterations = Iterations(
            shared,
            Samples(self.objective_samples, self.spec.seed),
            self.chunk_samples,
            processors,
            self.directions,
            partial(self._rule, search=search),
            self._progress,
        )
        return [(f"stage_{i}", processor.optimizer) for i, processor in processors.items()]

    @property
    def iterations(self) -> Iterations:
        """The iterations of the present training."""
        assert self._iterations is not None
        return self._iterations

    @property
    def iterating(self) -> bool:
        """Whether an iteration is under way."""
        return self._iterations is not None and self._iterations.current is not None

    def begin_iteration(self) -> None:
        """Compute the directions, or continue the iteration of a checkpoint."""
        self.iterations.begin(self.trainer.train_dataloader, self.current_epoch)

    def end_iteration(self) -> None:
        """Exchange the candidates of all processors, and move to the next point."""
        self.report = self.iterations.end()

    def is_done(self) -> bool:
        """Whether the last iteration has reached ``target_accuracy`` or fallen below ``min_decrease``."""
        if not self.report:
            return False
        before, after = self.report["pvd/objective_before"], self.report["pvd/objective_after"]
        if self.target_accuracy is not None and self.report["pvd/accuracy"] >= self.target_accuracy:
            return True
        return self.min_decrease is not None and before - after < self.min_decrease * abs(before)

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        iteration = self.iterations.current
        if iteration is None:
            raise UserError(
                "PVD iterates by PVDLoop: let your configure_callbacks add to what super()'s returns"
            )
        x, labels = batch
        assert x is not None
        self.recorder.begin(self.runtime.batch, timed=False, cuda=labels.is_cuda)
        chunks = list(zip(x.split(self.chunk_samples), labels.split(self.chunk_samples), strict=True))
        try:
            for i, processor in self.iterations.processors.items():
                loss, right = map(torch.tensor, processor.descend(chunks, self.step_optimizer))
                if i == 0:
                    self.runtime.means.add(loss, right, self.plan.loss.normaliser(labels), len(labels))
        finally:
            # Between batches, also for a checkpoint after an error, the weights are those of the last synchronisation.
            self.iterations.shared.objective.write(iteration.start.point)
        self.runtime.batch += 1
        self.end_batch()

    @override
    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        # The report is empty if the run ends within an iteration, by max_time; then the weights are those of its start.
        self.log_dict(self.report)
        self.report = {}

    @override
    def evaluate(self, batch: Batch) -> None:
        x, labels = batch
        loss = self.plan.loss
        if self.placement.peers.rank == 0:
            assert x is not None
            logits = self(x)
            self.evaluation.add(loss.total(logits, labels), hits(logits, labels))
        self.evaluation.count(loss.normaliser(labels), len(labels))

    @override
    def identity(self) -> dict[str, Any]:
        identity = super().identity()
        processors = identity.pop("strategy.stages")
        return {**identity, "strategy.processors": processors}

    @override
    def training_identity(self) -> dict[str, Any]:
        own = {"strategy.local_solver": self.local_solver, "strategy.forget_me_not": self.forget_me_not}
        return own if self.solver.name else {**super().training_identity(), **own}

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        # Other workers save the other blocks.
        own = tuple(f"stages.{i}." for i in self.placement.own)
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k.startswith(own)}
        checkpoint["pvd"] = {
            "evaluations": self._progress.evaluations,
            "squares": self.directions.squares,
            "count": self.directions.count,
        }
        if self._iterations is not None and self._iterations.current is not None:
            checkpoint["pvd"]["directions"] = self._iterations.current.directions
            checkpoint["waiting"] = self._iterations.positions()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["pvd"]
        interrupted = (state["directions"], checkpoint["waiting"]) if "waiting" in checkpoint else None
        self._progress = Progress(dict(state["evaluations"]), is_resumed=True, interrupted=interrupted)
        self.directions.squares, self.directions.count = state["squares"], state["count"]


def _check(plan: Plan) -> None:
    """Refuse settings with which the objective is not a function of the weights alone."""
    for key in ("normalisation", "opening_normalisation"):
        if getattr(plan.spec, key) == "batch":
            raise ValueError(
                f"model.{key}=batch does not go with strategy=pvd, whose objective must depend on the weights alone; "
                "choose another normalisation or none"
            )
    if plan.optimizer["name"] == "adamw" and plan.optimizer.get("weight_decay"):
        raise ValueError(
            "strategy.optimizer.name=adamw does not go with strategy=pvd: its decay is no part of an objective; choose "
            "adam, or set strategy.optimizer.weight_decay to 0"
        )


def _check_counts(**counts: int | None) -> None:
    for key, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"strategy.{key}={count} must be at least 1")
