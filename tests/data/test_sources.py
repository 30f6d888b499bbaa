"""One walk through folders and archives: complete, ending, and refused where it cannot be complete."""

import gzip
import io
import os
import shutil
import struct
import tarfile
import zipfile

import numpy as np
import pytest

from sglight.data.sources import Source, printable
from sglight.errors import UserError

FILES = {f"train/ant/{number}.png": bytes([number]) * 900 for number in range(6)}


def packed(path, files=FILES, method=zipfile.ZIP_STORED):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return path
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def contents(path):
    source = Source(path, "dataset.archive")
    return {member.name: source.read(member) for member in source if member.read is not None}


def refused(path, message):
    with pytest.raises(UserError, match=message) as info:
        contents(path)
    assert f"dataset.archive={path}" in str(info.value)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.zip"])
def test_all_files_of_an_archive(tmp_path, name):
    assert contents(packed(tmp_path / name)) == FILES


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_a_damaged_tar_header_is_not_the_end(tmp_path, name):
    path = packed(tmp_path / name)
    data = bytearray(gzip.decompress(path.read_bytes()) if name.endswith("gz") else path.read_bytes())
    with tarfile.open(path) as archive:
        at = archive.getmembers()[3].offset
    for damage in (lambda block: bytes([block[110] ^ 1]), lambda block: bytes(402)):
        broken = bytearray(data)
        change = damage(broken[at : at + 512])
        broken[at + 110 : at + 110 + len(change)] = change
        path.write_bytes(gzip.compress(broken) if name.endswith("gz") else broken)
        refused(path, "damaged")


def test_what_follows_an_end_mark_is_not_passed_over(tmp_path):
    first = packed(tmp_path / "x.tar")
    first.write_bytes(first.read_bytes() * 2)
    refused(first, "goes on after an end mark; tar --ignore-zeros")
    path = packed(tmp_path / "y.tar")
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        at = archive.getmembers()[3].offset
    data[at : at + 512] = bytes(512)
    path.write_bytes(data)
    refused(path, "goes on after an end mark")


def test_the_checksum_of_a_compressed_tar(tmp_path):
    path = tmp_path / "x.tar.gz"
    path.write_bytes(gzip.compress(packed(tmp_path / "x.tar").read_bytes(), 0))
    data = bytearray(path.read_bytes())
    data[data.index(bytes([3]) * 900) + 100] ^= 4
    path.write_bytes(data)
    refused(path, "CRC")


def test_zip_files_that_cannot_be_unpacked(tmp_path):
    path = packed(tmp_path / "x.zip")
    whole = path.read_bytes()
    at = whole.index(bytes([3]) * 900)
    path.write_bytes(whole[:at] + b"?" + whole[at + 1 :])
    refused(path, r"train/ant/3\.png is truncated, damaged .*CRC")
    for offsets, value, reason in (((6, 8), 1, "encrypted"), ((8, 10), 97, "compression")):
        data = bytearray(whole)
        for mark, offset in zip((b"PK\3\4", b"PK\1\2"), offsets, strict=True):
            struct.pack_into("<H", data, data.index(mark) + offset, value)
        path.write_bytes(data)
        refused(path, reason)
    packed(path, method=zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    start = data.index(b"0.png") + 5
    data[start : start + 4] = b"\xff" * 4
    path.write_bytes(data)
    refused(path, r"train/ant/0\.png is truncated, damaged")


def test_separators_of_windows(tmp_path):
    path = packed(tmp_path / "x.zip")
    data = path.read_bytes()
    for name in FILES:
        data = data.replace(name.encode(), name.replace("/", "\\").encode())
    path.write_bytes(data)
    assert contents(path) == FILES


def test_links_in_archives(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for kind, target in ((tarfile.SYMTYPE, "../pool/1.png"), (tarfile.LNKTYPE, "train/pool/1.png")):
            info = tarfile.TarInfo("./train/ant/1.png")
            info.type, info.linkname = kind, target
            archive.addfile(info)
    assert [member.target for member in Source(path, "k")] == ["train/pool/1.png"] * 2
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        info = zipfile.ZipInfo("train/ant/1.png")
        info.create_system, info.external_attr = 3, 0o120777 << 16
        archive.writestr(info, "../pool/1.png")
    assert [member.target for member in Source(tmp_path / "x.zip", "k")] == ["train/pool/1.png"]


@pytest.fixture
def folder(tmp_path):
    for name, data in FILES.items():
        (tmp_path / "real" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "real" / name).write_bytes(data)
    return tmp_path / "real"


def test_links_in_folders(folder, tmp_path):
    (tmp_path / "linked").mkdir()
    os.symlink(folder / "train", tmp_path / "linked" / "train")
    assert contents(tmp_path / "linked") == FILES == contents(folder)
    os.symlink(folder, folder / "me")
    os.symlink("/nowhere/x.png", folder / "gone.png")
    os.mkfifo(folder / "pipe")
    assert contents(folder) == FILES
    lost = {member.name: member.lost for member in Source(folder, "k") if member.lost}
    assert lost["me"].startswith("links to a folder")
    assert lost["gone.png"].startswith("links that cannot be followed")
    assert lost["pipe"] == "sockets, pipes and devices"


def test_the_fingerprint_sees_what_the_reading_sees(folder, tmp_path):
    (tmp_path / "linked").mkdir()
    os.symlink(folder / "train", tmp_path / "linked" / "train")
    source = Source(tmp_path / "linked", "k")
    seen = {source.fingerprint(), source.fingerprint()}
    assert len(seen) == 1
    (folder / "train" / "ant" / "new.png").write_bytes(b"1")
    seen.add(source.fingerprint())
    os.utime(folder / "train" / "ant" / "new.png", (0, 0))
    seen.add(source.fingerprint())
    shutil.move(folder / "train" / "ant" / "new.png", folder / "train" / "ant" / "other.png")
    seen.add(source.fingerprint())
    os.symlink("/nowhere", folder / "train" / "gone")
    seen.add(source.fingerprint())
    assert len(seen) == 5


def test_undecodable_names(folder):
    name = os.fsdecode(b"caf\xe9.png")
    (folder / "train" / name).write_bytes(b"1")
    assert f"train/{name}" in contents(folder)
    assert Source(folder, "k").fingerprint()
    assert printable(f"a\n{name}") == "a\\ncaf\\udce9.png"


def test_a_source_that_cannot_be_read_is_told_as_itself(folder, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    refused(folder, "cannot be read .*Permission denied.*: see its permissions")


def test_every_truncation_and_flip_of_a_zip_and_gzip_file_is_found_or_harmless(tmp_path):
    generator = np.random.default_rng(0)
    for name in ("x.zip", "x.tar.gz"):
        path = packed(tmp_path / name)
        whole = path.read_bytes()
        for _ in range(60):
            data = bytearray(whole)
            data[generator.integers(len(data))] ^= 1 << generator.integers(8)
            path.write_bytes(data if generator.integers(3) else data[: generator.integers(len(data))])
            try:
                found = contents(path)
            except UserError:
                continue
            # A name in a zip file has no checksum: a file may be called otherwise, never hold something else.
            assert sorted(found.values()) == sorted(FILES.values())
