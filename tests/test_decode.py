"""Decoding: one bit depth for a data set, damaged metadata, JPEGs at reduced size, arrays, TIFFs, odd shapes."""

import io
import json
import struct
import sys
import zlib

import cv2
import numpy as np
import pytest
from conftest import TINY, decode, done, prepare, refused, write_csv
from PIL import Image, JpegImagePlugin

from kit.data.decode import depth_of, read_picture, resize
from kit.data.image_cache import common_depth
from kit.data.image_source import ImageSource
from kit.folds import shift
from kit.submit import hidden_test

RNG = np.random.default_rng(0)
PICTURE = cv2.resize(RNG.integers(0, 256, (6, 8, 3)).astype(np.uint8), (80, 60), interpolation=cv2.INTER_CUBIC)
TURNED = 6  # an EXIF orientation: what is shown is turned by 90 degrees, clockwise
EXIF = Image.Exif()
EXIF[0x0112] = TURNED
EXIF = EXIF.tobytes()[6:]  # without the Exif\0\0


def saved(image, kind, **options):
    data = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(data, kind, **options)
    return data.getvalue()


def photo(width, height):
    """A picture of soft shapes and fine noise."""
    soft = cv2.resize(RNG.integers(0, 256, (9, 12, 3)).astype(np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(soft + RNG.normal(0, 8, (height, width, 1)), 0, 255).astype(np.uint8)


def competition(folder, train, test):
    """Write images, {name: bytes}, and tables of them. → --input and --output."""
    for part, files in dict(train=train, test=test).items():
        (folder / "input" / part).mkdir(parents=True)
        for name, data in files.items():
            (folder / "input" / part / name).write_bytes(data)
    write_csv(folder / "input/train.csv", [("image_name", "label"), *((n, i // 2 % 2) for i, n in enumerate(train))])
    write_csv(folder / "input/sample_submit.csv", [("image_name", "label"), *((name, 0.5) for name in test)])
    return ["--input", folder / "input", "--output", folder / "output"]


def cached(folder, part="train", size=32):
    return np.load(folder / "output" / "prepared" / f"{part}_{size}.npy")


# ---------------------------------------------------------------- bit depth

RAMP = np.tile(np.linspace(0, 4080, 40).astype(np.uint16), (40, 1))  # of 12 bits


def with_pixel(image, value):
    image = image.copy()
    image[5, 5] = value
    return image


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A competition of 16-bit PNGs of one camera, prepared: dark images and hot pixels among them."""
    folder = tmp_path_factory.mktemp("deep")
    images = [RAMP, with_pixel(RAMP, 4096), RAMP // 8, with_pixel(RAMP, 65535)] * 6
    train = {f"{i:02}.png": saved(image, "PNG") for i, image in enumerate(images)}
    flags = competition(folder, train, {f"t{i}.png": saved(images[i], "PNG") for i in range(4)})
    return folder, flags, prepare(flags)


def test_a_data_set_has_one_bit_depth(deep):
    folder, flags, out = deep
    images, expected = cached(folder).astype(float), resize((RAMP >> 4).astype(np.uint8)[..., None].repeat(3, 2), 32)
    assert (images[0] == expected).all()
    assert np.abs(images[[1, 3]].mean((1, 2, 3)) - images[0].mean()).max() < 0.5, "a hot pixel"
    assert np.abs(images[2] - images[0] / 8).max() < 2, "a dark image stays dark"
    assert "depth       16-bit images are all scaled as 12 bits (7 use 10 bits, 21 use 12 bits)" in out
    assert json.loads((folder / "output/prepared/prepared.json").read_text())["depth"] == 12
    assert "depth" not in prepare(flags, 24), "another size has the same"
    assert np.abs(cached(folder, size=24)[2] - cached(folder, size=24)[0] / 8.0).max() < 2


def test_hidden_test_images_have_the_depth_of_the_training_images(deep, tmp_path):
    folder, flags, _ = deep
    done("01_train_fold.py", *flags, *TINY, "--fold", 0)
    done("03_infer.py", *flags)
    (tmp_path / "dark").mkdir()
    (tmp_path / "dark/t2.png").write_bytes(saved(RAMP // 8, "PNG"))
    write_csv(tmp_path / "sample.csv", [("image_name", "label"), ("t2.png", 0.5)])
    hidden = ["--test-images", tmp_path / "dark", "--sample-submit", tmp_path / "sample.csv"]
    done("03_infer.py", *flags, *hidden, "--name", tmp_path / "hidden.csv")
    (known,) = (folder / "output/base").glob("submission_*.csv")
    rows = [
        dict(line.split(",") for line in path.read_text().splitlines()) for path in (known, tmp_path / "hidden.csv")
    ]
    assert float(rows[1]["t2.png"]) == pytest.approx(float(rows[0]["t2.png"]), abs=1e-6)


def test_depths_are_read_off_what_is_no_hot_pixel_and_no_marker():
    flat = np.full((50, 60, 1), 1000, np.uint16)
    assert depth_of(flat) == 10
    for value in (1024, 5000, 65535):
        assert depth_of(with_pixel(flat, value)) == 10
    spots, marked, line = flat.copy(), flat.copy(), flat.copy()
    spots[9:12, 9:12], marked[:9, :20], line[:, 7] = 4000, 65535, 5000
    assert [depth_of(image) for image in (spots, marked, line)] == [12, 10, 10]
    assert depth_of(np.full((3, 3, 3), 65535, np.uint16)) == 8, "white by any depth"
    assert [depth_of(np.full((1, 1, 1), 2**bits - 1, np.uint16)) for bits in (8, 10, 12, 14)] == [8, 10, 12, 14]


def test_the_depth_of_a_data_set_holds_95_percent_of_the_images(capsys):
    assert common_depth([None, None]) is None
    assert common_depth([10, 12, None]) == 12
    assert common_depth([12] * 19 + [16]) == 12
    assert "(19 use 12 bits, 1 use 16 bits; what is brighter becomes white)" in capsys.readouterr().out
    assert common_depth([12] * 18 + [16] * 2) == 16
    bright = read_picture(saved(np.full((9, 9), 40000, np.uint16), "PNG"), depth=12)
    assert (bright.pixels == 255).all(), "saturated, not wrapped around"


# ---------------------------------------------------------------- damaged metadata


def chunk(kind, data, check=None):
    check = zlib.crc32(kind + data) if check is None else check
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)


def packed(begin, count):
    return zlib.compress(begin + bytes(count))


RANDOM = RNG.integers(0, 256, 2**20).astype(np.uint8).tobytes()
NEGATIVE = struct.pack("<4sIHHHIHHHHIIIii", b"II*\0", 8, 2, 0x112, 3, 1, TURNED, 0, 0x11A, 10, 1, 38, 0, -72, 1)
CHUNKS = {  # of a PNG: bytes before its pixels, and whether it is turned
    "EXIF of nonsense": (chunk(b"eXIf", b"garbage!!"), False),
    "EXIF of 4 bytes": (chunk(b"eXIf", b"II*\0"), False),
    "no EXIF": (chunk(b"eXIf", b""), False),
    "EXIF with a damaged beginning": (chunk(b"eXIf", b"XX" + EXIF[2:]), True),
    "EXIF with a resolution below 0": (chunk(b"eXIf", NEGATIVE), True),
    "a text of 3 MB": (chunk(b"zTXt", b"Comment\0\0" + packed(b"", 3_000_000)), False),
    "an international text of 3 MB": (chunk(b"iTXt", b"Comment\0\1\0\0\0" + packed(b"", 3_000_000)), False),
    "a text of 70 MB": (chunk(b"tEXt", b"Comment\0" + bytes(70_000_000)), False),
    "XMP of 3 MB": (
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + packed(b'<x tiff:Orientation="6"/>', 3_000_000)),
        True,
    ),
    "a raw profile of nonsense": (chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 12\nzzzz\n"), False),
    "a profile of 4 MB": (chunk(b"iCCP", b"profile\0\0" + packed(RANDOM, 3_000_000)), False),
    "a profile of nonsense": (chunk(b"iCCP", b"profile\0\x09nonsense"), False),
    "a damaged checksum": (chunk(b"tEXt", b"a\0b", check=5), False),
    "short chunks": (chunk(b"gAMA", b"a") + chunk(b"pHYs", b"") + chunk(b"cHRM", b"a"), False),
    "a length too large": (b"\0\0\xff\xff" + chunk(b"tEXt", b"a\0b")[4:], False),
    "a length too small": (b"\0\0\0\1" + chunk(b"tEXt", b"a\0bcdef")[4:], False),
    "a damaged animation": (chunk(b"acTL", b"a") + chunk(b"fcTL", b"abc"), False),
}
ALPHA = np.dstack([PICTURE, np.full((60, 80), 255, np.uint8)])
MODES = {
    "grey": PICTURE[..., 0],
    "RGB": PICTURE,
    "RGBA": ALPHA,
    "palette": Image.fromarray(PICTURE).quantize(16),
    "16 bits": RAMP,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("damage", CHUNKS)
def test_a_png_with_damaged_or_large_metadata_is_read(damage, mode, capfd):
    whole, (more, turned) = saved(MODES[mode], "PNG"), CHUNKS[damage]
    expected = decode(whole)
    assert (decode(whole[:33] + more + whole[33:]) == (np.rot90(expected, -1) if turned else expected)).all()
    assert capfd.readouterr() == ("", "")


def test_a_png_whose_last_text_is_truncated_is_read():
    whole = saved(PICTURE, "PNG")
    for length in range(1, 512, 100):
        assert (decode(whole[:-12] + chunk(b"tEXt", b"a\0" + bytes(500))[:-length]) == PICTURE).all()
    with pytest.raises(ValueError, match=r"."):
        decode(whole[:-30])


def segment(marker, data):
    return struct.pack(">BBH", 255, marker, len(data) + 2) + data


SEGMENTS = {  # of a JPEG: bytes at its beginning, and whether it is turned
    "EXIF of nonsense": (segment(0xE1, b"Exif\0\0garbage!!"), False),
    "EXIF with a damaged beginning": (segment(0xE1, b"Exif\0\0XX" + EXIF[2:]), True),
    "EXIF with a resolution below 0": (segment(0xE1, b"Exif\0\0" + NEGATIVE), True),
    "an empty profile": (segment(0xE2, b"ICC_PROFILE\0") + segment(0xE1, b"Exif\0\0" + EXIF), True),
    "a profile of 1 MB": (
        b"".join(
            segment(0xE2, b"ICC_PROFILE\0" + bytes([i + 1, 17]) + RANDOM[i * 65_000 :][:65_000]) for i in range(17)
        ),
        False,
    ),
    "short segments": (segment(0xE0, b"JFIF\0") + segment(0xEE, b"Adobe"), False),
    "a damaged resource": (segment(0xED, b"Photoshop 3.0\x008BIM\x03"), False),
    "a damaged list of pictures": (segment(0xE2, b"MPF\0" + EXIF), False),
}


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("damage", SEGMENTS)
def test_a_jpeg_with_damaged_metadata_is_read(damage, mode):
    whole, (more, turned) = saved(Image.fromarray(PICTURE).convert(mode), "JPEG"), SEGMENTS[damage]
    expected = decode(whole)
    data = whole[:2] + more + whole[2:]
    assert (decode(data) == (np.rot90(expected, -1) if turned else expected)).all()
    with pytest.raises(ValueError, match=r"."):
        decode(data[: len(more) + len(whole) // 2])


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0II*\0", b"garbage!!", b"Exif\0\0" + NEGATIVE], ids=["short", "no", "below 0"]
)
def test_a_webp_with_damaged_exif_is_read(exif):
    expected = np.rot90(PICTURE, -1) if NEGATIVE in exif else PICTURE
    assert (decode(saved(PICTURE, "WEBP", lossless=True, exif=exif)) == expected).all()


# ---------------------------------------------------------------- JPEGs at reduced size


@pytest.mark.parametrize("options", [{}, dict(progressive=True), dict(mode="L"), dict(mode="CMYK")], ids=str)
def test_a_large_jpeg_is_decoded_at_reduced_size(options):
    options = dict(options)
    data = saved(Image.fromarray(photo(1300, 900)).convert(options.pop("mode", "RGB")), "JPEG", quality=90, **options)
    whole = decode(data)
    for least, width, height in ((901, 1300, 900), (451, 1300, 900), (450, 650, 450), (200, 325, 225), (9, 163, 113)):
        picture = read_picture(data, None, least)
        assert picture.pixels.shape == (height, width, 3)
        assert picture.size == (1300, 900)
        assert np.abs(resize(picture.pixels, 32) - resize(whole, 32).astype(float)).mean() < (1.5 if least > 9 else 3)
    for length in (0.3, 0.9):
        with pytest.raises(ValueError, match="truncated"):
            read_picture(data[: int(len(data) * length)], None, 200)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_jpeg_is_upright_and_of_its_own_size(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(photo(640, 480), "JPEG", exif=exif)
    whole, picture = decode(data), read_picture(data, None, 100)
    assert picture.size == whole.shape[1::-1] == ((640, 480) if orientation < 5 else (480, 640))
    assert picture.pixels.shape[1::-1] == tuple(side // 4 for side in picture.size)
    assert np.abs(resize(picture.pixels, 24) - resize(whole, 24).astype(float)).mean() < 1.5


def test_a_phone_photo_with_a_second_picture_is_reduced_too():
    data = saved(photo(640, 480), "MPO", save_all=True, append_images=[Image.fromarray(photo(64, 48))])
    assert read_picture(data, None, 100).pixels.shape == (120, 160, 3)
    assert (decode(data) == np.asarray(Image.open(io.BytesIO(data)))).all()


def test_small_jpegs_have_the_bytes_of_pillow():
    for image in (PICTURE, PICTURE[..., 0], photo(700, 1023)):
        data = saved(image, "JPEG")
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert (read_picture(data, None, 512).pixels == expected).all()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A competition of large and small photos, one turned and one truncated, prepared at 32 and 300 px."""
    folder, exif = tmp_path_factory.mktemp("photos"), Image.Exif()
    exif[0x0112] = TURNED
    large = photo(1300, 1100)
    files = {f"{i:02}.jpg": saved(photo(80, 60), "JPEG") for i in range(20)}
    files |= {"00.jpg": saved(large, "JPEG"), "01.jpg": saved(large, "JPEG", exif=exif)}
    files["02.jpg"] = files["00.jpg"][: len(files["00.jpg"]) * 3 // 4]
    files["03.jpg"] = saved(large, "PNG")
    flags = competition(folder, files, {f"t{i}.jpg": files["00.jpg"] for i in range(2)})
    with pytest.MonkeyPatch.context() as patch:
        drafts, sizes = [], []
        load, statistics = JpegImagePlugin.JpegImageFile.load, shift.statistics
        patch.setattr(shift, "statistics", lambda image, size: sizes.append(size) or statistics(image, size))
        patch.setattr(JpegImagePlugin.JpegImageFile, "load", lambda self: drafts.append(self.size) or load(self))
        out = prepare(flags, 32, "--unreadable", "grey")
    prepare(flags, 300, "--unreadable", "grey")
    return folder, large, out, drafts, sizes


def test_the_cache_is_made_from_reduced_jpegs(photos):
    folder, large, out, drafts, sizes = photos
    assert sizes.count((1300, 1100)) == 5
    assert sizes.count((1100, 1300)) == 1
    assert drafts.count((650, 550)) >= 4
    assert not drafts.count((1300, 1100))
    assert "train       20 images, 80 × 60 (16), 1300 × 1100 (3), 1100 × 1300 (1)" in out, "sizes are the files' own"
    seen, expected = cached(folder).astype(float), resize(large, 32).astype(float)
    assert np.abs(seen[0] - expected).mean() < 1
    assert np.abs(seen[1] - np.rot90(expected, -1)).mean() < 1
    assert np.abs(seen[2][:20] - seen[0][:20]).mean() < 2, "the rows that are there"
    assert np.ptp(seen[2][26:]) < 9, "the rows that are missing"
    assert (seen[3] == expected).all(), "a PNG as before"
    assert np.abs(cached(folder, size=300)[0] - resize(large, 300).astype(float)).mean() < 2


def test_03_decodes_as_00_does(photos):
    folder = photos[0]
    source = ImageSource(folder / "input/train")
    for i in range(4):
        images, _ = hidden_test.read_image(source, f"{i:02}.jpg", {32, 300})
        for size, image in images.items():
            assert (image == cached(folder, size=size)[i]).all()


def test_statistics_know_the_size_of_the_file():
    image = photo(640, 480)
    small = shift.statistics(cv2.resize(image, (320, 240), interpolation=cv2.INTER_AREA), (640, 480))
    assert small[:3] == pytest.approx(np.log([480, 640, 640 / 480]))
    assert small[3:5] == pytest.approx(shift.statistics(image)[3:5], abs=0.01)


# ---------------------------------------------------------------- arrays and TIFFs


def npy(array):
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()


def test_arrays_whose_channels_are_the_last_axis():
    alpha = ALPHA.copy()
    alpha[:9, :, 3] = 0
    assert (decode(npy(ALPHA)) == PICTURE).all()
    assert (decode(npy(alpha))[:9] == 255).all(), "transparent"
    bands = RNG.integers(0, 3000, (64, 50, 12)).astype(np.uint16)
    expected = decode(npy(np.moveaxis(bands, 2, 0)), (4, 3, 2))
    assert expected.shape == (64, 50, 3)
    assert (decode(npy(bands), (4, 3, 2)) == expected).all()
    assert (decode(npy(bands[..., :2]), (2,))[..., 0] == decode(npy(bands[..., 1]), (1,))[..., 0]).all()
    for count in (2, 4, 5, 12):
        with pytest.raises(ValueError, match=rf"^{count} bands of uint16: say which three with --bands$"):
            decode(npy(bands[..., :count]))
    with pytest.raises(ValueError, match=r"\[4, 64, 4\] may be \[C, H, W\] or \[H, W, C\]: save it as \[H, W, 3\]"):
        decode(npy(np.zeros((4, 64, 4))))
    assert decode(npy(np.zeros((6, 64, 50), np.uint8))).shape == (384, 50, 3), "channels first, as before"


def with_tag(data, tag, value):
    """The bytes of a TIFF with another short value of a tag."""
    order = "<" if data[:2] == b"II" else ">"
    (first,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, first)
    places = [first + 2 + 12 * i for i in range(count)]
    (place,) = [place for place in places if struct.unpack_from(order + "H", data, place)[0] == tag]
    return data[: place + 8] + struct.pack(order + "H", value) + data[place + 10 :]


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("packing", [None, "zlib"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_white_is_zero(dtype, packing, order):
    tifffile = pytest.importorskip("tifffile")
    levels, file = (PICTURE[..., 0].astype(dtype) << (4 if dtype == "uint16" else 0)).astype(dtype), io.BytesIO()
    tifffile.imwrite(file, levels, byteorder=order, compression=packing)
    data = file.getvalue()
    assert (decode(with_tag(data, 262, 0)) == 255 - decode(data)).all()
    assert (decode(data) == PICTURE[..., :1]).all()
    stretched = decode(data, (1,)).astype(int)
    assert np.abs(decode(with_tag(data, 262, 0), (1,)) - (255 - stretched)).max() <= 1


# ---------------------------------------------------------------- endings, shapes


def test_other_endings_of_photos(tmp_path):
    jpeg = saved(PICTURE, "JPEG", quality=95)
    files = {f"a.{ending}": jpeg for ending in ("jpe", "jfif", "jfi", "pjpeg", "JFIF")}
    files |= {"b.jp2": saved(PICTURE, "JPEG2000"), "c.jp2": saved(RAMP, "JPEG2000")}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    source = ImageSource(tmp_path)
    assert {*source.files} == {*files}
    assert (source.picture("a.jpe").pixels == decode(jpeg)).all()
    assert (source.picture("b.jp2").pixels == PICTURE).all()
    assert (source.picture("c.jp2").pixels == (RAMP >> 4)[..., None]).all()
    with pytest.raises(ValueError, match=r"."):
        decode(files["b.jp2"][: len(files["b.jp2"]) // 2])


@pytest.mark.skipif("pillow_heif" in sys.modules, reason="HEIC is read")
def test_heic_is_refused_with_the_package_that_reads_it(tmp_path):
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)
    flags = competition(tmp_path, {f"{i}.heic": heic for i in range(20)}, {"t.heic": heic})
    line = refused("00_prepare.py", *flags, "--size", 32, "--groups", "none", "--unreadable", "grey")
    assert "HEIC photos need pillow-heif: pip install pillow-heif, or convert them to JPEG" in line


def test_tiny_and_long_images_survive(tmp_path):
    shapes = [(1, 1), (1, 3000), (3000, 1), (2, 2), (1, 2), (7, 5), (5000, 3), (3, 5000), (16, 16), (33, 31)] * 2
    pixels = [RNG.integers(0, 255, (*shape, 3)).astype(np.uint8) for shape in shapes]
    files = {f"{i:02}.png": saved(image, "PNG") for i, image in enumerate(pixels)}
    files |= {"01.png": saved(pixels[1], "JPEG"), "03.png": saved(np.full((1, 2000), 3000, np.uint16), "PNG")}
    flags = competition(tmp_path, files, {f"t{i}.png": files[f"{i:02}.png"] for i in range(4)})
    assert "20 images, 1 × 1 (2)" in done("00_prepare.py", *flags, "--size", 32, "--groups", "copies")
    assert (cached(tmp_path)[0] == pixels[0][0, 0]).all()
    assert cached(tmp_path).shape == (20, 32, 32, 3)
