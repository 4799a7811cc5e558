"""What does a person want to see? Writes report.html, a page about an experiment, and the pictures beside it.

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

from common import PREPARE, listing, open_images, prepared_folder, read_prepared, read_table, replacing
from kit import copies, figures, forecast, matched, tasks
from kit.experiment import of_folds
from kit.metrics import METRICS

MOST_MISTAKES, MOST_GROUPS, MOST_IN_GROUP = 24, 12, 8  # images or groups that are shown
THUMB = 112  # px
MOST_CHOICES = 200  # classes whose threshold the reader can move
LEDGER = "date folds metric cv cv_low cv_high last_epoch minutes public private settings".split()  # columns shown


def write(args, oof, ledger, verdicts):
    """Writes report.html, confusion.png, roc.png and curves.png into the experiment's folder.

    oof: what 02_oof.py knows of the experiment. ledger: the table of all experiments. verdicts: sentences."""
    template = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    script = template.split("<script>")[1].split("</script>")[0]
    of_classes = tasks.task_of(oof.prepared) == "classes"
    if not of_classes:  # nothing to confuse, no threshold to move
        template = re.sub("<!--classes-->.*?<!--/classes-->", "", template, flags=re.DOTALL)
    ledger, picture = ledger.set_index("experiment")[LEDGER], pictures(args, oof)
    settings = {key: json.dumps(value, ensure_ascii=False) for key, value in oof.config.items()}
    places = dict(
        hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        name=text(oof.exp), headline=text(oof.headline), interval=text(oof.interval),
        notes=paragraphs(notes(oof, ledger.loc[oof.exp], picture)), scores=table(oof.score_table),
        folds=table(oof.fold_table), metric=text(METRICS[oof.prepared["metric"]].name),
        mistakes=mistakes(oof, picture), forecast=likeness(args, oof),
        verdicts=paragraphs(verdicts), ledger=table(ledger, marked=oof.exp),
        settings=table(pd.Series(settings, name="value").rename_axis("setting").to_frame()),
        each="" if of_classes else each(oof), **relatives(args, oof, picture),
        **(threshold(oof.targets, oof.probabilities, oof.prepared["classes"]) if of_classes else {}),
        **figures.draw_all(oof.folder, oof.prepared, oof.folds, oof.targets, oof.probabilities, oof.epochs),
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


def thumbnails(oof, picture, rows):
    """Small JPEGs of the images in these rows of oof.folds. A caption: name, label, prediction, fold and group."""
    figures = ""
    for i in rows:
        image = oof.folds.loc[i]
        lines = [image.image_name, *answers(oof, i), f"fold {image.fold}, group {image.group}"]
        caption, shown = "".join(f"<span>{text(line)}</span>" for line in lines), '<div class="none"></div>'
        if (pixels := picture(i)) is not None:
            small = cv2.resize(np.ascontiguousarray(pixels), (THUMB, THUMB), interpolation=cv2.INTER_AREA)
            data = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()
            shown = f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(data).decode()}">'
        figures += f"<figure>{shown}<figcaption>{caption}</figcaption></figure>"
    return f'<div class="thumbs">{figures}</div>'


def answers(oof, i):
    """→ two lines: what is right for the image in row i of oof.folds, and what was predicted."""
    classes, p, label, task = (
        oof.prepared["classes"],
        oof.probabilities[i],
        oof.folds.label[i],
        tasks.task_of(oof.prepared),
    )
    if task == "numbers":
        return f"target {label}", f"predicted {' '.join(f'{value:.4g}' for value in p[:5])}"
    if task == "labels":
        likely = [f"{classes[c]} {p[c]:.2f}" for c in np.argsort(-p)[:3]]
        return f"labels {label or 'none'}", f"predicted {', '.join(likely)}"
    predicted = p.argmax()
    return f"label {label}: {p[oof.targets[i]]:.3f}", f"predicted {classes[predicted]}: {p[predicted]:.3f}"


def each(oof):
    """A section with a row for each label or number."""
    rows = table(tasks.table_of_each(oof.prepared, oof.targets, oof.probabilities))
    return f"<section><h2>Each {tasks.TASKS[tasks.task_of(oof.prepared)].noun}</h2>{rows}</section>"


def threshold(targets, probabilities, classes):
    """The places of the confusion matrix that the reader can move; without JavaScript it stays at one half.

    The script gets, for the second of two classes or each of more, how many images of the class, and how many others,
    there are (totals [C][2]), and have a probability above each threshold 0, 1/steps … 1 (above [C][2][steps + 1])."""
    two, steps = len(classes) == 2, 1000 if len(classes) <= 10 else 100
    thresholds, totals, above = np.arange(steps + 1) / steps, [], []
    commonest = np.sort(np.argsort(-np.bincount(targets, minlength=len(classes)), kind="stable")[:MOST_CHOICES])
    for c in [1] if two else commonest:
        parts = [np.sort(probabilities[targets == c, c]), np.sort(probabilities[targets != c, c])]
        totals.append([len(part) for part in parts])
        above.append([(len(part) - np.searchsorted(part, thresholds, "right")).tolist() for part in parts])
    names, half = classes[1:] if two else [classes[c] for c in commonest], steps // 2
    (positives, negatives), (tp, fp) = totals[0], [part[half] for part in above[0]]
    numbers = dict(steps=steps, half=half, tp=tp, fn=positives - tp, fp=fp, tn=negatives - fp)
    return {key: str(value) for key, value in numbers.items()} | dict(
        counts=json.dumps(dict(classes=names, steps=steps, totals=totals, above=above)).replace("<", "\\u003c"),
        menu="hidden" if two else "", positive=text(names[0]), rest=text(classes[0]) if two else "another class",
        options="".join(f"<option value={i}>{text(label)}</option>" for i, label in enumerate(names)),
    )  # fmt: skip


def mistakes(oof, picture):
    """The images whose own label was given the least probability, among those wrongly predicted; of labels and numbers,
    those with the largest loss or distance."""
    task = tasks.task_of(oof.prepared)
    if task != "classes":
        unit = [tasks.to_unit(oof.prepared, part) for part in (oof.targets, oof.probabilities)]
        losses = np.abs(unit[0] - unit[1]) if task == "numbers" else log_losses(*unit)
        loss = np.nansum(losses, axis=1) / np.maximum(1, np.isfinite(losses).sum(axis=1))
        worst = np.argsort(-loss, kind="stable")[:MOST_MISTAKES]
        return paragraphs(
            [f"The {len(worst)} images with the largest errors, hard ones or wrong labels:"]
        ) + thumbnails(oof, picture, worst)
    wrong = np.flatnonzero(oof.probabilities.argmax(axis=1) != oof.targets)
    own = oof.probabilities[wrong, oof.targets[wrong]]
    worst = wrong[np.argsort(own, kind="stable")][:MOST_MISTAKES]
    count = f"{len(wrong)} of {len(oof.targets)} images are predicted wrongly."
    what = f"The {len(worst)} most confident mistakes, hard images or wrong labels:"
    return paragraphs([count, what]) + thumbnails(oof, picture, worst)


def log_losses(targets, probabilities):
    return -np.log(np.clip(np.where(targets > 0.5, probabilities, 1 - probabilities), 1e-15, 1))


def likeness(args, oof):
    """What is known of the test set: the forecast, the ladder with its picture, adversarial validation."""
    ladder, path = oof.prepared.get("ladder"), prepared_folder(args) / "matched.png"
    lines = [*oof.forecast, *matched.report_lines(ladder), *forecast.report_lines(oof.prepared["shift"])]
    if not ladder or not path.exists():
        return paragraphs(lines)
    data = cv2.imencode(".jpg", cv2.imread(str(path)), [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()
    picture = f'<div class="sheet"><img alt="" src="data:image/jpeg;base64,{base64.b64encode(data).decode()}"></div>'
    return paragraphs(lines) + picture + rung_table(ladder, METRICS[oof.prepared["metric"]].name)


def rung_table(ladder, metric):
    """The rungs that match about as well as the best, and the plain folds; the chosen one stands out."""
    rungs = pd.DataFrame([rung for rung in ladder if rung["alike"] or not rung["clusters"]]).set_index("name")
    columns = dict(similarity="similarity, held out", test_similarity="in the test set", distance="distance")
    columns["score"] = f"{metric} of a ridge regression"
    shown = rungs[[*columns]].rename(columns=columns).rename_axis("folds")
    return table(shown, marked=rungs.index[rungs.chosen][0])


def relatives(args, oof, picture):
    """→ the places `conflicts`, groups whose labels disagree, and `copies`, the largest groups: of copies where
    00_prepare.py looked for them, else those that the user gave."""
    images, path = oof.folds[["image_name", "label", "group"]], prepared_folder(args) / "duplicates.csv"
    if oof.prepared["relatives"] and path.exists():
        copied = read_table(path, PREPARE)
        group_of = copied[copied.part == "train"].set_index("image_name").group
        images = images.assign(group=images.image_name.map(group_of)).dropna().astype(dict(group=int))
    groups = images.groupby("group").label.agg(labels="nunique", images="size")
    conflicts, several = groups[groups.labels > 1], groups[groups.images > 1]
    largest = several.sort_values("images", ascending=False, kind="stable")
    lines = copies.report_lines(oof.prepared["relatives"]) or [f"the groups of --groups {oof.prepared['groups']}"]
    words = "groups whose images have different labels: a label is wrong, or the group is"
    return dict(
        conflicts=group_figures(oof, words, images.group, conflicts.index, picture),
        copies=paragraphs(lines)
        + group_figures(oof, "groups of two or more of these images", images.group, largest.index, picture),
    )


def group_figures(oof, words, group, groups, picture):
    """How many `groups` there are, and the thumbnails of the first ones, each group under its heading. group: that of
    each row of oof.folds, a row that has none left out."""
    shown, parts = groups[:MOST_GROUPS], ""
    for shown_group in shown:
        members = group.index[group == shown_group]
        some = members[:MOST_IN_GROUP]
        title = text(f"group {shown_group}: {len(some)} of {len(members)} training images")
        parts += f"<div><h3>{title}</h3>{thumbnails(oof, picture, some)}</div>"
    return paragraphs([f"{words}: {len(groups)}, {len(shown)} shown"]) + f'<div class="groups">{parts}</div>'
