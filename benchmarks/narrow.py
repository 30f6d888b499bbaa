"""Would narrow convolutions be faster with more channels, in another layout, or grouped?

    python benchmarks/narrow.py
    python benchmarks/narrow.py --channels 6 --batch 128 --image 28

The narrow networks of this field have 6 or 8 channels. Three things are measured, each as CPU seconds of forward and
backward pass on one thread, in turn (A B A B ...), with the ratio to what sglight does:

* a bare 3x3 convolution, channels last (sglight's) or contiguous, with channels of zeros up to 8 or 16;
* a Hamiltonian segment of four steps, contiguous, or as wide as if it were padded, its element-wise work included;
* the weight gradients of both half steps: one call each, together with the gradients of the states (sglight's), or
  one grouped call for both, behind two calls for the states. In the forward pass a half step needs the one before it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median

import machine
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from segment import one_pass
from timing import by_name, cpu_s_each, in_turn, ratios, spread
from torch import Tensor

from sglight.compat.torch import conv2d_backward
from sglight.networks import Segment
from sglight.networks.kernels import KERNELS, Conv
from sglight.process import keep_freed_memory

LAYOUTS = {"channels last": torch.channels_last, "contiguous": torch.contiguous_format}
PADDED = (8, 16)
STEPS = 4
Work = Callable[[], object]


class Contiguous(Conv):
    """sglight's convolution, with images in PyTorch's ordinary memory order."""

    def layout(self, state: Tensor) -> Tensor:
        """New tensors in ordinary order."""
        return state.contiguous()

    def align(self, weight: Tensor) -> Tensor:
        """As they are."""
        return weight

    def apply(self, x: Tensor, operator: Tensor, bias: Tensor | None) -> Tensor:
        """K x + b for one step."""
        return F.conv2d(x, operator, bias, padding=operator.shape[-1] // 2)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--channels", type=int, nargs="*", default=[6, 8])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--image", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.3, help="length of a turn (default: %(default)s)")
    return parser.parse_args()


def convolutions(channels: int, batch: int, image: int) -> dict[str, Work]:
    """Forward and backward pass of a convolution, in each layout, as wide as it is and padded."""
    works: dict[str, Work] = {}
    for name, layout in LAYOUTS.items():
        for width in (channels, *(padded for padded in PADDED if padded > channels)):
            x, grad = (torch.randn(batch, width, image, image).to(memory_format=layout) for _ in range(2))
            weight = torch.randn(width, width, 3, 3).to(memory_format=layout)
            works[f"convolution, {width} channels, {name}"] = partial(both, x, grad, weight)
    return works


def both(x: Tensor, grad: Tensor, weight: Tensor) -> None:
    """A convolution and its gradients."""
    F.conv2d(x, weight, None, padding=1)
    conv2d_backward(grad, x, weight, 1)


def segments(channels: int, batch: int, image: int) -> dict[str, Work]:
    """Forward and backward pass of a segment, channels last as wide as it is and padded, and contiguous."""
    works: dict[str, Work] = {}
    for width in (channels, *(padded for padded in PADDED if padded > channels)):
        works[f"{STEPS} steps, {width} channels, channels last"] = segment(
            width, batch, image, KERNELS["conv"]
        )
    works[f"{STEPS} steps, {channels} channels, contiguous"] = segment(channels, batch, image, Contiguous())
    return works


def segment(channels: int, batch: int, image: int, kernel: Conv) -> Work:
    """Forward and backward pass of a Hamiltonian segment with a kernel."""
    made = Segment("hamiltonian", STEPS, channels, "conv", seed=1)
    made.kernel = kernel
    state, grad = (kernel.layout(torch.randn(batch, 2 * channels, image, image)) for _ in range(2))
    state.requires_grad_()
    return partial(one_pass, made, made, state, grad)


def weight_gradients(channels: int, batch: int, image: int) -> dict[str, Work]:
    """The gradients of both half steps, with a call each, or with the weights' in one grouped call."""
    shape = batch, channels, image, image
    y, z, p, q = (torch.randn(shape).to(memory_format=torch.channels_last) for _ in range(4))
    w, v = (torch.randn(channels, channels, 3, 3).to(memory_format=torch.channels_last) for _ in range(2))

    def apart() -> None:
        conv2d_backward(p, z, w, 1)
        conv2d_backward(q, y, v, 1)

    def grouped() -> None:
        gradients(p, z, w, 1, [True, False, False])
        gradients(q, y, v, 1, [True, False, False])
        gradients(torch.cat([p, q], 1), torch.cat([z, y], 1), torch.cat([w, v]), 2, [False, True, True])

    return {f"two half steps, {channels} channels": apart, "their weights in one grouped call": grouped}


def gradients(grad: Tensor, x: Tensor, weight: Tensor, groups: int, wanted: list[bool]) -> None:
    """Those gradients of (x, weight, bias) that are wanted."""
    torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], [1, 1], [1, 1], [1, 1], False, [0, 0], groups, wanted
    )


def show(table: Table, works: Mapping[str, Work], rounds: int, seconds: float) -> None:
    """Measure works in turn, and add a row for each, compared with the first."""
    times = by_name(
        in_turn({n: partial(cpu_s_each, w, seconds) for n, w in works.items()}, rounds, warm_up=1)
    )
    first = next(iter(times.values()))
    for name, values in times.items():
        ratio = spread(ratios(values, first))
        span = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
        table.add_row(name, f"{1e3 * median(values):.2f}", span)
    table.add_section()


def main() -> None:
    """Measure and print."""
    options = arguments()
    machine.set_threads(1)
    keep_freed_memory()  # as a run does
    where = f"batch {options.batch}, {options.image} x {options.image}, {options.rounds} turns, 1 thread"
    table = Table(title=f"forward + backward, CPU ms, {where}\n{machine.processor()}")
    for column in ("", "median", "over the first"):
        table.add_column(column)
    for channels in options.channels:
        for works in (convolutions, segments, weight_gradients):
            show(table, works(channels, options.batch, options.image), options.rounds, options.seconds)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
