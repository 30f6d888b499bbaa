"""How a tensor lies in memory, as a few bytes that can go ahead of it."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, UntypedStorage

from sglight.errors import PeerLost

DIMS = 8
FORMAT = struct.Struct(f"<BB{DIMS}Q{DIMS}Q")
DTYPES = [
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


class Layout(NamedTuple):
    """A tensor without its values, of up to 8 dimensions, which fills its memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        """Its own layout if it fills its memory, otherwise that of a copy that does."""
        return cls(tensor.dtype, tensor.shape, torch.empty_like(tensor, device="meta").stride())

    @property
    def size(self) -> int:
        """Bytes."""
        size = self.dtype.itemsize
        for n in self.shape:
            size *= n
        return size

    def on(self, storage: UntypedStorage) -> Tensor:
        """A new tensor, in autograd's eyes no view of another, at the beginning of the storage."""
        return torch.empty(0, dtype=self.dtype).set_(storage, 0, self.shape, self.strides)

    def packed(self) -> bytes:
        rest = (0,) * (DIMS - len(self.shape))
        return FORMAT.pack(
            DTYPES.index(self.dtype), len(self.shape), *self.shape, *rest, *self.strides, *rest
        )

    @classmethod
    def unpacked(cls, message: bytes) -> Layout:
        dtype, dims, *sizes = FORMAT.unpack(message)
        return cls(DTYPES[dtype], tuple(sizes[:dims]), tuple(sizes[DIMS : DIMS + dims]))

    def check(self, shape: Sequence[int], peer: str) -> None:
        """Whether this is what a receiver expects."""
        if tuple(shape) != self.shape:
            sent, expected = list(self.shape), list(shape)
            raise PeerLost(f"{peer} sent {sent} where {expected} was expected: the workers are out of step")
