"""Random crops and reflections of whole batches of pictures."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Draw:
    """The random numbers of one epoch.

    Attributes:
        down, right: the crop offset of each sample [N], in the order in which they are served.
        mirrored: how many samples of each batch are reflected.
    """

    down: Tensor
    right: Tensor
    mirrored: list[int]


@dataclass(frozen=True)
class Augmentation:
    """Random crops of pictures padded with zeros by `padding` on each side, then random reflections left to right.

    Each sample is reflected with probability 1/2. As the samples of a batch are in random order, the first k of them
    are reflected, with k drawn from the binomial distribution; this has the same law as a coin toss for each sample.
    """

    padding: int
    flip: bool

    def draw(self, size: int, batch_size: int, generator: torch.Generator) -> Draw:
        """The random numbers for `size` samples in batches of `batch_size`."""
        offsets = torch.randint(2 * self.padding + 1, (2, size), generator=generator)
        heads = torch.randint(2, (size,), generator=generator)
        mirrored = [int(part.sum()) for part in heads.split(batch_size)] if self.flip else []
        return Draw(offsets[0], offsets[1], mirrored)

    def __call__(self, x: Tensor, draw: Draw, batch: int, batch_size: int) -> Tensor:
        """The augmented pictures of batch number `batch`: [B, C, H, W] in and out, of the same type."""
        start = batch * batch_size
        if self.padding:
            part = slice(start, start + len(x))
            x = crop(x, draw.down[part].to(x.device), draw.right[part].to(x.device), self.padding)
        if self.flip:
            head = draw.mirrored[batch]
            x[:head] = x[:head].flip(-1)
        return x


def crop(x: Tensor, down: Tensor, right: Tensor, padding: int) -> Tensor:
    """Shifts picture b of x [B, C, H, W] by (padding - down[b], padding - right[b]) pixels and fills with zeros."""
    height, width = x.shape[-2:]
    padded = pad(x, (padding, padding, padding, padding))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: [B, C, 2p+1, 2p+1, H, W]
    return windows[torch.arange(len(x), device=x.device), :, down, right]
