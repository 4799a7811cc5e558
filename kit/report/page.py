"""report.html, a page about an experiment; kit/report/page.html is its text.

The page needs no network and forbids itself any (its Content-Security-Policy). Names and labels come from strangers'
files: each goes through html.escape or matplotlib's own escaping.
"""

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from common import PREPARE, listing, read_table, replacing

import cv2
import pandas as pd

from kit.data.reading import Decision
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
    basis: str  # what the intervals rest on
    forecast: list[str]  # sentences on the leaderboard, or none
    heatmaps: dict = field(default_factory=dict)  # gradcam.overlay_worst's; empty without --overlays


def write(evaluation, ledger, verdicts, evaluations):
    """Write report.html, suspects.csv, confusion.png, roc.png and curves.png. ledger: the table of all experiments;
    verdicts: sentences; evaluations: those of all experiments that 02 was given, this one among them."""
    oof, template = evaluation.oof, (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    script = template.split("<script>")[1].split("</script>")[0]
    pictures, ledger = Pictures(oof), ledger.set_index("experiment")[LEDGER]
    content = texts(evaluation, ledger, verdicts)
    content["notes"] = paragraphs(notes(oof, ledger.loc[oof.exp], pictures.images))
    content["hash"] = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    content["mistakes"] = gallery.mistakes(oof, pictures, evaluation.heatmaps)
    if problems := oof.task.label_problems(oof.targets, oof.predictions):
        found = label_errors.write_suspects(oof.folder / "suspects.csv", oof.folds, oof.task.names, problems)
        content["suspects"] = gallery.surest(oof, *found, pictures)
    else:
        template = re.sub("<!--label_errors-->.*?<!--/label_errors-->", "", template, flags=re.DOTALL)
    content["compared"] = gallery.comparison(evaluation, evaluations, pictures)
    content |= duplicate_groups(oof, pictures)
    content |= gallery.browser(oof, pictures)  # last: it takes the room that is left
    # One pass: a label that looks like a placeholder isn't filled in.
    page = re.sub("@@(\\w+)@@", lambda placeholder: content[placeholder[1]], template)
    with replacing(oof.folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def texts(evaluation, ledger, verdicts):
    """Return {placeholder: HTML} of text, tables and charts."""
    oof, cv, metric = evaluation.oof, evaluation.cv, METRICS[evaluation.oof.prepared.metric].name
    settings = {key: json.dumps(value, ensure_ascii=False) for key, value in oof.config.items()}
    charts, rows = figures.draw_all(oof, evaluation.epochs), oof.task.table_of_each(oof.targets, oof.predictions)
    each = "" if rows is None else f"<section><h2>Each {oof.task.noun}</h2>{table(rows)}</section>"
    if "confusion" in charts:
        size = ' class="small"' if len(oof.task) <= FEW_CLASSES else ""
        each = f'<section id="confusion"{size}><h2>Confusion matrix</h2>{charts.pop("confusion")}</section>'
    return dict(
        name=text(oof.exp), headline=text(f"{metric} {cv['cv']:.4f}"), metric=text(metric),
        interval=text("95 % {cv_low:.4f} to {cv_high:.4f}, ".format(**cv) + evaluation.basis),
        scores=table(evaluation.score_table), folds=table(evaluation.fold_table),
        each=each, test_set=test_set(oof.prepared, evaluation.forecast), verdicts=paragraphs(verdicts),
        ledger=table(ledger, marked=oof.exp), **charts,
        settings=table(pd.Series(settings, name="value").rename_axis("setting").to_frame()),
        reading=table(pd.DataFrame(oof.prepared.evidence, columns=Decision._fields).set_index("topic")),
    )  # fmt: skip


def notes(oof, row, images):
    """Return the sentences under the headline; row: the experiment's of the ledger; images: None without a cache."""
    limit, unreadable, finished = oof.prepared.limit, oof.prepared.unreadable, oof.folds_text
    scores = [f"{part} {row[part]}" for part in ("public", "private") if row[part]]
    lines = {
        f"{oof.config['model']}, {row.date}, settings: {row.settings or 'the default ones'}": True,
        f"only {finished} are finished": finished,
        f"a quick look: 00_prepare.py --limit {limit}": limit,
        f"{len(unreadable)} unreadable images are grey: {listing(unreadable)}": unreadable,
        f"leaderboard: {', '.join(scores)}": scores,
        "no cache of the training images is at hand, so none is shown": images is None,
    }
    return [line for line, holds in lines.items() if holds]


def test_set(prepared, forecast):
    """Return what is known of the test set: forecast, adversarial validation, matched.png, plain and chosen folds."""
    candidates, path = prepared.candidates, prepared.folder / "matched.png"
    lines = [*forecast[1:], *matching.matching_lines(candidates), *shift.shift_lines(prepared.shift)]
    words = "".join(f'<p class="interval">{text(line)}</p>' for line in forecast[:1]) + paragraphs(lines)
    sheet = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB) if candidates and path.exists() else None
    if sheet is None:  # also where the picture is damaged: 02 is about scores
        return words
    shown = [candidate for candidate in candidates if candidate["chosen"] or not candidate["clusters"]]
    columns = dict(similarity="similarity, held out", test_similarity="in the test set", distance="distance")
    if shown[0]["score"] is not None:  # None: the metric changed since
        columns["score"] = f"{METRICS[prepared.metric].name} of a ridge regression"
    frame = pd.DataFrame(shown).set_index("name")[[*columns]].rename(columns=columns).rename_axis("folds")
    picture = f'<div class="sheet"><img alt="" src="{jpeg(sheet, SHEET)}"></div>'
    return words + picture + table(frame, marked=next(row["name"] for row in shown if row["chosen"]))


def duplicate_groups(oof, pictures):
    """Return {placeholder: HTML} of groups whose labels disagree, and of the largest groups: groups of duplicates where
    00_prepare.py searched for them, else those that the user gave."""
    prepared, members = oof.prepared, oof.folds[["image_name", "label", "group"]]
    lines = [f"the groups of --groups {prepared.groups}"]
    if prepared.duplicates:
        lines = duplicates.duplicate_lines(prepared.duplicates)
        rows = read_table(prepared.folder / "duplicates.csv", PREPARE)
        group_of = rows[rows.part == "train"].set_index("image_name").group
        members = members.assign(group=members.image_name.map(group_of)).dropna().astype(dict(group=int))
        disagree = {*rows.group[rows.labels_disagree == 1]}
    groups = members.groupby("group").label.agg(labels="nunique", images="size")
    conflicts = group_figures(
        oof, "groups whose images have different labels: a label is wrong, or the group is", members.group,
        groups.index[groups.index.isin(disagree) if prepared.duplicates else groups.labels > 1], pictures,
    )  # fmt: skip
    largest = groups[groups.images > 1].sort_values("images", ascending=False, kind="stable").index
    several = group_figures(oof, "groups of two or more of these images", members.group, largest, pictures)
    return dict(conflicts=conflicts, duplicates=paragraphs(lines) + several)


def group_figures(oof, words, group, groups, pictures):
    """Return how many `groups` there are, and thumbnails of the first. group: that of rows of oof.folds, a Series."""
    shown, parts = groups[:MOST_GROUPS], ""
    for number in shown:
        rows = group.index[group == number]
        first = rows[:MOST_IN_GROUP]
        title = text(f"group {number}: {len(first)} of {len(rows)} training images")
        parts += f"<div><h3>{title}</h3>{thumbs(pictures.figure(i, gallery.answers(oof, i)) for i in first)}</div>"
    return paragraphs([f"{words}: {len(groups)}, {len(shown)} shown"]) + f'<div class="groups">{parts}</div>'
