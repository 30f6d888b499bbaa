"""Networks under `torch.func`, `torch.export`, second derivatives, other devices, frozen parameters."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev, vmap

from sglight.networks import StableNet
from tests.networks.common import DYNAMICS, KERNELS, relative

CASES = [(dynamics, kernel, False) for dynamics in DYNAMICS for kernel in KERNELS] + [
    ("hamiltonian", "dense", True), ("leapfrog", "conv", True),
]  # fmt: skip
each = pytest.mark.parametrize(("dynamics", "kernel", "reversible"), CASES)


def network(dynamics: str, kernel: str, reversible: bool, **options: Any) -> tuple[StableNet, Tensor]:
    """A small network in double precision, and samples for it."""
    shape = (3,) if kernel == "dense" else (1, 4, 4)
    options = {"channels": [3, 4], "steps": 2, "opening": "conv" if kernel == "conv" else "linear", **options}
    net = StableNet(
        shape, 2, dynamics=dynamics, kernel=kernel, reversible=reversible, seed=1, **options
    ).double()
    return net, torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@each
def test_func_is_autograd(dynamics: str, kernel: str, reversible: bool) -> None:
    """Gradients sample by sample, Jacobians and Hessians; autograd's own give the reference."""
    net, x = network(dynamics, kernel, reversible)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(net, parameters, (sample[None],)).square().sum()

    single = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i, sample in enumerate(x):
        net.zero_grad()
        net(sample[None]).square().sum().backward()
        for name, p in net.named_parameters():
            assert relative(single[name][i], p.grad) < 1e-12
    expected = torch.autograd.functional.jacobian(net, x)
    torch.testing.assert_close(jacrev(net)(x), expected)
    torch.testing.assert_close(vmap(net)(x[:, None])[:, 0], net(x))
    if kernel == "dense":
        second = hessian(lambda sample: net(sample[None]).square().sum())(x[0])
        net.plain()
        torch.testing.assert_close(
            second, torch.autograd.functional.hessian(lambda s: net(s[None]).square().sum(), x[0])
        )


@each
def test_second_derivatives_need_a_switch(dynamics: str, kernel: str, reversible: bool) -> None:
    net, x = network(dynamics, kernel, reversible)
    out = net(x)
    x.requires_grad_()
    (first,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"plain\(\)"):
        first.square().sum().backward()
    assert net.plain() is net
    torch.testing.assert_close(net(x), out)
    assert torch.autograd.gradgradcheck(net, x[:1].detach().requires_grad_())
    assert net.refine().segments["0"].plain
    assert not net.plain(False).segments["0"].plain


@each
def test_exported_with_gradients_on(dynamics: str, kernel: str, reversible: bool) -> None:
    """The program computes the same for any batch size, and can be trained."""
    net, x = network(dynamics, kernel, reversible)
    batch = torch.export.Dim("batch")
    program = torch.export.export(net, (x,), dynamic_shapes=({0: batch},))
    module = program.module()
    more = torch.cat([x, x])
    torch.testing.assert_close(module(more), net(more))
    module(x).sum().backward()
    net(x).sum().backward()
    found = dict(module.named_parameters())
    for name, p in net.named_parameters():
        torch.testing.assert_close(found[name].grad, p.grad)


@pytest.mark.parametrize("kernel", KERNELS)
def test_on_the_meta_device(kernel: str) -> None:
    """Without a seed as well; with one the numbers do not depend on where it was built."""
    shape = (3,) if kernel == "dense" else (1, 4, 4)
    with torch.device("meta"):
        net = StableNet(shape, 2, kernel=kernel, channels=4)
    assert {p.device.type for p in net.parameters()} == {"meta"}
    assert net(torch.empty(5, *shape, device="meta")).shape == (5, 2)
    seeded = StableNet(shape, 2, kernel=kernel, channels=4, seed=3)
    net.load_state_dict(seeded.state_dict(), assign=True)
    torch.testing.assert_close(net(torch.ones(1, *shape)), seeded(torch.ones(1, *shape)))


def test_what_is_frozen_stays_so_when_refined() -> None:
    net = StableNet((3,), 2, channels=4, steps=2, seed=1)
    for name, p in net.named_parameters():
        p.requires_grad_("weight" not in name)
    fine = net.refine()
    assert {n: p.requires_grad for n, p in fine.named_parameters()} == {
        n: p.requires_grad for n, p in net.named_parameters()
    }


def test_what_ends_the_sharing_of_split_and_what_does_not() -> None:
    """As its docstring says."""
    net = StableNet((3,), 2, channels=4, steps=2, seed=1)
    stages = net.split(2)
    net.load_state_dict(StableNet((3,), 2, channels=4, steps=2, seed=2).state_dict())
    assert torch.equal(stages[1].segments["0"].weight, net.segments["0"].weight[1:])
    copied, parts = copy.deepcopy((net, stages))
    with torch.no_grad():
        copied.segments["0"].weight.zero_()
    assert parts[1].segments["0"].weight.any()
    assert net.double().segments["0"].weight.dtype != stages[1].segments["0"].weight.dtype
