"""A drawn competition of food and drink packages, in files like SIGNATE's.

    python input/make_demo.py                          # → input/demo/
    python input/make_demo.py --folder /tmp/demo1 --seed 1 --products 60 --test-products 40 --side 64

Writes train.csv, train.zip, test.zip and sample_submit.csv, and what a real competition keeps secret: solution.csv
(image_name, label, usage Public or Private) and sources.csv (image_name, source: the product that an image shows).
Label 0 is a drink, 1 a food; 46 % are drinks, as in the thesis' contest. As there, one photo of a product becomes
several images, its duplicates: rotated, cropped, downscaled, blurred and relit. The test set shows other products than
the training set, so a model that remembers prints and colours scores high on duplicates of images that it has seen, and
low on the leaderboard. Only the outline generalises to new products.
"""

import argparse
import io
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np

SIDE = 320  # px of a product's photo, from which its images are cut
SHARE_OF_DRINKS, PUBLIC_SHARE = 0.46, 0.5
WIDTHS = (0.9, 1.25), (0.75, 1.0)  # drinks, foods: they overlap, so that the outline decides and not the width
SYLLABLES = "ka ri mo to su na fu lo bel da vi go mi ra chi pon ze ya ten oka nor lux sol cre".split()
GOODS = "TEA COLA MILK SODA JUICE WATER COFFEE LEMON", "CHIPS RICE SOUP CURRY BEANS SNACK JAM PASTA"
KINDS = ("bottle", "can", "carton", "cup"), ("bag", "box", "tray", "jar")  # methods of Package


def colour(rng, saturation=(90, 255), value=(110, 255)):
    """Draw a random RGB colour: a tuple of three ints."""
    hsv = np.uint8([[[rng.integers(180), rng.integers(*saturation), rng.integers(*value)]]])
    return tuple(int(c) for c in cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0])


def times(rgb, factor):
    return tuple(int(c * factor) for c in rgb)


def rounded(w, h, r, y):
    """Return the points of a rectangle of 2w × 2h about (0.5, y), with corners of radius r, upper right first."""
    corner = [(r * np.cos(a), r * np.sin(a)) for a in np.linspace(0, np.pi / 2, 8)]
    turns = [(1, -1, corner[::-1]), (1, 1, corner), (-1, 1, corner[::-1]), (-1, -1, corner)]
    return [(0.5 + sx * (w - r + dx), y + sy * (h - r + dy)) for sx, sy, part in turns for dx, dy in part]


class Package:
    """An RGB layer and its mask; x and y go from 0 to 1. A method for each kind: drinks are tall, foods are broad."""

    def __init__(self, rng, brand, good):
        self.rng, self.brand, self.good = rng, brand, good
        self.rgb, self.mask = np.zeros((SIDE, SIDE, 3), np.uint8), np.zeros((SIDE, SIDE), np.uint8)

    def polygon(self, points, fill, outline=True):
        corners = np.round(np.array(points) * SIDE * 16).astype(np.int32)
        cv2.fillPoly(self.rgb, [corners], fill, cv2.LINE_AA, 4)
        cv2.fillPoly(self.mask, [corners], 255, cv2.LINE_AA, 4)
        if outline:
            cv2.polylines(self.rgb, [corners], True, times(fill, 0.45), 2, cv2.LINE_AA, 4)

    def rectangle(self, x0, y0, x1, y1, fill, outline=True):
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill, outline)

    def ellipse(self, x, y, rx, ry, fill, outline=True):
        angles = np.linspace(0, 2 * np.pi, 49)[:-1]
        self.polygon(np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], 1), fill, outline)

    def shade(self, strength):
        """Darken the layer towards its left and right edges, as on a round body."""
        columns = np.flatnonzero(self.mask.any(0))
        across = np.clip((np.arange(SIDE) - columns[0]) / max(1, columns[-1] - columns[0]), 0, 1)
        factor = 1 + strength * (0.25 - (across - 0.4) ** 2 * 2.2)
        self.rgb = np.clip(self.rgb * factor[None, :, None], 0, 255).astype(np.uint8)

    def write(self, text, x, y, width, fill):
        """Write `text` centred on (x, y), `width` wide."""
        (w, h), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_DUPLEX, 1, 2)
        scale = width * SIDE / w
        at, thick = (int(x * SIDE - w * scale / 2), int(y * SIDE + h * scale / 2)), max(1, round(scale * 2))
        cv2.putText(self.rgb, text, at, cv2.FONT_HERSHEY_DUPLEX, scale, fill, thick, cv2.LINE_AA)

    def label(self, x0, y0, x1, y1):
        """Draw the printed part: a panel with a picture, the brand and the contents."""
        rng, panel, ink = self.rng, colour(self.rng), colour(self.rng, value=(20, 90))
        if rng.random() < 0.5:
            panel, ink = (245, 243, 235), colour(rng, value=(60, 160))
        self.rectangle(x0, y0, x1, y1, panel, outline=False)
        x, width, height = (x0 + x1) / 2, x1 - x0, y1 - y0
        self.write(self.brand, x, y0 + 0.22 * height, 0.8 * width, ink)
        self.write(self.good, x, y0 + 0.85 * height, 0.6 * width, ink)
        radius = min(width, height) * rng.uniform(0.12, 0.2)
        for _ in range(rng.integers(1, 4)):
            middle = x + rng.uniform(-0.25, 0.25) * width, y0 + 0.52 * height
            self.ellipse(*middle, radius, radius, colour(rng), outline=False)

    def bottle(self, rng):
        body, cap = colour(rng), colour(rng)
        w, top, shoulder = rng.uniform(0.11, 0.15), rng.uniform(0.08, 0.14), rng.uniform(0.3, 0.4)
        neck = w * rng.uniform(0.3, 0.42)
        x = 0.5 + neck + (w - neck) * (1 - np.cos(np.linspace(0, np.pi, 12))) / 2
        flank = zip(x, np.linspace(top + 0.1, shoulder, 12), strict=True)
        half = [(0.5 + neck, top), *flank, (0.5 + w, 0.88), (0.48 + w, 0.92)]
        self.polygon([*half, *((1 - x, y) for x, y in half[::-1])], body)
        self.label(0.5 - w, shoulder + 0.08, 0.5 + w, 0.78)
        self.rectangle(0.488 - neck, top - 0.03, 0.512 + neck, top + 0.04, cap)
        self.shade(1.1)

    def can(self, rng):
        w, top, bottom = rng.uniform(0.15, 0.19), rng.uniform(0.14, 0.2), rng.uniform(0.82, 0.88)
        silver = 200, 204, 208
        self.ellipse(0.5, bottom, w * 0.9, 0.035, silver)
        self.rectangle(0.5 - w, top + 0.04, 0.5 + w, bottom - 0.02, colour(rng))
        lid = [(0.5 - w, top + 0.05), (0.5 - w * 0.86, top), (0.5 + w * 0.86, top), (0.5 + w, top + 0.05)]
        self.polygon(lid, silver)
        self.label(0.5 - w, top + 0.14, 0.5 + w, bottom - 0.12)
        self.shade(1.2)
        self.ellipse(0.5, top, w * 0.86, 0.035, (222, 225, 228))
        self.ellipse(0.5, top, w * 0.3, 0.014, (150, 153, 158))

    def carton(self, rng):
        w, top = rng.uniform(0.14, 0.17), rng.uniform(0.26, 0.32)
        edge, front = 0.5 + w - rng.uniform(0.07, 0.1), colour(rng)
        self.polygon([(edge, top), (0.5 + w, top - 0.03), (0.5 + w, 0.88), (edge, 0.92)], times(front, 0.7))
        self.rectangle(0.5 - w, top, edge, 0.92, front)
        self.polygon([(0.5 - w, top), (edge, top), (edge, 0.14), (0.53 - w, 0.14)], front)
        self.polygon([(edge, top), (0.5 + w, top - 0.03), (edge, 0.14)], times(front, 0.7))
        self.rectangle(0.52 - w, 0.08, edge + 0.01, 0.15, times(front, 0.85))
        self.label(0.5 - w, top + 0.08, edge, 0.8)

    def cup(self, rng):
        wide, narrow = rng.uniform(0.16, 0.2), rng.uniform(0.11, 0.13)
        top, lid, angles = rng.uniform(0.3, 0.36), colour(rng), np.linspace(np.pi, 2 * np.pi, 25)
        self.polygon([(0.55, top), (0.6, 0.06), (0.63, 0.06), (0.585, top)], colour(rng))  # straw
        self.polygon([(0.5 - wide, top), (0.5 + wide, top), (0.5 + narrow, 0.9), (0.5 - narrow, 0.9)], colour(rng))
        self.label(0.5 - narrow, top + 0.14, 0.5 + narrow, 0.78)
        self.polygon(np.stack([0.5 + wide * np.cos(angles), top + 0.14 * np.sin(angles)], 1), lid)
        self.rectangle(0.485 - wide, top - 0.02, 0.515 + wide, top + 0.025, lid)
        self.shade(0.9)

    def bag(self, rng):
        w, top, bottom = rng.uniform(0.29, 0.34), rng.uniform(0.13, 0.2), rng.uniform(0.8, 0.87)
        corners = 2 * rng.integers(11, 17) + 1
        x, zigzag, body = np.linspace(0.5 - w, 0.5 + w, corners), 0.025 * (np.arange(corners) % 2), colour(rng)
        bulge, y = -0.045 * np.sin(np.linspace(0, np.pi, 14)), np.linspace(top, bottom, 14)
        above, below = np.stack([x, top - zigzag], 1), np.stack([x[::-1], bottom + zigzag], 1)
        right, left = np.stack([0.5 + w + bulge, y], 1), np.stack([0.5 - w - bulge, y], 1)
        self.polygon([*above, *right, *below, *left[::-1]], body)
        self.label(0.5 - w * 0.72, top + 0.13, 0.5 + w * 0.72, bottom - 0.13)
        for y in (top + 0.03, top + 0.055, bottom - 0.03, bottom - 0.055):  # seals
            self.rectangle(0.52 - w, y - 0.005, 0.48 + w, y + 0.005, times(body, 0.75), outline=False)
        self.shade(0.7)

    def box(self, rng):
        w, h, deep = rng.uniform(0.25, 0.31), rng.uniform(0.22, 0.29), rng.uniform(0.09, 0.14)
        x0, x1, y0, y1, front = 0.46 - w, 0.46 + w, 0.54 - h, 0.54 + h, colour(rng)
        lid, side = tuple(min(255, v + 35) for v in front), times(front, 0.62)
        self.polygon([(x0, y0), (x0 + deep, y0 - deep), (x1 + deep, y0 - deep), (x1, y0)], lid)
        self.polygon([(x1, y0), (x1 + deep, y0 - deep), (x1 + deep, y1 - deep), (x1, y1)], side)
        self.rectangle(x0, y0, x1, y1, front)
        self.label(x0 + 0.05, y0 + 0.06, x1 - 0.05, y1 - 0.06)

    def tray(self, rng):
        w, h = rng.uniform(0.33, 0.4), rng.uniform(0.22, 0.28)
        for inset, surface in ((0, ((0, 60), (190, 255))), (0.04, ((0, 120), (60, 150)))):
            outline = rounded(w - inset, h - inset, 0.09, 0.5)
            self.polygon(outline[8:] + outline[:8], colour(rng, *surface))
        for _ in range(rng.integers(9, 16)):  # the food
            x, y = 0.5 + rng.uniform(-w + 0.13, w - 0.13), 0.5 + rng.uniform(-h + 0.1, h - 0.1)
            self.ellipse(x, y, rng.uniform(0.04, 0.07), rng.uniform(0.03, 0.05), colour(rng, value=(140, 230)))
        x = 0.5 + rng.uniform(-0.1, 0.1)
        self.label(x - 0.13, 0.4, x + 0.13, 0.6)

    def jar(self, rng):
        w, top, bottom = rng.uniform(0.24, 0.29), rng.uniform(0.28, 0.34), rng.uniform(0.76, 0.82)
        self.polygon(rounded(w, (bottom - top) / 2, 0.06, (top + bottom) / 2), colour(rng))
        self.label(0.5 - w, top + 0.11, 0.5 + w, bottom - 0.08)
        self.rectangle(0.53 - w, top - 0.1, 0.47 + w, top + 0.02, colour(rng))
        self.shade(0.9)


def background(rng):
    """Draw a table top, plain or of planks, tiles or cloth, under uneven light: float32 [SIDE, SIDE, 3], 0 to 255."""
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) / SIDE
    base = np.array(colour(rng, (0, 110), (90, 240)), np.float32)
    kind, pattern = rng.integers(4), np.ones_like(x)
    if kind == 1:  # planks, with grain along them
        grain = cv2.GaussianBlur(rng.normal(size=(SIDE, SIDE)).astype(np.float32), (0, 0), sigmaX=25, sigmaY=0.8)
        pattern = 1 + 1.2 * grain - 0.25 * ((x * rng.integers(3, 6)) % 1 < 0.03)
        pattern = pattern.T if rng.random() < 0.5 else pattern
    elif kind == 2:  # tiles
        joints = (np.stack([x, y]) * rng.integers(3, 6)) % 1 < 0.05
        pattern = 1 - 0.22 * joints.any(0)
    elif kind == 3:  # cloth
        pattern = 1 + 0.08 * np.sign(np.sin(np.stack([x, y]) * rng.integers(10, 22) * 6.28)).sum(0)
    angle, slope = rng.uniform(0, 6.28), rng.uniform(0, 0.35)
    light = 1 + slope * ((x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle))
    return base * (pattern * light)[..., None] + rng.normal(0, 3, (SIDE, SIDE, 1)).astype(np.float32)


def photo(rng, label):
    """Draw one product on a table: uint8 [SIDE, SIDE, 3] RGB."""
    brand, kind = "".join(rng.choice(SYLLABLES, rng.integers(2, 4))).upper(), KINDS[label][rng.integers(4)]
    package = Package(rng, brand, str(rng.choice(GOODS[label].split())))
    getattr(package, kind)(rng)
    across, down = rng.uniform(*WIDTHS[label]), rng.uniform(0.75, 1.0)
    stretch = np.float32([[across, 0, SIDE / 2 * (1 - across)], [0, down, SIDE / 2 * (1 - down)]])
    rgb, mask = (cv2.warpAffine(x, stretch, (SIDE, SIDE), flags=cv2.INTER_AREA) for x in (package.rgb, package.mask))
    shift = np.float32([[1, 0, rng.integers(4, 12)], [0, 1, rng.integers(4, 12)]])
    shadow = cv2.GaussianBlur(cv2.warpAffine(mask, shift, (SIDE, SIDE)), (0, 0), 7)[..., None] / 255.0
    scene, opacity = background(rng) * (1 - 0.55 * shadow), mask.astype(np.float32)[..., None] / 255
    return np.clip(scene * (1 - opacity) + rgb * opacity, 0, 255).astype(np.uint8)


def copy_of(rng, source, side):
    """Return a duplicate of a photo: rotated, mirrored, cropped to 60 to 100 % of the side, scaled, blurred, relit."""
    angle = 90.0 * rng.integers(4) if rng.random() < 0.7 else rng.uniform(0, 360)
    zoom, size = rng.uniform(1.0, 1.0 / 0.6), int(side * rng.uniform(0.75, 1.25))
    matrix = cv2.getRotationMatrix2D((SIDE / 2, SIDE / 2), angle, zoom * size / SIDE)
    slack = (zoom - 1) * size / 2 * 0.6
    matrix[:, 2] += size / 2 - SIDE / 2 + rng.uniform(-slack, slack, 2)
    image = cv2.warpAffine(source, matrix, (size, size), flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REFLECT_101)
    image = image[:, ::-1] if rng.random() < 0.25 else image
    if rng.random() < 0.4:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.5, 1.4) * side / 160)
    relit = image.astype(np.float32) * rng.uniform(0.75, 1.2) * rng.uniform(0.93, 1.07, 3) + rng.uniform(-12, 12)
    return np.clip(relit, 0, 255).astype(np.uint8)


def images_of_product(task):
    """Draw a product's images. → [(product's number, label, PNG file as bytes)]. Every product has its own random
    stream, so that the number of processes doesn't matter."""
    number, seed, side, copies = task
    rng = np.random.default_rng([seed, number])
    source = photo(rng, label := int(rng.random() >= SHARE_OF_DRINKS))
    images = (copy_of(rng, source, side) for _ in range(rng.integers(1, copies + 1)))
    return [(number, label, cv2.imencode(".png", image[..., ::-1])[1].tobytes()) for image in images]


def write(path, content):
    """Write bytes, or rows as a CSV, under a temporary name, and rename the file."""
    temporary, table = path.with_name(f".tmp.{path.name}"), isinstance(content, list)
    temporary.write_bytes("".join(",".join(map(str, row)) + "\n" for row in content).encode() if table else content)
    temporary.replace(path)


def write_part(folder, part, products, rng):
    """Write the zip of "train" or "test" and its tables, the images in random order. → rows of sources.csv"""
    images = [image for product in products for image in product]
    numbers, labels, files = zip(*(images[i] for i in rng.permutation(len(images))), strict=True)
    names, zipped = [f"{i:04}.png" for i in range(len(images))], io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_STORED) as archive:
        for name, file in zip(names, files, strict=True):  # with a top folder, as SIGNATE's; the date is fixed
            archive.writestr(zipfile.ZipInfo(f"{part}/{name}", (2023, 8, 11, 0, 0, 0)), file)
    write(folder / f"{part}.zip", zipped.getvalue())
    if part == "train":
        write(folder / "train.csv", [("image_name", "label"), *zip(names, labels, strict=True)])
    else:
        usage = np.where(rng.random(len(names)) < PUBLIC_SHARE, "Public", "Private")
        write(folder / "sample_submit.csv", [(name, 0) for name in names])
        write(folder / "solution.csv", [("image_name", "label", "usage"), *zip(names, labels, usage, strict=True)])
    return [(f"{part}/{name}", number) for name, number in zip(names, numbers, strict=True)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "demo", help="where the files go")
    parser.add_argument("--products", type=int, default=250, help="products in the training set (default 250)")
    parser.add_argument("--test-products", type=int, default=150, help="other products, in the test set (default 150)")
    parser.add_argument("--copies", type=int, default=3, help="most images of one product; at least 1 (default 3)")
    parser.add_argument("--side", type=int, default=160, help="side of a typical image in px (default 160)")
    parser.add_argument("--seed", type=int, default=777, help="decides every pixel (default 777)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    tasks = [(n, args.seed, args.side, args.copies) for n in range(args.products + args.test_products)]
    with ProcessPoolExecutor() as pool:
        products = list(pool.map(images_of_product, tasks, chunksize=16))
    rng = np.random.default_rng(args.seed)
    train = write_part(args.folder, "train", products[: args.products], rng)
    test = write_part(args.folder, "test", products[args.products :], rng)
    write(args.folder / "sources.csv", [("image_name", "source"), *train, *test])
    print(f"{args.folder}: {len(train)} training and {len(test)} test images of different products")


if __name__ == "__main__":
    main()
