"""Puts into one zip what winners hand in: code, settings, models, scores, and the commands that remake the submission.

    python -m kit.handover base                             # or make handover EXP=base
    python -m kit.handover base convnext --infer "--blend rank"     # a blend, as 03_infer.py made it
    python -m kit.handover base --no-weights                # the models are listed, by hash, and left out

Reads OUTPUT/EXP of finished experiments that 02_oof.py has scored, their submission, and OUTPUT/prepared. Writes
OUTPUT/handover_EXP.zip; HANDOVER.md in it (kit/handover.md) says what is there and how it is used.
"""

import csv
import glob
import importlib.metadata
import io
import shlex
import subprocess
import zipfile
from pathlib import Path

import common
from common import Parser, UserError, file_hash, listing, prepared_folder, replacing, say, warn
from kit.commands import recipe
from kit.document import document
from kit.experiment import of_folds, read_oof
from kit.submission import check_submission, read_tests
from kit.whole import load, parse, words_of

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
    add = parser.group("what to hand over")
    add("exps", nargs="*", default=["base"], metavar="EXP", help="the experiment, or those of a blend")
    add("--infer", default="", metavar="FLAGS", help="the flags that 03_infer.py had: --infer='--tta none'")
    add("--submission", type=Path, metavar="FILE", help="the submission (default: that of 03_infer.py)")
    add("--no-weights", action="store_true", help="list the models' hashes and leave them out")
    parser.shared(add)
    return parser


# ---------------------------------------------------------------- what is handed over


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


# ---------------------------------------------------------------- the zip


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
