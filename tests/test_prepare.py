"""00_prepare.py: archives and tables of every kind, decoded images, stratified folds, caches."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import unicodedata
import zipfile

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, decode, done, kit, png, prepare, refused, toy_image, write_csv, write_zip
from damage import snapshot
from PIL import Image, PngImagePlugin
from sklearn.model_selection import StratifiedKFold

from kit.data.decode import resize
from kit.data.image_cache import array_in_file
from kit.data.image_source import ImageSource
from kit.data.tables import read_rows
from kit.report.pictures import contact_sheet
from kit.score.tasks import Classes
from kit.submit.submission import check_submission, submission_rows


def prepared(flags):
    return flags[flags.index("--output") + 1] / "prepared"


def settings(flags):
    return json.loads((prepared(flags) / "prepared.json").read_text())


def cache(flags, part="train", size=32):
    return np.load(prepared(flags) / f"{part}_{size}.npy")


def refused_prepare(flags, *more):
    return refused("00_prepare.py", *flags, "--size", 32, "--groups", "none", *more)


def relabel(flags, label_of):
    """Write train.csv with other labels: label_of(i) for image i."""
    write_csv(flags[1] / "train.csv", [("image_name", "label"), *((f"{i:04}.png", label_of(i)) for i in range(40))])


# ---------------------------------------------------------------- caches and folds


def test_caches_hold_every_image_resized_in_the_order_of_the_tables(toy):
    flags = toy()
    out = prepare(flags)
    images, rng = cache(flags), np.random.default_rng(0)
    assert images.shape == (40, 32, 32, 3)
    assert images.dtype == np.uint8
    for i in range(40):
        assert (images[i] == resize(toy_image(rng, i % 2), 32)).all()
    folds = pd.read_csv(prepared(flags) / "folds.csv", dtype=str)
    assert list(folds.columns) == ["image_name", "label", "target", "group", "fold"]
    assert folds.image_name.tolist() == [f"{i:04}.png" for i in range(40)]
    assert pd.read_csv(prepared(flags) / "test.csv").image_name.tolist() == [f"t{i:03}.png" for i in range(10)]
    assert "train       40 images, 24 × 24 (40)\n" in out
    assert out.splitlines()[-1] == f"prepared 32 px → {prepared(flags)}: look at samples.png"
    assert Image.open(prepared(flags) / "samples.png").size[0] > 300


def test_folds_without_groups_are_those_of_the_thesis(toy):
    flags = toy(train=63)
    prepare(flags)
    folds = pd.read_csv(prepared(flags) / "folds.csv")
    splits = StratifiedKFold(5, shuffle=True, random_state=777).split(np.zeros(63), folds.target)
    for fold, (_, held_out) in enumerate(splits):
        assert np.flatnonzero(folds.fold == fold).tolist() == held_out.tolist()
    counts = pd.crosstab(folds.fold, folds.label)
    assert (counts.max() - counts.min() <= 1).all()


def test_a_second_run_does_nothing_and_another_size_keeps_the_folds(toy):
    flags = toy()
    prepare(flags)
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in prepared(flags).iterdir()}
    assert "Nothing to do" in prepare(flags)
    assert before == {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in prepared(flags).iterdir()}
    prepare(flags, 16)
    assert (prepared(flags) / "folds.csv").stat().st_mtime_ns == before["folds.csv"][0]
    assert cache(flags, "test", 16).shape == (10, 16, 16, 3)
    assert settings(flags)["sizes"] == [16, 32]


@pytest.mark.parametrize("damage", ["lost", "cut", "of another count"])
def test_a_lost_or_damaged_cache_is_rebuilt_and_the_folds_stay(toy, damage):
    flags = toy()
    prepare(flags, 16)
    prepare(flags)
    path, folds = prepared(flags) / "test_32.npy", prepared(flags) / "folds.csv"
    content, before = path.read_bytes(), (folds.stat().st_mtime_ns, settings(flags))
    if damage == "of another count":
        np.save(path, np.load(path)[:3])
    else:
        path.unlink() if damage == "lost" else path.write_bytes(content[:1000])
    assert "prepared 32 px" in prepare(flags)
    assert path.read_bytes() == content
    assert (folds.stat().st_mtime_ns, settings(flags)) == before
    assert cache(flags, size=16).shape == (40, 16, 16, 3)


def test_other_settings_or_files_are_refused_until_overwrite(toy):
    flags = toy()
    prepare(flags)
    for flag, value in (("seed", 1), ("positive", "0"), ("limit", 20), ("folds", 4)):
        line = refused_prepare(flags, f"--{flag}", value)
        assert f"prepared with other {'classes' if flag == 'positive' else flag}" in line
        assert "--overwrite" in line
    rows = (flags[1] / "train.csv").read_text().splitlines()
    (flags[1] / "train.csv").write_text("\n".join([*rows[:-2], rows[-1], rows[-2]]) + "\n")
    assert "prepared with other tables: " in refused_prepare(flags, "--size", 16)
    with zipfile.ZipFile(flags[1] / "test.zip", "a") as archive:
        archive.writestr("test/more.png", png(toy_image(np.random.default_rng(0), 0)))
    words = f"prepared with other tables, files in {flags[1]}/test.zip: "
    assert words in refused_prepare(flags, "--size", 16)
    prepare(flags, 16, "--overwrite")
    assert not (prepared(flags) / "train_32.npy").exists(), "a cache in the old order was left behind"


def test_a_full_disk_is_noticed_before_any_image_is_read(toy, monkeypatch):
    flags = toy()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
    assert "GiB free" in refused_prepare(flags)
    assert list(prepared(flags).iterdir()) == []


def test_caches_are_written_without_posix_fallocate_as_on_macos(toy, monkeypatch, tmp_path):
    monkeypatch.delattr(os, "posix_fallocate")
    flags = toy()
    done("00_prepare.py", *flags, "--size", 32)
    assert cache(flags).shape == (40, 32, 32, 3)
    with array_in_file(tmp_path, np.uint16, 3, 2**23) as array:
        assert array.shape == (3, 2**23)
        assert not array[:, ::1000].any()


def test_blank_cells_of_a_group_column_or_file_are_groups_of_their_own(toy):
    flags = toy()
    cells = [f"p{i // 4}" if i < 20 else ("", " ", "nan")[i % 3] for i in range(40)]
    rows = [(f"{i:04}.png", i % 2, cell) for i, cell in enumerate(cells)]
    write_csv(flags[1] / "train.csv", [("image_name", "label", "patient"), *rows])
    write_csv(flags[1] / "groups.csv", [("image_name", "group"), *((name, cell) for name, _, cell in rows)])
    for given in ("patient", flags[1] / "groups.csv"):
        out = done("00_prepare.py", *flags, "--size", 32, "--groups", given, "--overwrite")
        assert "20 images have a blank cell for their group" in out
        groups = pd.read_csv(prepared(flags) / "folds.csv").group
        assert groups.value_counts().tolist() == [4] * 5 + [1] * 20


def test_limit_takes_some_of_each_class_and_the_first_test_images(toy):
    flags = toy(train=40)
    relabel(flags, lambda i: "rare" if i < 5 else "often")
    out = prepare(flags, 32, "--limit", 16, "--positive", "rare")
    folds = pd.read_csv(prepared(flags) / "folds.csv", dtype=str)
    assert folds.label.value_counts().to_dict() == {"often": 14, "rare": 5}, "16 × 35 / 40, and a rare one in each fold"
    assert folds.image_name.tolist() == sorted(folds.image_name)
    assert folds.fold.nunique() == 5
    assert cache(flags).shape[0] == 19
    assert cache(flags, "test").shape[0] == 10
    assert settings(flags)["limit"] == 16
    assert "limit       a quick look" in out
    again = [*flags[:3], flags[3].with_name("again")]
    prepare(again, 32, "--limit", 4, "--positive", "rare", "--seed", 1)
    names = pd.read_csv(prepared(again) / "test.csv").image_name.tolist()
    assert names == ["t000.png", "t001.png", "t002.png", "t003.png"]
    others = set(pd.read_csv(prepared(again) / "folds.csv", dtype=str).image_name)
    assert not others <= set(folds.image_name), "the seed decides which"


def test_00_starts_without_torch_and_matplotlib():
    heavy = "{'torch', 'timm', 'albumentations', 'matplotlib'}"
    code = f"import runpy, sys; runpy.run_path('00_prepare.py'); assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---------------------------------------------------------------- archives and names


@pytest.mark.parametrize("layout", ["top folder", "no folder", "macos", "folder"])
def test_archive_layouts_give_the_same_caches(toy, tmp_path, layout):
    flags = toy()
    prepare(flags)
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
    out = prepare(again)
    assert (cache(again) == cache(flags)).all()
    assert "not used" not in out


def zip_with_raw_names(path, files):
    """Write a zip with names in any bytes, without the UTF-8 mark, as many Windows and macOS tools do."""
    write_zip(path, {f"{i:06}.png".rjust(len(raw), "x"): content for i, (raw, content) in enumerate(files.items())})
    data = path.read_bytes()
    for i, raw in enumerate(files):
        data = data.replace(f"{i:06}.png".rjust(len(raw), "x").encode(), raw)
    path.write_bytes(data)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8 nfd", "cp932"])
def test_japanese_names_in_any_encoding(tmp_path, encoding):
    names = [f"train/食品パッケージ{i}.png" for i in range(10)]
    form = "NFD" if "nfd" in encoding else "NFC"
    raw = [unicodedata.normalize(form, name).encode(encoding.split()[0]) for name in names]
    assert (raw[0].decode(encoding.split()[0]) == names[0]) == (form == "NFC"), "パ is one letter, or two"
    pictures = [toy_image(np.random.default_rng(i), 0) for i in range(10)]
    zip_with_raw_names(tmp_path / "train.zip", {r: png(picture) for r, picture in zip(raw, pictures, strict=True)})
    source = ImageSource(tmp_path / "train.zip")
    for name, picture in zip(names, pictures, strict=True):
        assert (source.picture(source.find(name)).pixels == picture).all()
        assert source.find(name.removeprefix("train/")) == source.find(name)


def test_names_without_ending_are_found_where_one_file_has_them(tmp_path):
    write_zip(tmp_path / "a.zip", {"x/0001.png": b"", "x/0002.png": b"", "x/0002.jpg": b"", "x/notes.txt": b""})
    source = ImageSource(tmp_path / "a.zip")
    assert source.find("0001") == "x/0001.png"
    assert source.find("0002") is None
    assert source.find("../0001.png") is None
    assert len(source.files) == 3


def test_missing_and_superfluous_images_are_counted(toy):
    flags = toy()
    write_csv(flags[1] / "sample_submit.csv", [(f"t{i:03}.png", 0) for i in range(4)])
    assert "6 more not used" in prepare(flags)
    with open(flags[1] / "train.csv", "a") as file:
        file.writelines(f"gone{i}.png,1\n" for i in range(12))
    line = refused_prepare(flags, "--overwrite")
    assert "12 of the images" in line
    assert "gone9.png and 2 more" in line


# ---------------------------------------------------------------- images


def saved(image, kind, **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


GRADIENT = np.stack(np.meshgrid(np.arange(40) * 6, np.arange(30) * 8), -1)[..., [0, 1, 1]].astype(np.uint8)


def test_each_mode_is_decoded_to_rgb_as_seen():
    rgb = Image.fromarray(GRADIENT)
    grey = GRADIENT[..., 0]
    assert (decode(saved(rgb, "PNG")) == GRADIENT).all()
    assert (decode(saved(rgb, "WEBP", lossless=True)) == GRADIENT).all()
    assert (decode(saved(Image.fromarray(grey), "PNG")) == grey[..., None]).all()
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    assert (decode(saved(wide, "PNG")) == grey[..., None]).all()
    palette = rgb.quantize(64)
    assert (decode(saved(palette, "PNG")) == np.asarray(palette.convert("RGB"))).all()
    cmyk = np.asarray(Image.open(io.BytesIO(saved(rgb.convert("CMYK"), "JPEG", quality=95))).convert("RGB"))
    assert (decode(saved(rgb.convert("CMYK"), "JPEG", quality=95)) == cmyk).all()
    assert np.abs(cmyk.astype(int) - GRADIENT).mean() < 8


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_16_bit_files_keep_the_grey_levels_of_the_depth_that_they_use(bits):
    levels = np.linspace(0, 2**bits - 1, 4096).astype(np.uint16).reshape(64, 64)
    seen = decode(saved(Image.fromarray(levels), "PNG"))
    assert (seen[..., 0] == levels >> (bits - 8)).all()
    assert len(np.unique(seen)) == 256


def test_transparent_parts_become_white():
    alpha = np.zeros((30, 40), np.uint8)
    alpha[:, :20] = 255
    seen = decode(saved(Image.fromarray(np.dstack([GRADIENT, alpha])), "PNG"))
    assert (seen[:, :20] == GRADIENT[:, :20]).all()
    assert (seen[:, 20:] == 255).all()
    hidden = Image.fromarray(np.zeros((5, 5), np.uint8), "P")
    hidden.putpalette([10, 20, 30])
    assert (decode(saved(hidden, "PNG", transparency=0)) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    undo = {
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: lambda a: np.rot90(a, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo(GRADIENT)))
    assert (decode(saved(stored, "PNG", exif=exif)) == GRADIENT).all()
    # as image editors write it, and as ImageMagick does
    xmp = "XML:com.adobe.xmp", f'<x tiff:Orientation="{orientation}"/>'
    raw = "Raw profile type exif", f"\nexif\n{len(exif.tobytes())}\n{exif.tobytes().hex()}\n"
    for add, text in (("add_itxt", xmp), ("add_text", raw)):
        texts = PngImagePlugin.PngInfo()
        getattr(texts, add)(*text)
        assert (decode(saved(stored, "PNG", pnginfo=texts)) == GRADIENT).all(), text


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_truncated_images_are_unreadable(kind):
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3)).astype(np.uint8)
    content = saved(Image.fromarray(noise), kind)
    decode(content)
    for tenth in range(10):
        with pytest.raises(ValueError, match=r".+"):
            decode(content[: len(content) * tenth // 10])


@pytest.fixture
def damaged(toy):
    """Write a competition with three unreadable training images, one of them a truncated JPEG, and one such test image.
    → its flags."""
    flags, rng = toy(train=64), np.random.default_rng(0)
    jpeg = saved(Image.fromarray(rng.integers(180, 240, (96, 96, 3)).astype(np.uint8)), "JPEG")
    files = {f"train/{i:04}.png": png(toy_image(rng, i % 2)) for i in range(64)}
    files |= {"train/0007.png": jpeg[: len(jpeg) // 2], "train/0011.png": b"", "train/0012.png": b"<html>"}
    write_zip(flags[1] / "train.zip", files)
    tests = {f"test/t{i:03}.png": png(toy_image(rng, i % 2)) for i in range(9)}
    write_zip(flags[1] / "test.zip", tests | {"test/t009.png": jpeg[: len(jpeg) // 2]})
    return flags


def test_unreadable_images_of_both_parts_are_named_together_and_nothing_is_left(damaged):
    line = refused_prepare(damaged)
    for words in (
        "4 unreadable",
        "train/0007.png (",
        "0011.png (empty",
        "0012.png (no image)",
        "test/t009.png (",
        "grey",
    ):
        assert words in line
    assert list(prepared(damaged).iterdir()) == []


def test_unreadable_grey_takes_what_is_left(damaged):
    out = prepare(damaged, 96, "--unreadable", "grey")
    assert "unreadable  4 images" in out
    assert "0012.png (no image)" in out
    names = [text.partition(" (")[0] for text in settings(damaged)["unreadable"]]
    assert names == ["train/0007.png", "train/0011.png", "train/0012.png", "test/t009.png"]
    images = cache(damaged, size=96)
    for left in (images[7], cache(damaged, "test", 96)[9]):
        assert np.abs(left[:16].mean() - 210) < 3
        assert (left[-16:] == 128).all(), "the rows that are missing"
    assert (images[[11, 12]] == 128).all()
    assert "unreadable images" in refused_prepare(damaged, "--size", 16), "a second size needs the flag again"
    prepare(damaged, 16, "--unreadable", "grey")
    assert [text.partition(" (")[0] for text in settings(damaged)["unreadable"]] == names


def test_a_failed_run_leaves_the_earlier_files(damaged):
    prepare(damaged, 32, "--unreadable", "grey")
    before = snapshot(damaged[3])
    refused_prepare(damaged, "--overwrite")
    refused_prepare(damaged, "--size", 16)
    assert snapshot(damaged[3]) == before


def test_large_images_are_averaged_and_not_subsampled():
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3)).astype(np.uint8)
    means = noise.reshape(40, 10, 40, 10, 3).mean(axis=(1, 3))
    assert np.abs(resize(noise, 40) - means).max() <= 1


@pytest.mark.parametrize("height", [100, 448, 700, 1000])
def test_a_wide_picture_is_averaged_along_its_long_side(height):
    columns = np.random.default_rng(0).integers(0, 256, (4480, 3)).astype(np.uint8)
    wide, means = np.repeat(columns[None], height, axis=0), columns.reshape(448, 10, 3).mean(axis=1)
    assert np.abs(resize(wide, 448) - means).max() <= 1, "each px is the mean of its ten"
    assert np.abs(resize(wide.swapaxes(0, 1).copy(), 448) - means[:, None]).max() <= 1


def test_contact_sheet_puts_each_image_under_its_title():
    red, tall = np.full((40, 40, 3), (255, 0, 0), np.uint8), np.full((80, 20, 3), (0, 0, 255), np.uint8)
    rows = [("first", [(red, "a.png"), (tall, "a name that is far too long for its cell.png")]), ("empty\nrow", [])]
    sheet = np.asarray(contact_sheet(rows, 3))
    is_red, is_blue = (sheet == (255, 0, 0)).all(axis=2), (sheet == (0, 0, 255)).all(axis=2)
    assert is_red.sum() == 160 * 160, "a small image fills its cell"
    assert is_blue.sum() == 160 * 40, "and a tall one keeps its shape"
    assert np.flatnonzero(is_red.any(axis=0)).max() < np.flatnonzero(is_blue.any(axis=0)).min()
    below = sheet[np.flatnonzero(is_red.any(axis=1)).max() + 1 :].min(axis=(0, 2))
    assert (below[188:348] < 200).any(), "a caption"
    assert (below[174:188] == 255).all(), "that keeps to its cell"
    assert (below[348:] == 255).all()


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([("image_name", "label")], "no rows"),
        ([("image", "label"), ("nothing", 0)], "--image-column"),
        ([("image_name", "class", "x"), ("0000.png", 0, 1)], "--label-column"),
        ([("image_name", "label"), ("0000.png", 0), ("0000.png", 1)], "more than once"),
        ([("image_name", "label"), ("0000.png", 0), ("0001.png", "")], "no label for 0001.png"),
        ([("image_name", "label"), ("0000.png", 0), ("0001.png", 0)], "one class only"),
        (
            [("image_name", "label"), *[(f"{i:04}.png", int(i < 3)) for i in range(20)]],
            "a fold lacks 1 (images: 3, groups: 3)",
        ),
        ([("image_name", "label"), ("0000.png", 0, 5)], "row 2"),
    ],
)
def test_wrong_tables_are_refused(toy, rows, words):
    flags = toy()
    write_csv(flags[1] / "train.csv", rows)
    assert words in refused_prepare(flags)
    assert not flags[3].exists()


def test_bom_crlf_blank_lines_and_cp932_are_read(toy, tmp_path):
    flags = toy()
    prepare(flags)
    folds = (prepared(flags) / "folds.csv").read_bytes()
    text = (flags[1] / "train.csv").read_text()
    (flags[1] / "train.csv").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode() + b"\r\n\r\n")
    assert "Nothing to do" in prepare(flags)
    assert (prepared(flags) / "folds.csv").read_bytes() == folds
    path = tmp_path / "t.csv"
    path.write_bytes("名前,ラベル\n0001,NA\n".encode("cp932"))
    assert read_rows(path, "")[0] == [["名前", "ラベル"], ["0001", "NA"]]


# ---------------------------------------------------------------- metric and submission


def test_the_metric_is_written_and_printed(toy):
    flags = toy()
    assert "; metric AUC\n" in prepare(flags)
    assert settings(flags)["metric"] == "auc"
    assert prepare(flags, 32, "--metric", "logloss", "--overwrite")
    assert settings(flags)["metric"] == "logloss"
    relabel(flags, lambda i: "abc"[i % 3])
    assert "one probability of 3 classes (a, b, c)" in refused_prepare(flags, "--overwrite")
    write_csv(flags[1] / "sample_submit.csv", [(f"t{i:03}.png", "a") for i in range(10)])
    prepare(flags, 32, "--overwrite")
    assert settings(flags)["metric"] == "accuracy"
    for metric in ("pauc", "qwk"):
        line = refused_prepare(flags, "--overwrite", "--metric", metric)
        assert f"--metric {metric} doesn't suit the classes a, b, c: " in line


def submission_of(flags, rows, *more):
    write_csv(flags[1] / "sample_submit.csv", rows)
    prepare(flags, 32, "--overwrite", *more)
    return settings(flags)["submission"]


def test_the_sample_decides_the_submission_format(toy):
    flags = toy()
    dialect = dict(separator=",", decimal=".", newline="\n")
    one = dict(value="probability", columns=None, header=None, id_column=0, values=[1]) | dialect
    assert submission_of(flags, [("t000.png", 0)]) == one
    headed = [("image_id", "target"), ("t000.png", 0.5)]
    assert submission_of(flags, headed) == one | dict(header=["image_id", "target"])
    both = [("id", "1", "0"), ("t000.png", 0.5, 0.5)]
    assert submission_of(flags, both)["columns"] == ["1", "0"]
    assert submission_of(flags, headed, "--submit-value", "label")["value"] == "label"
    write_csv(flags[1] / "sample_submit.csv", [("id", "cat", "dog"), ("t000.png", 0.5, 0.5)])
    assert "cat, dog" in refused_prepare(flags, "--overwrite")
    write_csv(flags[1] / "sample_submit.csv", [("nowhere.png", 0), ("t000.png", 0)])
    line = refused_prepare(flags, "--overwrite", "--submit-header", "no")
    assert "nowhere.png" in line


@pytest.mark.parametrize(
    "first", [("gone.png", 0.5), ("gone.JPG", "target"), ("gone", 0.5), ("gone", "1"), ("10", ""), ("gone", 1e-3)]
)
def test_a_missing_first_test_image_is_not_taken_for_the_header(toy, first):
    flags = toy()
    write_csv(flags[1] / "sample_submit.csv", [first, ("t000.png", 0), ("t001.png", 1)])
    line = refused_prepare(flags)
    assert "lacks 1 of the images" in line
    assert first[0] in line
    prepare(flags, 32, "--submit-header", "yes")
    assert settings(flags)["submission"]["header"] == [str(cell) for cell in first]


@pytest.mark.parametrize(
    "header", [("id", "label"), ("", "target"), ("id", "0", "1"), ("id", "q0", "q2"), ("id", "1"), ("image", "has 1")]
)
def test_headers_are_recognised(toy, header):
    flags = toy()
    rows = [header, *((f"t{i:03}.png", *[0.5] * (len(header) - 1)) for i in range(3))]
    write_csv(flags[1] / "sample_submit.csv", rows)
    result = kit("00_prepare.py", *flags, "--size", 32, "--groups", "none")
    if header[1] == "q0":
        assert "2 value columns (q0, q2)" in result.err, "a header, but of other columns"
    else:
        assert result.code == 0, result.err
        assert settings(flags)["submission"]["header"] == list(header)


def test_the_larger_of_two_numbers_is_the_positive_class_and_is_printed(toy):
    flags = toy()
    assert "submission: no header, probability of '1'" in prepare(flags)
    assert settings(flags)["classes"] == ["0", "1"]
    relabel(flags, lambda i: ("9.5", "10.5")[i % 2])
    assert "no header, probability of '10.5'" in prepare(flags, 32, "--overwrite")
    assert "no header, probability of '9.5'" in prepare(flags, 32, "--overwrite", "--positive", "9.5")
    assert settings(flags)["classes"] == ["10.5", "9.5"], "the second of two classes is the positive one"
    folds = pd.read_csv(prepared(flags) / "folds.csv", dtype=str)
    assert (folds.target == folds.label.map({"10.5": "0", "9.5": "1"})).all()


def test_the_positive_one_of_two_words_must_be_named(toy):
    flags = toy()
    relabel(flags, lambda i: ("normal", "abnormal")[i % 2])
    line = refused_prepare(flags)
    for words in ("sample_submit.csv", "abnormal, normal", "--positive"):
        assert words in line
    assert "probability of 'abnormal'" in prepare(flags, 32, "--positive", "abnormal")
    assert settings(flags)["classes"] == ["normal", "abnormal"]
    assert "--positive odd: give one of two classes" in refused_prepare(flags, "--overwrite", "--positive", "odd")
    names = [f"t{i:03}.png" for i in range(3)]
    write_csv(flags[1] / "sample_submit.csv", [("id", "abnormal"), *((name, 0.5) for name in names)])
    assert "`id,abnormal`, probability of 'abnormal'" in prepare(flags, 32, "--overwrite"), "the header names it"
    write_csv(flags[1] / "sample_submit.csv", [("id", "abnormal", "normal"), *((name, 0.5, 0.5) for name in names)])
    assert "normal`, probability of each class" in prepare(flags, 32, "--overwrite"), "nothing is to be guessed"
    write_csv(flags[1] / "sample_submit.csv", [(name, "normal") for name in names])
    assert "no header, label" in prepare(flags, 32, "--overwrite")
    relabel(flags, lambda i: "abc"[i % 3])
    assert "--positive a: give one of two classes" in refused_prepare(flags, "--overwrite", "--positive", "a")


@pytest.mark.parametrize(
    ("submission", "rows"),
    [
        (dict(header=None, value="probability", columns=None), [["a", "0.75"], ["b", "0.125"]]),
        (dict(header=["id", "x"], value="label", columns=None), [["id", "x"], ["a", "dog"], ["b", "cat"]]),
        (
            dict(header=["id", "dog", "cat"], value="probability", columns=["dog", "cat"]),
            [["id", "dog", "cat"], ["a", "0.75", "0.25"], ["b", "0.125", "0.875"]],
        ),
    ],
)
def test_submissions_are_filled_and_checked(tmp_path, submission, rows):
    probabilities, path = np.array([[0.25, 0.75], [0.875, 0.125]]), tmp_path / "s.csv"
    task = Classes(["cat", "dog"])
    layout = pd.DataFrame(dict(submission_id=[0, 1], target=-1, c0=["a", "b"], c1="", c2=""))
    layout = layout[layout.columns[: 2 + len(rows[-1])]]
    assert submission_rows(layout, probabilities, task, "auc", submission) == rows

    def check(rows):
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows(rows)
        check_submission(path, layout, task, submission)

    check(rows)
    for wrong in (rows[::-1], rows[:-1], [*rows[:-1], [*rows[-1], "0"]], [*rows[:-1], [rows[-1][0], "1.5", "0"]]):
        with pytest.raises(AssertionError):
            check(wrong)
    with pytest.raises(AssertionError):
        check([*rows[:-1], [rows[-1][0], *["1.5"] * (len(rows[-1]) - 1)]])


def test_a_metric_of_labels_submits_labels_of_two_classes_unless_the_sample_has_decimals(toy):
    flags = toy()
    assert submission_of(flags, [("t000.png", 0.5)], "--metric", "f1")["value"] == "probability"
    write_csv(flags[1] / "sample_submit.csv", [(f"t{i:03}.png", 0) for i in range(10)])
    for metric, value in (("auto", "probability"), ("logloss", "probability"), ("f1", "label"), ("qwk", "label")):
        out = done("00_prepare.py", *flags, "--size", 32, "--groups", "none", "--overwrite", "--metric", metric)
        assert json.loads((prepared(flags) / "prepared.json").read_text())["submission"]["value"] == value, out
