"""Sources of images: folders and archives, one or several; and the formats of their files."""

import io
import os
import shutil
import struct
import sys
import tarfile
import tracemalloc
import zlib

from common import UserError

import cv2
import numpy as np
import pytest
from conftest import decode, png, write_zip
from PIL import Image

from kit.data import archives
from kit.data.archives import nearby
from kit.data.image_source import ImageSource, check_images

RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 256, (6, 7, 3)).astype(np.uint8) for _ in range(4)]
FILES = {f"train/{i:04}.png": png(picture) for i, picture in enumerate(PICTURES)}


def write_folder(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def write_7z(path, files, **options):
    with pytest.importorskip("py7zr").SevenZipFile(path, "w", **options) as archive:
        for name, content in files.items():
            archive.writestr(content, name)
    return path


def holds_all(source):
    for i, picture in enumerate(PICTURES):
        assert (source.picture(f"{i:04}").pixels == picture).all()
    assert {*source.files} == {*FILES}


def saved(image, kind, **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


# ---------------------------------------------------------------- names, and several places


def test_the_fingerprint_is_that_of_the_images_alone(tmp_path):
    files = {"train/a.png": b"12"}
    write_zip(tmp_path / "a.zip", files)
    assert ImageSource(tmp_path / "a.zip").fingerprint.startswith("15e1e02f")
    write_folder(tmp_path / "b", files)
    for more in ("train/b.txt", "train/.DS_Store", "Thumbs.db", "__MACOSX/train/._a.png", ".git/c.png"):
        write_folder(tmp_path / "b", {more: b"3"})
        assert ImageSource([tmp_path / "b"]).fingerprint.startswith("d32ca325"), f"with {more}"
    write_folder(tmp_path / "b", {"train/c.png": b"3"})
    assert not ImageSource(tmp_path / "b").fingerprint.startswith("d32ca325")


def test_several_places_are_one_source(tmp_path):
    names = [*FILES]
    write_zip(tmp_path / "a.zip", {name: FILES[name] for name in names[:2]})
    write_folder(tmp_path / "b", {name: FILES[name] for name in names[1:3]})
    write_tar(tmp_path / "c.tar", {name: FILES[name] for name in names[3:]})
    paths = [tmp_path / name for name in ("a.zip", "b", "c.tar")]
    source = ImageSource(paths)
    holds_all(source)
    assert "a.zip" in source.path
    assert source.fingerprint == ImageSource(paths[::-1]).fingerprint
    assert source.fingerprint not in {ImageSource(path).fingerprint for path in paths}


def test_one_name_with_two_contents_is_refused(tmp_path):
    write_folder(tmp_path / "a", {"x.npy": b"12"})
    write_folder(tmp_path / "b", {"x.npy": b"12"})
    assert [*ImageSource([tmp_path / "a", tmp_path / "b"]).files] == ["x.npy"]
    (tmp_path / "b" / "x.npy").write_bytes(b"13")
    with pytest.raises(UserError, match=r"two different files named x\.npy"):
        ImageSource([tmp_path / "a", tmp_path / "b"])
    write_zip(tmp_path / "c.zip", {"x.npy": b"13"})
    with pytest.raises(UserError, match=r"two different files named x\.npy"):
        ImageSource([tmp_path / "a", tmp_path / "c.zip"])


def test_bare_names_are_found_at_any_depth(tmp_path):
    names = "t/0/1/2/abc.jpg", "t/0/x.png", "t/1/x.png", "t/1/deep/top.png", "top.png", "t/y.png", "t/d/e/y.png"
    source = ImageSource(write_folder(tmp_path / "a", dict.fromkeys(names, b"")))
    for name in ("abc", "abc.jpg", "0/1/2/abc", "t/0/1/2/abc.jpg"):
        assert source.find(name) == "t/0/1/2/abc.jpg"
    assert source.find("x") is None
    assert source.find("0/x") == "t/0/x.png"
    assert source.find("top") == source.find("top.png") == "top.png", "an earlier rule goes before the bare name"
    assert source.find("y") == "t/y.png", "without the top folder it means one file"
    for name in ("elsewhere/abc", "../abc", "/abc", "C:/abc"):
        assert source.find(name) is None, "another folder than the file's"


def empty(path, *names):
    """→ a folder, or a zip, of empty files."""
    if path.suffix != ".zip":
        return write_folder(path, dict.fromkeys(names, b""))
    write_zip(path, dict.fromkeys(names, b""))
    return path


NAMESAKES = {  # (folder or archive, its files, names of files that aren't there)
    "the other eye": ("eyes", ["left/5.png", "left/1.png", "right/1.png"], ["right/5.png", "../x/eyes/right/5.png"]),
    "a whole folder is missing": ("eyes", ["left/5.png"], ["right/5.png", "right/5", "/kaggle/input/c/right/5.png"]),
    "another patient": ("test", ["case90/000000.png"], ["case91/000000.png", "test/case91/000000.png"]),
    "another patient in a zip": ("test.zip", ["case90/000000.png"], ["case91/000000.png"]),
    "another patient's series": ("test", ["case90/s1/0.png"], ["case91/s1/0.png", "s2/0.png"]),
    "the other part": ("images", ["train/1.png", "test/9.png"], ["train/9.png", "./train/9.png", "Train/9.png"]),
    "the other part, beside this one": ("train", ["9.png"], ["test/9.png", "../input/c/test/9.png", "../test/9.png"]),
    "a backup": ("train", ["right/6.png", "backup/right/5.png"], ["right/5.png", "train/right/5.png"]),
    "a folder of this one": ("train", ["1.png", "old/5.png"], ["train/5.png", "../c/train/5.png"]),
    "a folder in another": ("images", ["left/left/1.png", "test/left/2.png"], ["left/2.png", "images/left/2.png"]),
    "a folder called like this one": ("images", ["2.png", "p2/1.png"], ["p2/images/2.png", "../c/p2/images/2.png"]),
    "several": ("train", ["0/x.png", "1/x.png", "a/b/x.png"], ["x.png", "2/x.png"]),
}


@pytest.mark.parametrize("case", NAMESAKES)
def test_a_missing_file_is_not_replaced_by_its_namesake_in_another_folder(tmp_path, case):
    place, files, missing = NAMESAKES[case]
    (tmp_path / "test").mkdir()
    source = ImageSource(empty(tmp_path / place, *files))
    assert [source.find(name) for name in files] == files
    assert [source.find(name) for name in missing] == [None] * len(missing)


@pytest.mark.parametrize(
    ("name", "words"),
    {
        "1.png": r"\(1\.png fits several files \(x/1\.png, y/1\.png\): write the folder too\)",
        "2": r"\(2 fits several files \(x/2\.jpg, x/2\.png\): write the ending too\)",
        "7": r"\(the nearest to 7 is x/0007\.png\)",
        "0007.jpg": r"\(the nearest to 0007\.jpg is x/0007\.png\)",
        "A7.png": r"\(the nearest to A7\.png is y/a7\.png\)",
        "y/0007.png": r"y/0007\.png \(see --image-column, --submit-header\)",
        "17": r"\(see --image-column, --submit-header\)",
    }.items(),
)
def test_the_file_that_a_name_may_mean_is_named(tmp_path, name, words):
    files = "x/1.png", "y/1.png", "x/2.png", "x/2.jpg", "x/0007.png", "y/a7.png"
    with pytest.raises(UserError, match=f"lacks 1 of the images in train.csv: .*{words}"):
        check_images(ImageSource(empty(tmp_path / "train", *files)), [name, "x/1.png"], "train.csv")


PLACES = {  # (folder or archive, its file, what may stand before 0.png)
    "a folder": (
        "train",
        "0.png",
        "|./|train/|./train/|/kaggle/input/comp/train/|../input/comp/train/|../comp/train/|train//|C:\\data\\train\\|"
        "C:/data/|Train/|images/|other/../train/|https://example.org/",
    ),
    "a zip with a folder of its name": (
        "train.zip",
        "train/0.png",
        "|train/|./train/|../input/comp/train/|images/|/c/",
    ),
    "a zip with another folder": ("train.zip", "img/0.png", "|img/|train/|train/img/|../c/img/|../c/train/"),
    "a folder in itself": ("train", "train/0.png", "|train/|../input/comp/train/|train/train/"),
    "folders": (
        "images",
        "train/a/0.png",
        "|a/|train/a/|images/train/a/|../input/comp/train/a/|../input/images/train/A/",
    ),
}


@pytest.mark.parametrize("case", PLACES)
def test_folders_above_the_images_may_be_named(tmp_path, case):
    place, file, before = PLACES[case]
    (tmp_path / "test").mkdir()
    other = file.replace("0.png", "1.JPG")
    source = ImageSource(empty(tmp_path / place, file, other))
    for folders in before.split("|"):
        assert source.find(f"{folders}0.png") == source.find(f"{folders}0") == file, folders
        assert source.find(f"{folders}1.jpg") == other, folders
        assert source.find(f"{folders}2.png") is None


def test_a_name_with_the_folder_of_another_place_is_no_other_file(tmp_path):
    source = ImageSource([empty(tmp_path / "left", "1.png", "5.png"), empty(tmp_path / "right", "2.png")])
    assert source.find("left/5.png") == source.find("../x/left/5.png") == source.find("5.png") == "5.png"
    assert source.find("right/2.png") == "2.png"
    assert source.find("right/5.png") is source.find("left/2.png") is None


def test_every_file_is_taken_or_named_as_left_out(tmp_path):
    jpeg = saved(Image.fromarray(PICTURES[0]), "JPEG")
    images = {
        **dict.fromkeys(("0.jfif", "1.JPE", "2.PNG", "owl/3.jp2"), b""),
        "4": jpeg,
        "5": FILES["train/0000.png"],
        "1.2.840.6": bytes(128) + b"DICM",
        "owl/7": npy(PICTURES[0]),
    }
    litter = "._0.png", "__MACOSX/._0.png", "Thumbs.db", ".DS_Store", "owl/@eaDir/0.png", "owl/desktop.ini"
    others = "notes.txt", "8.xyz", "README", "owl/.ipynb_checkpoints/0.png", ".git/1.png", ".2.png"
    files = images | dict.fromkeys(litter + others, b"text")
    write_zip(tmp_path / "b.zip", files)
    for path in (write_folder(tmp_path / "a", files), tmp_path / "b.zip", write_tar(tmp_path / "c.tar", files)):
        source = ImageSource(path)
        assert {*source.files} == {*images}
        assert {*source.left_out} == {*others}
    assert (source.picture("5").pixels == PICTURES[0]).all()
    assert (source.picture("owl/7").pixels == PICTURES[0]).all()


@pytest.mark.parametrize(
    ("files", "words"),
    {
        ("0.cr2", "1.CR2", "notes.txt"): "holds no images but 0.cr2, 1.CR2, notes.txt: convert the .cr2 files to PNG",
        ("cat.zip", "dog.zip"): "holds no images but cat.zip, dog.zip: unpack the archives",
        ("train.csv",): "holds no images but train.csv: put the images there",
        (): "holds no images, and no other files: put the images there",
    }.items(),
)
def test_a_folder_of_files_of_other_kinds_is_refused_with_the_remedy(tmp_path, files, words):
    (tmp_path / "a").mkdir()
    with pytest.raises(UserError, match=words):
        ImageSource(write_folder(tmp_path / "a", dict.fromkeys(files, b"x")))


def test_links_are_followed_and_loops_are_not(tmp_path):
    write_folder(tmp_path / "disk", {"owl/0.png": FILES["train/0000.png"], "1.png": FILES["train/0001.png"]})
    folder = write_folder(tmp_path / "a", {"cat/2.png": FILES["train/0002.png"]})
    (tmp_path / "disk" / "owl" / "back").symlink_to(folder)
    links = {"owl": "../disk/owl", "1.png": "../disk/1.png", "dead.png": "nowhere", "self": "self", "cat/up": ".."}
    for name, target in (links | {"again": "cat"}).items():
        (folder / name).symlink_to(target)
    source = ImageSource(folder)
    assert {*source.files} == {"owl/0.png", "1.png", "cat/2.png"}
    assert {*source.left_out} == {f"{name} (link)" for name in ("dead.png", "self", "cat/up", "again", "owl/back")}
    for i, name in enumerate(("owl/0.png", "1", "cat/2")):
        assert (source.picture(name).pixels == PICTURES[i]).all()


def test_what_is_near_a_missing_file_is_listed_with_the_likeliest_first(tmp_path):
    folder = write_folder(
        tmp_path / "a", dict.fromkeys(("Train_Images/x", "test1/x", "train_images.csv", "Thumbs.db"), b"")
    )
    assert nearby(folder, "train_images.zip") == "there are: Train_Images, test1, train_images.csv (Train_Images?)"
    assert nearby(folder, "train.csv") == "there are: train_images.csv, Train_Images, test1 (train_images.csv?)"
    assert nearby(folder, "test") == "there are: test1, Train_Images, train_images.csv (test1?)"
    assert nearby(folder, "sample_submit.csv") == "there are: train_images.csv, Train_Images, test1"
    assert nearby(tmp_path / "b", "train") == f"{tmp_path / 'b'} is empty or missing"


def test_the_case_of_an_ending_does_not_matter_where_one_file_is_meant(tmp_path):
    source = ImageSource(write_folder(tmp_path / "a", dict.fromkeys(("t/a.JPG", "t/b.png", "t/c.PNG", "t/c.png"), b"")))
    assert source.find("a.jpg") == source.find("t/a.Jpg") == "t/a.JPG"
    assert source.find("b.PNG") == "t/b.png"
    assert (source.find("c.png"), source.find("c.PNG"), source.find("c.Png")) == ("t/c.png", "t/c.PNG", None)
    assert source.find("A.JPG") is None
    assert source.find("a.png") is None


# ---------------------------------------------------------------- archives


def test_a_tar_is_read_in_place(tmp_path):
    write_tar(tmp_path / "train.tar", {f"./{name}": content for name, content in FILES.items()})
    with tarfile.open(tmp_path / "train.tar", "a") as tar:
        link = tarfile.TarInfo("train/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    holds_all(ImageSource(tmp_path / "train.tar"))
    assert [path.name for path in tmp_path.iterdir()] == ["train.tar"]
    (tmp_path / "train.tar").write_bytes(b"<html>" * 200)
    with pytest.raises(UserError, match=r"train\.tar is no tar archive.*download it again"):
        ImageSource(tmp_path / "train.tar")


PACKERS = {
    "train.tar.gz": lambda path: write_tar(path, FILES, "w:gz"),
    "train.TGZ": lambda path: write_tar(path, FILES, "w:gz"),
    "train.7z": lambda path: write_7z(path, FILES),
    "train.tar.7z": lambda path: write_7z(path, {"train.tar": packed_bytes(path, "w")}),
}


def packed_bytes(path, mode):
    inner = write_tar(path.with_name("inner"), FILES, mode)
    data = inner.read_bytes()
    inner.unlink()
    return data


@pytest.mark.parametrize("name", PACKERS)
def test_packed_archives_are_unpacked_once(tmp_path, name):
    path, unpacked = tmp_path / name, tmp_path / "unpacked"
    PACKERS[name](path)
    with pytest.raises(UserError, match="can't be read in place: unpack it"):
        ImageSource(path)
    source = ImageSource(path, unpacked=unpacked)
    holds_all(source)
    (made,) = [folder for folder in unpacked.iterdir() if folder.is_dir()]
    before = made.stat().st_ino
    assert ImageSource(path, unpacked=unpacked).fingerprint == source.fingerprint
    assert made.stat().st_ino == before, "nothing was unpacked again"
    os.utime(path, (1, 1))
    holds_all(ImageSource(path, unpacked=unpacked))
    assert made.stat().st_ino != before, "another archive"
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(UserError, match=r"train\..* is no .*download it again"):
        ImageSource(path, unpacked=unpacked)
    assert [folder for folder in unpacked.iterdir() if folder.is_dir()] == [made], "nothing half unpacked is left"


def test_two_archives_of_one_name_are_kept_apart(tmp_path):
    for part, name in (("train", "train/0000.png"), ("test", "train/0001.png")):
        (tmp_path / part).mkdir()
        write_tar(tmp_path / part / "images.tgz", {name: FILES[name]}, "w:gz")
    places = [ImageSource(tmp_path / part / "images.tgz", unpacked=tmp_path / "u") for part in ("train", "test")]
    assert [[*source.files] for source in places] == [["train/0000.png"], ["train/0001.png"]]


@pytest.mark.parametrize("kind", ["tgz", "7z"])
def test_nothing_is_unpacked_outside(tmp_path, kind):
    files, path = {"../../../evil.png": b"x", "a.png": b"y"}, tmp_path / f"a.{kind}"
    if kind == "tgz":
        write_tar(path, files, "w:gz")
    else:
        write_7z(path, {"aaaaaaaaaaaaaa.png": b"x"} | {"a.png": b"y"}, header_encryption=False)
        data = path.read_bytes()
        name = "aaaaaaaaaaaaaa.png".encode("utf-16-le")
        if name not in data:
            write_7z_raw(path)
            data = path.read_bytes()
        evil = data.replace(name, "../../../evil1.png".encode("utf-16-le"))
        assert evil != data
        path.write_bytes(mended_7z(evil))
    with pytest.raises(UserError, match=rf"a\.{kind} is"):
        ImageSource(path, unpacked=tmp_path / "u" / "v")
    assert not [*tmp_path.rglob("evil*")]


def write_7z_raw(path):
    """A 7z whose list of names isn't packed."""
    with pytest.importorskip("py7zr").SevenZipFile(path, "w") as archive:
        archive.set_encoded_header_mode(False)
        archive.writestr(b"x", "aaaaaaaaaaaaaa.png")
        archive.writestr(b"y", "a.png")


def mended_7z(data):
    """A changed 7z with the checksums that its header then needs."""
    offset, size, _ = struct.unpack("<QQI", data[12:32])
    start = struct.pack("<QQI", offset, size, zlib.crc32(data[32 + offset : 32 + offset + size]))
    return data[:8] + struct.pack("<I", zlib.crc32(start)) + start + data[32:]


def test_links_in_packed_archives_are_left_out(tmp_path):
    path = write_tar(tmp_path / "a.tgz", FILES, "w:gz")
    with tarfile.open(path, "w:gz") as tar:
        for kind, name in ((tarfile.SYMTYPE, "s.png"), (tarfile.LNKTYPE, "h.png")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "/etc/passwd"
            tar.addfile(link)
        entry = tarfile.TarInfo("/absolute.png")
        entry.size = 1
        tar.addfile(entry, io.BytesIO(b"x"))
    assert [*ImageSource(path, unpacked=tmp_path / "u").files] == ["absolute.png"], "within the folder"
    write_folder(tmp_path / "f", {"a.png": b"x"})
    (tmp_path / "f" / "s.png").symlink_to("/etc/passwd")
    with pytest.importorskip("py7zr").SevenZipFile(tmp_path / "a.7z", "w") as archive:
        archive.writeall(tmp_path / "f", "f")
    assert [*ImageSource(tmp_path / "a.7z", unpacked=tmp_path / "u").files] == ["f/a.png"]


@pytest.mark.parametrize("kind", ["tgz", "7z"])
def test_what_does_not_fit_is_not_unpacked(tmp_path, kind, monkeypatch):
    files = {"a.png": bytes(2**20)}
    path = tmp_path / f"a.{kind}"
    write_tar(path, files, "w:gz") if kind == "tgz" else write_7z(path, files)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=archives.RESERVE + 2**20 - 1))
    with pytest.raises(UserError, match=r"a\.\w+ unpacks to more than the 0\.0 GiB that are free"):
        ImageSource(path, unpacked=tmp_path / "u")
    assert not [file for file in (tmp_path / "u").rglob("*") if not file.name.endswith(".lock")]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=archives.RESERVE + 2**20))
    assert [*ImageSource(path, unpacked=tmp_path / "u").files] == ["a.png"]


def test_a_disk_that_fills_up_while_unpacking_is_named(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    path = write_tar(tmp_path / "a.tgz", FILES, "w:gz")
    monkeypatch.setattr(tarfile.TarFile, "extract", full)
    with pytest.raises(UserError, match=r"a\.tgz can't be unpacked into .*u \(No space left on device\)"):
        ImageSource(path, unpacked=tmp_path / "u")


def test_encrypted_7z_and_missing_py7zr_are_named(tmp_path, monkeypatch):
    for i, options in enumerate(({}, {"header_encryption": True})):
        path = write_7z(tmp_path / f"{i}.7z", FILES, password="secret", **options)
        with pytest.raises(UserError, match=r"\.7z is encrypted: unpack it with its password"):
            ImageSource(path, unpacked=tmp_path / "u")
    monkeypatch.setitem(sys.modules, "py7zr", None)
    with pytest.raises(UserError, match=r"0\.7z needs py7zr: pip install py7zr"):
        ImageSource(tmp_path / "0.7z", unpacked=tmp_path / "u")


def write_deflate64(path, files):
    """A zip that claims to be packed by method 9, as Windows Explorer packs more than 2 GB."""
    write_zip(path, files)
    data = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        at = data.find(mark)
        while at >= 0:
            data[at + offset] = 9
            at = data.find(mark, at + 4)
    path.write_bytes(data)


def test_an_unknown_packing_is_named_with_the_remedy(tmp_path, monkeypatch):
    write_deflate64(tmp_path / "a.zip", FILES)
    with pytest.raises(
        UserError, match=r"a\.zip: its packing \(method 9\) isn't known here: unpack it into .*/a \(7z, Ex"
    ):
        ImageSource(tmp_path / "a.zip")
    (tmp_path / "a.rar").write_bytes(b"Rar!\x1a\x07\x01\x00")
    with pytest.raises(UserError, match=r"a\.rar is no zip, tar, tar\.gz or 7z: unpack it, and name the folder"):
        ImageSource(tmp_path / "a.rar")
    errors = pytest.importorskip("py7zr").exceptions

    def extract(*_, **__):
        raise errors.UnsupportedCompressionMethodError(b"", "Unknown method code:b'9'")

    monkeypatch.setattr("py7zr.SevenZipFile.extract", extract)
    with pytest.raises(UserError, match=r"a\.7z: its packing \(Unknown method code:b'9'\) isn't known here"):
        ImageSource(write_7z(tmp_path / "a.7z", FILES), unpacked=tmp_path / "u")


@pytest.mark.parametrize(
    ("name", "remedy"),
    {
        "train.zip.001": "is one of several parts: join them, cat {0}/train.zip.* > {0}/train.zip",
        "train.TAR.GZ.002": "is one of several parts: join them, cat {0}/train.TAR.GZ.* > {0}/train.TAR.GZ",
        **{
            f"train.{ending}": f"is packed by bz2 or xz: unpack it, tar -xf {{0}}/train.{ending}, and name the folder"
            for ending in ("tar.bz2", "tbz2", "tbz", "tar.xz", "TXZ")
        },
    }.items(),
)
def test_what_is_not_read_is_refused_with_the_remedy(tmp_path, name, remedy):
    write_zip(tmp_path / name, FILES)
    with pytest.raises(UserError) as error:
        ImageSource(tmp_path / name, unpacked=tmp_path / "u")
    assert str(error.value) == f"{tmp_path / name} {remedy.format(tmp_path)}"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_is_read_whatever_its_name(tmp_path):
    for name in ("train.zip.001", "train.tar.xz", "train.7z"):
        holds_all(ImageSource(write_folder(tmp_path / name, FILES)))


@pytest.mark.parametrize("name", ["a.tar", "a.zip", "a.7z", "a.tgz", "a"])
def test_a_missing_archive_is_named(tmp_path, name):
    with pytest.raises(UserError, match=rf"{name} is missing: download it$"):
        ImageSource(tmp_path / name, unpacked=tmp_path / "u")


def test_a_zip_with_z01_is_to_be_joined(tmp_path):
    write_zip(tmp_path / "a.zip", FILES)
    (tmp_path / "a.z01").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"a\.zip is one of several parts: join them, zip -s 0"):
        ImageSource(tmp_path / "a.zip")


# ---------------------------------------------------------------- three files an image


def test_three_files_are_the_channels_of_one_image(tmp_path):
    greys = {name: RNG.integers(0, 256, (5, 4)).astype(np.uint8) for name in ("red", "green", "blue", "yellow")}
    files = {f"t/1.5_{name}.png": saved(Image.fromarray(grey), "PNG") for name, grey in greys.items()}
    blue = np.zeros((5, 4, 3), np.uint8)
    blue[..., 2] = greys["blue"]
    files |= {"t/1.5_blue.png": png(blue), "t/lacking_red.png": b"", "t/lacking_green.png": b""}
    files |= {"t/x_red.png": png(blue), "t/x_green.png": png(blue), "t/x_blue.png": png(blue[1:])}
    folder, channels = write_folder(tmp_path / "a", files), ("_red", "_green", "_blue")
    source = ImageSource(folder, channels=channels)
    assert {*source.files} == {"t/1.5.png", "t/x.png"}
    assert source.find("1.5") == source.find("t/1.5") == "t/1.5.png"
    assert source.find("lacking") is None
    expected = np.stack([greys["red"], greys["green"], greys["blue"]], axis=2)
    assert (source.picture("1.5").pixels == expected).all()
    with pytest.raises(ValueError, match="differ in size"):
        source.picture("x")
    with pytest.raises(UserError, match="no image with files for all of _a, _b, _c"):
        ImageSource(folder, channels=("_a", "_b", "_c"))
    with pytest.raises(UserError, match="--channels _red: give three"):
        ImageSource(folder, channels=("_red",))


# ---------------------------------------------------------------- TIFF and PNG of more bits, bands and pages


def write_tiff(samples, **options):
    """The bytes of a TIFF of [H, W, C] samples, as tifffile writes it."""
    if options.get("planarconfig") == "separate":
        samples = np.moveaxis(samples, -1, 0)
    data = io.BytesIO()
    options = dict(photometric="minisblack", planarconfig="contig", metadata=None, rowsperstrip=3) | options
    pytest.importorskip("tifffile").imwrite(data, samples, **options)
    return data.getvalue()


def with_tags(data, tags):
    """The bytes of a TIFF with other values in some of its tags."""
    file = io.BytesIO(data)
    with pytest.importorskip("tifffile").TiffFile(file, mode="r+") as opened:
        for tag, value in tags.items():
            opened.pages[0].tags[tag].overwrite(value)
    return file.getvalue()


def stretched(band):
    low, high = np.percentile(band.astype(np.float64), (2, 98))
    return np.clip(np.rint((band.astype(np.float64) - low) * (255 / (high - low))), 0, 255).astype(np.uint8)


def bands_of(count, dtype, height=11, width=37):
    if np.dtype(dtype).kind == "f":
        return RNG.normal(size=(height, width, count)).astype(dtype)
    info = np.iinfo(dtype)
    return RNG.integers(info.min, info.max, (height, width, count), dtype=dtype)


STORED = [
    dict(),
    dict(byteorder=">"),
    dict(bigtiff=True),
    dict(planarconfig="separate"),
    dict(compression="zlib"),
    dict(compression="lzw", predictor=2),
    dict(compression="zlib", predictor=2, byteorder=">", planarconfig="separate"),
    dict(compression="zstd"),
    dict(compression="lzma"),
    dict(compression="packbits", byteorder=">"),
    dict(tile=(16, 16)),
    dict(tile=(16, 16), compression="zlib", predictor=2, planarconfig="separate"),
    dict(tile=(16, 16), compression="zlib", predictor=2, byteorder=">"),
]


@pytest.mark.parametrize("stored", STORED, ids=str)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "uint32", "float32", "float64"])
def test_bands_of_a_tiff(stored, dtype):
    samples = bands_of(12, dtype)
    floats = {"predictor": 3} if samples.dtype.kind == "f" and "predictor" in stored else {}
    data = write_tiff(samples, **stored | floats)
    seen = decode(data, bands=(4, 3, 12))
    assert (seen == np.stack([stretched(samples[..., i]) for i in (3, 2, 11)], axis=2)).all()
    assert (decode(data, bands=(5,)) == stretched(samples[..., 4])[..., None]).all()
    with pytest.raises(ValueError, match=r"^12 bands: say which three with --bands$"):
        decode(data)
    with pytest.raises(ValueError, match="no band 13: it has 12"):
        decode(data, bands=(1, 2, 13))


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("tile", [None, (16, 16)])
def test_floats_with_their_predictor(order, tile):
    samples = bands_of(5, "float32")
    data = write_tiff(samples, byteorder=order, compression="zlib", predictor=3, tile=tile)
    assert (decode(data, bands=(5, 1, 2)) == np.stack([stretched(samples[..., i]) for i in (4, 0, 1)], 2)).all()


def test_tiffs_packed_by_pillow_itself():
    grey = bands_of(1, "float32")[..., 0]
    packings = ("tiff_lzw", 1), ("tiff_lzw", 2), ("tiff_adobe_deflate", 3), ("packbits", 1), ("raw", 1)
    for packing, predictor in packings:
        data = saved(Image.fromarray(grey), "TIFF", compression=packing, tiffinfo={317: predictor})
        assert (decode(data, bands=(1,)) == stretched(grey)[..., None]).all()
        with pytest.raises(ValueError, match="floating-point values: say which bands"):
            decode(data)
    with pytest.raises(ValueError, match="compression 7"):
        decode(saved(Image.fromarray(PICTURES[0]), "TIFF", compression="jpeg"), bands=(1, 2, 3))


def test_bands_are_turned_upright():
    samples = bands_of(5, "uint16")
    turned = decode(write_tiff(samples, extratags=[(274, "H", 1, 6, True)]), bands=(1, 2, 3))
    assert (turned == np.rot90(decode(write_tiff(samples), bands=(1, 2, 3)), -1)).all()


def test_missing_values_and_flat_bands():
    samples = bands_of(5, "float32")
    samples[0, 0, 0], samples[..., 1] = np.nan, 7
    seen = decode(write_tiff(samples), bands=(1, 2, 3))
    assert seen[0, 0, 0] == 0
    assert len(np.unique(seen[..., 0])) > 100
    assert (seen[..., 1] == 0).all()


@pytest.mark.parametrize("bits", [10, 12, 16])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Tag data")
def test_16_bit_rgb_is_scaled_by_the_depth_that_it_uses(bits):
    levels = RNG.integers(0, 2**bits, (20, 30, 3)).astype(np.uint16)
    levels[0, 0] = 2**bits - 1
    expected = (levels >> (bits - 8)).astype(np.uint8)
    encoded = cv2.imencode(".png", levels[..., ::-1])[1].tobytes(), cv2.imencode(".tif", levels[..., ::-1])[1].tobytes()
    for data in (*encoded, *(write_tiff(levels, photometric="rgb", byteorder=order) for order in "<>")):
        assert (decode(data) == expected).all()
        with pytest.raises(ValueError, match=r"."):
            decode(data[: len(data) // 2])
    turned = write_tiff(levels, photometric="rgb", extratags=[(274, "H", 1, 6, True)])
    assert (decode(turned) == np.rot90(expected, -1)).all()
    alpha = np.dstack([levels, np.zeros((20, 30), np.uint16)])
    alpha[:5, ..., 3] = 65535
    for data in (
        cv2.imencode(".png", alpha[..., [2, 1, 0, 3]])[1].tobytes(),
        write_tiff(alpha, photometric="rgb", extrasamples=["unassalpha"]),
    ):
        seen = decode(data)
        assert (seen[:5] == expected[:5]).all()
        assert (seen[5:] == 255).all(), "transparent"


def test_samples_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match=r"^samples of 64 bits, format 6$"):
        decode(write_tiff(bands_of(5, "float32").astype(np.complex64)), bands=(1, 2, 3))


DAMAGED = [
    dict(),
    dict(planarconfig="separate"),
    dict(compression="zlib", predictor=2),
    dict(compression="lzw", tile=(16, 16)),
    dict(compression="packbits", bigtiff=True),
]


@pytest.mark.parametrize("stored", DAMAGED, ids=str)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Tag", "ignore:Truncated", "ignore:Metadata")
def test_damaged_tiffs_are_refused_in_silence(stored, capfd, caplog):
    whole = write_tiff(bands_of(5, "uint16"), **stored)
    expected, rng, refused = decode(whole, bands=(1, 2, 3)), np.random.default_rng(0), 0
    for length in range(0, len(whole), 17):
        try:
            seen = decode(whole[:length], bands=(1, 2, 3))
        except ValueError:
            refused += 1
        else:
            assert (seen == expected).all(), f"of {length} bytes: half an image passes for a complete one"
    assert refused > 20
    for _ in range(200):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 3):
            data[place] = rng.integers(256)
        try:
            assert decode(bytes(data), bands=(1, 2, 3)).dtype == np.uint8
        except ValueError as error:
            assert str(error)  # noqa: PT017 (most damages are read)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_missing_strips_are_not_filled():
    data = write_tiff(bands_of(5, "uint16", height=12), compression="zlib")
    for tags in ({257: 500}, {273: [0] * 4}, {279: [0] * 4}, {273: [2**20] * 4}):
        with pytest.raises(ValueError, match=r"^truncated$"):
            decode(with_tags(data, tags), bands=(1, 2, 3))
    with pytest.raises(ValueError, match="corrupted strip"):
        decode(with_tags(data, {278: 6}), bands=(1, 2, 3))


def crafted(tags, strip=b"", **stored):
    """A small TIFF of one zlib strip of 9 × 9 px and 5 bands, or of `strip`, with other values in some of its tags."""
    data = write_tiff(bands_of(5, "float64", 9, 9), **dict(rowsperstrip=9, compression="zlib") | stored)
    return with_tags(data + strip, ({273: len(data), 279: len(strip)} if strip else {}) | tags)


def jpeg_of(size):
    """The bytes of a JPEG that says that it has so many px a side."""
    data = bytearray(saved(Image.new("RGB", (64, 64)), "JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", size, size)
    return bytes(data)


BYTES = {258: [8] * 5, 339: [1] * 5}  # bits and kind of the samples
CRAFTED = {
    "100000 × 100000 px": lambda: crafted({256: 100_000, 257: 100_000, 278: 100_000}),
    "9000 × 9000 px of 64 bits": lambda: crafted({256: 9000, 257: 9000, 278: 9000}),
    "20000 × 20000 px of a byte": lambda: crafted(BYTES | {256: 20_000, 257: 20_000, 278: 20_000, 277: 1}),
    "60000 bands": lambda: crafted({277: 60_000, 256: 10_000}),
    "tiles of 4096 px": lambda: crafted({322: 4096, 323: 4096}, tile=(16, 16)),
    "a strip that unpacks to 256 MiB": lambda: crafted({}, zlib.compress(bytes(2**28))),
    "a JPEG larger than the tags say": lambda: crafted(BYTES | {259: 7, 277: 3}, jpeg_of(8192)),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_small_tiff_takes_little_memory(name):
    data = CRAFTED[name]()
    assert len(data) < 2**19
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"."):
        decode(data, bands=(1, 2, 3))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23


def test_tifffile_is_asked_for_only_where_it_is_needed(slide, monkeypatch):
    levels = bands_of(3, "uint16")
    bands, colours = write_tiff(levels, compression="lzw"), write_tiff(levels, photometric="rgb")
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    assert decode(colours).shape == levels.shape
    with pytest.raises(UserError, match=r"need tifffile: pip install tifffile imagecodecs$"):
        decode(bands, bands=(1, 2, 3))
    monkeypatch.setitem(sys.modules, "tifffile", None)
    for data, asked in ((bands, (1, 2, 3)), (colours, None)):
        with pytest.raises(UserError, match=r"need tifffile: pip install tifffile imagecodecs$"):
            decode(data, bands=asked)
    for packing in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "raw"):
        seen = decode(saved(Image.fromarray(PICTURES[0]), "TIFF", compression=packing))
        assert packing == "jpeg" or (seen == PICTURES[0]).all()
    grey = levels[..., 0] | 2**15
    assert (decode(saved(Image.fromarray(grey), "TIFF")) == (grey >> 8)[..., None]).all()
    assert (decode(slide) == 130).all()


def test_bands_are_of_no_use_to_photos(tmp_path):
    assert (decode(FILES["train/0000.png"], bands=(3, 2, 1)) == PICTURES[0]).all()
    for bands in ((1, 2), (0, 1, 2)):
        with pytest.raises(UserError, match=r"--bands \d \d.*: give three, or one"):
            ImageSource(tmp_path, bands=bands)
    samples = bands_of(5, "uint16")
    write_folder(tmp_path / "a", {"x.tif": write_tiff(samples)})
    seen = ImageSource(tmp_path / "a", bands=(2, 3, 4)).picture("x").pixels
    assert (seen == np.stack([stretched(samples[..., i]) for i in (1, 2, 3)], 2)).all()


@pytest.fixture(scope="module")
def slide():
    """A pyramid: a first page too large for Pillow, a label, two levels."""
    pages = [Image.new("L", (20000, 10000)), Image.new("L", (4096, 4096), 50), Image.new("L", (5000, 2500), 90)]
    pages += [Image.new("L", (2500, 1250), 130), Image.new("L", (1250, 625), 170)]
    return saved(pages[0], "TIFF", compression="tiff_lzw", save_all=True, append_images=pages[1:])


def test_a_slide_is_read_by_its_level(slide, tmp_path, monkeypatch):
    seen = decode(slide)
    assert seen.shape == (1250, 2500, 3)
    assert (seen == 130).all()
    write_folder(tmp_path / "a", {"x.tiff": slide, "x2.png": FILES["train/0000.png"]})
    monkeypatch.setattr("kit.data.image_source.MOST_BYTES", 50)
    source = ImageSource(tmp_path / "a")
    assert (source.picture("x").pixels == 130).all(), "a TIFF that is too large for memory is read from the disk"
    with pytest.raises(ValueError, match="MiB when unpacked"):
        source.picture("x2")


def test_a_slide_without_levels_is_refused():
    lone = saved(Image.new("1", (20000, 10000)), "TIFF", compression="group4")
    with pytest.raises(ValueError, match="exceeds limit"):
        decode(lone)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_jpeg_too_large_for_pillow_is_read_at_an_eighth():
    large = np.zeros((12000, 16000), np.uint8)
    large[:, 8000:] = 200
    data = saved(Image.fromarray(large), "JPEG")
    seen = decode(data)
    assert seen.shape == (1500, 2000, 3)
    assert (seen[:, :999] == 0).all()
    assert np.abs(seen[:, 1001:].astype(int) - 200).max() < 3
    with pytest.raises(ValueError, match="truncated"):
        decode(data[: len(data) // 2])
    start = data.index(b"\xff\xc0")
    progressive = data[:start] + b"\xff\xc2" + data[start + 2 :]
    with pytest.raises(ValueError, match="16000 × 12000 px"):
        decode(progressive)


# ---------------------------------------------------------------- arrays


def npy(array, **options):
    data = io.BytesIO()
    np.save(data, array, **options)
    return data.getvalue()


def test_arrays():
    picture = PICTURES[0]
    assert (decode(npy(picture)) == picture).all()
    assert (decode(npy(np.moveaxis(picture, 2, 0))) == picture).all()
    assert (decode(npy(picture[..., 0])) == picture[..., :1]).all()
    assert (decode(npy(picture[..., :1])) == picture[..., :1]).all()
    assert (decode(npy(picture[..., 0] > 99)) == (picture[..., :1] > 99) * 255).all()
    assert (decode(npy(np.asfortranarray(picture))) == picture).all()
    stack = RNG.normal(size=(6, 9, 8)).astype(np.float16)
    assert (decode(npy(stack)) == stretched(stack.reshape(54, 8))[..., None]).all()
    assert (decode(npy(stack), bands=(6, 1, 2)) == np.stack([stretched(stack[i]) for i in (5, 0, 1)], 2)).all()
    assert (decode(npy(stack[:3])) == np.moveaxis(stretched(stack[:3]), 0, 2)).all()
    with pytest.raises(ValueError, match="no band 7: it has 6"):
        decode(npy(stack), bands=(7,))


@pytest.mark.parametrize(
    "array", [np.zeros(3), np.zeros((2, 2, 2, 2)), np.zeros((0, 4)), np.full((2, 2), "a")], ids=str
)
def test_arrays_that_are_no_pictures(array):
    with pytest.raises(ValueError, match="is no picture"):
        decode(npy(array))


def test_pickles_and_truncated_arrays_are_refused():
    with pytest.raises(ValueError, match="Object arrays cannot be loaded"):
        decode(npy(np.array([[{}]]), allow_pickle=True))
    data = npy(np.zeros((50, 50)))
    with pytest.raises(ValueError, match="read"):
        decode(data[:-9])
    with pytest.raises(ValueError, match=r"."):
        decode(data.replace(b"(50, 50)", b"(9**9,9)"))


# ---------------------------------------------------------------- DICOM


def write_dicom(stored, kind="MONOCHROME2", **tags):
    pydicom = pytest.importorskip("pydicom")
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = "1.2.3"
    data.Rows, data.Columns = stored.shape[:2]
    data.BitsAllocated, data.BitsStored, data.HighBit = (
        stored.itemsize * 8,
        stored.itemsize * 8,
        stored.itemsize * 8 - 1,
    )
    data.PixelRepresentation, data.PhotometricInterpretation = int(stored.dtype.kind == "i"), kind
    data.SamplesPerPixel = stored.shape[2] if stored.ndim == 3 else 1
    if stored.ndim == 3:
        data.PlanarConfiguration = 0
    data.PixelData = stored.tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    file = io.BytesIO()
    pydicom.dcmwrite(file, data, enforce_file_format=True)
    return file.getvalue()


RAMP = (np.arange(64 * 4, dtype=np.uint16) * 16).reshape(4, 64)  # 0 to 4080


def test_dicom_without_window_is_spread_over_its_values():
    expected = np.rint(RAMP * (255 / 4080)).astype(np.uint8)[..., None]
    assert (decode(write_dicom(RAMP)) == expected).all()
    assert (decode(write_dicom(RAMP, RescaleSlope=2, RescaleIntercept=-9)) == expected).all()
    assert (decode(write_dicom(RAMP, "MONOCHROME1")) == 255 - expected).all()
    assert (decode(write_dicom(RAMP.astype(np.int16) - 2000)) == expected).all()


@pytest.mark.parametrize("center", [1000, 3900], ids=["within", "wider than the image"])
def test_dicom_is_seen_through_its_window(center):
    values = RAMP.astype(float) * 2 - 100
    share = np.clip((values - (center - 0.5)) / (800 - 1) + 0.5, 0, 1)
    seen = decode(write_dicom(RAMP, WindowCenter=center, WindowWidth=800, RescaleSlope=2, RescaleIntercept=-100))
    assert np.abs(seen.astype(float) - share[..., None] * 255).max() <= 0.51
    narrow = decode(write_dicom(RAMP[:1] // 16, WindowCenter=50, WindowWidth=1000))
    assert 100 < narrow.min() <= narrow.max() < 150, "a window wider than the values isn't spread"


def test_dicom_with_a_table_of_grey_values():
    pydicom = pytest.importorskip("pydicom")
    table = pydicom.Dataset()
    table.LUTDescriptor, table.LUTData = [256, 0, 8], [*range(255, -1, -1)]
    table["LUTData"].VR = "US"
    stored = np.arange(100, 200, dtype=np.uint8).reshape(10, 10)
    assert (decode(write_dicom(stored, VOILUTSequence=[table])) == (255 - stored)[..., None]).all()


def test_dicom_in_colour_of_several_frames_and_damaged(tmp_path):
    assert (decode(write_dicom(PICTURES[0], "RGB")) == PICTURES[0]).all()
    frames = np.concatenate([RAMP, RAMP[::-1, ::-1]])
    data = write_dicom(frames, NumberOfFrames=2, Rows=4)
    assert (decode(data) == decode(write_dicom(RAMP))).all()
    for length in range(140, len(data), 97):
        with pytest.raises(ValueError, match=r"."):
            decode(data[:length])
    with pytest.raises(ValueError, match="are too many"):
        decode(write_dicom(RAMP, Rows=60000, Columns=60000))
    write_zip(tmp_path / "a.zip", {"t/1.2.840.dcm": write_dicom(PICTURES[1], "RGB")})
    assert (ImageSource(tmp_path / "a.zip").picture("1.2.840").pixels == PICTURES[1]).all()


def test_missing_pydicom_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UserError, match="DICOM images need pydicom: pip install pydicom"):
        decode(bytes(128) + b"DICM")
    with pytest.raises(ValueError, match="no image"):
        decode(bytes(128) + b"DICN")
