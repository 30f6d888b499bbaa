"""All N steps of a segment as one autograd node, with backward passes written by hand.

Autograd creates a node for each operation, and in deep, narrow networks that bookkeeping takes most of the time. Here
a whole segment is one node. Its loops run without recording, and the weight gradients of all steps are computed at
once where that is faster. With ``rebuild`` only the output is stored; the backward pass recovers each state from the
next one by the inverse step.

A `Scheme` holds the loops of one dynamics, in the notation of `dynamics.py`: W is the weight of a step, V a second
weight derived from it (the adjoint), b its bias. The *tape* is the list of what `Scheme.backward` needs of each step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from sglight.networks.activations import Activation
from sglight.networks.derivative import first_derivative
from sglight.networks.kernels import Kernel, Ledger

Fields = tuple[Tensor, ...]
Entry = tuple[Tensor, ...]
Weights = Sequence[Sequence[Tensor]]
Biases = Sequence[Sequence[Tensor]]


@dataclass(frozen=True)
class Setting:
    """The constants of a fused segment.

    Attributes:
        scheme, kernel, activation: the loops of the dynamics, its linear map, its activation.
        h: the step size.
        rebuild: whether the backward pass rebuilds the states instead of storing them.
        lower: the precision of the linear maps under autocast; None if they keep that of the state.
    """

    scheme: Scheme
    kernel: Kernel
    activation: Activation
    h: float
    rebuild: bool
    lower: torch.dtype | None = None

    def low(self, x: Tensor) -> Tensor:
        """x in the precision of the linear maps, in which it is also stored for the backward pass."""
        return x if self.lower is None else x.to(self.lower)

    def advance(self, x: Tensor, s: Tensor, scale: float) -> Tensor:
        """x + scale * s; may overwrite s if s is not the tensor that is stored for the backward pass."""
        spare = self.lower is not None and s.dtype != self.lower
        return torch.add(x, s, alpha=scale, out=s if spare else None)

    def slope(self, grad: Tensor, s: Tensor) -> Tensor:
        """grad * s'(p), computed from s = s(p) and in its precision."""
        return self.activation.backward(grad if grad.dtype == s.dtype else grad.to(s.dtype), s)


class Scheme(Protocol):
    """The loops of one dynamics over all steps, forward and backward.

    Attributes:
        fields: number of tensors in a state.
        entry: number of tensors in a tape entry.
        activations: number of activations in a step; each gets its own copy of the bias, which it may overwrite.
        biased: for each stack of `stacks`, whether the bias is added to its map.
    """

    fields: int
    entry: int
    activations: int
    biased: tuple[bool, ...]

    def stacks(self, weight: Tensor, kernel: Kernel, gamma: float) -> tuple[Tensor, ...]:
        """The weights ``[N, ...]`` of each linear map of a step: W, or W and V."""
        ...

    def forward(self, x: Fields, w: Weights, b: Biases, c: Setting, tape: list[Entry] | None) -> Fields:
        """The state after all steps. Appends an entry for each step to ``tape``, unless it is None."""
        ...

    def rebuild(self, x: Fields, w: Weights, b: Biases, c: Setting) -> Iterator[Entry]:
        """The entries of the tape, last step first, computed from the final state ``x`` by inverse steps."""
        ...

    def backward(
        self, g: list[Tensor], entries: Iterable[Entry], w: Weights, c: Setting
    ) -> tuple[Fields, list[tuple[Ledger, float]]]:
        """The gradient of the initial state, and for each stack a ledger of its gradients and their factor.

        Args:
            g: gradients of the fields of the final state; overwritten.
            entries: of the tape, last step first.
            w: the weights of each stack, a list of N.
            c: the constants.
        """
        ...


class EulerScheme(Scheme):
    """y+ = y + h s(W y + b); a tape entry is (y, s)."""

    fields = 1
    entry = 2
    activations = 1
    biased: tuple[bool, ...] = (True,)

    @override
    def stacks(self, weight: Tensor, kernel: Kernel, gamma: float) -> tuple[Tensor, ...]:
        return (weight,)

    @override
    def forward(self, x: Fields, w: Weights, b: Biases, c: Setting, tape: list[Entry] | None) -> Fields:
        (y,), apply, into = x, c.kernel.apply, c.activation.into
        for W, bias in zip(w[0], b[0], strict=True):
            y_low = c.low(y)
            s = into(apply(y_low, W, bias))
            if tape is not None:
                tape.append((y_low, c.low(s)))
            y = c.advance(y, s, c.h)
        return (y,)

    @override
    def rebuild(self, x: Fields, w: Weights, b: Biases, c: Setting) -> Iterator[Entry]:
        raise AssertionError("forward Euler is not reversible")

    @override
    def backward(
        self, g: list[Tensor], entries: Iterable[Entry], w: Weights, c: Setting
    ) -> tuple[Fields, list[tuple[Ledger, float]]]:
        (gy,) = g
        records = c.kernel.ledger(w[0])
        for W, (y, s) in zip(reversed(w[0]), entries, strict=True):
            p = c.slope(gy, s)
            gy, record = c.kernel.pullback(gy, c.h, p, y, W)
            records.append(record)
        return (gy,), [(records, c.h)]


class AntisymmetricScheme(EulerScheme):
    """Forward Euler with W = 1/2 (K - K^T - g I), formed once for all steps."""

    @override
    def stacks(self, weight: Tensor, kernel: Kernel, gamma: float) -> tuple[Tensor, ...]:
        W = 0.5 * (weight - kernel.adjoint(weight))
        return (W - 0.5 * gamma * kernel.identity(weight) if gamma else W,)


class HamiltonianScheme(Scheme):
    """z+ = z - h s(V y + b); y+ = y + h s(W z+ + b), V = W^T; a tape entry is (y, s_z, z+, s_y)."""

    fields = 2
    entry = 4
    activations = 2
    biased: tuple[bool, ...] = (True, True)

    @override
    def stacks(self, weight: Tensor, kernel: Kernel, gamma: float) -> tuple[Tensor, ...]:
        return weight, kernel.adjoint(weight)

    @override
    def forward(self, x: Fields, w: Weights, b: Biases, c: Setting, tape: list[Entry] | None) -> Fields:
        (y, z), apply, into = x, c.kernel.apply, c.activation.into
        for W, V, b_z, b_y in zip(*w, *b, strict=True):
            y_low = c.low(y)
            s_z = into(apply(y_low, V, b_z))
            s_z_low = c.low(s_z)
            z = c.advance(z, s_z, -c.h)
            z_low = c.low(z)
            s_y = into(apply(z_low, W, b_y))
            if tape is not None:
                tape.append((y_low, s_z_low, z_low, c.low(s_y)))
            y = c.advance(y, s_y, c.h)
        return y, z

    @override
    def rebuild(self, x: Fields, w: Weights, b: Biases, c: Setting) -> Iterator[Entry]:
        (y, z), apply, into = x, c.kernel.apply, c.activation.into
        for W, V, b_z, b_y in zip(*map(reversed, w), *map(reversed, b), strict=True):
            z_low = c.low(z)
            s_y = into(apply(z_low, W, b_y))
            s_y_low = c.low(s_y)
            y = c.advance(y, s_y, -c.h)
            y_low = c.low(y)
            s_z = into(apply(y_low, V, b_z))
            yield y_low, c.low(s_z), z_low, s_y_low
            z = c.advance(z, s_z, c.h)

    @override
    def backward(
        self, g: list[Tensor], entries: Iterable[Entry], w: Weights, c: Setting
    ) -> tuple[Fields, list[tuple[Ledger, float]]]:
        gy, gz = g
        records_w, records_v = (c.kernel.ledger(weights) for weights in w)
        for W, V, (y, s_z, z, s_y) in zip(*map(reversed, w), entries, strict=True):
            p = c.slope(gy, s_y)
            gz, record = c.kernel.pullback(gz, c.h, p, z, W)
            records_w.append(record)
            p = c.slope(gz, s_z)
            gy, record = c.kernel.pullback(gy, -c.h, p, y, V)
            records_v.append(record)
        return (gy, gz), [(records_w, c.h), (records_v, -c.h)]


class LeapfrogScheme(Scheme):
    """y+ = 2 y - y_prev + h^2 s(V u + b), u = W y, V = -W^T; a tape entry is (y, u, s)."""

    fields = 2
    entry = 3
    activations = 1
    biased: tuple[bool, ...] = (False, True)

    @override
    def stacks(self, weight: Tensor, kernel: Kernel, gamma: float) -> tuple[Tensor, ...]:
        return weight, -kernel.adjoint(weight)

    def _force(self, y: Tensor, W: Tensor, V: Tensor, bias: Tensor, c: Setting) -> Entry:
        y_low = c.low(y)
        u = c.kernel.apply(y_low, W, None)
        return y_low, u, c.activation.into(c.kernel.apply(u, V, bias))

    @override
    def forward(self, x: Fields, w: Weights, b: Biases, c: Setting, tape: list[Entry] | None) -> Fields:
        y, y_prev = x
        for W, V, bias in zip(*w, *b, strict=True):
            y_low, u, s = self._force(y, W, V, bias, c)
            if tape is not None:
                tape.append((y_low, u, c.low(s)))
            y, y_prev = torch.lerp(y_prev, y, 2).add_(s, alpha=c.h**2), y
        return y, y_prev

    @override
    def rebuild(self, x: Fields, w: Weights, b: Biases, c: Setting) -> Iterator[Entry]:
        y_next, y = x
        for W, V, bias in zip(*map(reversed, w), *map(reversed, b), strict=True):
            y_low, u, s = self._force(y, W, V, bias, c)
            yield y_low, u, c.low(s)
            y_next, y = y, torch.lerp(y_next, y, 2).add_(s, alpha=c.h**2)

    @override
    def backward(
        self, g: list[Tensor], entries: Iterable[Entry], w: Weights, c: Setting
    ) -> tuple[Fields, list[tuple[Ledger, float]]]:
        gy, gprev = g
        records_w, records_v = (c.kernel.ledger(weights) for weights in w)
        for W, V, (y, u, s) in zip(*map(reversed, w), entries, strict=True):
            p = c.slope(gy, s)
            gu, record = c.kernel.pullback(None, 1.0, p, u, V)
            records_v.append(record)
            below, record = c.kernel.pullback(gprev.add_(gy, alpha=2), c.h**2, gu, y, W)
            records_w.append(record)
            gy, gprev = below, gy.neg_()
        return (gy, gprev), [(records_w, c.h**2), (records_v, c.h**2)]


SCHEMES: dict[str, Scheme] = {
    "euler": EulerScheme(),
    "antisymmetric": AntisymmetricScheme(),
    "hamiltonian": HamiltonianScheme(),
    "leapfrog": LeapfrogScheme(),
}


def run(
    state: Tensor, bias: Tensor, stacks: tuple[Tensor, ...], setting: Setting, known: Tensor | None = None
) -> Tensor:
    """All steps of a segment: state ``[B, fields * C, ...]`` in, state of the same shape out.

    Args:
        state: before the first step.
        bias: ``[N, C]``.
        stacks: the weights, see `Scheme.stacks`.
        setting: the constants.
        known: the output, if it is already known. Then the forward pass computes nothing and only the shape of
            ``state`` matters; the backward pass rebuilds the states from ``known``.
    """
    if torch.is_grad_enabled():
        return _Fused.apply(setting, known, state, bias, *stacks)
    setting, bias, stacks = _lowered(setting, state, bias, stacks)
    with torch.autocast(state.device.type, enabled=False):
        return _join(_steps(setting, state, bias, stacks, None))


def _steps(
    setting: Setting, state: Tensor, bias: Tensor, stacks: Sequence[Tensor], tape: list[Entry] | None
) -> Fields:
    fields = _fields(setting, state)
    operators = [setting.kernel.operator(stack).unbind(0) for stack in stacks]
    count = setting.scheme.activations
    if tape is None:
        biases: Biases = [bias.unbind(0)] * count
    else:
        biases = setting.kernel.biases(bias, fields[0], count)
    return setting.scheme.forward(fields, operators, biases, setting, tape)


def _fields(setting: Setting, state: Tensor) -> Fields:
    return tuple(setting.kernel.layout(field) for field in state.chunk(setting.scheme.fields, 1))


def _join(fields: Sequence[Tensor]) -> Tensor:
    return fields[0] if len(fields) == 1 else torch.cat(list(fields), 1)


def _lowered(
    setting: Setting, state: Tensor, bias: Tensor, stacks: tuple[Tensor, ...]
) -> tuple[Setting, Tensor, tuple[Tensor, ...]]:
    """Casts weights and biases to autocast's precision, once for all steps; states keep their own precision."""
    device = state.device.type
    if torch.is_autocast_enabled(device):
        lower = torch.get_autocast_dtype(device)
        setting = replace(setting, lower=lower)
        bias, stacks = bias.to(lower), tuple(stack.to(lower) for stack in stacks)
    return setting, bias, tuple(setting.kernel.align(stack) for stack in stacks)


class _Fused(torch.autograd.Function):
    """The autograd node of `run`."""

    @staticmethod
    @override
    def forward(
        ctx: Any, setting: Setting, known: Tensor | None, state: Tensor, bias: Tensor, *stacks: Tensor
    ) -> Tensor:
        ctx.dtypes = [bias.dtype, *(stack.dtype for stack in stacks)]
        setting, bias, stacks = _lowered(setting, state, bias, stacks)
        ctx.setting = setting
        tape: list[Entry] | None = None if setting.rebuild else []
        if known is not None:
            out = known.detach()
        else:
            with torch.autocast(state.device.type, enabled=False):
                out = _join(_steps(setting, state, bias, stacks, tape))
        kept = [out] if tape is None else [tensor for entry in tape for tensor in entry]
        ctx.save_for_backward(bias, *stacks, *kept)
        ctx.maps = len(stacks)
        return out

    @staticmethod
    @first_derivative
    @override
    def backward(ctx: Any, grad: Tensor) -> Any:
        setting: Setting = ctx.setting
        bias, *rest = ctx.saved_tensors
        stacks, kept = rest[: ctx.maps], rest[ctx.maps :]
        weights = [stack.unbind(0) for stack in stacks]
        with torch.autocast(grad.device.type, enabled=False):
            entries: Iterable[Entry]
            if setting.rebuild:
                operators = [setting.kernel.operator(stack).unbind(0) for stack in stacks]
                biases = [bias.unbind(0)] * setting.scheme.activations
                entries = setting.scheme.rebuild(_fields(setting, kept[0]), operators, biases, setting)
            else:
                size = setting.scheme.entry
                entries = (tuple(kept[i : i + size]) for i in reversed(range(0, len(kept), size)))
            # Copies, because the scheme overwrites them and autograd's own tensors must stay as they are.
            grads = [field.clone() for field in _fields(setting, grad)]
            fields, records = setting.scheme.backward(grads, entries, weights, setting)
            collected = [setting.kernel.collect(steps, scale) for steps, scale in records]
        shares = [b for (_, b), has in zip(collected, setting.scheme.biased, strict=True) if has]
        grad_bias = sum(shares[1:], start=shares[0])
        dtypes = ctx.dtypes
        return (
            None,
            None,
            _join(fields),
            grad_bias.to(dtypes[0]),
            *(w.to(dtype) for (w, _), dtype in zip(collected, dtypes[1:], strict=True)),
        )
