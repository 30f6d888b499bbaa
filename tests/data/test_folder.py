"""The user's own pictures: folders, tar and zip archives, and what can be wrong with them."""

import shutil
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from sglight.data.folder import ImageFolderData, classified
from sglight.data.store import Store
from sglight.errors import UserError


def pack(folder, path):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(folder.rglob("*")):
                archive.write(file, "top" / file.relative_to(folder))
    else:
        with tarfile.open(path, "w:" + {".tar": "", ".gz": "gz", ".xz": "xz"}[path.suffix]) as archive:
            archive.add(folder, "./")
    return path


def make(tmp_path, **keys):
    keys = {"validation_fraction": 0.25, "data_dir": str(tmp_path / "data"), **keys}
    data = ImageFolderData(**keys)
    data.prepare_data()
    data.setup()
    return data


def levels(data):
    """Sorted pairs (level of the picture, class) of each split."""
    result = []
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for x, y in loader:
            level = (x * torch.tensor(data.std).view(-1, 1, 1) + torch.tensor(data.mean).view(-1, 1, 1)) * 255
            result += [(round(float(a)), int(b)) for a, b in zip(level[:, 0, 0, 0], y, strict=True)]
    return sorted(result)


@pytest.mark.parametrize("kind", ["folder", "x.tar", "x.tar.gz", "x.tar.xz", "x.zip"])
def test_every_kind_of_source_gives_the_same(pictures, tmp_path, kind):
    source = (
        {"raw_dir": str(pictures)} if kind == "folder" else {"archive": str(pack(pictures, tmp_path / kind))}
    )
    data = make(tmp_path, **source)
    assert data.shape == (3, 5, 6)
    assert data.class_names == ["cat", "dog"]
    assert (data.train_size, data.val_size, data.test_size) == (12, 4, 6)
    expected = [(100 * label + number, label) for label in (0, 1) for number in (*range(8), *range(3))]
    assert levels(data) == sorted(expected)


def test_another_archive_is_not_mistaken_for_it(pictures, tmp_path):
    first = make(tmp_path, archive=str(pack(pictures, tmp_path / "one.tar")))
    Image.fromarray(np.zeros((5, 6, 3), np.uint8)).save(pictures / "train" / "cat" / "new.png")
    second = make(tmp_path, archive=str(pack(pictures, tmp_path / "two.tar")))
    assert first.store_path != second.store_path
    again = make(tmp_path, archive=str(shutil.copy(tmp_path / "two.tar", tmp_path / "one.tar")))
    assert again.store_path == first.store_path
    assert again.train_size + again.val_size == 17
    grey = make(tmp_path, archive=str(tmp_path / "one.tar"), channels=1)
    assert grey.shape == (1, 5, 6)
    assert again.store_path.exists()
    assert Store(again.store_path).attributes["source"].endswith("one.tar")


def test_files_that_do_not_count(pictures, tmp_path):
    (pictures / "train" / "cat" / "._0.png").write_text("macOS")
    (pictures / "train" / "cat" / "notes.txt").write_text("text")
    (pictures / "readme.png").write_text("too high")
    assert make(tmp_path, archive=str(pack(pictures, tmp_path / "x.tar"))).train_size == 12


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train/cat/1.jpg", ("train", "cat")),
        ("a/b/test/dog/1.PNG", ("test", "dog")),
        ("../../train/cat/1.jpg", ("train", "cat")),  # only a name: nothing is written
        ("train/1.jpg", None),
        ("valid/cat/1.jpg", None),
        ("__MACOSX/train/cat/1.jpg", None),
        ("train/cat/.hidden.jpg", None),
        ("train/cat/1.txt", None),
    ],
)
def test_what_counts(name, expected):
    picture = classified(name)
    assert (picture and (picture.split, picture.label)) == expected


def test_a_hostile_archive_writes_nothing_outside(pictures, tmp_path):
    path = pack(pictures, tmp_path / "x.tar")
    with tarfile.open(path, "a") as archive:
        member = archive.gettarinfo(
            str(pictures / "train" / "cat" / "0.png"), "../../../escape/train/cat/9.png"
        )
        with open(pictures / "train" / "cat" / "0.png", "rb") as file:
            archive.addfile(member, file)
        link = tarfile.TarInfo("train/cat/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    before = {file for file in tmp_path.rglob("*") if "data" not in file.parts}
    data = make(tmp_path, archive=str(path))
    assert data.train_size + data.val_size == 17
    assert {file for file in tmp_path.rglob("*") if "data" not in file.parts} == before


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_part(pictures, tmp_path, split):
    shutil.rmtree(pictures / split)
    with pytest.raises(UserError, match=rf"dataset\.raw_dir=.* has no pictures {split}/<class>/"):
        make(tmp_path, raw_dir=str(pictures))


def test_a_class_only_in_the_test(pictures, tmp_path):
    (pictures / "test" / "dog").rename(pictures / "test" / "wolf")
    with pytest.raises(UserError, match="class wolf is in test/ but not in train/"):
        make(tmp_path, raw_dir=str(pictures))


def test_a_corrupted_picture_is_named(pictures, tmp_path):
    file = pictures / "train" / "dog" / "3.png"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(UserError, match=r"train/dog/3\.png in .* is no picture"):
        make(tmp_path, raw_dir=str(pictures))
    assert list((tmp_path / "data").iterdir()) == []


def test_different_sizes(pictures, tmp_path):
    Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(pictures / "train" / "dog" / "3.png")
    with pytest.raises(UserError, match=r"8 x 9 pixels, the first picture 6 x 5: set dataset\.size"):
        make(tmp_path, raw_dir=str(pictures))
    assert make(tmp_path, raw_dir=str(pictures), size=4).shape == (3, 4, 4)


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "zip"])
@pytest.mark.parametrize("share", [0.2, 0.7, 0.97])
def test_a_truncated_archive(pictures, tmp_path, suffix, share):
    path = pack(pictures, tmp_path / f"x.{suffix}")
    used = path.stat().st_size if suffix != "tar" else 28 * 1024  # a tar file ends with zeros
    with open(path, "r+b") as file:
        file.truncate(int(share * used))
    with pytest.raises(UserError, match=r"dataset\.archive=.*x\.") as info:
        make(tmp_path, archive=str(path))
    assert "truncated" in str(info.value)


def test_a_tar_file_that_ends_between_two_pictures(pictures, tmp_path):
    path = pack(pictures, tmp_path / "x.tar")
    with tarfile.open(path) as archive:
        ends = [member.offset for member in archive if member.isfile()]
    for end in (ends[-1], ends[-1] + 100):
        with open(path, "r+b") as file:
            file.truncate(end)
        with pytest.raises(UserError, match="truncated"):
            make(tmp_path, archive=str(path))
        pack(pictures, path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "either dataset.raw_dir"),
        ({"raw_dir": "a", "archive": "b"}, "either dataset.raw_dir"),
        ({"archive": "missing.tar"}, "missing.tar does not exist"),
        ({"archive": "."}, "is a folder: give it as dataset.raw_dir"),
        ({"raw_dir": __file__}, "is a file: give it as dataset.archive"),
        ({"archive": __file__}, "no tar or zip archive"),
        ({"raw_dir": ".", "channels": 2}, "dataset.channels=2"),
        ({"raw_dir": ".", "size": 0}, "dataset.size=0"),
    ],
)
def test_wrong_keys(tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        make(tmp_path, **keys)


@pytest.mark.slow
def test_the_real_cifar(shared_data, tmp_path):
    archive = shared_data / "cifar10-images.tar"
    if not archive.exists():
        pytest.skip("no CIFAR-10 there")
    data = make(tmp_path, archive=str(archive), validation_fraction=0.1)
    assert (data.train_size, data.val_size, data.test_size) == (45_000, 5_000, 10_000)
    assert data.class_names[0] == "airplane"
    assert data.mean == pytest.approx([0.491, 0.482, 0.447], abs=2e-3)
