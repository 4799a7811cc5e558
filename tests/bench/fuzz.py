"""Fuzzing of the readers of images, archives and tables: tracebacks, hangs and crashes on damaged files.

    python tests/bench/fuzz.py --seconds 60                      # 60 seconds for each of the three kinds

Images are small files of each format with bytes changed, cut out, doubled or cut off; archives are zips damaged in the
same way; tables are hypothesis' random CSVs. Each input must be read, or refused with the error that the kit prints as
one line, within 10 seconds. The bench prints how many inputs were read and refused.
"""

import argparse
import contextlib
import io
import random
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from common import UserError

from kit.data import labels, tables
from kit.data.decode import read_picture
from kit.data.image_source import ImageSource
from kit.data.prepared import Flags
from kit.score.tasks import Classes
from kit.submit.sample_submission import read_sample, read_sample_cells


def image_files():
    """Return small valid files of each format and mode, a list of bytes."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 255, (12, 15, 3)).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    grey16 = Image.fromarray(rng.integers(0, 65535, (9, 9)).astype(np.uint16))
    kinds = [(colour, name, {}) for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")]
    kinds += [(colour, "JPEG", dict(progressive=True, exif=exif)), (colour.convert("CMYK"), "JPEG", {})]
    kinds += [(colour.convert("P"), "PNG", {}), (colour.convert("RGBA"), "PNG", {}), (grey16, "PNG", {})]
    kinds += [(grey16, "TIFF", {}), (colour, "TIFF", dict(compression="tiff_lzw"))]
    kinds += [(colour.convert("1"), "TIFF", dict(compression="group4")), (colour, "PNG", dict(exif=exif))]
    kinds += [(colour, "GIF", dict(save_all=True, append_images=[colour.rotate(90)]))]
    files = []
    for image, name, options in kinds:
        data = io.BytesIO()
        image.save(data, name, **options)
        files.append(data.getvalue())
    return files


def mutated(data, rng):
    """Return the bytes with one to 20 random changes."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        i, n = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 30))
        change = rng.randrange(5)
        if change == 0:
            data[i : i + n] = rng.randbytes(n)
        elif change == 1:
            del data[i : i + n]
        elif change == 2:
            data[i:i] = data[i : i + n]
        elif change == 3:
            data[i : i + n] = rng.choice((b"\x00", b"\xff", b"\x7f", b"\x80")) * n
        else:
            del data[rng.randrange(len(data) // 2, len(data) + 1) :]
        if not data:
            break
    return bytes(data)


def fuzz_images(until, rng, outcomes):
    files = image_files()
    while time.monotonic() < until:
        data = mutated(rng.choice(files), rng)
        with in_time(data):
            try:
                array = read_picture(data).pixels
                assert array.dtype == np.uint8
                assert array.ndim == 3
                outcomes["images read"] += 1
            except ValueError:
                outcomes["images refused"] += 1


def fuzz_archives(until, rng, outcomes):
    files, names = image_files(), ["train/a.png", "../b.jpg", "C:\\c.gif", "/d.png", "あ.png", "e e.tif", "f.webp"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.zip"
        while time.monotonic() < until:
            with zipfile.ZipFile(path, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
                for name in rng.sample(names, rng.randrange(len(names))):
                    archive.writestr(name, rng.choice(files))
            if rng.random() < 0.8:
                path.write_bytes(mutated(path.read_bytes(), rng))
            with in_time(path.read_bytes()):
                try:
                    source = ImageSource(path)
                    for name in names:
                        key = source.find(name)
                        if key:
                            source.picture(key, salvage=rng.random() < 0.5)
                    outcomes["archives read"] += 1
                except (UserError, ValueError):
                    outcomes["archives refused"] += 1
            assert [file.name for file in Path(folder).iterdir()] == ["train.zip"], "something was unpacked"


def fuzz_tables(seconds, outcomes):
    cells = st.one_of(st.text(max_size=8), st.sampled_from(["a.png", "b.png", "0", "1", "nan", "NA", '"', "0001", ""]))
    rows = st.lists(st.lists(cells, max_size=4), max_size=12)
    header = st.sampled_from(["image_name,label\n", "image_name;label\n", "label,image_name\r\n", ""])
    coded = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "cp932"])
    text = st.builds(lambda h, r, e: (h + "\n".join(map(",".join, r))).encode(e, "replace"), header, rows, coded)
    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.csv"
        for name in ("a.png", "b.png"):
            Path(folder, name).write_bytes(image_files()[0])
        source = ImageSource(folder)

        def read_as_labels():
            cells = read_sample_cells(path, source, None, Flags())
            labels.read_labels(tables.read_table(path, ""), source, cells, Flags())

        def read_as_sample(classes):
            cells = read_sample_cells(path, source, None, Flags())
            read_sample(cells, source, Classes(classes), None, Flags())

        @settings(max_examples=500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.one_of(text, st.binary(max_size=60)))
        def read(data):
            path.write_bytes(data)
            samples = [partial(read_as_sample, classes) for classes in (["0", "1"], ["a", "b"])]
            for reader in (read_as_labels, *samples):
                with in_time(data), contextlib.redirect_stdout(io.StringIO()):
                    try:
                        reader()
                        outcomes["tables read"] += 1
                    except UserError:
                        outcomes["tables refused"] += 1

        while time.monotonic() < until:
            read()


@contextlib.contextmanager
def in_time(data):
    """Raise an error after 10 CPU seconds or 60 seconds by the clock. Print the input of an unexpected error.

    A busy machine stretches the clock, hence the longer limit."""
    signal.setitimer(signal.ITIMER_PROF, 10)
    signal.alarm(60)
    try:
        yield
    except BaseException as error:
        print(f"{type(error).__name__} from {data!r}", file=sys.stderr)
        raise
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="seconds for each kind of input")
    parser.add_argument("--seed", type=int, default=0, help="seed of the damaged images and archives")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # Pillow's about odd EXIF data
    rng, outcomes = random.Random(args.seed), Counter()
    fuzz_images(time.monotonic() + args.seconds, rng, outcomes)
    fuzz_archives(time.monotonic() + args.seconds, rng, outcomes)
    fuzz_tables(args.seconds, outcomes)
    print(", ".join(f"{count} {name}" for name, count in sorted(outcomes.items())))


if __name__ == "__main__":
    main()
