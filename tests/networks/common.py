"""What several tests of this folder need."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sglight.networks import Segment, StableNet, Stage

DYNAMICS = ("euler", "antisymmetric", "hamiltonian", "leapfrog")
KERNELS = ("dense", "conv")
REVERSIBLE = ("hamiltonian", "leapfrog")


def make_segment(dynamics: str, kernel: str = "dense", **options) -> Segment:
    """A small float64 segment with biases and norms that are not at their initial values."""
    settings = {"steps": 5, "channels": 4, "horizon": 1.3, "groups": 2, "seed": 3, **options}
    segment = Segment(dynamics, kernel=kernel, **settings).double()
    draw = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in segment.named_parameters():
            if name != "weight":
                parameter += 0.3 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
    return segment


def make_state(segment: Segment, batch: int = 3, size: tuple[int, int] = (5, 6), seed: int = 5) -> Tensor:
    """A random state that fits."""
    width = segment.dynamics.fields * segment.spec.channels
    shape = (batch, width) if segment.spec.kernel == "dense" else (batch, width, *size)
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=segment.weight.dtype)


def gradients(run: Callable[[Tensor], Tensor], state: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """Of a fixed, uneven functional of ``run(state)``, with respect to the state and the parameters."""
    state = state.detach().clone().requires_grad_()
    out = run(state)
    uneven = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    return list(torch.autograd.grad((uneven * out).sum() + 0.5 * out.square().sum(), [state, *parameters]))


def relative(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((a - b).detach().norm() / b.detach().norm().clamp_min(1e-300))


def whole_and_stages(
    net: StableNet, stages: list[Stage], x: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Logits and parameter gradients of the network, and of its stages in turn with detached cuts."""
    net.zero_grad(set_to_none=True)
    logits = net(x)
    F.cross_entropy(logits, labels).backward()
    expected = {name: p.grad for name, p in net.named_parameters()}
    inputs, outputs = [], []
    for stage in stages:
        inputs.append((outputs[-1] if outputs else x).detach().requires_grad_())
        outputs.append(stage(inputs[-1]))
    F.cross_entropy(outputs[-1], labels).backward()
    for after, before in pairwise(reversed(range(len(stages)))):
        outputs[before].backward(inputs[after].grad)
    pieces: dict[str, list[Tensor]] = {}
    for stage in stages:
        for name, p in stage.named_parameters():
            pieces.setdefault(name, []).append(p.grad)
    return logits, outputs[-1], expected, {name: torch.cat(grads) for name, grads in pieces.items()}


class Living(TorchDispatchMode):
    """Counts the bytes of tensors made inside it and still alive; ``peak`` is the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {id(t.untyped_storage()) for t in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if id(storage) not in known and id(storage) not in self.seen:
                self._count(storage)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), id(storage)
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone() -> None:
            self.now -= size
            self.seen.discard(key)

        weakref.finalize(storage, gone)


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes of what autograd keeps of ``run()`` for the backward pass, each storage once."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in storages.values())


def _tensors(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
