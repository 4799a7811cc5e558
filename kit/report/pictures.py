"""Contact sheets: examples of each class, pairs and groups of duplicates, images beside their nearest neighbours."""

from common import replacing

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

CELL, GAP, LINE = 160, 14, 24  # px: a cell's side, the room between two, the height of a line of text
COLUMNS = 8


def draw_classes(path, images, folds, task, seed, transform=None, columns=6):
    """Write a PNG of some images of each class (thesis figures 3.1 to 3.3) and, below each, of the same after a random
    `transform` (image, seed). images: uint8 [N, S, S, 3]; folds: the table folds.csv."""
    sheet = []
    for title, rows in task.examples(task.read_targets(folds.target)).items():
        names = folds.image_name.iloc[rows]
        chosen = names.sample(min(columns, len(names)), random_state=seed)
        sheet.append((f"{title} · {len(names)} images", [(images[i], name) for i, name in chosen.items()]))
        if transform is not None:
            sheet.append(("augmented", [(transform(images[i], i), "") for i in chosen.index]))
    with replacing(path) as temporary:
        contact_sheet(sheet, columns).save(temporary)


def draw_duplicates(path, records, pairs, evidence, table, most=12):
    """Write a PNG of the least certain pairs, then the largest groups. pairs [M, 2] and evidence [M, 3]: those of
    duplicates.verified_pairs; table: that of duplicates.table."""
    labels = np.where(table.part == "train", [f" [{label}]"[:12] for label in table.label], "")
    captions = table.part + " " + table.image_name.str[-16:] + labels
    certainty = evidence[:, 2] + np.minimum(evidence[:, 1], 40) / 40
    doubtful = pairs[np.argsort(certainty, kind="stable")[: 2 * COLUMNS]].ravel()
    rows = [("least certain pairs", doubtful[k : k + COLUMNS]) for k in range(0, len(doubtful), COLUMNS)]
    for group, size in table.groupby("group").size().sort_values(ascending=False, kind="stable")[:most].items():
        rows.append((f"group {group}\n{size} images", table.index[table.group == group][:COLUMNS]))
    thumbs, shapes = records["thumb"], records["shape"]
    sheet = [(title, [(thumbs[i][*map(slice, shapes[i])], captions[i]) for i in row]) for title, row in rows]
    contact_sheet(sheet or [("no duplicates found", [])], COLUMNS).save(path)


def draw_matched(path, chosen, candidates, points, images, names, seed):
    """Write a PNG of how similar held-out and test images are to their nearest, as distributions and some examples.
    points: float32 [N + T, D], the training images first; images, names: {"train": …, "test": …}."""
    from kit.report import figures  # here, since 01 draws contact sheets and needn't wait for matplotlib

    curves, train = {"test images": chosen.test.ravel()}, points[: len(names["train"])]
    rows = draw_neighbours("test", points[len(train) :], train, None, images, names, seed)
    for kind, candidate in {"chosen folds": chosen, "plain folds": candidates[0]}.items():
        if kind == "chosen folds" or candidate is not chosen:
            curves[f"held-out images, {kind} ({candidate.name})"] = candidate.held_out
            rows += draw_neighbours(f"held out, {kind}", train, train, candidate.folds, images, names, seed)
    sheet = contact_sheet(rows, COLUMNS)
    width, height = np.divide(sheet.size, 100)
    figure, (top, below) = figures.plt.subplots(2, 1, figsize=(width, height + 4), height_ratios=(4, height))
    bins = np.linspace(min(map(np.min, curves.values())) - 0.01, 1.01, 50)
    for (name, values), colour in zip(curves.items(), ("tab:orange", "tab:blue", "grey"), strict=False):
        top.hist(values, bins, density=True, histtype="step", linewidth=1.5, color=colour, label=name)
    top.set(title="similarity to the nearest image that the same model has seen", yticks=[])
    top.legend(loc="upper right")
    below.imshow(sheet)
    below.set_axis_off()
    figures.save_png(figure, path)
    figures.plt.close(figure)


def draw_neighbours(title, queries, train, folds, images, names, seed):
    """Return two rows of a contact sheet: random images, each beside the nearest training image, or the nearest in
    other folds where `folds` (int [N]) is given. queries [Q, D], train [N, D]: points."""
    part, cells = "test" if folds is None else "train", []
    for i in np.random.default_rng(seed).permutation(len(queries))[:COLUMNS]:
        similar = train @ queries[i]
        if folds is not None:
            similar[folds == folds[i]] = -1
        nearest = similar.argmax()
        cells += [(images[part][i], f"{part} {names[part][i][-16:]}")]
        cells += [(images["train"][nearest], f"{similar[nearest]:.2f}: train {names['train'][nearest][-16:]}")]
    beside = "each beside the nearest training image" + " of the other folds" * (folds is not None)
    return [(f"{title}: {beside}", cells[:COLUMNS]), ("", cells[COLUMNS:])]


def contact_sheet(rows, columns):
    """Return a PIL image of `rows`: (title, [(image uint8 [H, W, 3], caption), …]), at most `columns` images a row."""
    height = LINE + CELL + LINE + GAP
    sheet = Image.new("RGB", (GAP + (CELL + GAP) * columns, GAP + height * len(rows)), "white")
    for top, (title, cells) in zip(range(GAP, sheet.height, height), rows, strict=True):
        write_line(sheet, (GAP, top + LINE // 2), title, 16, "black", sheet.width - 2 * GAP, "lm")
        for left, (image, caption) in zip(range(GAP, sheet.width, CELL + GAP), cells, strict=False):
            tile = ImageOps.pad(Image.fromarray(np.ascontiguousarray(image)), (CELL, CELL), color="whitesmoke")
            sheet.paste(tile, (left, top + LINE))
            write_line(sheet, (left + CELL // 2, top + LINE + CELL + LINE // 2), caption, 12, "dimgray", CELL, "mm")
    return sheet


def write_line(sheet, position, text, size, colour, width, anchor):
    """Write one line of text, with … in place of its middle where it is wider than `width` px."""
    font, text = ImageFont.load_default(size), " · ".join(text.splitlines())
    while font.getlength(text) > width:
        text = text[: len(text) // 2 - 1] + "…" + text[len(text) // 2 + 1 :]
    ImageDraw.Draw(sheet).text(position, text, colour, font, anchor)
