"""torchvision's sets from files at hand, the download that fails, the digits."""

import gzip
import pickle
import socket
import time
import urllib.request

import numpy as np
import pytest
import torch

from sglight.data.images import DigitsData, TorchvisionData, read_idx
from sglight.data.store import Store
from sglight.errors import UserError


def served(loader):
    return torch.cat([x for x, _ in loader]), torch.cat([y for _, y in loader])


@pytest.mark.parametrize("given", [".", "MNIST/raw"])
def test_mnist_from_files_at_hand(raw_mnist, tmp_path, given):
    before = sorted(raw_mnist.rglob("*"))
    data = TorchvisionData(
        "mnist", str(tmp_path / "data"), raw_dir=str(raw_mnist / given), validation_fraction=0.2
    )
    data.prepare_data()
    data.setup()
    assert data.shape == (1, 28, 28)
    assert data.class_names == list("0123456789")
    assert (data.train_size, data.val_size, data.test_size) == (48, 12, 20)
    x, y = served(data.test_dataloader())
    raw = read_idx(raw_mnist / "MNIST/raw/t10k-images-idx3-ubyte", 3)
    expected = (torch.from_numpy(raw.copy())[:, None] / 255 - data.mean[0]) / data.std[0]
    torch.testing.assert_close(x, expected, atol=1e-5, rtol=0)
    assert y.tolist() == [number % 10 for number in range(20)]
    assert sorted(raw_mnist.rglob("*")) == before


def test_packed_files_and_the_torchvision_layout_agree(raw_mnist, tmp_path):
    plain = raw_mnist / "MNIST" / "raw"
    packed = tmp_path / "elsewhere"
    packed.mkdir()
    for file in plain.iterdir():
        (packed / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    stores = []
    for folder in (plain, packed):
        data = TorchvisionData("mnist", str(tmp_path / "data"), raw_dir=str(folder))
        data.prepare_data()
        stores.append(Store(data.store_path))
    assert stores[0].path != stores[1].path
    assert stores[0].attributes["checksum"] == stores[1].attributes["checksum"]


@pytest.mark.parametrize("inside", [False, True])
def test_the_names_that_kaggle_gave_them(raw_mnist, tmp_path, inside):
    original = TorchvisionData("mnist", str(tmp_path / "data"), raw_dir=str(raw_mnist))
    original.prepare_data()
    folder = tmp_path / "kaggle"
    for file in (raw_mnist / "MNIST" / "raw").iterdir():
        name = file.name.replace("-idx", ".idx")
        target = folder / file.name / file.name if inside else folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    data = TorchvisionData("mnist", str(tmp_path / "data"), raw_dir=str(folder))
    data.prepare_data()
    checksums = [Store(each.store_path).attributes["checksum"] for each in (original, data)]
    assert checksums[0] == checksums[1]


def test_changed_files_are_imported_anew(raw_mnist, tmp_path):
    def checksum():
        data = TorchvisionData("mnist", str(tmp_path / "data"), raw_dir=str(raw_mnist))
        data.prepare_data()
        return Store(data.store_path).attributes["checksum"]

    first = checksum()
    file = raw_mnist / "MNIST/raw/train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    assert checksum() != first


@pytest.mark.parametrize("damage", ["short", "missing", "foreign", "labels"])
def test_damaged_files_are_named(raw_mnist, tmp_path, damage):
    file = raw_mnist / "MNIST/raw/t10k-images-idx3-ubyte"
    if damage == "short":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "missing":
        file.unlink()
    elif damage == "foreign":
        file.write_bytes(b"<html>")
    else:
        file = raw_mnist / "MNIST/raw/train-labels-idx1-ubyte"
        file.write_bytes(file.read_bytes()[:4] + (50).to_bytes(4, "big") + bytes(50))
    data = TorchvisionData("mnist", str(tmp_path / "data"), raw_dir=str(raw_mnist))
    name = "60 train images but 50 labels" if damage == "labels" else "t10k-images-idx3-ubyte"
    with pytest.raises(UserError, match=name):
        data.prepare_data()
    assert list((tmp_path / "data").iterdir()) == []


def test_a_wrong_raw_dir(tmp_path):
    for name, folder in (("mnist", "MNIST/raw"), ("cifar10", "cifar-10-batches-py")):
        data = TorchvisionData(name, str(tmp_path / "data"), raw_dir=str(tmp_path))
        with pytest.raises(UserError, match=rf"dataset\.raw_dir=.* has no {folder}"):
            data.prepare_data()


CIFAR = {
    "cifar10": (
        "cifar-10-batches-py",
        [f"data_batch_{n}" for n in range(1, 6)],
        "test_batch",
        "batches.meta",
        "",
    ),
    "cifar100": ("cifar-100-python", ["train"], "test", "meta", "fine_"),
}


@pytest.mark.parametrize("name", CIFAR)
@pytest.mark.parametrize("inside", [False, True])
def test_cifar_from_files_at_hand(monkeypatch, tmp_path, name, inside):
    folder, train, test, meta, prefix = CIFAR[name]
    (tmp_path / folder).mkdir()
    generator = np.random.default_rng(0)
    for file in (*train, test):
        pixels = generator.integers(0, 256, (20, 3072), np.uint8)
        content = {"data": pixels, f"{prefix}labels": [number % 4 for number in range(20)]}
        (tmp_path / folder / file).write_bytes(pickle.dumps(content))
    names = {f"{prefix}label_names": ["ant", "bee", "cow", "doe"]}
    (tmp_path / folder / meta).write_bytes(pickle.dumps(names))
    given = tmp_path / folder if inside else tmp_path
    data = TorchvisionData(name, str(tmp_path / "data"), raw_dir=str(given), validation_fraction=0.2)
    with pytest.raises(UserError, match=f"{folder} is incomplete or damaged"):  # the checksums differ
        data.prepare_data()
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    data.prepare_data()
    data.setup()
    assert data.shape == (3, 32, 32)
    assert data.class_names == ["ant", "bee", "cow", "doe"]
    assert data.train_size + data.val_size == 20 * len(train)
    x, _ = served(data.test_dataloader())
    pixel = torch.from_numpy(pixels.reshape(20, 3, 32, 32)) / 255
    mean, std = torch.tensor(data.mean).view(3, 1, 1), torch.tensor(data.std).view(3, 1, 1)
    torch.testing.assert_close(x, (pixel - mean) / std, atol=1e-5, rtol=0)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError(socket.gaierror(-3, "Temporary failure in name resolution"))

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_without_network_and_files_one_sentence(no_network, tmp_path, name):
    start = time.monotonic()
    data = TorchvisionData(name, str(tmp_path / "data"))
    with pytest.raises(UserError, match=r"could not be downloaded: set dataset\.raw_dir") as info:
        data.prepare_data()
    assert "\n" not in str(info.value)
    assert f"dataset={name}" in str(info.value)
    assert list((tmp_path / "data").iterdir()) == []
    assert time.monotonic() - start < 10


def test_a_forbidden_download(tmp_path):
    data = TorchvisionData("mnist", str(tmp_path), download=False)
    with pytest.raises(UserError, match=r"dataset\.download=false"):
        data.prepare_data()


def test_an_unknown_set(tmp_path):
    with pytest.raises(UserError, match=r"dataset\.name=minst"):
        TorchvisionData("minst", str(tmp_path))


def test_digits_are_split_by_their_own_seed():
    parts = []
    for seed, data_seed in ((1, 0), (2, 0), (1, 1)):
        data = DigitsData(seed=seed, data_seed=data_seed)
        data.setup()
        parts.append(served(data.test_dataloader())[0])
    assert torch.equal(parts[0], parts[1])
    assert not torch.equal(parts[0], parts[2])


def test_digits_classes_are_in_every_part():
    data = DigitsData()
    data.setup()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        counts = np.bincount(served(loader)[1], minlength=10)
        assert counts.min() > 0.8 * counts.mean()


def test_augmented_pictures_are_crops(raw_mnist, tmp_path):
    keys = {"raw_dir": str(raw_mnist), "validation_fraction": 0.2, "batch_size": 48}
    plain = TorchvisionData("mnist", str(tmp_path), **keys)
    moved = TorchvisionData("mnist", str(tmp_path), augment=True, crop_padding=2, flip=True, **keys)
    for data in (plain, moved):
        data.prepare_data()
        data.setup("fit")
    (x, y), (x_moved, y_moved) = next(iter(plain.train_dataloader())), next(iter(moved.train_dataloader()))
    assert torch.equal(y, y_moved)
    assert not torch.equal(x, x_moved)
    assert torch.equal(next(iter(plain.val_dataloader()))[0], next(iter(moved.val_dataloader()))[0])


def test_augmentation_of_vectors_is_refused():
    from sglight.data.augment import Augmentation
    from sglight.data.planar import PlanarData

    data = PlanarData()
    data.augmentation = Augmentation(1, True)
    with pytest.raises(UserError, match=r"dataset\.augment=true"):
        data.setup("fit")


def test_the_real_mnist(shared_data, tmp_path):
    if not (shared_data / "MNIST").is_dir():
        pytest.skip("no MNIST there")
    data = TorchvisionData("mnist", str(tmp_path), raw_dir=str(shared_data))
    data.prepare_data()
    data.setup("fit")
    assert (data.train_size, data.val_size, data.test_size) == (54_000, 6_000, 10_000)
    assert data.mean == pytest.approx([0.1307], abs=1e-4)
    assert data.std == pytest.approx([0.3081], abs=1e-4)
