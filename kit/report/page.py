"""What does a person want to see? Writes report.html, a page about an experiment, and the pictures beside it.

The page needs no network and forbids itself any (its Content-Security-Policy). Names and labels come from strangers'
files: each goes through html.escape, json or matplotlib's own escaping. kit/report/page.html is the page's text.
"""

import base64
import hashlib
import json
import re
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from common import PREPARE, listing, prepared_folder, read_table, replacing
from kit.experiment import of_folds
from kit.folds import duplicates, matching, shift
from kit.report import figures, gallery
from kit.report.html import Pictures, jpeg, paragraphs, table, text, thumbs
from kit.score import label_errors, tasks
from kit.score.metrics import METRICS

MOST_GROUPS, MOST_IN_GROUP = 12, 8  # groups, and images of each, that are shown
SHEET = 1500  # px of matched.png's longer side, which may be taller
MOST_CHOICES = 200  # classes whose threshold the reader can move
LEDGER = "date folds metric cv cv_low cv_high last_epoch minutes public private settings".split()  # columns shown


def write(args, oof, ledger, verdicts, oofs):
    """Writes report.html, suspects.csv, confusion.png, roc.png and curves.png into the experiment's folder.

    oof: what 02_oof.py knows of the experiment. ledger: the table of all experiments. verdicts: sentences. oofs: all
    experiments that 02 was given, this one among them."""
    template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    script = template.split("<script>")[1].split("</script>")[0]
    task = tasks.task_of(oof.prepared)
    for part in {"classes", "suspects"} - {"classes": {"classes", "suspects"}, "labels": {"suspects"}}.get(task, set()):
        template = re.sub(f"<!--{part}-->.*?<!--/{part}-->", "", template, flags=re.DOTALL)
    pictures, ledger = Pictures(args, oof), ledger.set_index("experiment")[LEDGER]
    places = words(args, oof, ledger, verdicts) | shown(args, oof, oofs, pictures)
    places["notes"] = paragraphs(notes(oof, ledger.loc[oof.exp], pictures.there))
    places["hash"] = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # One pass: a label that looks like a place isn't filled in.
    page = re.sub("@@(\\w+)@@", lambda place: places[place[1]], template)
    with replacing(oof.folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def words(args, oof, ledger, verdicts):
    """→ the places that hold text, tables and drawings."""
    of_classes = tasks.task_of(oof.prepared) == "classes"
    settings = {key: json.dumps(value, ensure_ascii=False) for key, value in oof.config.items()}
    return dict(
        name=text(oof.exp), headline=text(oof.headline), interval=text(oof.interval),
        scores=table(oof.score_table), folds=table(oof.fold_table), metric=text(METRICS[oof.prepared["metric"]].name),
        forecast=likeness(args, oof), verdicts=paragraphs(verdicts), ledger=table(ledger, marked=oof.exp),
        settings=table(pd.Series(settings, name="value").rename_axis("setting").to_frame()),
        each="" if of_classes else each(oof),
        **(threshold(oof.targets, oof.probabilities, oof.prepared["classes"]) if of_classes else {}),
        **figures.draw_all(oof.folder, oof.prepared, oof.folds, oof.targets, oof.probabilities, oof.epochs),
    )  # fmt: skip


def shown(args, oof, oofs, pictures):
    """→ the places that hold images. Writes suspects.csv. The browser comes last: it takes the room that is left."""
    places = dict(mistakes=gallery.mistakes(oof, pictures, oof.overlays))
    if tasks.task_of(oof.prepared) != "numbers":
        found, by_chance = label_errors.find(oof)
        label_errors.write(oof, found)
        places["suspects"] = gallery.suspected(oof, found, by_chance, pictures)
    places["compared"] = gallery.section(oof, oofs, pictures)
    return places | relatives(args, oof, pictures) | gallery.browser(oof, pictures)


def notes(oof, row, there):
    """→ the sentences under the headline; row: the experiment's of the ledger; there: whether
    its images are."""
    limit, unreadable, few = oof.prepared["limit"], oof.prepared["unreadable"], of_folds(oof)
    scores = [f"{part} {row[part]}" for part in ("public", "private") if row[part]]
    lines = {
        f"{oof.config['model']}, {row.date}, settings: {row.settings or 'the default ones'}": True,
        f"only {few} are finished": few,
        f"a quick look: 00_prepare.py --limit {limit}": limit,
        f"{len(unreadable)} unreadable images are grey: {listing(unreadable)}": unreadable,
        f"leaderboard: {', '.join(scores)}": scores,
        "no cache of the training images is at hand, so none is shown": not there,
    }
    return [line for line, holds in lines.items() if holds]


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


def likeness(args, oof):
    """What is known of the test set: the forecast, the ladder with its picture, adversarial validation."""
    ladder, path = oof.prepared.get("ladder"), prepared_folder(args) / "matched.png"
    lines = [*oof.forecast[1:], *matching.report_lines(ladder), *shift.report_lines(oof.prepared["shift"])]
    said = "".join(f'<p class="interval">{text(line)}</p>' for line in oof.forecast[:1]) + paragraphs(lines)
    sheet = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB) if ladder and path.exists() else None
    if sheet is None:  # also of a damaged picture: 02 is about scores
        return said
    picture = f'<div class="sheet"><img alt="" src="{jpeg(sheet, SHEET)}"></div>'
    return said + picture + rung_table(ladder, METRICS[oof.prepared["metric"]].name)


def rung_table(ladder, metric):
    """The rungs that match about as well as the best, and the plain folds; the chosen one stands out."""
    rungs = pd.DataFrame([rung for rung in ladder if rung["alike"] or not rung["clusters"]]).set_index("name")
    columns = dict(similarity="similarity, held out", test_similarity="in the test set", distance="distance")
    columns["score"] = f"{metric} of a ridge regression"
    shown = rungs[[*columns]].rename(columns=columns).rename_axis("folds")
    return table(shown, marked=rungs.index[rungs.chosen][0])


def relatives(args, oof, pictures):
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
    lines = duplicates.report_lines(oof.prepared["relatives"]) or [f"the groups of --groups {oof.prepared['groups']}"]
    words = "groups whose images have different labels: a label is wrong, or the group is"
    return dict(
        conflicts=group_figures(oof, words, images.group, conflicts.index, pictures),
        copies=paragraphs(lines)
        + group_figures(oof, "groups of two or more of these images", images.group, largest.index, pictures),
    )


def group_figures(oof, words, group, groups, pictures):
    """How many `groups` there are, and the thumbnails of the first ones, each group under its heading. group: that of
    each row of oof.folds, a row that has none left out."""
    shown, parts = groups[:MOST_GROUPS], ""
    for shown_group in shown:
        members = group.index[group == shown_group]
        some = members[:MOST_IN_GROUP]
        title = text(f"group {shown_group}: {len(some)} of {len(members)} training images")
        figures = (pictures.figure(i, [*gallery.answers(oof, i), gallery.place(oof, i)]) for i in some)
        parts += f"<div><h3>{title}</h3>{thumbs(figures)}</div>"
    return paragraphs([f"{words}: {len(groups)}, {len(shown)} shown"]) + f'<div class="groups">{parts}</div>'
