"""Mistakes in tables, archives and images: exit code 2, one line with culprit and remedy, nothing changed. Odd files
that are read nevertheless."""

import io
import shutil
import warnings
import zipfile

import common
from common import UserError

import numpy as np
import pytest
from conftest import TINY, decode, done, png, refused, toy_image, write_csv, write_zip
from damage import PREPARE, build_world, edited, flags_of, refused_untouched, without
from PIL import Image


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
        "train.zip: name one of id, label with --image-column",
    ),
    "train.csv of two wrong columns": (
        edited("train.csv", lambda t: t.replace("label", "class,x").replace(".png,", ".png,0,")),
        [],
        "--label-column",
    ),
    "train.csv with two label columns": (train_csv("image_name,label,label\na,0,0\n"), [], "several columns 'label'"),
    "train.csv ragged": (rows("0000.png,0,1"), [], "another number of cells than the first row (2) in row 2"),
    "train.csv binary": (train_csv(b"\x89PNG\r\n\x1a\n\x00\x81\xff\xfe\xfd"), [], "is binary, not text"),
    "train.csv with an endless cell": (train_csv('image_name,label\n"' + "x" * 200_000), [], "isn't closed"),
    "train.csv is a folder": (
        lambda inputs: (without("train.csv")(inputs), (inputs / "train.csv").mkdir()),
        [],
        "train.csv can't be read",
    ),
    "a name twice": (rows("0001.png,0"), [], "names 0001.png more than once"),
    "a name spelt twice": (rows("0001,1"), [], "0001.png more than once"),
    "no name": (rows(",0"), [], "without an image name"),
    "no label": (rows("0000.png,"), [], "no label for 0000.png"),
    "label NaN": (rows("0000.png,NaN"), [], "has labels (NaN) that may be a class or none"),
    "leading zeros": (
        rows("0000.png,00", "0001.png,1", "0002.png,00"),
        [],
        "has the labels 0 and 00: spell them alike",
    ),
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
    "zip without entries": (lambda inputs: write_zip(inputs / "train.zip", {}), "holds no images, and no other files"),
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
    assert "2 unreadable images, 8 % of train: train/0003.png (empty file), train/0007.png (empty file)" in line


def test_grey_images_are_few(copy):
    replaced(b"", "train/0003.png")(copy / "input")
    flags = [*PREPARE, "--overwrite", "--unreadable", "grey"]
    assert "unreadable  1 images" in done("00_prepare.py", *flags_of(copy), *flags)
    replaced(b"", "train/0007.png")(copy / "input")
    line = refused_untouched(copy, "00_prepare.py", *flags)
    assert "2 unreadable images, 8 % of train: train/0003.png (empty file)" in line
    assert line.endswith("replace them (--unreadable grey accepts 5 %)")


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


# ---------------------------------------------------------------- files that are missing, left out, or called otherwise


def in_folders(path, train, tests, sample=None):
    """Writes a competition whose labels are folders' names, or in train.csv where the sample names probabilities.
    → the flags."""
    for i, name in enumerate([f"train/{name}" for name in train] + [f"test/{name}" for name in tests]):
        (path / "input" / name).parent.mkdir(parents=True, exist_ok=True)
        (path / "input" / name).write_bytes(png(toy_image(np.random.default_rng(i), i % 2)))
    write_csv(path / "input" / "sample_submit.csv", [("image", "label"), *((name, 0.5) for name in sample or tests)])
    return [*flags_of(path), *PREPARE]


def test_the_missing_file_is_named_where_others_are_called_alike(tmp_path):
    names = [f"case{i:02}/0.png" for i in range(12)]
    sample = ["case90/0.png", "case91/0.png"]
    flags = in_folders(tmp_path, names, sample[:1], sample)
    write_csv(tmp_path / "input" / "train.csv", [("image", "label"), *((name, i % 2) for i, name in enumerate(names))])
    line = refused("00_prepare.py", *flags)
    assert "test lacks 1 of the images in" in line
    assert "sample_submit.csv: case91/0.png (see" in line
    (tmp_path / "input" / "test" / "case91").mkdir()
    shutil.copy(tmp_path / "input/test/case90/0.png", tmp_path / "input/test/case91/0.png")
    shutil.move(tmp_path / "input/train/case05/0.png", tmp_path / "input/train/case05/1.png")
    line = refused("00_prepare.py", *flags)
    assert "train lacks 1 of the images in" in line
    assert "train.csv: case05/0.png (see" in line


def test_images_of_every_kind_of_name_are_in_their_classes(tmp_path):
    classes = [f"{'abc'[i % 3]}/{i}{('.jpg', '.JFIF', '')[i % 3]}" for i in range(18)]
    hidden = [f".ipynb_checkpoints/{i}-checkpoint.jpg" for i in range(5)]
    flags = in_folders(tmp_path, classes + hidden + ["__MACOSX/a/._0.jpg", "a/@eaDir/0.jpg"], ["0.png"])
    (tmp_path / "input" / "train" / "b" / "notes.txt").write_text("x")
    (tmp_path / "input" / "train" / "b" / "Thumbs.db").write_text("x")
    write_csv(tmp_path / "input" / "sample_submit.csv", [("image", "label"), ("0.png", "a")])
    out = done("00_prepare.py", *flags)
    assert "3 classes in the folders' names" in out
    assert "train       18 images, 24 × 24 (18)" in out
    assert "train       6 files left out: .ipynb_checkpoints/0-checkpoint.jpg" in out
    folds = common.read_table(tmp_path / "output" / "prepared" / "folds.csv", "")
    assert folds.label.value_counts().to_dict() == dict(a=6, b=6, c=6)
    for name in (".DS_Store", "a/Thumbs.db", "a/notes2.txt"):
        (tmp_path / "input" / "train" / name).write_bytes(b"x")
    assert "prepared 16 px" in done("00_prepare.py", *flags, "--size", 16), "no change of the images"


def test_images_of_an_unread_kind_are_named_with_the_remedy(tmp_path):
    flags = in_folders(tmp_path, [f"{i}.png" for i in range(12)], ["0.png"])
    rows = [(f"{i}.png", i % 2) for i in range(11)]
    write_csv(tmp_path / "input" / "train.csv", [("image", "label"), *rows, ("11", 1)])
    shutil.move(tmp_path / "input/train/11.png", tmp_path / "input/train/11.cr2")
    line = refused("00_prepare.py", *flags)
    assert "train lacks 1 of the images in" in line
    assert line.endswith("; 11.cr2 can't be read here: convert the .cr2 files to PNG or JPEG")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("train.zip", "Train_Images.zip", ("train.zip is missing; ", "(Train_Images.zip?)", "with --train-images")),
        ("test.zip", "test1.zip", ("test.zip is missing; ", "(test1.zip?)", "with --test-images")),
        ("train.csv", "train_images.csv", ("train.csv is missing", "(train_images.csv?)", "--train-csv")),
    ],
)
def test_what_is_there_is_listed_where_a_file_is_missing(copy, old, new, words):
    (copy / "input" / old).rename(copy / "input" / new)
    line = refused_untouched(copy, "00_prepare.py", *PREPARE)
    assert all(word in line for word in (*words, "there are: ")), line


def test_a_pattern_is_proposed_where_names_hold_the_class(tmp_path):
    flags = in_folders(tmp_path, [f"{('cat', 'cattle')[i % 2]}.{i}.jpg" for i in range(12)], ["0.png"])
    write_csv(tmp_path / "input" / "sample_submit.csv", [("image", "label"), ("0.png", "cat")])
    assert "--label-pattern '(cattle|cat)'" in refused("00_prepare.py", *flags)
    done("00_prepare.py", *flags, "--label-pattern", "(cattle|cat)")
    folds = common.read_table(tmp_path / "output" / "prepared" / "folds.csv", "")
    assert folds.label.value_counts().to_dict() == dict(cat=6, cattle=6)


def test_tables_of_pixels_in_any_order_and_zip(tmp_path):
    """Columns sorted as text, in zips with a folder, as macOS makes them: the right half of each image is white."""
    names = sorted(f"pixel{i}" for i in range(64))
    pixels = {name: 250 * (int(name[5:]) % 8 > 3) for name in names}
    (tmp_path / "input").mkdir()
    for part, labels in (("train", [0, 1] * 6), ("test", [None] * 2)):
        rows = [[*([label] if part == "train" else []), *pixels.values()] for label in labels]
        header = ["label"] * (part == "train") + names
        text = "".join(",".join(map(str, row)) + "\n" for row in [header, *rows])
        files = {"data/": b"", f"data/{part}.csv": text, f"__MACOSX/data/._{part}.csv": b"\0\5\x16\7" + bytes(100)}
        write_zip(tmp_path / "input" / f"{part}.csv.zip", files)
    write_csv(tmp_path / "input" / "sample_submit.csv", [("ImageId", "Label"), (1, 0.5), (2, 0.5)])
    out = done("00_prepare.py", *flags_of(tmp_path), *PREPARE, "--size", 8)
    assert "train       12 images, 8 × 8 (12)" in out
    for part, count in (("train", 12), ("test", 2)):
        images = np.load(tmp_path / "output" / "prepared" / f"{part}_8.npy")
        assert images.shape == (count, 8, 8, 3)
        assert (images[:, :, :4] == 0).all()
        assert (images[:, :, 4:] == 250).all()


# ---------------------------------------------------------------- what the machine or the model can't do


def test_a_batch_of_one_image_is_too_small_for_batch_norm(copy):
    flags = [*flags_of(copy), *TINY, "--fold", 0, "--batch-size", 1, "--accumulate", 4, "--overwrite", "--exp", "one"]
    assert "batch norm keeps its statistics: 1 image at once" in done("01_train_fold.py", *flags)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File\n"
            "RuntimeError: unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device (28)",
            "unable to allocate shared memory(shm) for file </torch_1_2_0>: No space left on device (28)",
        ),
        (
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are "
            "out of shared memory. Please try to raise your shared memory limit.",
            "DataLoader worker (pid 7) is killed by signal: Bus error.",
        ),
        ("unable to write to file </torch_1_2>: No space left on device (28)", "unable to write to file"),
    ],
)
def test_full_shared_memory_is_named_with_the_remedy(text, reason):
    from kit.train.device import enough_memory

    with pytest.raises(UserError, match="or docker run --shm-size") as refusal, enough_memory("lower --batch-size"):
        raise RuntimeError(text)
    assert str(refusal.value).startswith(f"shared memory is full ({reason}")
    assert "--workers 0" in str(refusal.value)
    for other in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("another")):
        with pytest.raises(type(other), match=str(other)), enough_memory(""):
            raise other


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
    "labels of which some became floats": rows("0000.png,0.0", "0001.png,1", "0002.png,0.0"),
    "a sample with a row twice": edited("sample_submit.csv", lambda t: t + "t0.png,0.5\n"),
    "labels of words": edited("train.csv", lambda t: t.replace("png,0", "png,drink").replace("png,1", "png,NA")),
    "1 × 1": replaced(png(np.zeros((1, 1, 3), np.uint8))),
    "30000 × 1": replaced(png(np.zeros((1, 30000, 3), np.uint8))),
    "animated GIF": replaced(saved(COLOUR, "GIF", save_all=True, append_images=[COLOUR.rotate(90)])),
    "16 bits": replaced(saved(Image.fromarray(np.full((9, 9), 40000, np.uint16)), "PNG")),
    "CMYK": replaced(saved(COLOUR.convert("CMYK"), "JPEG")),
    "palette with alpha": replaced(saved(COLOUR.convert("RGBA").quantize(8), "PNG")),
    "case clash": lambda inputs: replaced(png(np.zeros((9, 9, 3), np.uint8)), "train/0000.PNG")(inputs),
    "the same entry twice": lambda inputs: same_entry(inputs),
    "a link that leads out of the folder": link_out,
    **{f"EXIF {k}": replaced(exif(k)) for k in range(1, 9)},
}


def same_entry(inputs):
    with warnings.catch_warnings(), zipfile.ZipFile(inputs / "train.zip", "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("train/0000.png", archive.read("train/0000.png"))


@pytest.mark.parametrize("case", READ)
def test_an_odd_file_is_read(copy, case):
    READ[case](copy / "input")
    more = ["--positive", "NA", "--class-values", "NA=NA"] if case == "labels of words" else []
    out = done("00_prepare.py", *flags_of(copy), *PREPARE, "--overwrite", *more)
    assert "train       24 images" in out
    assert np.load(copy / "output" / "prepared" / "train_32.npy").shape == (24, 32, 32, 3)
