"""Finds the pictures in a folder or archive, with the split and the class of each.

    <top>/train/<class>/**     or training
    <top>/val/<class>/**       or valid, validation; may be missing
    <top>/test/<class>/**      or testing; may be missing

`<top>` is the highest folder that holds a training folder. Files that are not used are counted, with the reason.

Without test/ the pictures in val/ are the test set, because published accuracies are those of val/ then; without both
the test set is drawn from train/. Tiny ImageNet is known: the classes of its val/images/* are in
val/val_annotations.txt, and its test/images/* have no classes.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from posixpath import basename, splitext

from sglight.data.pixels import suffixes
from sglight.data.sources import Member, Source, printable
from sglight.errors import UserError

SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
FOREIGN = {
    "__MACOSX",
    "@eaDir",
    "#recycle",
    "$RECYCLE.BIN",
    "System Volume Information",
    "__pycache__",
    "lost+found",
}
ANNOTATIONS = "val_annotations.txt"
WITHOUT_CLASS = "images"  # the only folder in a split whose pictures have no class


@dataclass(frozen=True)
class Picture:
    """A picture that is used.

    Attributes:
        member: the number of the member of the source that holds its bytes.
        name: its path below the source.
        split: `train`, `val` or `test`.
        label: its class.
    """

    member: int
    name: str
    split: str
    label: str


@dataclass
class Layout:
    """The pictures of a source.

    Attributes:
        pictures: those that are used.
        classes: names of the classes, sorted.
        ignored: the number of files that are not used, by reason.
        test: where the test set comes from, if not from test/.
    """

    pictures: list[Picture]
    classes: list[str]
    ignored: Counter[str] = field(default_factory=Counter)
    test: str = ""

    def summary(self) -> str:
        """How many files are used and how many are not, and why; one line of text."""
        taken = Counter(picture.split for picture in self.pictures)
        parts = ", ".join(f"{taken[split]} for {split}" for split in ("train", "val", "test") if taken[split])
        text = f"{len(self.pictures)} pictures taken ({parts})"
        if self.ignored:
            why = ", ".join(f"{count} {reason}" for reason, count in self.ignored.most_common())
            text += f"; {self.ignored.total()} files ignored: {why}"
        return text + (f"; {self.test}" if self.test else "")


def lay_out(source: Source, members: Iterable[Member]) -> Layout:
    """The pictures among the members of a source.

    Raises:
        UserError: there are no training pictures, a class folder is empty, or a class has no training pictures.
    """
    found: list[Member] = []
    annotated: dict[str, str] = {}
    for member in members:
        found.append(
            replace(member, read=None if member.read is None else bytes)
        )  # the reader of a tar member would keep its header in memory
        if member.name.endswith(f"/{ANNOTATIONS}") and member.read is not None:
            annotated |= _annotations(source.read(member).decode(errors="replace"))
    return _Survey(source, found, annotated).layout()


def _annotations(text: str) -> dict[str, str]:
    """The class of each file of Tiny ImageNet's validation set, from lines of file, class and bounding box."""
    lines = (line.split("\t") for line in text.splitlines())
    return {columns[0]: columns[1] for columns in lines if len(columns) > 1}


class _Survey:
    def __init__(self, source: Source, members: list[Member], annotated: dict[str, str]) -> None:
        self.source, self.members, self.annotated = source, members, annotated
        self.paths = [_parts(member.name) for member in members]
        # An archive may hold a name twice; unpacking it, the later file would replace the earlier one.
        self.number = {path: number for number, path in enumerate(self.paths)}
        self.known = suffixes()
        self.ignored: Counter[str] = Counter()
        self.reasons: dict[tuple[str, str], Counter[str]] = {}  # why files of each class folder are not used

    def layout(self) -> Layout:
        top = self._top()
        pictures = [
            picture
            for number in range(len(self.members))
            if (picture := self._picture(number, top)) is not None
        ]
        pictures = self._with_classes(pictures)
        self._check(pictures)
        splits, test = {picture.split for picture in pictures}, ""
        if "test" not in splits:
            test = "val/ is the test set" if "val" in splits else "the test set is a share of train/"
            pictures = [replace(p, split="test") if p.split == "val" else p for p in pictures]
        classes = sorted({picture.label for picture in pictures if picture.split == "train"})
        return Layout(pictures, classes, self.ignored, test)

    def _top(self) -> tuple[str, ...]:
        """The path of the highest folder that holds a training folder."""
        tops = set()
        for member, path in zip(self.members, self.paths, strict=True):
            folders = path if member.folder else path[:-1]
            for depth, part in enumerate(folders):
                if _passed_over(part):
                    break
                if SPLIT_OF.get(part.lower()) == "train":
                    tops.add(path[: depth + 1])
                    break
        if not tops:
            raise UserError(
                f"{self.source} has no pictures train/<class>/*: name the folder that holds train/"
            )
        highest = sorted(top for top in tops if len(top) == min(map(len, tops)))
        if len(highest) > 1:
            names = " and ".join("/".join(top) for top in highest[:2])
            raise UserError(
                f"{self.source} has {names}: which one to train on cannot be told; keep one of them"
            )
        return highest[0][:-1]

    def _picture(self, number: int, top: tuple[str, ...]) -> Picture | None:
        member, path = self.members[number], self.paths[number]
        reason = next((reason for part in path if (reason := _passed_over(part))), None)
        inside = path[len(top) :] if path[: len(top)] == top else ()
        split = SPLIT_OF.get(inside[0].lower(), "") if inside else ""
        label = inside[1] if len(inside) > 2 or (member.folder and len(inside) == 2) else ""
        if reason is None and split and label:
            self.reasons.setdefault((split, label), Counter())
        if member.folder and member.lost is None:
            return None
        reason = reason or member.lost
        source = number
        if reason is None and member.target is not None:
            source = self.number.get(_parts(member.target), -1)
            if source < 0 or self.members[source].read is None:
                reason = "links to what the archive does not hold (tar --dereference packs it)"
        if reason is None and self.number[path] != number:
            reason = "replaced by a later file of the same name"
        if reason is None and not split:
            reason = "outside train/, val/ and test/"
        suffix = splitext(member.name)[1]
        if reason is None and suffix.lower() not in self.known:
            reason = f"of an unknown kind ({printable(suffix) or 'no extension'})"
        if reason is None and not label:
            reason = "in no class folder"
        if reason is None:
            return Picture(source, member.name, split, label)
        self._ignore(reason, (split, label))
        return None

    def _ignore(self, reason: str, folder: tuple[str, str]) -> None:
        self.ignored[reason] += 1
        if folder in self.reasons:
            self.reasons[folder][reason] += 1

    def _with_classes(self, pictures: list[Picture]) -> list[Picture]:
        """The pictures with their annotated classes (Tiny ImageNet), without those that have no class."""
        known = {picture.label for picture in pictures if picture.split == "train"}
        result = []
        for picture in pictures:
            label = picture.label
            if picture.split != "train" and label == WITHOUT_CLASS and label not in known:
                name = basename(picture.name)
                if picture.split == "test" or name not in self.annotated:
                    self.ignored["without a class"] += 1
                    continue
                label = self.annotated[name]
            result.append(replace(picture, label=label))
        if WITHOUT_CLASS not in known:
            for split in ("val", "test"):
                self.reasons.pop((split, WITHOUT_CLASS), None)
        return result

    def _check(self, pictures: list[Picture]) -> None:
        known = {picture.label for picture in pictures if picture.split == "train"}
        full = {(picture.split, picture.label) for picture in pictures}
        for split, label in sorted(self.reasons):
            if (split, label) not in full:
                why = ", ".join(f"{count} {reason}" for reason, count in self.reasons[split, label].items())
                raise UserError(
                    f"{self.source}: the class folder {split}/{printable(label)} has no picture that counts "
                    f"({why or 'it is empty'}): add some or remove it"
                )
        if not known:
            raise UserError(
                f"{self.source} has no pictures train/<class>/*: name the folder that holds train/"
            )
        for split, label in sorted(full):
            if printable(label) != label:
                raise UserError(
                    f"{self.source}: {split}/{printable(label)} is no text in UTF-8: rename the folder"
                )
            if label not in known:
                raise UserError(
                    f"{self.source}: class {label} is in {split}/ but not in train/: add or remove it"
                )


def _parts(name: str) -> tuple[str, ...]:
    """The path of a member as a tuple of names."""
    return tuple(part for part in name.split("/") if part not in ("", "."))


@lru_cache(4096)  # the same folders for many files
def _passed_over(part: str) -> str | None:
    """Why a file or folder of that name is ignored; None if it is not."""
    if part.startswith(".") and part != "..":
        return "hidden"
    return "of another program (__MACOSX and the like)" if part in FOREIGN else None
