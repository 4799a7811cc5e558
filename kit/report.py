"""What does a person want to see? Writes report.html, one self-contained page about an experiment, and the pictures
beside it. Used by 02_oof.py.

The page needs no network and forbids itself any (its Content-Security-Policy). Names and labels come from strangers'
files: each goes through html.escape, json or matplotlib's own escaping. kit/report.html is the page's text.
"""

import base64
import hashlib
import html
import json
import re
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from common import listing, open_images, prepared_folder, read_prepared, replacing
from kit import copies, figures, forecast
from kit.experiment import of_folds
from kit.metrics import METRICS

MOST_MISTAKES, MOST_GROUPS, MOST_IN_GROUP = 24, 12, 8  # images or groups that are shown
THUMB = 112  # px
LEDGER = "date folds metric cv cv_low cv_high last_epoch minutes public private settings".split()  # columns shown

# ---------------------------------------------------------------- the page


def write(args, oof, ledger, verdicts):
    """Writes report.html, confusion.png, roc.png and curves.png into the experiment's folder.

    oof: what 02_oof.py knows of the experiment. ledger: the table of all experiments. verdicts: sentences.
    """
    template = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    script = template.split("<script>")[1].split("</script>")[0]
    ledger, picture = ledger.set_index("experiment")[LEDGER], pictures(args, oof)
    settings = pd.DataFrame({"value": {key: json.dumps(v, ensure_ascii=False) for key, v in oof.config.items()}})
    drawn = figures.draw_all(oof.folder, oof.prepared, oof.folds, oof.probabilities, oof.epochs)
    places = drawn | threshold(oof.targets, oof.probabilities, oof.prepared["classes"])
    places |= relatives(oof, picture) | dict(
        hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        name=text(oof.exp), headline=text(oof.headline), interval=text(oof.interval),
        notes=paragraphs(notes(oof, ledger.loc[oof.exp], picture)), scores=table(oof.score_table),
        folds=table(oof.fold_table), metric=text(METRICS[oof.prepared["metric"]].name),
        mistakes=mistakes(oof, picture), forecast=paragraphs(forecast.report_lines(oof.prepared["shift"])),
        verdicts=paragraphs(verdicts), ledger=table(ledger, marked=oof.exp),
        settings=table(settings.rename_axis("setting")),
    )  # fmt: skip
    # One pass: a label that looks like a place isn't filled in.
    page = re.sub("@@(\\w+)@@", lambda place: places[place[1]], template)
    with replacing(oof.folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def notes(oof, row, picture):
    """→ the sentences under the headline; `row`: the experiment's row of the ledger."""
    limit, unreadable, few = oof.prepared["limit"], oof.prepared["unreadable"], of_folds(oof)
    scores = [f"{part} {row[part]}" for part in ("public", "private") if row[part]]
    lines = {
        f"{oof.config['model']}, {row.date}, settings: {row.settings or 'the default ones'}": True,
        f"only {few} are finished": few,
        f"a quick look: 00_prepare.py --limit {limit}": limit,
        f"{len(unreadable)} unreadable images are grey: {listing(unreadable)}": unreadable,
        f"leaderboard: {', '.join(scores)}": scores,
        "no cache of the training images is at hand, so none is shown": picture(0) is None,
    }
    return [line for line, holds in lines.items() if holds]


def pictures(args, oof):
    """→ a function: row of oof.folds → that training image at the smallest size in the cache, or None without one."""
    _, folds = read_prepared(args)
    rows = np.flatnonzero(folds.fold.isin(oof.present))
    for size in sorted(oof.prepared["sizes"]):
        if (prepared_folder(args) / f"train_{size}.npy").exists():
            images = open_images(args, oof.prepared, "train", size, len(folds))
            return lambda row: images[rows[row]]
    return lambda row: None


# ---------------------------------------------------------------- pieces of HTML

text = html.escape  # every name, label and message goes through it


def table(frame, marked=None):
    """An HTML table of a pandas table and its index; every cell is escaped here. The row `marked` stands out."""
    head = "".join(f"<th>{text(str(cell))}</th>" for cell in [frame.index.name or "", *frame.columns])
    body = ""
    for name, *cells in frame.itertuples():
        cells = [f"{cell:.4f}" if isinstance(cell, float) else text(str(cell)) for cell in [name, *cells]]
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        body += f"<tr{' class=marked' if name == marked else ''}>{row}</tr>"
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def paragraphs(lines):
    return "".join(f"<p>{text(line)}</p>" for line in lines)


def thumbnail(image, *lines):
    """A small JPEG of uint8 [S, S, 3] RGB inside the page, with its caption; None for an image that isn't at hand."""
    picture = '<div class="none"></div>'
    if image is not None:
        small = cv2.resize(np.ascontiguousarray(image), (THUMB, THUMB), interpolation=cv2.INTER_AREA)
        data = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()
        picture = f'<img alt="{text(lines[0])}" src="data:image/jpeg;base64,{base64.b64encode(data).decode()}">'
    caption = "".join(f"<span>{text(line)}</span>" for line in lines)
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def thumbnails(items):
    return f'<div class="thumbs">{"".join(items)}</div>'


# ---------------------------------------------------------------- the threshold


def counts_above(targets, probabilities, classes):
    """How many images of a class, and of the others, have a probability of it above each threshold 0, 1/steps … 1.

    → dict(classes, steps, totals [C][2], above [C][2][steps + 1]): C = 1 for two classes (the second), else all.
    """
    steps = 1000 if len(classes) <= 10 else 100
    thresholds = np.arange(steps + 1) / steps
    chosen = [1] if len(classes) == 2 else range(len(classes))
    totals, above = [], []
    for c in chosen:
        parts = [np.sort(probabilities[targets == c, c]), np.sort(probabilities[targets != c, c])]
        totals.append([len(part) for part in parts])
        above.append([(len(part) - np.searchsorted(part, thresholds, "right")).tolist() for part in parts])
    return dict(classes=[classes[c] for c in chosen], steps=steps, totals=totals, above=above)


def threshold(targets, probabilities, classes):
    """The places of the confusion matrix that the reader can move; without JavaScript it stays at one half."""
    counts = counts_above(targets, probabilities, classes)
    half = counts["steps"] // 2
    (positives, negatives), (tp, fp) = counts["totals"][0], [part[half] for part in counts["above"][0]]
    numbers = dict(steps=counts["steps"], half=half, tp=tp, fn=positives - tp, fp=fp, tn=negatives - fp)
    return {key: str(value) for key, value in numbers.items()} | dict(
        counts=json.dumps(counts).replace("<", "\\u003c"),
        menu="hidden" if len(classes) == 2 else "",
        options="".join(f"<option value={i}>{text(label)}</option>" for i, label in enumerate(counts["classes"])),
        positive=text(counts["classes"][0]),
        rest=text(classes[0]) if len(classes) == 2 else "another class",
    )


# ---------------------------------------------------------------- the images


def mistakes(oof, picture):
    """The images whose own label was given the least probability, among those wrongly predicted."""
    folds, probabilities, targets = oof.folds, oof.probabilities, oof.targets
    own, predicted = probabilities[np.arange(len(targets)), targets], probabilities.argmax(axis=1)
    wrong = np.flatnonzero(predicted != targets)
    worst = wrong[np.argsort(own[wrong], kind="stable")][:MOST_MISTAKES]
    items = [
        thumbnail(
            picture(i), folds.image_name[i], f"label {folds.label[i]}: {own[i]:.3f}",
            f"predicted {oof.prepared['classes'][predicted[i]]}: {probabilities[i, predicted[i]]:.3f}",
            f"fold {folds.fold[i]}, group {folds.group[i]}",
        ) for i in worst
    ]  # fmt: skip
    count = f"{len(wrong)} of {len(targets)} images are predicted wrongly."
    if len(wrong):
        count += f" These {len(worst)} are the most confident mistakes: hard images, or wrong labels."
    return paragraphs([count]) + thumbnails(items)


def group_figures(oof, words, groups, picture):
    """How many groups there are, and the thumbnails of the first ones, each group under its heading."""
    folds, rest = oof.folds, f", {MOST_GROUPS} shown" if len(groups) > MOST_GROUPS else ""
    own, parts = oof.probabilities[np.arange(len(folds)), oof.targets], []
    for group in groups[:MOST_GROUPS]:
        members = np.flatnonzero(folds.group == group)
        captions = [(i, folds.image_name[i], f"label {folds.label[i]}: {own[i]:.3f}") for i in members[:MOST_IN_GROUP]]
        few = f", {MOST_IN_GROUP} shown" if len(members) > MOST_IN_GROUP else ""
        title = f"group {group}, fold {folds.fold[members[0]]}: {len(members)} training images{few}"
        items = thumbnails(thumbnail(picture(i), *lines) for i, *lines in captions)
        parts.append(f"<div><h3>{text(title)}</h3>{items}</div>")
    return paragraphs([f"{words}: {len(groups)}{rest}"]) + f'<div class="groups">{"".join(parts)}</div>'


def relatives(oof, picture):
    """→ the places `conflicts`, groups whose labels disagree, and `copies`, the largest groups."""
    labels_of, sizes = oof.folds.groupby("group").label.nunique(), oof.folds.group.value_counts(sort=False)
    conflicts = labels_of.index[labels_of > 1]
    several = sizes[sizes > 1].sort_values(ascending=False, kind="stable").index
    lines = copies.report_lines(oof.prepared["relatives"]) or [f"the groups of --groups {oof.prepared['groups']}"]
    return dict(
        conflicts=group_figures(oof, "groups whose images have different labels", conflicts, picture),
        copies=paragraphs(lines) + group_figures(oof, "groups of two or more of these images", several, picture),
    )
