"""What a machine has, found out without torch."""

from pathlib import Path

import pytest

from sglight.config import machine
from sglight.config.machine import check_devices, gpus, processor, without_cuda
from sglight.errors import UserError

TRAINER = {"accelerator": "gpu", "devices": 2, "share_devices": False}


def test_the_devices_of_gpus_are_counted(tmp_path: Path) -> None:
    assert gpus(tmp_path) == 0
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert gpus(tmp_path) == 2
    (tmp_path / "kfd").touch()
    assert gpus(tmp_path) is None


@pytest.mark.parametrize(
    ("found", "changes", "message"),
    [
        (0, {}, "no GPU; use trainer.accelerator=cpu"),
        (0, {"accelerator": "cuda", "devices": 1}, "no GPU"),
        (1, {}, r"1 GPU\(s\).*share_devices"),
        (2, {"accelerator": "mps"}, "mps is for Apple"),
    ],
)
def test_missing_gpus_are_refused(monkeypatch, found, changes, message):
    monkeypatch.setattr(machine, "gpus", lambda: found)
    monkeypatch.setattr(machine, "without_cuda", lambda: False)
    with pytest.raises(UserError, match=message):
        check_devices({**TRAINER, **changes})


@pytest.mark.parametrize(
    ("found", "changes"),
    [
        (2, {}),
        (1, {"share_devices": True}),
        (None, {}),
        (0, {"accelerator": "auto"}),
        (0, {"accelerator": "cpu"}),
    ],
)
def test_what_may_be_there_is_left_to_torch(monkeypatch, found, changes):
    monkeypatch.setattr(machine, "gpus", lambda: found)
    monkeypatch.setattr(machine, "without_cuda", lambda: False)
    check_devices({**TRAINER, **changes})


def test_whether_torch_is_built_for_gpus_is_read_as_torch_says_it():
    import torch

    assert without_cuda() == (torch.version.cuda is None and torch.version.hip is None)


def test_the_processor_has_a_name_and_cores():
    assert processor().endswith(("core", "cores")) and len(processor()) > len(", 1 core")
