"""Replicas share each batch: they learn what one worker with the whole batch learns, up to rounding."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.nn.parallel import DistributedDataParallel

from sglight.errors import UserError
from sglight.gradients import Estimator
from sglight.link import Replicas
from sglight.networks import StableNet
from sglight.parallel.launcher import current, launch
from sglight.parallel.seats import Seat, seats
from sglight.strategies.backprop import Backprop
from sglight.strategies.blend import Blend
from sglight.strategies.delayed import Delayed
from sglight.strategies.dni import DNI
from sglight.strategies.local import Local
from sglight.strategies.multilevel import Multilevel
from sglight.strategies.pvd import PVD
from sglight.strategies.replication import average_statistics
from tests.parallel.training import ESTIMATOR, Job, Result, train_on
from tests.strategies.common import ADAM, IMAGES, NETWORK, assert_equal, batches

pytestmark = pytest.mark.timeout(300)

SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
COSINE = {"name": "cosine", "warmup_epochs": 1, "min_factor": 0.1}
DEEP = {**NETWORK, "steps": 8}
# A last batch that does not divide, and one with fewer samples than replicas.
LAST = [5, 1]


class Alone(Estimator):
    """One that learns by itself."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def estimate(self, state: torch.Tensor, labels: torch.Tensor, time: float) -> torch.Tensor:
        return torch.zeros_like(state)

    def learn(
        self, state: torch.Tensor, labels: torch.Tensor, target: torch.Tensor, time: float
    ) -> torch.Tensor:
        return state.new_zeros(())


def job(kind: Any, network: dict[str, Any] = DEEP, optimizer: dict[str, Any] = SGD, **options: Any) -> Job:
    return {
        "kind": kind,
        "network": network,
        "optimizer": optimizer,
        "options": options,
        "last": LAST,
        "batches": 5,
        "epochs": 1,
    }


JOBS: dict[str, Job] = {
    "backprop": job(Backprop, IMAGES),
    "pipelined, clipped, smooth": job(
        Backprop, stages=4, microbatches=3, clip_norm=0.1, regularisation={"smoothness": 0.1},
    ),
    "delayed": job(Delayed, stages=4, microbatches=3, diagnose_every_n_batches=2),
    # The pipeline drains over three rounds of batches of other sizes, of which the last is not for all replicas.
    "delayed, in one piece": job(Delayed, stages=4, microbatches=1),
    "delayed, rebuilt": job(Delayed, {**IMAGES, "dynamics": "leapfrog"}, stages=2, microbatches=2, backward="rebuilt"),
    "dni": job(
        DNI, stages=4, lag=2, estimator={**ESTIMATOR, "optimizer": SGD}, diagnose_every_n_batches=2, scheduler=COSINE,
    ),
    "weighted classes": job(Delayed, stages=2, microbatches=2, loss={"class_weights": [1.0, 2.0, 0.5, 3.0]}),
    "local": job(Local, stages=2, head={"name": "mlp", "hidden": [9], "optimizer": SGD}),
    "blend": job(Blend, stages=3, blend=0.3, blend_last=0.6, head={"name": "mlp", "hidden": [9], "optimizer": SGD}),
    "blend, late": job(
        Blend, stages=3, source="synthetic", arrival="late", optimizer={"name": "sgd", "lr": 0.03},
        loss={"class_weights": [1.0, 2.0, 0.5, 3.0]},
        estimator={**ESTIMATOR, "form": "sobolev", "optimizer": {"name": "sgd", "lr": 0.03}},
    ),
    "norms": job(Delayed, {**IMAGES, "normalisation": "group", "groups": 2}, stages=2, microbatches=2),
    "statistics of all": job(
        Delayed, {**IMAGES, "normalisation": "batch", "opening": "conv", "opening_normalisation": "batch"},
        stages=2, microbatches=2,
    ) | {"last": [5], "sync_batchnorm": True},
    "multilevel": job(
        Multilevel, stages=2, levels=3, level={"mode": ["exact", "delayed", "dni"]}, moments="prolong",
        estimator={**ESTIMATOR, "optimizer": SGD},
    ) | {"epochs": 3},
    "multilevel, local": job(
        Multilevel, stages=2, levels=2, level={"mode": ["exact", "local"]},
        head={"name": "mlp", "hidden": [9], "optimizer": SGD},
    ) | {"epochs": 2},
}  # fmt: skip
# Those without which no change is made.
QUICK = ("delayed, in one piece", "dni", "local")
# Those that are also trained with two workers to a replica.
APART = ("pipelined, clipped, smooth", "delayed", "dni", "blend, late", "multilevel")


def on(groups: int, replicas: int, jobs: list[Job], layout: str = "pipelines") -> list[Result]:
    return train_on(groups * replicas, [{**each, "replicas": replicas, "layout": layout} for each in jobs])


def comparable(metrics: dict[str, float]) -> dict[str, float]:
    """Without times, and without what is no mean over samples."""
    return {
        name: value
        for name, value in metrics.items()
        if not name.startswith(("time/", "worker_", "speedup/"))
        and not re.match(r"(estimator|boundary)_.*/(?!loss)", name)
    }


def losses(metrics: dict[str, float]) -> dict[str, float]:
    """The losses of the estimators in their last lessons."""
    return {name: v for name, v in metrics.items() if re.fullmatch(r"estimator_\d+/loss", name)}


DATA_PARALLEL: Job = job(Backprop, IMAGES, {"name": "sgd", "lr": 0.1, "momentum": 0.9}) | {
    "last": [],
    "batches": 6,
}
WITHOUT_SAMPLES = (
    "multilevel, local",
    "delayed",
    "delayed, in one piece",
    "dni",
    "local",
    "blend",
    "blend, late",
)
# In mid-epoch, with pieces and sums of gradients under way.
INTERRUPTED = ("delayed", "dni", "blend, late")


def saving(folder: Path) -> dict[str, Job]:
    """All jobs; those that are to be interrupted leave a checkpoint."""
    return JOBS | {
        name: {
            **JOBS[name],
            "callbacks": [
                ModelCheckpoint(folder / name, filename="{step}", every_n_train_steps=3, save_top_k=-1)
            ],
        }
        for name in INTERRUPTED
    }


def resumed(folder: Path) -> list[Job]:
    """Trainings that go on from it."""
    return [{**JOBS[name], "ckpt": str(folder / name / "step=3.ckpt")} for name in INTERRUPTED]


@dataclass
class Trained:
    """What the trainings gave: all jobs alone and on two replicas, the other names say which."""

    alone: dict[str, Result]
    two: dict[str, Result]
    data_parallel: Result
    apart: dict[str, Result]
    without_samples: dict[str, Result]
    resumed_by_four: dict[str, Result]
    resumed_from_one: dict[str, Result]
    one_from_four: dict[str, Result]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: Any) -> Trained:
    """All trainings: on one worker, on two and on four, each started once, which is what takes long."""
    one, four = (tmp_path_factory.mktemp(by) for by in ("one", "four"))
    alone = dict(zip(JOBS, train_on(1, list(saving(one).values())), strict=True))
    *two, data_parallel = on(1, 2, [*JOBS.values(), DATA_PARALLEL])
    layouts, jobs = cycle(["pipelines", "replicas"]), saving(four)
    parts = [
        [{**jobs[name], "replicas": 2, "layout": next(layouts)} for name in APART],
        [{**JOBS[name], "replicas": 4} for name in WITHOUT_SAMPLES],
        *([{**each, "replicas": 2} for each in resumed(folder)] for folder in (four, one)),
    ]
    found = iter(train_on(4, [each for part in parts for each in part]))
    names = [APART, WITHOUT_SAMPLES, INTERRUPTED, INTERRUPTED]
    on_four = [{name: next(found) for name in those} for those in names]
    from_four = dict(zip(INTERRUPTED, train_on(1, resumed(four)), strict=True))
    return Trained(alone, dict(zip(JOBS, two, strict=True)), data_parallel, *on_four, from_four)


def assert_close(found: Result, wanted: Result) -> None:
    for key, value in wanted.parameters.items():
        torch.testing.assert_close(found.parameters[key], value, rtol=1e-4, atol=1e-5)


def assert_as_alone(alone: dict[str, Result], two: dict[str, Result]) -> None:
    for name, a in alone.items():
        print(name)
        b = two[name]
        assert_close(b, a)
        for metrics in b.metrics:
            assert comparable(metrics) == pytest.approx(comparable(a.metrics[0]), rel=1e-3, abs=1e-4)
        assert a.steps * 2 == b.steps


def test_two_replicas_learn_what_one_worker_learns() -> None:
    few = [JOBS[name] for name in QUICK]
    assert_as_alone(
        dict(zip(QUICK, train_on(1, few), strict=True)), dict(zip(QUICK, on(1, 2, few), strict=True))
    )


@pytest.mark.slow
def test_two_replicas_learn_what_one_worker_learns_by_all_strategies(trained: Trained) -> None:
    assert_as_alone(trained.alone, trained.two)


@pytest.mark.slow
def test_every_placement_of_replicas_gives_the_same_bits(trained: Trained) -> None:
    for name, b in trained.apart.items():
        print(name)
        a = trained.two[name]
        assert_equal(b.parameters, a.parameters)
        assert comparable(b.metrics[0]) == pytest.approx(comparable(a.metrics[0]), abs=1e-9)


@pytest.mark.slow
def test_some_of_four_replicas_have_no_sample(trained: Trained) -> None:
    for name, found in trained.without_samples.items():
        wanted = trained.alone[name]
        assert_close(found, wanted)
        for metrics in found.metrics:
            assert losses(metrics) == pytest.approx(losses(wanted.metrics[0]), rel=1e-3, abs=1e-4), name


@pytest.mark.slow
def test_a_checkpoint_is_read_by_any_number_of_replicas(trained: Trained) -> None:
    for name in INTERRUPTED:
        assert_equal(trained.resumed_by_four[name].parameters, trained.apart[name].parameters)
        assert_close(trained.one_from_four[name], trained.alone[name])
        assert_close(trained.resumed_from_one[name], trained.alone[name])


def data_parallel() -> dict[str, torch.Tensor]:
    """Torch's own data parallelism, with half of each batch in each process."""
    torch.set_num_threads(1)
    worker = current()
    assert worker is not None
    store = dist.FileStore(str(worker.folder / "ddp"), worker.size)
    dist.init_process_group("gloo", store=store, rank=worker.rank, world_size=worker.size)
    net = StableNet(**IMAGES)
    ddp, sgd = DistributedDataParallel(net), torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for x, labels in batches(6, shape=(1, 6, 6)):
        own = slice(worker.rank, None, 2)
        sgd.zero_grad()
        F.cross_entropy(ddp(x[own]), labels[own]).backward()
        sgd.step()
    dist.destroy_process_group()
    return net.state_dict()


@pytest.mark.slow
def test_backprop_on_replicas_is_data_parallelism(trained: Trained) -> None:
    found = trained.data_parallel
    for name, value in launch(data_parallel, workers=2, threads=1).items():
        torch.testing.assert_close(found.parameters[f"stages.0.{name}"], value, rtol=1e-4, atol=1e-6)


class Second(Replicas):
    """The second of two, of which the first has ones where this one has anything."""

    rank, size = 1, 2

    def begin_sum(self, values: torch.Tensor) -> Any:
        return lambda: values.add_(1)


def test_a_batch_without_a_sample_for_each_replica_cannot_be_normalised_together() -> None:
    module = Delayed(IMAGES, ADAM, stages=2, microbatches=2)
    module.runtime.placement.statistics = Second()
    with pytest.raises(
        UserError, match=r"trainer\.sync_batchnorm=true needs 4 samples .* a batch of 3: choose"
    ):
        module.runtime.train(None, torch.zeros(3, dtype=torch.long))


def test_statistics_are_those_of_all_replicas() -> None:
    net = StableNet(**IMAGES, normalisation="batch", opening="conv", opening_normalisation="batch")
    weights = {name: p.clone() for name, p in net.named_parameters()}
    average_statistics(net, Second())
    # They begin with a mean of 0 and a variance of 1.
    assert all(b.eq(0.5).all() for name, b in net.named_buffers() if name.endswith("mean"))
    assert all(b.eq(1).all() for name, b in net.named_buffers() if name.endswith("var"))
    assert_equal(dict(net.named_parameters()), weights)


def test_pipelines_or_replicas_follow_each_other() -> None:
    assert seats(2, 2) == [Seat(0, 0), Seat(1, 0), Seat(0, 1), Seat(1, 1)]
    assert seats(2, 2, "replicas") == [Seat(0, 0), Seat(0, 1), Seat(1, 0), Seat(1, 1)]


def test_what_replicas_do_not_go_with_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"trainer\.replicas=2 does not go with strategy=pvd"):
        PVD(NETWORK, ADAM, processors=2).check_replicas(2)
    own = {"name": "tests.parallel.test_replicas.Alone"}
    with pytest.raises(
        ValueError, match=r"trainer\.replicas=2 does not go with strategy\.estimator\.name=.*Alone"
    ):
        DNI(NETWORK, ADAM, estimator=own).check_replicas(2)
    DNI(NETWORK, ADAM, estimator=own).check_replicas(1)
    levels = {"levels": 2, "level": {"mode": ["exact", "dni"]}}
    with pytest.raises(ValueError, match=r"trainer\.replicas=2 does not go with strategy\.estimator\.name"):
        Multilevel(NETWORK, ADAM, estimator=own, **levels).check_replicas(2)
