"""The layout of a tensor in memory, as a few bytes that are sent before its values."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, UntypedStorage

from sglight.errors import PeerLost

DIMS = 8  # the largest number of dimensions
FORMAT = struct.Struct(f"<BB{DIMS}Q{DIMS}Q")
DTYPES = [
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


class Layout(NamedTuple):
    """Type, shape and strides of a tensor that fills its memory without gaps.

    >>> layout = Layout.of(torch.zeros(2, 3))
    >>> layout == Layout.unpacked(layout.packed())
    True
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        """The layout of a tensor; if that has gaps in its memory, of a copy without."""
        return cls(tensor.dtype, tensor.shape, torch.empty_like(tensor, device="meta").stride())

    @property
    def size(self) -> int:
        """The number of bytes of the values."""
        size = self.dtype.itemsize
        for n in self.shape:
            size *= n
        return size

    def on(self, storage: UntypedStorage) -> Tensor:
        """A new tensor with this layout at the beginning of a storage. For autograd it is no view of another one."""
        return torch.empty(0, dtype=self.dtype).set_(storage, 0, self.shape, self.strides)

    def packed(self) -> bytes:
        """The layout as bytes, always of the same length."""
        rest = (0,) * (DIMS - len(self.shape))
        return FORMAT.pack(
            DTYPES.index(self.dtype), len(self.shape), *self.shape, *rest, *self.strides, *rest
        )

    @classmethod
    def unpacked(cls, message: bytes) -> Layout:
        """The layout that `packed` wrote."""
        dtype, dims, *sizes = FORMAT.unpack(message)
        return cls(DTYPES[dtype], tuple(sizes[:dims]), tuple(sizes[DIMS : DIMS + dims]))

    def check(self, shape: Sequence[int], peer: str) -> None:
        """Refuse a tensor of another shape than the receiver expects.

        Raises:
            PeerLost: if the shapes differ; ``peer`` names the sender.
        """
        if tuple(shape) != self.shape:
            sent, expected = list(self.shape), list(shape)
            raise PeerLost(f"{peer} sent {sent} where {expected} was expected: the workers are out of step")
