"""Which strategy to prefer for a network on so many cores, by the cost model and the staleness of gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sglight.gradients import Synthetic
from sglight.networks import NetworkSpec
from sglight.strategies.pieces import settled
from sglight.strategies.plan import Plan
from sglight.strategies.schedule import Decoupled, Pipelined, Schedule
from sglight.strategies.simulation import period

MOST_WORKERS = 8  # a simulation of more would take longer than it is worth
FULL_SWING = 8  # batches behind which a pipeline is full
WORTH = 1.2  # less than so much faster than one worker, several are not worth it
NEAR = 1.1  # exact gradients are preferred to late ones that are less than so much faster


@dataclass(frozen=True)
class Option:
    """One strategy on as many workers as it has stages.

    Attributes:
        gain: how many times faster than backpropagation on one worker, ideally.
        staleness: by how many updates its gradients are late at most.
    """

    gain: float
    staleness: int


def advise(spec: NetworkSpec, samples: int, cores: int) -> str:
    """Two sentences: what to prefer, and what the others would give.

    Args:
        samples: in a batch. cores: of this machine, or how many GPUs.
    """
    workers = min(cores, spec.total_steps, MOST_WORKERS)
    if workers < 2:
        why = "there is one core" if cores < 2 else "the network has one time step"
        return (
            f"Prefer strategy=backprop: {why}, and nothing can run beside anything else. "
            "The other strategies are there to be studied."
        )
    found = options(spec, samples, workers)
    exact, late, predicted = found["backprop"], found["delayed"], found["dni"]
    command = f"strategy.stages={workers} trainer.devices={workers}"
    delay = f"true gradients, late by at most {late.staleness} update{'s' * (late.staleness != 1)},"
    said = {
        "backprop": f"exact gradients in a pipeline, ideally {exact.gain:.2f} times",
        "delayed": f"{delay} ideally {late.gain:.2f} times",
        "dni": f"synthetic ones, which are inexact, {predicted.gain:.2f} times",
    }
    best = max(exact.gain, late.gain)
    if best < WORTH:
        return (
            f"Prefer strategy=backprop on one worker: {workers} workers would ideally be {best:.2f} times as fast, "
            f"as the stages cannot be cut evenly. Synthetic gradients would give {predicted.gain:.2f} times."
        )
    name, other = ("backprop", "delayed") if exact.gain * NEAR >= late.gain else ("delayed", "backprop")
    return (
        f"Prefer strategy={name} {command}: {said[name]} as fast as backprop on one worker by the cost model. "
        f"It gives {said[other]}, and {said['dni']}; messages are not counted, so measure."
    )


def options(spec: NetworkSpec, samples: int, workers: int) -> Mapping[str, Option]:
    """Pipelined and late true gradients, and synthetic ones, with a stage for each worker."""
    last = workers - 1
    kinds: dict[str, tuple[Schedule, Synthetic | None]] = {
        "backprop": (settled(Pipelined(flushes=True), None, samples, last), None),
        "delayed": (settled(Pipelined(), None, samples, last), None),
        "dni": (Decoupled(1), Synthetic.of(None, spec.kernel)),
    }
    return {name: _option(spec, workers, *kind) for name, kind in kinds.items()}


def _option(spec: NetworkSpec, workers: int, schedule: Schedule, source: Synthetic | None) -> Option:
    extra = 0.0 if source is None else source.cost(spec)
    plan = Plan(spec, tuple(spec.cuts(workers, extra)), {}, schedule=schedule)
    plan = plan if source is None else Plan(spec, plan.cuts, {}, schedule=schedule, source=source)
    alone = 3 * sum(spec.step_work())
    time = period(schedule, [range(i, i + 1) for i in range(workers)], plan.stage_times())
    late = (
        0
        if schedule.flushes or not schedule.waits
        else schedule.staleness(0, FULL_SWING * schedule.pieces, workers - 1)
    )
    return Option(alone / time, late)
