"""Parallel variable distribution: processors that each minimise over a block of the weights, and then synchronise.

Ferris & Mangasarian 1994; Solodov 1997 for inexact subproblems. The variables x are the weights of a network that is
cut into p stages: block l is what belongs to stage l, a range of time (with the first the opening, with the last the
classifier, a connector with the step before it). The objective f is the mean loss on fixed samples plus penalties.
An iteration, which is an epoch, goes from x to x+:

    d = directions(-grad f(x))                                       one a block, see `Directions`
    (x_l, m) minimises f(x_l, x_j + m_j d_j for j != l), inexactly   processor l, all l at once, from x with m = 0
    x^(l) is that point if f(x^(l)) <= f(x), otherwise x             so that no processor returns a worse point
    x+ = best x^(l), or sum_l w_l x^(l) with sum_l w_l = 1           see `synchronisation.py`; f(x+) <= f(x)

The local solver sees the epoch's batches and takes ``local_steps`` steps on each; a batch as large as the training
set makes it a deterministic one. All that is compared is compared on f, in full precision.

A worker has the whole network and one or more processors. What f and its gradient cost is shared: processor l takes
the l-th part of the samples. What crosses between workers in an iteration is one block and p - 1 scalars a processor,
sums of losses, and the parts of each gradient of f, the one thing as long as the network: not to send it, every
worker would have to compute all of it. Sums of losses are exact and parts of gradients are added in the order of the
processors, so that the result does not depend on the placement, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from sglight.errors import UserError
from sglight.networks.network import balanced
from sglight.strategies.base import Batch, StagedModule
from sglight.strategies.objective import Chunk, Objective, Point, Sums, draw, gather, in_order
from sglight.strategies.optim import forget_moments, make_optimizer, optimizer_settings
from sglight.strategies.sharing import SharedObjective, times
from sglight.strategies.subproblem import Directions, Subproblem, candidate
from sglight.strategies.synchronisation import (
    SYNCHRONISATIONS,
    Evaluated,
    Search,
    Synchronised,
    no_worse,
)

SOLVERS = ("first_order", "lbfgs")


@dataclass
class Iteration:
    """What is fixed while the processors are at work.

    Attributes:
        start: the point from which it goes. directions: one a block.
        rest_s: seconds that finding them took besides the processors' shares.
    """

    start: Evaluated
    directions: Point
    rest_s: float


class PVD(StagedModule):
    """p processors, one a block; other arguments as in `StagedModule`. It needs the callback `PVDLoop`.

    >>> pl.Trainer(callbacks=[PVDLoop()]).fit(
    ...     PVD(network, optimizer, processors=2), datamodule
    ... )  # doctest: +SKIP

    Args:
        optimizer: of the local solver; its weight decay is part of the objective, as decay/2 ||x||^2.
        processors: p, from 1 to the number of steps.
        forget_me_not: whether a processor moves the foreign blocks along their directions.
        directions: ``gradient``, ``normalised`` or ``rms``, see `Directions`; None: ``rms`` for Adam, whose steps are
            of that size, else ``normalised``.
        local_solver: ``first_order``, steps of the optimiser, which keeps its moments over the iterations; or
            ``lbfgs``, begun anew on each batch, without the optimiser's settings.
        local_steps: of the local solver on each batch; at most so many with ``lbfgs``.
        synchronisation: ``best``, ``average`` or ``affine``, see `synchronisation.py`.
        synchronisation_steps: most iterations of the search for affine weights.
        objective_samples: f is the mean over so many training samples, drawn anew for each iteration; None for all.
        chunk_samples: most samples that pass the network at once.
        target_accuracy: the training ends when so large a share of the objective's samples is right; None for never.
        min_decrease: the training ends when an iteration lowers f by a smaller part than this; None for never.

    Attributes:
        iteration: the one under way. report: what the last one has come to, by name, until it is logged.

    Raises:
        ValueError: for choices that do not exist or do not go together; the text names the key.
    """

    part = "processor"
    inputs_everywhere = True

    def __init__(
        self,
        network: Mapping[str, Any],
        optimizer: Mapping[str, Any],
        scheduler: Mapping[str, Any] | None = None,
        clip_norm: float | None = None,
        regularisation: Mapping[str, float] | None = None,
        processors: int = 2,
        forget_me_not: bool = True,
        directions: str | None = None,
        local_solver: str = "first_order",
        local_steps: int = 1,
        synchronisation: str = "affine",
        synchronisation_steps: int = 4,
        objective_samples: int | None = None,
        chunk_samples: int = 1024,
        target_accuracy: float | None = None,
        min_decrease: float | None = None,
    ) -> None:
        optimizer = optimizer_settings(optimizer)
        _check(network, optimizer, clip_norm, local_solver, synchronisation)
        counts = {
            "local_steps": local_steps,
            "synchronisation_steps": synchronisation_steps,
            "objective_samples": objective_samples,
            "chunk_samples": chunk_samples,
        }
        for key, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"strategy.{key}={count} must be at least 1")
        try:
            super().__init__(network, optimizer, scheduler, clip_norm, regularisation, processors)
        except ValueError as error:
            raise ValueError(str(error).replace("strategy.stages", "strategy.processors")) from error
        self.processors = processors
        self.forget_me_not = forget_me_not
        adaptive = local_solver == "first_order" and optimizer["name"] in ("adam", "adamw")
        self.directions = Directions(directions or ("rms" if adaptive else "normalised"))
        self.local_solver, self.local_steps = local_solver, local_steps
        self.synchronisation, self.synchronisation_steps = synchronisation, synchronisation_steps
        self.objective_samples, self.chunk_samples = objective_samples, chunk_samples
        self.target_accuracy, self.min_decrease = target_accuracy, min_decrease
        self._forget()

    def _forget(self) -> None:
        """Forget an earlier training."""
        self.directions = Directions(self.directions.kind)
        self.iteration: Iteration | None = None
        self.report: dict[str, float] = {}
        self._shared: SharedObjective | None = None
        self._problems: dict[int, Subproblem] = {}
        self._training_samples = 0
        # Value and accuracy after the last iteration.
        self._reached: tuple[float, float] | None = None
        # In passes through the training set.
        self._evaluations = {"gradient": 0.0, "function": 0.0}
        # An iteration to go on with, as `on_save_checkpoint` has left it.
        self._interrupted: dict[str, Any] | None = None
        self._resumed = False

    @override
    def describe(self) -> str:
        solver = super().describe() if self.local_solver == "first_order" else "pvd, L-BFGS"
        foreign = f", {self.directions.kind} directions" if self.forget_me_not else " without forget-me-not"
        return f"{solver}; {self.processors} processors{foreign}, {self.synchronisation} synchronisation"

    @override
    def groups(self, workers: int) -> list[range]:
        if workers > self.processors:
            raise ValueError(
                f"{workers} workers for {self.processors} processor(s): raise strategy.processors, or lower "
                "trainer.devices"
            )
        # Each passes the whole network.
        bounds = balanced([1.0] * self.processors, workers)
        return [range(a, b) for a, b in pairwise(bounds)]

    @override
    def schedule(self, workers: int) -> str:
        rows = []
        for rank, group in enumerate(self.groups(workers)):
            share = f"{len(group)}/{self.processors}"
            turns = ", then ".join(f"processor {i}" for i in group)
            rows.append(f"worker {rank}  {share} of the gradient | {turns} | {share} of the synchronisation")
        return "\n".join(rows)

    @property
    @override
    def held(self) -> range:
        # Every worker has the whole network; its own are the processors.
        return range(self.processors)

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        # Comes before a checkpoint is loaded.
        if stage == "fit":
            self._forget()

    @override
    def make_optimizers(self) -> list[tuple[str, Optimizer]]:
        stages = [stage for _, stage in self.own_stages()]
        decay = self.optimizer_config.get("weight_decay", 0.0)
        objective = Objective(stages, self.regularisation, decay, self.recorder)
        self._shared = SharedObjective(objective, self.placement, self.processors, self.recorder)
        x = objective.read()
        self._problems = {i: Subproblem(i, x, self.forget_me_not) for i in self.placement.own}
        return [(f"stage_{i}", self._local_optimizer(problem)) for i, problem in self._problems.items()]

    def _local_optimizer(self, problem: Subproblem) -> Optimizer:
        if self.local_solver == "lbfgs":
            return torch.optim.LBFGS(
                problem.variables, max_iter=self.local_steps, line_search_fn="strong_wolfe"
            )
        # The decay is in the objective.
        return make_optimizer({**self.optimizer_config, "weight_decay": 0.0}, problem.variables)

    @property
    def shared(self) -> SharedObjective:
        """f, while there is a training."""
        assert self._shared is not None
        return self._shared

    def begin_iteration(self) -> None:
        """Choose the samples of f, evaluate the weights, and find the directions; or go on where a checkpoint was."""
        began, waited = perf_counter(), self.placement.peers.waited_s
        self.shared.forget()
        self._choose_samples()
        x = self.shared.objective.read()
        if self._resumed:
            self._evaluate_again(x)
        if self._interrupted is not None:
            self._go_on(x, self._interrupted)
            return
        known = self._reached if self.objective_samples is None else None
        start = self.shared.evaluate(x, "directions") if known is None else Evaluated(x, *known)
        if start.value == math.inf:
            raise UserError(
                "the loss is not finite before the training: lower model.horizon or model.init_scale"
            )
        directions = self.directions(self.shared.differentiate(x, "directions")[1])
        for problem in self._problems.values():
            problem.begin(x, directions)
        self.iteration = Iteration(start, directions, self._rest("directions", began, waited))

    def _evaluate_again(self, x: Point) -> None:
        """After a resumption: data or penalties may be others than before, and then f is."""
        self._resumed = False
        now = self.shared.evaluate(x, "directions")
        self._reached = now.value, now.accuracy
        # A training that was not interrupted does without.
        self.shared.forget()

    def _go_on(self, x: Point, state: dict[str, Any]) -> None:
        """Take up an iteration where it was interrupted."""
        directions = [d.to(block) for d, block in zip(state["directions"], x, strict=True)]
        for i, problem in self._problems.items():
            block, scalars, samples = state["processors"][f"processor_{i}"]
            problem.begin(x, directions)
            problem.move(block, scalars)
            self.shared.tallies[i].samples.update(samples)
        assert self._reached is not None
        self.iteration = Iteration(Evaluated(x, *self._reached), directions, 0.0)
        self._interrupted = None

    def _choose_samples(self) -> None:
        """Gather the samples of f: all of them once, or a part for each iteration."""
        if self._training_samples and self.objective_samples is None:
            return
        batches, rows = in_order(self.trainer.train_dataloader), None
        self._training_samples = self._training_samples or sum(len(labels) for _, labels in batches)
        if self.objective_samples is not None:
            rows = draw(self._training_samples, self.objective_samples, self.spec.seed, self.current_epoch)
        self.shared.use(gather(batches, rows, next(self.stages.parameters())), self.chunk_samples)

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        if self.iteration is None:
            raise UserError("PVD iterates by a callback: give the Trainer callbacks=[PVDLoop()]")
        x, labels = batch
        assert x is not None
        self.recorder.begin(self.global_step, timed=False, cuda=labels.is_cuda)
        chunks = list(zip(x.split(self.chunk_samples), labels.split(self.chunk_samples), strict=True))
        try:
            for problem, optimizer in zip(self._problems.values(), self.wrapped_optimizers(), strict=True):
                self._descend(problem, optimizer, chunks)
        finally:
            # Between batches, and in what is saved after an error, the weights are those of the last synchronisation.
            self.shared.objective.write(self.iteration.start.point)
        self.end_batch()

    def _descend(self, problem: Subproblem, optimizer: Any, chunks: list[Chunk]) -> None:
        """A processor's steps on a batch."""
        own, steps, seen = problem.own, self.local_steps, list[Sums]()
        if self.local_solver == "lbfgs":
            steps = 1  # one call takes all

        def closure() -> float:
            with self.shared.counted(own, "local", chunks, "gradient"):
                sums, value, gradient = self.shared.objective.on_batch(
                    problem.point(), chunks, problem.wanted, own
                )
            seen.append(sums)
            problem.pull_back(gradient)
            if self.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(problem.variables, self.clip_norm)
            return value

        for step in range(steps):
            # Lightning counts the steps of its wrapper: one a batch.
            counts = step == 0 and own == self.placement.own[0]
            (optimizer if counts else optimizer.optimizer).step(closure)
        if self.local_solver == "lbfgs":
            # The next batch is another objective, with another curvature.
            optimizer.optimizer.state.clear()
        if own == 0:
            self.record_sums(torch.tensor(seen[0]), sum(len(labels) for _, labels in chunks))

    def end_iteration(self) -> None:
        """Exchange the candidates and go to the next point."""
        assert self.iteration is not None
        start, directions = self.iteration.start, self.iteration.directions
        everyone = self.shared.of_all({i: self._candidate(problem) for i, problem in self._problems.items()})
        began, waited = perf_counter(), self.placement.peers.waited_s
        candidates, scalars = list[Evaluated](), list[list[float]]()
        for i, (block, m, value, accuracy) in everyone.items():
            point = candidate(start.point, directions, i, block.to(self.device), m.to(self.device))
            candidates.append(Evaluated(point, value, accuracy))
            scalars.append(m.tolist())
        search = Search(self.shared.evaluate, self.shared.differentiate, self.synchronisation_steps)
        result = SYNCHRONISATIONS[self.synchronisation](start, candidates, search)
        self.shared.objective.write(result.reached.point)
        self._reached = result.reached.value, result.reached.accuracy
        rest_s = self.iteration.rest_s + self._rest("synchronisation", began, waited)
        self.report = outcome(start, candidates, scalars, result) | self._costs(rest_s)
        self.iteration = None

    def _candidate(self, problem: Subproblem) -> tuple[Tensor, Tensor, float, float]:
        """A processor's block and scalars, with value and accuracy there: of where it began if it was better there."""
        assert self.iteration is not None
        found = self.shared.alone(problem.own, problem.point(), "local")
        if not no_worse(found, self.iteration.start):
            found = self.iteration.start
            problem.begin(found.point, self.iteration.directions)
            # What has led astray would do so again.
            forget_moments(self.trainer.optimizers[list(self._problems).index(problem.own)])
        return problem.block.detach().clone(), problem.scalars.detach().clone(), found.value, found.accuracy

    def _rest(self, phase: str, began: float, waited: float) -> float:
        """Seconds since ``began`` in which this worker neither did the processors' shares nor waited for others."""
        parts = sum(tally.seconds[phase] for tally in self.shared.tallies.values())
        return perf_counter() - began - parts - (self.placement.peers.waited_s - waited)

    def _costs(self, rest_s: float) -> dict[str, float]:
        """What an iteration has cost on all processors, by name, and the evaluations until now."""
        tallies, rest_s = self.shared.costs(rest_s)
        for kind in self._evaluations:
            self._evaluations[kind] += sum(tally.samples[kind] for tally in tallies) / self._training_samples
        evaluations = {f"pvd/{kind}_evaluations": number for kind, number in self._evaluations.items()}
        return {**evaluations, **times(tallies, rest_s)}

    def is_done(self) -> bool:
        """Whether the last iteration has reached what the training is to end with."""
        if not self.report:
            return False
        before, after = self.report["pvd/objective_before"], self.report["pvd/objective_after"]
        if self.target_accuracy is not None and self.report["pvd/accuracy"] >= self.target_accuracy:
            return True
        return self.min_decrease is not None and before - after < self.min_decrease * abs(before)

    @override
    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        # Empty if the run ends in mid-iteration (max_time): the weights are those with which that began.
        self.log_dict(self.report)
        self.report = {}

    @override
    def _evaluate(self, batch: Batch) -> None:
        x, labels = batch
        if self.placement.peers.rank == 0:
            assert x is not None
            self.record_evaluation(self(x), labels)
        self._evaluated_samples += len(labels)

    @override
    def identity(self) -> dict[str, Any]:
        identity = super().identity()
        processors = identity.pop("strategy.stages")
        return {**identity, "strategy.processors": processors}

    @override
    def training_identity(self) -> dict[str, Any]:
        own = {"strategy.local_solver": self.local_solver, "strategy.forget_me_not": self.forget_me_not}
        return own if self.local_solver == "lbfgs" else {**super().training_identity(), **own}

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        # The other blocks come from the other workers.
        own = tuple(f"stages.{i}." for i in self.placement.own)
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k.startswith(own)}
        checkpoint["pvd"] = {
            "evaluations": self._evaluations,
            "squares": self.directions.squares,
            "count": self.directions.count,
        }
        if self.iteration is not None:
            checkpoint["pvd"]["directions"] = self.iteration.directions
            checkpoint["waiting"] = {
                f"processor_{i}": (problem.block.detach(), problem.scalars.detach(), dict(tally.samples))
                for (i, problem), tally in zip(
                    self._problems.items(), self.shared.tallies.values(), strict=True
                )
            }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["pvd"]
        self._resumed = True
        self._evaluations = dict(state["evaluations"])
        self.directions.squares, self.directions.count = state["squares"], state["count"]
        if "waiting" in checkpoint:
            self._interrupted = {**state, "processors": checkpoint["waiting"]}


def outcome(
    start: Evaluated, candidates: list[Evaluated], scalars: list[list[float]], result: Synchronised
) -> dict[str, float]:
    """What an iteration has come to, by name; ``scalars``: each processor's, by foreign block in order."""
    found = {
        "pvd/objective_before": start.value,
        "pvd/objective_after": result.reached.value,
        "pvd/accuracy": result.reached.accuracy,
        "pvd/winner": float(result.winner),
        "pvd/weight_current": result.weights[0],
    }
    for i, (candidate_i, ms) in enumerate(zip(candidates, scalars, strict=True)):
        found |= {f"pvd/candidate_{i}": candidate_i.value, f"pvd/weight_{i}": result.weights[i + 1]}
        foreign = (j for j in range(len(candidates)) if j != i)
        found |= {f"pvd/scalar_{i}_{j}": m for j, m in zip(foreign, ms, strict=False)}
    return found


def _check(
    network: Mapping[str, Any],
    optimizer: Mapping[str, Any],
    clip_norm: float | None,
    local_solver: str,
    synchronisation: str,
) -> None:
    """Refuse what is no function of the weights, and what a local solver cannot do."""
    for key in ("normalisation", "opening_normalisation"):
        if network.get(key) == "batch":
            raise ValueError(
                f"model.{key}=batch does not go with strategy=pvd, whose objective must depend on the weights alone; "
                "choose another normalisation or none"
            )
    for key, value, options in (
        ("local_solver", local_solver, SOLVERS),
        ("synchronisation", synchronisation, tuple(SYNCHRONISATIONS)),
    ):
        if value not in options:
            raise ValueError(f"strategy.{key}={value} is unknown; choose one of {', '.join(options)}")
    if optimizer["name"] == "adamw" and optimizer.get("weight_decay"):
        raise ValueError(
            "strategy.optimizer.name=adamw does not go with strategy=pvd: its decay is no part of an objective; choose "
            "adam, or set strategy.optimizer.weight_decay to 0"
        )
    if local_solver == "lbfgs" and clip_norm is not None:
        raise ValueError("strategy.clip_norm does not go with strategy.local_solver=lbfgs; set it to null")
