"""What must hold on a CUDA device as well; skipped where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglight.networks import StableNet
from sglight.networks.stability import analyse
from sglight.strategies.backprop import Backprop
from sglight.strategies.blend import Blend
from sglight.strategies.delayed import Delayed
from sglight.strategies.dni import DNI
from sglight.strategies.local import Local
from sglight.strategies.staged import StagedModule
from tests.parallel.training import train_on
from tests.strategies.common import ADAM, IMAGES, NETWORK, assert_equal, batches, fit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dynamics", ["euler", "antisymmetric", "hamiltonian", "leapfrog"])
@pytest.mark.parametrize("network", [NETWORK, IMAGES], ids=["dense", "conv"])
def test_outputs_and_gradients_agree_with_the_cpu(dynamics: str, network: dict[str, Any]) -> None:
    net = StableNet(**{**network, "dynamics": dynamics}).double()
    x = torch.randn(5, *network["shape"], dtype=torch.float64)
    out = net(x)
    gradients = torch.autograd.grad(out.square().sum(), list(net.parameters()))
    net.cuda()
    on_gpu = net(x.cuda())
    torch.testing.assert_close(on_gpu.cpu(), out, rtol=1e-9, atol=1e-12)
    others = torch.autograd.grad(on_gpu.square().sum(), list(net.parameters()))
    for a, b in zip(gradients, others, strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dynamics", ["euler", "leapfrog"])
@pytest.mark.parametrize("exact_up_to", [256, 0])
def test_stability_agrees_with_the_cpu(dynamics: str, exact_up_to: int) -> None:
    net = StableNet(**{**IMAGES, "dynamics": dynamics}).double().eval()
    x, labels = torch.randn(3, *IMAGES["shape"], dtype=torch.float64), torch.arange(3)
    here = analyse(net, x, labels, exact_up_to)
    there = analyse(net.cuda(), x.cuda(), labels.cuda(), exact_up_to)
    assert there.flow_sigma_max == pytest.approx(here.flow_sigma_max)
    assert there.gradient_norm == pytest.approx(here.gradient_norm)
    assert [step.sigma_max for step in there.steps] == pytest.approx([step.sigma_max for step in here.steps])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("strategy", [Backprop, Delayed, DNI, Local, Blend])
def test_equal_seeds_give_equal_runs(strategy: type[StagedModule], precision: Any) -> None:
    states = []
    for _ in range(2):
        module = strategy(IMAGES, ADAM)
        fit(module, batches(6, shape=(1, 6, 6)), accelerator="gpu", precision=precision)
        states.append(module.state_dict())
    assert_equal(*states)


@pytest.mark.timeout(300)
def test_processors_that_share_a_gpu_find_the_same_as_one_process() -> None:
    todo = [
        {"network": network, "options": {"processors": 3}, "accelerator": "gpu"}
        for network in (NETWORK, IMAGES)
    ]
    for found, expected in zip(train_on(2, todo), train_on(1, todo), strict=True):
        assert_equal(found.parameters, expected.parameters)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("workers", [2, 4])
def test_workers_that_share_a_gpu_learn_the_same_as_one(workers: int) -> None:
    todo = [
        {"network": NETWORK, "options": {"stages": 4, "lag": lag}, "accelerator": "gpu"} for lag in (0, 1, 2)
    ]
    # Pieces wait on the device while later ones come in.
    todo += [
        {
            "network": {**network, "dynamics": "hamiltonian"}, "accelerator": "gpu", "batches": 40,
            "options": {"stages": 4, "microbatches": 2, "slack": slack, "backward": backward},
        }
        for network in (NETWORK, IMAGES)
        for slack, backward in ((0, "stashed"), (1, "stashed"), (0, "replayed"), (1, "rebuilt"))
    ]  # fmt: skip
    for found, expected in zip(train_on(workers, todo), train_on(1, todo), strict=True):
        assert_equal(found.parameters, expected.parameters)


@pytest.mark.timeout(300)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_gpu_for_each_worker() -> None:
    job: dict[str, Any] = {"network": NETWORK, "options": {"stages": 4}, "accelerator": "gpu", "each": True}
    (found,), (expected,) = train_on(2, [job]), train_on(1, [job])
    assert_equal(found.parameters, expected.parameters)
