"""The stability callback looks at the network of that moment, from outside, wherever its stages are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sglight.callbacks.stability import StabilityMonitor, assembled, measures
from sglight.link import Alone, Placement
from sglight.networks import StableNet
from sglight.networks.stability import Stability, StepSpectrum, analyse
from sglight.strategies.dni import DNI
from tests.callbacks.common import NETWORK, data, fit
from tests.strategies.common import ADAM, assert_equal, whole


class Rank(Alone):
    """Worker ``rank`` of two, whose partner says ``other``."""

    def __init__(self, rank: int, other: Any = None) -> None:
        self.rank, self.size, self.other = rank, 2, other

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other] if self.rank == 0 else []


def test_it_logs_every_step_and_draws(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name=None, version="")
    monitor = StabilityMonitor(tmp_path / "figures", every_n_epochs=2)
    fit([monitor], tmp_path, epochs=5, logger=logger)
    events = EventAccumulator(str(tmp_path)).Reload()
    kinds = ("sigma_max", "sigma_min", "spectral_radius", "state_norm", "gradient_norm")
    of_steps = {f"stability/step_{j}/{kind}" for j in range(4) for kind in kinds}
    of_all = {"stability/growth", "stability/flow_sigma_max", "stability/reversal_error"}
    found = {tag for tag in events.Tags()["scalars"] if tag.startswith("stability/")}
    assert found == of_steps | of_all
    for tag in found:
        assert [event.step for event in events.Scalars(tag)] == [5, 11]  # the last batches of epochs 2 and 4
    assert [event.step for event in events.Images("figures/stability")] == [6, 12]
    assert imread(tmp_path / "figures/stability.png")[..., :3].std() > 0.05
    assert monitor.metrics().keys() == of_all


def test_what_it_finds_is_true_of_the_network_as_it_is_then(tmp_path: Path) -> None:
    monitor = StabilityMonitor(tmp_path, samples=1000)
    trainer = fit([monitor], tmp_path, epochs=1)
    planar = data()
    planar.setup("fit")
    x, labels = next(iter(planar.val_dataloader()))
    network = StableNet(**vars(trainer.lightning_module.spec)).eval()
    network.load_state_dict(whole(trainer.lightning_module))
    assert monitor.latest == analyse(network, x, labels)


@pytest.mark.parametrize("options", [{"normalisation": "batch"}, {"dynamics": "leapfrog"}], ids=str)
def test_it_does_not_change_the_training(tmp_path: Path, options: dict[str, Any]) -> None:
    states = []
    for callbacks in ([], [StabilityMonitor(tmp_path)]):
        torch.manual_seed(0)
        module = fit(list(callbacks), tmp_path, **options).lightning_module
        states.append({**module.state_dict(), "random": torch.get_rng_state()})
        assert all(parameter.grad is None for parameter in module.stages.parameters())
    assert_equal(*states)


def test_a_refined_network_has_more_steps(tmp_path: Path) -> None:
    logger, monitor = TensorBoardLogger(tmp_path, name=None, version=""), StabilityMonitor(tmp_path)
    fit([monitor], tmp_path, levels=2, logger=logger)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("stability/step_1/sigma_max")] == [2, 5]
    assert [event.step for event in events.Scalars("stability/step_3/sigma_max")] == [5]


def test_a_dev_run_writes_nothing(tmp_path: Path) -> None:
    monitor = StabilityMonitor(tmp_path / "figures")
    fit([monitor], tmp_path, fast_dev_run=True)
    assert not (tmp_path / "figures").exists()
    assert monitor.metrics() == {}


def built(**options: Any) -> DNI:
    module = DNI({**NETWORK, **options}, ADAM, stages=3)
    module.configure_model()
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stages_are_put_together_wherever_they_are(dtype: torch.dtype) -> None:
    alone = built(normalisation="batch").to(dtype)
    with torch.no_grad():
        for value in (*alone.parameters(), *alone.buffers()):
            value.copy_(torch.rand_like(value) + 0.5)
    there = {i: stage.state_dict() for i, stage in alone.own_stages() if i > 0}
    copy = assembled(alone)
    first = built(normalisation="batch").to(dtype)
    first.load_state_dict(alone.state_dict())
    first.place(Placement(range(1), {}, {}, Rank(0, there), Alone()))
    joined = assembled(first)
    assert copy is not None and joined is not None
    x = torch.randn(5, 2, dtype=dtype)
    assert torch.equal(copy(x), alone.eval()(x))
    assert_equal(copy.state_dict(), joined.state_dict())
    with torch.no_grad():
        alone.stage(1).segments["0"].weight.zero_()  # type: ignore[operator, union-attr]
    assert torch.equal(copy(x), joined(x)), "a copy, no view"
    second = built()
    second.place(Placement(range(1, 3), {}, {}, Rank(1), Alone()))
    assert assembled(second) is None


def test_what_there_is_not_has_no_name() -> None:
    step = StepSpectrum(2.0)
    found = measures(Stability([step], [1.0, 3.0], [4.0, 5.0], [1.0, 1.5], 2.0, None))
    assert found == {
        "stability/growth": 1.5,
        "stability/flow_sigma_max": 2.0,
        "stability/step_0/sigma_max": 2.0,
        "stability/step_0/state_norm": 3.0,
        "stability/step_0/gradient_norm": 5.0,
    }
