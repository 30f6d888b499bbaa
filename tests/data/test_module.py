"""A data module inside Lightning: the same batches after any interruption, no warnings, the splits apart."""

import contextlib
import math
import pickle
import warnings

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_lightning.callbacks import ModelCheckpoint
from sklearn.model_selection import train_test_split

from sglight.data.images import DigitsData
from sglight.data.loader import Resident, Streamed
from sglight.data.module import Contents, DataModule, Part, affine, residents, stratified
from sglight.data.planar import PlanarData
from sglight.errors import UserError


class Boring(pl.LightningModule):
    """Notes which batches it is shown."""

    def __init__(self, fail_at: int = -1) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)
        self.seen: list[tuple[int, int, float]] = []
        self.fail_at = fail_at

    def training_step(self, batch, index):
        if len(self.seen) == self.fail_at:
            raise KeyError("on purpose")
        x, y = batch
        self.seen.append((self.current_epoch, index, float(x.double().sum())))
        return torch.nn.functional.cross_entropy(self.linear(x), y)

    def validation_step(self, batch, index):
        x, y = batch
        self.log("val/loss", torch.nn.functional.cross_entropy(self.linear(x), y))

    def test_step(self, batch, index):
        self.validation_step(batch, index)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@contextlib.contextmanager
def warnings_are_errors():
    """Except those about Lightning's own use of other packages, and about these tests' checkpoints."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for text in (
            "Checkpoint directory",
            "Be aware that when using `ckpt_path`",
            "The dirpath has changed",
        ):
            warnings.filterwarnings("ignore", text)
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category)
        yield


def fit(folder, model=None, ckpt=None, data=None, **options):
    model = model or Boring()
    options = {"callbacks": [], "max_epochs": 3, **options}
    trainer = pl.Trainer(
        default_root_dir=folder,
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    with warnings_are_errors():
        trainer.fit(model, data or PlanarData(train_points=200, seed=3), ckpt_path=ckpt)
    return trainer, model


KINDS = {
    "middle of an epoch": {"every_n_train_steps": 3},
    "end of the validation": {"every_n_epochs": 1},
    "end of the epoch": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [1.0, 2])
def test_a_resumed_run_sees_the_batches_of_the_uninterrupted_one(tmp_path, kind, limit):
    callback = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}", **KINDS[kind])
    _, whole = fit(tmp_path, callbacks=[callback], limit_train_batches=limit)
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert checkpoints
    for path in checkpoints:
        done = torch.load(path, weights_only=True)["global_step"]
        _, rest = fit(
            tmp_path, ckpt=path, callbacks=[ModelCheckpoint(tmp_path / "2")], limit_train_batches=limit
        )
        assert rest.seen == whole.seen[done:], path


def test_a_checkpoint_written_after_an_error_repeats_the_batch(tmp_path):
    _, whole = fit(tmp_path)
    broken = Boring(fail_at=6)
    trainer = pl.Trainer(
        default_root_dir=tmp_path, logger=False, accelerator="cpu", enable_progress_bar=False, max_epochs=3
    )
    with pytest.raises(KeyError, match="on purpose"):
        trainer.fit(broken, PlanarData(train_points=200, seed=3))
    trainer.save_checkpoint(tmp_path / "error.ckpt")
    _, rest = fit(tmp_path, ckpt=tmp_path / "error.ckpt", callbacks=[ModelCheckpoint(tmp_path / "2")])
    assert broken.seen + rest.seen == whole.seen


def test_all_stages_of_a_trainer_without_warnings(tmp_path):
    data = PlanarData("peaks", train_points=100)
    model = Boring()
    model.linear = torch.nn.Linear(2, 5)
    trainer, _ = fit(tmp_path, model, data=data)
    with warnings_are_errors():
        trainer.test(model, data, verbose=False)
        trainer.validate(model, data, verbose=False)
    assert {index for _, index, _ in model.seen} == {0, 1}


def test_inputs_are_left_out_where_they_are_not_needed(digits):
    digits.setup("fit")
    labels = DigitsData(seed=1, batch_size=50)
    labels.inputs = False
    labels.setup("fit")
    for (x, y), (nothing, same) in zip(digits.train_dataloader(), labels.train_dataloader(), strict=True):
        assert nothing is None
        assert len(x) == len(y)
        assert torch.equal(y, same)


@pytest.fixture
def digits():
    return DigitsData(seed=1, batch_size=50)


def test_what_a_data_module_tells(digits):
    digits.setup()
    assert digits.shape == (1, 8, 8)
    assert digits.classes == 10
    assert (digits.train_size, digits.val_size, digits.test_size) == (1293, 144, 360)
    batches = list(digits.train_dataloader())
    assert len(batches) == len(digits.train_dataloader()) == math.ceil(1293 / 50)
    x = torch.cat([x for x, _ in batches])
    assert x.shape == (1293, 1, 8, 8)
    assert x.dtype == torch.float32
    assert abs(float(x.mean())) < 0.02
    assert abs(float(x.std()) - 1) < 0.02


def test_the_order_depends_on_seed_and_epoch_alone(digits):
    digits.setup("fit")
    loader = digits.train_dataloader()
    first = [y.tolist() for _, y in loader]
    torch.rand(3)  # the global generator plays no part
    assert [y.tolist() for _, y in digits.train_dataloader()] == first
    loader.sampler.set_epoch(1)
    assert [y.tolist() for _, y in loader] != first
    other = DigitsData(seed=2, batch_size=50)
    other.setup("fit")
    assert [y.tolist() for _, y in other.train_dataloader()] != first


def test_setup_twice_reads_once(digits):
    digits.setup("fit")
    samples = digits.train_dataloader().samples
    digits.setup("fit")
    assert digits.train_dataloader().samples is samples


def test_a_data_module_can_be_sent_to_another_process(digits):
    digits.setup("fit")
    copy = pickle.loads(pickle.dumps(digits))
    assert [y.tolist() for _, y in copy.train_dataloader()] == [
        y.tolist() for _, y in digits.train_dataloader()
    ]


def test_stratified_keeps_the_shares_of_the_classes():
    labels = np.repeat([0, 1, 2], [100, 50, 10])
    kept, held = stratified(labels, 0.2, seed=5, key="k")
    assert sorted([*kept, *held]) == list(range(160))
    assert np.bincount(labels[held]).tolist() == [20, 10, 2]
    again, _ = stratified(labels, 0.2, seed=5, key="k")
    other, _ = stratified(labels, 0.2, seed=6, key="k")
    assert np.array_equal(kept, again)
    assert not np.array_equal(kept, other)


@given(
    labels=st.lists(st.integers(0, 4), min_size=20, max_size=60),
    fraction=st.floats(0.2, 0.6),
    seed=st.integers(0, 2**34),
)
def test_a_split_is_that_of_scikit_learn(labels, fraction, seed):
    labels = np.array(labels + [0, 1, 2, 3, 4] * 2)
    expected = train_test_split(
        np.arange(len(labels)), test_size=fraction, random_state=seed % 2**32, stratify=labels
    )
    for part, rows in zip(stratified(labels, fraction, seed, "k"), expected, strict=True):
        assert np.array_equal(part, np.sort(rows))


@pytest.mark.parametrize(
    ("labels", "fraction", "message"),
    [
        ([0, 0, 0, 1], 0.5, "class 1 has one sample"),
        ([0, 0, 1, 1], 0.1, "too few"),
        ([0, 0, 1, 1], 1.0, "between 0 and 1"),
        ([0, 0, 1, 1], 0.0, "between 0 and 1"),
    ],
)
def test_a_split_that_cannot_be_drawn(labels, fraction, message):
    with pytest.raises(UserError, match=message) as info:
        stratified(np.array(labels), fraction, 0, "dataset.validation_fraction")
    assert "dataset.validation_fraction" in str(info.value)


def part(count: int) -> Part:
    x = np.zeros((count, 1, 2, 2), np.uint8)
    return Part(x, np.arange(count), np.zeros(count, np.int64))


def test_the_memory_limit_says_what_is_streamed():
    parts = {"train": part(100), "val": part(10), "test": part(20)}
    assert residents(parts, 520) == {"train", "val", "test"}
    assert residents(parts, 519) == {"val", "test"}
    assert residents(parts, 100) == {"val"}
    assert residents(parts, 10) == set()


def test_a_part_reads_its_rows():
    x = np.arange(5000 * 4, dtype=np.float64).reshape(5000, 4)
    rows = np.arange(0, 5000, 7)
    assert np.array_equal(Part(x, rows, rows).read().numpy(), x[rows].astype(np.float32))


class Levels(DataModule):
    """Pictures whose level is their number."""

    def open(self):
        x = np.broadcast_to(np.arange(200, dtype=np.uint8)[:, None, None, None], (200, 1, 4, 4))
        y = np.arange(200) % 2
        halves = {"train": np.arange(0, 200, 2), "val": np.arange(1, 200, 4), "test": np.arange(3, 200, 4)}
        return Contents(
            {name: Part(x, rows, y[rows]) for name, rows in halves.items()}, ["a", "b"], [0.0], [1.0]
        )


@pytest.mark.parametrize("limit", [math.inf, 1000 / 2**30])
def test_streamed_and_resident_serve_the_same_samples(limit):
    data = Levels("levels", 16, 16, seed=1, data_seed=0, memory_limit=limit)
    data.setup("fit")
    loader = data.train_dataloader()
    assert isinstance(loader.samples, Streamed if limit < math.inf else Resident)
    levels = torch.cat([x for x, _ in loader])[:, 0, 0, 0] * 255
    assert sorted(levels.round().int().tolist()) == list(range(0, 200, 2))
    val = torch.cat([x for x, _ in data.val_dataloader()])[:, 0, 0, 0] * 255
    assert val.round().int().tolist() == list(range(1, 200, 4))


def test_affine_is_the_normalisation():
    scale, shift = affine([0.5, 0.25], [0.1, 0.0], 3, True, torch.device("cpu"))
    x = torch.full((1, 2, 2, 2), 51.0)
    expected = torch.tensor([(0.2 - 0.5) / 0.1, 0.2 - 0.25]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    torch.testing.assert_close(x * scale + shift, expected)
    assert affine([0.0], [1.0], 1, False, torch.device("cpu")) == (None, None)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"batch_size": 0}, "dataset.batch_size=0"),
        ({"eval_batch_size": -1}, "dataset.eval_batch_size=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"memory_limit": 0.0}, "dataset.memory_limit=0.0"),
        ({"crop_padding": -1}, "dataset.crop_padding=-1"),
        ({"validation_fraction": 0.0}, "dataset.validation_fraction=0.0"),
        ({"validation_fraction": 1.0}, "dataset.validation_fraction=1.0"),
        ({"test_fraction": 0.0}, "dataset.test_fraction=0.0"),
    ],
)
def test_numbers_out_of_range(keys, message):
    with pytest.raises(UserError, match=message):
        DigitsData(**keys)


@pytest.mark.parametrize("padding", [8, 100_000])
def test_a_crop_that_holds_nothing_of_the_picture_is_refused(padding):
    data = DigitsData(augment=True, crop_padding=padding)
    with pytest.raises(UserError, match=rf"dataset\.crop_padding={padding} must be less than .* 8 x 8"):
        data.setup("fit")


def test_a_flip_without_augmentation_is_told():
    assert DigitsData(flip=True).notes == ["dataset.flip=true has no effect without dataset.augment=true"]
    assert DigitsData(flip=True, augment=True).notes == DigitsData().notes == []
