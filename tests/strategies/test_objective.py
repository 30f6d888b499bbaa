"""The objective against plain torch on the uncut network, and the samples that it is the mean of."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from sglight.link import alone
from sglight.networks import StableNet
from sglight.networks.regularisers import penalty
from sglight.strategies.objective import Objective, draw, flat, gather, in_order, shares
from sglight.strategies.recorder import Recorder
from sglight.strategies.sharing import SharedObjective, Tally, times
from tests.strategies.common import IMAGES, NETWORK, batches

SMOOTH = {"smoothness": 0.1}
NETWORKS: dict[str, dict[str, Any]] = {
    "dense": NETWORK,
    "reversible": {**NETWORK, "reversible": True},
    "images": {**IMAGES, "channels": [3, 4], "steps": [3, 2], "connector": "linear", "normalisation": "layer"},
    "leapfrog": {**NETWORK, "dynamics": "leapfrog", "channels": [5, 6], "steps": 3},
}  # fmt: skip


def samples(network: dict[str, Any]) -> tuple[Tensor, Tensor]:
    ((x, y),) = batches(1, size=20, shape=network["shape"])
    return x, y


def objective(network: dict[str, Any], parts: int = 3) -> Objective:
    return Objective(StableNet(**network).split(parts), SMOOTH, 0.01, Recorder())


def shared(network: dict[str, Any], parts: int = 3, largest: int = 4) -> SharedObjective:
    found = SharedObjective(objective(network, parts), alone(parts), parts, Recorder())
    found.use(samples(network), largest)
    found.forget()
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_value_and_gradient_are_those_of_plain_torch(name: str) -> None:
    network = NETWORKS[name]
    net, f = StableNet(**network), shared(network)
    x, y = samples(network)
    loss = F.cross_entropy(net(x), y) + penalty([net], 0.1)
    loss = loss + 0.005 * sum(p.square().sum() for p in net.parameters())
    loss.backward()
    point = f.objective.read()
    value, gradient = f.differentiate(point)
    assert value == pytest.approx(float(loss), rel=1e-5)
    assert f.evaluate(point).value == pytest.approx(value, rel=1e-6)
    assert f.evaluate(point).accuracy == pytest.approx(float((net(x).argmax(1) == y).float().mean()))
    # Put together again, by name: stages hold slices of the segments' parameters.
    f.objective.write(gradient)
    found: dict[str, list[Tensor]] = {}
    for stage in f.objective._stages:
        for key, parameter in stage.named_parameters():
            found.setdefault(key, []).append(parameter.detach())
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(torch.cat(found[key]), parameter.grad, rtol=1e-4, atol=1e-6)


def test_blocks_are_ranges_of_time_with_opening_and_classifier() -> None:
    stages = StableNet(**NETWORK).split(3)
    sizes = [len(block) for block in Objective(stages, {}, 0.0, Recorder()).read()]
    steps = [stage.segments["0"].steps * (5 * 5 + 5) for stage in stages]
    opening, classifier = 3 * 5 + 5, 5 * 4 + 4
    assert sizes == [steps[0] + opening, steps[1], steps[2] + classifier]


def test_what_is_written_is_read() -> None:
    f = objective(NETWORK)
    point = [torch.randn_like(block) for block in f.read()]
    f.write(point)
    assert torch.equal(flat(f.read()), flat(point))


def test_the_gradient_of_some_blocks_is_a_part_of_the_whole() -> None:
    f, chunk = objective(NETWORK), samples(NETWORK)
    point = f.read()
    _, _, whole = f.on_batch(point, [chunk], [0, 1, 2])
    _, _, parts = f.on_batch(point, [chunk], [2, 0])
    assert torch.equal(parts[0], whole[2]) and torch.equal(parts[1], whole[0])


def test_one_processor_finds_what_all_find_bit_for_bit() -> None:
    f = shared(IMAGES)
    point = f.objective.read()
    together, alone_ = f.evaluate(point), f.alone(1, point, "local")
    assert (together.value, together.accuracy) == (alone_.value, alone_.accuracy)


def test_what_is_evaluated_is_counted_by_processor() -> None:
    f = shared(NETWORK, largest=3)
    point = f.objective.read()
    f.evaluate(point)
    f.differentiate(point, "directions")
    f.alone(2, point, "local")
    assert sum(tally.samples["gradient"] for tally in f.tallies.values()) == 20
    assert sum(tally.samples["function"] for tally in f.tallies.values()) == 20 + 20
    assert [tally.seconds["local"] > 0 for tally in f.tallies.values()] == [False, False, True]


def test_an_overflow_is_infinitely_bad() -> None:
    f = shared({**NETWORK, "activation": "relu"})
    assert f.evaluate([1e30 * block for block in f.objective.read()]).value == float("inf")


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


def test_the_speed_up_is_the_sum_over_the_slowest_of_each_phase() -> None:
    tallies = [Tally(), Tally()]
    tallies[0].seconds |= {"directions": 1.0, "local": 4.0, "synchronisation": 1.0}
    tallies[1].seconds |= {"directions": 1.0, "local": 2.0, "synchronisation": 2.0}
    found = times(tallies, rest_s=1.0)
    assert found["speedup/theoretical"] == pytest.approx((6 + 5 + 1) / (1 + 4 + 2 + 1))
    assert found["time/processor_1/local_s"] == 2.0
