"""Writes microbatches that are in flight between two batches into a checkpoint, and reads them when a run resumes."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sglight.gradients import Passage
from sglight.link import Replicas
from sglight.strategies.evaluation import RunningMeans

if TYPE_CHECKING:
    from sglight.strategies.runtime import Runtime

# Fields of a passage with a row for each sample.
BY_SAMPLE = ("labels", "state", "entered", "target")


def state(runtime: Runtime) -> dict[str, dict[str, Any]]:
    """What is in flight, by stage, as plain containers and tensors."""
    runtime.collect()
    found = {f"stage_{i}": found for i in runtime.placement.own if (found := _of_stage(runtime, i))}
    means = runtime.means.state()  # on one worker
    return {**found, "means": means} if means else found


def _of_stage(runtime: Runtime, i: int) -> dict[str, Any]:
    passages = [_saved(passage) for passage in runtime.window[i]]
    gradients = {
        name: p.grad.clone() for name, p in runtime.stage(i).named_parameters() if p.grad is not None
    }
    if not passages and not gradients:
        return {}
    return {"passages": passages, "gradients": gradients, "normaliser": runtime.normalisers.get(i, 1.0)}


def joined(replicas: Sequence[Mapping[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The state of the pipeline without replicas, from those that `state` returned at the replicas, in order.

    Gradients are summed, and those of each replica are also kept, as ``shares``: a training that continues with the
    same number of replicas then adds them up in the same order, with the same rounding errors.
    """
    if len(replicas) == 1:
        return dict(replicas[0])
    found = {}
    for key in sorted({key for part in replicas for key in part}):
        parts = [part.get(key, {}) for part in replicas]
        found[key] = RunningMeans.joined(parts) if key == "means" else _joined_stage(parts)
    return found


def _joined_stage(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    known = [part for part in parts if part]
    pieces = sorted({passage["piece"] for part in known for passage in part["passages"]})
    shares = [part.get("gradients", {}) for part in parts]
    names = dict.fromkeys(name for share in shares for name in share)
    return {
        "passages": [
            _joined_piece([p for part in known for p in part["passages"] if p["piece"] == n]) for n in pieces
        ],
        "gradients": {name: sum(share[name] for share in shares if name in share) for name in names},
        "shares": shares,
        "normaliser": known[0]["normaliser"],
    }


def _joined_piece(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A piece of a batch in a stage, from the parts that the replicas have."""
    whole = dict(parts[0])
    for name in BY_SAMPLE:
        if whole[name] is not None:
            whole[name] = torch.cat([part[name] for part in parts])
    if whole["ends"] is not None:
        whole["ends"] = [torch.cat(ends) for ends in zip(*(part["ends"] for part in parts), strict=True)]
    return whole


def _shared_piece(whole: Mapping[str, Any], replicas: Replicas) -> dict[str, Any]:
    """The part of a piece for this replica."""

    def share(tensor: Tensor) -> Tensor:
        return replicas.share(tensor).clone()

    part = dict(whole)
    part |= {name: share(whole[name]) for name in BY_SAMPLE if whole[name] is not None}
    part["ends"] = None if whole["ends"] is None else [share(end) for end in whole["ends"]]
    return part


def restore(runtime: Runtime, state: Mapping[str, dict[str, Any]]) -> None:
    """Restores what `state` returned."""
    counter = runtime.plan.last if runtime.counter is None else runtime.counter
    replicas = runtime.placement.replicas
    if counter in runtime.placement.own and replicas.rank == 0:
        runtime.means.load(state.get("means", {}), next(runtime.stages.parameters()).device)
    for i in runtime.placement.own:
        found = state.get(f"stage_{i}", {})
        passages, gradients = found.get("passages", []), found.get("gradients", {})
        runtime.totals |= {saved["batch"]: saved["normaliser"] for saved in passages}
        if replicas.size > 1:
            passages = [_shared_piece(saved, replicas) for saved in passages]
            gradients = _share_of_sums(found, replicas)
        runtime.window[i] = deque(_restored(runtime, i, saved) for saved in passages if len(saved["labels"]))
        runtime.normalisers[i] = found.get("normaliser", 1.0)
        runtime.sums[i] = gradients


def _share_of_sums(found: Mapping[str, Any], replicas: Replicas) -> dict[str, Tensor]:
    """The gradients with which this replica continues.

    They are its own if the checkpoint has as many replicas; otherwise the first replica gets the sum, and others none.
    """
    shares = found.get("shares", [])
    if len(shares) == replicas.size:
        return dict(shares[replicas.rank])
    return dict(found.get("gradients", {})) if replicas.rank == 0 else {}


def restore_sums(runtime: Runtime) -> None:
    """Gives parameters the gradients that `restore` has read, because Lightning clears them before a training."""
    for i, gradients in runtime.sums.items():
        for name, gradient in gradients.items():
            parameter = runtime.stage(i).get_parameter(name)
            parameter.grad = gradient.to(parameter)
    runtime.sums.clear()


def _restored(runtime: Runtime, i: int, saved: Mapping[str, Any]) -> Passage:
    passage = Passage(output=None, **saved)
    if passage.ends is not None and passage.entered is None:
        shape = runtime.plan.boundary_shape(i - 1, len(passage.labels))
        passage.entered = passage.state.new_empty(()).expand(shape)
    if passage.weights is not None:
        passage.weights = {name: value.requires_grad_() for name, value in passage.weights.items()}
    if passage.entered is not None and i > 0 and runtime.plan.source.wants(passage.batch):
        passage.entered.requires_grad_()
    return passage


def _saved(passage: Passage) -> dict[str, Any]:
    entered, weights, target = passage.entered, passage.weights, passage.target
    if entered is not None:
        # If states are rebuilt, the input of a stage is a shape without values.
        entered = None if passage.ends is not None and not any(entered.stride()) else entered.detach()
    return {
        "piece": passage.piece, "batch": passage.batch, "labels": passage.labels, "state": passage.state,
        "normaliser": passage.normaliser, "ends": passage.ends, "entered": entered,
        "weights": None if weights is None else {name: w.detach() for name, w in weights.items()},
        # Cloned, because a view of a channel's memory would be saved with all of that memory.
        "target": None if target is None else target.clone(),
    }  # fmt: skip
