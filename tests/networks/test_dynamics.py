"""Properties of the dynamics: reversal, stability over many steps, order."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from sglight.networks import Segment, StableNet
from sglight.networks.dynamics import DYNAMICS, Step
from tests.networks.common import KERNELS, REVERSIBLE, make_segment, make_state, relative

STABLE = ("antisymmetric", "hamiltonian")


def matrix_step(h: float = 0.5) -> tuple[torch.Tensor, Step]:
    weight = torch.tensor([[1.0, 2.0], [-3.0, 0.5]], dtype=torch.float64)
    return weight, Step(
        K=lambda x: x @ weight.T, Kt=lambda x: x @ weight, s=lambda p, i: torch.tanh(p), h=h, gamma=0.4
    )


def test_the_registry_says_what_a_step_is_made_of() -> None:
    facts = {name: (d.fields, d.activations, d.maps, d.reversible) for name, d in DYNAMICS.items()}
    assert facts == {
        "euler": (1, 1, 1, False),
        "antisymmetric": (1, 1, 1, False),
        "hamiltonian": (2, 2, 2, True),
        "leapfrog": (2, 1, 2, True),
    }


def test_one_step_by_hand() -> None:
    """Numbers worked out from the equations; the adjoint is used where K^T stands, not K twice."""
    _, f = matrix_step()
    y, z = torch.tensor([[0.1, -0.2]], dtype=torch.float64), torch.tensor([[0.3, 0.0]], dtype=torch.float64)
    t = math.tanh
    (euler,) = DYNAMICS["euler"].step((y,), f)
    assert euler.tolist()[0] == pytest.approx([0.1 + 0.5 * t(0.1 - 0.4), -0.2 + 0.5 * t(-0.3 - 0.1)])
    # K - K^T = [[0, 5], [-5, 0]]
    (anti,) = DYNAMICS["antisymmetric"].step((y,), f)
    p = (0.5 * (5 * -0.2 - 0.4 * 0.1), 0.5 * (-5 * 0.1 - 0.4 * -0.2))
    assert anti.tolist()[0] == pytest.approx([0.1 + 0.5 * t(p[0]), -0.2 + 0.5 * t(p[1])])
    # K^T y = (0.1 + 0.6, 0.2 - 0.1)
    y1, z1 = DYNAMICS["hamiltonian"].step((y, z), f)
    z_hand = (0.3 - 0.5 * t(0.7), 0.0 - 0.5 * t(0.1))
    assert z1.tolist()[0] == pytest.approx(z_hand)
    k_z = (z_hand[0] + 2 * z_hand[1], -3 * z_hand[0] + 0.5 * z_hand[1])
    assert y1.tolist()[0] == pytest.approx([0.1 + 0.5 * t(k_z[0]), -0.2 + 0.5 * t(k_z[1])])
    # K y = (-0.3, -0.4); K^T K y = (-0.3 + 1.2, -0.6 - 0.2)
    y1, previous = DYNAMICS["leapfrog"].step((y, z), f)
    expected = [2 * 0.1 - 0.3 + 0.25 * t(-0.9), 2 * -0.2 - 0.0 + 0.25 * t(0.8)]
    assert y1.tolist()[0] == pytest.approx(expected) and torch.equal(previous, y)


@pytest.mark.parametrize("name", ["euler", "antisymmetric"])
def test_no_inverse_is_said(name: str) -> None:
    with pytest.raises(ValueError, match=rf"'{name}' has no inverse.*model=hamiltonian"):
        DYNAMICS[name].inverse((torch.zeros(1, 2),), matrix_step()[1])


@pytest.mark.parametrize("dynamics", REVERSIBLE)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("normalisation", ["none", "group", "layer"])
def test_reversal_over_100_steps(dynamics: str, kernel: str, normalisation: str) -> None:
    segment = make_segment(dynamics, kernel, steps=100, horizon=5.0, normalisation=normalisation)
    x = make_state(segment, size=(3, 4))
    with torch.no_grad():
        assert relative(segment.inverse(segment(x)), x) < 1e-10


@pytest.mark.parametrize("dynamics", REVERSIBLE)
def test_reversal_with_batch_statistics_in_eval(dynamics: str) -> None:
    segment = make_segment(dynamics, normalisation="batch")
    x = make_state(segment)
    with pytest.raises(ValueError, match="eval"):
        segment.inverse(x)
    segment.eval()
    assert relative(segment.inverse(segment(x)), x) < 1e-12


def ratios(segment: Segment, dtype: torch.dtype = torch.float64) -> tuple[float, float]:
    """How much a state grows on its way through, and its gradient on the way back."""
    segment = segment.to(dtype)
    x = make_state(segment, 8).to(dtype).requires_grad_()
    out = segment(x)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=dtype)
    (back,) = torch.autograd.grad(out, x, g)
    return float(out.norm() / x.norm()), float(back.norm() / g.norm())


@pytest.mark.parametrize("dynamics", STABLE)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_thousand_stable_steps_neither_vanish_nor_explode(dynamics: str, kernel: str) -> None:
    segment = Segment(dynamics, 1000, 4, kernel, horizon=10.0, init="smooth", seed=1)
    growth, back = ratios(segment)
    assert 0.1 < growth < 10 and 0.1 < back < 10


@pytest.mark.parametrize(("sign", "explodes"), [(-1.0, False), (1.0, True)])
def test_a_thousand_plain_steps_vanish_or_explode(sign: float, explodes: bool) -> None:
    """y' = relu(c y) grows like exp(c t); y' = tanh(-c y) decays like exp(-c t)."""
    segment = Segment(
        "euler", 1000, 4, horizon=10.0, init="identity", init_scale=2.0 * sign,
        activation="relu" if explodes else "tanh", seed=1,
    )  # fmt: skip
    growth, back = ratios(segment)
    assert (growth > 1e3 and back > 1e3) if explodes else (growth < 1e-3 and back < 1e-3)


def test_the_scale_of_gradients_does_not_depend_on_the_depth() -> None:
    """At fixed horizon more steps approximate one flow: its Jacobian, not a power of it."""
    backs = [
        ratios(Segment("hamiltonian", n, 8, horizon=4.0, init="smooth", seed=1))[1] for n in (50, 200, 800)
    ]
    assert max(backs) / min(backs) < 1.1


def energy_drift(h: float, gamma: float = 0.0) -> float:
    """Relative change of ||y|| under y' = A y, A antisymmetric, small enough that tanh is linear."""
    segment = Segment("antisymmetric", round(2 / h), 2, horizon=2.0, init="zeros", gamma=gamma).double()
    with torch.no_grad():
        segment.weight[:] = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    x = 1e-6 * torch.ones(1, 2, dtype=torch.float64)
    return float(segment(x).norm() / x.norm()) - 1


def test_antisymmetric_steps_keep_the_energy_to_first_order_and_damping_takes_it() -> None:
    coarse, fine = energy_drift(0.1), energy_drift(0.05)
    assert 0 < fine < coarse and coarse / fine == pytest.approx(2, rel=0.1)
    # y' = (A - g/2 I) y has norm exp(-g t / 2).
    assert energy_drift(0.001, gamma=0.5) == pytest.approx(math.exp(-0.5) - 1, abs=2e-3)


@pytest.mark.parametrize(("dynamics", "order"), [("euler", 1), ("hamiltonian", 1), ("leapfrog", 2)])
def test_order_of_convergence(dynamics: str, order: int) -> None:
    """Against a hundred times finer steps of the same flow (the start y_prev = y of leapfrog is of first order,
    so it is given here as y(-h) = y(h), for zero velocity)."""

    def end(steps: int) -> torch.Tensor:
        segment = Segment(dynamics, steps, 2, horizon=1.0, init="smooth", seed=4).double()
        y = torch.tensor([[0.5, -0.3], [1.0, 0.8]], dtype=torch.float64)
        if dynamics == "euler":
            return segment(y)
        if dynamics == "hamiltonian":
            return segment(torch.cat([y, torch.zeros_like(y)], 1))[:, :2]
        w, h = segment.weight[0], segment.step_size
        before = y + 0.5 * h**2 * torch.tanh(-(y @ w.T) @ w)
        return segment(torch.cat([y, before], 1))[:, :2]

    with torch.no_grad():
        exact, steps = end(6400), (8, 16, 32, 64)
        errors = [float((end(n) - exact).norm()) for n in steps]
    slope = torch.linalg.lstsq(
        torch.tensor([[math.log(1 / n), 1.0] for n in steps]), torch.tensor([[math.log(e)] for e in errors])
    ).solution[0, 0]
    assert float(slope) == pytest.approx(order, abs=0.15)


def leapfrog_features(velocity: str, steps: int) -> float:
    net = StableNet(
        (4,), 2, dynamics="leapfrog", steps=steps, channels=4, horizon=5.0, opening="pad",
        initial_velocity=velocity, init="smooth", seed=1,
    )  # fmt: skip
    x = make_state(net.segments["0"])[:, :4]
    with torch.no_grad():
        return float(net.trajectory(x)[-1][:, :4].norm() / x.norm())


def test_leapfrog_from_zero_velocity_is_bounded_and_from_the_papers_start_grows_linearly() -> None:
    assert max(leapfrog_features("zero", n) for n in (64, 256, 1024)) < 10
    small, large = leapfrog_features("paper", 64), leapfrog_features("paper", 1024)
    assert large / small == pytest.approx(16, rel=0.2)


def test_starts() -> None:
    y = torch.randn(2, 3)
    assert torch.equal(DYNAMICS["hamiltonian"].start(y)[1], torch.zeros(2, 3))
    assert torch.equal(DYNAMICS["leapfrog"].start(y)[1], y)
    assert torch.equal(DYNAMICS["leapfrog"].start(y, "paper")[1], torch.zeros(2, 3))
    assert len(DYNAMICS["euler"].start(y)) == 1


@pytest.mark.parametrize("dynamics", list(DYNAMICS))
def test_states_and_gradients_in_the_middle_keep_their_meaning_when_steps_are_halved(dynamics: str) -> None:
    """Written for the coarsest step size they converge under refinement, though leapfrog's hold differences over h."""
    net = StableNet(
        (6,), 3, dynamics=dynamics, steps=8, channels=8, horizon=2.0, init="smooth", seed=3
    ).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (20,), generator=generator)
    rule, found = net.spec.rule, list[tuple[torch.Tensor, torch.Tensor]]()
    for level in range(4):
        first, second = net.split(2)
        state = first(x).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(second(state), y), state)
        fields = (t.detach().chunk(rule.fields, 1) for t in (state, gradient))
        ratio = 2.0**level
        found.append(
            (
                torch.cat(rule.restepped(next(fields), ratio), 1),
                torch.cat(rule.restepped_gradient(next(fields), ratio), 1),
            )
        )
        net = net.refine()
    for kind in range(2):
        changes = [float((b[kind] - a[kind]).norm() / a[kind].norm()) for a, b in pairwise(found)]
        assert changes[0] < 0.1
        assert all(1.6 < a / b < 2.4 for a, b in pairwise(changes)), changes


@pytest.mark.parametrize("dynamics", list(DYNAMICS))
def test_restepped_gradients_are_the_adjoint(dynamics: str) -> None:
    """d f(restepped(s)) / ds by autograd, undone."""
    rule = DYNAMICS[dynamics]
    state = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(rule.fields)]
    other = [torch.randn(2, 3, dtype=torch.float64) for _ in range(rule.fields)]
    changed = rule.restepped(tuple(state), 4.0)
    value = sum((c * o).sum() for c, o in zip(changed, other, strict=True))
    assert isinstance(value, torch.Tensor)
    gradient = torch.autograd.grad(value, state)
    for found, expected in zip(rule.restepped_gradient(gradient, 4.0), other, strict=True):
        torch.testing.assert_close(found, expected)
