"""Delayed true gradients against plain loops written from the equations, and against backpropagation."""

from __future__ import annotations

from copy import deepcopy
from itertools import pairwise, product
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from sglight.config.pieces import divisor
from sglight.networks import NetworkSpec, StableNet, Stage
from sglight.networks.segment import Segment
from sglight.strategies.backprop import Backprop
from sglight.strategies.delayed import Delayed
from sglight.strategies.schedule import Pipelined
from tests.parallel.training import Resumable
from tests.strategies.common import ADAM, IMAGES, NETWORK, assert_equal, batches, exact_step, fit, whole

DYNAMICS = ("euler", "antisymmetric", "hamiltonian", "leapfrog")
SEGMENTS = {**IMAGES, "shape": (1, 8, 8), "channels": [4, 6], "steps": [3, 3], "opening": "conv"}


def pull_back(stage: Stage, out: Tensor, entered: Tensor, gradient: Tensor) -> Tensor:
    """One step of the inverse after the other, each differentiated on its own by autograd (Rivaud et al. 2025)."""
    (segment,) = stage.segments.values()
    assert isinstance(segment, Segment)
    state = out
    for step, j in zip(reversed(segment.step_functions()), reversed(range(segment.steps)), strict=True):
        one = Segment(
            segment.spec.dynamics, 1, segment.spec.channels, segment.spec.kernel, segment.step_size, seed=0
        ).to(out.dtype)
        one.weight.data, one.bias.data = segment.weight.data[j : j + 1], segment.bias.data[j : j + 1]
        with torch.no_grad():
            state = one.inverse(state)
        below = state.detach().requires_grad_()
        with torch.enable_grad():
            step(below).backward(gradient)
        assert below.grad is not None
        gradient = below.grad
    return gradient


def reference(
    stages: list[Stage],
    data: list[tuple[Tensor, Tensor]],
    m: int,
    slack: int,
    backward: str,
    adam: list[torch.optim.Adam] | None = None,
) -> None:
    """The rounds of all stages in one loop; nothing of `sglight.strategies` is used."""
    last, count = len(stages) - 1, len(data) * m
    delays = [(1 + slack) * (last - i) for i in range(last + 1)]
    adam = adam or [torch.optim.Adam(s.parameters(), lr=1e-2) for s in stages]
    pieces = [p for x, y in data for p in zip(x.tensor_split(m), y.tensor_split(m), strict=True)]
    states: list[dict[int, Tensor]] = [{} for _ in stages]
    gradients: list[dict[int, Tensor]] = [{} for _ in stages]  # with respect to what a stage began with
    kept: list[dict[int, Any]] = [{} for _ in stages]
    for n in range(count + delays[0]):
        for i, stage in enumerate(stages):
            if n < count and len(pieces[n][1]):
                then = deepcopy(stage)
                h = (pieces[n][0] if i == 0 else states[i - 1][n]).detach().requires_grad_(i > 0)
                out = then(h)
                states[i][n], kept[i][n] = out.detach(), (then, h, out)
            k = n - delays[i]
            if not 0 <= k < count:
                continue
            if len(pieces[k][1]):
                then, h, out = kept[i].pop(k)
                if backward == "replayed":
                    then, out = stage, stage(h)
                if i == last:
                    out = F.cross_entropy(out, pieces[k][1], reduction="sum")
                    out.backward()
                elif backward == "rebuilt" and i > 0:
                    h.grad, then = pull_back(stage, states[i][k], h, gradients[i + 1][k]), stage
                else:
                    out.backward(gradients[i + 1][k])
                if i > 0:
                    gradients[i][k] = h.grad
                if then is not stage:
                    for p, q in zip(stage.parameters(), then.parameters(), strict=True):
                        p.grad = q.grad if p.grad is None else p.grad + q.grad
            if k % m == m - 1:
                for p in stage.parameters():
                    assert p.grad is not None
                    p.grad *= 1 / len(data[k // m][1])
                adam[i].step()
                adam[i].zero_grad()


def parts(network: dict[str, Any], cuts: Any) -> list[Stage]:
    return [Stage(NetworkSpec(**network), a, b) for a, b in pairwise(cuts)]


def delayed(network: dict[str, Any] = NETWORK, **options: Any) -> Delayed:
    return Delayed(network, ADAM, **options)


@pytest.mark.parametrize("kind", ["dense", "conv", "segments"])
@pytest.mark.parametrize("backward", ["stashed", "replayed"])
@pytest.mark.parametrize("slack", [0, 1])
@pytest.mark.parametrize("m", [1, 2, 4])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_equals_the_plain_loop_bit_for_bit(stages: int, m: int, slack: int, backward: str, kind: str) -> None:
    network = {"dense": NETWORK, "conv": IMAGES, "segments": SEGMENTS}[kind]
    data = [*batches(4, shape=network["shape"]), *batches(1, size=7, shape=network["shape"], seed=5)]
    module = delayed(network, stages=stages, microbatches=m, slack=slack, backward=backward)
    plain = parts(network, module.cuts)
    reference(plain, data, m, slack, backward)
    fit(module, data)
    for i, stage in enumerate(plain):
        assert_equal(dict(module.stage(i).named_parameters()), dict(stage.named_parameters()))


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_every_dynamics_learns_late(dynamics: str) -> None:
    network = {**NETWORK, "dynamics": dynamics}
    module = delayed(network, stages=3, microbatches=2)
    plain = parts(network, module.cuts)
    reference(plain, batches(6), 2, 0, "stashed")
    fit(module, batches(6))
    for i, stage in enumerate(plain):
        assert_equal(dict(module.stage(i).named_parameters()), dict(stage.named_parameters()))


@pytest.mark.parametrize("dynamics", ["hamiltonian", "leapfrog"])
@pytest.mark.parametrize("kernel", ["dense", "conv"])
@pytest.mark.parametrize("m", [1, 3])
def test_rebuilt_states_are_those_of_the_inverse(m: int, kernel: str, dynamics: str) -> None:
    # The first stage has an opening, whose inputs are replayed: the reference keeps its graph, without delays there.
    network = {**(NETWORK if kernel == "dense" else IMAGES), "dynamics": dynamics}
    stage = Stage(NetworkSpec(**network), 2, 4).double()
    shape = stage.spec.state_shape(2)
    entered = torch.randn(5, *shape, dtype=torch.float64)
    out = stage(entered).detach()
    with torch.no_grad():
        for p in stage.parameters():
            p += 0.01 * torch.randn_like(p)  # an update between the two passes
    gradient = torch.randn_like(out)
    expected = pull_back(stage, out, entered, gradient)
    wanted = [p.grad.clone() for p in stage.parameters() if p.grad is not None]
    stage.zero_grad()
    (segment,) = stage.segments.values()
    placeholder = out.new_empty(()).expand(out.shape).requires_grad_()
    segment.rebuilt(placeholder, out).backward(gradient)  # type: ignore[operator]
    assert placeholder.grad is not None
    torch.testing.assert_close(placeholder.grad, expected, rtol=1e-10, atol=1e-12)
    for p, value in zip(stage.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["dense", "conv", "segments"])
@pytest.mark.parametrize("norm", ["none", "group"])
def test_without_a_delay_rebuilt_and_replayed_are_backprop(kind: str, norm: str) -> None:
    network = {"dense": NETWORK, "conv": IMAGES, "segments": SEGMENTS}[kind]
    network = {**network, "normalisation": norm, "groups": 1, "dynamics": "hamiltonian"}
    data = batches(5, shape=network["shape"])
    reference_module = Backprop(network, {**ADAM, "lr": 1e-3})
    fit(reference_module, data, precision="64-true")
    for backward in ("rebuilt", "replayed"):
        module = Delayed(network, {**ADAM, "lr": 1e-3}, stages=1, microbatches=3, backward=backward)
        fit(module, data, precision="64-true")
        for name, value in whole(module).items():
            torch.testing.assert_close(value, whole(reference_module)[name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("backward", ["stashed", "replayed", "rebuilt"])
def test_each_learns(backward: str) -> None:
    data = batches(4, size=8)
    module = Delayed(
        {**NETWORK, "channels": 16}, {"name": "adam", "lr": 2e-2}, stages=3, microbatches=4, backward=backward
    )
    trainer = fit(module, data, epochs=30, log_every_n_steps=1)
    assert trainer.callback_metrics["train/loss"] < 0.5 * torch.log(torch.tensor(4.0))


@pytest.mark.parametrize("m", [1, 2, 3, 5])
@pytest.mark.parametrize("slack", [0, 1])
@pytest.mark.parametrize("stages", [2, 3, 5])
def test_staleness_is_as_the_formula_says(stages: int, slack: int, m: int) -> None:
    schedule, last = Pipelined(m, slack), stages - 1
    for i in range(stages):
        late = (1 + slack) * (last - i)
        for j in range(m):
            piece = 20 * m + j  # in full swing
            assert schedule.staleness(i, piece, last) == ceil(max(0, late - j) / m)


@pytest.mark.parametrize("m", [1, 2, 4])
@pytest.mark.parametrize("stages", [2, 4])
def test_with_a_flush_it_is_backpropagation_with_the_same_pieces(stages: int, m: int) -> None:
    last, schedule = stages - 1, Pipelined(m, flushes=True)
    for batch in range(3):
        done: list[Any] = []
        for n in range(batch * m, batch * m + m):
            done += schedule.actions(n, range(stages), last)
        for i in range(stages):
            mine = [a for a in done if a.stage == i]
            pieces = list(range(batch * m, batch * m + m))
            assert [a.piece for a in mine if a.kind == "forward"] == pieces
            assert [a.piece for a in mine if a.kind == "backward"] == pieces
            assert mine[-1] == ("update", i, pieces[-1])


def test_the_pipeline_drains_at_the_end_of_an_epoch() -> None:
    module = delayed(stages=4, microbatches=2)
    trainer = fit(module, batches(5), epochs=2)
    assert not any(module.runtime.window.values())
    assert trainer.global_step == 10
    for optimizer in trainer.optimizers:
        assert {int(state["step"]) for state in optimizer.state.values()} == {10}


def test_a_training_that_ends_in_mid_epoch_drains_too() -> None:
    module = delayed(stages=3, microbatches=2)
    trainer = fit(module, batches(8), epochs=1, max_steps=5)
    assert not any(module.runtime.window.values()) and trainer.global_step == 5
    plain = parts(NETWORK, module.cuts)
    reference(plain, batches(8)[:5], 2, 0, "stashed")
    for i, stage in enumerate(plain):
        assert_equal(dict(module.stage(i).named_parameters()), dict(stage.named_parameters()))


def test_a_validation_in_mid_epoch_leaves_the_pipeline_alone() -> None:
    runs = [delayed(stages=3, microbatches=2) for _ in range(2)]
    fit(runs[0], batches(6))
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, val_check_interval=2, num_sanity_val_steps=0,
    )  # fmt: skip
    loader = [DataLoader(batches(n, seed=s), batch_size=None) for n, s in ((6, 0), (2, 1))]  # type: ignore[arg-type]
    trainer.fit(runs[1], *loader)
    assert_equal(runs[1].state_dict(), runs[0].state_dict())


def test_each_update_has_the_rate_of_its_number() -> None:
    scheduler = {"name": "cosine", "min_factor": 0.1}
    sgd = {"name": "sgd", "lr": 0.5, "momentum": 0.0}
    seen: dict[int, list[float]] = {0: [], 1: [], 2: []}

    class Watched(Delayed):
        def step_stage(self, i: int) -> None:
            seen[i].append(self.trainer.optimizers[i].param_groups[0]["lr"])
            super().step_stage(i)

    fit(Watched(NETWORK, sgd, stages=3, microbatches=1, scheduler=scheduler), batches(6))
    assert seen[0] == seen[1] == seen[2] and len(set(seen[0])) == 6


@pytest.mark.parametrize("moments", ["reset", "keep"])
@pytest.mark.parametrize("m", [1, 3])
def test_a_warm_start_is_backprop_and_then_late(m: int, moments: str) -> None:
    """Three of twelve batches exact, by plain autograd through all stages, then the loop of late gradients."""
    data = batches(12)
    module = delayed(stages=3, microbatches=m, exact_epochs=0.25, moments=moments)
    plain = parts(NETWORK, module.cuts)
    adam = [torch.optim.Adam(s.parameters(), lr=1e-2) for s in plain]
    for x, y in data[:3]:
        exact_step(plain, adam, x, y, m)
    reference(plain, data[3:], m, 0, "stashed", adam=adam if moments == "keep" else None)
    fit(module, data)
    for i, stage in enumerate(plain):
        assert_equal(dict(module.stage(i).named_parameters()), dict(stage.named_parameters()))


@pytest.mark.parametrize("backward", ["stashed", "replayed", "rebuilt"])
@pytest.mark.parametrize(("m", "slack"), [(1, 0), (2, 1), (3, 0)])
def test_resuming_in_mid_epoch_ends_bit_identical(m: int, slack: int, backward: str, tmp_path: Path) -> None:
    network = {**IMAGES, "opening": "conv", "opening_normalisation": "batch"}
    # Exact gradients until in the second epoch: resumed before, at and behind the change.
    options: dict[str, Any] = {"stages": 3, "microbatches": m, "slack": slack, "backward": backward}
    options["exact_epochs"] = 6 / 7

    def train(ckpt: Path | None = None) -> Delayed:
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        trainer = pl.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[] if ckpt else [saver], enable_checkpointing=not ckpt,
        )  # fmt: skip
        data = Resumable(batches(7, shape=(1, 6, 6)))
        data.trainer = trainer
        module = delayed(network, **options, scheduler={"name": "cosine", "min_factor": 0.0})
        trainer.fit(module, data, ckpt_path=ckpt, weights_only=True)
        return module

    straight = train()
    for step in (3, 6, 9, 12):
        resumed = train(tmp_path / f"step={step}.ckpt")
        assert_equal(resumed.state_dict(), straight.state_dict())


def test_batch_normalisation_sees_each_piece_once() -> None:
    network = {**IMAGES, "normalisation": "batch"}
    module = delayed(network, stages=2, microbatches=2, backward="replayed")
    fit(module, batches(4, shape=(1, 6, 6)))
    expected = StableNet(**network)
    segment, ours = expected.segments["0"], module.stage(0).segments["0"]
    x = batches(4, shape=(1, 6, 6))[0][0]
    assert segment.running_mean.shape[1:] == ours.running_mean.shape[1:]  # type: ignore[union-attr]
    seen = delayed(network, stages=2, microbatches=2)
    fit(seen, batches(1, shape=(1, 6, 6)))
    expected.train()
    for piece in x.tensor_split(2):
        expected(piece)
    torch.testing.assert_close(
        seen.stage(0).segments["0"].running_mean,
        segment.running_mean[: seen.cuts[1]],  # type: ignore[index]
    )


def test_class_weights_and_pieces_make_one_mean() -> None:
    options = {"loss": {"class_weights": [0.5, 1.0, 2.0, 4.0]}}
    runs = [Backprop(NETWORK, ADAM, **options), delayed(stages=1, microbatches=4, **options)]
    for module in runs:
        fit(module, batches(6), precision="64-true")
    for name, value in whole(runs[1]).items():
        torch.testing.assert_close(value, whole(runs[0])[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("samples", "delay", "pieces"),
    [(128, 1, 1), (128, 3, 4), (128, 7, 8), (127, 3, 3), (None, 3, 3), (12, 5, 6), (8, 0, 1)],
)
def test_the_default_number_of_microbatches(samples: int | None, delay: int, pieces: int) -> None:
    assert divisor(samples, delay) == pieces


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backward": "again"}, r"strategy\.backward=again is unknown"),
        ({"slack": 2}, r"strategy\.slack=2 is not allowed"),
        ({"microbatches": 0}, r"strategy\.microbatches=0 must be at least 1"),
        ({"stages": 7}, r"strategy\.stages=7 .*model\.steps"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        delayed(**options)


def test_what_cannot_be_rebuilt_says_why() -> None:
    with pytest.raises(ValueError, match=r"strategy\.backward=rebuilt needs a dynamics with an inverse"):
        delayed({**NETWORK, "dynamics": "euler"}, backward="rebuilt")
    with pytest.raises(
        ValueError, match=r"strategy\.backward=rebuilt does not go with model\.normalisation=batch"
    ):
        delayed({**IMAGES, "normalisation": "batch"}, backward="rebuilt")


def test_nadam_leans_on_momentum_where_gradients_are_late() -> None:
    nadam = {"name": "nadam", "lr": 1e-3}
    runs = {
        exact: Delayed(NETWORK, nadam, stages=3, microbatches=1, exact_epochs=exact) for exact in (0, 0.5, 9)
    }
    for exact, module in runs.items():
        trainer = fit(module, batches(6))
        first = [optimizer.param_groups[0]["betas"][0] for optimizer in trainer.optimizers]
        assert first == pytest.approx([0.9, 0.9, 0.9] if exact == 9 else [0.99, 0.945, 0.9])


def tensors_of(passage: Any) -> list[Tensor]:
    parts = (passage.entered, passage.state, passage.target, *(passage.ends or ()))
    return [part for part in parts if part is not None]


def test_what_rebuilt_keeps_does_not_grow_with_depth() -> None:
    kept = {}
    for steps in (4, 64):
        network = {**NETWORK, "dynamics": "hamiltonian", "steps": steps}
        module = Delayed(network, ADAM, stages=2, microbatches=2, backward="rebuilt")
        seen: list[int] = []

        class Look(pl.Callback):
            def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
                (passage, *_) = module.runtime.window[0] or (None,)
                if passage is not None:
                    assert passage.output is None
                    stores = {
                        t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors_of(passage)
                    }
                    seen.append(sum(store.nbytes() for store in stores.values()))  # noqa: B023

        fit(module, batches(4), callbacks=[Look()])
        kept[steps] = seen
    assert kept[4] == kept[64] and kept[4]


@pytest.mark.parametrize("slack", [0, 1])
@pytest.mark.parametrize("flushes", [False, True])
def test_no_deadlock_with_bounded_channels(slack: int, flushes: bool) -> None:
    """Workers that stand still at a full channel, as at an empty one, all come to the end."""
    for stages, m in product(range(2, 7), (1, 2, 3, 5)):
        schedule = Pipelined(m, slack, flushes)
        for workers in range(2, stages + 1):
            bounds = [stages * w // workers for w in range(workers + 1)]
            groups = [range(a, b) for a, b in pairwise(bounds)]
            assert all_end(schedule, groups, stages - 1, room=slack + 2), (stages, m, workers)


def all_end(schedule: Pipelined, groups: list[range], last: int, room: int) -> bool:
    rounds, count = range(4 * schedule.pieces), 4 * schedule.pieces
    left = [
        [a for n in rounds for a in schedule.actions(n, own, last)]
        + [a for rest in schedule.rest(count, own, last) for a in rest]
        for own in groups
    ]
    states, gradients = dict.fromkeys(range(last), 0), dict.fromkeys(range(last), 0)

    def act(action: Any) -> bool:
        i = action.stage
        if action.kind == "forward":
            takes, gives, source, target = i > 0, i < last, (states, i - 1), (states, i)
        elif action.kind == "backward":
            takes, gives, source, target = i < last, i > 0, (gradients, i), (gradients, i - 1)
        else:
            return True
        if (takes and not source[0][source[1]]) or (gives and target[0][target[1]] == room):
            return False
        if takes:
            source[0][source[1]] -= 1
        if gives:
            target[0][target[1]] += 1
        return True

    moved = True
    while moved:
        moved = False
        for actions in left:
            while actions and act(actions[0]):
                actions.pop(0)
                moved = True
    return not any(left)
