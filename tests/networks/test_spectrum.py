"""Jacobians and singular values against those of matrices that are known."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sglight.networks.spectrum import (
    jacobian,
    largest_singular_value,
    pull,
    push,
    singular_values,
    spectral_radius,
)


def curved(x: Tensor) -> Tensor:
    """A map of each sample [B, 2, 3] to another shape, with a Jacobian of its own in every place."""
    return torch.cat([x.flatten(1).sin(), x.flatten(1).square().cumsum(1)], 1)


def reference(x: Tensor) -> Tensor:
    whole = torch.autograd.functional.jacobian(curved, x)
    return torch.stack([whole[k, :, k].flatten(1) for k in range(len(x))])


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_jacobian_is_autograds_one_sample_at_a_time(x: Tensor) -> None:
    torch.testing.assert_close(jacobian(curved, x), reference(x))


def test_push_and_pull_are_the_jacobian_and_its_adjoint(x: Tensor) -> None:
    v, u = torch.randn_like(x), torch.randn(4, 12, dtype=x.dtype)
    matrices = reference(x)
    torch.testing.assert_close(push(curved, x, v), (matrices @ v.flatten(1)[..., None])[..., 0])
    torch.testing.assert_close(pull(curved, x, u).flatten(1), (matrices.mT @ u[..., None])[..., 0])
    assert not x.requires_grad


def test_a_constant_map_pushes_to_zero(x: Tensor) -> None:
    assert not push(torch.zeros_like, x, x).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lanczos_finds_the_largest_singular_value(x: Tensor, dtype: torch.dtype) -> None:
    x = x.to(dtype)
    exact = singular_values(reference(x))[:, 0]
    # One iteration more than there are singular values: the rest of a full space is rounding.
    bounds = [largest_singular_value(curved, x, n, torch.Generator().manual_seed(0)) for n in (1, 2, 4, 7)]
    for coarse, fine in pairwise(bounds):
        assert (coarse <= fine * (1 + 1e-6)).all()
    torch.testing.assert_close(bounds[-1], exact)


def test_lanczos_on_many_values_needs_few_iterations() -> None:
    generator = torch.Generator().manual_seed(2)
    matrix = torch.eye(300) + 0.5 * torch.randn(300, 300, generator=generator) / 300**0.5
    x = torch.zeros(3, 300)
    found = largest_singular_value(lambda s: s @ matrix.T, x, 15, generator)
    exact = torch.linalg.matrix_norm(matrix, 2)
    assert (found <= exact * (1 + 1e-5)).all()
    assert (found > 0.98 * exact).all()


def test_lanczos_of_nothing_is_nothing() -> None:
    assert not largest_singular_value(lambda s: 0 * s, torch.ones(2, 3), 4, torch.Generator()).any()


def test_singular_values_and_spectral_radius_of_known_matrices() -> None:
    rotation = torch.tensor([[0.0, -2.0], [2.0, 0.0]])
    shear = torch.tensor([[1.0, 3.0], [0.0, 1.0]])
    both = torch.stack([rotation, shear])
    torch.testing.assert_close(spectral_radius(both), torch.tensor([2.0, 1.0]))
    golden = (3 + 13**0.5) / 2
    torch.testing.assert_close(singular_values(both), torch.tensor([[2.0, 2.0], [golden, 1 / golden]]))


def test_what_is_not_finite_is_not_a_number_and_leaves_the_others_alone() -> None:
    matrices = torch.stack([torch.eye(2), torch.full((2, 2), torch.inf)])
    for found in (singular_values(matrices)[:, 0], spectral_radius(matrices)):
        assert found[0] == 1 and found[1].isnan()
    broken = largest_singular_value(
        lambda s: s * torch.tensor([[1.0], [torch.nan]]), torch.ones(2, 3), 2, torch.Generator()
    )
    assert broken[0] == pytest.approx(1) and broken[1].isnan()
