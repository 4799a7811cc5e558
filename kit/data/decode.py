"""Decoding: bytes of an image file (photo, TIFF, DICOM, NumPy array) → 8-bit RGB array; resizing."""

import contextlib
import io
import logging
import math
import re
import struct
import zlib
from dataclasses import dataclass

from common import UserError

import cv2
import numpy as np
from PIL import ExifTags, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, EXTRASAMPLES, IMAGELENGTH, IMAGEWIDTH, SAMPLEFORMAT, SAMPLESPERPIXEL
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION as PHOTOMETRIC

with contextlib.suppress(ImportError):
    from pillow_heif import register_heif_opener

    register_heif_opener()
Image.init()  # loads all of Pillow's formats; of these, none that starts a program (EPS) or needs another file
FORMATS = [name for name in "PNG JPEG JPEG2000 WEBP AVIF HEIF GIF BMP TIFF PPM".split() if name in Image.OPEN]
IMAGE_ENDINGS = tuple(
    ".png .jpg .jpeg .jpe .jfif .jfi .pjpeg .jp2 .webp .avif .heic .heif .gif .bmp .tif .tiff .ppm .pgm .dcm .dicom "
    ".npy".split()
)
MOST_BYTES = 2**29  # of one file, unpacked: more is a decompression bomb
MOST_JPEG = 2**30  # px of a JPEG that is read at an eighth of its size
JPEG, END_OF_JPEG = b"\xff\xd8\xff", b"\xff\xd9"  # an early end makes libjpeg fill missing rows with grey
PNG = b"\x89PNG\r\n\x1a\n"
CHUNKS = re.compile(b"PLTE|tRNS|IDAT|IEND")  # of a PNG, that its pixels need
PLAIN_CHUNKS = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}
ORIENTATION_TEXTS = b"XML:com.adobe.xmp", b"Raw profile"  # how texts begin that may hold an orientation
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # bytes unpacked; editors write XMP above Pillow's limit of 1 MiB
TiffImagePlugin.OPEN_INFO[b"MM", 0, (1,), 1, (16,), ()] = "I;16B", "I;16B"  # white is zero; Pillow has b"II" only
ORIENTATION = ExifTags.Base.Orientation
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF's orientation → Image.Transpose; from 5 on, rows are columns
ORIENTATION_TAG = re.compile(b"\x12\1\3\0\1\0\0\0([\1-\x08])\0|\1\x12\0\3\0\0\0\1\0([\1-\x08])")  # as EXIF stores it
EXIF = 256  # bytes of an image's own tags; behind them are the thumbnail's
DEPTHS = 8, 10, 12, 14, 16  # bits, as cameras store them
MOST_BANDS = 12  # of an array [H, W, C]
HEIC = b"ftyphei", b"ftyphev", b"ftypmif"  # from the fifth byte on
TIFFS = b"II*\0", b"MM\0*", b"II+\0"  # the last is BigTIFF
SLIDE, LEVEL = 8192, 4096  # px: a larger TIFF page is a slide, of which a level of at most this size is read
MOST_PAGES = 100  # of a slide that are looked at
LOSSLESS = 1, 5, 8, 32773, 32946, 34925, 50000  # none, LZW, deflate, PackBits, LZMA, zstd: unpack to what the tags say


@dataclass
class Picture:
    """An image as it was read."""

    pixels: np.ndarray  # uint8 [H, W, 3] RGB, upright
    depth: int | None = None  # bits that its samples of 16 use; None: they have 8, or are stretched
    size: tuple[int, int] | None = None  # width, height in the file, upright; None: those of `pixels`

    def __post_init__(self):
        self.size = self.size or self.pixels.shape[1::-1]


def read_picture(data, bands=None, least=None, depth=None):
    """Return the bytes of an image file, or the file opened for reading, as the Picture that a person sees.

    EXIF rotation is applied, palettes and CMYK are converted, transparent parts become white, an animation shows its
    first frame. 16-bit grey and RGB are scaled by `depth`, or by the depth that they use (see depth_of); what is
    brighter becomes 255. A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where both sides stay at least `least` px.
    The format is what the first bytes say:

    - TIFF and .npy: `bands` (4, 3, 2), which count from 1, become R, G, B, and one band grey, each stretched between
      its 2nd and 98th percentile. Without it, a TIFF of 2 or over 4 bands, or of floats, is refused.
    - a slide (a TIFF wider than 8192 px): its largest level of at most 4096 px a side.
    - a JPEG too large for Pillow: an eighth of its size.
    - .npy: [H, W] is grey, [H, W, 3] and [3, H, W] are RGB, uint8 [H, W, 4] is RGBA, other [H, W, C] need `bands`. The
      channels of another [C, H, W] are stacked below one another in a grey picture [C * H, W]. Values other than uint8
      are stretched between the array's percentiles.
    - DICOM: the first frame through its window or VOI LUT; without these, between its least and greatest value.

    Metadata that is damaged or too large is left out. Raises ValueError for what is no image, is truncated, or can't be
    shown; UserError without pydicom, tifffile or pillow-heif. OpenCV reads plain PNGs, Pillow other photos: OpenCV
    drops transparency and accepts truncated JPEGs."""
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    head = file.read(132)
    file.seek(0)
    try:
        if head[128:] == b"DICM":
            return read_dicom(file, depth)
        if head.startswith(b"\x93NUMPY"):
            return read_npy(file, bands)
        if head.startswith(JPEG):
            return read_jpeg(file, least)
        return read_tiff(file, bands, depth) if head.startswith(TIFFS) else read_photo(file, depth)
    except UserError:
        raise
    except UnidentifiedImageError:
        if head[4:11] in HEIC and "HEIF" not in FORMATS:
            raise UserError("HEIC photos need pillow-heif: pip install pillow-heif, or convert them to JPEG") from None
        raise ValueError("no image" if head else "empty file") from None
    except Exception as error:  # whatever damaged bytes make of the readers: a dozen kinds, as fuzzing shows
        reason = " ".join(str(error).split())  # pydicom's has several lines
        raise ValueError(reason[:300] or type(error).__name__) from None


def read_photo(file, depth=None):
    """Return the Picture of what Pillow opens; 16-bit RGB in a PNG by OpenCV: Pillow keeps the upper bytes only."""
    is_png = file.read(len(PNG)) == PNG
    file.seek(0)
    data, is_plain = clean_png(file.read()) if is_png else (b"", False)  # of others, Pillow reads what it needs
    if is_plain and (pixels := cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)) is not None:
        return Picture(pixels)
    with Image.open(io.BytesIO(data) if is_png else file, formats=FORMATS) as opened:
        opened.load()
    if data[24:25] == b"\x10" and data[25] in (2, 4, 6) and "transparency" not in opened.info:
        samples = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if samples is not None and samples.dtype == np.uint16:
            samples = samples[..., [2, 1, 0, 3][: samples.shape[2]]]  # OpenCV has BGR
            return to_rgb(samples, read_orientation(opened), depth)
    return to_rgb(opened, depth=depth)


def clean_png(data):
    """Return (a PNG without the chunks that change nothing that is seen, or are damaged and not the pixels'; whether it
    is plain: complete, of 8-bit grey or RGB, upright, without transparency).

    Pillow would refuse the damaged ones, and libpng print warnings about colour profiles. OpenCV decodes a plain one to
    Pillow's pixels in one call, during which other threads work; Pillow's threads wait for each other."""
    kept, kinds, offset, view, kind = [PNG], set(), len(PNG), memoryview(data), b""
    while kind != b"IEND" and offset + 12 <= len(data):
        length, kind = struct.unpack(">I4s", view[offset : offset + 8])
        end = offset + 12 + length
        intact = zlib.crc32(view[offset + 4 : end - 4]).to_bytes(4) == view[end - 4 : end]
        seen = kind in (b"tRNS", b"eXIf") or data.startswith(ORIENTATION_TEXTS, offset + 8)
        if kind[0] < 97 or (intact and seen):  # a capital: needed
            kept.append(view[offset:end])
            kinds.add(kind if intact else b"damaged")
        elif not intact and (needed := CHUNKS.search(data, offset + 8)):  # its length may be damaged too
            end = needed.start() - 4
        offset = end
    plain = kinds <= PLAIN_CHUNKS and b"IEND" in kinds and data[24] == 8 and data[25] in (0, 2)
    data = data if sum(map(len, kept)) == len(data) else b"".join(kept)  # without a copy where all is needed
    return data, plain and math.prod(struct.unpack(">II", view[16:24])) <= Image.MAX_IMAGE_PIXELS


def read_jpeg(file, least=None):
    """Return the Picture of a JPEG, decoded at 1/2, 1/4 or 1/8 of its size where both sides stay at least `least` px.

    One too large for Pillow is read at an eighth, which costs little memory where one scan holds everything. Raises
    ValueError for a larger one, and for several scans: they are kept in memory."""
    try:
        opened = JpegImagePlugin.JpegImageFile(file)  # Image.open would refuse a large one, or make it an MPO
    except (SyntaxError, OSError):
        file.seek(0)
        opened = JpegImagePlugin.JpegImageFile(io.BytesIO(without_metadata(file.read())))
    size, scan = opened.size, opened.fp.read(3)
    is_bomb = size[0] * size[1] > 2 * Image.MAX_IMAGE_PIXELS
    if is_bomb and (size[0] * size[1] > MOST_JPEG or "progressive" in opened.info or scan[-1] < opened.layers):
        raise ValueError(f"{size[0]} × {size[1]} px: make it smaller")
    if is_bomb or least:
        opened.draft(None, (1, 1) if is_bomb else (least, least))
    opened.load()
    picture = to_rgb(opened)
    picture.size = size[::-1] if read_orientation(opened) in (5, 6, 7, 8) else size
    return picture


def without_metadata(data):
    """Return the bytes of a JPEG without its metadata, except EXIF and Adobe's segment, which tells the colours."""
    kept, place = [data[:2]], 2
    while place + 4 <= len(data) and data[place + 1] != 0xDA:  # the pixels
        kind, length = data[place + 1], 2 + int.from_bytes(data[place + 2 : place + 4])
        if kind == 0xE1 or (kind == 0xEE and length >= 14) or kind not in (*range(0xE0, 0xF0), 0xFE):
            kept.append(data[place : place + length])
        place += length
    return b"".join([*kept, data[place:]])


def depth_of(samples):
    """Return the least of 8, 10, 12, 14 and 16 bits that hold uint16 [H, W, C], apart from hot pixels, which a median
    of 3 × 3 drops, and from 65535, as which markers are drawn: saturated, they look the same."""
    calm = cv2.medianBlur(np.ascontiguousarray(samples), 3)
    most = calm.max(initial=0, where=calm < 65535)
    return next(bits for bits in DEPTHS if most < 2**bits)


def to_8_bits(samples, colours, depth):
    """Return (uint16 [H, W, C] as uint8, the depth that they use): `colours` of the channels are scaled by `depth`, or
    by the depth that they use, and alpha by 16."""
    own = depth_of(samples[..., :colours])
    shifts = [(depth or own) - 8] * colours + [8] * (samples.shape[-1] - colours)
    return np.minimum(samples >> np.array(shifts, np.uint16), 255).astype(np.uint8), own


def to_rgb(image, orientation=None, depth=None):
    """Return the Picture of a Pillow image of any mode, or of uint16 [H, W, 3 or 4]. orientation: EXIF's; None: the
    image's own."""
    own = None
    if isinstance(image, np.ndarray):
        samples, own = to_8_bits(image, 3, depth)
        image = Image.fromarray(samples)
    orientation = orientation or read_orientation(image)
    if image.mode.startswith("I"):  # 16-bit grey
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("32-bit values: say which bands with --bands")
        grey, own = to_8_bits(grey.astype(np.uint16)[..., None], 1, depth)
        is_inverted = hasattr(image, "tag_v2") and image.tag_v2.get(PHOTOMETRIC) == 0  # white is zero
        image = Image.fromarray(255 - grey[..., 0] if is_inverted else grey[..., 0])
    elif image.mode == "F":
        raise ValueError("floating-point values: say which bands with --bands")
    image = image.transpose(TURNS[orientation]) if orientation in TURNS else image
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return Picture(np.asarray(image if image.mode == "RGB" else image.convert("RGB")), own)


def read_orientation(image):
    """Return the EXIF orientation of a Pillow image, 1 to 8, also where its EXIF data is damaged elsewhere."""
    with contextlib.suppress(Exception):  # as many kinds as there are damages
        if orientation := image.getexif().get(ORIENTATION):
            return orientation
    found = ORIENTATION_TAG.search(image.info.get("exif", b""), 0, EXIF)
    return found[found.lastindex][0] if found else 1


def read_tiff(file, bands, depth=None):
    """Return the Picture of a TIFF: `bands` and 16-bit RGB by tifffile, the rest by Pillow."""
    head = file.read(16)
    tags = TiffImagePlugin.ImageFileDirectory_v2(head if head[:4] == TIFFS[2] else head[:8])
    file.seek(tags.next)
    tags.load(file)  # of the first page
    file.seek(0)
    width, height = tags.get(IMAGEWIDTH), tags.get(IMAGELENGTH)
    count, bits = tags.get(SAMPLESPERPIXEL, 1), tags.get(BITSPERSAMPLE, (1,))[0]
    if not (width and height):
        return read_photo(file)  # which says what is wrong
    if bands:
        planes, is_inverted = read_samples(file), count == 1 and tags.get(PHOTOMETRIC) == 0
        return compose_bands(planes * -1.0 if is_inverted else planes, bands, tags.get(ORIENTATION))
    if max(width, height) > SLIDE and count in (1, 3, 4):
        return read_level(file, width / height, depth)
    if count > 4 or count == 2:
        raise ValueError(f"{count} bands: say which three with --bands")
    if bits == 16 and count > 2 and tags.get(PHOTOMETRIC, 2) in (1, 2) and tags.get(SAMPLEFORMAT, (1,))[0] == 1:
        has_alpha = tags.get(EXTRASAMPLES, (0,))[0] in (1, 2)
        return to_rgb(np.moveaxis(read_samples(file)[: 3 + has_alpha], 0, -1), tags.get(ORIENTATION), depth)
    if bits > 16 and count > 1:
        raise ValueError(f"{count} bands of {bits} bits: say which three with --bands")
    return read_photo(file, depth)


def read_samples(file):
    """Return the samples [C, H, W] of a TIFF's first page as they are stored, of any number of bands and any type.
    Raises ValueError where they are truncated, compressed with loss, or too many; UserError without tifffile."""
    try:
        import tifffile

        logging.getLogger("tifffile").disabled = True  # it would print what damaged files lack
        with tifffile.TiffFile(file) as opened:
            page = opened.pages[0]
            if page.compression not in LOSSLESS:
                raise ValueError(f"TIFF compression {page.compression:d} can't be read by bands")
            if (page.compression, page.predictor) != (1, 1):
                import imagecodecs  # noqa: F401 (without it, tifffile unpacks deflate and LZMA without limit)
            if page.dtype is None or page.dtype.kind not in "buif":
                raise ValueError(f"samples of {page.bitspersample} bits, format {page.sampleformat}")
            size = max(math.prod(page.shaped), math.prod(page.chunks)) * page.dtype.itemsize
            if size > MOST_BYTES or page.imagewidth * page.imagelength > 2 * Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{page.imagewidth} × {page.imagelength} px of {page.samplesperpixel} bands: too many")
            chunks, end = zip(page.dataoffsets, page.databytecounts, strict=False), opened.filehandle.size
            if sum(0 < at < at + count <= end for at, count in chunks) < math.prod(page.chunked):
                raise ValueError("truncated")  # tifffile would fill what is missing
            samples = page.asarray(squeeze=False, maxworkers=1)[:, 0]  # [planes, H, W, samples], one of them 1
    except ImportError:
        raise UserError("TIFFs of 16-bit RGB or by --bands need tifffile: pip install tifffile imagecodecs") from None
    return np.moveaxis(samples, -1, 1).reshape(-1, *samples.shape[1:3])


def read_level(file, shape, depth):
    """Return the Picture of a slide's largest page of at most 4096 px a side whose width / height is near `shape`
    (slides hold pictures of their labels too), else of its first page."""
    opened = TiffImagePlugin.TiffImageFile(file)  # Image.open would refuse it for its first page
    levels = {}  # width → number of the page
    with contextlib.suppress(EOFError):
        for number in range(1, MOST_PAGES):
            opened.seek(number)
            width, height = opened.size
            if max(width, height) <= LEVEL and abs(width / height / shape - 1) < 0.05:
                levels.setdefault(width, number)
    if not levels:
        file.seek(0)
        return read_photo(file, depth)
    opened.seek(levels[max(levels)])
    opened.load()
    return to_rgb(opened, depth=depth)


def compose_bands(planes, bands, orientation=None):
    """Return the Picture of the bands of [C, H, W] of any type, numbers from 1: three, or one as grey."""
    if missing := [band for band in bands if not 1 <= band <= len(planes)]:
        raise ValueError(f"no band {missing[0]}: it has {len(planes)}")
    picture = np.stack([stretch(planes[band - 1]) for band in bands], axis=-1)
    return to_rgb(Image.fromarray(np.repeat(picture, 3 // len(bands), axis=-1)), orientation)


def stretch(values, low=None, high=None):
    """Scale numbers of any shape and type to uint8: `low` becomes 0 and `high` 255, by default the 2nd and 98th
    percentile. Values that aren't finite become 0."""
    values = np.asarray(values, np.float64)
    finite = np.isfinite(values)
    if low is None:
        low, high = np.percentile(values[finite], (2, 98)) if finite.any() else (0, 1)
    scaled = (np.where(finite, values, low) - low) * (255 / (high - low) if high > low else 0)
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def read_npy(file, bands):
    """Return the Picture of a .npy of [H, W], [H, W, C] or [C, H, W]. C is the last axis if that is 1 or 3, or at most
    12 and less than the first; if they are equal, ValueError is raised."""
    array = np.lib.format.read_array(file, allow_pickle=False)
    if array.ndim not in (2, 3) or array.dtype.kind not in "buif" or not array.size:
        raise ValueError(f"an array {list(array.shape)} of {array.dtype} is no picture")
    array = array * np.uint8(255) if array.dtype == bool else array
    first, last = array.shape[0], array.shape[-1]
    if array.ndim == 3 and last not in (1, 3) and last <= min(first, MOST_BANDS):
        if first == last:
            raise ValueError(f"an array {list(array.shape)} may be [C, H, W] or [H, W, C]: save it as [H, W, 3]")
        if not bands and last == 4 and array.dtype == np.uint8:
            return to_rgb(Image.fromarray(array))  # RGBA
        if not bands:
            raise ValueError(f"{last} bands of {array.dtype}: say which three with --bands")
    if array.ndim == 3 and (last in (1, 3) or last <= min(first, MOST_BANDS)):
        array = np.moveaxis(array, -1, 0)
    planes = array.reshape(-1, *array.shape[-2:])
    if bands:
        return compose_bands(planes, bands)
    planes = planes if planes.dtype == np.uint8 else stretch(planes)
    if len(planes) == 3:
        return Picture(np.ascontiguousarray(np.moveaxis(planes, 0, -1)))
    return Picture(np.repeat(planes.reshape(-1, planes.shape[-1], 1), 3, axis=-1))


def read_dicom(file, depth):
    """Return the Picture of a DICOM file's first frame."""
    try:
        from pydicom import dcmread, pixels
    except ImportError:
        raise UserError("DICOM images need pydicom: pip install pydicom") from None
    tags = dcmread(file)
    if tags.Rows * tags.Columns > 2 * Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{tags.Columns} × {tags.Rows} px are too many")
    stored = pixels.pixel_array(tags, index=0)  # RGB if it was YBR
    if tags.PhotometricInterpretation == "PALETTE COLOR":
        stored = pixels.apply_color_lut(stored, tags)
    if stored.ndim == 3:
        return Picture(stored) if stored.dtype == np.uint8 else Picture(*to_8_bits(stored, 3, depth))
    if tags.get("WindowWidth") is None or tags.get("WindowCenter") is None:  # there, but empty
        tags.pop("WindowWidth", None)
    values = pixels.apply_modality_lut(stored, tags)  # slope and intercept
    low, high = values.min(), values.max()
    if tags.get("VOILUTSequence"):
        low, high = 0, 2 ** tags.VOILUTSequence[0].LUTDescriptor[2] - 1
    elif "WindowWidth" in tags:  # the window's own ends, also where no value of the image reaches them
        with np.errstate(over="ignore"):
            low, high = pixels.apply_voi_lut(np.array([-1e9, 1e9]), tags)
    grey = stretch(pixels.apply_voi_lut(values, tags), low, high)
    grey = 255 - grey if tags.PhotometricInterpretation == "MONOCHROME1" else grey
    return Picture(np.repeat(grey[..., None], 3, axis=-1))


def shrink(image, least):
    """Shrink uint8 [H, W, 3] by the largest whole number at which both sides stay at least `least` px."""
    factor = min(image.shape[:2]) // least
    size = [math.ceil(side / factor) for side in image.shape[1::-1]] if factor > 1 else None
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA) if size else image


def resize(image, size):
    """Resize uint8 [H, W, 3] to [size, size, 3], bilinear, as albumentations' Resize in the thesis (3.1.1).

    An axis that shrinks to less than half is averaged first: bilinear would skip its pixels and keep their noise. The
    other axis waits for the second step, since INTER_AREA is no mean where an axis grows."""
    height, width = (size if side > 2 * size else side for side in image.shape[:2])
    if (height, width) != image.shape[:2]:
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
