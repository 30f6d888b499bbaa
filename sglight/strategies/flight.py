"""What is in flight between two batches: into a checkpoint, and back into the training that goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sglight.gradients import Passage

if TYPE_CHECKING:
    from sglight.strategies.runtime import Runtime


def under_way(runtime: Runtime) -> dict[str, dict[str, Any]]:
    """What is in flight, by stage, in plain containers and tensors."""
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


def take_up(runtime: Runtime, under_way: Mapping[str, dict[str, Any]]) -> None:
    """Have in flight what `under_way` has given."""
    counter = runtime.plan.last if runtime.counter is None else runtime.counter
    if counter in runtime.placement.own:
        runtime.means.load(under_way.get("means", {}), next(runtime.stages.parameters()).device)
    for i in runtime.placement.own:
        found = under_way.get(f"stage_{i}", {})
        runtime.window[i] = deque(_restored(runtime, i, saved) for saved in found.get("passages", []))
        runtime.normalisers[i] = found.get("normaliser", 1.0)
        runtime.sums[i] = found.get("gradients", {})


def take_up_sums(runtime: Runtime) -> None:
    """Give parameters the gradients that `take_up` has found: Lightning clears them before a training begins."""
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
        # Where states are rebuilt, what a stage has entered with is a shape without values.
        entered = None if passage.ends is not None and not any(entered.stride()) else entered.detach()
    return {
        "piece": passage.piece, "batch": passage.batch, "labels": passage.labels, "state": passage.state,
        "normaliser": passage.normaliser, "ends": passage.ends, "entered": entered,
        "weights": None if weights is None else {name: w.detach() for name, w in weights.items()},
        # A view of a channel's memory would be saved with all of it.
        "target": None if target is None else target.clone(),
    }  # fmt: skip
