"""N steps in one autograd node: hand-written backward passes over parameters stacked over time.

Deep and narrow networks spend their time in autograd's bookkeeping, one node an operation; here a segment is one
node, its loops run without recording, and weight gradients are taken for all steps at once where that is faster.
With ``rebuild`` nothing is stored but the output: the backward pass recovers each state from the next.

Each scheme has three functions, in the notation of `dynamics.py` with W the step's weight and V a second one
derived from it (the adjoint):

* ``forward``: all steps; what a step's backward needs goes to ``tape``.
* ``rebuild``: the same tape entries, last first, from the final state alone.
* ``backward``: gradients of the initial state, and the records for the gradients of W, V and b.
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
    """The constants of a fused segment."""

    scheme: Scheme
    kernel: Kernel
    activation: Activation
    h: float
    rebuild: bool
    lower: torch.dtype | None = None

    def low(self, x: Tensor) -> Tensor:
        """x in the precision of the maps: what they take, and what is kept for the backward pass."""
        return x if self.lower is None else x.to(self.lower)

    def advance(self, x: Tensor, s: Tensor, scale: float) -> Tensor:
        """x + scale * s; overwrites s where it is not what `low` gives, which is kept."""
        spare = self.lower is not None and s.dtype != self.lower
        return torch.add(x, s, alpha=scale, out=s if spare else None)

    def slope(self, grad: Tensor, s: Tensor) -> Tensor:
        """grad s'(p), in the precision of s = s(p)."""
        return self.activation.backward(grad if grad.dtype == s.dtype else grad.to(s.dtype), s)


class Scheme(Protocol):
    """A dynamics with a hand-written backward pass.

    Attributes:
        fields: tensors in a state.
        entry: tensors in a tape entry.
        activations: activations in a step; each has its own biases, which it may overwrite.
        biased: for each stack, whether the bias is added to its map.
    """

    fields: int
    entry: int
    activations: int
    biased: tuple[bool, ...]

    def stacks(self, weight: Tensor, kernel: Kernel, gamma: float) -> tuple[Tensor, ...]: ...

    def forward(self, x: Fields, w: Weights, b: Biases, c: Setting, tape: list[Entry] | None) -> Fields: ...

    def rebuild(self, x: Fields, w: Weights, b: Biases, c: Setting) -> Iterator[Entry]: ...

    def backward(
        self, g: list[Tensor], entries: Iterable[Entry], w: Weights, c: Setting
    ) -> tuple[Fields, list[tuple[Ledger, float]]]: ...


class EulerScheme:
    """y+ = y + h s(W y + b); a tape entry is (y, s)."""

    fields = 1
    entry = 2
    activations = 1
    biased: tuple[bool, ...] = (True,)

    def stacks(self, weight: Tensor, kernel: Kernel, gamma: float) -> tuple[Tensor, ...]:
        return (weight,)

    def forward(self, x: Fields, w: Weights, b: Biases, c: Setting, tape: list[Entry] | None) -> Fields:
        (y,), apply, into = x, c.kernel.apply, c.activation.into
        for W, bias in zip(w[0], b[0], strict=True):
            y_low = c.low(y)
            s = into(apply(y_low, W, bias))
            if tape is not None:
                tape.append((y_low, c.low(s)))
            y = c.advance(y, s, c.h)
        return (y,)

    def rebuild(self, x: Fields, w: Weights, b: Biases, c: Setting) -> Iterator[Entry]:
        raise AssertionError("forward Euler is not reversible")

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


class HamiltonianScheme:
    """z+ = z - h s(V y + b); y+ = y + h s(W z+ + b), V = W^T; a tape entry is (y, s_z, z+, s_y)."""

    fields = 2
    entry = 4
    activations = 2
    biased: tuple[bool, ...] = (True, True)

    def stacks(self, weight: Tensor, kernel: Kernel, gamma: float) -> tuple[Tensor, ...]:
        return weight, kernel.adjoint(weight)

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


class LeapfrogScheme:
    """y+ = 2 y - y_prev + h^2 s(V u + b), u = W y, V = -W^T; a tape entry is (y, u, s)."""

    fields = 2
    entry = 3
    activations = 1
    biased: tuple[bool, ...] = (False, True)

    def stacks(self, weight: Tensor, kernel: Kernel, gamma: float) -> tuple[Tensor, ...]:
        return weight, -kernel.adjoint(weight)

    def _force(self, y: Tensor, W: Tensor, V: Tensor, bias: Tensor, c: Setting) -> Entry:
        y_low = c.low(y)
        u = c.kernel.apply(y_low, W, None)
        return y_low, u, c.activation.into(c.kernel.apply(u, V, bias))

    def forward(self, x: Fields, w: Weights, b: Biases, c: Setting, tape: list[Entry] | None) -> Fields:
        y, y_prev = x
        for W, V, bias in zip(*w, *b, strict=True):
            y_low, u, s = self._force(y, W, V, bias, c)
            if tape is not None:
                tape.append((y_low, u, c.low(s)))
            y, y_prev = torch.lerp(y_prev, y, 2).add_(s, alpha=c.h**2), y
        return y, y_prev

    def rebuild(self, x: Fields, w: Weights, b: Biases, c: Setting) -> Iterator[Entry]:
        y_next, y = x
        for W, V, bias in zip(*map(reversed, w), *map(reversed, b), strict=True):
            y_low, u, s = self._force(y, W, V, bias, c)
            yield y_low, u, c.low(s)
            y_next, y = y, torch.lerp(y_next, y, 2).add_(s, alpha=c.h**2)

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
    """All steps of a segment: state ``[B, fields * C, ...]`` in, state out.

    Args:
        known: the state that comes out, where it is known: nothing is computed then before the backward pass, which
            rebuilds; of ``state`` only the shape counts.
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
    """Under autocast the maps run in the lower precision; states keep theirs. Cast once, not once a step."""
    device = state.device.type
    if torch.is_autocast_enabled(device):
        lower = torch.get_autocast_dtype(device)
        setting = replace(setting, lower=lower)
        bias, stacks = bias.to(lower), tuple(stack.to(lower) for stack in stacks)
    return setting, bias, tuple(setting.kernel.align(stack) for stack in stacks)


class _Fused(torch.autograd.Function):
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
            # The scheme writes into these, so they must not share memory with what autograd handed in.
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
