"""Random crops and reflections of whole batches of pictures."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Draw:
    """The random numbers of one epoch: crop offsets by position, reflections by batch."""

    down: Tensor
    right: Tensor
    mirrored: list[int]


@dataclass(frozen=True)
class Augmentation:
    """Crops from a picture that is padded with zeros by `padding` on each side, then reflects left to right.

    Each sample is reflected with probability 1/2. The samples of a batch are in random order, so to reflect
    the first k of them, k binomial, is the same law as a coin for each, and needs no mask.
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
        """The augmented pictures of batch number `batch`: [B, C, H, W] -> [B, C, H, W], same type."""
        start = batch * batch_size
        if self.padding:
            part = slice(start, start + len(x))
            x = crop(x, draw.down[part].to(x.device), draw.right[part].to(x.device), self.padding)
        if self.flip:
            head = draw.mirrored[batch]
            x[:head] = x[:head].flip(-1)
        return x


def crop(x: Tensor, down: Tensor, right: Tensor, padding: int) -> Tensor:
    """Moves picture b of x [B, C, H, W] by (padding - down[b], padding - right[b]) pixels; zeros come in."""
    height, width = x.shape[-2:]
    padded = pad(x, (padding, padding, padding, padding))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: [B, C, 2p+1, 2p+1, H, W]
    return windows[torch.arange(len(x), device=x.device), :, down, right]
