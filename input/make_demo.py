"""Draws a small competition of food and drink packages, in the files that SIGNATE gives.

    python input/make_demo.py                          # → input/demo/
    python input/make_demo.py --seed 1 --folder /tmp/demo1
    python input/make_demo.py --products 60 --test-products 40 --side 64

Written: train.csv, train.zip, test.zip, sample_submit.csv, and what a real competition keeps to itself: solution.csv
(image_name, label, usage Public or Private) and sources.csv (image_name, source: the product that an image shows;
the kit never reads it).

As in the contest of the thesis (THESIS.md, "what it gets wrong"), one photo of a product becomes several images:
rotated, cropped, downscaled, blurred and relit copies. The test set shows other products than the training set, so a
model that remembers prints and colours scores well on copies that it has seen, and badly on the leaderboard. What
carries over to new products is the outline. Label 0 is a drink (bottle, can, carton, cup), 1 a food (bag, box, tray,
jar); 46 % are drinks, as in the contest.
"""

import argparse
import csv
import io
import os
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np

SIDE = 320  # px of a product's photo, before the copies are cut from it
SHARE_OF_DRINKS = 0.46
PUBLIC_SHARE = 0.5
# how far a package is stretched: stout drinks and slim foods overlap, so that the outline decides and not the width
WIDTHS = {0: (0.9, 1.25), 1: (0.75, 1.0)}
SYLLABLES = "ka ri mo to su na fu lo bel da vi go mi ra chi pon ze ya ten oka nor lux sol cre".split()
GOODS = {
    0: "TEA COLA MILK SODA JUICE WATER COFFEE LEMON".split(),
    1: "CHIPS RICE SOUP CURRY BEANS SNACK JAM PASTA".split(),
}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "demo", help="where the files go")
    parser.add_argument("--products", type=int, default=250, help="products in the training set (default 250)")
    parser.add_argument("--test-products", type=int, default=150, help="other products, in the test set (default 150)")
    parser.add_argument("--copies", type=int, default=3, help="most images of one product; at least 1 (default 3)")
    parser.add_argument("--side", type=int, default=160, help="side of a typical image in px (default 160)")
    parser.add_argument("--seed", type=int, default=777, help="decides every pixel (default 777)")
    return parser.parse_args()


# ---------------------------------------------------------------- colours and surfaces


def colour(rng, saturation=(90, 255), value=(110, 255)):
    """A random RGB colour, as a tuple of three ints."""
    hsv = np.uint8([[[rng.integers(180), rng.integers(*saturation), rng.integers(*value)]]])
    return tuple(int(c) for c in cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0])


def background(rng):
    """A table top: plain, planks, tiles or cloth, under uneven light. float32 [SIDE, SIDE, 3], 0 to 255."""
    y, x = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32) / SIDE
    base = np.array(colour(rng, (0, 110), (90, 240)), np.float32)
    kind = rng.integers(4)
    if kind == 1:  # planks, with grain along them
        grain = cv2.GaussianBlur(rng.normal(size=(SIDE, SIDE)).astype(np.float32), (0, 0), sigmaX=25, sigmaY=0.8)
        pattern = 1 + 1.2 * grain - 0.25 * ((x * rng.integers(3, 6)) % 1 < 0.03)
        pattern = pattern.T if rng.random() < 0.5 else pattern
    elif kind == 2:  # tiles
        n = rng.integers(3, 6)
        pattern = 1 - 0.22 * (((x * n) % 1 < 0.05) | ((y * n) % 1 < 0.05))
    elif kind == 3:  # cloth
        n = rng.integers(10, 22)
        pattern = 1 + 0.08 * np.sign(np.sin(x * n * 6.28)) + 0.08 * np.sign(np.sin(y * n * 6.28))
    else:
        pattern = np.ones_like(x)
    angle = rng.uniform(0, 6.28)
    light = 1 + rng.uniform(0, 0.35) * ((x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle))
    return base * (pattern * light)[..., None] + rng.normal(0, 3, (SIDE, SIDE, 1)).astype(np.float32)


class Canvas:
    """An RGB layer and its mask, drawn with coordinates from 0 to 1 (x to the right, y down)."""

    def __init__(self):
        self.rgb = np.zeros((SIDE, SIDE, 3), np.uint8)
        self.mask = np.zeros((SIDE, SIDE), np.uint8)

    def polygon(self, points, fill, outline=True):
        corners = np.round(np.array(points) * SIDE * 16).astype(np.int32)
        cv2.fillPoly(self.rgb, [corners], fill, cv2.LINE_AA, 4)
        cv2.fillPoly(self.mask, [corners], 255, cv2.LINE_AA, 4)
        if outline:
            dark = tuple(int(c * 0.45) for c in fill)
            cv2.polylines(self.rgb, [corners], True, dark, 2, cv2.LINE_AA, 4)

    def box(self, x0, y0, x1, y1, fill, outline=True):
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill, outline)

    def ellipse(self, x, y, rx, ry, fill, outline=True):
        angles = np.linspace(0, 2 * np.pi, 49)[:-1]
        self.polygon(np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], 1), fill, outline)

    def stretch(self, across, down):
        """Scales the layer about its centre: a slim jar, a stout bottle."""
        middle = SIDE / 2
        matrix = np.float32([[across, 0, middle * (1 - across)], [0, down, middle * (1 - down)]])
        self.rgb = cv2.warpAffine(self.rgb, matrix, (SIDE, SIDE), flags=cv2.INTER_AREA)
        self.mask = cv2.warpAffine(self.mask, matrix, (SIDE, SIDE), flags=cv2.INTER_AREA)

    def shade(self, strength):
        """Darkens the layer towards its left and right edges, as a round body does."""
        columns = np.flatnonzero(self.mask.any(0))
        across = np.clip((np.arange(SIDE) - columns[0]) / max(1, columns[-1] - columns[0]), 0, 1)
        factor = 1 + strength * (0.25 - (across - 0.4) ** 2 * 2.2)
        self.rgb = np.clip(self.rgb * factor[None, :, None], 0, 255).astype(np.uint8)

    def write(self, text, x, y, width, fill):
        """Writes `text` centred on (x, y), at most `width` wide."""
        font = cv2.FONT_HERSHEY_DUPLEX
        (w, h), _ = cv2.getTextSize(text, font, 1, 2)
        scale = width * SIDE / w
        at = int(x * SIDE - w * scale / 2), int(y * SIDE + h * scale / 2)
        cv2.putText(self.rgb, text, at, font, scale, fill, max(1, round(scale * 2)), cv2.LINE_AA)


def label_panel(canvas, rng, brand, good, x0, y0, x1, y1):
    """The printed part: a panel with a picture, the brand and what is inside."""
    panel, ink = colour(rng), colour(rng, value=(20, 90))
    if rng.random() < 0.5:
        panel, ink = (245, 243, 235), colour(rng, value=(60, 160))
    canvas.box(x0, y0, x1, y1, panel, outline=False)
    x, width, height = (x0 + x1) / 2, x1 - x0, y1 - y0
    canvas.write(brand, x, y0 + 0.22 * height, 0.8 * width, ink)
    canvas.write(good, x, y0 + 0.85 * height, 0.6 * width, ink)
    radius = min(width, height) * rng.uniform(0.12, 0.2)
    for _ in range(rng.integers(1, 4)):
        cx = x + rng.uniform(-0.25, 0.25) * width
        canvas.ellipse(cx, y0 + 0.52 * height, radius, radius, colour(rng), outline=False)


# ---------------------------------------------------------------- drinks: tall and narrow


def bottle(c, rng, brand, good):
    body, cap = colour(rng), colour(rng)
    w, top, shoulder = rng.uniform(0.11, 0.15), rng.uniform(0.08, 0.14), rng.uniform(0.3, 0.4)
    neck = w * rng.uniform(0.3, 0.42)
    t = np.linspace(0, 1, 12)
    ease = (1 - np.cos(np.pi * t)) / 2
    right = np.stack([0.5 + neck + (w - neck) * ease, top + 0.1 + (shoulder - top - 0.1) * t], 1)
    left = np.stack([1 - right[:, 0], right[:, 1]], 1)[::-1]
    foot = [(0.5 + w, 0.88), (0.5 + w - 0.02, 0.92), (0.5 - w + 0.02, 0.92), (0.5 - w, 0.88)]
    c.polygon([(0.5 + neck, top), *right, *foot, *left, (0.5 - neck, top)], body)
    label_panel(c, rng, brand, good, 0.5 - w, shoulder + 0.08, 0.5 + w, 0.78)
    c.box(0.5 - neck - 0.012, top - 0.03, 0.5 + neck + 0.012, top + 0.04, cap)
    c.shade(1.1)


def can(c, rng, brand, good):
    w, top, bottom = rng.uniform(0.15, 0.19), rng.uniform(0.14, 0.2), rng.uniform(0.82, 0.88)
    silver = (200, 204, 208)
    c.ellipse(0.5, bottom, w * 0.9, 0.035, silver)
    c.box(0.5 - w, top + 0.04, 0.5 + w, bottom - 0.02, colour(rng))
    c.polygon([(0.5 - w, top + 0.05), (0.5 - w * 0.86, top), (0.5 + w * 0.86, top), (0.5 + w, top + 0.05)], silver)
    label_panel(c, rng, brand, good, 0.5 - w, top + 0.14, 0.5 + w, bottom - 0.12)
    c.shade(1.2)
    c.ellipse(0.5, top, w * 0.86, 0.035, (222, 225, 228))
    c.ellipse(0.5, top, w * 0.3, 0.014, (150, 153, 158))


def carton(c, rng, brand, good):
    w, top = rng.uniform(0.14, 0.17), rng.uniform(0.26, 0.32)
    side, front = rng.uniform(0.07, 0.1), colour(rng)
    dark = tuple(int(v * 0.7) for v in front)
    c.polygon([(0.5 + w - side, top), (0.5 + w, top - 0.03), (0.5 + w, 0.88), (0.5 + w - side, 0.92)], dark)
    c.box(0.5 - w, top, 0.5 + w - side, 0.92, front)
    c.polygon([(0.5 - w, top), (0.5 + w - side, top), (0.5 + w - side, 0.14), (0.5 - w + 0.03, 0.14)], front)
    c.polygon([(0.5 + w - side, top), (0.5 + w, top - 0.03), (0.5 + w - side, 0.14)], dark)
    c.box(0.5 - w + 0.02, 0.08, 0.5 + w - side + 0.01, 0.15, tuple(int(v * 0.85) for v in front))
    label_panel(c, rng, brand, good, 0.5 - w, top + 0.08, 0.5 + w - side, 0.8)


def cup(c, rng, brand, good):
    wide, narrow = rng.uniform(0.16, 0.2), rng.uniform(0.11, 0.13)
    top, lid = rng.uniform(0.3, 0.36), colour(rng)
    c.polygon([(0.55, top), (0.6, 0.06), (0.63, 0.06), (0.585, top)], colour(rng))  # straw
    c.polygon([(0.5 - wide, top), (0.5 + wide, top), (0.5 + narrow, 0.9), (0.5 - narrow, 0.9)], colour(rng))
    label_panel(c, rng, brand, good, 0.5 - narrow, top + 0.14, 0.5 + narrow, 0.78)
    angles = np.linspace(np.pi, 2 * np.pi, 25)
    c.polygon(np.stack([0.5 + wide * np.cos(angles), top + 0.14 * np.sin(angles)], 1), lid)
    c.box(0.5 - wide - 0.015, top - 0.02, 0.5 + wide + 0.015, top + 0.025, lid)
    c.shade(0.9)


# ---------------------------------------------------------------- foods: broad and low


def bag(c, rng, brand, good):
    w, top, bottom = rng.uniform(0.29, 0.34), rng.uniform(0.13, 0.2), rng.uniform(0.8, 0.87)
    teeth = rng.integers(11, 17)
    x = np.linspace(0.5 - w, 0.5 + w, 2 * teeth + 1)
    zigzag = 0.025 * (np.arange(2 * teeth + 1) % 2)
    t = np.linspace(0, 1, 14)
    bulge = -0.045 * np.sin(np.pi * t)
    right = np.stack([0.5 + w + bulge, top + (bottom - top) * t], 1)
    left = np.stack([0.5 - w - bulge, top + (bottom - top) * t], 1)[::-1]
    body = colour(rng)
    c.polygon([*np.stack([x, top - zigzag], 1), *right, *np.stack([x[::-1], bottom + zigzag], 1), *left], body)
    label_panel(c, rng, brand, good, 0.5 - w * 0.72, top + 0.13, 0.5 + w * 0.72, bottom - 0.13)
    seal = tuple(int(v * 0.75) for v in body)
    for y in (top + 0.03, top + 0.055, bottom - 0.03, bottom - 0.055):
        c.box(0.5 - w + 0.02, y - 0.005, 0.5 + w - 0.02, y + 0.005, seal, outline=False)
    c.shade(0.7)


def box(c, rng, brand, good):
    w, h, deep = rng.uniform(0.25, 0.31), rng.uniform(0.22, 0.29), rng.uniform(0.09, 0.14)
    x0, x1, y0, y1 = 0.46 - w, 0.46 + w, 0.54 - h, 0.54 + h
    front = colour(rng)
    c.polygon(
        [(x0, y0), (x0 + deep, y0 - deep), (x1 + deep, y0 - deep), (x1, y0)], tuple(min(255, v + 35) for v in front)
    )
    c.polygon([(x1, y0), (x1 + deep, y0 - deep), (x1 + deep, y1 - deep), (x1, y1)], tuple(int(v * 0.62) for v in front))
    c.box(x0, y0, x1, y1, front)
    label_panel(c, rng, brand, good, x0 + 0.05, y0 + 0.06, x1 - 0.05, y1 - 0.06)


def tray(c, rng, brand, good):
    w, h, r = rng.uniform(0.33, 0.4), rng.uniform(0.22, 0.28), 0.09
    corner = np.linspace(0, np.pi / 2, 8)

    def rounded(w, h):
        quarter = [(r * np.cos(a), r * np.sin(a)) for a in corner]
        turns = [(1, 1, quarter), (-1, 1, quarter[::-1]), (-1, -1, quarter), (1, -1, quarter[::-1])]
        return [(0.5 + sx * (w - r + dx), 0.5 + sy * (h - r + dy)) for sx, sy, q in turns for dx, dy in q]

    c.polygon(rounded(w, h), colour(rng, (0, 60), (190, 255)))
    c.polygon(rounded(w - 0.04, h - 0.04), colour(rng, (0, 120), (60, 150)))
    for _ in range(rng.integers(9, 16)):  # the food
        x, y = rng.uniform(-w + 0.13, w - 0.13), rng.uniform(-h + 0.1, h - 0.1)
        c.ellipse(0.5 + x, 0.5 + y, rng.uniform(0.04, 0.07), rng.uniform(0.03, 0.05), colour(rng, value=(140, 230)))
    x = 0.5 + rng.uniform(-0.1, 0.1)
    label_panel(c, rng, brand, good, x - 0.13, 0.4, x + 0.13, 0.6)


def jar(c, rng, brand, good):
    w, top, bottom = rng.uniform(0.24, 0.29), rng.uniform(0.28, 0.34), rng.uniform(0.76, 0.82)
    t = np.linspace(0, np.pi / 2, 8)
    curve = 0.06
    upper = [(0.5 + w - curve + curve * np.sin(a), top + curve - curve * np.cos(a)) for a in t]
    lower = [(0.5 + w - curve + curve * np.cos(a), bottom - curve + curve * np.sin(a)) for a in t]
    right = upper + lower
    c.polygon(right + [(1 - x, y) for x, y in right[::-1]], colour(rng))
    label_panel(c, rng, brand, good, 0.5 - w, top + 0.11, 0.5 + w, bottom - 0.08)
    c.box(0.5 - w + 0.03, top - 0.1, 0.5 + w - 0.03, top + 0.02, colour(rng))
    c.shade(0.9)


KINDS = {0: (bottle, can, carton, cup), 1: (bag, box, tray, jar)}


# ---------------------------------------------------------------- photos and their copies


def photo(rng, label):
    """One product on a table: uint8 [SIDE, SIDE, 3] RGB."""
    brand = "".join(rng.choice(SYLLABLES, rng.integers(2, 4))).upper()
    canvas = Canvas()
    KINDS[label][rng.integers(4)](canvas, rng, brand, str(rng.choice(GOODS[label])))
    across = rng.uniform(*WIDTHS[label])
    canvas.stretch(across, rng.uniform(0.75, 1.0))
    mask = canvas.mask.astype(np.float32)[..., None] / 255
    shift = np.float32([[1, 0, rng.integers(4, 12)], [0, 1, rng.integers(4, 12)]])
    shadow = cv2.GaussianBlur(cv2.warpAffine(canvas.mask, shift, (SIDE, SIDE)), (0, 0), 7)[..., None] / 255.0
    scene = background(rng) * (1 - 0.55 * shadow)
    return np.clip(scene * (1 - mask) + canvas.rgb * mask, 0, 255).astype(np.uint8)


def copy_of(rng, source, side):
    """One image made from a photo: turned (most of them by quarter turns), mirrored at times, cropped to 60 to 100 %
    of the side, scaled, blurred and relit."""
    angle = 90.0 * rng.integers(4) if rng.random() < 0.7 else rng.uniform(0, 360)
    zoom = rng.uniform(1.0, 1.0 / 0.6)
    size = int(side * rng.uniform(0.75, 1.25))
    matrix = cv2.getRotationMatrix2D((SIDE / 2, SIDE / 2), angle, zoom * size / SIDE)
    slack = (zoom - 1) * size / 2 * 0.6
    matrix[:, 2] += size / 2 - SIDE / 2 + rng.uniform(-slack, slack, 2)
    image = cv2.warpAffine(source, matrix, (size, size), flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REFLECT_101)
    if rng.random() < 0.25:
        image = image[:, ::-1]
    if rng.random() < 0.4:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.5, 1.4) * side / 160)
    relit = image.astype(np.float32) * rng.uniform(0.75, 1.2) * rng.uniform(0.93, 1.07, 3) + rng.uniform(-12, 12)
    return np.clip(relit, 0, 255).astype(np.uint8)


def images_of_product(task):
    """→ (source number, label, list of PNG files as bytes). Every product has a random stream of its own."""
    number, seed, side, copies = task
    rng = np.random.default_rng([seed, number])
    label = int(rng.random() >= SHARE_OF_DRINKS)
    source = photo(rng, label)
    images = [copy_of(rng, source, side) for _ in range(rng.integers(1, copies + 1))]
    return number, label, [cv2.imencode(".png", image[..., ::-1])[1].tobytes() for image in images]


# ---------------------------------------------------------------- files


def write_whole(path, data):
    temporary = path.with_name(f".tmp{os.getpid()}.{path.name}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def csv_bytes(rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def zip_bytes(folder, files):
    """An archive with a top folder, as SIGNATE's; fixed dates, so that one seed gives the same bytes."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files:
            archive.writestr(zipfile.ZipInfo(f"{folder}/{name}", (2023, 8, 11, 0, 0, 0)), content)
    return data.getvalue()


def main():
    args = parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    tasks = [(n, args.seed, args.side, args.copies) for n in range(args.products + args.test_products)]
    with ProcessPoolExecutor() as pool:
        products = list(pool.map(images_of_product, tasks, chunksize=16))

    rng = np.random.default_rng(args.seed)
    sources, counts = [("image_name", "source")], {}
    for part, chosen in (("train", products[: args.products]), ("test", products[args.products :])):
        images = [(number, label, png) for number, label, pngs in chosen for png in pngs]
        images = [images[i] for i in rng.permutation(len(images))]
        names = [f"{i:04}.png" for i in range(len(images))]
        labels = [label for _, label, _ in images]
        write_whole(args.folder / f"{part}.zip", zip_bytes(part, zip(names, (png for *_, png in images), strict=True)))
        sources += [(f"{part}/{name}", number) for name, (number, *_) in zip(names, images, strict=True)]
        counts[part] = len(images)
        if part == "train":
            rows = [("image_name", "label"), *zip(names, labels, strict=True)]
            write_whole(args.folder / "train.csv", csv_bytes(rows))
        else:
            usage = np.where(rng.random(len(names)) < PUBLIC_SHARE, "Public", "Private")
            write_whole(args.folder / "sample_submit.csv", csv_bytes([(name, 0) for name in names]))
            rows = [("image_name", "label", "usage"), *zip(names, labels, usage, strict=True)]
            write_whole(args.folder / "solution.csv", csv_bytes(rows))
    write_whole(args.folder / "sources.csv", csv_bytes(sources))
    print(
        f"{args.folder}: {counts['train']} training images of {args.products} products, "
        f"{counts['test']} test images of {args.test_products} other products"
    )


if __name__ == "__main__":
    main()
