"""Random streams by name: a draw depends on the seed and on a place in the network, not on what was drawn before."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def generator(seed: int, *place: str | int) -> torch.Generator:
    """A CPU generator for one place in the network, such as ``("segments", 0, "weight", 3)``.

    Every part and every step draws from its own stream, so that initial values depend neither on how the
    network is cut into stages nor on which process builds them.
    """
    digest = hashlib.blake2b(repr((seed, *place)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def normal(shape: tuple[int, ...], std: float, seed: int, *place: str | int) -> Tensor:
    """Normal random numbers from the stream of ``place``, on the default device."""
    values = torch.randn(shape, generator=generator(seed, *place), device="cpu") * std
    return values.to(torch.get_default_device())


@contextmanager
def seeded(seed: int, *place: str | int) -> Iterator[int]:
    """Context in which torch's global generator draws from the stream of ``place``; gives the seed of that stream."""
    own = generator(seed, *place).initial_seed()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(own)
        yield own


def draw_seed() -> int:
    """A seed drawn from torch's global generator, for networks that are built without one."""
    return int(torch.randint(2**62, (), device="cpu").item())
