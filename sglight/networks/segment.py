"""A segment: N time steps of one dynamics at constant width, its parameters stacked over time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from sglight.compat.torch import is_transformed
from sglight.link import Replicas
from sglight.networks import fused, rebuilt
from sglight.networks.activations import ACTIVATIONS
from sglight.networks.batchnorm import batch_norm
from sglight.networks.dynamics import Dynamics, Step, find_dynamics
from sglight.networks.kernels import KERNELS, arranged
from sglight.networks.precision import autocast_where_faster
from sglight.networks.seeding import draw_seed, normal

Rule = Literal["linear", "constant"]


def choose(options: dict, name: str, key: str):  # type: ignore[no-untyped-def]
    """``options[name]``; raises a ValueError that names the config key and the choices if there is none."""
    if name not in options:
        raise ValueError(f"{key}={name} is unknown; choose one of {', '.join(options)}")
    return options[name]


def prolong(values: Tensor, rule: Rule, following: Tensor | None = None) -> Tensor:
    """Interpolates a parameter in time: values ``[N, ...]`` in, ``[2N, ...]`` out (Haber & Ruthotto 2017, section 5).

    Args:
        values: one row for each time step.
        rule: ``constant`` repeats each row; ``linear`` puts the mean of two neighbours between them.
        following: the row that comes after the last one, if there is one; without it the last row is repeated.

    >>> prolong(torch.tensor([0.0, 2.0]), "linear")
    tensor([0., 1., 2., 2.])
    """
    if rule == "constant":
        between = values
    elif rule == "linear":
        last = values[-1:] if following is None else following[None].to(values)
        between = 0.5 * (values + torch.cat([values[1:], last]))
    else:
        raise ValueError(f"refine: rule={rule} is unknown; choose linear or constant")
    return torch.stack([values, between], 1).flatten(0, 1)


AnyModule = TypeVar("AnyModule", bound=nn.Module)


def keep_frozen(source: nn.Module, target: AnyModule) -> AnyModule:
    """Copies ``requires_grad`` of each parameter in ``source`` to the one of that name in ``target``; returns that."""
    for name, parameter in source.named_parameters():
        target.get_parameter(name).requires_grad_(parameter.requires_grad)
    return target


@dataclass(frozen=True)
class SegmentSpec:
    """The architecture of a segment, without parameters. Names and defaults are those of `Segment`."""

    dynamics: str
    steps: int
    channels: int
    kernel: str = "dense"
    horizon: float = 4.0
    activation: str = "tanh"
    kernel_size: int = 3
    gamma: float = 0.0
    normalisation: str = "none"
    groups: int = 8
    reversible: bool = False
    init: str = "random"
    init_scale: float = 1.0

    def __post_init__(self) -> None:
        dynamics = find_dynamics(self.dynamics)
        choose(KERNELS, self.kernel, "model.kernel")
        choose(ACTIVATIONS, self.activation, "model.activation")
        choose(dict.fromkeys(("none", "batch", "group", "layer")), self.normalisation, "model.normalisation")
        choose(dict.fromkeys(("random", "smooth", "identity", "zeros")), self.init, "model.init")
        if self.steps < 1 or self.channels < 1 or not self.horizon > 0:
            raise ValueError(
                f"model.steps={self.steps}, model.channels={self.channels} and model.horizon={self.horizon} "
                "must be positive"
            )
        if self.kernel == "conv" and self.kernel_size % 2 == 0:
            raise ValueError(
                f"model.kernel_size={self.kernel_size} must be odd, so that the adjoint is exact"
            )
        if self.gamma < 0:
            raise ValueError(f"model.gamma={self.gamma} must not be negative: it would feed energy in")
        if self.normalisation == "group" and self.channels % self.groups:
            raise ValueError(
                f"model.groups={self.groups} must divide the width {self.channels} (model.channels) of each segment"
            )
        if self.reversible and not dynamics.reversible:
            raise ValueError(
                f"model.reversible=true needs a dynamics with an inverse (hamiltonian or leapfrog), not {self.dynamics}"
            )
        if self.reversible and self.normalisation == "batch":
            raise ValueError(
                "model.reversible=true does not go with model.normalisation=batch: running statistics would be "
                "updated twice and the states could not be rebuilt; use group, layer or none"
            )

    @property
    def step_size(self) -> float:
        """h = T / N."""
        return self.horizon / self.steps


class Segment(nn.Module):
    """N time steps of one dynamics: a state ``[B, C, ...]`` or ``[B, 2C, ...]`` (y first) in, the same shape out.

    Its parameters are stacked over time: ``weight [N, C, C]`` or ``[N, C, C, k, k]``, and ``bias [N, C]``.

    Args:
        dynamics: ``euler``, ``antisymmetric``, ``hamiltonian``, ``leapfrog`` or ``package.module.Class`` (see
            `find_dynamics`).
        steps: their number N.
        channels: the width C.
        horizon: T; the step size is h = T / N.
        kernel: ``dense`` on ``[B, C]`` or ``conv`` on ``[B, C, H, W]`` with ``kernel_size`` (odd).
        activation: ``tanh`` or ``relu``.
        gamma: damping of ``antisymmetric``.
        normalisation: of the pre-activation: ``none``, ``batch``, ``group`` (with ``groups``) or ``layer``.
        reversible: rebuild states in the backward pass instead of storing them.
        init: ``random`` (one draw a step), ``smooth`` (one draw for all steps), ``identity`` or ``zeros``.
        seed: of the initial values; drawn from torch's generator if not given.
        index: number of the segment in its network.
        start, stop: which of the N steps are here, if the rest is in another stage; step size and initial values
            are those of the whole segment.

    Attributes:
        plain: whether `forward` is computed by `reference`, see `Stage.plain`.
        replicas: the group over whose samples batch normalisation takes its means.

    Raises:
        ValueError: for a choice that does not exist or does not go with another.

    >>> segment = Segment(dynamics="hamiltonian", steps=4, channels=3, horizon=2.0, seed=0)
    >>> segment.weight.shape, segment.step_size
    (torch.Size([4, 3, 3]), 0.5)
    >>> state = torch.ones(10, 6)  # y and z, three channels each
    >>> torch.allclose(segment.inverse(segment(state)), state, atol=1e-5)
    True
    """

    plain = False
    replicas = Replicas()
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        dynamics: str,
        steps: int,
        channels: int,
        kernel: str = "dense",
        horizon: float = 4.0,
        activation: str = "tanh",
        kernel_size: int = 3,
        gamma: float = 0.0,
        normalisation: str = "none",
        groups: int = 8,
        reversible: bool = False,
        init: str = "random",
        init_scale: float = 1.0,
        *,
        seed: int | None = None,
        index: int = 0,
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        super().__init__()
        self.spec = SegmentSpec(
            dynamics, steps, channels, kernel, horizon, activation, kernel_size, gamma, normalisation, groups,
            reversible, init, init_scale,
        )  # fmt: skip
        self.index, self.start, self.stop = index, start, steps if stop is None else stop
        self.seed = draw_seed() if seed is None else seed
        self.dynamics: Dynamics = find_dynamics(dynamics)
        self.kernel = KERNELS[kernel]
        self.activation = ACTIVATIONS[activation]
        self.step_size = self.spec.step_size
        self.gamma = gamma
        self.weight = nn.Parameter(self._initial_weight())
        self.bias = nn.Parameter(self.weight.new_zeros(self.steps, channels))
        if normalisation != "none":
            shape = (self.steps, self.dynamics.activations, channels)
            self.norm_weight = nn.Parameter(self.weight.new_ones(shape))
            self.norm_bias = nn.Parameter(self.weight.new_zeros(shape))
            if normalisation == "batch":
                self.register_buffer("running_mean", self.weight.new_zeros(shape))
                self.register_buffer("running_var", self.weight.new_ones(shape))

    @property
    def steps(self) -> int:
        """The number of steps that are here."""
        return self.stop - self.start

    @property
    def horizon(self) -> float:
        """The time that the steps cover that are here."""
        return self.step_size * self.steps

    @override
    def extra_repr(self) -> str:
        s = self.spec
        return f"{s.dynamics}, {s.kernel}, steps={self.steps}, channels={s.channels}, h={self.step_size:g}"

    def _initial_weight(self) -> Tensor:
        """Normal weights that keep the scale of a signal (He et al. 2015), from one random stream for each step.

        Taking the antisymmetric part of K halves the variance; a factor sqrt(2) makes up for it.
        """
        s = self.spec
        shape = self.kernel.weight_shape(s.channels, s.kernel_size)
        if s.init == "zeros":
            return torch.zeros(self.steps, *shape)
        if s.init == "identity":
            unit = self.kernel.identity(torch.empty(1, *shape))
            return (s.init_scale * unit).expand(self.steps, *shape).clone()
        fan_in = shape[1] * (s.kernel_size**2 if s.kernel == "conv" else 1)
        std = (
            s.init_scale
            * self.activation.gain
            / fan_in**0.5
            * (2**0.5 if s.dynamics == "antisymmetric" else 1)
        )
        place = ("segments", self.index, "weight")
        if s.init == "smooth":
            return normal(shape, std, self.seed, *place).expand(self.steps, *shape).clone()
        return torch.stack([normal(shape, std, self.seed, *place, j) for j in range(self.start, self.stop)])

    def forward(self, state: Tensor) -> Tensor:
        """The state N steps later. Uses `reference` if ``plain`` is set, under `torch.func` and in an export."""
        with autocast_where_faster(state, self.weight):
            return self._forward(state)

    def _forward(self, state: Tensor) -> Tensor:
        if self.plain or state.is_meta or is_transformed():
            return self.reference(state)
        self._check(state)
        if self._has_fused:
            # For large states the copies that one batched product over all steps needs cost more than it saves.
            frugal = self.spec.reversible or state.numel() >= 1 << 15
            return self._run_fused(state, frugal, self.spec.reversible)
        fields = self._fields(state)
        if self.spec.reversible and torch.is_grad_enabled():
            return self._joined(rebuilt.run(fields, self._stacked(), self._step, self._inverse))
        return self._loop(fields)

    def rebuilt(self, state: Tensor, out: Tensor) -> Tensor:
        """`forward` for an output that is already known: only the backward pass computes; it rebuilds all states.

        Args:
            state: the input, which gets the gradient; its values are not used.
            out: the state N steps later.
        """
        with autocast_where_faster(out, self.weight):
            return self._rebuilt(state, out)

    def _rebuilt(self, state: Tensor, out: Tensor) -> Tensor:
        if self._has_fused:
            return self._run_fused(state, self.spec.reversible or out.numel() >= 1 << 15, True, out)
        known = tuple(field.contiguous() for field in self._fields(out))
        return self._joined(
            rebuilt.run(self._fields(state), self._stacked(), self._step, self._inverse, known)
        )

    def reference(self, state: Tensor) -> Tensor:
        """`forward` as a plain loop over the equations: slower, but autograd can differentiate it more than once."""
        self._check(state)
        return self._loop(self._fields(state))

    def trajectory(self, state: Tensor) -> list[Tensor]:
        """The states before, between and after the steps: N + 1 tensors."""
        self._check(state)
        fields, states = self._fields(state), [state]
        for j, now in enumerate(zip(*(p.unbind(0) for p in self._stacked()), strict=True)):
            fields = self._step(fields, now, j)
            states.append(torch.cat(fields, 1))
        return states

    def step_functions(self) -> list[Callable[[Tensor], Tensor]]:
        """Each time step as a function of its own, from state to state."""
        slices = zip(*(p.unbind(0) for p in self._stacked()), strict=True)
        return [partial(self._whole_step, now, j) for j, now in enumerate(slices)]

    def inverse(self, state: Tensor) -> Tensor:
        """The state N steps earlier.

        Raises:
            ValueError: if the dynamics has no inverse, or with batch normalisation in training mode.
        """
        self._check(state)
        if self.spec.normalisation == "batch" and self.training:
            raise ValueError("a segment with batch normalisation can be inverted in eval() only")
        fields = self._fields(state)
        slices = list(zip(*(p.unbind(0) for p in self._stacked()), strict=True))
        for j in reversed(range(self.steps)):
            fields = self._inverse(fields, slices[j], j)
        return torch.cat(fields, 1)

    def sample(self, j: int, prefix: str = "") -> dict[str, Tensor]:
        """The parameters and buffers of step j, by their names with a prefix."""
        return {f"{prefix}{name}": value[j].clone() for name, value in self.state_dict().items()}

    def refine(self, rule: Rule = "linear", following: Mapping[str, Tensor] | None = None) -> Segment:
        """A new segment with 2N steps of half the size over the same horizon, which approximates the same flow.

        The difference of the outputs goes to zero like h.

        Args:
            rule: ``linear`` interpolation in time, or ``constant`` (each step twice); see `prolong`.
            following: the first step (`sample`) of the part of this segment in the next stage, if there is one.

        >>> Segment("euler", steps=4, channels=3).refine().weight.shape
        torch.Size([8, 3, 3])
        """
        s = self.spec
        fine = Segment(
            **{**s.__dict__, "steps": 2 * s.steps, "init": "zeros"},
            seed=self.seed, index=self.index, start=2 * self.start, stop=2 * self.stop,
        )  # fmt: skip
        fine.spec = SegmentSpec(**{**s.__dict__, "steps": 2 * s.steps})
        fine.to(self.weight.device, self.weight.dtype).train(self.training)
        after = following or {}
        fine.load_state_dict(
            {name: prolong(value, rule, after.get(name)) for name, value in self.state_dict().items()}
        )
        fine.plain = self.plain
        return keep_frozen(self, fine)

    @property
    def _has_fused(self) -> bool:
        return self.spec.normalisation == "none" and self.spec.dynamics in fused.SCHEMES

    def _run_fused(self, state: Tensor, frugal: bool, rebuild: bool, known: Tensor | None = None) -> Tensor:
        scheme = fused.SCHEMES[self.spec.dynamics]
        kernel = self.kernel.frugal if frugal else self.kernel
        setting = fused.Setting(scheme, kernel, self.activation, self.step_size, rebuild)
        stacks = scheme.stacks(self.weight, self.kernel, self.gamma)
        return fused.run(state, self.bias, stacks, setting, known)

    def _check(self, state: Tensor) -> None:
        width = self.dynamics.fields * self.spec.channels
        rank = 2 if self.spec.kernel == "dense" else 4
        if state.ndim != rank or state.shape[1] != width:
            shape = f"[B, {width}]" if rank == 2 else f"[B, {width}, H, W]"
            raise ValueError(
                f"a {self.spec.dynamics} segment of {self.spec.channels} channels takes states {shape}, "
                f"not {list(state.shape)} (model.channels, model.kernel)"
            )

    def _fields(self, state: Tensor) -> tuple[Tensor, ...]:
        # One memory layout wherever the network is cut, for states and gradients.
        return tuple(arranged(field, self.kernel.layout) for field in state.chunk(self.dynamics.fields, 1))

    def _stacked(self) -> tuple[Tensor, ...]:
        maps = (self.kernel.align(w) for w in (self.weight, self.kernel.adjoint(self.weight)))
        norm = () if self.spec.normalisation == "none" else (self.norm_weight, self.norm_bias)
        return *maps, self.bias, *norm

    def _loop(self, fields: tuple[Tensor, ...]) -> Tensor:
        for j, now in enumerate(zip(*(p.unbind(0) for p in self._stacked()), strict=True)):
            fields = self._step(fields, now, j)
        return self._joined(fields)

    def _joined(self, fields: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([arranged(field, self.kernel.layout) for field in fields], 1)

    def _whole_step(self, now: tuple[Tensor, ...], j: int, state: Tensor) -> Tensor:
        return torch.cat(self._step(self._fields(state), now, j), 1)

    def _step(self, fields: tuple[Tensor, ...], now: tuple[Tensor, ...], j: int = 0) -> tuple[Tensor, ...]:
        return self.dynamics.step(fields, self._maps(now, j))

    def _inverse(self, fields: tuple[Tensor, ...], now: tuple[Tensor, ...], j: int = 0) -> tuple[Tensor, ...]:
        return self.dynamics.inverse(fields, self._maps(now, j))

    def _maps(self, now: tuple[Tensor, ...], j: int) -> Step:
        weight, adjoint, bias, *norm = now
        column = bias if self.spec.kernel == "dense" else bias[:, None, None]

        def s(p: Tensor, i: int) -> Tensor:
            p = p + column
            if norm:
                p = self._normalise(p, norm[0][i], norm[1][i], j, i)
            return self.activation.function(p)

        return Step(
            K=lambda x: self.kernel.apply(x, self.kernel.operator(weight), None),
            Kt=lambda x: self.kernel.apply(x, self.kernel.operator(adjoint), None),
            s=s,
            h=self.step_size,
            gamma=self.gamma,
        )

    def _normalise(self, p: Tensor, weight: Tensor, bias: Tensor, j: int, i: int) -> Tensor:
        match self.spec.normalisation:
            case "batch":
                # One value has no variance, and the last batch of an epoch may be one sample.
                training = self.training and p.numel() * self.replicas.size > p.shape[1]
                mean, var = self.running_mean[j, i], self.running_var[j, i]
                return batch_norm(p, mean, var, weight, bias, training, self.replicas)
            case "group":
                return F.group_norm(p, self.spec.groups, weight, bias)
            case _:
                return F.group_norm(p, 1, weight, bias)
