"""Networks: split equals whole, balanced cuts, refinement, initial values, errors."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sglight.networks import NetworkSpec, Segment, StableNet, Stage
from tests.networks import reference
from tests.networks.common import DYNAMICS, KERNELS, REVERSIBLE, relative, whole_and_stages
from tests.networks.test_segment import slope, smooth

each_dynamics = pytest.mark.parametrize("dynamics", DYNAMICS)
each_kernel = pytest.mark.parametrize("kernel", KERNELS)
NORMS = ("none", "batch", "group", "layer")


def batch_for(net: StableNet, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(size)
    x = torch.randn(size, *net.spec.shape, generator=draw)
    return x, torch.randint(net.spec.classes, (size,), generator=draw)


def assert_split_is_whole(net: StableNet, stages: list[Stage], size: int) -> None:
    """Bit for bit, the logits and the gradients of all parameters."""
    logits, staged, expected, got = whole_and_stages(net, stages, *batch_for(net, size))
    assert torch.equal(logits, staged)
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        assert torch.equal(gradient, got[name]), name


# Split


@each_dynamics
@each_kernel
@pytest.mark.parametrize("normalisation", NORMS)
@pytest.mark.parametrize("width", [8, 7])
def test_split_is_whole(dynamics: str, kernel: str, normalisation: str, width: int) -> None:
    shape = (5,) if kernel == "dense" else (2, 6, 5)
    net = StableNet(
        shape, 3, dynamics=dynamics, kernel=kernel, normalisation=normalisation, groups=1, steps=4, channels=width,
        gamma=0.1, seed=1,
    )  # fmt: skip
    for cuts in ([0, 2, 4], [0, 1, 2, 3, 4], [0, 3, 4]):
        assert_split_is_whole(net, net.split(cuts), 16 if kernel == "dense" else 4)


@each_dynamics
@pytest.mark.parametrize("width", [5, 33])
def test_single_samples_of_odd_widths(dynamics: str, width: int) -> None:
    """Products with one row round by where the weights begin in memory."""
    net = StableNet((5,), 3, dynamics=dynamics, steps=9, channels=width, seed=1)
    for cuts in ([0, 1, 9], [0, 2, 5, 9]):
        stages = [Stage(net.spec, a, b) for a, b in pairwise(cuts)]
        assert_split_is_whole(net, net.split(cuts), 1)
        assert_split_is_whole(net, stages, 1)


@st.composite
def networks(draw) -> tuple[dict, list[int], int]:
    """(arguments, cuts, batch size) of all sorts."""
    kernel = draw(st.sampled_from(KERNELS))
    normalisation = draw(st.sampled_from(NORMS))
    width = draw(st.integers(2, 9) if kernel == "conv" else st.integers(2, 70))
    channels = [width, width + draw(st.integers(0, 4))][: draw(st.integers(1, 2))]
    steps = draw(st.integers(1, 6))
    total = steps * len(channels)
    inner = draw(st.lists(st.integers(1, total - 1), max_size=4, unique=True)) if total > 1 else []
    least = 1 if normalisation == "none" else 2
    options = {
        "shape": (draw(st.integers(1, 3)), *draw(st.tuples(*[st.integers(3, 9)] * 2)))
        if kernel == "conv"
        else (5,),
        "classes": 3,
        "dynamics": draw(st.sampled_from(DYNAMICS)),
        "kernel": kernel,
        "steps": steps,
        "channels": channels,
        "normalisation": normalisation,
        "groups": 1,
        "activation": draw(st.sampled_from(["tanh", "relu"])),
        "opening": draw(st.sampled_from(["linear", "conv"])) if kernel == "conv" else "linear",
        "connector": draw(st.sampled_from(["pad", "linear"])),
        "head": draw(st.sampled_from(["flatten", "pool"])),
        "initial_velocity": draw(st.sampled_from(["zero", "paper"])),
        "seed": draw(st.integers(0, 3)),
    }
    sizes = st.sampled_from([1, 2, 3, 16, 33, 64] if kernel == "dense" else [1, 2, 3, 8])
    return options, [0, *sorted(inner), total], max(least, draw(sizes))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=networks(), alone=st.booleans())
def test_split_is_whole_whatever_the_network_and_the_cut(case, alone: bool) -> None:
    """Also where each stage is built on its own, as a worker does, in memory of its own."""
    options, cuts, size = case
    net = StableNet(**options)
    stages = [Stage(net.spec, a, b) for a, b in pairwise(cuts)] if alone else net.split(cuts)
    assert_split_is_whole(net, stages, size)


@pytest.mark.slow
@pytest.mark.timeout(600)
@settings(max_examples=300, deadline=None)
@given(case=networks(), alone=st.booleans(), threads=st.sampled_from([1, 2]))
def test_split_is_whole_at_length(case, alone: bool, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        test_split_is_whole_whatever_the_network_and_the_cut.hypothesis.inner_test(case, alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dynamics", REVERSIBLE)
@each_kernel
@pytest.mark.parametrize("normalisation", ["none", "layer"])
def test_split_of_a_rebuilt_network(dynamics: str, kernel: str, normalisation: str) -> None:
    """The same function; gradients to rounding only, as states are rebuilt from another end."""
    shape = (5,) if kernel == "dense" else (2, 6, 5)
    net = StableNet(
        shape,
        3,
        dynamics=dynamics,
        kernel=kernel,
        normalisation=normalisation,
        steps=8,
        channels=4,
        reversible=True,
        seed=1,
    )
    logits, staged, expected, got = whole_and_stages(net, net.split([0, 3, 8]), *batch_for(net, 8))
    assert torch.equal(logits, staged)
    for name, gradient in expected.items():
        assert relative(got[name], gradient) < 1e-4 or gradient.norm() < 1e-6


@pytest.mark.parametrize("normalisation", ["none", "batch"])
def test_split_in_eval(normalisation: str) -> None:
    net = StableNet((5,), 3, steps=6, channels=4, normalisation=normalisation, seed=1).eval()
    x = torch.randn(8, 5)
    stages = net.split(3)
    assert not any(stage.training for stage in stages)
    state = x
    for stage in stages:
        state = stage(state)
    assert torch.equal(state, net(x))


def test_stages_share_the_networks_memory() -> None:
    """What a stage learns, the network knows; statistics of normalisations too."""
    net = StableNet(
        (2, 6, 6), 3, kernel="conv", steps=4, channels=4, normalisation="batch", opening="conv",
        opening_normalisation="batch", seed=1,
    )  # fmt: skip
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.randn(8, 2, 6, 6)
    for stage in net.split(2):
        state = stage(state).detach()
        with torch.no_grad():
            for parameter in stage.parameters():
                parameter += 1
    for name, value in net.state_dict().items():
        if "running" in name or "tracked" in name:
            assert not torch.equal(value, before[name]), name
        else:
            assert torch.equal(value, before[name] + 1), name


def test_the_whole_state_crosses_a_cut() -> None:
    net = StableNet((3,), 2, dynamics="hamiltonian", steps=4, channels=5, seed=1)
    first, second = net.split(2)
    state = first(torch.randn(2, 3))
    assert state.shape == (2, 10) and state[:, 5:].abs().sum() > 0
    reset = state.clone()
    reset[:, 5:] = 0
    assert not torch.allclose(second(state), second(reset))


def test_names_are_the_same_in_every_placement() -> None:
    net = StableNet((2, 8, 8), 3, kernel="conv", steps=2, channels=[3, 4], connector="linear", seed=1)
    assert list(net.state_dict()) == [
        "opening.weight",
        "opening.bias",
        "segments.0.weight",
        "segments.0.bias",
        "segments.1.weight",
        "segments.1.bias",
        "connectors.0.mix.weight",
        "connectors.0.mix.bias",
        "classifier.linear.weight",
        "classifier.linear.bias",
    ]
    for stages in (2, 3, 4):
        names = [name for stage in net.split(stages) for name in stage.state_dict()]
        assert set(names) == set(net.state_dict())
        # Only a segment's parameters are in several stages, as slices.
        repeated = {name for name in names if names.count(name) > 1}
        assert all(name.startswith("segments.") for name in repeated)


# The function


@each_dynamics
@each_kernel
def test_the_network_by_its_equations(dynamics: str, kernel: str) -> None:
    shape = (5,) if kernel == "dense" else (2, 6, 4)
    net = StableNet(
        shape, 3, dynamics=dynamics, kernel=kernel, steps=[3, 2], horizon=[1.0, 0.8], channels=[4, 6], gamma=0.1,
        connector="linear", seed=1,
    ).double()  # fmt: skip
    x = torch.randn(2, *shape, dtype=torch.float64)
    w = {name: value.detach() for name, value in net.named_parameters()}
    linear = F.linear if kernel == "dense" else F.conv2d
    y = linear(x, w["opening.weight"], w["opening.bias"])
    second = {"hamiltonian": [torch.zeros_like(y)], "leapfrog": [y]}.get(dynamics, [])
    state = torch.cat([y, *second], 1)
    for k, h in ((0, 1 / 3), (1, 0.4)):
        stacks = list(w[f"segments.{k}.weight"]), list(w[f"segments.{k}.bias"])
        state = reference.flow(dynamics, state, *stacks, h, gamma=0.1)
        if k == 0:
            state = state if kernel == "dense" else F.avg_pool2d(state, 2)
            mix = w["connectors.0.mix.weight"], w["connectors.0.mix.bias"]
            state = torch.cat([linear(f, *mix) for f in state.chunk(1 + len(second), 1)], 1)
    expected = F.linear(state[:, :6].flatten(1), w["classifier.linear.weight"], w["classifier.linear.bias"])
    torch.testing.assert_close(net(x), expected)
    assert len(net.trajectory(x)) == 1 + 5 + 1


def test_the_network_gives_logits() -> None:
    """No softmax before the loss: ten sure answers reach a loss near 0, where a double softmax stops at 1.46."""
    net = StableNet((10,), 10, dynamics="euler", steps=1, channels=10, opening="pad", init="zeros", seed=1)
    with torch.no_grad():
        net.classifier.linear.weight[:] = 100 * torch.eye(10)
    assert F.cross_entropy(net(torch.eye(10)), torch.arange(10)) < 1e-6
    assert net(torch.randn(3, 10)).min() < 0


@pytest.mark.parametrize("classes", [2, 5, 100])
def test_any_number_of_classes(classes: int) -> None:
    assert StableNet((4,), classes, steps=2, channels=4, seed=1)(torch.randn(3, 4)).shape == (3, classes)


def test_normalisation_is_no_step_of_its_own() -> None:
    plain, normed = (
        StableNet((4,), 2, steps=3, channels=4, normalisation=n, seed=1) for n in ("none", "layer")
    )
    x = torch.randn(2, 4)
    assert len(plain.trajectory(x)) == len(normed.trajectory(x)) == 4
    assert plain.segments["0"].step_size == normed.segments["0"].step_size


def test_samples_are_flattened_for_dense_networks() -> None:
    net = StableNet((1, 4, 5), 3, steps=2, channels=8, seed=1)
    x = torch.randn(2, 1, 4, 5)
    with pytest.raises(ValueError, match=r"samples of shape \[1, 4, 5\], not \[1, 5, 4\]"):
        net(x.mT)
    assert net(x).shape == (2, 3)


@each_dynamics
@pytest.mark.parametrize("normalisation", ["none", "layer"])
def test_bf16_autocast_keeps_states_in_full_precision(dynamics: str, normalisation: str) -> None:
    net = StableNet(
        (2, 8, 8), 3, dynamics=dynamics, kernel="conv", steps=2, channels=[4, 6], connector="linear",
        normalisation=normalisation, groups=2, seed=1,
    )  # fmt: skip
    x = torch.randn(4, 2, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        state = x
        for stage in net.split(4):
            state = stage(state)
            assert state.dtype == (torch.bfloat16 if stage.is_last else torch.float32)
        assert all(s.dtype == torch.float32 for s in net.trajectory(x))
    assert relative(state.float(), net(x)) < 0.05


# Cuts


def brute_force(spec: NetworkSpec, stages: int, extra) -> float:
    """Cost of the dearest stage of the best of all cuts."""
    costs = spec.step_work()

    def dearest(cuts: tuple[int, ...]) -> float:
        return max(
            sum(costs[a:b]) + (extra(spec.state_shape(b)) if b < len(costs) else 0) for a, b in pairwise(cuts)
        )

    inner = combinations(range(1, len(costs)), stages - 1)
    return min(dearest((0, *cuts, len(costs))) for cuts in inner)


@settings(max_examples=60, deadline=None)
@given(
    channels=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    steps=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    stages=st.integers(1, 5),
    classes=st.integers(2, 200),
    estimator=st.integers(0, 5000),
    by_shape=st.booleans(),
    kernel=st.sampled_from(KERNELS),
)
def test_cuts_are_the_best_of_all(channels, steps, stages, classes, estimator, by_shape, kernel) -> None:
    steps = steps[: len(channels)]
    assume(stages <= sum(steps))
    shape = (3,) if kernel == "dense" else (1, 8, 8)
    spec = NetworkSpec(shape, classes, kernel=kernel, channels=channels, steps=steps, connector="linear")
    extra = (lambda shape: estimator * math.prod(shape)) if by_shape else float(estimator)
    cuts = spec.cuts(stages, extra)
    assert len(cuts) == stages + 1 and cuts[0] == 0 and cuts[-1] == sum(steps) and cuts == sorted(set(cuts))
    of = extra if by_shape else lambda _: estimator
    costs = spec.step_work()
    dearest = max(
        sum(costs[a:b]) + (of(spec.state_shape(b)) if b < sum(steps) else 0) for a, b in pairwise(cuts)
    )
    assert dearest == pytest.approx(brute_force(spec, stages, of))


def test_the_estimators_cost_shifts_the_cut() -> None:
    spec = NetworkSpec((4,), 2, steps=16, channels=8)
    assert spec.cuts(2) == [0, 8, 16]
    one_step = spec.step_work()[5]
    assert spec.cuts(2, 4 * one_step) == [0, 6, 16]
    assert spec.cuts(2, lambda shape: 4 * one_step * math.prod(shape) / 16) == [0, 6, 16]
    net = StableNet((4,), 2, steps=16, channels=8, seed=1)
    assert [s.stop for s in net.split(2, 4 * one_step)] == [6, 16]


def test_a_dear_classifier_shifts_the_cut() -> None:
    assert NetworkSpec((4,), 2000, steps=16, channels=8).cuts(2)[1] > 8


def test_values_are_those_of_states_and_activations() -> None:
    spec = NetworkSpec((2, 8, 8), 10, dynamics="hamiltonian", kernel="conv", steps=2, channels=[3, 4])
    one, two = 3 * 64, 4 * 16
    assert spec.step_values() == [2 * one + 2 * one, 2 * one + 2 * one, 2 * two, 2 * two + two]


def test_costs_are_multiplications() -> None:
    spec = NetworkSpec(
        (2, 8, 8), 10, kernel="conv", steps=2, channels=[3, 4], connector="linear", opening="conv"
    )
    one, two = 2 * 9 * 9 * 64, 2 * 16 * 9 * 16
    opening, connector, classifier = 2 * 3 * 9 * 64, 2 * 3 * 4 * 16, 10 * 4 * 16
    assert spec.step_costs() == [opening + one, one + connector, two, two + classifier]
    dense = NetworkSpec((5,), 3, dynamics="euler", steps=2, channels=4)
    assert dense.step_costs() == [5 * 4 + 16, 16 + 3 * 4]


def test_cuts_of_a_deep_network_take_no_time() -> None:
    cuts = NetworkSpec((2,), 2, steps=256, channels=4).cuts(8)
    assert all(abs(b - a - 32) <= 1 for a, b in pairwise(cuts))


@pytest.mark.parametrize("stages", [0, 9])
def test_too_many_stages(stages: int) -> None:
    with pytest.raises(ValueError, match=rf"strategy\.stages={stages} must be from 1 to .* 8 \(model\.steps"):
        StableNet((2,), 2, steps=8, channels=4).split(stages)


@pytest.mark.parametrize("cuts", [[0, 4], [1, 8], [0, 5, 5, 8], [0, 6, 3, 8]])
def test_impossible_cuts(cuts: list[int]) -> None:
    with pytest.raises(ValueError, match="must rise from 0 to the number of steps, 8"):
        StableNet((2,), 2, steps=8, channels=4).split(cuts)


# Initial values


@settings(max_examples=20, deadline=None)
@given(
    data=st.data(), init=st.sampled_from(["random", "smooth", "identity"]), dynamics=st.sampled_from(DYNAMICS)
)
def test_a_stage_alone_begins_with_its_slice_of_the_whole(data, init: str, dynamics: str) -> None:
    options = {"kernel": "conv", "dynamics": dynamics, "steps": 3, "channels": [2, 3], "connector": "linear"}
    net = StableNet((1, 6, 6), 3, **options, init=init, seed=data.draw(st.integers(0, 5)))
    a, b = sorted(data.draw(st.lists(st.integers(0, 6), min_size=2, max_size=2, unique=True)))
    torch.randn(3)
    stage = Stage(net.spec, a, b)
    whole = net.state_dict()
    for name, value in stage.state_dict().items():
        owner = stage.get_submodule(name.rpartition(".")[0])
        rows = slice(owner.start, owner.stop) if isinstance(owner, Segment) else slice(None)
        assert torch.equal(value, whole[name][rows]), name


def test_the_seed_decides() -> None:
    def values(seed: int | None) -> torch.Tensor:
        net = StableNet((3,), 2, steps=2, channels=4, seed=seed)
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    assert torch.equal(values(1), values(1)) and not torch.equal(values(1), values(2))
    torch.manual_seed(0)
    drawn = values(None)
    torch.manual_seed(0)
    assert torch.equal(drawn, values(None)) and not torch.equal(drawn, values(None))


# Refinement


@each_dynamics
@pytest.mark.parametrize("rule", ["linear", "constant"])
def test_the_refined_network_approximates_the_whole(dynamics: str, rule: str) -> None:
    steps, errors = (8, 16, 32, 64), []
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for n in steps:
        net = StableNet((3,), 2, dynamics=dynamics, steps=n, channels=[4, 5], horizon=1.0, seed=1).double()
        for segment in net.segments.values():
            smooth(segment)
        fine = net.refine(rule)
        assert fine.spec.steps == (2 * n, 2 * n) and fine.spec.horizon == net.spec.horizon
        errors.append((fine(x) - net(x)).detach().norm().item())
    assert slope([1 / n for n in steps], errors) == pytest.approx(1, abs=0.2)


def test_refining_copies_the_rest() -> None:
    net = StableNet(
        (2, 8, 8), 3, kernel="conv", steps=[2, 1], channels=[3, 4], connector="linear", opening="conv",
        opening_normalisation="batch", normalisation="batch", seed=1,
    ).double()  # fmt: skip
    for _ in range(2):
        net(torch.randn(4, 2, 8, 8, dtype=torch.float64))
    net.eval()
    fine = net.refine()
    assert not fine.training and list(fine.state_dict()) == list(net.state_dict())
    for name, value in net.state_dict().items():
        got = fine.state_dict()[name]
        assert got.dtype == value.dtype
        assert torch.equal(got[::2] if name.startswith("segments") else got, value), name
    with torch.no_grad():
        fine.classifier.linear.weight.zero_()
    assert net.classifier.linear.weight.abs().sum() > 0
    again = fine.refine("constant")
    assert again.spec.steps == (8, 4) and len(again.split(12)) == 12


# Specification


def test_lists_and_numbers() -> None:
    spec = NetworkSpec([1, 8, 8], 3, kernel="conv", steps=4, horizon=[1.0, 2.0], channels=[4, 8])
    assert spec.steps == (4, 4) and spec.horizon == (1.0, 2.0) and spec.shape == (1, 8, 8)
    assert spec.segment_shapes == [(4, 8, 8), (8, 4, 4)]
    assert spec.state_shape(3) == (8, 8, 8) and spec.state_shape(4) == spec.state_shape(8) == (16, 4, 4)
    assert spec.total_steps == 8 and spec.time(2) == 0.25
    assert hash(spec) == hash(NetworkSpec(**spec.__dict__))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dynamics": "verlet"}, r"model\.dynamics=verlet"),
        ({"kernel": "sparse"}, r"model\.kernel=sparse"),
        ({"opening": "wide"}, r"model\.opening=wide.*pad, repeat, linear, conv"),
        ({"opening_normalisation": "layer"}, r"model\.opening_normalisation=layer.*none, batch"),
        ({"connector": "sum"}, r"model\.connector=sum.*pad, linear"),
        ({"head": "max"}, r"model\.head=max.*flatten, pool"),
        ({"initial_velocity": "one"}, r"model\.initial_velocity=one.*zero, paper"),
        ({"steps": [2, 3]}, r"model\.steps has 2 entries and model\.channels 1"),
        (
            {"horizon": [1.0, 1.0, 1.0], "channels": [4, 4]},
            r"model\.horizon has 3 entries and model\.channels 2",
        ),
        ({"channels": []}, r"model\.channels"),
        ({"channels": 0}, r"model\.channels=0"),
        ({"steps": 0}, r"model\.steps=0"),
        ({"kernel": "conv"}, r"model\.kernel=conv needs images.*model\.kernel=dense"),
        ({"opening": "conv"}, r"model\.opening=conv needs model\.kernel=conv"),
        ({"opening": "pad", "channels": 2}, r"model\.opening=pad needs a width.*3.*model\.channels.*2"),
        ({"opening": "repeat", "channels": 2}, r"model\.opening=repeat"),
        ({"channels": [8, 4]}, r"model\.connector=pad cannot narrow 8 channels to 4"),
        (
            {"shape": (1, 3, 3), "kernel": "conv", "channels": [4] * 3},
            r"model\.channels has 3 entries.*3x3.*pool=false",
        ),
        ({"reversible": True, "dynamics": "euler"}, r"model\.reversible=true"),
        ({"reversible": True, "normalisation": "batch"}, r"model\.reversible=true.*normalisation=batch"),
        ({"normalisation": "group", "channels": 6, "groups": 4}, r"model\.groups=4 must divide the width 6"),
    ],
)
def test_impossible_networks_name_their_key(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NetworkSpec(**{"shape": (3,), "classes": 2, "channels": 4, **options})
