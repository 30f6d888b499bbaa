"""The networks that `stages.py` compares on, and their batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command line needs the names of the networks, but neither torch nor sglight
    from torch import Tensor

    from sglight.networks.network import NetworkSpec

Batch = tuple["Tensor", "Tensor"]
ADAM = {"name": "adam", "lr": 1e-3}
# What contenders have in common that follow the true gradient of each batch (`Contender.same_losses`).
TRUE_GRADIENT = "true gradient"


@dataclass(frozen=True)
class Case:
    """A network, the estimator at its cuts, and the size of a batch."""

    batch: int
    network: dict[str, Any]
    estimator: dict[str, Any]

    @property
    def spec(self) -> NetworkSpec:
        """The network as sglight describes it."""
        from sglight.networks.network import NetworkSpec

        return NetworkSpec(**self.network)


# No batch normalisation (conf/experiment/mnist_conv.yaml has it): halved and micro-batches would change the network.
_SHARED = {"classes": 10, "dynamics": "hamiltonian", "horizon": 4.0, "seed": 1}
CASES = {
    "conv": Case(
        128,
        {
            **_SHARED, "shape": (1, 28, 28), "kernel": "conv", "channels": 16, "steps": 16, "opening": "conv"
        },
        {"name": "conv", "hidden": [32], "kernel_size": 1, "conditional": True},
    ),
    "dense": Case(
        256,
        {**_SHARED, "shape": (784,), "kernel": "dense", "channels": 256, "steps": 32, "opening": "linear"},
        {"name": "mlp", "hidden": [256], "conditional": True},
    ),
}  # fmt: skip


def has_mnist(raw_dir: Path) -> bool:
    """Whether the original files of MNIST are there."""
    return (raw_dir / "MNIST" / "raw" / "train-images-idx3-ubyte").is_file()


def make_batches(case: Case, raw_dir: Path, count: int = 32) -> list[Batch]:
    """``count`` batches: of MNIST if its files are there, else of random numbers."""
    import numpy as np
    import torch

    size = case.batch * count
    if has_mnist(raw_dir):
        folder = raw_dir / "MNIST" / "raw"
        pixels = np.fromfile(folder / "train-images-idx3-ubyte", np.uint8, 784 * size, offset=16)
        labels = np.fromfile(folder / "train-labels-idx1-ubyte", np.uint8, size, offset=8)
        x, y = (torch.from_numpy(pixels).float() / 255 - 0.1307) / 0.3081, torch.from_numpy(labels).long()
    else:
        draw = torch.Generator().manual_seed(0)
        x, y = torch.randn(784 * size, generator=draw), torch.randint(10, (size,), generator=draw)
    x = x.view(size, *case.spec.shape)
    return list(zip(x.split(case.batch), y.split(case.batch), strict=True))
