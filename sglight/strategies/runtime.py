"""Carries out the actions of a schedule for the stages of one worker.

A batch is cut into pieces, its microbatches. For each piece, in the order that the schedule gives:

    forward    computes h_i = stage_i(h_{i-1}), and sends h_i to the next stage, without its autograd graph
    backward   takes the gradient dL/dh_i at the end of the stage from the gradient source (at the last stage it is
               that of the summed loss), computes the gradients of the stage's parameters and dL/dh_{i-1}, and sends
               the latter to the stage before, if the source wants it
    arrive     computes dL/dh_{i-1} from the true gradient, when that has come, in a second backward pass
    learn      lets the estimator after the stage learn from the true gradient
    update     steps the optimiser of the stage with the sum of the gradients of all pieces of a batch

If there are several replicas of a stage, each takes a part of every piece. The sum of their gradients begins as soon
as the last piece of a batch has gone backward, and the update at the end of the round waits for it. Meanwhile other
stages of this worker go backward.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from sglight.errors import UserError
from sglight.gradients import Boundary, Passage
from sglight.gradients.base import compare, own_statistics
from sglight.link import alone, local_channels
from sglight.networks import Stage
from sglight.networks.drift import drift
from sglight.strategies import descent
from sglight.strategies.evaluation import TrainingMeans, hits
from sglight.strategies.plan import Plan
from sglight.strategies.recorder import Recorder
from sglight.strategies.replication import begin_sum
from sglight.strategies.schedule import Action

# One batch in every so many is timed.
TIMED_EVERY = 5
# One batch in every so many compares, in its first piece, rebuilt states with those of the forward pass.
DRIFT_EVERY = 100


class Observer:
    """Is called at each round and each update. This one does nothing; subclasses measure gradients."""

    def before_round(self, runtime: Runtime, n: int) -> None:
        """Is called before the actions of round n."""

    def on_gradient(self, i: int, passage: Passage, gradient: Tensor) -> None:
        """Is called with the gradient at the end of stage i, not the last, before a backward pass uses it.

        The gradient may be in memory that the channel overwrites later; copy it to keep it.
        """

    def before_update(self, runtime: Runtime, i: int, n: int, normaliser: float) -> None:
        """Is called before stage i is updated in round n; its gradients are sums, and means after division.

        Args:
            runtime: has the stage.
            i: number of the stage.
            n: number of the round.
            normaliser: what the gradients will be divided by.
        """

    def after_round(self, n: int) -> None:
        """Is called after the actions of round n."""


class Runtime:
    """Carries out a schedule with the stages of one worker.

    Args:
        plan: of the network as it is now; replaced when it is refined.
        stages: those of this process, by number.
        estimators: those of this process, by the number of the stage before them.
        step: steps the optimiser of a stage, and clears its gradients.

    Attributes:
        placement: which stages are here, and the channels to the others.
        batch: the number of batches that the training has had.
        round: the number of pieces since the pipeline was last empty.
        means: loss and accuracy of the training and of its epoch, kept at the last stage, or at the stage ``counter``.
        observer: is called at each round and each update.
        lessons: the loss of the last lesson of each estimator, by boundary.
        comparing: whether backward passes compare true gradients with those that estimators predict.
        comparisons: the results of that, by name.
        drifts: the largest relative error of rebuilt states, by stage, if it has just been measured.
    """

    def __init__(
        self, plan: Plan, stages: nn.ModuleDict, estimators: nn.ModuleDict, step: Callable[[int], None]
    ) -> None:
        self.plan, self.stages, self.estimators, self.step = plan, stages, estimators, step
        self.placement = alone(plan.last + 1)
        self.counter: int | None = None
        self.observer = Observer()
        self.forget()

    def forget(self) -> None:
        """Start a new training, without the state of an earlier one."""
        self.recorder = Recorder()
        self.means = TrainingMeans()
        self.lessons: dict[int, Tensor] = {}
        self.comparing = False
        self.comparisons: dict[str, Tensor] = {}
        self.drifts: dict[int, Tensor] = {}
        if len(self.placement.own) == self.plan.last + 1:  # channels of a failed training may hold something
            states, gradients = (local_channels(self.plan.last + 1) for _ in range(2))
            self.placement = replace(self.placement, states=states, gradients=gradients)
        self.begin(0)

    def begin(self, batch: int, round_: int = 0) -> None:
        """Continue at a batch of a training, with ``round_`` pieces since the pipeline was last empty."""
        self.batch, self.round = batch, round_
        # By stage, oldest first: the pieces between their forward pass and their last action.
        self.window: dict[int, deque[Passage]] = {i: deque() for i in range(self.plan.last + 1)}
        # By stage: the divisor of the present gradients of its parameters. By batch in the pipeline: the same.
        self.normalisers: dict[int, float] = {}
        self.totals: dict[int, float] = {}
        # By stage: a function that waits for the sum of its gradients over the replicas.
        self._under_way: dict[int, Callable[[], None]] = {}
        # By stage: a copy of its present parameters, if a piece has gone forward with such a copy.
        self._copies: dict[int, dict[str, Tensor]] = {}
        # By stage: gradients of a checkpoint, until the training begins.
        self.sums: dict[int, dict[str, Tensor]] = {}

    def stage(self, i: int) -> Stage:
        """Stage i, which must be in this process."""
        stage = self.stages[str(i)]
        assert isinstance(stage, Stage)
        return stage

    def boundary(self, i: int) -> Boundary:
        """The boundary after stage i."""
        key = str(i)
        estimator = self.estimators[key] if key in self.estimators else None  # noqa: SIM401
        return self.plan.boundary(i, estimator)

    @property
    def boundaries(self) -> list[int]:
        """The numbers of the stages here that are followed by another stage."""
        return [i for i in self.placement.own if i < self.plan.last]

    def train(self, x: Tensor | None, labels: Tensor) -> None:
        """Train on one batch, in one round for each of its pieces.

        Args:
            x: the inputs ``[B, ...]``; None if the first stage is in another process.
            labels: ``[B]``.
        """
        schedule, own, last = self.plan.schedule, self.placement.own, self.plan.last
        # If only every n-th batch has a lesson, n batches in a row are timed, so that one of them has it.
        timed = self.batch % TIMED_EVERY < max(self.plan.source.lesson_every, 1)
        self.recorder.begin(self.batch, timed, labels.is_cuda)
        self._first = self._batch_of_first_piece()
        self._normaliser = self.plan.loss.normaliser(labels)
        oldest = self.batch - schedule.latency(last) - 1
        self.totals = {batch: total for batch, total in self.totals.items() if batch >= oldest}
        self.totals[self.batch] = self._normaliser
        self._check_statistics(len(labels))
        for piece in self.shares(x, labels):
            self._carry_out(self.round, schedule.actions(self.round, own, last), *piece)
        self.batch += 1

    def shares(self, x: Tensor | None, labels: Tensor) -> Iterator[tuple[Tensor | None, Tensor]]:
        """The inputs and labels that this replica gets of each piece of a batch; perhaps none.

        Args:
            x: the inputs ``[B, ...]``; None if the first stage is in another process.
            labels: ``[B]``.
        """
        pieces, share = self.plan.schedule.pieces, self.placement.replicas.share
        inputs = [None] * pieces if x is None else x.tensor_split(pieces)
        for part, own in zip(inputs, labels.tensor_split(pieces), strict=True):
            yield None if part is None else share(part), share(own)

    def _check_statistics(self, samples: int) -> None:
        """Refuse a batch that is too small for each replica to have a sample in each piece."""
        pieces, replicas = self.plan.schedule.pieces, self.placement.statistics.size
        if replicas > 1 and samples < pieces * replicas:
            raise UserError(
                f"trainer.sync_batchnorm=true needs {pieces * replicas} samples in every batch, one for each of "
                f"trainer.replicas={replicas} in each of {pieces} microbatch(es), and there is a batch of {samples}: "
                "choose another dataset.batch_size, or set trainer.sync_batchnorm=false"
            )

    def drain(self) -> None:
        """Complete all pieces in the pipeline, so that it is empty."""
        self._first = self._batch_of_first_piece()
        rest = self.plan.schedule.rest(self.round, self.placement.own, self.plan.last)
        for n, actions in enumerate(rest, self.round):
            self._carry_out(n, actions, None, None)
        self.round = 0

    def _carry_out(self, n: int, actions: Iterable[Action], x: Tensor | None, labels: Tensor | None) -> None:
        """Carry out the actions of round n, with the piece that enters the pipeline in it, if there is one."""
        self.observer.before_round(self, n)
        updates, schedule = list[Action](), self.plan.schedule
        for action in actions:
            match action.kind:
                case "forward":
                    assert labels is not None
                    self._forward(action, x, labels)
                case "backward":
                    self._backward(action)
                    if schedule.flushes and (action.piece + 1) % schedule.pieces == 0:
                        self._begin_sum(action.stage)  # updates come after all backward passes
                case "arrive":
                    self._arrive(action, draining=labels is None)
                case "learn":
                    self._learn(action)
                case "update" if self.placement.replicas.size > 1:
                    if not schedule.flushes:
                        self._begin_sum(action.stage)
                    updates.append(action)
                case "update":
                    self._update(action, n)
        for action in updates:
            self._update(action, n)
        self.round = n + 1
        self.observer.after_round(n)

    def _begin_sum(self, i: int) -> None:
        """Begin to sum the gradients of stage i over the replicas, if there are several."""
        if self.placement.replicas.size > 1:
            self._under_way[i] = begin_sum(self.stage(i).parameters(), self.placement.replicas)

    def _forward(self, action: Action, x: Tensor | None, labels: Tensor) -> None:
        i, source, piece = action.stage, self.plan.source, action.piece
        if not len(labels):  # a batch with fewer samples than pieces
            return
        entered = self.enter(i, x, len(labels), keep=self.plan.schedule.overlaps(i, self.plan.last))
        passage = Passage(piece, self._batch_of(piece), labels, entered, None, entered, self._normaliser)
        if self.plan.rebuilds and passage.batch % DRIFT_EVERY == 0 and piece % self.plan.schedule.pieces == 0:
            with own_statistics(self.stage(i)):
                self.drifts[i] = drift(self.stage(i), entered)
        wanted = i > 0 and source.wants(passage.batch)
        if wanted:
            entered.requires_grad_()
        if source.stashes and self._latency and self.plan.schedule.staleness(i, piece, self.plan.last):
            passage.weights = self._copy(i)
        with self.recorder.phase("forward", i):
            output = source.forward(self.stage(i), passage)
        if wanted and passage.entered is not None:  # it may have been replaced
            passage.entered.requires_grad_()
        passage.state = output.detach()
        passage.output = output if output.requires_grad else None
        if i < self.plan.last:
            self.send_state(i, passage.state)
        self.window[i].append(passage)

    @property
    def _latency(self) -> int:
        return self.plan.schedule.latency(self.plan.last)

    def _copy(self, i: int) -> dict[str, Tensor]:
        """A copy of the parameters of stage i, shared by all pieces that go forward before its next update."""
        if i not in self._copies:
            parameters = self.stage(i).named_parameters()
            self._copies[i] = {name: p.detach().clone().requires_grad_() for name, p in parameters}
        return self._copies[i]

    def _backward(self, action: Action) -> None:
        i, plan, phase = action.stage, self.plan, self.recorder.phase
        passage, batch = self._passage(action), self._batch_of(action.piece)
        if passage is not None:
            self.normalisers[i] = passage.normaliser
        elif self.placement.replicas.size > 1 and batch in self.totals:
            self.normalisers[i] = self.totals[batch]
        if passage is None:  # of a piece without samples
            if self.placement.replicas.size > 1 and i < plan.last and plan.source.has_estimators:
                self._learn_without_samples(action)
            return
        assert passage.entered is not None
        gradient = None if i == plan.last else self._gradient(i, passage)
        again = plan.schedule.sends(i, plan.last) == "arrive"
        with phase("backward", i):
            output = passage.output = plan.source.output(self.stage(i), passage)
            if i == plan.last:
                output = plan.loss.total(output, passage.labels)
                right = hits(passage.state, passage.labels)
                self.means.add(output, right, plan.loss.normaliser(passage.labels), len(passage.labels))
            output.backward(gradient, retain_graph=again)
            if passage.weights is not None:
                _move_gradients(passage.weights, self.stage(i))
        if again:
            passage.entered.grad = None
            return
        if i > 0 and plan.source.wants(passage.batch):
            assert passage.entered.grad is not None
            self.send_gradient(i, passage.entered.grad)
        self._release(i, passage)

    def _release(self, i: int, passage: Passage) -> None:
        """Free the memory of a passage after its last backward pass; keep what a lesson needs."""
        passage.entered = passage.output = passage.weights = passage.ends = None
        if not self._is_lesson(i, passage):
            self.window[i].remove(passage)

    def _gradient(self, i: int, passage: Passage) -> Tensor:
        """The gradient at the end of a stage that is not the last."""
        source, boundary = self.plan.source, self.boundary(i)
        true = self._true_gradient(i, passage) if self.plan.schedule.waits else None
        if true is not None:
            if self.comparing:
                self.compare_estimate(i, passage, true)
            self._keep_for_lesson(i, passage, true)
        if not source.predicts:
            assert true is not None
            gradient = source.gradient(boundary, passage, true)
        else:
            with self.recorder.phase("estimate", i):
                gradient = source.gradient(boundary, passage, true)
            if passage.lesson is not None:
                self.lessons[i] = passage.lesson
        self.observer.on_gradient(i, passage, gradient)
        return gradient

    def _arrive(self, action: Action, draining: bool) -> None:
        """Carry the true gradient of a passage through the stage.

        Its parameters get their share of it, unless the pipeline is being drained, when no update would follow.
        """
        i, passage = action.stage, self._passage(action)
        if passage is None:  # of a piece without samples
            return
        assert passage.entered is not None and passage.weights is not None
        true = self._true_gradient(i, passage)
        self._keep_for_lesson(i, passage, true)
        part = 0.0 if draining else self.plan.source.part(passage.batch)
        with self.recorder.phase("arrive", i):
            output = self.plan.source.output(self.stage(i), passage)
            if part:
                output.backward(true)
                # The sum of gradients is that of another batch, and is divided by the normaliser of that batch.
                part *= self.normalisers[i] / passage.normaliser
                _move_gradients(passage.weights, self.stage(i), part)
            elif i > 0:
                (passage.entered.grad,) = torch.autograd.grad(output, passage.entered, true)
        if i > 0:
            assert passage.entered.grad is not None
            self.send_gradient(i, passage.entered.grad)
        self._release(i, passage)

    def _keep_for_lesson(self, i: int, passage: Passage, true: Tensor) -> None:
        """Keep a true gradient if the estimator will learn from it."""
        if self._is_lesson(i, passage):
            # The channel may overwrite this memory with the next gradient.
            passage.target = true.clone() if self.placement.gradients[i].lends else true

    def compare_estimate(self, i: int, passage: Passage, true: Tensor) -> None:
        """Record how well the estimator after stage i predicts a true gradient."""
        estimate = self.plan.source.estimate(self.boundary(i), passage)
        named = compare(estimate, true).items()
        self.comparisons |= {f"estimator_{i}/{kind}": value for kind, value in named}

    def _learn(self, action: Action) -> None:
        i, passage = action.stage, self._passage(action)
        if passage is None:  # not of a batch from which estimators learn, or without samples
            if self.placement.replicas.size > 1:
                self._learn_without_samples(action)
            return
        if passage.target is None:
            passage.target = self._true_gradient(i, passage)
        with self.recorder.phase("learn", i):
            self.lessons[i] = self.plan.source.learn(self.boundary(i), passage)
        self.window[i].remove(passage)

    def _learn_without_samples(self, action: Action) -> None:
        """Take part in the lesson of all replicas if this one has no samples of the piece: they all must call it."""
        i, source, batch = action.stage, self.plan.source, self._batch_of(action.piece)
        parameter = next(self.stages.parameters())
        state = parameter.new_empty(self.plan.boundary_shape(i, 0))
        labels = torch.empty(0, dtype=torch.long, device=parameter.device)
        passage = Passage(action.piece, batch, labels, None, None, state, target=state)
        if not source.lesson_every:  # the estimator learns while it predicts a gradient
            if action.kind == "backward":
                source.gradient(self.boundary(i), passage, None)
                assert passage.lesson is not None
                self.lessons[i] = passage.lesson
        elif action.kind == "learn" and batch % source.lesson_every == 0:
            self.lessons[i] = source.learn(self.boundary(i), passage)

    def _update(self, action: Action, n: int) -> None:
        i, own = action.stage, self.placement.own
        together = self.plan.schedule.flushes
        for j in own if together and i == own[0] else () if together else [i]:
            if j in self._under_way:
                self._under_way.pop(j)()
            self.observer.before_update(self, j, n, self.normalisers[j])
        with self.recorder.phase("backward", i):
            normaliser = self.normalisers[i]
            if not together:
                descent.prepare_stage(self.plan, self.stage(i), normaliser)
            elif i == own[0]:
                descent.prepare_network(self.plan, [self.stage(j) for j in own], normaliser, self.placement)
            self.step(i)
        self._copies.pop(i, None)

    def _passage(self, action: Action) -> Passage | None:
        return next((p for p in self.window[action.stage] if p.piece == action.piece), None)

    def _batch_of(self, piece: int) -> int:
        """The number of the batch that a piece belongs to, counted from the beginning of the training."""
        return self._first + piece // self.plan.schedule.pieces

    def _batch_of_first_piece(self) -> int:
        """The number of the batch with which the pipeline began to fill; correct only between two batches."""
        return self.batch - self.round // self.plan.schedule.pieces

    def _is_lesson(self, i: int, passage: Passage) -> bool:
        every = self.plan.source.lesson_every
        return i < self.plan.last and every > 0 and passage.batch % every == 0

    def enter(self, i: int, x: Tensor | None, count: int, keep: bool = False) -> Tensor:
        """The tensor that enters stage i: the inputs, or the state from the stage before it.

        Args:
            i: number of the stage.
            x: the inputs, for the first stage.
            count: the number of samples.
            keep: whether the state must stay valid; otherwise the next call may overwrite it.
        """
        if i == 0:
            assert x is not None
            return x
        channel = self.placement.states[i - 1]
        with self.recorder.phase("wait", i):
            state = channel.receive(self.plan.boundary_shape(i - 1, count)).detach()
        return state.clone() if keep and channel.lends else state

    def send_state(self, i: int, state: Tensor) -> None:
        """Send the state at the end of stage i to the next stage."""
        with self.recorder.phase("send", i):
            self.placement.states[i].send(state)

    def send_gradient(self, i: int, gradient: Tensor) -> None:
        """Send the gradient at the beginning of stage i to the stage before it."""
        with self.recorder.phase("send", i):
            self.placement.gradients[i - 1].send(gradient)

    def receive_gradient(self, i: int, count: int) -> Tensor:
        """The next gradient from stage i + 1; the next call may overwrite it."""
        with self.recorder.phase("wait", i):
            return self.placement.gradients[i].receive(self.plan.boundary_shape(i, count))

    def _true_gradient(self, i: int, passage: Passage) -> Tensor:
        if passage.target is not None:
            return passage.target
        return self.receive_gradient(i, len(passage.labels))

    def collect(self) -> None:
        """Receive all gradients that have been sent to this worker, and keep them for later."""
        schedule, last = self.plan.schedule, self.plan.last
        for i in self.boundaries:
            behind = range(i + 1, i + 2)
            recent = range(max(self.round - schedule.latency(last) - 1, 0), self.round)
            answer = schedule.sends(i + 1, last)
            sent = {a.piece for n in recent for a in schedule.actions(n, behind, last) if a.kind == answer}
            for passage in self.window[i]:
                if passage.target is None and passage.piece in sent and self.plan.source.wants(passage.batch):
                    passage.target = self.receive_gradient(i, len(passage.labels)).clone()


def _move_gradients(weights: dict[str, Tensor], stage: Stage, part: float = 1.0) -> None:
    """Add the gradients of copies of a stage's parameters, times ``part``, to those of the parameters themselves."""
    for name, parameter in stage.named_parameters():
        gradient, weights[name].grad = weights[name].grad, None
        if gradient is not None:
            gradient = gradient if part == 1 else part * gradient
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
