"""Batch normalisation over the samples of several replicas, two of which take turns here."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sglight.link import Replicas
from sglight.networks.batchnorm import BatchNorm2d, batch_norm


class Pair(Replicas):
    """One of two threads, which meet to sum."""

    size = 2

    def __init__(self, rank: int, barrier: threading.Barrier, given: dict[int, Tensor]) -> None:
        self.rank, self._barrier, self._given = rank, barrier, given

    def begin_sum(self, values: Tensor) -> Callable[[], None]:
        def finish() -> None:
            self._given[self.rank] = values.clone()
            self._barrier.wait(10)
            values.copy_(self._given[0] + self._given[1])
            self._barrier.wait(10)

        return finish


@pytest.mark.parametrize("shape", [(3,), (3, 4, 5)])
@pytest.mark.parametrize("first", [1, 4])
def test_two_replicas_are_one_batch(shape: tuple[int, ...], first: int) -> None:
    generator = torch.Generator().manual_seed(first)
    x, g = (5 + torch.randn(7, *shape, generator=generator) for _ in range(2))
    weight, bias = (torch.randn(3, generator=generator).requires_grad_() for _ in range(2))
    x.requires_grad_()
    mean, var = torch.zeros(3), torch.ones(3)
    wanted = batch_norm(x, mean, var, weight, bias, True, Replicas())
    gradients = torch.autograd.grad(wanted, (x, weight, bias), g)

    barrier, given = threading.Barrier(2), dict[int, Tensor]()
    found: dict[int, tuple[Tensor, ...]] = {}

    def work(rank: int, part: slice) -> None:
        own, means, variances = x.detach()[part].requires_grad_(), torch.zeros(3), torch.ones(3)
        y = batch_norm(own, means, variances, weight, bias, True, Pair(rank, barrier, given))
        found[rank] = (y, *torch.autograd.grad(y, (own, weight, bias), g[part]), means, variances)

    threads = [
        threading.Thread(target=work, args=each) for each in ((0, slice(first)), (1, slice(first, None)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    a, b = found[0], found[1]
    close = torch.testing.assert_close
    close(torch.cat([a[0], b[0]]), wanted)
    close(torch.cat([a[1], b[1]]), gradients[0], rtol=1e-4, atol=1e-5)
    close(a[2] + b[2], gradients[1], rtol=1e-4, atol=1e-5)
    close(a[3] + b[3], gradients[2])
    for means, variances in ((a[4], a[5]), (b[4], b[5])):
        close(means, mean)
        close(variances, var)


def test_alone_it_is_pytorchs_own() -> None:
    x, own, known = torch.randn(4, 3, 2, 2), BatchNorm2d(3), torch.nn.BatchNorm2d(3)
    for _ in range(2):
        assert torch.equal(own(x), known(x))
    assert all(torch.equal(a, b) for a, b in zip(own.buffers(), known.buffers(), strict=True))
