"""The samples that the objective is the mean of: which they are, and in which order."""

from __future__ import annotations

from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from sglight.errors import UserError
from sglight.strategies.pvd.samples import Samples, check_memory, draw, gather, in_order, shares


@pytest.mark.parametrize(("count", "parts", "largest"), [(20, 3, 4), (20, 3, 100), (7, 4, 1), (3, 5, 2)])
def test_shares_are_all_samples_in_order(count: int, parts: int, largest: int) -> None:
    x, y = torch.arange(count), torch.arange(count)
    found = shares((x, y), parts, largest)
    assert len(found) == parts
    assert torch.equal(torch.cat([x for x, _ in chain(*found)]), x)
    assert all(0 < len(x) <= largest for x, _ in chain(*found))
    if count >= parts:
        counts = [sum(len(x) for x, _ in part) for part in found]
        assert max(counts) - min(counts) <= min(largest, -(-count // parts))


def test_a_draw_is_by_seed_and_iteration() -> None:
    a = draw(50, 10, seed=1, iteration=3)
    assert len(a.unique()) == 10 and torch.equal(a, a.sort().values)
    assert torch.equal(a, draw(50, 10, seed=1, iteration=3))
    assert not torch.equal(a, draw(50, 10, seed=1, iteration=4))
    assert not torch.equal(a, draw(50, 10, seed=2, iteration=3))
    assert torch.equal(draw(5, 10, seed=1, iteration=0), torch.arange(5))


def test_samples_are_gathered_in_the_order_of_the_set() -> None:
    x, y = torch.arange(10.0)[:, None], torch.arange(10)
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    inputs, labels = gather(in_order(loader), None, torch.zeros(1, dtype=torch.float64))
    assert torch.equal(labels, y) and torch.equal(inputs, x.double())
    sampled = DataLoader(
        TensorDataset(x, y), batch_sampler=BatchSampler(RandomSampler(x), batch_size=4, drop_last=True)
    )
    assert torch.equal(gather(in_order(sampled), None, torch.zeros(1))[1], y)
    rows = torch.tensor([0, 3, 4, 9])
    inputs, labels = gather(in_order(loader), rows, torch.zeros(1))
    assert torch.equal(labels, rows) and torch.equal(inputs[:, 0], rows.float())


def test_all_samples_are_gathered_once_and_a_part_for_each_iteration() -> None:
    loader = DataLoader(TensorDataset(torch.arange(10.0)[:, None], torch.arange(10)), batch_size=4)
    whole, part, like = Samples(None, seed=1), Samples(3, seed=1), torch.zeros(1)
    first = whole.choose(loader, 0, like)
    assert first is not None and torch.equal(first[1], torch.arange(10))
    assert whole.choose(loader, 1, like) is None
    for iteration in range(2):
        found = part.choose(loader, iteration, like)
        assert found is not None and torch.equal(found[1], draw(10, 3, 1, iteration))
    assert whole.total == part.total == 10
    assert whole.are_fixed and not part.are_fixed


@pytest.mark.parametrize(("samples", "fits"), [(None, False), (1001, False), (1000, True), (10, True)])
def test_an_objective_larger_than_the_data_may_be_in_memory_is_refused(
    samples: int | None, fits: bool
) -> None:
    data = SimpleNamespace(shape=(3, 8, 8), train_size=5000, memory_limit=1000 * 3 * 8 * 8 * 4 / 2**30)
    if fits:
        check_memory(data, samples)
        return
    with pytest.raises(
        UserError, match=r"more than dataset\.memory_limit=.*strategy\.objective_samples to at most 1000"
    ):
        check_memory(data, samples)


def test_data_without_a_limit_have_none() -> None:
    check_memory(SimpleNamespace(shape=(2,), train_size=10**12), None)
