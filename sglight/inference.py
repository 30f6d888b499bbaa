"""Loads a trained network and uses it without Lightning: raw samples in, probabilities and class names out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from sglight.archive import DATA
from sglight.data.module import affine
from sglight.errors import UserError
from sglight.networks import NetworkSpec, StableNet

BEST, LAST = "best.ckpt", "last.ckpt"
BATCH = 1000


class Predictions(NamedTuple):
    """The result of `Predictor.predict`.

    Attributes:
        probabilities: ``[N, classes]``, on the CPU.
        names: of the most probable class of each sample.
    """

    probabilities: Tensor
    names: list[str]


class Predictor(nn.Module):
    """A network with the normalisation of its data and the names of its classes.

    ``forward`` takes raw samples ``[B, *shape]`` of any number type, as the data set stores them (bytes of pictures
    ``[B, C, H, W]``, or features), and returns logits ``[B, classes]``.

    Attributes:
        network: takes normalised samples.
        class_names: in the order of the logits.
        shape: of a sample.
        pixels: whether samples are bytes, 0 to 255.

    >>> from sglight.networks import StableNet
    >>> predictor = Predictor(StableNet(shape=(2,), classes=2, channels=4, seed=0), ["cat", "dog"])
    >>> predictor.predict([[0.1, 0.2], [0.3, 0.4]]).probabilities.shape
    torch.Size([2, 2])
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        network: StableNet,
        class_names: Sequence[str],
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        pixels: bool = False,
    ) -> None:
        super().__init__()
        self.network, self.class_names, self.pixels = network, list(class_names), pixels
        self.shape = tuple(network.spec.shape)
        one, none = torch.ones(1), torch.zeros(1)
        known = None if mean is None or std is None else (list(mean), list(std))
        scale, shift = affine(*known, len(self.shape), pixels, torch.device("cpu")) if known else (None, None)
        self.register_buffer("scale", one if scale is None else scale)
        self.register_buffer("shift", none if shift is None else shift)

    @override
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x.to(self.scale.dtype) * self.scale + self.shift)
        return logits

    @torch.no_grad()
    def predict(self, samples: Any, batch_size: int = BATCH) -> Predictions:
        """The classes of raw samples: an array, tensor or list ``[N, *shape]``, or one sample of that ``shape``.

        Raises:
            UserError: for samples of another shape, or that are not numbers.
        """
        x = self.samples(samples)
        was_training, device = self.training, self.scale.device
        self.eval()
        try:
            logits = [self(part.to(device)).cpu() for part in x.split(batch_size)]
        finally:
            self.train(was_training)
        probabilities = torch.cat(logits).softmax(1) if logits else torch.empty(0, len(self.class_names))
        return Predictions(probabilities, [self.class_names[i] for i in probabilities.argmax(1).tolist()])

    def samples(self, given: Any) -> Tensor:
        """Samples as a tensor ``[N, *shape]``.

        Raises:
            UserError: for samples of another shape, or that are not numbers.
        """
        try:
            if isinstance(given, Sequence) and given and isinstance(given[0], Tensor):
                given = torch.stack(list(given))
            x = given if isinstance(given, Tensor) else torch.from_numpy(np.array(given))
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"samples must be numbers, [N, {self._sizes}]: {str(error).splitlines()[0]}"
            ) from error
        if tuple(x.shape) == self.shape:
            x = x[None]
        if tuple(x.shape[1:]) != self.shape or x.ndim != len(self.shape) + 1:
            raise UserError(f"the network takes samples [N, {self._sizes}], not {list(x.shape)}")
        if x.is_complex():
            raise UserError("samples must be real numbers, not complex ones")
        return x

    @property
    def _sizes(self) -> str:
        return ", ".join(map(str, self.shape))


def load(path: str | Path, device: str | torch.device = "cpu") -> Predictor:
    """Load a trained network, in evaluation mode.

    If it was trained by a script without a data module, samples are not normalised, and the names of the classes are
    their numbers.

    Args:
        path: a run folder, of which the best checkpoint is loaded, or a checkpoint.
        device: for the network.

    Raises:
        UserError: if there is no checkpoint of sglight, or it is damaged.

    ::

        predictor = sglight.load("outputs/2026-11-27/10-00-00-digits-hamiltonian-delayed")
        predictor.predict(samples).names
    """
    file = find_checkpoint(Path(path).expanduser())
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except (LookupError, TypeError, OSError, EOFError, RuntimeError, ValueError, UnpicklingError) as error:
        raise UserError(f"{file} is not a checkpoint of sglight, or is damaged; give another") from error
    return from_checkpoint(checkpoint, str(file)).eval().to(device)


def from_checkpoint(checkpoint: Any, name: str) -> Predictor:
    """The network of the contents of a checkpoint; ``name`` is that of the file, for messages.

    Raises:
        UserError: if they are not those of a checkpoint of sglight.
    """
    if not isinstance(checkpoint, Mapping) or not {"state_dict", "sglight"} <= checkpoint.keys():
        raise UserError(f"{name} is not a checkpoint of sglight; give a run's folder or its best.ckpt")
    if DATA not in checkpoint:
        raise UserError(
            f"{name} is of an earlier version of sglight, which did not write the data's normalisation; train it for "
            "another epoch with ckpt=..., and take that checkpoint"
        )
    facts = checkpoint[DATA]
    network = _network(checkpoint["sglight"], checkpoint["state_dict"])
    names = facts.get("class_names") or [str(label) for label in range(network.spec.classes)]
    return Predictor(network, names, facts.get("mean"), facts.get("std"), bool(facts.get("pixels")))


def find_checkpoint(path: Path) -> Path:
    """The checkpoint of a path: of a run folder the best one, or the last if there is none; otherwise the file itself.

    Raises:
        UserError: if there is none.
    """
    candidates = [path] if not path.is_dir() else [path / "checkpoints" / name for name in (BEST, LAST)]
    found = next((file for file in candidates if file.is_file()), None)
    if found is None:
        raise UserError(
            f"{path} holds no checkpoint; give a run's folder, with checkpoints/{BEST}, or a file"
        )
    return found


def _network(identity: Mapping[str, Any], state: Mapping[str, Tensor]) -> StableNet:
    """The whole network of a state dict, whose parameters are named by stage.

    The number of steps is that of the parameters, because the network may have been refined.
    """
    names = {field.name for field in fields(NetworkSpec)}
    given = {key.removeprefix("model."): value for key, value in identity.items()}
    found: dict[str, list[Tensor]] = {}
    for name in sorted((n for n in state if n.startswith("stages.")), key=lambda n: int(n.split(".")[1])):
        found.setdefault(name.split(".", 2)[2], []).append(state[name])
    whole = {
        name: torch.cat(parts) if name.startswith("segments.") else parts[0] for name, parts in found.items()
    }
    steps = [len(whole[f"segments.{k}.bias"]) for k in range(len(given["channels"]))]
    spec = {name: value for name, value in given.items() if name in names} | {"steps": steps, "seed": 0}
    network = StableNet(**spec)
    example = next(iter(whole.values()))
    network.to(example.dtype if example.is_floating_point() else torch.float32)
    network.load_state_dict(whole)
    return network
