"""What `stages.py` compares: `table` has an entry for each contender.

A new contender is a new entry: a name, a function that makes from a `Case` the module to train, and its numbers of
workers and threads. Functions are at the top of a module (or a `partial` of such), since they go to new processes.
"""

from __future__ import annotations

import json
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from baselines import bare, data_parallel, loop, pipeline
from cases import ADAM, CASES, TRUE_GRADIENT, Case
from fitting import fit
from processes import in_processes
from timing import Length

from sglight.parallel.launcher import launch
from sglight.strategies.backprop import Backprop
from sglight.strategies.dni import DNI

REPLICAS = "sglight.parallel.seats"


@dataclass(frozen=True)
class Contender:
    """One way to train a case.

    Attributes:
        make: the module for Lightning's Trainer, or in a plain loop the step for a batch, of a case.
        workers: number of processes. threads: of each. replicas: how many of them hold the same stages.
        plain: whether a plain loop without Lightning calls the step (`baselines.py`).
        same_losses: contenders with the same text have to have the same losses: within a tolerance if it is
            `TRUE_GRADIENT`, else to the last bit. Those without a text are not checked.
        microbatches: numbers of which the fastest is found beforehand and given to ``make``.
        needs: a module without which there is no such contender, as in an older source tree (--tree).
    """

    make: Callable[..., Any]
    workers: int = 1
    threads: int = 1
    plain: bool = False
    same_losses: str = ""
    microbatches: tuple[int, ...] = ()
    needs: str = "sglight"
    replicas: int = 1


def dni(case: Case, stages: int = 2, lag: int = 1, diagnose: int = 0) -> DNI:
    """Training with synthetic gradients."""
    estimator = {**case.estimator, "optimizer": ADAM}
    return DNI(
        case.network, ADAM, stages=stages, lag=lag, estimator=estimator, diagnose_every_n_batches=diagnose
    )


def delayed(case: Case, **options: Any) -> Any:
    """Training with true gradients that come late, in two stages."""
    from sglight.strategies.delayed import Delayed

    return Delayed(case.network, ADAM, stages=2, diagnose_every_n_batches=0, **options)


def pipelined(case: Case, microbatches: int) -> Backprop:
    """Training with the true gradient, in two stages by 1F1B."""
    return Backprop(case.network, ADAM, stages=2, microbatches=microbatches)


def backprop(case: Case) -> Backprop:
    """Training with the true gradient, in one piece."""
    return Backprop(case.network, ADAM)


def table(case: Case, options: Namespace) -> dict[str, Contender]:
    """All contenders by name, in the order in which they take turns; ``options`` are those of the command line."""
    one, two = options.threads, 2 * options.threads
    true = partial(Contender, same_losses=TRUE_GRADIENT)
    pipe = partial(true, workers=2, threads=one, plain=True, microbatches=(2, 4, 8, 16))
    cut = options.pipeline_cut or dni(case).cuts[1]
    return {
        **dni_on_workers(options),
        "backprop": true(backprop, threads=one),
        "backprop-2t": true(backprop, threads=two),
        "bare": true(bare, threads=one, plain=True),
        "bare-2t": true(bare, threads=two, plain=True),
        "ddp": true(data_parallel, workers=2, threads=one, plain=True),
        "replicas-2": true(backprop, workers=2, threads=one, replicas=2, needs=REPLICAS),
        **late(one),
        "delayed-1x2": Contender(partial(delayed, microbatches=2), 2, one, replicas=2, needs=REPLICAS),
        "own-1f1b": true(
            pipelined, workers=2, threads=one, microbatches=(2, 4, 8, 16), needs="sglight.strategies.pieces"
        ),
        "gpipe": pipe(partial(pipeline, kind="gpipe", cut=cut)),
        "1f1b": pipe(partial(pipeline, kind="1f1b", cut=cut)),
    }


def late(threads: int) -> dict[str, Contender]:
    """True gradients that come late, in two stages on two workers: ``delayed-mM``, with slack, or rebuilt."""
    settings: dict[str, dict[str, Any]] = {f"m{m}": {"microbatches": m} for m in (1, 2, 4)}
    settings |= {f"m{m}-slack": {"microbatches": m, "slack": 1} for m in (1, 2)}
    settings |= {f"m{m}-rebuilt": {"microbatches": m, "backward": "rebuilt"} for m in (1, 2)}
    needed = "sglight.strategies.delayed"
    return {
        f"delayed-{name}": Contender(partial(delayed, **each), 2, threads, needs=needed)
        for name, each in settings.items()
    }


def dni_on_workers(options: Namespace) -> dict[str, Contender]:
    """Synthetic gradients with lag 1 in one process, and with every lag on more workers."""
    stages = options.stages or max(2, *options.workers)
    found = {}
    for workers in options.workers:
        for lag in options.lags if workers > 1 else [1]:
            found[f"dni-{workers}-lag{lag}" if workers > 1 else "dni-1"] = Contender(
                partial(dni, stages=stages, lag=lag, diagnose=options.diagnose),
                workers,
                options.threads,
                same_losses="dni, lag 1" if lag == 1 else "",
            )
    return found


# What `comparison.py` calls in the process of a source tree (`trees.py`).


def describe(network: str, options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By name, what a comparison has to know of each contender that there is in this source tree."""
    return {
        name: {"same_losses": c.same_losses, "microbatches": c.microbatches}
        for name, c in table(CASES[network], Namespace(**options)).items()
        if find_spec(c.needs)
    }


def measure(
    network: str,
    name: str,
    microbatches: int | None,
    length: Mapping[str, int],
    options: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Train once, in new processes; the `ProcessTimes` of each."""
    case, contender = CASES[network], table(CASES[network], Namespace(**options))[name]
    make = contender.make if microbatches is None else partial(contender.make, microbatches=microbatches)
    task = (make, case, Path(options["raw_dir"]), Length(**length))
    if contender.plain:
        return [asdict(times) for times in in_processes(contender.workers, contender.threads, loop, *task)]
    with tempfile.TemporaryDirectory() as folder:
        task = (fit, *task, contender.workers, Path(folder), contender.replicas)
        if contender.workers == 1:
            in_processes(1, contender.threads, *task)
        else:
            launch(*task, workers=contender.workers, threads=contender.threads)
        return [json.loads((Path(folder) / f"{i}.json").read_text()) for i in range(contender.workers)]
