"""The fastest way to use a number of workers, by simulation, for the command `python -m sglight.plan`.

The strategy's schedule is simulated for every split of the workers into groups of stages and replicas, and of a batch
into pieces. What a batch costs a worker is measured by training a few batches on this machine, or computed from
``plan.flops``; messages are computed from ``plan.bandwidth`` and ``plan.latency``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich import box
from rich.console import Console
from rich.table import Table

from sglight import units
from sglight.config.composing import CONF, check, to_plain
from sglight.config.explanations import explain
from sglight.errors import UserError
from sglight.experiment import build_datamodule, build_module
from sglight.networks import NetworkSpec, Stage
from sglight.rehearsal import rehearse
from sglight.strategies.multilevel import Multilevel
from sglight.strategies.plan import Plan
from sglight.strategies.pvd.module import PVD
from sglight.strategies.schedule import Decoupled, Pipelined
from sglight.strategies.simulation import Messages, StageTimes, period
from sglight.strategies.staged import StagedModule

FLOAT = 4  # bytes of a number
BATCHES = 16  # the number of batches that are simulated
MOST_PIECES = 64
SHOWN = 12  # rows of the table
# Messages, or sums, bound a split if it would be faster by this part without them.
GAIN = 0.05


@dataclass
class Machines:
    """The workers to plan for: the keys ``plan.*`` of the command line.

    Attributes:
        workers: how many there are.
        bandwidth: the bytes per second from one worker to another.
        latency: the seconds that a message takes besides.
        flops: the floating-point operations per second of a worker; None to measure on this machine.
        cores: the number of cores that all workers share; None if each has its own device.
        split: one split, as ``[groups, replicas, pieces]``, to simulate only that; None for all.
    """

    workers: int = 1
    bandwidth: float = 1e9
    latency: float = 1e-4
    flops: float | None = None
    cores: int | None = None
    split: list[int] | None = None


@dataclass(frozen=True)
class Split:
    """A way to use the workers, with its simulated speed.

    Attributes:
        groups: the number of groups of stages, each at another worker.
        replicas: the number of workers for each group.
        pieces: the number of pieces of a batch.
        stages: the number of stages.
        batch_s: the seconds for a batch.
        memory: the bytes of the tensors of the worker that needs most.
        bound: what limits the speed: ``computing`` of the busiest worker, the ``cores`` that all share, ``messages``
            between stages, ``sums`` over replicas, or ``waiting``, with the share of the time.
    """

    groups: int
    replicas: int
    pieces: int
    stages: int
    batch_s: float
    memory: float
    bound: str


def splits(
    plain: Mapping[str, Any], machines: Machines, datamodule: Any, free_stages: bool
) -> Iterator[Split]:
    """All splits of the workers that the strategy allows.

    Args:
        plain: the config.
        machines: the workers.
        datamodule: the data.
        free_stages: whether to use as many stages as groups, not ``strategy.stages``.

    Raises:
        UserError: for a strategy without one schedule for all batches.
    """
    _check(build_module(plain, datamodule))
    samples, threads = datamodule.batch_size, plain["trainer"]["threads"] or 1
    for groups, replicas, pieces in _candidates(machines, samples, "microbatches" in plain["strategy"]):
        strategy = {**plain["strategy"]}
        if free_stages and "stages" in strategy:
            strategy |= {"stages": groups, "cuts": None}
        if "microbatches" in strategy:
            strategy["microbatches"] = pieces
        try:
            module = build_module({**plain, "strategy": strategy}, datamodule)
            module.check_replicas(replicas)
            own = module.groups(groups)
        except (UserError, ValueError):
            continue
        if replicas * module.plan.schedule.pieces > samples:
            continue
        costs = stage_seconds(module, samples, replicas, machines, threads)
        yield evaluate(module.plan, own, replicas, samples, costs, machines)


def _check(module: StagedModule) -> None:
    if isinstance(module, Multilevel):
        raise UserError(
            "strategy=multilevel cannot be planned, as each level has its own network and schedule: plan a level "
            "by itself, such as strategy=delayed with its model.steps"
        )
    if isinstance(module, PVD):
        raise UserError(
            "strategy=pvd cannot be planned: its processors minimise in parallel, without a schedule"
        )


def _candidates(machines: Machines, samples: int, has_pieces: bool) -> Iterator[tuple[int, int, int]]:
    if machines.split is not None:
        yield tuple(machines.split)  # type: ignore[misc]
        return
    for groups in (g for g in range(1, machines.workers + 1) if machines.workers % g == 0):
        pieces = 1
        while pieces <= (min(samples, MOST_PIECES) if has_pieces else 1):
            yield groups, machines.workers // groups, pieces
            pieces *= 2


def stage_seconds(
    module: StagedModule, samples: int, replicas: int, machines: Machines, threads: int = 1
) -> list[StageTimes]:
    """The seconds of the phases of each stage for a replica's part of a batch, computed or measured.

    They are measured in as many processes at once as share the cores: each is slower then.

    Args:
        module: of the strategy.
        samples: in a batch.
        replicas: how many there are.
        machines: the workers.
        threads: of each worker.
    """
    if machines.flops is None:
        at_once = min(machines.workers, machines.cores or 1)
        return rehearse(module, samples, replicas, at_once, threads)
    scale = 2 / machines.flops * math.ceil(samples / replicas)
    return [
        StageTimes(**{name: scale * cost for name, cost in vars(stage).items()})
        for stage in module.plan.stage_times()
    ]


def evaluate(
    plan: Plan,
    groups: Sequence[range],
    replicas: int,
    samples: int,
    costs: Sequence[StageTimes],
    machines: Machines,
) -> Split:
    """A split with its simulated speed and its memory.

    Args:
        plan: of the network.
        groups: the stages of each worker of a replica.
        replicas: how many there are.
        samples: in a batch.
        costs: see `stage_seconds`.
        machines: the workers.
    """
    schedule, cores = plan.schedule, machines.cores
    share = math.ceil(samples / replicas)
    messages = message_seconds(plan, share, replicas, machines)
    busy = [sum(costs[i].total for i in own) for own in groups]

    def least(sums: Sequence[float]) -> float:
        """The time for a batch if all cores that the workers share are always busy."""
        return replicas * (sum(busy) + sum(sums)) / (cores or math.inf)

    def batch_s(states: Sequence[float], sums: Sequence[float]) -> float:
        slower, together = costs, least(sums)
        if cores is not None and len(groups) * replicas >= cores and sums:
            # No core is free to sum meanwhile: a worker computes or sums.
            slower = [replace(cost, backward=cost.backward + s) for cost, s in zip(costs, sums, strict=True)]
            sums = [0.0] * len(sums)
        return max(period(schedule, groups, slower, Messages(states, sums), BATCHES), together)

    time = batch_s(messages.states, messages.sums)
    bound = f"waiting, {units.share(max(1 - max(busy) / time, 0))}"
    if batch_s([], messages.sums) < (1 - GAIN) * time:
        bound = "messages"
    elif batch_s(messages.states, [0.0] * len(messages.sums)) < (1 - GAIN) * time:
        bound = "sums"
    elif max(busy) > (1 - GAIN) * time:
        bound = "computing"
    elif least(messages.sums) > (1 - GAIN) * time:
        bound = "cores"
    memory = max(sum(stage_bytes(plan, i, share, replicas) for i in own) for own in groups)
    return Split(len(groups), replicas, schedule.pieces, plan.last + 1, time, memory, bound)


def message_seconds(plan: Plan, share: int, replicas: int, machines: Machines) -> Messages:
    """The seconds of communication for a batch: the states at all boundaries, and the sums over replicas.

    A sum over R replicas in a ring sends 2 (R - 1) / R of the bytes of all gradients, in 2 (R - 1) messages.
    """
    pieces = plan.schedule.pieces
    states = [
        FLOAT * math.prod(plan.boundary_shape(i, share)) / machines.bandwidth + pieces * machines.latency
        for i in range(plan.last)
    ]
    if replicas == 1:
        return Messages(states)
    rounds = 2 * (replicas - 1)
    sums = [
        rounds * (FLOAT * count / replicas / machines.bandwidth + machines.latency)
        for count in parameter_counts(plan.spec, plan.cuts)
    ]
    return Messages(states, sums)


@cache
def parameter_counts(spec: NetworkSpec, cuts: tuple[int, ...]) -> list[int]:
    """The number of parameters of each stage."""
    stages = [Stage(spec, a, b) for a, b in pairwise(cuts)]
    return [sum(p.numel() for p in stage.parameters()) for stage in stages]


def stage_bytes(plan: Plan, i: int, share: int, replicas: int) -> float:
    """The bytes that a stage keeps for ``share`` samples of a batch.

    These are its weights, their gradients, the moments of the optimiser, copies of weights, and the states of all
    pieces between their forward and backward pass.
    """
    schedule, spec, parameters = plan.schedule, plan.spec, parameter_counts(plan.spec, plan.cuts)[i]
    moments = {"adam": 2, "adamw": 2, "nadam": 2}.get(plan.optimizer["name"], 1)
    delay = schedule.delay(i, plan.last) if isinstance(schedule, Pipelined) else 0
    copies = math.ceil(delay / schedule.pieces) if plan.source.stashes and not schedule.flushes else 0
    start, stop = plan.cuts[i], plan.cuts[i + 1]
    state = math.prod(spec.state_shape(start))
    inside = (
        0
        if spec.reversible or plan.source.rebuilds
        else sum(spec.step_values()[start:stop]) + (stop - start) * state
    )
    # If passes are repeated or states rebuilt, only one piece at a time keeps the values within the stage.
    kept = delay + 1 if plan.source.stashes or schedule.flushes else 1
    waiting = schedule.lag + 1 if isinstance(schedule, Decoupled) else delay + 1
    values = math.ceil(share / schedule.pieces) * (waiting * state + kept * inside)
    return FLOAT * (parameters * (2 + moments + copies + (replicas > 1)) + values)


def show(found: Sequence[Split], machines: Machines, samples: int, in_pieces: bool = True) -> None:
    """Print a table of the fastest splits, and the settings of the first.

    Args:
        found: the splits, the fastest first.
        machines: the workers.
        samples: in a batch.
        in_pieces: whether the strategy has a setting for the number of pieces.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))  # fits in 80 columns
    for name in ("groups", "replicas", "stages", "pieces", "a batch", "samples\n/ s", "memory\na worker"):
        table.add_column(name, justify="right")
    table.add_column("bound by", no_wrap=True)
    for split in found[:SHOWN]:
        table.add_row(
            str(split.groups), str(split.replicas), str(split.stages), str(split.pieces), units.seconds(split.batch_s),
            units.count(samples / split.batch_s), units.size(split.memory), split.bound,
        )  # fmt: skip
    console = Console()
    console.print(table)
    best = found[0]
    console.print(
        f"trainer.replicas={best.replicas}, trainer.devices x trainer.num_nodes = {best.groups * best.replicas}, "
        f"strategy.stages={best.stages}" + (f", strategy.microbatches={best.pieces}" if in_pieces else ""),
        soft_wrap=True, highlight=False,
    )  # fmt: skip


def parsed(arguments: Sequence[str]) -> tuple[Machines, DictConfig, bool]:
    """The keys ``plan.*`` of a command line, the config of all others, and whether ``strategy.stages`` is not set.

    Raises:
        UserError: for a key that does not exist, or a value that is not allowed.
    """
    own = [each for each in arguments if each.startswith("plan.")]
    rest = [each for each in arguments if not each.startswith("plan.")]
    try:
        merged = OmegaConf.merge({"plan": OmegaConf.structured(Machines)}, OmegaConf.from_dotlist(own))
        with initialize_config_dir(config_dir=str(CONF), version_base="1.3", job_name="sglight"):
            cfg = compose("config", overrides=rest)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, CONF, rest)) from error
    machines = Machines(**OmegaConf.to_container(merged)["plan"])  # type: ignore[arg-type, call-overload, index]
    for key, value in asdict(machines).items():
        if isinstance(value, int | float) and not value > 0:
            raise UserError(f"plan.{key}={value} must be above 0")
    if machines.split is not None and len(machines.split) != 3:
        raise UserError(f"plan.split={machines.split} must be [groups, replicas, pieces]")
    return machines, check(cfg), not any(each.startswith("strategy.stages=") for each in rest)


def run(arguments: Sequence[str]) -> None:
    """Print the fastest splits for a command line.

    Raises:
        UserError: for a mistake on it.
    """
    machines, cfg, free_stages = parsed(arguments)
    plain = to_plain(cfg)
    torch.manual_seed(plain["seed"])
    torch.set_num_threads(plain["trainer"]["threads"] or 1)
    datamodule = build_datamodule(plain)
    found = sorted(splits(plain, machines, datamodule, free_stages), key=lambda split: split.batch_s)
    if not found:
        raise UserError(
            f"plan.workers={machines.workers} cannot be used by {plain['strategy']['_target_']} with these keys; "
            "leave strategy.stages out, or give fewer workers"
        )
    show(found, machines, datamodule.batch_size, "microbatches" in plain["strategy"])
