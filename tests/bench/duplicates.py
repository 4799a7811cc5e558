"""How many copies of one photo does kit/folds/duplicates.py find, and how many strangers does it join?

    python tests/bench/copies.py                 # the table of docs/measured.md: 28 pieces of photos, 60 drawn products
    python tests/bench/copies.py --products 200
    python tests/bench/copies.py --photos DIR --sheets OUT       # and the pairs joined among the photos of a folder

Real photos: pieces of those that scikit-learn and matplotlib bring. Drawn: the demo's products. Of each, the piece and
four copies: turned by a quarter or by any angle, mirrored at times, cropped to at least 60 % of the area, reduced to as
little as half, blurred, relit, JPEG at times. Every pair of images is a candidate in the first columns, so that they
judge `verify` alone; the last columns judge the whole way, with nearest-neighbour candidates and connected components.

Then the pairs joined where there are no copies: scikit-learn's 1,797 digits, enlarged from 8 px in three ways, and the
photos of --photos (JPEG and PNG, subfolders too). Those of docs/measured.md come from
github.com/alexeygrigorev/clothing-dataset-small, at 176 px. --sheets draws every joined pair: look at them.
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
    """uint8 [H, W, 3] RGB of every real photo that the dependencies bring."""
    for folder in (Path(sklearn.datasets.__file__).parent / "images", Path(matplotlib.get_data_path()) / "sample_data"):
        for path in sorted(folder.glob("*.jpg")):
            yield cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)


def pieces(count, rng, side=150):
    """`count` square pieces of the photos, no two overlapping, the side between `side` and what is left of the grid."""
    found = []
    for image in photos():
        for y in range(0, image.shape[0] - side + 1, side):
            for x in range(0, image.shape[1] - side + 1, side):
                found.append(np.ascontiguousarray(image[y : y + side, x : x + side]))
    order = rng.permutation(len(found))[:count]
    return [cv2.resize(found[i], (320, 320), interpolation=cv2.INTER_CUBIC) for i in order]


def drawn(count):
    spec = importlib.util.spec_from_file_location("make_demo", ROOT / "input" / "make_demo.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    return [demo.photo(np.random.default_rng([1, i]), i % 2) for i in range(count)]


def digits(size, enlarge=cv2.INTER_LINEAR):
    """uint8 [size, size, 3] of each of scikit-learn's handwritten digits, no two of which are copies."""
    for digit in sklearn.datasets.load_digits().images:
        image = cv2.resize((digit * 255 / 16).astype(np.uint8), (size, size), interpolation=enlarge)
        yield cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)


def photos_in(folder):
    """uint8 [H, W, 3] RGB of each photo in the folder."""
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png")):
        yield cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)


def copy_of(image, rng):
    """One copy of a square photo, as the module's docstring says."""
    side = len(image)
    angle = 90 * rng.integers(4) if rng.random() < 0.5 else rng.uniform(0, 360)
    kept = np.sqrt(rng.uniform(0.6, 1.0))  # of the side, so 60 to 100 % of the area
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
    """→ (each source followed by `count` copies of it, int [N]: the source of each image)."""
    images = [image for source in sources for image in (source, *(copy_of(source, rng) for _ in range(count)))]
    return images, np.repeat(np.arange(len(sources)), count + 1)


def measure(name, sources, count, rng):
    """→ the table's two rows on `sources` with `count` copies each."""
    images, truth = with_copies(sources, count, rng)
    records = np.stack([duplicates.describe(image) for image in images])
    everything = np.array(list(combinations(range(len(images)), 2)))
    return [
        f"{name:8} {kind:11} {len(images):7} {judge(records, truth, everything, pairs)}"
        for kind, pairs in (("every pair", everything), ("candidates", duplicates.candidates(records)))
    ]


def judge(records, truth, everything, pairs):
    """→ a row's figures: how `pairs` are judged, against the source of each image, `truth`."""
    is_kin = truth[everything[:, 0]] == truth[everything[:, 1]]
    kin, strangers = is_kin.sum(), (~is_kin).sum()
    proposed = (truth[pairs[:, 0]] == truth[pairs[:, 1]]).sum()
    joined, _ = duplicates.relatives(records, pairs)
    right = truth[joined[:, 0]] == truth[joined[:, 1]]
    groups = duplicates.components(joined, len(records))
    together = groups[everything[:, 0]] == groups[everything[:, 1]]
    return (
        f"{proposed / kin:10.3f} {right.sum() / kin:9.3f} {(~right).sum():5} of {strangers:<8} "
        f"{(together & is_kin).sum() / kin:12.3f} {(together & ~is_kin).sum() / strangers * 1e4:10.2f}"
    )


def joined(name, images, sheets=None):
    """→ a row on the pairs that the whole way joins. Draws them to the folder `sheets`, if any."""
    records = np.stack([duplicates.describe(image) for image in images])
    pairs, evidence = duplicates.relatives(records, duplicates.candidates(records))
    if sheets and len(pairs):
        thumbs = [record["thumb"][*map(slice, record["shape"])] for record in records]
        cells = [(thumbs[i], text) for pair, seen in zip(pairs, evidence, strict=True) for i, text in said(pair, seen)]
        sheets.mkdir(parents=True, exist_ok=True)
        contact_sheet(sheets / f"{name}.png", [("", cells[k : k + 8]) for k in range(0, len(cells), 8)], 8)
    by_features, every = (evidence[:, 1] > 0).sum(), len(records) * (len(records) - 1) / 2
    figures = f"{by_features:11} {len(pairs) - by_features:8} {len(pairs) / every * 1e5:13.2f}"
    return f"{name:20} {len(records):6} {len(pairs):13} {figures}"


def said(pair, evidence):
    """→ both images of a pair, each with its caption."""
    bits, inliers, correlation = evidence
    found_by = f"{inliers:.0f} features" if inliers else f"{bits:.0f} bits"
    return (pair[0], f"{pair[0]} = {pair[1]}"), (pair[1], f"{found_by}, {correlation:.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", type=int, default=28)
    parser.add_argument("--products", type=int, default=60)
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--photos", type=Path, metavar="DIR", help="a folder of photos, such as that of the docstring")
    parser.add_argument("--sheets", type=Path, metavar="OUT", help="a folder for contact sheets of the joined pairs")
    args = parser.parse_args()
    print("                                  proposed    pairs      strangers          grouped:   strangers")
    print("source   judged       images    relatives    found      joined             pair recall  per 10,000")
    for name, sources in (("photos", pieces(args.pieces, np.random.default_rng(1))), ("drawn", drawn(args.products))):
        for row in measure(name, sources, args.copies, np.random.default_rng(2)):
            print(row, flush=True)
    print("\nno copies            images  pairs joined   by features  by hash   per 100,000")
    for size in (8, 16, 28, 56, 112):
        for way, enlarge in ENLARGED.items() if size > 8 else [("as they are", cv2.INTER_LINEAR)]:
            print(joined(f"digits {size} {way}", digits(size, enlarge), args.sheets), flush=True)
    if args.photos:
        print(joined(args.photos.name, photos_in(args.photos), args.sheets))


if __name__ == "__main__":
    main()
