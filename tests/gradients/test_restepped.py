"""Heads of a network whose step size has changed, against autograd through the conversion."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

from sglight.gradients import Boundary, Head, LocalLoss, Passage
from sglight.gradients.restepped import Restepped
from sglight.networks.dynamics import DYNAMICS
from sglight.strategies.loss import Loss

RATIO = 4.0


def trained(head: Head) -> Head:
    head.optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    return head


@pytest.mark.parametrize("dynamics", ["hamiltonian", "leapfrog"])
def test_a_head_sees_the_state_of_the_coarse_steps(dynamics: str) -> None:
    rule, state, labels = DYNAMICS[dynamics], torch.randn(6, 8), torch.arange(6) % 3
    source = replace(LocalLoss.of({"name": "linear"}, Loss()), restepped=Restepped(rule, RATIO))
    head = Head("linear", (8,), 3, [], 4, 0.0, Loss(), 0, "heads", 2)
    nn.init.normal_(head.layers[-1].weight)
    passage = Passage(0, 0, labels, None, None, state)

    leaf = state.clone().requires_grad_()
    coarse = torch.cat(rule.restepped(tuple(leaf.chunk(2, 1)), RATIO), 1)
    (expected,) = torch.autograd.grad(head.loss(coarse, labels), leaf)
    one, two = trained(deepcopy(head)), trained(deepcopy(head))
    torch.testing.assert_close(source.estimate(Boundary(0, 0.5, one), passage), expected)
    torch.testing.assert_close(source.gradient(Boundary(0, 0.5, one), passage, None), expected)
    two.learn(coarse.detach(), labels, None, 0.5)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
