"""Mistakes in tables, archives and images: exit code 2, one line with culprit and remedy, nothing changed. Odd files
that are read nevertheless."""

import io
import shutil
import warnings
import zipfile

import numpy as np
import pytest
from conftest import done, png, toy_image, write_zip
from damage import PREPARE, build_world, edited, flags_of, refused_untouched, without
from PIL import Image

from kit.data.decode import decode


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small competition, prepared. → its folder, for reading only."""
    folder = tmp_path_factory.mktemp("world")
    build_world(folder)
    return folder


@pytest.fixture
def copy(world, tmp_path):
    """A copy of the world for damaging. → its folder."""
    shutil.copytree(world, tmp_path / "world")
    return tmp_path / "world"


# ---------------------------------------------------------------- tables


def train_csv(text, encoding="utf-8"):
    def damage(inputs):
        (inputs / "train.csv").write_bytes(text if isinstance(text, bytes) else text.encode(encoding))

    return damage


def rows(first, *others):
    """→ a function that puts these rows in place of train.csv's first ones."""
    return edited(
        "train.csv", lambda text: "\n".join(["image_name,label", first, *others, *text.splitlines()[2 + len(others) :]])
    )


TABLES = {
    "train.csv missing": (without("train.csv"), [], "train.csv is missing: put"),
    "train.csv empty": (train_csv(""), [], "train.csv is empty"),
    "train.csv of blank lines": (train_csv("\n\r\n , \n"), [], "train.csv is empty"),
    "train.csv header only": (train_csv("image_name,label\n"), [], "a header and no rows"),
    "train.csv with names that are no images": (
        edited("train.csv", lambda t: t.replace("image_name", "id").replace(".png", ".x")),
        [],
        "no such column as 'image_name': name one of id, label with --image-column",
    ),
    "train.csv of two wrong columns": (
        edited("train.csv", lambda t: t.replace("label", "class,x").replace(".png,", ".png,0,")),
        [],
        "--label-column",
    ),
    "train.csv with two label columns": (train_csv("image_name,label,label\na,0,0\n"), [], "several columns 'label'"),
    "train.csv ragged": (rows("0000.png,0,1"), [], "another number of cells than the first row (2) in row 2"),
    "train.csv binary": (train_csv(b"\x89PNG\r\n\x1a\n\x00\x81\xff\xfe\xfd"), [], "neither UTF-8 nor cp932"),
    "train.csv with an endless cell": (train_csv('image_name,label\n"' + "x" * 200_000), [], "no table of values"),
    "train.csv is a folder": (
        lambda inputs: (without("train.csv")(inputs), (inputs / "train.csv").mkdir()),
        [],
        "train.csv can't be read",
    ),
    "a name twice": (rows("0001.png,0"), [], "names 0001.png more than once"),
    "a name spelt twice": (rows("0001,1"), [], "0001.png more than once"),
    "no name": (rows(",0"), [], "without an image name"),
    "no label": (rows("0000.png,"), [], "no label for 0000.png"),
    "label NaN": (rows("0000.png,NaN"), [], "no label for 0000.png"),
    "mixed types": (rows("0000.png,0.0", "0001.png,1", "0002.png,0.0"), [], "0.0 and 0, which are one number"),
    "leading zeros": (rows("0000.png,00", "0001.png,1", "0002.png,00"), [], "one number: spell them alike"),
    "one class": (edited("train.csv", lambda t: t.replace("png,1", "png,0")), [], "one class only (0)"),
    "too many folds": (lambda inputs: None, ["--folds", 13], "a fold lacks 0 (images: 12, groups: 12), 1 "),
    "an image missing": (rows("x.png,0"), [], "lacks 1 of the images"),
    "images missing": (
        edited("train.csv", lambda t: t.replace(".png", ".jpg")),
        [],
        "0000.jpg, 0001.jpg, 0002.jpg, 0003.jpg, 0004.jpg, 0005.jpg, 0006.jpg, "
        "0007.jpg, 0008.jpg, 0009.jpg and 14 more",
    ),
    "name NA": (rows("NA,0"), [], "lacks 1 of the images"),
    "absolute name": (rows("/etc/passwd,0"), [], "/etc/passwd"),
    "name with ..": (rows("../secret.png,0"), [], "../secret.png"),
    "name with a drive letter": (rows("C:\\secret.png,0"), [], "C:\\secret.png"),
    "name with a line break": (rows('"a\nb.png",0'), [], "a\\nb.png"),
    "name with a terminal code": (rows("\x1b[31mred.png,0"), [], "\\x1b[31mred.png"),
    "--train-csv elsewhere": (lambda inputs: None, ["--train-csv", "nowhere.csv"], "nowhere.csv is missing"),
    "--image-column": (
        lambda inputs: None,
        ["--image-column", "id"],
        "no such column as 'id': name one of image_name, label",
    ),
    "sample missing": (without("sample_submit.csv"), [], "sample_submit.csv is missing"),
    "sample empty": (edited("sample_submit.csv", lambda t: ""), [], "sample_submit.csv is empty"),
    "sample header only": (edited("sample_submit.csv", lambda t: "id,value\n"), [], "names no test image"),
    "sample with a name twice": (
        edited("sample_submit.csv", lambda t: t + "t0.png,0.5\n"),
        [],
        "t0.png more than once",
    ),
    "sample with an unknown name": (edited("sample_submit.csv", lambda t: t + "x.png,0.5\n"), [], "images in"),
    "sample of wrong columns": (
        edited("sample_submit.csv", lambda t: "id,a,b\n" + t.replace("0.5", "0.5,0.5")),
        [],
        "2 value columns (a, b), and the classes are 0, 1",
    ),
    "sample of names alone": (
        edited("sample_submit.csv", lambda t: t.replace(",0.5", "")),
        [],
        "0 value columns",
    ),
    "sample whose first image is missing": (
        edited("sample_submit.csv", lambda t: "gone,0.5\n" + t),
        [],
        "lacks 1 of the images in",
    ),
    "sample of one probability of a word": (
        edited("train.csv", lambda t: t.replace("png,0", "png,ok").replace("png,1", "png,bad")),
        [],
        "sample_submit.csv wants the probability of one class (bad, ok): name it with --positive",
    ),
    "--positive unknown": (lambda inputs: None, ["--positive", "2"], "--positive 2: give one of two classes"),
    "--metric unknown": (lambda inputs: None, ["--metric", "aux"], "--metric: invalid choice: 'aux'"),
    "--limit 0": (lambda inputs: None, ["--limit", "0"], "--limit: 0 must be at least 1"),
    "--groups column": (lambda inputs: None, ["--groups", "product"], "no such column"),
    "--groups file": (lambda inputs: None, ["--groups", "nowhere.csv"], "nowhere.csv is missing"),
    "--embed without weights": (
        lambda inputs: None,
        ["--groups", "auto", "--embed", "test_vit", "--weights", "no.pth"],
        "no.pth",
    ),
    "--weights without --embed": (lambda inputs: None, ["--weights", "none"], "belongs to --embed"),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_mistake_in_a_table_is_refused(copy, case):
    damage, flags, words = TABLES[case]
    (copy / "secret.png").write_bytes(b"outside")
    damage(copy / "input")
    flags = [*PREPARE, "--overwrite", *flags]
    assert words in refused_untouched(copy, "00_prepare.py", *flags)


# ---------------------------------------------------------------- archives and images


def replaced(content, name="train/0000.png"):
    """→ a function that gives one image in train.zip another content."""

    def damage(inputs):
        with zipfile.ZipFile(inputs / "train.zip") as archive:
            files = {entry: archive.read(entry) for entry in archive.namelist()}
        files[name] = content
        write_zip(inputs / "train.zip", files)

    return damage


def bytes_of_zip(change):
    def damage(inputs):
        path = inputs / "train.zip"
        path.write_bytes(change(bytearray(path.read_bytes())))

    return damage


def another_entry(inputs):
    with warnings.catch_warnings(), zipfile.ZipFile(inputs / "train.zip", "a") as archive:
        warnings.simplefilter("ignore")  # zipfile's about the double name
        archive.writestr("train/0000.png", png(np.zeros((9, 9, 3), np.uint8)))


def encrypted(inputs):
    path = inputs / "train.zip"
    data = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.find(mark)
        while at >= 0:
            data[at + offset] |= 1
            at = data.find(mark, at + 4)
    path.write_bytes(data)


def bomb(inputs):
    archive = zipfile.ZipFile(inputs / "train.zip", "a", zipfile.ZIP_DEFLATED, compresslevel=1)
    with archive, archive.open("train/bomb.png", "w") as entry:
        for _ in range(600):
            entry.write(bytes(2**20))
    edited("train.csv", lambda text: text + "bomb.png,0\n")(inputs)


def nested(inputs):
    (inputs / "train.zip").rename(inputs / "inner.zip")
    write_zip(inputs / "train.zip", {"train.zip": (inputs / "inner.zip").read_bytes()})


def unpacked(inputs):
    """Turns the archive into a folder. → the folder."""
    with zipfile.ZipFile(inputs / "train.zip") as archive:
        archive.extractall(inputs)
    (inputs / "train.zip").unlink()
    return inputs / "train"


def link_out(inputs):
    folder = unpacked(inputs)
    (folder / "0000.png").rename(inputs.parent / "outside.png")
    (folder / "0000.png").symlink_to(inputs.parent / "outside.png")


def dead_link(inputs):
    folder = unpacked(inputs)
    (folder / "0000.png").unlink()
    (folder / "0000.png").symlink_to("nowhere.png")


def saved(image, kind, **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def huge_png():
    return saved(Image.new("1", (20000, 20000)), "PNG")


FLOAT_TIFF = saved(Image.fromarray(np.linspace(0, 1, 81, dtype=np.float32).reshape(9, 9)), "TIFF")
INT_TIFF = saved(Image.fromarray(np.full((9, 9), 2**20, np.int32)), "TIFF")
JPEG = saved(Image.fromarray(toy_image(np.random.default_rng(0), 0)), "JPEG")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) (w) file\n%%EOF"

ARCHIVES = {
    "no images at all": (without("train.zip"), "train.zip is missing"),
    "zip truncated": (bytes_of_zip(lambda data: data[: len(data) // 2]), "download it again"),
    "zip empty file": (bytes_of_zip(lambda data: b""), "no zip archive"),
    "zip is HTML": (bytes_of_zip(lambda data: b"<html>log in</html>"), "no zip archive"),
    "zip without entries": (lambda inputs: write_zip(inputs / "train.zip", {}), "holds no images but nothing"),
    "zip with wrong CRC": (bytes_of_zip(lambda data: data.replace(b"IDAT", b"IDAX", 1)), "Bad CRC-32"),
    "zip encrypted": (encrypted, "is encrypted: unpack it"),
    "zip in parts": (
        lambda inputs: (inputs / "train.zip").rename(inputs / "train.zip.001"),
        "train.zip.001 is one of several parts: join them",
    ),
    "zip nested": (nested, "holds no images but train.zip"),
    "zip with two entries of one name": (another_entry, "two different files named train/0000.png"),
    "zip bomb": (bomb, "bomb.png (600 MiB when unpacked"),
    "zip of other images": (lambda inputs: shutil.copy(inputs / "test.zip", inputs / "train.zip"), "lacks 24"),
    "folder empty": (lambda inputs: (without("train.zip")(inputs), (inputs / "train").mkdir()), "holds no images"),
    "folder with a link that leads out": (link_out, "0000.png (a link that leads out of the folder)"),
    "folder with a dead link": (dead_link, "lacks 1 of the images"),
    "test.zip missing": (without("test.zip"), "test.zip is missing"),
    "test.zip damaged": (lambda inputs: (inputs / "test.zip").write_bytes(b"x"), "test.zip is no zip archive"),
    "image empty": (replaced(b""), "0000.png (empty file)"),
    "image is text": (replaced(b"hello"), "0000.png (no image)"),
    "image is HTML": (replaced(b"<!doctype html>"), "0000.png (no image)"),
    "image is EPS, a program": (replaced(EPS), "0000.png (no image)"),
    "image truncated": (replaced(JPEG[:-40]), "0000.png ("),
    "image of floats": (replaced(FLOAT_TIFF), "floating-point values"),
    "image of 32 bits": (replaced(INT_TIFF), "32-bit values"),
    "image of 400 megapixels": (replaced(huge_png()), "0000.png ("),
}


@pytest.mark.parametrize("case", ARCHIVES)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_damaged_archive_or_image_is_refused(copy, case):
    damage, words = ARCHIVES[case]
    damage(copy / "input")
    assert words in refused_untouched(copy, "00_prepare.py", *PREPARE, "--overwrite")


def test_all_unreadable_images_are_named_together(copy):
    for name in ("0003", "0007"):
        replaced(b"", f"train/{name}.png")(copy / "input")
    line = refused_untouched(copy, "00_prepare.py", *PREPARE, "--overwrite")
    assert "2 unreadable images: train/0003.png (empty file), train/0007.png (empty file)" in line


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Truncated")
def test_no_truncated_image_passes_for_a_complete_one(kind):
    complete = saved(Image.fromarray(toy_image(np.random.default_rng(0), 0)), kind)
    expected = decode(complete)
    for length in range(0, len(complete), 10):
        try:
            image = decode(complete[:length])
        except ValueError:
            continue
        assert (image == expected).all(), f"{kind} of {length} bytes: a truncated image passes for a complete one"


# ---------------------------------------------------------------- odd files that are read


def renamed(name):
    """→ a function that gives the first training image another name, in the archive and in the table."""

    def change(inputs):
        with zipfile.ZipFile(inputs / "train.zip") as archive:
            files = {entry: archive.read(entry) for entry in archive.namelist()}
        files[f"train/{name}"] = files.pop("train/0000.png")
        write_zip(inputs / "train.zip", files)
        rows(f'"{name}",0')(inputs)

    return change


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return saved(Image.fromarray(toy_image(np.random.default_rng(0), 0)), "JPEG", exif=tags)


COLOUR = Image.fromarray(toy_image(np.random.default_rng(0), 0))
READ = {
    "BOM": edited("train.csv", lambda text: "\ufeff" + text),
    "CRLF": edited("train.csv", lambda text: text.replace("\n", "\r\n")),
    "blank lines": edited("train.csv", lambda text: text.replace("\n", "\n\n")),
    "UTF-16": lambda inputs: train_csv((inputs / "train.csv").read_text(), "utf-16")(inputs),
    "names without ending": edited("train.csv", lambda text: text.replace(".png", "")),
    "space": renamed("a b.png"),
    "comma": renamed("a,b.png"),
    "Japanese": renamed("食品.png"),
    "emoji": renamed("🍜.png"),
    "NA": renamed("NA.png"),
    "labels of words": edited("train.csv", lambda t: t.replace("png,0", "png,drink").replace("png,1", "png,NA")),
    "1 × 1": replaced(png(np.zeros((1, 1, 3), np.uint8))),
    "30000 × 1": replaced(png(np.zeros((1, 30000, 3), np.uint8))),
    "animated GIF": replaced(saved(COLOUR, "GIF", save_all=True, append_images=[COLOUR.rotate(90)])),
    "16 bits": replaced(saved(Image.fromarray(np.full((9, 9), 40000, np.uint16)), "PNG")),
    "CMYK": replaced(saved(COLOUR.convert("CMYK"), "JPEG")),
    "palette with alpha": replaced(saved(COLOUR.convert("RGBA").quantize(8), "PNG")),
    "case clash": lambda inputs: replaced(png(np.zeros((9, 9, 3), np.uint8)), "train/0000.PNG")(inputs),
    "the same entry twice": lambda inputs: same_entry(inputs),
    **{f"EXIF {k}": replaced(exif(k)) for k in range(1, 9)},
}


def same_entry(inputs):
    with warnings.catch_warnings(), zipfile.ZipFile(inputs / "train.zip", "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("train/0000.png", archive.read("train/0000.png"))


@pytest.mark.parametrize("case", READ)
def test_an_odd_file_is_read(copy, case):
    READ[case](copy / "input")
    more = ["--positive", "NA"] if case == "labels of words" else []
    out = done("00_prepare.py", *flags_of(copy), *PREPARE, "--overwrite", *more)
    assert "train       24 images" in out
    assert np.load(copy / "output" / "prepared" / "train_32.npy").shape == (24, 32, 32, 3)
