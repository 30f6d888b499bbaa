"""Segments: normalisation, rebuilding, refinement, initial values, errors."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sglight.networks import Segment
from sglight.networks.segment import SegmentSpec, prolong
from tests.networks import reference
from tests.networks.common import (
    DYNAMICS,
    KERNELS,
    REVERSIBLE,
    gradients,
    make_segment,
    make_state,
    relative,
)

NORMS = ("batch", "group", "layer")
each_dynamics = pytest.mark.parametrize("dynamics", DYNAMICS)
each_kernel = pytest.mark.parametrize("kernel", KERNELS)


def norms_of(segment: Segment) -> list[Callable[[Tensor, int], Tensor]]:
    """The segment's normalisations as functions, from its parameters alone."""
    kind = segment.spec.normalisation

    def norm(j: int) -> Callable[[Tensor, int], Tensor]:
        def function(p: Tensor, i: int) -> Tensor:
            weight, bias = segment.norm_weight[j, i], segment.norm_bias[j, i]
            if kind == "batch":
                running = segment.running_mean[j, i].clone(), segment.running_var[j, i].clone()
                return F.batch_norm(p, *running, weight, bias, training=segment.training)
            return F.group_norm(p, segment.spec.groups if kind == "group" else 1, weight, bias)

        return function

    return [norm(j) for j in range(segment.steps)]


def plain(segment: Segment) -> Callable[[Tensor], Tensor]:
    s = segment.spec
    return lambda x: reference.flow(
        s.dynamics,
        x,
        list(segment.weight),
        list(segment.bias),
        segment.step_size,
        s.activation,
        s.gamma,
        norms_of(segment),
    )


@each_dynamics
@each_kernel
@pytest.mark.parametrize("normalisation", NORMS)
@pytest.mark.parametrize("training", [True, False])
def test_normalised_steps(dynamics: str, kernel: str, normalisation: str, training: bool) -> None:
    segment = make_segment(dynamics, kernel, normalisation=normalisation, gamma=0.1).train(training)
    x = make_state(segment, 4)
    parameters = list(segment.parameters())
    assert len(parameters) == 4
    for got, expected in zip(
        gradients(segment, x, parameters), gradients(plain(segment), x, parameters), strict=True
    ):
        # The bias before a batch normalisation has the gradient 0.
        assert relative(got, expected) < 1e-10 or got.norm() < 1e-12


@pytest.mark.parametrize("dynamics", REVERSIBLE)
@each_kernel
@pytest.mark.parametrize("normalisation", ["none", "group", "layer"])
def test_rebuilt_gradients_are_the_stored_ones(dynamics: str, kernel: str, normalisation: str) -> None:
    options = {"normalisation": normalisation, "steps": 20, "horizon": 3.0}
    stored, rebuilt = (make_segment(dynamics, kernel, **options, reversible=r) for r in (False, True))
    x = make_state(stored)
    assert torch.equal(stored(x), rebuilt(x))
    passes = (gradients(s, x, list(s.parameters())) for s in (rebuilt, stored))
    for a, b in zip(*passes, strict=True):
        assert relative(a, b) < 1e-10


def test_batch_statistics_are_kept_per_step_and_activation() -> None:
    segment = make_segment("hamiltonian", normalisation="batch", steps=2)
    x = make_state(segment, 64)
    segment(x)
    y, _ = x.chunk(2, 1)
    p = reference.Kt(segment.weight[0], y) + segment.bias[0]
    torch.testing.assert_close(segment.running_mean[0, 0], 0.1 * p.mean(0).detach())
    assert segment.running_mean.shape == (2, 2, 4)
    assert segment.running_mean.abs().amin() > 0
    segment.eval()
    before = segment.running_mean.clone()
    assert torch.equal(segment(x), segment(x)) and torch.equal(before, segment.running_mean)


def test_train_and_eval_switch_back_and_forth() -> None:
    segment = make_segment("leapfrog", normalisation="batch")
    assert segment.eval() is segment and not segment.training
    assert segment.train() is segment and segment.training


@each_dynamics
@each_kernel
@pytest.mark.parametrize("normalisation", ["none", "layer"])
def test_trajectory_ends_where_the_segment_does(dynamics: str, kernel: str, normalisation: str) -> None:
    segment = make_segment(dynamics, kernel, normalisation=normalisation)
    x = make_state(segment)
    states = segment.trajectory(x)
    assert len(states) == 6 and states[0] is x
    torch.testing.assert_close(states[-1], segment(x))
    torch.testing.assert_close(states[3], plain_prefix(segment, 3)(x))


def plain_prefix(segment: Segment, steps: int) -> Callable[[Tensor], Tensor]:
    norms = None if segment.spec.normalisation == "none" else norms_of(segment)[:steps]
    return lambda x: reference.flow(
        segment.spec.dynamics,
        x,
        list(segment.weight[:steps]),
        list(segment.bias[:steps]),
        segment.step_size,
        norms=norms,
    )


def test_public_names() -> None:
    segment = Segment(
        dynamics="antisymmetric",
        steps=4,
        channels=3,
        kernel="conv",
        horizon=2.0,
        activation="relu",
        gamma=0.1,
    )
    assert segment.weight.shape == (4, 3, 3, 3, 3) and segment.bias.shape == (4, 3)
    assert (segment.step_size, segment.gamma, segment.steps, segment.horizon) == (0.5, 0.1, 4, 2.0)
    assert "antisymmetric" in repr(segment)


def test_names_in_a_checkpoint() -> None:
    plain_names = ["weight", "bias"]
    norm_names = [*plain_names, "norm_weight", "norm_bias"]
    names = {
        "none": plain_names, "layer": norm_names, "group": norm_names,
        "batch": [*norm_names, "running_mean", "running_var"],
    }  # fmt: skip
    for normalisation, expected in names.items():
        assert list(make_segment("euler", normalisation=normalisation).state_dict()) == expected


# Refinement


def smooth(segment: Segment) -> Segment:
    """Every parameter a smooth function of time, the same at any number of steps."""
    t = (torch.arange(segment.steps, dtype=torch.float64) + 0.0) / segment.steps
    draw = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in segment.named_parameters():
            a, b = torch.randn(2, *parameter.shape[1:], generator=draw, dtype=torch.float64)
            wave = torch.cos(3 * t).view(-1, *[1] * a.ndim)
            parameter[:] = (1.0 if name == "norm_weight" else 0.0) + 0.4 * (
                a * wave + b * (1 - t.view(wave.shape))
            )
    return segment


def slope(h: list[float], error: list[float]) -> float:
    """Of log error against log h, by regression."""
    x, y = torch.tensor([h, error], dtype=torch.float64).log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


@each_dynamics
@pytest.mark.parametrize("rule", ["linear", "constant"])
@pytest.mark.parametrize("normalisation", ["none", "layer"])
def test_the_refined_segment_approximates_the_same_flow(dynamics: str, rule: str, normalisation: str) -> None:
    """The difference of the outputs falls like h."""
    steps, errors = (8, 16, 32, 64, 128), []
    for n in steps:
        coarse = smooth(make_segment(dynamics, steps=n, horizon=1.5, normalisation=normalisation))
        fine = coarse.refine(rule)
        x = make_state(coarse)
        if dynamics == "leapfrog":
            # At rest: the state holds the position one step before.
            x = torch.cat([x.chunk(2, 1)[0]] * 2, 1)
        assert fine.steps == 2 * n and fine.step_size == coarse.step_size / 2
        y = slice(0, coarse.spec.channels)
        errors.append(float((fine(x) - coarse(x))[:, y].detach().norm()))
    assert slope([1 / n for n in steps], errors) == pytest.approx(1, abs=0.2)


@each_kernel
@pytest.mark.parametrize("rule", ["linear", "constant"])
def test_prolongation_of_everything(kernel: str, rule: str) -> None:
    """Statistics and affine terms of the norm as well; nothing random, nothing piled up at the front."""
    coarse = make_segment("hamiltonian", kernel, normalisation="batch", steps=3).eval()
    coarse.running_mean.normal_()
    coarse.running_var.uniform_(1, 2)
    fine = coarse.refine(rule)
    assert not fine.training and fine.weight.dtype == torch.float64
    for name, value in coarse.state_dict().items():
        got = fine.state_dict()[name]
        assert torch.equal(got[::2], value), name
        between = value if rule == "constant" else (value + torch.cat([value[1:], value[-1:]])) / 2
        assert torch.equal(got[1::2], between), name
    assert fine.spec.init == coarse.spec.init and fine.seed == coarse.seed
    fine.weight.data.zero_()
    assert coarse.weight.abs().sum() > 0


def test_prolong_with_what_follows() -> None:
    values = torch.tensor([[1.0], [3.0]])
    assert prolong(values, "linear").flatten().tolist() == [1, 2, 3, 3]
    assert prolong(values, "linear", torch.tensor([7.0])).flatten().tolist() == [1, 2, 3, 5]
    assert prolong(values, "constant").flatten().tolist() == [1, 1, 3, 3]
    with pytest.raises(ValueError, match=r"rule=cubic.*linear or constant"):
        prolong(values, "cubic")


@pytest.mark.parametrize("rule", ["linear", "constant"])
def test_refining_the_shares_is_refining_the_whole(rule: str) -> None:
    whole = make_segment("euler", steps=6, normalisation="layer")
    shares = [Segment(**whole.spec.__dict__, seed=3, start=a, stop=b).double() for a, b in ((0, 2), (2, 6))]
    for share in shares:
        share.load_state_dict({k: v[share.start : share.stop] for k, v in whole.state_dict().items()})
    fine = [shares[0].refine(rule, shares[1].sample(0)), shares[1].refine(rule)]
    assert [(f.start, f.stop) for f in fine] == [(0, 4), (4, 12)]
    for name, value in whole.refine(rule).state_dict().items():
        assert torch.equal(torch.cat([f.state_dict()[name] for f in fine]), value)


# Initial values


@each_dynamics
@each_kernel
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_random_weights_keep_the_scale(dynamics: str, kernel: str, activation: str) -> None:
    """K x has the size of x (times sqrt 2 for relu); the antisymmetric part 1/2 (K - K^T) too."""
    segment = Segment(dynamics, 2, 64, kernel, activation=activation, seed=1).double()
    weight = segment.weight[0].detach()
    x = make_state(segment, 4, (16, 16))[:, :64]
    mapped = reference.K(weight, x)
    if dynamics == "antisymmetric":
        mapped = 0.5 * (mapped - reference.Kt(weight, x))
    gain = math.sqrt(2) if activation == "relu" else 1
    assert float(mapped.norm() / x.norm()) == pytest.approx(gain, rel=0.2)
    assert segment.bias.abs().sum() == 0


def test_kinds_of_initial_weights() -> None:
    def weight(init: str, scale: float = 1.0, kernel: str = "dense") -> Tensor:
        return Segment("euler", 3, 4, kernel, init=init, init_scale=scale, seed=1).weight.detach()

    assert not torch.equal(weight("random")[0], weight("random")[1])
    assert torch.equal(weight("smooth")[0], weight("smooth")[2]) and weight("smooth").abs().sum() > 0
    assert torch.equal(weight("identity", -0.01), -0.01 * torch.eye(4).expand(3, 4, 4))
    assert torch.equal(weight("identity", kernel="conv")[..., 1, 1], torch.eye(4).expand(3, 4, 4))
    assert weight("identity", kernel="conv").sum() == 12
    assert weight("zeros").abs().sum() == 0
    torch.testing.assert_close(weight("random", 0.5), 0.5 * weight("random"))


def test_a_share_has_the_wholes_initial_values() -> None:
    for init in ("random", "smooth", "identity", "zeros"):
        whole = Segment("hamiltonian", 6, 4, init=init, seed=8, horizon=3.0)
        share = Segment("hamiltonian", 6, 4, init=init, seed=8, horizon=3.0, start=2, stop=5)
        assert torch.equal(share.weight, whole.weight[2:5])
        assert (share.steps, share.step_size, share.horizon) == (3, 0.5, 1.5)


def test_without_a_seed_torchs_generator_decides() -> None:
    torch.manual_seed(5)
    a, b = Segment("euler", 2, 3), Segment("euler", 2, 3)
    torch.manual_seed(5)
    c = Segment("euler", 2, 3)
    assert torch.equal(a.weight, c.weight) and not torch.equal(a.weight, b.weight)


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dynamics": "verlet"}, r"model\.dynamics=verlet is unknown; choose one of euler, antisymmetric"),
        ({"kernel": "sparse"}, r"model\.kernel=sparse.*dense, conv"),
        ({"activation": "gelu"}, r"model\.activation=gelu.*tanh, relu"),
        ({"normalisation": "instance"}, r"model\.normalisation=instance.*none, batch, group, layer"),
        ({"init": "ones"}, r"model\.init=ones.*random, smooth, identity, zeros"),
        ({"steps": 0}, r"model\.steps=0"),
        ({"channels": 0}, r"model\.channels=0"),
        ({"horizon": 0.0}, r"model\.horizon=0.0"),
        ({"horizon": math.nan}, r"model\.horizon=nan"),
        ({"kernel": "conv", "kernel_size": 4}, r"model\.kernel_size=4 must be odd"),
        ({"gamma": -0.1}, r"model\.gamma=-0.1 must not be negative"),
        ({"normalisation": "group", "groups": 3}, r"model\.groups=3 must divide the width 4"),
        ({"reversible": True}, r"model\.reversible=true needs.*hamiltonian or leapfrog\), not euler"),
        (
            {"dynamics": "hamiltonian", "reversible": True, "normalisation": "batch"},
            r"model\.reversible=true does not go with model\.normalisation=batch",
        ),
    ],
)
def test_impossible_choices_name_their_key(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Segment(**{"dynamics": "euler", "steps": 2, "channels": 4, **options})
    with pytest.raises(ValueError, match=message):
        SegmentSpec(**{"dynamics": "euler", "steps": 2, "channels": 4, **options})


@pytest.mark.parametrize("method", ["forward", "reference", "trajectory", "inverse"])
def test_states_that_do_not_fit(method: str) -> None:
    segment = Segment("hamiltonian", 2, 4)
    with pytest.raises(ValueError, match=r"takes states \[B, 8\], not \[3, 4\].*model\.channels"):
        getattr(segment, method)(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"\[B, 8, H, W\], not \[3, 8\]"):
        getattr(Segment("hamiltonian", 2, 4, "conv"), method)(torch.zeros(3, 8))
