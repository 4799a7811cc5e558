"""Decoding: bytes of an image file (photo, TIFF, DICOM, NumPy array) → 8-bit RGB array; resizing."""

import contextlib
import io
import logging
import math
import struct
import zlib

from common import UserError

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin, TiffImagePlugin, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, EXTRASAMPLES, IMAGELENGTH, IMAGEWIDTH, SAMPLEFORMAT, SAMPLESPERPIXEL
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION as PHOTOMETRIC

Image.init()  # loads all of Pillow's formats; of these, none that starts a program (EPS) or needs another file
FORMATS = [name for name in "PNG JPEG WEBP AVIF GIF BMP TIFF PPM".split() if name in Image.OPEN]
IMAGE_ENDINGS = (*".png .jpg .jpeg .webp .avif .gif .bmp .tif .tiff .ppm .pgm".split(), ".dcm", ".dicom", ".npy")
MOST_BYTES = 2**29  # of one file, unpacked: what claims more is no photo but a bomb
MOST_JPEG = 2**30  # px of a JPEG that is read at an eighth of its size
END_OF_JPEG = b"\xff\xd9"  # after it libjpeg leaves the rows that it lacks grey
PNG = b"\x89PNG\r\n\x1a\n"
SPECIAL_CHUNKS = b"tRNS", b"eXIf", b"acTL", b"iCCP"  # of PNGs that aren't plain
ORIENTATION_TEXTS = b"XML:com.adobe.xmp", b"Raw profile"  # how texts begin that may hold an orientation
ORIENTATION = ExifTags.Base.Orientation
TIFFS = b"II*\0", b"MM\0*", b"II+\0"  # the last is BigTIFF
SLIDE, LEVEL = 8192, 4096  # px: a TIFF page that is wider is a slide, of which a level of at most this size is read
MOST_PAGES = 100  # of a slide that are looked at
LOSSLESS = 1, 5, 8, 32773, 32946, 34925, 50000  # none, LZW, deflate, PackBits, LZMA, zstd: unpack to what the tags say


def decode(data, bands=None):
    """Return the bytes of an image file, or the file opened for reading, as uint8 [H, W, 3] RGB as a person sees it.

    EXIF rotation is applied, palettes and CMYK are converted, transparent parts become white, an animation shows its
    first frame. 16-bit grey and RGB are scaled by the depth that they use. The format is what the first bytes say:

    - TIFF and .npy: `bands` (4, 3, 2), which count from 1, become R, G, B, and one band grey, each stretched between
      its 2nd and 98th percentile. Without it, a TIFF of more than 4 bands or of floating-point values is refused.
    - a slide (a TIFF wider than 8192 px): its largest level of at most 4096 px a side.
    - a JPEG too large for Pillow: an eighth of its size.
    - .npy: [H, W] is grey, [H, W, 3] and [3, H, W] are RGB. The channels of another [C, H, W] are stacked below one
      another in a grey picture [C * H, W]. Values other than uint8 are stretched between the array's percentiles.
    - DICOM: the first frame through its window or VOI LUT; without these, between its least and greatest value.

    Raises ValueError for what is no image, is truncated, or can't be shown; UserError without pydicom or tifffile.
    OpenCV reads plain PNGs, Pillow other photos: OpenCV drops transparency and accepts truncated JPEGs."""
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    head = file.read(132)
    file.seek(0)
    try:
        if head[128:] == b"DICM":
            return read_dicom(file)
        if head.startswith(b"\x93NUMPY"):
            return read_npy(file, bands)
        return read_tiff(file, bands) if head.startswith(TIFFS) else read_photo(file)
    except UserError:
        raise
    except UnidentifiedImageError:
        raise ValueError("no image" if head else "empty file") from None
    except Exception as error:  # whatever damaged bytes make of the readers: a dozen kinds, as fuzzing shows
        reason = " ".join(str(error).split())  # pydicom's has several lines
        raise ValueError(reason[:300] or type(error).__name__) from None


def read_photo(file):
    """Return what Pillow opens as uint8 [H, W, 3]; 16-bit RGB in a PNG by OpenCV: Pillow keeps the upper bytes only."""
    is_png = file.read(len(PNG)) == PNG
    file.seek(0)
    data = file.read() if is_png else b""  # others may be large, and Pillow reads what it needs
    if is_plain_png(data) and (pixels := cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)) is not None:
        return pixels
    file.seek(0)
    try:
        with Image.open(file, formats=FORMATS) as opened:
            opened.load()
    except Image.DecompressionBombError:
        file.seek(0)
        if file.read(2) != b"\xff\xd8":
            raise
        opened = reduce_jpeg(file)
    if data[24:25] == b"\x10" and data[25] in (2, 4, 6) and "transparency" not in opened.info:
        samples = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if samples is not None and samples.dtype == np.uint16:
            samples = samples[..., [2, 1, 0, 3][: samples.shape[2]]]  # OpenCV has BGR
            return to_rgb(Image.fromarray(to_8_bits(samples, colours=3)), opened.getexif().get(ORIENTATION))
    return to_rgb(opened)


def is_plain_png(data):
    """Return whether the bytes are a complete PNG of 8-bit grey or RGB, upright, without transparency, animation, XMP
    (which may rotate it) and colour profile (about which libpng prints warnings). OpenCV decodes it to the same pixels
    in one call, during which other threads work; Pillow's threads wait for each other."""
    if not data.startswith(PNG) or len(data) < 33 or data[24] != 8 or data[25] not in (0, 2):
        return False
    width, height = struct.unpack(">II", data[16:24])
    offset, kind, view = len(PNG), b"", memoryview(data)
    while kind != b"IEND" and offset + 12 <= len(data):
        length, kind = struct.unpack(">I4s", data[offset : offset + 8])
        end = offset + 8 + length
        special = kind in SPECIAL_CHUNKS or data.startswith(ORIENTATION_TEXTS, offset + 8)
        if special or zlib.crc32(view[offset + 4 : end]).to_bytes(4) != data[end : end + 4]:
            return False
        offset = end + 4
    return kind == b"IEND" and width * height <= Image.MAX_IMAGE_PIXELS


def reduce_jpeg(file):
    """Return a JPEG too large to be decoded at an eighth of its size, which costs little memory where one scan holds
    everything. Raises ValueError for a larger one, and for several scans: they are kept in memory."""
    file.seek(0)
    opened = JpegImagePlugin.JpegImageFile(file)  # Image.open would refuse it
    size, scan = opened.size, file.read(3)
    opened.draft("RGB", (1, 1))
    if size[0] * size[1] > MOST_JPEG or "progressive" in opened.info or scan[-1] < opened.layers:
        raise ValueError(f"{size[0]} × {size[1]} px: make it smaller")
    opened.load()
    return opened


def to_8_bits(samples, colours):
    """Scale uint16 [H, W, C] to uint8: `colours` of the channels by the depth that they use together, alpha by 16."""
    most = samples[..., :colours].max()
    depth = next(bits for bits in (8, 10, 12, 14, 16) if most < 2**bits)  # as cameras store
    shifts = [depth - 8] * colours + [8] * (samples.shape[-1] - colours)
    return (samples >> np.array(shifts, np.uint16)).astype(np.uint8)


def to_rgb(image, orientation=None):
    """Return a Pillow image of any mode as uint8 [H, W, 3], upright. orientation: EXIF's, where it has no EXIF."""
    if orientation:
        image.getexif()[ORIENTATION] = orientation
    ImageOps.exif_transpose(image, in_place=True)  # by default it copies upright images too
    if image.mode.startswith("I"):  # 16-bit grey
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("32-bit values: say which bands with --bands")
        image = Image.fromarray(to_8_bits(grey.astype(np.uint16)[..., None], colours=1)[..., 0])
    elif image.mode == "F":
        raise ValueError("floating-point values: say which bands with --bands")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def read_tiff(file, bands):
    """Return a TIFF as uint8 [H, W, 3]: `bands` and 16-bit RGB by tifffile, the rest by Pillow."""
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
        return compose_bands(read_samples(file), bands, tags.get(ORIENTATION))
    if max(width, height) > SLIDE and count in (1, 3, 4):
        return read_level(file, width / height)
    if count > 4 or count == 2:
        raise ValueError(f"{count} bands: say which three with --bands")
    if bits == 16 and count > 2 and tags.get(PHOTOMETRIC, 2) in (1, 2) and tags.get(SAMPLEFORMAT, (1,))[0] == 1:
        has_alpha = tags.get(EXTRASAMPLES, (0,))[0] in (1, 2)
        samples = to_8_bits(np.moveaxis(read_samples(file), 0, -1), colours=3)[..., : 3 + has_alpha]
        return to_rgb(Image.fromarray(samples), tags.get(ORIENTATION))
    if bits > 16 and count > 1:
        raise ValueError(f"{count} bands of {bits} bits: say which three with --bands")
    return read_photo(file)


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


def read_level(file, shape):
    """Return a slide's largest page of at most 4096 px a side whose width / height is near `shape` (slides hold
    pictures of their labels too), else its first page, as uint8 [H, W, 3]."""
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
        return read_photo(file)
    opened.seek(levels[max(levels)])
    opened.load()
    return to_rgb(opened)


def compose_bands(planes, bands, orientation=None):
    """Return [C, H, W] of any type as uint8 [H, W, 3] of the bands, numbers from 1: three, or one as grey."""
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
    """Return a .npy of [H, W], [H, W, 3] or [C, H, W] as uint8 [H, W, 3]."""
    array = np.lib.format.read_array(file, allow_pickle=False)
    if array.ndim not in (2, 3) or array.dtype.kind not in "buif" or not array.size:
        raise ValueError(f"an array {list(array.shape)} of {array.dtype} is no picture")
    array = array * np.uint8(255) if array.dtype == bool else array
    if array.ndim == 3 and array.shape[2] in (1, 3):
        array = np.moveaxis(array, -1, 0)
    planes = array.reshape(-1, *array.shape[-2:])
    if bands:
        return compose_bands(planes, bands)
    planes = planes if planes.dtype == np.uint8 else stretch(planes)
    if len(planes) == 3:
        return np.ascontiguousarray(np.moveaxis(planes, 0, -1))
    return np.repeat(planes.reshape(-1, planes.shape[-1], 1), 3, axis=-1)


def read_dicom(file):
    """Return a DICOM file's first frame as uint8 [H, W, 3]."""
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
        return stored if stored.dtype == np.uint8 else to_8_bits(stored, colours=3)
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
    return np.repeat(grey[..., None], 3, axis=-1)


def resize(image, size):
    """Resize uint8 [H, W, 3] to [size, size, 3], bilinear, as albumentations' Resize in the thesis (3.1.1).

    An axis that shrinks to less than half is averaged first: bilinear would skip its pixels and keep their noise. The
    other axis waits for the second step, since INTER_AREA is no mean where an axis grows."""
    height, width = (size if side > 2 * size else side for side in image.shape[:2])
    if (height, width) != image.shape[:2]:
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
