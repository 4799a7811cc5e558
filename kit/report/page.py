"""report.html, a page about an experiment.

The page needs no network and forbids itself any (its Content-Security-Policy). Names and labels come from strangers'
files: each goes through html.escape or matplotlib's own escaping. kit/report/page.html is the page's text.
"""

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import pandas as pd

from common import PREPARE, listing, read_table, replacing
from kit.experiment import Oof
from kit.folds import duplicates, matching, shift
from kit.report import figures, gallery
from kit.report.html import Pictures, jpeg, paragraphs, table, text, thumbs
from kit.score import label_errors
from kit.score.metrics import METRICS

MOST_GROUPS, MOST_IN_GROUP = 12, 8  # groups, and images of each, that are shown
FEW_CLASSES = 10  # of more, the confusion matrix is as wide as the page
SHEET = 1500  # px of matched.png's longer side, which may be taller
LEDGER = "date folds metric cv cv_low cv_high last_epoch minutes public private settings".split()  # columns shown


@dataclass(eq=False)
class Evaluation:
    """What 02_oof.py found about an experiment."""

    oof: Oof
    epochs: pd.DataFrame  # foldK_epochs.csv of the finished folds, with a column `fold`
    submitted: str  # what is submitted: "best epoch", "d4 views" …
    score_table: pd.DataFrame  # a row for the best epoch, the last one, what is submitted; cells with intervals
    fold_table: pd.DataFrame  # a row for each finished fold
    cv: dict[str, float]  # cv, cv_low, cv_high, mean_of_folds, last_epoch: columns of experiments.csv
    forecast: list[str]  # sentences on the leaderboard, or none
    headline: str  # the metric's name and the CV
    interval: str  # of the CV, and how it was computed
    heatmaps: dict = field(default_factory=dict)  # gradcam.overlay_worst's; empty without --overlays


def write(evaluation, ledger, verdicts, evaluations):
    """Write report.html, suspects.csv, confusion.png, roc.png and curves.png into the experiment's folder.

    ledger: the table of all experiments. verdicts: sentences. evaluations: those of all experiments that 02 was given,
    this one among them."""
    oof, template = evaluation.oof, (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    script = template.split("<script>")[1].split("</script>")[0]
    if not oof.task.label_errors:
        template = re.sub("<!--label_errors-->.*?<!--/label_errors-->", "", template, flags=re.DOTALL)
    pictures, ledger = Pictures(oof), ledger.set_index("experiment")[LEDGER]
    content = texts(evaluation, ledger, verdicts) | images(evaluation, evaluations, pictures)
    content["notes"] = paragraphs(notes(oof, ledger.loc[oof.exp], pictures.available))
    content["hash"] = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # One pass: a label that looks like a placeholder isn't filled in.
    page = re.sub("@@(\\w+)@@", lambda placeholder: content[placeholder[1]], template)
    with replacing(oof.folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def texts(evaluation, ledger, verdicts):
    """Return {placeholder: HTML} of text, tables and charts."""
    oof = evaluation.oof
    settings = {key: json.dumps(value, ensure_ascii=False) for key, value in oof.config.items()}
    charts = figures.draw_all(oof, evaluation.epochs)
    return dict(
        name=text(oof.exp), headline=text(evaluation.headline), interval=text(evaluation.interval),
        scores=table(evaluation.score_table), folds=table(evaluation.fold_table),
        metric=text(METRICS[oof.prepared.metric].name), each=each(oof, charts.pop("confusion", "")),
        test_set=test_set(oof.prepared, evaluation.forecast),
        verdicts=paragraphs(verdicts), ledger=table(ledger, marked=oof.exp),
        settings=table(pd.Series(settings, name="value").rename_axis("setting").to_frame()), **charts,
    )  # fmt: skip


def images(evaluation, evaluations, pictures):
    """Return {placeholder: HTML} of images. Write suspects.csv. The browser comes last: it takes the room that is
    left."""
    oof, content = evaluation.oof, dict(mistakes=gallery.mistakes(evaluation.oof, pictures, evaluation.heatmaps))
    if oof.task.label_errors:
        suspects, by_chance = label_errors.find(oof.folds, oof.task, oof.targets, oof.predictions)
        label_errors.write(oof.folder / "suspects.csv", suspects)
        content["suspects"] = gallery.surest(oof, suspects, by_chance, pictures)
    content["compared"] = gallery.comparison(evaluation, evaluations, pictures)
    return content | duplicate_groups(oof, pictures) | gallery.browser(oof, pictures)


def notes(oof, row, images_available):
    """Return the sentences under the headline; row: the experiment's of the ledger."""
    limit, unreadable, finished = oof.prepared.limit, oof.prepared.unreadable, oof.folds_said
    scores = [f"{part} {row[part]}" for part in ("public", "private") if row[part]]
    lines = {
        f"{oof.config['model']}, {row.date}, settings: {row.settings or 'the default ones'}": True,
        f"only {finished} are finished": finished,
        f"a quick look: 00_prepare.py --limit {limit}": limit,
        f"{len(unreadable)} unreadable images are grey: {listing(unreadable)}": unreadable,
        f"leaderboard: {', '.join(scores)}": scores,
        "no cache of the training images is at hand, so none is shown": not images_available,
    }
    return [line for line, holds in lines.items() if holds]


def each(oof, confusion):
    """Return a section with a row for each label or number, or with the confusion matrix, where there is a picture."""
    rows = oof.task.table_of_each(oof.targets, oof.predictions)
    if rows is not None:
        return f"<section><h2>Each {oof.task.noun}</h2>{table(rows)}</section>"
    size = ' class="small"' if len(oof.task) <= FEW_CLASSES else ""
    return f'<section id="confusion"{size}><h2>Confusion matrix</h2>{confusion}</section>' if confusion else ""


def test_set(prepared, forecast):
    """Return what is known of the test set: the forecast, the folds compared with it, adversarial validation."""
    candidates, path = prepared.candidates, prepared.folder / "matched.png"
    lines = [*forecast[1:], *matching.matching_lines(candidates), *shift.shift_lines(prepared.shift)]
    words = "".join(f'<p class="interval">{text(line)}</p>' for line in forecast[:1]) + paragraphs(lines)
    sheet = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB) if candidates and path.exists() else None
    if sheet is None:  # also where the picture is damaged: 02 is about scores
        return words
    picture = f'<div class="sheet"><img alt="" src="{jpeg(sheet, SHEET)}"></div>'
    return words + picture + candidate_table(candidates, METRICS[prepared.metric].name)


def candidate_table(candidates, metric):
    """Return a table of the plain folds and the chosen ones, which stand out."""
    rows = [candidate for candidate in candidates if candidate["chosen"] or not candidate["clusters"]]
    columns = dict(similarity="similarity, held out", test_similarity="in the test set", distance="distance")
    columns["score"] = f"{metric} of a ridge regression"
    frame = pd.DataFrame(rows).set_index("name")[[*columns]].rename(columns=columns).rename_axis("folds")
    return table(frame, marked=next(row["name"] for row in rows if row["chosen"]))


def duplicate_groups(oof, pictures):
    """Return `conflicts`, groups whose labels disagree, and `duplicates`, the largest groups: groups of duplicates
    where 00_prepare.py searched for them, else those that the user gave."""
    prepared, members = oof.prepared, oof.folds[["image_name", "label", "group"]]
    lines, path = [f"the groups of --groups {prepared.groups}"], prepared.folder / "duplicates.csv"
    if prepared.duplicates:
        lines = duplicates.duplicate_lines(prepared.duplicates)
        rows = read_table(path, PREPARE)
        group_of = rows[rows.part == "train"].set_index("image_name").group
        members = members.assign(group=members.image_name.map(group_of)).dropna().astype(dict(group=int))
    groups = members.groupby("group").label.agg(labels="nunique", images="size")
    conflicts, several = groups[groups.labels > 1], groups[groups.images > 1]
    largest = several.sort_values("images", ascending=False, kind="stable")
    conflict = "groups whose images have different labels: a label is wrong, or the group is"
    several = "groups of two or more of these images"
    return dict(
        conflicts=group_figures(oof, conflict, members.group, conflicts.index, pictures),
        duplicates=paragraphs(lines) + group_figures(oof, several, members.group, largest.index, pictures),
    )


def group_figures(oof, words, group, groups, pictures):
    """Return how many `groups` there are, and the thumbnails of the first ones, each group under its heading. group:
    that of each row of oof.folds, without the rows that have none."""
    shown, parts = groups[:MOST_GROUPS], ""
    for number in shown:
        rows = group.index[group == number]
        first = rows[:MOST_IN_GROUP]
        title = text(f"group {number}: {len(first)} of {len(rows)} training images")
        walls = (pictures.figure(i, [*gallery.answers(oof, i), gallery.fold_and_group(oof, i)]) for i in first)
        parts += f"<div><h3>{title}</h3>{thumbs(walls)}</div>"
    return paragraphs([f"{words}: {len(groups)}, {len(shown)} shown"]) + f'<div class="groups">{parts}</div>'
