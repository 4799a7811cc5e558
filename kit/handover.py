"""Puts into one zip what winners hand in: code, settings, models, scores, and the commands that remake the submission.

    python -m kit.handover base                             # or make handover EXP=base
    python -m kit.handover base convnext --infer "--blend rank"     # a blend, as 03_infer.py made it
    python -m kit.handover base --no-weights                # the models are listed, by hash, and left out

Reads OUTPUT/EXP of finished experiments that 02_oof.py has scored, their submission, and OUTPUT/prepared. Writes
OUTPUT/handover_EXP.zip; HANDOVER.md in it (kit/handover.md) says what is there and how it is used.
"""

import csv
import importlib.metadata
import io
import os
import platform
import shlex
import string
import subprocess
import zipfile
from pathlib import Path

import torch

import common
from common import Parser, UserError, cpu_count, file_hash, listing, prepared_folder, read_table, replacing, say, warn
from kit import tasks
from kit.experiment import of_folds, read_oof
from kit.keep import makers
from kit.metrics import METRICS

ROOT = Path(__file__).parent.parent
# the kit's files where it isn't a git checkout
OF_KIT = (
    "*.py *.md *.sh *.toml *.txt *.lock Makefile LICENSE kit/* recipes/* docs/* notebooks/* slurm/* tests/*.py "
    "tests/*/* input/make_demo.py"
).split()
OF_FOLD = "fold{}.json fold{}.csv fold{}_epochs.csv fold{}_logits.npy".split()  # the last of many classes alone
OF_PREPARED = "prepared.json folds.csv test.csv sample.csv duplicates.csv".split()
STORED = (".pt", ".npy", ".png")  # hardly smaller when compressed


def make_parser():
    parser = Parser(__doc__)
    parser.add_argument("exps", nargs="*", default=["base"], metavar="EXP", help="the experiment, or those of a blend")
    parser.add_argument("--no-weights", action="store_true", help="list the models' hashes and leave them out")
    parser.add_argument("--infer", default="", metavar="FLAGS", help="the flags that 03_infer.py had, in quotes")
    parser.add_argument("--submission", type=Path, metavar="FILE", help="the submission (default: that of 03_infer.py)")
    return parser


# ---------------------------------------------------------------- what is handed over


def read_experiments(args):
    """→ what read_oof gives of each experiment. Raises UserError where folds or scores are missing."""
    oofs = [read_oof(args, exp) for exp in args.exps]
    for oof in oofs:
        if oof.missing:
            train = f"python 01_train_fold.py --exp {oof.exp} --fold {' '.join(map(str, oof.missing))}"
            raise UserError(f"{oof.folder} has {of_folds(oof)}: {train}, with its other flags")
        if not all((oof.folder / name).exists() for name in ("oof.csv", "report.html")):
            raise UserError(f"{oof.folder} has no oof.csv and report.html: run python 02_oof.py {oof.exp}")
    return oofs


def with_starts(args, oofs):
    """→ the experiments, each behind the one whose folds were its start (--init EXP), if any."""
    every = {}
    for oof in oofs:
        if (start := oof.config["init"]) not in ("weights", "probe"):
            every |= {before.exp: before for before in with_starts(args, [read_oof(args, start)])}
        every[oof.exp] = oof
    return [*every.values()]


def find_submission(args, oofs):
    """→ the path of the submission. Raises UserError where there is none."""
    if args.submission:
        if not args.submission.is_file():
            raise UserError(f"--submission {args.submission} is no file: run python 03_infer.py {' '.join(args.exps)}")
        return args.submission
    folder = oofs[0].folder if len(oofs) == 1 else args.output
    between = "_*" if args.infer else ""
    found = [*folder.glob(f"submission_{'+'.join(args.exps)}{between}_CV*.csv")]
    if not found:
        command = f"python 03_infer.py {' '.join(args.exps)} {args.infer}".strip()
        raise UserError(f"{folder} has no submission of {' '.join(args.exps)}: run {command}, or see --submission")
    newest = max(found, key=lambda path: path.stat().st_mtime)
    if len(found) > 1:
        warn(f"{len(found)} submissions in {folder}: the newest is taken, {newest.name}; --submission names another")
    return newest


def git(*command):
    """→ what git says about the kit's folder, as a list of lines; None where it is no checkout."""
    try:
        result = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True)
    except OSError:  # no git
        return None
    return result.stdout.splitlines() if result.returncode == 0 else None


def code_files(args):
    """→ ([paths in the kit], a sentence about them, the difference from the commit as text or None). The files are the
    commit's or, where the tree differs from it, those that lie there."""
    commit = git("rev-parse", "HEAD")
    if commit is None:
        files = sorted({path for pattern in OF_KIT for path in ROOT.glob(pattern)})
        return [path for path in files if path.is_file()], "the kit's files as they lay there (no git checkout)", None
    apart = [folder.resolve() for folder in (args.output, args.input)]
    names = git("-c", "core.quotePath=off", "ls-files", "--cached", "--others", "--exclude-standard")
    tracked = {*git("-c", "core.quotePath=off", "ls-files")}
    paths = [ROOT / name for name in names]
    paths = [p for p in paths if p.is_file() and (not {*p.parents} & {*apart} or str(p.relative_to(ROOT)) in tracked)]
    changes = git("status", "--porcelain", "--", ".")
    if not changes:
        return paths, f"git commit {commit[0]}", None
    warn(f"the kit differs from commit {commit[0][:12]} in {len(changes)} files: the zip has them, and changes.diff")
    about = f"git commit {commit[0]} with changes (`changes.diff`; new files lie beside the others)"
    return paths, about, "\n".join(git("diff", "HEAD")) + "\n"


def weight_rows(args, oofs):
    """→ rows of weights.csv: [file, bytes, SHA-256, whether it is in the zip]; what the training began with comes last,
    as far as it is known."""
    rows = [["file", "bytes", "sha256", "in_archive"]]
    for oof in oofs:
        for fold in oof.present:
            path = oof.folder / f"fold{fold}.pt"
            where = f"output/{oof.exp}/{path.name}"
            rows.append([where, path.stat().st_size, file_hash(path), "no" if args.no_weights else "yes"])
    for oof in oofs:
        kind = oof.records[oof.present[0]]["weights"]
        if kind == "hub":
            rows.append([f"timm {oof.config['model']} (pretrained)", "", "", "no"])
        elif kind != "none":
            rows.append([f"{oof.config['model']}: the file of --weights", "", kind, "no"])
    return rows


# ---------------------------------------------------------------- the commands


def flag_words(settings):
    """→ the words of a command line that give these settings: {'lr': 0.001, 'init': 'probe'} → ['--lr', '0.001', …]"""
    words = []
    for key, value in settings.items():
        flag = f"--{key.replace('_', '-')}"
        if isinstance(value, dict):
            value = [f"{name}={part}" for name, part in value.items()]
        if isinstance(value, str) and value.startswith("-"):
            words.append(f"{flag}={value}")
        elif value is not None and value is not False:
            parts = value if isinstance(value, list) else [value]
            words += [flag] if value is True else [flag, *map(str, parts)]
    return words


def command(*words):
    return f"python {shlex.join(map(str, words))}"


def recipe(oof):
    """→ the flags of 01 that aren't the defaults, as words; precision too, where a GPU chose it."""
    record, settings = oof.records[oof.present[0]], dict(oof.config["changed"])
    if record["weights"] not in ("hub", "none"):
        settings["weights"] = "WEIGHTS_FILE"
    return flag_words(settings | precision(record))


def precision(record):
    run = record.get("run", {})
    return {} if run.get("device", "cpu") == "cpu" else dict(amp=run["amp"])


def prepare_commands(prepared, oofs, *folders):
    """→ the commands of 00, one for each size of the images, the first as it was given."""
    flags = prepared.get("flags")
    if flags is None:  # of an older version of the kit
        flags = dict(metric=prepared["metric"], folds=prepared["folds"], seed=prepared["seed"])
        flags |= dict(limit=prepared["limit"], size=prepared["sizes"][0])
    first = flags.get("size", 448)
    sizes = dict.fromkeys([first, *sorted({oof.config["size"] for oof in oofs})])
    return [command("00_prepare.py", *flag_words(flags | dict(size=size)), *folders) for size in sizes]


def infer_command(args, oofs, *folders):
    how = flag_words(precision(oofs[0].records[oofs[0].present[0]]))
    return command("03_infer.py", *args.exps, *shlex.split(args.infer), *how, *folders)


def commands(args, oofs, every, submission):
    """→ {place in handover.md: the shell commands} that remake the submission in two ways."""
    prepared, blend = oofs[0].prepared, len(oofs) > 1
    target = submission.name if blend else f"{oofs[0].exp}/{submission.name}"
    kept = [*prepare_commands(prepared, oofs), infer_command(args, oofs)]
    scratch = prepare_commands(prepared, every, "--output", "scratch")
    for oof in every:
        train = "01_train_fold.py", "--fold", "all", "--exp", oof.exp, *recipe(oof), "--output", "scratch"
        scratch.append(command(*train))
    scratch += [command("02_oof.py", *args.exps, "--output", "scratch")]
    scratch += [infer_command(args, oofs, "--output", "scratch")]
    compare = ["cmp", f"submission/{submission.name}"]
    return dict(
        from_weights="\n".join([*kept, shlex.join([*compare, f"output/{target}"])]),
        from_scratch="\n".join([*scratch, shlex.join([*compare, f"scratch/{target}"])]),
    )


# ---------------------------------------------------------------- HANDOVER.md


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


def installed():
    """→ ['name==version', …] of all packages that this Python sees."""
    found = {(d.name, d.version) for d in importlib.metadata.distributions()}
    return sorted((f"{name}=={version}" for name, version in found if name), key=str.lower)


def result_rows(args, oofs):
    """→ the rows of the table of scores, from experiments.csv. Of a blend the leaderboard's score is in its own row."""
    path = args.output / "experiments.csv"
    ledger = read_table(path, "run python 02_oof.py for each experiment", dtype=str).set_index("experiment")
    rows = []
    for name in [oof.exp for oof in oofs] + ["+".join(args.exps)] * (len(oofs) > 1):
        if name in ledger.index:
            row = ledger.loc[name].to_dict()
            cells = [row.get(key) or "" for key in ("cv", "cv_low", "cv_high", "public", "private", "minutes", "folds")]
            cv, low, high, *others = [cell if cell not in ("", "nan") else "not noted" for cell in cells]
            rows.append("| " + " | ".join([name, cv, f"{low} to {high}", *others]) + " |")
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
    if "flags" not in prepared:
        lines.append("**TO FILL**: `prepared.json` is of an older version of the kit and doesn't hold the flags of 00.")
    for oof in oofs:
        kind = oof.records[oof.present[0]]["weights"]
        if kind not in ("hub", "none"):
            lines.append(f"`WEIGHTS_FILE` of `{oof.exp}` has the SHA-256 `{kind}`. **TO FILL**: where it is from.")
        if any(record["code"] != makers("hub")["code"] for record in oof.records.values()):
            lines.append(f"Folds of `{oof.exp}` were trained by other code than this: from scratch they may differ.")
            warn(f"folds of {oof.exp} were trained by other code than this: --overwrite trains them again")
    return "".join(f"\n- {line}" for line in lines) + "\n" * bool(lines)


def document(args, oofs, every, submission, code):
    """→ the text of HANDOVER.md."""
    prepared = oofs[0].prepared
    metric, runs = METRICS[prepared["metric"]], [r.get("run", {}) for oof in every for r in oof.records.values()]
    trained = {f"{r['device']}, precision {r['amp']}, torch {r['torch']}, timm {r['timm']}" for r in runs if r}
    singles = [f"{oof.exp} fold {k} {score:.4f}" for oof in oofs for k, score in fold_scores(oof).items()]
    pretrained = {oof.config["model"] for oof in every if oof.records[oof.present[0]]["weights"] == "hub"}
    needed = f"timm downloads the pretrained weights of `{'`, `'.join(sorted(pretrained))}`." if pretrained else (
        "no pretrained weights are downloaded.")  # fmt: skip
    images = f"{len(oofs[0].folds)} training images, {listing(prepared['classes'])}; task: {tasks.task_of(prepared)}"
    places = dict(
        name=" + ".join(args.exps), exps=" ".join(map(shlex.quote, args.exps)), code=code, machine=machine(),
        python=f"Python {platform.python_version()}", metric=metric.name, results=result_rows(args, oofs),
        software=f"{platform.platform()}, Python {platform.python_version()}, torch {torch.__version__}",
        trained_with="; ".join(sorted(trained)) or "not recorded", notes=notes(every, prepared),
        submission=submission.name, submission_hash=file_hash(submission), weights_source=needed,
        weights_note=" **They are not in this archive**: put them there first (`weights.csv`)." * args.no_weights,
        summary="\n".join(about_model(oof) for oof in oofs), images=images_paragraph(images, oofs),
        training="\n".join(about_training(oof) for oof in every), models="`, `".join({o.config["model"] for o in oofs}),
        single_folds=listing(singles, 30), execution=execution(args, every),
    )  # fmt: skip
    text = (Path(__file__).parent / "handover.md").read_text(encoding="utf-8")
    return string.Template(text).substitute(places | commands(args, oofs, every, submission))


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


# ---------------------------------------------------------------- the zip


def contents(args, oofs, every, submission):
    """→ ({name in the zip: path}, {name in the zip: text}) of all that is handed over."""
    files, prepared = {}, prepared_folder(args)
    paths, about, difference = code_files(args)
    files |= {str(path.relative_to(ROOT)): path for path in paths}
    files |= {f"output/prepared/{name}": prepared / name for name in OF_PREPARED}
    fitted = args.output / f"blend_{'+'.join(sorted(args.exps))}.json"  # the weights of 03's --weights FILE
    files |= {f"output/{name}": args.output / name for name in ("experiments.csv", fitted.name)}
    texts = {"installed.txt": "\n".join(installed()) + "\n"}
    for oof in every:
        names = [name.format(k) for k in oof.present for name in OF_FOLD] + ["config.json", "oof.csv", "report.html"]
        names += [f"fold{k}.pt" for k in oof.present if not args.no_weights]
        files |= {f"output/{oof.exp}/{name}": oof.folder / name for name in names}
        texts[f"output/{oof.exp}/recipe.args"] = f"# {oof.exp}\n{shlex.join(recipe(oof))}\n"
    files[f"submission/{submission.name}"] = submission
    if difference is not None:
        texts["changes.diff"] = difference
    rows = io.StringIO()
    csv.writer(rows, lineterminator="\n").writerows(weight_rows(args, every))
    texts |= {"weights.csv": rows.getvalue(), "HANDOVER.md": document(args, oofs, every, submission, about)}
    files = {name: path for name, path in files.items() if path.is_file()}
    names = sorted({*files, *texts, "directory_structure.txt"})
    return files, texts | {"directory_structure.txt": "\n".join(names) + "\n"}


def write_zip(path, top, files, texts):
    """Writes the zip, all of it in the folder `top`."""
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", strict_timestamps=False) as archive:
        for name, text in sorted(texts.items()):
            archive.writestr(f"{top}/{name}", text, zipfile.ZIP_DEFLATED)
        for name, source in sorted(files.items()):
            how = zipfile.ZIP_STORED if source.suffix in STORED else zipfile.ZIP_DEFLATED
            archive.write(source, f"{top}/{name}", how)


def main(args):
    oofs = read_experiments(args)
    submission, every = find_submission(args, oofs), with_starts(args, oofs)
    top = f"handover_{'+'.join(args.exps)}"
    path = args.output / f"{top}.zip"
    files, texts = contents(args, oofs, every, submission)
    write_zip(path, top, files, texts)
    blanks = texts["HANDOVER.md"].count("**TO FILL**")
    say(f"{len(files) + len(texts)} files, {path.stat().st_size / 2**20:.1f} MiB → {path}")
    say(f"HANDOVER.md in it has the commands, and {blanks} places marked TO FILL for you")


if __name__ == "__main__":
    common.run(main, make_parser())
