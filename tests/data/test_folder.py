"""The user's own pictures: folders, tar and zip archives, and what can be wrong with them."""

import io
import os
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from sglight.data.folder import ImageFolderData
from sglight.data.layout import Picture
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


def test_what_was_taken_and_ignored_is_told_and_kept(pictures, tmp_path):
    (pictures / "train" / "cat" / "notes.txt").write_text("text")
    (pictures / "train" / "cat" / "nested").mkdir()
    (pictures / "train" / "cat" / "0.png").rename(pictures / "train" / "cat" / "nested" / "0.png")
    first, again = (make(tmp_path, raw_dir=str(pictures)) for _ in range(2))
    told = "22 pictures taken (16 for train, 6 for test); 1 files ignored: 1 of an unknown kind (.txt)"
    assert first.notes == again.notes == [told]
    attributes = Store(first.store_path).attributes
    assert attributes["ignored"] == '{"of an unknown kind (.txt)": 1}'
    assert "transparency over white" in attributes["pixels"]


@pytest.mark.parametrize(
    ("change", "sizes"),
    [
        (lambda root: shutil.copytree(root / "test", root / "val"), (16, 6, 6)),
        (lambda root: (root / "test").rename(root / "val"), (12, 4, 6)),
        (lambda root: shutil.rmtree(root / "test"), (9, 3, 4)),
    ],
)
def test_the_splits_that_are_there(pictures, tmp_path, change, sizes):
    change(pictures)
    data = make(tmp_path, raw_dir=str(pictures))
    assert (data.train_size, data.val_size, data.test_size) == sizes
    assert {label for _, label in levels(data)} == {0, 1}


def test_a_linked_folder_that_changes_is_imported_anew(pictures, tmp_path):
    (tmp_path / "linked").mkdir()
    for split in ("train", "test"):
        os.symlink(pictures / split, tmp_path / "linked" / split)
    assert make(tmp_path, raw_dir=str(tmp_path / "linked")).train_size == 12
    (pictures / "train" / "cat" / "0.png").unlink()
    (pictures / "train" / "cat" / "1.png").unlink()
    assert make(tmp_path, raw_dir=str(tmp_path / "linked")).train_size == 10


def test_links_in_an_archive_are_pictures(pictures, tmp_path):
    path = pack(pictures, tmp_path / "x.tar")
    with tarfile.open(path, "a") as archive:
        for name, kind, target in (
            ("s", tarfile.SYMTYPE, "../dog/3.png"),
            ("h", tarfile.LNKTYPE, "train/dog/3.png"),
        ):
            link = tarfile.TarInfo(f"train/cat/{name}.png")
            link.type, link.linkname = kind, target
            archive.addfile(link)
    assert levels(make(tmp_path, archive=str(path))).count((103, 0)) == 2


def test_alike_pictures_are_refused(pictures, tmp_path):
    for file in pictures.rglob("*.png"):
        Image.new("L", (6, 5), 255).save(file)
    with pytest.raises(UserError, match=r"dataset\.raw_dir=.* training samples are all the same"):
        make(tmp_path, raw_dir=str(pictures))


def test_one_class_is_refused(pictures, tmp_path):
    for split in ("train", "test"):
        shutil.rmtree(pictures / split / "dog")
    with pytest.raises(UserError, match=r"dataset\.raw_dir=.* has one class, cat"):
        make(tmp_path, raw_dir=str(pictures))


def test_large_members_are_not_held_all_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("sglight.data.folder.BYTES_AT_ONCE", 1 << 20)
    path, held = tmp_path / "x.zip", []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(12):
            for split in ("train", "test"):
                data = io.BytesIO()
                Image.new("RGB", (300, 300), (number, 0, 0)).save(data, "BMP")
                archive.writestr(f"{split}/{'cat' if number % 2 else 'dog'}/{number}.bmp", data.getvalue())
    data = ImageFolderData(str(tmp_path / "data"), archive=str(path), size=4)
    read = data.source.read

    def watched(member):
        held.append(None)
        return read(member)

    data.source.read = watched
    most = 0
    for _ in data._decoded({i: [Picture(i, "", "train", "cat")] for i in range(24)}):
        held.pop()
        most = max(most, len(held))
    assert most <= 5  # of 0.27 MB each


def test_a_file_larger_than_its_pixels_can_be_is_not_read(pictures, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in pictures.rglob("*.png"):
            archive.write(file, file.relative_to(pictures))
        archive.writestr("train/cat/bomb.png", bytes(2 << 20))
    with pytest.raises(
        UserError, match=r"train/cat/bomb\.png has 2\.10 MB, more than .*dataset\.max_megapixels=0\.1"
    ):
        make(tmp_path, archive=str(tmp_path / "x.zip"), max_megapixels=0.1)


def test_a_source_that_changes_while_it_is_read(pictures, tmp_path, monkeypatch):
    def shrink(self, *args):
        shutil.rmtree(pictures / "train" / "cat")
        return create(self, *args)

    create = ImageFolderData._files
    monkeypatch.setattr(ImageFolderData, "_files", shrink)
    with pytest.raises(UserError, match="was changed while it was read"):
        make(tmp_path, raw_dir=str(pictures))
    assert list((tmp_path / "data").iterdir()) == []


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
    assert data.train_size + data.val_size == 16
    assert "2 files ignored" in data.notes[0]
    assert {file for file in tmp_path.rglob("*") if "data" not in file.parts} == before


def test_without_training_pictures(pictures, tmp_path):
    shutil.rmtree(pictures / "train")
    with pytest.raises(UserError, match=r"dataset\.raw_dir=.* has no pictures train/<class>/"):
        make(tmp_path, raw_dir=str(pictures))


def test_a_class_only_in_the_test(pictures, tmp_path):
    (pictures / "test" / "dog").rename(pictures / "test" / "wolf")
    with pytest.raises(UserError, match="class wolf is in test/ but not in train/"):
        make(tmp_path, raw_dir=str(pictures))


def test_a_corrupted_picture_is_named(pictures, tmp_path):
    file = pictures / "train" / "dog" / "3.png"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(UserError, match=r"dataset\.raw_dir=.*: train/dog/3\.png is no picture"):
        make(tmp_path, raw_dir=str(pictures))
    assert list((tmp_path / "data").iterdir()) == []


def test_different_sizes(pictures, tmp_path):
    Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(pictures / "train" / "dog" / "3.png")
    with pytest.raises(
        UserError, match=r"train/dog/3\.png has 8 x 9 pixels, the first picture 6 x 5: set dataset\.size"
    ):
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
        ({"raw_dir": ".", "size": 100_000}, "dataset.size=100000 makes pictures of more than"),
        ({"raw_dir": ".", "max_megapixels": 0}, "dataset.max_megapixels=0"),
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
