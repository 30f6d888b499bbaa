"""The loss that is minimised: a sum over samples, and the number by which it is divided for the mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sglight.config.extension import load_class


class Loss:
    """The loss of logits ``[B, classes]`` and labels ``[B]``. Its mean is `total` / `normaliser`.

    What flows through the network is the gradient of the sum, into however many pieces a batch is split. The gradients
    of parameters are divided by the normaliser of the whole batch.

    Args:
        name: ``cross_entropy``; ``mse``, the squared error of the logits against one-hot labels; or
            ``package.module.Class``, a torch loss that takes ``reduction="sum"`` and is called with logits and labels.
        label_smoothing: of the cross-entropy, from 0 to less than 1 (Szegedy et al. 2016, section 7).
        class_weights: of the cross-entropy, one for each class; the mean is weighted then, as in torch.
        kwargs: arguments of a class that is given by its path.

    Raises:
        ValueError: for a loss that does not exist, or settings that it does not have; the text names the key.

    >>> loss = Loss("mse")
    >>> loss.total(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]))
    tensor(4.)
    """

    def __init__(
        self,
        name: str = "cross_entropy",
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if "." not in name and name not in ("cross_entropy", "mse"):
            raise ValueError(
                f"strategy.loss.name={name} is unknown; choose cross_entropy, mse or package.module.Class"
            )
        if name != "cross_entropy":
            for key, value in (("label_smoothing", label_smoothing), ("class_weights", class_weights)):
                if value:
                    raise ValueError(
                        f"strategy.loss.{key}={value} is for strategy.loss.name=cross_entropy, not {name}; leave it out"
                    )
        if kwargs and "." not in name:
            raise ValueError(f"strategy.loss.kwargs is for package.module.Class, not {name}; leave it out")
        self.name, self.label_smoothing = name, label_smoothing
        self._weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self._module: Any = None
        if "." in name:
            kind: Any = load_class(name, "strategy.loss.name", nn.Module)
            try:
                self._module = kind(**{**dict(kwargs or {}), "reduction": "sum"})
            except TypeError as error:
                raise ValueError(f"strategy.loss.name={name} cannot be made: {error}") from error

    def check(self, classes: int) -> None:
        """Refuse class weights for another number of classes.

        Raises:
            ValueError: that names the key.
        """
        if self._weights is not None and len(self._weights) != classes:
            raise ValueError(
                f"strategy.loss.class_weights has {len(self._weights)} entries, but there are {classes} classes; "
                "give one a class"
            )

    def total(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss summed over the samples."""
        if self._module is not None:
            return self._module(logits, labels)
        if self.name == "mse":
            return F.mse_loss(logits, F.one_hot(labels, logits.shape[1]).to(logits.dtype), reduction="sum")
        weights = None if self._weights is None else self._weights.to(logits.device, logits.dtype)
        return F.cross_entropy(logits, labels, weights, reduction="sum", label_smoothing=self.label_smoothing)

    def normaliser(self, labels: Tensor) -> float:
        """The number by which `total` is divided for the mean: of samples, or the sum of their class weights."""
        if self._weights is None:
            return len(labels)
        return float(self._weights[labels.cpu()].sum())

    def describe(self) -> str:
        """A short description; empty for the plain cross-entropy."""
        extras = [f"label smoothing {self.label_smoothing:g}"] if self.label_smoothing else []
        extras += ["class weights"] if self._weights is not None else []
        return (
            ", ".join([self.name.replace("_", "-"), *extras])
            if extras or self.name != "cross_entropy"
            else ""
        )
