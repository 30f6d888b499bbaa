"""One time step of each dynamics, written as its equation, and the inverse where there is one.

A state is a tuple of one or two tensors (its fields), y first. The linear map K, its adjoint K^T and the activation
are passed in as a `Step`, so that the same equation serves dense and convolutional networks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from sglight.config.extension import load_class

State = tuple[Tensor, ...]


@dataclass(frozen=True)
class Step:
    """The pieces from which the equation of one time step is composed.

    Attributes:
        K: the linear map y -> K y.
        Kt: its adjoint, <K x, y> = <x, Kt y>.
        s: (p, i) -> s(p + b), with normalisation if the network has any; i counts the activations within the step.
        h: the step size T / N.
        gamma: damping g of the antisymmetric dynamics.
    """

    K: Callable[[Tensor], Tensor]
    Kt: Callable[[Tensor], Tensor]
    s: Callable[[Tensor, int], Tensor]
    h: float
    gamma: float = 0.0


class Dynamics(ABC):
    """The rule of one time step. Subclass it and write `step` (and `inverse`, if there is one) for your own.

    Attributes:
        fields: number of tensors in a state.
        activations: number of activations in a step.
        maps: number of linear maps that a step applies (for the cost model).
        reversible: whether `inverse` exists.

    >>> import torch
    >>> rule = find_dynamics("euler")
    >>> double = Step(K=lambda y: 2 * y, Kt=lambda y: 2 * y, s=lambda p, i: p, h=0.5)
    >>> rule.step((torch.ones(3),), double)  # y + h s(K y)
    (tensor([2., 2., 2.]),)
    """

    fields: ClassVar[int] = 1
    activations: ClassVar[int] = 1
    maps: ClassVar[int] = 1
    reversible: ClassVar[bool] = False

    @abstractmethod
    def step(self, state: State, f: Step) -> State:
        """The state one step later."""

    def inverse(self, state: State, f: Step) -> State:
        """The state one step earlier.

        Raises:
            ValueError: if the dynamics has no inverse.
        """
        raise ValueError(
            f"the dynamics '{type(self).__name__.lower()}' has no inverse; "
            "choose model=hamiltonian or model=leapfrog"
        )

    def to_phase(self, state: State, h: float) -> State:
        """The state as position and velocity: coordinates whose norms can be compared between step sizes."""
        return state

    def from_phase(self, phase: State, h: float) -> State:
        """The state with the given position and velocity: the inverse of `to_phase`."""
        return phase

    def start(self, y: Tensor, initial_velocity: str = "zero") -> State:
        """The state before the first step, from the output y of the opening."""
        return (y,)

    def restepped(self, state: State, factor: float) -> State:
        """The state of the same trajectory for a step size ``factor`` times as large, up to O(h^2)."""
        return state

    def restepped_gradient(self, gradient: State, factor: float) -> State:
        """Maps dL/d(state) to dL/d(`restepped` state)."""
        return gradient


class Euler(Dynamics):
    """y+ = y + h s(K y + b): forward Euler, a residual network (Haber & Ruthotto 2017, eq. 2.1)."""

    @override
    def step(self, state: State, f: Step) -> State:
        (y,) = state
        return (y + f.h * f.s(f.K(y), 0),)


class Antisymmetric(Dynamics):
    """y+ = y + h s( 1/2 (K - K^T - g I) y + b ), g >= 0 (Haber & Ruthotto 2017, section 4.1)."""

    @override
    def step(self, state: State, f: Step) -> State:
        (y,) = state
        return (y + f.h * f.s(0.5 * (f.K(y) - f.Kt(y) - f.gamma * y), 0),)


class Hamiltonian(Dynamics):
    """z+ = z - h s(K^T y + b); y+ = y + h s(K z+ + b): Verlet, z starts at 0 (Haber & Ruthotto 2017, section 4.2)."""

    fields = 2
    activations = 2
    maps = 2
    reversible = True

    @override
    def step(self, state: State, f: Step) -> State:
        y, z = state
        z = z - f.h * f.s(f.Kt(y), 0)
        y = y + f.h * f.s(f.K(z), 1)
        return y, z

    @override
    def inverse(self, state: State, f: Step) -> State:
        y, z = state
        y = y - f.h * f.s(f.K(z), 1)
        z = z + f.h * f.s(f.Kt(y), 0)
        return y, z

    @override
    def start(self, y: Tensor, initial_velocity: str = "zero") -> State:
        return y, torch.zeros_like(y)


class Leapfrog(Dynamics):
    """y+ = 2 y - y_prev + h^2 s(-K^T K y + b): second order in time (Haber & Ruthotto 2017, section 4.2).

    y_prev starts at y (``zero`` velocity) or at 0 (``paper``: features then grow linearly with N).
    """

    fields = 2
    maps = 2
    reversible = True

    @override
    def step(self, state: State, f: Step) -> State:
        y, y_prev = state
        return 2 * y - y_prev + f.h**2 * f.s(-f.Kt(f.K(y)), 0), y

    @override
    def inverse(self, state: State, f: Step) -> State:
        y_next, y = state
        return y, 2 * y - y_next + f.h**2 * f.s(-f.Kt(f.K(y)), 0)

    @override
    def to_phase(self, state: State, h: float) -> State:
        y, y_prev = state
        return y, (y - y_prev) / h

    @override
    def from_phase(self, phase: State, h: float) -> State:
        y, velocity = phase
        return y, y - h * velocity

    @override
    def start(self, y: Tensor, initial_velocity: str = "zero") -> State:
        return y, y if initial_velocity == "zero" else torch.zeros_like(y)

    @override
    def restepped(self, state: State, factor: float) -> State:
        y, y_prev = state
        return y, y + factor * (y_prev - y)

    @override
    def restepped_gradient(self, gradient: State, factor: float) -> State:
        g, g_prev = gradient
        return g + (1 - 1 / factor) * g_prev, g_prev / factor


DYNAMICS: dict[str, Dynamics] = {
    "euler": Euler(),
    "antisymmetric": Antisymmetric(),
    "hamiltonian": Hamiltonian(),
    "leapfrog": Leapfrog(),
}


@cache
def find_dynamics(name: str) -> Dynamics:
    """The dynamics with a name of `DYNAMICS`, or an instance of a subclass given as ``package.module.Class``.

    Raises:
        ValueError: if there is none of that name.
    """
    if name in DYNAMICS:
        return DYNAMICS[name]
    if "." not in name:
        raise ValueError(
            f"model.dynamics={name} is unknown; choose one of {', '.join(DYNAMICS)}, or package.module.Class"
        )
    return load_class(name, "model.dynamics", Dynamics)()  # type: ignore[type-abstract]
