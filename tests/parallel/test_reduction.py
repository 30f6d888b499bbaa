"""What `StageStrategy.reduce` makes of the values of all workers, against torch.distributed's and Lightning's own."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning_fabric.utilities.distributed import _sync_ddp
from torch import Tensor
from torch.distributed import ReduceOp

from sglight.parallel.launcher import current, launch
from sglight.parallel.strategy import StageStrategy
from sglight.parallel.wiring import meet

# Generous: beside other work the first workers of a process take half a minute to start.
pytestmark = pytest.mark.timeout(120)

# Of worker 0 and of worker 1.
VALUES = {
    "float": (torch.tensor([1.5, -2.0]), torch.tensor([0.25, 4.0])),
    "scalar": (torch.tensor(3.0), torch.tensor(4.0)),
    "float64": (torch.tensor([0.1], dtype=torch.float64), torch.tensor([0.2], dtype=torch.float64)),
    "integer": (torch.tensor([[3, -3]]), torch.tensor([[4, -4]])),
    "int32": (torch.tensor([7], dtype=torch.int32), torch.tensor([8], dtype=torch.int32)),
    "bool": (torch.tensor([True, False, True]), torch.tensor([False, False, True])),
}
OPERATIONS = ("mean", "avg", "sum", "max", "min")
NAMES = [
    *OPERATIONS, "AVG", "SUM", "Max", "MIN",
    ReduceOp.AVG, ReduceOp.SUM, ReduceOp.MAX, ReduceOp.MIN, ReduceOp(ReduceOp.MAX),
]  # fmt: skip
BEYOND_FLOAT = 2**53 + 1
REFUSED = [("prod", "prod"), (ReduceOp.PRODUCT, "PRODUCT"), (ReduceOp.BOR, "BOR"), (None, "None"), ("", "")]


def by_us(jobs: list[tuple[tuple[Tensor, Tensor], Any]]) -> list[Tensor]:
    """Worker 0's results, which all workers have."""
    strategy, meeting = StageStrategy(), meet("reduction")
    assert meeting is not None
    strategy.peers = meeting.peers()
    results = [strategy.reduce(values[meeting.rank], reduce_op=name) for values, name in jobs]
    for others in strategy.peers.share(results):
        assert all(torch.equal(a, b) for a, b in zip(results, others, strict=True))
    strategy.peers.close()
    return results


def by_lightning(jobs: list[tuple[tuple[Tensor, Tensor], str]]) -> list[Tensor]:
    """The same by what its `DDPStrategy.reduce` calls."""
    me = current()
    assert me is not None
    dist.init_process_group("gloo", f"file://{me.folder}/lightning", rank=me.rank, world_size=me.size)
    results = [_sync_ddp(values[me.rank].clone(), None, name) for values, name in jobs]
    dist.destroy_process_group()
    return results


def test_two_workers_get_what_lightning_would_give_them() -> None:
    jobs = [(values, name) for values in VALUES.values() for name in OPERATIONS]
    found, expected = launch(by_us, jobs, workers=2), launch(by_lightning, jobs, workers=2)
    for (values, name), a, b in zip(jobs, found, expected, strict=True):
        print(name, values)
        assert a.dtype == b.dtype == values[0].dtype and a.shape == values[0].shape
        assert torch.equal(a, b)


def expected_of(name: Any, pair: tuple[float, float]) -> float:
    operation = str(getattr(getattr(name, "op", name), "name", name)).lower()
    return {
        "mean": sum(pair) / 2,
        "avg": sum(pair) / 2,
        "sum": sum(pair),
        "max": max(pair),
        "min": min(pair),
    }[operation]


def test_every_name_of_an_operation_is_understood_and_integers_stay_exact() -> None:
    large = (torch.tensor(BEYOND_FLOAT), torch.tensor(-2))
    exact = [(large, name) for name in ("sum", "max", "min")]
    *found, total, most, least = launch(by_us, [*((VALUES["scalar"], n) for n in NAMES), *exact], workers=2)
    assert [value.item() for value in found] == [expected_of(name, (3.0, 4.0)) for name in NAMES]
    assert (total.item(), most.item(), least.item()) == (BEYOND_FLOAT - 2, BEYOND_FLOAT, -2)


def test_one_worker_keeps_what_it_has() -> None:
    for name, values in product(NAMES, VALUES.values()):
        found = StageStrategy().reduce(values[0], reduce_op=name)
        assert found.dtype == values[0].dtype and torch.equal(found, values[0])


def test_what_is_no_tensor_stays_as_it_is() -> None:
    assert StageStrategy().reduce(2.5) == 2.5


@pytest.mark.parametrize(("operation", "name"), REFUSED, ids=["prod", "PRODUCT", "BOR", "None", "empty"])
def test_other_operations_are_refused_by_name(operation: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"reduce_op={name} must be one of mean, avg, sum, max, min"):
        StageStrategy().reduce(torch.ones(2), reduce_op=operation)
