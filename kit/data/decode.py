"""What the bytes of an image file show: photos, TIFFs of any bands or pages, DICOM, NumPy arrays → 8-bit RGB."""

import io
import struct
import zlib

import cv2
import numpy as np
from PIL import Image, ImageOps, JpegImagePlugin, TiffImagePlugin, UnidentifiedImageError

from common import UserError
from kit.data.tiffs import BANDS, BITS, COLOURS, EXTRA, HEIGHT, KIND, ORIENTATION, WIDTH, read_page, tiff_samples

Image.init()  # knows all its formats from here on; of these, none that starts a program (EPS) or needs another file


FORMATS = [name for name in "PNG JPEG WEBP AVIF GIF BMP TIFF PPM".split() if name in Image.OPEN]
TIFFS = b"II*\0", b"MM\0*", b"II+\0"  # the last is BigTIFF
SLIDE, LEVEL = 8192, 4096  # px: a TIFF page that is wider is a slide, of which a level of at most this size is read
PNG = b"\x89PNG\r\n\x1a\n"
LEFT_OUT = b"tRNS", b"eXIf", b"acTL", b"iCCP"  # chunks of PNGs that aren't plain
TURNING = b"XML:com.adobe.xmp", b"Raw profile"  # how texts begin that may say how the image is turned
MOST_PAGES = 100  # of a slide that are looked at
MOST_JPEG = 2**30  # px of a JPEG that is read at an eighth of its size


def decode(data, bands=None):
    """The bytes of an image file, or the file opened for reading → uint8 [H, W, 3] RGB, as a person sees it.

    EXIF rotation is applied, palettes and CMYK are converted, transparent parts stand on white, an animation shows its
    first frame. 16-bit grey and RGB are scaled to 8 bits by the depth that they use. What the bytes are, their
    beginning says, not the file's name:

    - of a TIFF and a .npy, `bands` (4, 3, 2) become R, G, B, and one band grey. They count from 1, and each is spread
      between its 2nd and 98th percentile in this image. Other kinds have no use for `bands`. Without it, a TIFF of
      more than 4 bands or of floating-point values is refused.
    - of a slide (a TIFF wider than 8192 px), its largest level of at most 4096 px a side is read, and of a JPEG too
      large for Pillow an eighth of its size.
    - .npy: [H, W] is grey, [H, W, 3] and [3, H, W] are RGB. Of other [C, H, W], the channels lie one below the other
      in a grey picture [C * H, W]. Values other than uint8 are spread between the percentiles of the whole array.
    - DICOM: the first frame through its window or VOI LUT; without these, between its least and greatest value.

    Raises ValueError for what is no image, is truncated, or can't be shown; UserError where DICOM lacks pydicom.
    Plain PNGs are read by OpenCV, other photos by Pillow: OpenCV drops transparency and accepts truncated JPEGs."""
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    head = file.read(132)
    file.seek(0)
    try:
        if head[128:] == b"DICM":
            return dicom(file)
        if head.startswith((b"\x93NUMPY", *TIFFS)):
            return (tiff if head[:4] in TIFFS else numpy_array)(file, bands)
        return photo(file)
    except UserError:
        raise
    except UnidentifiedImageError:
        raise ValueError("no image" if head else "empty file") from None
    except Exception as error:  # whatever damaged bytes make of the readers: a dozen kinds, as fuzzing shows
        reason = " ".join(str(error).split())  # pydicom's has several lines
        raise ValueError(reason[:300] or type(error).__name__) from None


def photo(file):
    """What Pillow opens → uint8 [H, W, 3]."""
    begins = file.read(len(PNG))
    file.seek(0)
    data = file.read() if begins == PNG else b""  # others may be large, and Pillow reads what it needs
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
        opened = small_jpeg(file)
    return shown(sixteen_bits(opened, file))


def is_plain_png(data):
    """Whether the bytes are a whole PNG of 8-bit grey or RGB, upright, without transparency, animation, XMP (which may
    turn it) and colour profile (about which libpng prints warnings).

    OpenCV gives the same pixels of those in one call, during which other threads work. Pillow goes from chunk to chunk,
    and its threads wait for each other."""
    if not data.startswith(PNG) or len(data) < 33 or data[24] != 8 or data[25] not in (0, 2):
        return False
    width, height = struct.unpack(">II", data[16:24])
    place, kind, view = len(PNG), b"", memoryview(data)
    while kind != b"IEND" and place + 12 <= len(data):
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        end = place + 8 + length
        if kind in LEFT_OUT or data.startswith(TURNING, place + 8):
            return False
        if zlib.crc32(view[place + 4 : end]).to_bytes(4) != data[end : end + 4]:
            return False
        place = end + 4
    return kind == b"IEND" and width * height <= Image.MAX_IMAGE_PIXELS


def small_jpeg(file):
    """A JPEG too large to be decoded whole → the same at an eighth of its size, which costs little memory where one
    scan holds everything. Raises ValueError for a larger one, and for several scans: they're kept in memory."""
    file.seek(0)
    opened = JpegImagePlugin.JpegImageFile(file)  # Image.open would refuse it
    size, scan = opened.size, file.read(3)
    opened.draft("RGB", (1, 1))
    if size[0] * size[1] > MOST_JPEG or "progressive" in opened.info or scan[-1] < opened.layers:
        raise ValueError(f"{size[0]} × {size[1]} px: make it smaller")
    opened.load()
    return opened


def sixteen_bits(image, file):
    """A Pillow image of 16-bit RGB keeps only its upper bytes: where its `file` is such a PNG, OpenCV reads it again.
    → the image, of 8 bits then."""
    file.seek(0)
    head = file.read(26)
    if not (head[:4] == b"\x89PNG" and head[24] == 16 and head[25] in (2, 4, 6)) or "transparency" in image.info:
        return image
    file.seek(0)
    samples = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED)
    if samples is None or samples.dtype != np.uint16:
        return image
    order = [2, 1, 0, 3][: samples.shape[2]]  # OpenCV has BGR
    return rotated(eight_bits(samples[..., order], colours=3), image.getexif().get(ORIENTATION))


def rotated(samples, orientation):
    """uint8 [H, W, 3 or 4] → a Pillow image that says that it's rotated."""
    image = Image.fromarray(samples)
    if orientation:
        image.getexif()[ORIENTATION] = orientation
    return image


def eight_bits(samples, colours):
    """uint16 [H, W, C] → uint8: `colours` of the channels by the depth that they use together, alpha by 16 bits."""
    most = samples[..., :colours].max()
    depth = next(bits for bits in (8, 10, 12, 14, 16) if most < 2**bits)  # as cameras store
    shifts = [depth - 8] * colours + [8] * (samples.shape[-1] - colours)
    return (samples >> np.array(shifts, np.uint16)).astype(np.uint8)


def shown(image):
    """A Pillow image of any mode → uint8 [H, W, 3], upright."""
    ImageOps.exif_transpose(image, in_place=True)  # by default it copies what lies upright too
    if image.mode.startswith("I"):  # 16-bit grey
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("32-bit values: say which bands with --bands")
        image = Image.fromarray(eight_bits(grey.astype(np.uint16)[..., None], colours=1)[..., 0])
    elif image.mode == "F":
        raise ValueError("floating-point values: say which bands with --bands")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def tiff(file, bands):
    """A TIFF → uint8 [H, W, 3]."""
    page = read_page(file)
    if not (page.get(WIDTH) and page.get(HEIGHT)):
        return photo(file)  # which says what is wrong
    count, bits = page.get(BANDS, 1), page.get(BITS, (1,))
    if max(page[WIDTH], page[HEIGHT]) > SLIDE and not bands and count in (1, 3, 4):
        return slide(file, page)
    if bands:
        return chosen(np.moveaxis(tiff_samples(file, page), -1, 0), bands, upright=page.get(ORIENTATION))
    if count > 4 or count == 2:
        raise ValueError(f"{count} bands: say which three with --bands")
    if bits[0] == 16 and count > 2 and page.get(COLOURS, 2) in (1, 2) and page.get(KIND, (1,))[0] == 1:
        has_alpha = page.get(EXTRA, (0,))[0] in (1, 2)
        samples = eight_bits(tiff_samples(file, page), colours=3)[..., : 3 + has_alpha]
        return shown(rotated(samples, page.get(ORIENTATION)))
    if bits[0] > 16 and count > 1:
        raise ValueError(f"{count} bands of {bits[0]} bits: say which three with --bands")
    return photo(file)


def slide(file, first):
    """A TIFF whose `first` page is too large → its largest page of at most 4096 px a side that shows the whole of it
    (slides hold pictures of their labels too). Raises ValueError where there is none."""
    opened = TiffImagePlugin.TiffImageFile(file)  # Image.open would refuse it for its first page
    shape, best = first[WIDTH] / first[HEIGHT], None
    for number in range(1, MOST_PAGES):
        try:
            opened.seek(number)
        except EOFError:
            break
        width, height = opened.size
        alike = abs(width / height / shape - 1) < 0.05
        if max(width, height) <= LEVEL and alike and (best is None or width > best[0]):
            best = width, number
    if best is None:
        file.seek(0)
        return photo(file)
    opened.seek(best[1])
    opened.load()
    return shown(opened)


def chosen(planes, bands, upright=None):
    """[C, H, W] of any type → uint8 [H, W, 3] of the bands, numbers from 1: three, or one that becomes grey."""
    if lacking := [band for band in bands if not 1 <= band <= len(planes)]:
        raise ValueError(f"no band {lacking[0]}: it has {len(planes)}")
    picture = np.stack([spread(planes[band - 1]) for band in bands], axis=-1)
    return shown(rotated(np.repeat(picture, 3 // len(bands), axis=-1), upright))


def spread(values, low=None, high=None):
    """Numbers of any shape and type → uint8: `low` becomes 0 and `high` 255, by default the 2nd and 98th percentile.
    What isn't finite becomes 0."""
    values = np.asarray(values, np.float64)
    finite = np.isfinite(values)
    if low is None:
        low, high = np.percentile(values[finite], (2, 98)) if finite.any() else (0, 1)
    scaled = (np.where(finite, values, low) - low) * (255 / (high - low) if high > low else 0)
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def numpy_array(file, bands):
    """A .npy of [H, W], [H, W, 3] or [C, H, W] → uint8 [H, W, 3]."""
    array = np.lib.format.read_array(file, allow_pickle=False)
    if array.ndim not in (2, 3) or array.dtype.kind not in "buif" or not array.size:
        raise ValueError(f"an array {list(array.shape)} of {array.dtype} is no picture")
    array = array * np.uint8(255) if array.dtype == bool else array
    if array.ndim == 3 and (array.shape[2] == 3 or array.shape[2] == 1):
        array = np.moveaxis(array, -1, 0)
    planes = array.reshape(-1, *array.shape[-2:])
    if bands:
        return chosen(planes, bands)
    planes = planes if planes.dtype == np.uint8 else spread(planes)
    if len(planes) == 3:
        return np.ascontiguousarray(np.moveaxis(planes, 0, -1))
    return np.repeat(planes.reshape(-1, planes.shape[-1], 1), 3, axis=-1)


def dicom(file):
    """A DICOM file's first frame → uint8 [H, W, 3]."""
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
        return stored if stored.dtype == np.uint8 else eight_bits(stored, colours=3)
    if tags.get("WindowWidth") is None or tags.get("WindowCenter") is None:  # there, but empty
        tags.pop("WindowWidth", None)
    values = pixels.apply_modality_lut(stored, tags)  # slope and intercept
    low, high = values.min(), values.max()
    if tags.get("VOILUTSequence"):
        low, high = 0, 2 ** tags.VOILUTSequence[0].LUTDescriptor[2] - 1
    elif "WindowWidth" in tags:  # what the window makes of values on either side of it, there or not
        with np.errstate(over="ignore"):
            low, high = pixels.apply_voi_lut(np.array([-1e9, 1e9]), tags)
    grey = spread(pixels.apply_voi_lut(values, tags), low, high)
    grey = 255 - grey if tags.PhotometricInterpretation == "MONOCHROME1" else grey
    return np.repeat(grey[..., None], 3, axis=-1)


END_OF_JPEG = b"\xff\xd9"  # after it libjpeg leaves the rows that it lacks grey
IMAGE_ENDINGS = (*".png .jpg .jpeg .webp .avif .gif .bmp .tif .tiff .ppm .pgm".split(), ".dcm", ".dicom", ".npy")


def resize(image, size):
    """uint8 [H, W, 3] → [size, size, 3], bilinear, as albumentations' Resize in the thesis (3.1.1).

    An axis that shrinks to less than half is averaged first: bilinear would skip its pixels and keep their noise. The
    other axis waits for the second step, since INTER_AREA is no mean once an axis grows."""
    height, width = (size if side > 2 * size else side for side in image.shape[:2])
    if (height, width) != image.shape[:2]:
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
