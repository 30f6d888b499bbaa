"""Advice on which strategy to use for a network and a number of cores, by the cost model and the staleness."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sglight import units
from sglight.gradients import Synthetic
from sglight.networks import NetworkSpec
from sglight.strategies.pieces import settled
from sglight.strategies.plan import Plan
from sglight.strategies.schedule import Decoupled, Pipelined, Schedule
from sglight.strategies.simulation import period

MOST_WORKERS = 8  # more are not simulated, which would take too long
FULL_AFTER = 8  # batches after which a pipeline is full
LEAST_GAIN = 1.2  # several workers are advised only if they are so many times faster than one
LATE_GAIN = 1.1  # late gradients are advised only if they are so many times faster than exact ones


@dataclass(frozen=True)
class Option:
    """A strategy with one worker for each stage.

    Attributes:
        gain: its ideal speed, relative to backpropagation on one worker.
        staleness: the largest number of updates by which its gradients are late.
    """

    gain: float
    staleness: int


def advise(spec: NetworkSpec, samples: int, cores: int) -> str:
    """Two sentences: the strategy to prefer, and what the others would give.

    Args:
        spec: of the network.
        samples: in a batch.
        cores: of this machine, or the number of GPUs.
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
    delay = f"true gradients, late by at most {units.plural(late.staleness, 'update')},"
    offers = {
        "backprop": f"exact gradients in a pipeline, ideally {exact.gain:.2f} times",
        "delayed": f"{delay} ideally {late.gain:.2f} times",
        "dni": f"synthetic ones, which are inexact, {predicted.gain:.2f} times",
    }
    best = max(exact.gain, late.gain)
    if best < LEAST_GAIN:
        return (
            f"Prefer strategy=backprop on one worker: {workers} workers would ideally be {best:.2f} times as fast, "
            f"as the stages cannot be cut evenly. Synthetic gradients would give {predicted.gain:.2f} times."
        )
    name, other = ("backprop", "delayed") if exact.gain * LATE_GAIN >= late.gain else ("delayed", "backprop")
    return (
        f"Prefer strategy={name} {command}: {offers[name]} as fast as backprop on one worker by the cost model. "
        f"The model gives {offers[other]}, and {offers['dni']}; it does not count messages, so measure."
    )


def options(spec: NetworkSpec, samples: int, workers: int) -> Mapping[str, Option]:
    """The options with a stage for each worker: pipelined true gradients, late true gradients, synthetic gradients."""
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
        else schedule.staleness(0, FULL_AFTER * schedule.pieces, workers - 1)
    )
    return Option(alone / time, late)
