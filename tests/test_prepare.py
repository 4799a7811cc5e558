"""00_prepare.py: archives and tables of every kind, images as a person sees them, stratified folds, caches."""

import io
import json
import shutil
import unicodedata

import numpy as np
import pandas as pd
import pytest
from conftest import done, kit, load, png, refused, toy_image, write_csv, write_zip
from PIL import Image
from sklearn.model_selection import StratifiedKFold

import images
import tables

prepare = load("00_prepare.py")


def prepared(flags):
    return flags[flags.index("--output") + 1] / "prepared"


def cache(flags, part="train", size=32):
    return np.load(prepared(flags) / f"{part}_{size}.npy")


def toy_run(flags, *more):
    return done("00_prepare.py", *flags, "--size", 32, *more)


# ---------------------------------------------------------------- caches and folds


def test_caches_hold_every_image_resized_in_the_order_of_the_tables(toy):
    flags = toy()
    out = toy_run(flags)
    images, rng = cache(flags), np.random.default_rng(0)
    assert images.shape == (40, 32, 32, 3)
    assert images.dtype == np.uint8
    for i in range(40):
        assert (images[i] == prepare.resize(toy_image(rng, i % 2), 32)).all()
    folds = pd.read_csv(prepared(flags) / "folds.csv", dtype=str)
    assert list(folds.columns) == ["image_name", "label", "target", "group", "fold"]
    assert folds.image_name.tolist() == [f"{i:04}.png" for i in range(40)]
    assert pd.read_csv(prepared(flags) / "test.csv").image_name.tolist() == [f"t{i:03}.png" for i in range(10)]
    assert "40 images, 24 × 24 (40)" in out
    assert Image.open(prepared(flags) / "samples.png").size[0] > 300


def test_folds_are_the_thesis_stratified_ones(toy):
    flags = toy(train=63)
    toy_run(flags)
    folds = pd.read_csv(prepared(flags) / "folds.csv")
    splits = StratifiedKFold(5, shuffle=True, random_state=777).split(np.zeros(63), folds.target)
    for fold, (_, held_out) in enumerate(splits):
        assert np.flatnonzero(folds.fold == fold).tolist() == held_out.tolist()
    counts = pd.crosstab(folds.fold, folds.label)
    assert (counts.max() - counts.min() <= 1).all()


def test_a_second_run_does_nothing_and_another_size_keeps_the_folds(toy):
    flags = toy()
    toy_run(flags)
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in prepared(flags).iterdir()}
    assert "Nothing to do" in toy_run(flags)
    assert before == {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in prepared(flags).iterdir()}
    done("00_prepare.py", *flags, "--size", 16)
    assert (prepared(flags) / "folds.csv").stat().st_mtime_ns == before["folds.csv"][0]
    assert cache(flags, "test", 16).shape == (10, 16, 16, 3)
    assert json.loads((prepared(flags) / "prepared.json").read_text())["sizes"] == [16, 32]


def test_other_settings_or_files_are_refused_until_overwrite(toy):
    flags = toy()
    toy_run(flags)
    assert "--overwrite" in refused("00_prepare.py", *flags, "--size", 32, "--seed", 1)
    rows = (flags[1] / "train.csv").read_text().splitlines()
    (flags[1] / "train.csv").write_text("\n".join([*rows[:-2], rows[-1], rows[-2]]) + "\n")
    assert "made_from" in refused("00_prepare.py", *flags, "--size", 16)
    done("00_prepare.py", *flags, "--size", 16, "--overwrite")
    assert not (prepared(flags) / "train_32.npy").exists(), "a cache in the old order was left behind"


def test_a_full_disk_is_noticed_before_any_work(toy, monkeypatch):
    flags = toy()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
    assert "GiB free" in refused("00_prepare.py", *flags, "--size", 32)
    assert list(prepared(flags).iterdir()) == []


# ---------------------------------------------------------------- archives and names


@pytest.mark.parametrize("layout", ["top folder", "no folder", "macos", "folder"])
def test_archive_layouts_give_the_same_caches(toy, tmp_path, layout):
    flags = toy()
    toy_run(flags)
    expected = cache(flags)
    rng = np.random.default_rng(0)
    images = {f"{i:04}.png": png(toy_image(rng, i % 2)) for i in range(40)}
    other = tmp_path / "other"
    shutil.copytree(flags[1], other)
    (other / "train.zip").unlink()
    if layout == "folder":
        (other / "train").mkdir()
        for name, content in images.items():
            (other / "train" / name).write_bytes(content)
    else:
        top = {"top folder": "data/", "no folder": "", "macos": "train/"}[layout]
        junk = {f"__MACOSX/train/._{name}": b"junk" for name in images} | {"train/.DS_Store": b"junk"}
        write_zip(other / "train.zip", {top + n: c for n, c in images.items()} | (junk if layout == "macos" else {}))
    again = ["--input", other, "--output", tmp_path / "again"]
    out = toy_run(again)
    assert (cache(again) == expected).all()
    assert "0 more that no row names" in out


def zip_with_raw_names(path, files):
    """A zip whose entries carry names in any bytes, without the UTF-8 mark, as many Windows and macOS tools write."""
    write_zip(path, {f"{i:06}.png".rjust(len(raw), "x"): content for i, (raw, content) in enumerate(files.items())})
    data = path.read_bytes()
    for i, raw in enumerate(files):
        data = data.replace(f"{i:06}.png".rjust(len(raw), "x").encode(), raw)
    path.write_bytes(data)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8 nfd", "cp932"])
def test_japanese_names_in_any_encoding(tmp_path, encoding):
    names = [f"train/食品パッケージ{i}.png" for i in range(10)]
    rng = np.random.default_rng(0)
    form = unicodedata.normalize("NFD" if "nfd" in encoding else "NFC", "")
    assert form == ""
    raw = [
        unicodedata.normalize("NFD" if "nfd" in encoding else "NFC", name).encode(encoding.split()[0]) for name in names
    ]
    zip_with_raw_names(tmp_path / "train.zip", {r: png(toy_image(rng, i % 2)) for i, r in enumerate(raw)})
    source = prepare.ImageSource(tmp_path / "train.zip")
    for name in names:
        assert source.decoded(source.find(name)).shape == (24, 24, 3)
        assert source.find(name.removeprefix("train/")) == source.find(name)


def test_names_without_ending_are_found_where_one_file_is_meant(tmp_path):
    write_zip(tmp_path / "a.zip", {"x/0001.png": b"", "x/0002.png": b"", "x/0002.jpg": b"", "x/notes.txt": b""})
    source = prepare.ImageSource(tmp_path / "a.zip")
    assert source.find("0001") == "x/0001.png"
    assert source.find("0002") is None
    assert source.find("../0001.png") is None
    assert len(source.files) == 3


def test_missing_and_superfluous_images_are_counted(toy):
    flags = toy()
    write_csv(flags[1] / "sample_submit.csv", [(f"t{i:03}.png", 0) for i in range(4)])
    assert "6 more that no row names" in toy_run(flags)
    with open(flags[1] / "train.csv", "a") as file:
        file.writelines(f"gone{i}.png,1\n" for i in range(12))
    line = refused("00_prepare.py", *flags, "--size", 32, "--overwrite")
    assert "12 of the images" in line
    assert "gone9.png and 2 more" in line


# ---------------------------------------------------------------- images


def saved(image, kind, **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


GRADIENT = np.stack(np.meshgrid(np.arange(40) * 6, np.arange(30) * 8), -1)[..., [0, 1, 1]].astype(np.uint8)


def test_modes_come_out_as_seen():
    rgb = Image.fromarray(GRADIENT)
    grey = GRADIENT[..., 0]
    assert (images.decode(saved(rgb, "PNG")) == GRADIENT).all()
    assert (images.decode(saved(rgb, "WEBP", lossless=True)) == GRADIENT).all()
    assert (images.decode(saved(Image.fromarray(grey), "PNG")) == grey[..., None]).all()
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    assert (images.decode(saved(wide, "PNG")) == grey[..., None]).all()
    palette = rgb.quantize(64)
    assert (images.decode(saved(palette, "PNG")) == np.asarray(palette.convert("RGB"))).all()
    cmyk = np.asarray(Image.open(io.BytesIO(saved(rgb.convert("CMYK"), "JPEG", quality=95))).convert("RGB"))
    assert (images.decode(saved(rgb.convert("CMYK"), "JPEG", quality=95)) == cmyk).all()
    assert np.abs(cmyk.astype(int) - GRADIENT).mean() < 8


def test_transparent_parts_stand_on_white():
    alpha = np.zeros((30, 40), np.uint8)
    alpha[:, :20] = 255
    seen = images.decode(saved(Image.fromarray(np.dstack([GRADIENT, alpha])), "PNG"))
    assert (seen[:, :20] == GRADIENT[:, :20]).all()
    assert (seen[:, 20:] == 255).all()
    hidden = Image.fromarray(np.zeros((5, 5), np.uint8), "P")
    hidden.putpalette([10, 20, 30])
    assert (images.decode(saved(hidden, "PNG", transparency=0)) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    undo = {
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo(GRADIENT)))
    assert (images.decode(saved(stored, "PNG", exif=exif)) == GRADIENT).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_truncated_images_are_no_images(kind):
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3)).astype(np.uint8)
    whole = saved(Image.fromarray(noise), kind)
    images.decode(whole)
    for tenth in range(10):
        with pytest.raises(ValueError, match=r".+"):
            images.decode(whole[: len(whole) * tenth // 10])


def test_unreadable_images_are_named_and_nothing_is_left(toy):
    flags = toy()
    rng = np.random.default_rng(0)
    jpeg = saved(Image.fromarray(rng.integers(0, 255, (99, 99, 3)).astype(np.uint8)), "JPEG")
    files = {f"train/{i:04}.png": png(toy_image(rng, i % 2)) for i in range(40)}
    files |= {"train/0007.png": jpeg[: len(jpeg) // 2], "train/0011.png": b"", "train/0012.png": b"<html>"}
    write_zip(flags[1] / "train.zip", files)
    line = refused("00_prepare.py", *flags, "--size", 32)
    for name in ("0007", "0011", "0012", "3 unreadable"):
        assert name in line
    assert list(prepared(flags).iterdir()) == []


def test_large_images_are_averaged_not_skipped():
    stripes = np.zeros((400, 400, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(prepare.resize(stripes, 40).astype(int) - 127).max() <= 1


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("image_name", "label")], "no rows"),
        ([("image", "label"), ("0000.png", 0)], "--image-column"),
        ([("image_name", "class"), ("0000.png", 0)], "--label-column"),
        ([("image_name", "label"), ("0000.png", 0), ("0000.png", 1)], "more than once"),
        ([("image_name", "label"), ("0000.png", 0), ("0001.png", "")], "no label for 0001.png"),
        ([("image_name", "label"), ("0000.png", 0), ("0001.png", 0)], "one class only"),
        ([("image_name", "label"), *[(f"{i:04}.png", int(i < 3)) for i in range(20)]], "1 (3)"),
        ([("image_name", "label"), ("0000.png", 0, 5)], "row 2"),
    ],
)
def test_wrong_tables_are_refused(toy, rows, words):
    flags = toy()
    write_csv(flags[1] / "train.csv", rows)
    assert words in refused("00_prepare.py", *flags, "--size", 32)
    assert not flags[3].exists()


def test_bom_crlf_blank_lines_and_cp932_are_simply_read(toy, tmp_path):
    flags = toy()
    toy_run(flags)
    folds = (prepared(flags) / "folds.csv").read_bytes()
    text = (flags[1] / "train.csv").read_text()
    (flags[1] / "train.csv").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode() + b"\r\n\r\n")
    assert "Nothing to do" in toy_run(flags)
    assert (prepared(flags) / "folds.csv").read_bytes() == folds
    path = tmp_path / "t.csv"
    path.write_bytes("名前,ラベル\n0001,NA\n".encode("cp932"))
    assert tables.read_rows(path, "") == [["名前", "ラベル"], ["0001", "NA"]]


def submission_of(flags, rows, *more):
    write_csv(flags[1] / "sample_submit.csv", rows)
    result = kit("00_prepare.py", *flags, "--size", 32, "--overwrite", *more)
    assert result.code == 0, result.err
    return json.loads((prepared(flags) / "prepared.json").read_text())["submission"]


def test_the_sample_decides_the_submission_format(toy):
    flags = toy()
    assert submission_of(flags, [("t000.png", 0)]) == dict(header=None, value="probability", columns=None)
    headed = [("image_id", "target"), ("t000.png", 0.5)]
    assert submission_of(flags, headed) == dict(header=["image_id", "target"], value="probability", columns=None)
    both = [("id", "1", "0"), ("t000.png", 0.5, 0.5)]
    assert submission_of(flags, both)["columns"] == ["1", "0"]
    assert submission_of(flags, headed, "--submit-value", "label")["value"] == "label"
    write_csv(flags[1] / "sample_submit.csv", [("id", "cat", "dog"), ("t000.png", 0.5, 0.5)])
    assert "cat, dog" in refused("00_prepare.py", *flags, "--size", 32, "--overwrite")
    write_csv(flags[1] / "sample_submit.csv", [("nowhere.png", 0), ("t000.png", 0)])
    line = refused("00_prepare.py", *flags, "--size", 32, "--overwrite", "--submit-header", "no")
    assert "nowhere.png" in line
