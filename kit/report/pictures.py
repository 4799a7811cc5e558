"""Where the competition's images are, how one is found and resized, and how a sheet of them is drawn."""

import io

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from common import replacing
from kit.report.figures import COLUMNS, save_png

CELL, GAP, LINE = 160, 14, 24  # px: a cell's side, the room between two, the height of a line of text


def draw_classes(path, images, folds, examples, seed, transform=None, columns=6):
    """Writes a picture of some `examples` ({title: rows of folds.csv}, thesis figures 3.1
    to 3.3) and, below each, of the same after a random `transform` (image, seed). images: uint8 [N, S, S, 3]."""
    sheet = []
    for title, rows in examples.items():
        names = folds.image_name.iloc[rows]
        chosen = names.sample(min(columns, len(names)), random_state=seed)
        sheet.append((f"{title} · {len(names)} images", [(images[i], name) for i, name in chosen.items()]))
        if transform is not None:
            sheet.append(("augmented", [(transform(images[i], i), "") for i in chosen.index]))
    with replacing(path) as temporary:
        contact_sheet(temporary, sheet, columns)


def contact_sheet(path, rows, columns):
    """Writes a PNG of `rows`: (title, [(image uint8 [H, W, 3], caption), …]), at most `columns` images a row."""
    height = LINE + CELL + LINE + GAP
    sheet = Image.new("RGB", (GAP + (CELL + GAP) * columns, GAP + height * len(rows)), "white")
    for top, (title, cells) in zip(range(GAP, sheet.height, height), rows, strict=True):
        write(sheet, (GAP, top + LINE // 2), title, 16, "black", sheet.width - 2 * GAP, "lm")
        for left, (image, caption) in zip(range(GAP, sheet.width, CELL + GAP), cells, strict=False):
            tile = ImageOps.pad(Image.fromarray(np.ascontiguousarray(image)), (CELL, CELL), color="whitesmoke")
            sheet.paste(tile, (left, top + LINE))
            write(sheet, (left + CELL // 2, top + LINE + CELL + LINE // 2), caption, 12, "dimgray", CELL, "mm")
    sheet.save(path, "PNG")


def write(sheet, place, text, size, colour, width, anchor):
    """Writes one line of text. Where it is wider than `width` px, … stands for its middle."""
    font, text = ImageFont.load_default(size), " · ".join(text.splitlines())
    while font.getlength(text) > width:
        middle = len(text) // 2
        text = text[: middle - 1] + "…" + text[middle + 1 :]
    ImageDraw.Draw(sheet).text(place, text, colour, font, anchor)


def draw(path, records, pairs, evidence, groups, names, labels, test_names, most=12, columns=8):
    """Draws a contact sheet: the least certain pairs, then the largest groups."""
    captions = [f"train {name[-16:]}" + f" [{label}]"[:12] for name, label in zip(names, labels, strict=True)]
    captions += [f"test {name[-16:]}" for name in test_names]
    certainty = evidence[:, 2] + np.minimum(evidence[:, 1], 40) / 40
    doubtful = pairs[np.argsort(certainty, kind="stable")[: 2 * columns]].ravel()
    rows = [("least certain pairs", doubtful[k : k + columns]) for k in range(0, len(doubtful), columns)]
    sizes = np.bincount(groups)
    largest = np.argsort(-sizes, kind="stable")[: min(most, (sizes > 1).sum())]
    rows += [(f"group {k}\n{sizes[k]} images", np.flatnonzero(groups == k)[:columns]) for k in largest]
    thumbs = {i: records["thumb"][i][*map(slice, records["shape"][i])] for _, row in rows for i in row}
    sheet = [(title, [(thumbs[i], captions[i]) for i in row]) for title, row in rows]
    contact_sheet(path, sheet or [("no relatives found", [])], columns)


def draw_matched(path, chosen, rungs, points, images, names, seed):
    """Draws how similar held-out and test images are to their nearest, and some of them beside it, so that a person
    sees at once whether the CV asks what the test set asks. images, names: {"train": …, "test": …}."""
    curves, train = {"test images": chosen.test.ravel()}, points[: len(names["train"])]
    rows = look("test", points[len(train) :], train, None, images, names, seed)
    for kind, rung in {"chosen folds": chosen, "plain folds": rungs[0]}.items():
        if kind == "chosen folds" or rung is not chosen:
            curves[f"held-out images, {kind} ({rung.name})"] = rung.held_out
            rows += look(f"held out, {kind}", train, train, rung.folds, images, names, seed)
    draw_similarities(path, curves, rows)


def look(title, asked, train, folds, images, names, seed):
    """→ rows of a contact sheet: some images, each beside the nearest training image, or the nearest of other folds."""
    part, cells = "test" if folds is None else "train", []
    for i in np.random.default_rng(seed).permutation(len(asked))[:COLUMNS]:
        similar = train @ asked[i]
        if folds is not None:
            similar[folds == folds[i]] = -1
        nearest = similar.argmax()
        cells += [(images[part][i], f"{part} {names[part][i][-16:]}")]
        cells += [(images["train"][nearest], f"{similar[nearest]:.2f}: train {names['train'][nearest][-16:]}")]
    beside = "each beside the nearest training image" + " of the other folds" * (folds is not None)
    return [(f"{title}: {beside}", cells[:COLUMNS]), ("", cells[COLUMNS:])]


def draw_similarities(path, curves, rows):
    """Writes a PNG: the distribution of each of `curves` (name: similarities, float [N]), and a contact sheet below."""
    with io.BytesIO() as file:
        contact_sheet(file, rows, COLUMNS)
        file.seek(0)
        sheet = plt.imread(file)
    width, height = sheet.shape[1] / 100, sheet.shape[0] / 100
    figure, (top, below) = plt.subplots(2, 1, figsize=(width, height + 4), height_ratios=(4, height))
    bins = np.linspace(min(map(np.min, curves.values())) - 0.01, 1.01, 50)
    for (name, values), colour in zip(curves.items(), ("tab:orange", "tab:blue", "grey"), strict=False):
        top.hist(values, bins, density=True, histtype="step", linewidth=1.5, color=colour, label=name)
    top.set(title="similarity to the nearest image that the same model has seen", yticks=[])
    top.legend(loc="upper right")
    below.imshow(sheet)
    below.set_axis_off()
    save_png(figure, path)
    plt.close(figure)
