"""Recall and false pairs of the near-duplicate search, kit/folds/duplicates.py.

    python tests/bench/duplicates.py             # 28 pieces of photos and 60 drawn products, four copies of each
    python tests/bench/duplicates.py --products 200
    python tests/bench/duplicates.py --photos DIR --sheets OUT       # and the pairs found among the photos of a folder

The pieces are cut from the photos that scikit-learn and matplotlib bring; the products are the demo's. A copy is turned
by a quarter or by any angle, sometimes mirrored, cropped to at least 60 % of the area, reduced to as little as half,
blurred, relit, and sometimes saved as JPEG. The rows "every pair" verify all pairs of images, so they show `verify`
alone; the rows "candidates" show the search as 00 runs it, on nearest-neighbour candidates.

The second table counts the pairs found where there are no duplicates: scikit-learn's 1,797 digits, enlarged from 8 px
in three ways, and the photos of --photos (JPEG and PNG, subfolders included), such as those of
github.com/alexeygrigorev/clothing-dataset-small. --sheets draws each of these pairs, to be checked by eye.
"""

import argparse
import importlib.util
import sys
from itertools import combinations
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import sklearn.datasets

ENLARGED = dict(nearest=cv2.INTER_NEAREST, linear=cv2.INTER_LINEAR, cubic=cv2.INTER_CUBIC)
ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from kit.folds import duplicates  # noqa: E402
from kit.report.pictures import contact_sheet  # noqa: E402


def photos():
    """Yield each photo that the dependencies bring, uint8 [H, W, 3] RGB."""
    for folder in (Path(sklearn.datasets.__file__).parent / "images", Path(matplotlib.get_data_path()) / "sample_data"):
        for path in sorted(folder.glob("*.jpg")):
            yield cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)


def pieces(count, rng, side=150):
    """Return `count` square pieces of the photos, `side` px before they are enlarged, no two of which overlap."""
    crops = []
    for image in photos():
        for y in range(0, image.shape[0] - side + 1, side):
            for x in range(0, image.shape[1] - side + 1, side):
                crops.append(np.ascontiguousarray(image[y : y + side, x : x + side]))
    order = rng.permutation(len(crops))[:count]
    return [cv2.resize(crops[i], (320, 320), interpolation=cv2.INTER_CUBIC) for i in order]


def drawn(count):
    """Return `count` products as the demo draws them, each another one."""
    spec = importlib.util.spec_from_file_location("make_demo", ROOT / "input" / "make_demo.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    return [demo.photo(np.random.default_rng([1, i]), i % 2) for i in range(count)]


def digits(size, enlarge=cv2.INTER_LINEAR):
    """Yield each of scikit-learn's handwritten digits, uint8 [size, size, 3]; no two are duplicates."""
    for digit in sklearn.datasets.load_digits().images:
        image = cv2.resize((digit * 255 / 16).astype(np.uint8), (size, size), interpolation=enlarge)
        yield cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)


def photos_in(folder):
    """Yield each photo in the folder, uint8 [H, W, 3] RGB."""
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png")):
        yield cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)


def copy_of(image, rng):
    """Return a copy of a square photo, changed as the module's docstring says."""
    side = len(image)
    angle = 90 * rng.integers(4) if rng.random() < 0.5 else rng.uniform(0, 360)
    kept = np.sqrt(rng.uniform(0.6, 1.0))  # share of the side, so 60 to 100 % of the area
    size = int(side * kept * rng.uniform(0.5, 1.0))
    matrix = cv2.getRotationMatrix2D((side / 2, side / 2), angle, size / side / kept)
    slack = (1 - kept) * side / 2 * size / side / kept
    matrix[:, 2] += size / 2 - side / 2 + rng.uniform(-slack, slack, 2)
    out = cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REFLECT_101)
    if rng.random() < 0.3:
        out = out[:, ::-1]
    if rng.random() < 0.5:
        out = cv2.GaussianBlur(out, (0, 0), rng.uniform(0.5, 1.5))
    out = out.astype(np.float32) * rng.uniform(0.75, 1.25) * rng.uniform(0.93, 1.07, 3) + rng.uniform(-15, 15)
    out = np.clip(out, 0, 255).astype(np.uint8)
    if rng.random() < 0.5:
        jpeg = cv2.imencode(".jpg", out, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(50, 95))])[1]
        out = cv2.imdecode(jpeg, cv2.IMREAD_COLOR)
    return np.ascontiguousarray(out)


def with_copies(sources, count, rng):
    """Return each source followed by `count` copies of it, and the source of each image, int [N]."""
    images = [image for source in sources for image in (source, *(copy_of(source, rng) for _ in range(count)))]
    return images, np.repeat(np.arange(len(sources)), count + 1)


def candidates(records):
    """Return the candidate pairs by the DCT, and by words and colours."""
    vectors = np.empty((len(records), duplicates.VECTOR), np.float32)
    duplicates.words_and_colours(records, vectors)
    return duplicates.candidate_pairs(records, vectors)


def measure(name, sources, count, rng):
    """Return the first table's two rows on `sources` with `count` copies each."""
    images, source = with_copies(sources, count, rng)
    records = np.stack([duplicates.image_record(image) for image in images])
    every_pair = np.array(list(combinations(range(len(images)), 2)))
    return [
        f"{name:8} {kind:11} {len(images):7} {scores(records, source, every_pair, pairs)}"
        for kind, pairs in (("every pair", every_pair), ("candidates", candidates(records)))
    ]


def scores(records, source, every_pair, pairs):
    """Return a row's figures on the candidates `pairs`; source: that of each image, int [N]."""
    same = source[every_pair[:, 0]] == source[every_pair[:, 1]]
    positives, negatives = same.sum(), (~same).sum()
    proposed = (source[pairs[:, 0]] == source[pairs[:, 1]]).sum()
    accepted, _ = duplicates.verified_pairs(records, pairs)
    right = source[accepted[:, 0]] == source[accepted[:, 1]]
    groups = duplicates.components(accepted, len(records))
    together = groups[every_pair[:, 0]] == groups[every_pair[:, 1]]
    return (
        f"{proposed / positives:10.3f} {right.sum() / positives:9.3f} {(~right).sum():5} of {negatives:<8} "
        f"{(together & same).sum() / positives:12.3f} {(together & ~same).sum() / negatives * 1e4:10.2f}"
    )


def false_pairs(name, images, sheets=None):
    """Return the second table's row on images without duplicates. Draw the pairs to the folder `sheets`, if any."""
    records = np.stack([duplicates.image_record(image) for image in images])
    pairs, evidence = duplicates.verified_pairs(records, candidates(records))
    if sheets and len(pairs):
        thumbs = [duplicates.thumbnail(record) for record in records]
        captioned = [cell for pair, row in zip(pairs, evidence, strict=True) for cell in captions(pair, row)]
        cells = [(thumbs[i], text) for i, text in captioned]
        sheets.mkdir(parents=True, exist_ok=True)
        rows = [("", cells[k : k + 8]) for k in range(0, len(cells), 8)]
        contact_sheet(rows, 8).save(sheets / f"{name}.png")
    by_features, every = (evidence[:, 1] > 0).sum(), len(records) * (len(records) - 1) / 2
    figures = f"{by_features:11} {len(pairs) - by_features:8} {len(pairs) / every * 1e5:13.2f}"
    return f"{name:20} {len(records):6} {len(pairs):13} {figures}"


def captions(pair, evidence):
    """Return both images of a pair, each with its caption."""
    bits, inliers, correlation = evidence
    found_by = f"{inliers:.0f} features" if inliers else f"{bits:.0f} bits"
    return (pair[0], f"{pair[0]} = {pair[1]}"), (pair[1], f"{found_by}, {correlation:.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", type=int, default=28, help="pieces of photos")
    parser.add_argument("--products", type=int, default=60, help="drawn products")
    parser.add_argument("--copies", type=int, default=4, help="copies of each piece and product")
    parser.add_argument("--photos", type=Path, metavar="DIR", help="a folder of photos without duplicates")
    parser.add_argument("--sheets", type=Path, metavar="OUT", help="write contact sheets of the second table's pairs")
    args = parser.parse_args()
    print("                              candidates     pairs       false            in one group:  false pairs")
    print("source   pairs        images      recall    recall       pairs              pair recall   per 10,000")
    for name, sources in (("photos", pieces(args.pieces, np.random.default_rng(1))), ("drawn", drawn(args.products))):
        for row in measure(name, sources, args.copies, np.random.default_rng(2)):
            print(row, flush=True)
    print("\nno duplicates        images   pairs found   by features  by hash   per 100,000")
    for size in (8, 16, 28, 56, 112):
        for way, enlarge in ENLARGED.items() if size > 8 else [("as they are", cv2.INTER_LINEAR)]:
            print(false_pairs(f"digits {size} {way}", digits(size, enlarge), args.sheets), flush=True)
    if args.photos:
        print(false_pairs(args.photos.name, photos_in(args.photos), args.sheets))


if __name__ == "__main__":
    main()
