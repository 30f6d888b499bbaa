"""Which files count: splits, classes, what is left out and how that is told."""

from pathlib import Path

import pytest

from sglight.data.layout import lay_out
from sglight.data.sources import Member, Source
from sglight.errors import UserError

SOURCE = Source(Path("pictures"), "dataset.raw_dir")


def files(*names):
    return [Member(name, lambda: b"") for name in names]


def splits(members):
    return sorted((p.name, p.split, p.label) for p in lay_out(SOURCE, members).pictures)


def counted(*names):
    return [name for name, _, _ in splits(files("train/ant/1.jpg", *names)) if name != "train/ant/1.jpg"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("train/ant/deep/er/2.PNG", None),
        ("train/ant/2.jfif", None),
        ("test/ant/2.jpg", None),
        ("valid/ant/2.jpg", None),
        ("train/2.jpg", "in no class folder"),
        ("extra/ant/2.jpg", "outside train/"),
        ("../../train/ant/2.jpg", "outside train/"),  # only a name: nothing is written
        ("backup/train/ant/2.jpg", "outside train/"),
        ("readme.png", "outside train/"),
        ("__MACOSX/train/ant/2.jpg", "of another program"),
        ("train/ant/@eaDir/2.jpg/small.jpg", "of another program"),
        ("train/ant/.hidden.jpg", "hidden"),
        ("train/.thumbnails/2.jpg", "hidden"),
        ("train/ant/2.txt", r"of an unknown kind (.txt)"),
        ("train/ant/LICENSE", "of an unknown kind (no extension)"),
        ("test/images/2.jpg", "without a class"),
    ],
)
def test_what_counts(name, reason):
    assert counted(name) == ([] if reason else [name])
    ignored = lay_out(SOURCE, files("train/ant/1.jpg", name)).ignored
    assert [why for why in ignored if not why.startswith(reason or "-")] == []
    assert ignored.total() == (reason is not None)


def test_splits_and_their_stand_ins():
    train, val, test = "top/train/ant/1.jpg", "top/val/ant/2.jpg", "top/test/ant/3.jpg"
    assert [split for _, split, _ in splits(files(train, val, test))] == ["test", "train", "val"]
    assert splits(files(train, val)) == [(train, "train", "ant"), (val, "test", "ant")]
    assert "val/ is the test set" in lay_out(SOURCE, files(train, val)).summary()
    assert splits(files(train)) == [(train, "train", "ant")]
    assert "share of train/" in lay_out(SOURCE, files(train)).summary()


def test_other_names_of_the_splits():
    names = files("Training/ant/1.jpg", "validation/ant/2.jpg", "Testing/ant/3.jpg")
    assert [split for _, split, _ in splits(names)] == ["test", "train", "val"]


def test_a_class_may_be_called_train():
    names = files("train/train/1.jpg", "train/car/1.jpg", "test/train/2.jpg")
    assert {(split, label) for _, split, label in splits(names)} == {
        ("train", "train"),
        ("train", "car"),
        ("test", "train"),
    }


def test_tiny_imagenet():
    lines = b"a.JPEG\tn01\t0\t0\t9\t9\nb.JPEG\tn02\t0\t0\t9\t9\n"
    members = files(
        "t/train/n01/images/1.JPEG", "t/train/n02/images/1.JPEG", "t/test/images/9.JPEG",
        "t/val/images/a.JPEG", "t/val/images/b.JPEG",
    )  # fmt: skip
    members.append(Member("t/val/val_annotations.txt", lambda: lines, len(lines)))
    assert [(split, label) for name, split, label in splits(members) if "/val/" in name] == [
        ("test", "n01"),
        ("test", "n02"),
    ]
    assert lay_out(SOURCE, members).ignored["without a class"] == 1


def test_links_stand_for_what_they_lead_to():
    members = [
        *files("pool/1.jpg", "train/ant/1.jpg"),
        Member("train/bee/1.jpg", target="pool/1.jpg"),
        Member("train/bee/2.jpg", target="elsewhere.jpg"),
    ]
    layout = lay_out(SOURCE, members)
    assert [(p.member, p.name, p.label) for p in layout.pictures] == [
        (1, "train/ant/1.jpg", "ant"),
        (0, "train/bee/1.jpg", "bee"),
    ]
    assert "1 links to what the archive does not hold" in layout.summary()


def test_of_two_files_of_one_name_the_later_counts():
    layout = lay_out(SOURCE, files("train/ant/1.jpg", "train/ant/1.jpg"))
    assert [picture.member for picture in layout.pictures] == [1]
    assert "1 replaced by a later file of the same name" in layout.summary()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (files("ant/1.jpg"), "has no pictures train/<class>/"),
        (files("train/1.jpg"), "has no pictures train/<class>/"),
        (files("a/train/ant/1.jpg", "b/train/ant/1.jpg"), "has a/train and b/train"),
        (
            files("train/ant/1.jpg", "train/bee/1.heic"),
            r"train/bee has no picture .*1 of an unknown kind \(.heic\)",
        ),
        (
            [*files("train/ant/1.jpg"), Member("train/bee", folder=True)],
            "train/bee has no picture .*it is empty",
        ),
        ([*files("train/ant/1.jpg"), Member("test/ant", folder=True)], "test/ant has no picture"),
        (files("train/ant/1.jpg", "test/bee/1.jpg"), "class bee is in test/ but not in train/"),
        (files("train/ant/1.jpg", "train/b\udce9e/1.jpg"), r"train/b\\udce9e is no text in UTF-8: rename"),
    ],
)
def test_what_is_refused(members, message):
    with pytest.raises(UserError, match=message) as info:
        lay_out(SOURCE, members)
    assert "dataset.raw_dir=pictures" in str(info.value)
