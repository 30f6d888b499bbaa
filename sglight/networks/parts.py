"""The parts of a network around its segments: opening, connectors and classifier.

Each part draws its initial values from its own random stream (`seeding.py`).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from sglight.networks.activations import ACTIVATIONS
from sglight.networks.batchnorm import BatchNorm2d
from sglight.networks.kernels import arranged, channels_last
from sglight.networks.seeding import normal

Shape = tuple[int, ...]


class PadOpening(nn.Module):
    """The input's channels (or features) followed by zeros, up to the width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    @override
    def forward(self, x: Tensor) -> Tensor:
        return pad_channels(x, self.channels)


class RepeatOpening(nn.Module):
    """The input's channels (or features) copied in turn until the width is full."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    @override
    def forward(self, x: Tensor) -> Tensor:
        return x[:, torch.arange(self.channels, device=x.device) % x.shape[1]]


class Linear(nn.Linear):
    """``nn.Linear`` with zero bias and normal weights of standard deviation gain / sqrt(fan-in).

    The weights come from the random stream of ``(seed, *place)``.
    """

    def __init__(self, inputs: int, outputs: int, seed: int, *place: str | int, gain: float = 1.0) -> None:
        super().__init__(inputs, outputs, device="meta", dtype=torch.get_default_dtype())
        self.weight = nn.Parameter(normal((outputs, inputs), gain / inputs**0.5, seed, *place))
        self.bias = nn.Parameter(torch.zeros(outputs))


class Conv(nn.Conv2d):
    """``nn.Conv2d`` of stride 1 with padding that keeps the image size, initialised like `Linear`."""

    def __init__(
        self, inputs: int, outputs: int, size: int, seed: int, *place: str | int, gain: float = 1.0
    ) -> None:
        super().__init__(
            inputs, outputs, size, padding=size // 2, device="meta", dtype=torch.get_default_dtype()
        )
        std = gain / (inputs * size**2) ** 0.5
        self.weight = nn.Parameter(normal((outputs, inputs, size, size), std, seed, *place))
        self.bias = nn.Parameter(torch.zeros(outputs))

    @override
    def forward(self, input: Tensor) -> Tensor:
        # One memory order, as in the segments: how sums over the image round depends on it.
        return arranged(super().forward(arranged(input, channels_last)), channels_last)


class ConvOpening(nn.Module):
    """s(norm(conv(x))): a convolution to the full width (Ruthotto & Haber 2020)."""

    def __init__(
        self, inputs: int, channels: int, size: int, activation: str, normalisation: str, seed: int
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.conv = Conv(inputs, channels, size, seed, "opening", gain=self.activation.gain)
        self.norm = BatchNorm2d(channels) if normalisation == "batch" else nn.Identity()

    @override
    def forward(self, x: Tensor) -> Tensor:
        return arranged(self.activation.function(self.norm(self.conv(x))), channels_last)


class Connector(nn.Module):
    """What joins two segments: average pooling by 2 (of images) and a change of width, for each field of the state.

    ``pad`` adds zero channels, ``linear`` mixes the channels (a 1x1 convolution on images).
    """

    def __init__(
        self,
        kind: str,
        kernel: str,
        pool: bool,
        inputs: int,
        outputs: int,
        fields: int,
        seed: int,
        index: int,
    ) -> None:
        super().__init__()
        self.pool = pool and kernel == "conv"
        self.outputs, self.fields = outputs, fields
        self.mix: nn.Module | None = None
        if kind == "linear" and kernel == "conv":
            self.mix = Conv(inputs, outputs, 1, seed, "connectors", index)
        elif kind == "linear":
            self.mix = Linear(inputs, outputs, seed, "connectors", index)

    @override
    def forward(self, state: Tensor) -> Tensor:
        if self.pool:
            state = F.avg_pool2d(state, 2)
        fields = state.chunk(self.fields, 1)
        changed = [pad_channels(f, self.outputs) if self.mix is None else self.mix(f) for f in fields]
        # Under autocast `mix` returns a lower precision; states keep their own.
        return torch.cat(changed, 1).to(state.dtype)


class Classifier(nn.Module):
    """A linear map to logits, from the field y of the state: all of it (``flatten``) or its image mean (``pool``)."""

    def __init__(self, head: str, shape: Shape, classes: int, seed: int) -> None:
        super().__init__()
        self.pool = head == "pool" and len(shape) > 1
        self.shape = shape
        self.linear = Linear(shape[0] if self.pool else math.prod(shape), classes, seed, "classifier")

    @override
    def forward(self, state: Tensor) -> Tensor:
        y = state[:, : self.shape[0]]
        return self.linear(y.mean((2, 3)) if self.pool else y.flatten(1))

    @property
    def image_weight(self) -> Tensor | None:
        """The weights as images ``[classes, C, H, W]``; None unless the classifier takes whole images."""
        return None if self.pool or len(self.shape) == 1 else self.linear.weight.unflatten(1, self.shape)


def pad_channels(x: Tensor, channels: int) -> Tensor:
    """``x`` with zero channels (dimension 1) added up to ``channels``."""
    return F.pad(x, (0, 0) * (x.ndim - 2) + (0, channels - x.shape[1]))
