"""The private parts of TensorBoard that sglight depends on are still there."""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import scalar

from sglight.compat.tensorboard import add_summary, read_scalars


def test_what_a_writer_writes_is_read_up_to_a_damage(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("val/acc", 0.5, 3, walltime=7.0)
        add_summary(writer, scalar("bare", 0.25))
    (path,) = tmp_path.iterdir()
    assert list(read_scalars(path)) == [("val/acc", 3, 7.0, 0.5), ("bare", 0, path_time(path), 0.25)]
    path.write_bytes(path.read_bytes()[:-3])
    assert [each.tag for each in read_scalars(path)] == ["val/acc"]


def path_time(path: Path) -> float:
    """The time of the last scalar, which the clock gave."""
    return list(read_scalars(path))[-1].time
