"""Batches by index: complete, reproducible, resumable; the streamed order is as good as the resident one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglight.data.augment import Augmentation
from sglight.data.loader import BatchLoader, EpochSampler, Resident, Streamed


def loader(n=103, batch_size=10, samples=None, **options):
    x = torch.arange(n, dtype=torch.float32)[:, None].repeat(1, 3)
    return BatchLoader(samples or Resident(x), torch.arange(n), batch_size, **options)


def numbers(batches):
    return [y.tolist() for _, y in batches]


def test_each_sample_comes_once_and_the_last_batch_is_kept():
    batches = list(loader(shuffle=True))
    assert [len(y) for _, y in batches] == [10] * 10 + [3]
    assert sorted(torch.cat([y for _, y in batches]).tolist()) == list(range(103))
    for x, y in batches:
        assert torch.equal(x[:, 0].long(), y)


def test_without_shuffling_the_order_is_the_samples_own():
    assert torch.cat([y for _, y in loader()]).tolist() == list(range(103))


def test_a_sequential_loader_of_a_shuffled_one_leaves_that_as_it_is():
    served, untouched = loader(shuffle=True), loader(shuffle=True)
    first = iter(served)
    began = [next(first)[1].tolist()]
    for _ in range(2):
        assert torch.cat([y for _, y in served.sequential()]).tolist() == list(range(103))
    assert began + numbers(first) == numbers(untouched)
    assert served.state_dict() == untouched.state_dict()


def test_a_new_order_each_epoch_and_the_same_again_for_the_same_epoch():
    served = loader(shuffle=True)
    orders = []
    for epoch in (0, 1, 0):
        served.sampler.set_epoch(epoch)
        orders.append(numbers(served))
    assert orders[0] == orders[2] != orders[1]


def test_iter_is_lazy_for_the_epoch():
    served = loader(shuffle=True)
    iterator = iter(served)
    served.sampler.set_epoch(4)
    other = loader(shuffle=True)
    other.sampler.set_epoch(4)
    assert numbers(iterator) == numbers(other)


@pytest.mark.parametrize("block_bytes", [1, 300, 1 << 20])
@pytest.mark.parametrize("stop", range(0, 12, 3))
def test_goes_on_where_it_stopped(monkeypatch, block_bytes, stop):
    monkeypatch.setattr("sglight.data.loader.BLOCK_BYTES", block_bytes)
    first = loader(shuffle=True)
    whole = numbers(first)
    iterator = iter(first)
    for _ in range(stop):
        next(iterator)
    state = first.state_dict()
    assert state == {"epoch": 0, "batch": stop if stop else 11}
    again = loader(shuffle=True)
    again.load_state_dict({"epoch": 0, "batch": stop})
    assert numbers(again) == whole[stop:]
    assert numbers(again) == whole  # only once


def test_a_finished_or_another_epoch_starts_at_its_first_batch():
    for state in ({"epoch": 0, "batch": 11}, {"epoch": 3, "batch": 5}):
        served = loader(shuffle=True)
        served.load_state_dict(state)
        assert len(list(served)) == 11


def test_normalisation():
    served = loader(scale=torch.tensor([1.0, 2.0, 3.0]), shift=torch.tensor([0.0, 0.0, -1.0]))
    x, y = next(iter(served))
    torch.testing.assert_close(x, torch.stack([y, 2 * y, 3 * y - 1], 1).float())
    x, _ = next(iter(served))
    assert x[1].tolist() == [1.0, 2.0, 2.0]  # the samples themselves are untouched


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(2, 300),
    batch_size=st.integers(1, 50),
    memory=st.integers(1, 4000),
    slab=st.integers(1, 40),
    start=st.integers(0, 5),
)
def test_streamed_serves_what_it_says(n, batch_size, memory, slab, start):
    array = np.arange(4 * n, dtype=np.float32).reshape(-1, 2)
    rows = np.sort(np.random.default_rng(n).permutation(2 * n)[:n])
    samples = Streamed(array, rows, memory, slab)
    order = samples.order(EpochSampler(0).generator(0))
    assert sorted(order.tolist()) == list(range(n))
    start = min(start, n - 1)
    served = torch.cat(list(samples.blocks(order, start, batch_size)))
    assert np.array_equal(served.numpy(), array[rows[order[start:].numpy()]])


class Counting:
    """Notes what is read."""

    def __init__(self, values):
        self.values, self.shape, self.dtype = values, values.shape, values.dtype
        self.reads = []

    def __getitem__(self, rows):
        self.reads.append(rows.stop - rows.start)
        return self.values[rows]


def test_streamed_reads_each_slab_once_and_keeps_to_its_memory():
    array = Counting(np.arange(100_000, dtype=np.uint8).reshape(1000, 100))
    samples = Streamed(array, np.arange(1000), memory=40_000, slab=20)
    order = samples.order(EpochSampler(0).generator(0))
    held = []
    for block in samples.blocks(order, 0, 25):
        held.append(len(block))
    assert sum(held) == 1000
    assert array.reads == [20] * 50
    assert 2 * samples.group * samples.slab * 100 <= 40_000


def test_streamed_mixes_neighbours():
    samples = Streamed(np.zeros((10_000, 1), np.uint8), np.arange(10_000), memory=4000, slab=50)
    order = samples.order(EpochSampler(0).generator(0)).double()
    batches = order[:9984].view(-1, 128)
    assert batches.std(1).mean() > 2000  # 2,887 in a perfect shuffle


def test_augmented_batches_are_the_same_after_resuming():
    x = torch.randint(0, 256, (50, 1, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    make = lambda: BatchLoader(  # noqa: E731
        Resident(x), torch.arange(50), 8, shuffle=True, augmentation=Augmentation(2, True)
    )
    whole = [batch for batch, _ in make()]
    resumed = make()
    resumed.load_state_dict({"epoch": 0, "batch": 3})
    for ours, theirs in zip(resumed, whole[3:], strict=True):
        assert torch.equal(ours[0], theirs)
    epoch_1 = make()
    epoch_1.sampler.set_epoch(1)
    assert not torch.equal(next(iter(epoch_1))[0], whole[0])
