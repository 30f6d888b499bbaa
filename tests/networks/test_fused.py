"""The hand-written passes against a plain loop through autograd, for every dynamics, kernel and activation."""

from __future__ import annotations

import pytest
import torch

from sglight.networks import Segment, precision
from tests.networks import reference
from tests.networks.common import (
    DYNAMICS,
    KERNELS,
    REVERSIBLE,
    Living,
    gradients,
    make_segment,
    make_state,
    relative,
    saved_bytes,
)

ACTIVATIONS = ("tanh", "relu")
each_dynamics = pytest.mark.parametrize("dynamics", DYNAMICS)
each_kernel = pytest.mark.parametrize("kernel", KERNELS)
each_reversible = pytest.mark.parametrize("dynamics", REVERSIBLE)


def plain(segment: Segment, norms=None):
    """The segment by the equations alone."""
    s = segment.spec
    return lambda x: reference.flow(
        s.dynamics,
        x,
        list(segment.weight),
        list(segment.bias),
        segment.step_size,
        s.activation,
        s.gamma,
        norms,
    )


def assert_same_passes(segment: Segment, x: torch.Tensor, run=None, tolerance: float = 1e-12) -> None:
    """Outputs and gradients of ``run`` (or of the segment) are those of the equations."""
    run = run or segment
    parameters = [segment.weight, segment.bias]
    assert relative(run(x), plain(segment)(x)) < tolerance
    for got, expected in zip(
        gradients(run, x, parameters), gradients(plain(segment), x, parameters), strict=True
    ):
        assert got.shape == expected.shape
        assert relative(got, expected) < tolerance


@each_dynamics
@each_kernel
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_stored(dynamics: str, kernel: str, activation: str, gamma: float) -> None:
    segment = make_segment(dynamics, kernel, activation=activation, gamma=gamma)
    assert_same_passes(segment, make_state(segment))


@each_reversible
@each_kernel
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_rebuilt(dynamics: str, kernel: str, activation: str) -> None:
    segment = make_segment(dynamics, kernel, activation=activation, reversible=True)
    assert_same_passes(segment, make_state(segment), tolerance=1e-10)


@each_dynamics
@each_kernel
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_loop_through_autograd(dynamics: str, kernel: str, activation: str) -> None:
    segment = make_segment(dynamics, kernel, activation=activation, gamma=0.2)
    assert_same_passes(segment, make_state(segment), segment.reference)


@each_dynamics
@each_kernel
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_small_and_odd(dynamics: str, kernel: str, size: int, width: int, batch: int) -> None:
    segment = make_segment(dynamics, kernel, kernel_size=size, channels=width, steps=2, gamma=0.1)
    assert_same_passes(segment, make_state(segment, batch, (3, 1)))


@each_dynamics
@each_kernel
@pytest.mark.parametrize("reversible", [False, True])
def test_gradcheck(dynamics: str, kernel: str, reversible: bool) -> None:
    if reversible and dynamics not in REVERSIBLE:
        pytest.skip("has no inverse")
    segment = make_segment(dynamics, kernel, steps=2, channels=2, gamma=0.1, reversible=reversible)
    x = make_state(segment, 2, (3, 2)).requires_grad_()

    def run(x, weight, bias):
        values = {"weight": weight, "bias": bias}
        return torch.func.functional_call(segment, values, x)

    assert torch.autograd.gradcheck(run, (x, segment.weight, segment.bias))


@each_dynamics
@each_kernel
def test_layout_of_the_state_does_not_matter(dynamics: str, kernel: str) -> None:
    segment = make_segment(dynamics, kernel).float()
    x = make_state(segment)
    buffer = torch.empty(x.numel() + 1)
    views = [x.mT.contiguous().mT, buffer[1:].view(x.shape).copy_(x)]
    if x.ndim == 4:
        views.append(x.contiguous(memory_format=torch.channels_last))
    for view in views:
        assert torch.equal(segment(view), segment(x))
        for a, b in zip(
            gradients(segment, view, [segment.weight]), gradients(segment, x, [segment.weight]), strict=True
        ):
            assert torch.equal(a, b)


@each_dynamics
@each_kernel
@pytest.mark.parametrize("batch", [1, 3])
def test_inputs_are_left_alone(dynamics: str, kernel: str, batch: int) -> None:
    segment = make_segment(dynamics, kernel, steps=2, channels=16).float()
    x = make_state(segment, batch).requires_grad_()
    before = [t.detach().clone() for t in (x, segment.weight, segment.bias)]
    out = segment(x)
    upstream = torch.ones_like(out)
    kept = out.detach().clone()
    out.backward(upstream)
    for now, then in zip(
        (x, segment.weight, segment.bias, upstream, out), (*before, torch.ones_like(out), kept), strict=True
    ):
        assert torch.equal(now, then)


@each_dynamics
def test_backward_twice_over_one_graph(dynamics: str) -> None:
    segment = make_segment(dynamics)
    out = segment(make_state(segment)).square().sum()
    first = torch.autograd.grad(out, segment.weight, retain_graph=True)[0].clone()
    assert torch.equal(first, torch.autograd.grad(out, segment.weight)[0])


@each_dynamics
def test_second_derivatives_are_refused_by_the_fused_pass_and_given_by_the_loop(dynamics: str) -> None:
    segment = make_segment(dynamics)
    x = make_state(segment).requires_grad_()
    (slope,) = torch.autograd.grad(segment(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"plain\(\)"):
        slope.sum().backward()
    (slope,) = torch.autograd.grad(segment.reference(x).square().sum(), x, create_graph=True)
    slope.sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


@each_dynamics
@each_kernel
def test_without_gradients_the_same(dynamics: str, kernel: str) -> None:
    segment = make_segment(dynamics, kernel).float()
    x = make_state(segment)
    with torch.no_grad():
        quiet = segment(x)
    assert torch.equal(quiet, segment(x)) and not quiet.requires_grad


@each_dynamics
@each_kernel
def test_large_states_take_the_fast_tanh(dynamics: str, kernel: str) -> None:
    segment = make_segment(dynamics, kernel, channels=16, steps=3).float()
    x = make_state(segment, 1100 if kernel == "dense" else 8, (12, 12))
    run = plain(segment)
    assert relative(segment(x), run(x)) < 1e-6
    parameters = [segment.weight, segment.bias]
    for got, expected in zip(gradients(segment, x, parameters), gradients(run, x, parameters), strict=True):
        assert relative(got, expected) < 1e-5


@pytest.fixture
def bf16_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were faster whatever the processor and the size."""
    monkeypatch.setattr(precision, "WORK_FOR_BF16", 0)
    monkeypatch.setattr(precision, "has_bf16_units", lambda: True)


@pytest.mark.usefixtures("bf16_everywhere")
@each_dynamics
@each_kernel
@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bf16_of_large_states(dynamics: str, kernel: str, reversible: bool, activation: str) -> None:
    if reversible and dynamics not in REVERSIBLE:
        pytest.skip("has no inverse")
    options = {"reversible": reversible, "channels": 16, "steps": 3, "activation": activation}
    segment = make_segment(dynamics, kernel, **options).float()
    x = make_state(segment, 1100 if kernel == "dense" else 8, (12, 12))

    def mixed(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return segment(x)

    with torch.no_grad():
        evaluated = mixed(x)
    assert torch.equal(evaluated, mixed(x))
    assert 0 < relative(evaluated, segment(x)) < 5e-3
    parameters = [segment.weight, segment.bias]
    for got, expected in zip(gradients(mixed, x, parameters), gradients(segment, x, parameters), strict=True):
        assert relative(got, expected) < 0.06  # with relu some slopes are of the other side


@pytest.mark.usefixtures("bf16_everywhere")
@each_dynamics
@each_kernel
@pytest.mark.parametrize("normalisation", ["none", "layer"])
@pytest.mark.parametrize("reversible", [False, True])
def test_bf16_autocast(dynamics: str, kernel: str, normalisation: str, reversible: bool) -> None:
    if reversible and dynamics not in REVERSIBLE:
        pytest.skip("has no inverse")
    options = {"normalisation": normalisation, "reversible": reversible, "steps": 4}
    segment = make_segment(dynamics, kernel, **options).float()
    x = make_state(segment, 16)

    def mixed(x):
        with torch.autocast("cpu", torch.bfloat16):
            return segment(x)

    assert mixed(x).dtype == torch.float32
    assert 0 < relative(mixed(x), segment(x)) < 0.02
    parameters = list(segment.parameters())
    for got, expected in zip(gradients(mixed, x, parameters), gradients(segment, x, parameters), strict=True):
        assert got.dtype == torch.float32
        assert relative(got, expected) < 0.1


@pytest.mark.usefixtures("bf16_everywhere")
@each_reversible
@pytest.mark.parametrize("normalisation", ["none", "group"])
def test_rebuilding_repeats_the_precision_of_the_forward_pass(dynamics: str, normalisation: str) -> None:
    options = {"normalisation": normalisation, "steps": 30, "channels": 8, "horizon": 3.0}
    stored = make_segment(dynamics, **options).float()
    rebuilt = make_segment(dynamics, **options, reversible=True).float()
    x = make_state(stored, 16)

    def mixed(segment):
        def run(x):
            with torch.autocast("cpu", torch.bfloat16):
                return segment(x)

        return gradients(run, x, list(segment.parameters()))

    for a, b in zip(mixed(rebuilt), mixed(stored), strict=True):
        assert relative(a, b) < 5e-3


@each_reversible
@each_kernel
@pytest.mark.parametrize("normalisation", ["none", "layer"])
def test_stored_bytes_grow_with_the_steps_and_rebuilt_bytes_do_not(
    dynamics: str, kernel: str, normalisation: str
) -> None:
    def kept(steps: int, reversible: bool) -> int:
        options = {"steps": steps, "reversible": reversible, "normalisation": normalisation}
        segment = make_segment(dynamics, kernel, channels=2, groups=1, **options)
        # Parameters and what is derived from them grow with N on either side.
        own = 4 * sum(p.numel() * p.element_size() for p in segment.parameters()) + 3 * 64 * steps
        return saved_bytes(lambda: segment(make_state(segment, 256).requires_grad_())) - own

    state = make_state(make_segment(dynamics, kernel, channels=2, groups=1), 256)
    size = state.numel() * state.element_size()
    assert kept(32, True) <= 1.1 * size
    growth = (kept(32, False) - kept(16, False)) / 16
    assert growth >= 0.9 * size
    assert kept(64, False) - kept(32, False) == pytest.approx(32 * growth, rel=0.1)


@each_reversible
@each_kernel
@pytest.mark.parametrize("normalisation", ["none", "layer"])
def test_peak_of_both_passes_does_not_grow_when_rebuilt(
    dynamics: str, kernel: str, normalisation: str
) -> None:
    def peak(steps: int, reversible: bool) -> int:
        options = {"steps": steps, "reversible": reversible, "normalisation": normalisation}
        segment = make_segment(dynamics, kernel, channels=2, groups=1, **options)
        x = make_state(segment, 256).requires_grad_()
        with Living() as living:
            segment(x).sum().backward()
        return living.peak

    segment = make_segment(dynamics, kernel, channels=2, groups=1)
    state = make_state(segment, 256)
    size = state.numel() * state.element_size()
    assert peak(48, True) - peak(16, True) < 3 * size
    assert peak(48, False) - peak(16, False) > 30 * size
