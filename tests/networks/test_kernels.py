"""The linear maps: the adjoint is the adjoint, products do not see where their operands lie."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sglight.networks.kernels import KERNELS, arranged, channels_last, on_cache_lines
from tests.networks import reference


def operands(kernel: str, channels: int, size: int, batch: int = 2) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(channels + 10 * size)
    shape = KERNELS[kernel].weight_shape(channels, size)
    weight = torch.randn(3, *shape, generator=draw, dtype=torch.float64)
    states = (batch, channels) if kernel == "dense" else (batch, channels, 5, 4)
    x, y = torch.randn(2, *states, generator=draw, dtype=torch.float64)
    return weight, x, y


def apply(kernel: str, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return KERNELS[kernel].apply(x, KERNELS[kernel].operator(weight), None)


@settings(max_examples=25, deadline=None)
@given(
    kernel=st.sampled_from(sorted(KERNELS)),
    channels=st.integers(1, 9),
    size=st.sampled_from([1, 3, 5]),
    batch=st.integers(1, 4),
)
def test_adjoint(kernel: str, channels: int, size: int, batch: int) -> None:
    """<K x, y> = <x, K^T y>, and both are the reference's."""
    weight, x, y = operands(kernel, channels, size, batch)
    adjoint = KERNELS[kernel].adjoint(weight)
    for w, wt in zip(weight, adjoint, strict=True):
        forward, back = apply(kernel, w, x), apply(kernel, wt, y)
        torch.testing.assert_close((forward * y).sum(), (x * back).sum(), rtol=1e-12, atol=1e-10)
        torch.testing.assert_close(forward, reference.K(w, x))
        torch.testing.assert_close(back, reference.Kt(w, y))


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_the_adjoint_is_not_the_map_nor_its_transposed_picture(kernel: str) -> None:
    weight, x, _ = operands(kernel, 3, 3)
    back = apply(kernel, KERNELS[kernel].adjoint(weight)[0], x)
    assert not torch.allclose(back, apply(kernel, weight[0], x))
    if kernel == "conv":
        assert not torch.allclose(back, apply(kernel, weight[0].transpose(2, 3), x))


@pytest.mark.parametrize("kernel", sorted(KERNELS))
@pytest.mark.parametrize("size", [1, 3, 5])
def test_identity(kernel: str, size: int) -> None:
    weight, x, _ = operands(kernel, 4, size)
    assert torch.equal(apply(kernel, KERNELS[kernel].identity(weight), x), x)


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_biases_are_copies(kernel: str) -> None:
    """`apply` may write into them, so they must not be the parameter, not even for one sample."""
    for batch in (1, 3):
        weight, x, _ = operands(kernel, 4, 3, batch)
        bias = torch.ones(3, 4, dtype=torch.float64)
        _, room = KERNELS[kernel].biases(bias, x, 2)
        for w, b in zip(weight, room, strict=True):
            KERNELS[kernel].apply(x, KERNELS[kernel].operator(w), b)
        assert torch.equal(bias, torch.ones_like(bias))


@pytest.mark.parametrize("kernel", sorted(KERNELS))
@pytest.mark.parametrize("frugal", [False, True])
@pytest.mark.parametrize("width", [4, 5])
def test_pullback_and_collect(kernel: str, frugal: bool, width: int) -> None:
    """Against autograd: into + scale K^T g, and the gradients of weights and biases, records last step first."""
    k = KERNELS[kernel].frugal if frugal else KERNELS[kernel]
    weight, x, g = operands(kernel, width, 3)
    bias = torch.zeros(3, width, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (weight, bias, x)]
    total = 0
    records = k.ledger(weight.unbind(0))
    for j in reversed(range(3)):
        b = leaves[1][j] if kernel == "dense" else leaves[1][j][:, None, None]
        total = total + ((reference.K(leaves[0][j], (j + 1) * leaves[2]) + b) * g).sum()
        into = torch.ones_like(x)
        out, record = k.pullback(into, 0.5, g.clone(), (j + 1) * x, weight[j])
        assert out is into
        torch.testing.assert_close(out, 1 + 0.5 * reference.Kt(weight[j], g))
        torch.testing.assert_close(k.pullback(None, 0.5, g, x, weight[j])[0], reference.Kt(weight[j], g))
        records.append(record)
    expected = torch.autograd.grad(total, leaves[:2])
    for got, exact in zip(k.collect(records, 0.5), expected, strict=True):
        torch.testing.assert_close(got, 0.5 * exact)


def test_frugal_records_hold_no_states() -> None:
    weight, x, g = operands("dense", 4, 3, batch=7)
    _, record = KERNELS["dense"].frugal.pullback(None, 1.0, g, x, weight[0])
    assert [tuple(t.shape) for t in record] == [(4, 4), (4,)]


@settings(max_examples=30, deadline=None)
@given(
    count=st.integers(1, 5),
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_lines(count: int, shape: list[int], dtype: torch.dtype) -> None:
    stack = torch.randn(count, *shape).to(dtype)
    placed = on_cache_lines(stack)
    assert torch.equal(placed, stack)
    assert all((entry.data_ptr() - placed.data_ptr()) % 64 == 0 for entry in placed)


@settings(max_examples=60, deadline=None)
@given(
    channels=st.integers(1, 70),
    steps=st.integers(2, 7),
    batch=st.sampled_from([2, 3, 16, 31, 64]),
    data=st.data(),
)
def test_dense_gradients_do_not_see_the_other_steps(channels: int, steps: int, batch: int, data) -> None:
    """Bit for bit in float32, though batched products may choose their path by the whole batch."""
    cut = data.draw(st.integers(1, steps - 1))
    kernel = KERNELS["dense"]
    draw = torch.Generator().manual_seed(channels)
    pairs = [tuple(torch.randn(2, batch, channels, generator=draw)) for _ in range(steps)]
    whole = kernel.collect([(g.clone(), x.clone()) for g, x in pairs], 1.0)
    late = kernel.collect([(g.clone(), x.clone()) for g, x in pairs[:cut]], 1.0)
    early = kernel.collect([(g.clone(), x.clone()) for g, x in pairs[cut:]], 1.0)
    for entire, first, second in zip(whole, early, late, strict=True):
        assert torch.equal(entire, torch.cat([first, second]))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (1, 1, 1, 1), (1, 3, 4, 5)])
def test_channels_last_gives_one_layout(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    big = torch.randn(shape[0], 2 * shape[1], *shape[2:])
    inputs = [x, x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT, big[:, shape[1] :]]
    laid = [channels_last(t) for t in inputs]
    assert len({t.stride() for t in laid}) == 1 and all(t.storage_offset() == 0 for t in laid)
    assert all(torch.equal(a, b) for a, b in zip(inputs, laid, strict=True))
    assert laid[0].is_contiguous(memory_format=torch.channels_last)


def test_gradients_are_arranged_too() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64).requires_grad_()
    out = arranged(x, channels_last)
    (grad,) = torch.autograd.grad((out.flatten(1) ** 2).sum(), x)
    assert grad.stride() == channels_last(x.detach()).stride()
    assert torch.equal(grad, 2 * x.detach())
    assert torch.autograd.gradgradcheck(lambda t: arranged(t, channels_last) ** 3, x[:1, :2, :2, :2])


def test_conv_is_the_same_padding_convolution() -> None:
    weight, x, _ = operands("conv", 3, 5)
    torch.testing.assert_close(apply("conv", weight[0], x), F.conv2d(x, weight[0], padding="same"))
