"""What `analyse` says of networks whose behaviour is known, and against autograd."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sglight.networks import Segment, StableNet
from sglight.networks.dynamics import DYNAMICS
from sglight.networks.spectrum import jacobian
from sglight.networks.stability import Stability, analyse, flow, norms, trajectory

DENSE = {"shape": (3,), "channels": 5, "steps": 6, "horizon": 2.0}
IMAGES = {"shape": (1, 2, 2), "kernel": "conv", "channels": [2, 3], "steps": 2, "horizon": 2.0}
EVERY = list(DYNAMICS)


def net(dynamics: str, shape: dict[str, Any] = DENSE, **options: Any) -> StableNet:
    return StableNet(classes=4, dynamics=dynamics, seed=3, **{**shape, **options}).double().eval()


def samples(network: StableNet, count: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shape = (count, *network.spec.shape)
    return torch.randn(shape, dtype=torch.float64, generator=generator), torch.arange(count) % 4


def measured(network: StableNet, **options: Any) -> Stability:
    return analyse(network, *samples(network), **options)


@pytest.mark.parametrize("dynamics", EVERY)
@pytest.mark.parametrize("shape", [DENSE, IMAGES], ids=["dense", "conv"])
def test_the_flow_ends_where_the_network_does(dynamics: str, shape: dict[str, Any]) -> None:
    network = net(dynamics, shape)
    x, _ = samples(network)
    links, (start, end) = flow(network)
    assert sum(link.is_step for link in links) == network.spec.total_steps
    assert network.classifier is not None
    last = trajectory(links, start(network.open(x)))[-1]
    torch.testing.assert_close(network.classifier(end(last)), network(x))


@pytest.mark.parametrize("dynamics", EVERY)
@pytest.mark.parametrize("shape", [DENSE, IMAGES], ids=["dense", "conv"])
def test_matrices_and_lanczos_agree(dynamics: str, shape: dict[str, Any]) -> None:
    network = net(dynamics, shape)
    exact, sampled = measured(network), measured(network, exact_up_to=0, iterations=16)
    assert all(step.sigma_min is not None and step.radius is not None for step in exact.steps)
    assert all(step.sigma_min is None and step.radius is None for step in sampled.steps)
    for a, b in zip(exact.steps, sampled.steps, strict=True):
        assert a.sigma_max == pytest.approx(b.sigma_max)
        assert a.sigma_min is not None and a.radius is not None
        assert a.sigma_min <= a.radius <= a.sigma_max
    assert exact.flow_sigma_max == pytest.approx(sampled.flow_sigma_max)


@pytest.mark.parametrize("dynamics", EVERY)
def test_without_forces_nothing_happens(dynamics: str) -> None:
    found = measured(net(dynamics, init="zeros"))
    for step in found.steps:
        # What drifts with its velocity is sheared: [[1, h], [0, 1]].
        h = 1 / 3 if dynamics == "leapfrog" else 0.0
        assert step.sigma_max == pytest.approx(h / 2 + (1 + h**2 / 4) ** 0.5)
        # Its eigenvalues are defective: found to half of the digits only.
        assert step.radius == pytest.approx(1, abs=1e-6)
    drift = 2.0 if dynamics == "leapfrog" else 0.0
    assert found.flow_sigma_max == pytest.approx(drift / 2 + (1 + drift**2 / 4) ** 0.5)
    assert found.state_norm == pytest.approx([found.state_norm[0]] * 7)


def test_a_linear_growth_is_found_exactly() -> None:
    # relu of positive numbers: y+ = (1 + h) y.
    network = net("euler", init="identity", activation="relu", opening="pad", shape={**DENSE, "channels": 3})
    x = torch.rand(3, 3, dtype=torch.float64) + 0.5
    found = analyse(network, x, torch.arange(3))
    factor = 1 + network.spec.step_sizes()[0]
    for step in found.steps:
        assert (step.sigma_max, step.sigma_min, step.radius) == pytest.approx((factor,) * 3)
    assert found.flow_sigma_max == pytest.approx(factor**6)
    assert found.growth == pytest.approx([factor**j for j in range(7)])
    assert found.state_norm == pytest.approx([factor**j * float(x.norm(dim=1).mean()) for j in range(7)])
    for before, after in pairwise(found.gradient_norm):
        assert before == pytest.approx(factor * after)


@pytest.mark.parametrize("dynamics", ["hamiltonian", "leapfrog"])
def test_reversible_steps_keep_the_volume(dynamics: str) -> None:
    network = net(dynamics)
    links, (start, _) = flow(network)
    states = trajectory(links, start(network.open(samples(network)[0])))
    for link, state in zip(links, states, strict=False):
        torch.testing.assert_close(jacobian(link.map, state).det(), torch.ones(3, dtype=state.dtype))


def test_gradient_norms_are_those_of_the_loss_of_each_sample() -> None:
    network = net("hamiltonian")
    x, labels = samples(network)
    found = analyse(network, x, labels)
    segment, classifier = network.segments["0"], network.classifier
    assert isinstance(segment, Segment) and classifier is not None
    first = network.open(x).detach().requires_grad_()
    last = segment(first)
    (gradient,) = torch.autograd.grad(F.cross_entropy(classifier(last), labels, reduction="sum"), first)
    assert found.gradient_norm[0] == pytest.approx(float(norms(gradient).mean()))
    assert found.state_norm[-1] == pytest.approx(float(norms(last.detach()).mean()))


def test_growth_is_within_the_singular_values() -> None:
    for dynamics in EVERY:
        found = measured(net(dynamics))
        assert found.growth[0] == pytest.approx(1)
        assert found.growth[-1] <= found.flow_sigma_max * 1.01
        bound = 1.0
        for step in found.steps:
            bound *= step.sigma_max
        assert found.flow_sigma_max <= bound * (1 + 1e-9)


def test_steps_of_half_the_size_make_the_same_flow() -> None:
    for dynamics in EVERY:
        network = net(dynamics, init="smooth", steps=32)
        coarse, fine = measured(network), measured(network.refine())
        assert fine.flow_sigma_max == pytest.approx(coarse.flow_sigma_max, rel=0.1)
        assert fine.gradient_norm[0] == pytest.approx(coarse.gradient_norm[0], rel=0.1)


@pytest.mark.parametrize("dynamics", EVERY)
def test_only_reversible_dynamics_have_an_error_of_reversal(dynamics: str) -> None:
    network = net(dynamics, IMAGES, normalisation="batch")
    error = measured(network).reversal_error
    if DYNAMICS[dynamics].reversible:
        assert error is not None
        assert 0 < error < 1e-12
        rough = measured_in_single(network)
        assert rough is not None and 1e-9 < rough < 1e-4
    else:
        assert error is None


def measured_in_single(network: StableNet) -> float | None:
    x, labels = samples(network)
    return analyse(network.float(), x.float(), labels).reversal_error


def test_an_exploded_network_has_no_numbers_and_raises_nothing() -> None:
    network = net("hamiltonian", activation="relu")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1e200)
    for limit in (256, 0):
        found = measured(network, exact_up_to=limit)
        assert not found.flow_sigma_max < 1e300
        assert found.reversal_error == torch.inf


def test_looking_leaves_the_network_alone() -> None:
    network = net("hamiltonian", IMAGES, normalisation="batch", opening="conv", opening_normalisation="batch")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    random = torch.get_rng_state()
    measured(network)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(random, torch.get_rng_state())
