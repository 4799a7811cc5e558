"""What does HANDOVER.md say? Fills kit/handover.md with what is known of the experiments and of the machine."""

import os
import platform
import shlex
import string
from pathlib import Path

import torch

from common import cpu_count, file_hash, listing, read_table, warn
from kit import tasks
from kit.commands import recipe, remaking
from kit.keep import makers
from kit.metrics import METRICS


def machine():
    """→ the processor, its cores, memory and GPUs, as far as the system says."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    threads = f"{torch.get_num_threads()} threads in torch"
    return f"{name}, {cpu_count()} cores, {threads}, {memory:.0f} GiB of memory, GPU: {listing(gpus) or 'none'}"


def result_rows(args, oofs, submission):
    """→ the rows of the table of scores, from experiments.csv. Of a blend the leaderboard's score is in its own row,
    and its CV in the name of its file."""
    path = args.output / "experiments.csv"
    ledger = read_table(path, "run python 02_oof.py for each experiment", dtype=str).set_index("experiment")
    rows = []
    for name in [oof.exp for oof in oofs] + ["+".join(args.exps)] * (len(oofs) > 1):
        if name in ledger.index:
            row = ledger.loc[name].to_dict()
            cells = [row.get(key) or "" for key in ("cv", "cv_low", "cv_high", "public", "private", "minutes", "folds")]
            cv, low, high, *others = [cell if cell not in ("", "nan") else "not noted" for cell in cells]
            rows.append("| " + " | ".join([name, cv, f"{low} to {high}", *others]) + " |")
    if len(oofs) > 1:
        _, named, cv = submission.stem.rpartition("_CV")
        rows.append(f"| {submission.stem} | {cv if named else 'not noted'} | | | | | |")
    return "\n".join(rows)


def about_training(oof):
    """→ a paragraph on how an experiment was trained."""
    c, flags = oof.config, shlex.join(recipe(oof)) or "none"
    ends = "best epoch by the held-out fold" if c["keep"] == "best" else "last epoch"
    if c["tune"] == "probe":
        how = "a logistic regression on frozen features"
    else:
        how = f"{c['epochs']} epochs, batches of {c['batch_size'] * c['accumulate']}, loss `{c['loss']}`"
        how += f", optimiser `{c['optimizer']}`, learning rate {c['lr']:g} down to {c['min_lr']:g}"
        how += f", sampler `{c['sampler']}`, augmentation `{c['augment']}`, the {ends}"
    return f"- `{oof.exp}`: {how}. Seed {c['seed']}. Settings that aren't the kit's defaults: `{flags}`"


def about_model(oof):
    """→ a sentence on what predicts."""
    c, count = oof.config, oof.prepared["folds"]
    views = "" if c["tta"] == "none" else f" in the views `{c['tta']}`"
    start = "from scratch" if c["weights"] == "none" else "from pretrained weights"
    return f"- `{oof.exp}`: the mean of {count} models `{c['model']}`, one a fold, {start}, at {c['size']} px{views}."


def notes(oofs, prepared):
    """→ what the reader must know before the commands, as lines."""
    lines = []
    flags = prepared.get("flags", {})
    given = [str(part) for value in flags.values() for part in (value if isinstance(value, list) else [value])]
    own = [name for name in given if os.path.isfile(name) or (name == flags.get("groups") and name.endswith(".csv"))]
    lines += [f"**TO FILL**: 00 reads `{name}`, which isn't in this archive." for name in own]
    if "flags" not in prepared:
        lines.append("**TO FILL**: `prepared.json` is of an older version of the kit and doesn't hold the flags of 00.")
    for oof in oofs:
        kind = oof.records[oof.present[0]]["weights"]
        if kind not in ("hub", "none"):
            lines.append(f"`WEIGHTS_FILE` of `{oof.exp}` has the SHA-256 `{kind}`. **TO FILL**: where it is from.")
        if oof.config["tune"] == "probe":
            lines.append(f"`{oof.exp}` was predicted from features kept in 16 bits, which aren't in this archive: from "
                "the kept weights the last digits differ.")  # fmt: skip
        if any(record["code"] != makers("hub")["code"] for record in oof.records.values()):
            lines.append(f"Folds of `{oof.exp}` were trained by other code than this: from scratch they may differ.")
            warn(f"folds of {oof.exp} were trained by other code than this: --overwrite trains them again")
    return "".join(f"\n- {line}" for line in lines) + "\n" * bool(lines)


def document(args, oofs, every, submission, code):
    """→ the text of HANDOVER.md."""
    prepared = oofs[0].prepared
    models = sorted({oof.config["model"] for oof in oofs})
    metric, runs = METRICS[prepared["metric"]], [r.get("run", {}) for oof in every for r in oof.records.values()]
    trained = {f"{r['device']}, precision {r['amp']}, torch {r['torch']}, timm {r['timm']}" for r in runs if r}
    singles = [f"{oof.exp} fold {k} {score:.4f}" for oof in oofs for k, score in fold_scores(oof).items()]
    pretrained = {oof.config["model"] for oof in every if oof.records[oof.present[0]]["weights"] == "hub"}
    needed = f"timm downloads the pretrained weights of `{'`, `'.join(sorted(pretrained))}`." if pretrained else (
        "no pretrained weights are downloaded.")  # fmt: skip
    images = f"{len(oofs[0].folds)} training images, {listing(prepared['classes'])}; task: {tasks.task_of(prepared)}"
    places = dict(
        name=" + ".join(args.exps), exps=" ".join(map(shlex.quote, args.exps)), code=code, machine=machine(),
        python=f"Python {platform.python_version()}", metric=metric.name, results=result_rows(args, oofs, submission),
        software=f"{platform.platform()}, Python {platform.python_version()}, torch {torch.__version__}",
        trained_with="; ".join(sorted(trained)) or "not recorded", notes=notes(every, prepared),
        submission=submission.name, submission_hash=file_hash(submission), weights_source=needed,
        weights_note=" **They are not in this archive**: put them there first (`weights.csv`)." * args.no_weights,
        summary="\n".join(about_model(oof) for oof in oofs), images=images_paragraph(images, oofs),
        training="\n".join(about_training(oof) for oof in every), models="`, `".join(models),
        single_folds=listing(singles, 30), execution=execution(args, every),
    )  # fmt: skip
    text = (Path(__file__).parent / "handover.md").read_text(encoding="utf-8")
    return string.Template(text).substitute(places | remaking(args, oofs, every, submission))


def fold_scores(oof):
    """→ {fold: the score of its held-out images, by the kept weights without views}."""
    return {fold: record["scores"][oof.prepared["metric"]] for fold, record in oof.records.items()}


def images_paragraph(images, oofs):
    sizes = listing(sorted({oof.config["size"] for oof in oofs}))
    return (
        f"{images}. The network sees the pixels alone: no features were made by hand. Images are resized once to "
        f"{sizes} px; folds keep together what `output/prepared/folds.csv` calls a group."
    )


def execution(args, oofs):
    """→ the minutes of training of each experiment, from its epochs."""
    lines = []
    for oof in oofs:
        tables = [read_table(oof.folder / f"fold{k}_epochs.csv", "train it again", dtype=None) for k in oof.present]
        minutes = sum(table.seconds.sum() for table in tables) / 60
        lines.append(f"- `{oof.exp}`: {minutes:.1f} minutes of training for {len(tables)} folds")
    return "\n".join([*lines, "- inference on the test set: **TO FILL**"])
