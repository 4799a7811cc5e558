"""Puts into one zip what winners hand in: code, settings, models, scores, and the commands that remake the submission.

    python -m kit.submit.handover base                             # or make handover EXP=base
    python -m kit.submit.handover base convnext --infer "--blend rank"     # a blend, as 03_infer.py made it
    python -m kit.submit.handover base --no-weights                # the models are listed, by hash, and left out

Reads OUTPUT/EXP of finished experiments that 02_oof.py has scored, their submission, and OUTPUT/prepared. Writes
OUTPUT/handover_EXP.zip; HANDOVER.md in it (kit/submit/handover.md) says what is there and how it is used.
"""

import csv
import glob
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
from kit.experiment import of_folds, read_oof
from kit.pipeline import load, parse, words_of
from kit.score import tasks
from kit.score.metrics import METRICS
from kit.submit.submission import check_submission, read_tests
from kit.train.checkpoint import makers

ROOT = Path(__file__).parent.parent.parent
# the kit's files where it isn't a git checkout
OF_KIT = (
    "*.py *.md *.sh *.toml *.txt *.lock Makefile LICENSE kit/* kit/*/* recipes/* docs/* notebooks/* slurm/* tests/*.py "
    "tests/*/* input/make_demo.py"
).split()
OF_FOLD = "fold{}.json fold{}.csv fold{}_epochs.csv fold{}_logits.npy".split()  # the last of many classes alone
OF_PREPARED = "prepared.json folds.csv test.csv sample.csv duplicates.csv".split()
STORED = (".pt", ".npy", ".png")  # hardly smaller when compressed


def make_parser():
    parser = Parser(__doc__)
    add = parser.group("what to hand over")
    add("exps", nargs="*", default=["base"], metavar="EXP", help="the experiment, or those of a blend")
    add("--infer", default="", metavar="FLAGS", help="the flags that 03_infer.py had: --infer='--tta none'")
    add("--submission", type=Path, metavar="FILE", help="the submission (default: that of 03_infer.py)")
    add("--no-weights", action="store_true", help="list the models' hashes and leave them out")
    parser.shared(add)
    return parser


def read_experiments(args):
    """→ what read_oof gives of each experiment. Raises UserError where folds or scores are missing."""
    oofs = [read_oof(args, exp) for exp in args.exps]
    for oof in oofs:
        if oof.missing:
            train = f"python 01_train_fold.py --exp {shlex.quote(oof.exp)} --fold {' '.join(map(str, oof.missing))}"
            raise UserError(f"{oof.folder} has {of_folds(oof)}: {train}, with its other flags")
        if not all(is_of_folds(oof.folder / name, [oof]) for name in ("oof.csv", "report.html")):
            scoring = named("02_oof.py", [oof.exp])
            raise UserError(f"{oof.folder} has no oof.csv and report.html later than its folds: run {scoring}")
    return oofs


def is_of_folds(path, oofs):
    """Whether the file is there, and later than the experiments' folds: an earlier one is of other models."""
    trained = max((oof.folder / f"fold{fold}.csv").stat().st_mtime for oof in oofs for fold in oof.present)
    return path.exists() and path.stat().st_mtime >= trained


def with_starts(args, oofs):
    """→ the experiments, each behind the one whose folds were its start (--init EXP), if any."""
    every = {}
    for oof in oofs:
        if (start := oof.config["init"]) not in ("weights", "probe"):
            every |= {before.exp: before for before in with_starts(args, [read_oof(args, start)])}
        every[oof.exp] = oof
    return [*every.values()]


def named(script, exps):
    return shlex.join(["python", script, *exps])


def checked(args, oofs, path):
    """→ the path, if the file there is a submission of this competition. Raises UserError where it isn't."""
    _, layout = read_tests(prepared_folder(args), f"{common.PREPARE} --overwrite")
    try:
        check_submission(path, layout, oofs[0].prepared)
    except (OSError, ValueError, IndexError, csv.Error, AssertionError) as error:
        raise UserError(f"{path} is none of this competition ({error}): give another") from None
    return path


def find_submission(args, oofs):
    """→ the path of the submission, made of the folds as they are. Raises UserError where there is none."""
    infer = load("03_infer")
    given = parse(infer, [*args.exps, "--input", args.input, "--output", args.output, *words_of("--infer", args.infer)])
    if path := args.submission or given.name:
        if not is_of_folds(checked(args, oofs, path), oofs):
            warn(f"{path} is older than the folds: is it theirs?")
        return path
    folder = oofs[0].folder if len(oofs) == 1 else args.output
    found = folder.glob(glob.escape(f"submission_{infer.name_of(given)}_CV") + "*.csv")
    found = [path for path in found if is_of_folds(path, oofs)]
    if not found:
        command = f"{named('03_infer.py', args.exps)} {args.infer}".strip()
        what = f"{folder} has no submission of {listing(args.exps)} later than the folds"
        raise UserError(f"{what}: run {command}, or see --submission")
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


def code_files():
    """→ ([paths in the kit], a sentence about them, the difference from the commit as text or None). The files are the
    commit's or, where the tree differs from it, those that lie there, and new ones in the kit's folders."""
    of_kit = sorted({path for pattern in OF_KIT for path in ROOT.glob(pattern) if path.is_file()})
    of_kit = [path for path in of_kit if path.suffix != ".pyc"]
    commit, tracked = git("rev-parse", "HEAD"), git("-c", "core.quotePath=off", "ls-files") or []
    if commit is None or "common.py" not in tracked:  # a repository around the kit, that doesn't hold it
        return of_kit, "the kit's files as they lay there (no git checkout)", None
    paths = [path for path in (ROOT / name for name in tracked) if path.is_file()]
    new = [path for path in of_kit if path not in paths]  # what else lies there, keys and data, is nobody's business
    changed = git("-c", "core.quotePath=off", "diff", "--name-only", "--relative", "HEAD", "--", ".")
    if not (changed or new):
        return paths, f"git commit {commit[0]}", None
    differs = listing([*changed, *(path.relative_to(ROOT) for path in new)])
    warn(f"the kit differs from commit {commit[0][:12]} in {differs}: the zip has these, and changes.diff")
    about = f"git commit {commit[0]} with changes (`changes.diff`; new files lie beside the others)"
    difference = git("diff", "--no-color", "--no-ext-diff", "--relative", "HEAD", "--", ".")
    return [*paths, *new], about, "\n".join(difference) + "\n"


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


def installed():
    """→ ['name==version', …] of all packages that this Python sees."""
    found = {(d.name, d.version) for d in importlib.metadata.distributions()}
    return sorted((f"{name}=={version}" for name, version in found if name), key=str.lower)


def contents(args, oofs, every, submission):
    """→ ({name in the zip: path}, {name in the zip: text}) of all that is handed over."""
    files, prepared = {}, prepared_folder(args)
    paths, about, difference = code_files()
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
    """→ the flags of 01 that aren't the defaults, as words; the precision too, unless it is a CPU's usual one."""
    record, settings = oof.records[oof.present[0]], dict(oof.config["changed"])
    if record["weights"] not in ("hub", "none"):
        settings["weights"] = "WEIGHTS_FILE"
    return flag_words(settings | precision(record))


def precision(record):
    run = record.get("run", dict(device="cpu", amp="none"))
    return {} if (run["device"], run["amp"]) == ("cpu", "none") else dict(amp=run["amp"])


def prepare_commands(prepared, oofs, *folders):
    """→ the commands of 00, one for each size of the images, the first as it was given."""
    flags = prepared.get("flags")
    if flags is None:  # of an older version of the kit
        flags = dict(metric=prepared["metric"], folds=prepared["folds"], seed=prepared["seed"])
        flags |= dict(limit=prepared["limit"], size=prepared["sizes"][0])
    first = flags.get("size", 448)
    sizes = dict.fromkeys([first, *sorted({oof.config["size"] for oof in oofs})])
    return [command("00_prepare.py", *flag_words(flags | dict(size=size)), *folders) for size in sizes]


def infer_command(args, output, *folders):
    """→ the command of 03 that makes the submission again, as OUTPUT/remade.csv. A file of fitted weights is that of
    the folder `output`."""
    fitted, given = f"blend_{'+'.join(sorted(args.exps))}.json", shlex.split(args.infer)
    for i, word in enumerate(given):
        flag, equals, value = word.rpartition("=")
        given[i] = f"{flag}{equals}{output}/{fitted}" if value.endswith(fitted) else word
    return command("03_infer.py", *args.exps, *given, *folders, "--name", f"{output}/remade.csv")


def remaking(args, oofs, every, submission):
    """→ {place in handover.md: the shell commands} that remake the submission in two ways."""
    prepared = oofs[0].prepared
    kept = [*prepare_commands(prepared, oofs), infer_command(args, "output")]
    scratch = prepare_commands(prepared, every, "--output", "scratch")
    for oof in every:
        train = "01_train_fold.py", "--fold", "all", "--exp", oof.exp, *recipe(oof), "--output", "scratch"
        scratch.append(command(*train))
    scratch += [command("02_oof.py", *args.exps, "--output", "scratch")]
    scratch += [infer_command(args, "scratch", "--output", "scratch")]
    compare = ["cmp", f"submission/{submission.name}"]
    return dict(
        from_weights="\n".join([*kept, shlex.join([*compare, "output/remade.csv"])]),
        from_scratch="\n".join([*scratch, shlex.join([*compare, "scratch/remade.csv"])]),
    )
