"""The winner's zip: code, settings, models, scores, and the commands that remake the submission.

    python -m kit.submit.handover base                             # or make handover EXP=base
    python -m kit.submit.handover base convnext --infer "--blend rank"     # a blend, as 03_infer.py made it
    python -m kit.submit.handover base --no-weights                # the models are listed, by hash, and left out

Reads OUTPUT/EXP of finished experiments that 02_oof.py has scored, their submission, and OUTPUT/prepared. Writes
OUTPUT/handover_EXP.zip; HANDOVER.md in it (kit/submit/handover.md) says what is there and how it is used.
"""

import glob
import importlib.metadata
import platform
import shlex
import shutil
import string
import subprocess
import zipfile
from pathlib import Path

import common
from common import Parser, UserError, file_hash, listing, read_table, replacing, say, warn

from kit.experiment import read_oof
from kit.pipeline import parse, words_of
from kit.score.metrics import METRICS
from kit.train.checkpoint import provenance

HANDOVER_FILES = (  # of the kit
    "*.py *.md *.sh *.toml *.txt *.lock Makefile LICENSE kit/* kit/*/* recipes/* docs/* notebooks/* slurm/* tests/*.py "
    "tests/*/* input/make_demo.py"
).split()
PREPARED_FILES = "prepared.json folds.csv test.csv sample.csv duplicates.csv".split()
FOLD_FILES = "fold{}.json fold{}.csv fold{}_epochs.csv fold{}_logits.npy".split()  # the last for many classes alone
SCORES = "cv cv_low cv_high public private minutes folds".split()  # columns of experiments.csv


def make_parser():
    parser = Parser(__doc__)
    add = parser.group("what to hand over")
    add("exps", nargs="*", default=["base"], metavar="EXP", help="the experiment, or those of a blend")
    add("--infer", default="", metavar="FLAGS", help="the flags that 03_infer.py had: --infer='--tta none'")
    add("--no-weights", action="store_true", help="list the models' hashes and leave them out")
    parser.shared(add)
    return parser


def read_experiments(output, exps):
    """Return {experiment: Oof}, each after the one that it began with (--init EXP), if any. Raises UserError where
    folds or scores are missing."""
    oofs = {}
    for exp in exps:
        oof = read_oof(output, exp)
        if oof.missing:
            training = command("01_train_fold.py", "--exp", exp, "--fold", *oof.missing)
            raise UserError(f"{oof.folder} has {oof.folds_text}: {training}, with its other flags")
        if not all(is_later(oof.folder / name, [oof]) for name in ("oof.csv", "report.html")):
            scoring = command("02_oof.py", exp)
            raise UserError(f"{oof.folder} has no oof.csv and report.html later than its folds: run {scoring}")
        if any(record["code"] != provenance("hub")["code"] for record in oof.records.values()):
            warn(f"folds of {exp} were trained by other code than this: from scratch they may differ")
        oofs |= read_experiments(output, {oof.config["init"]} - {"weights", "probe"}) | {exp: oof}
    return oofs


def is_later(path, oofs):
    """Return whether the file is there, and later than the experiments' folds: an earlier one is of other models."""
    trained = max((oof.folder / f"fold{fold}.csv").stat().st_mtime for oof in oofs for fold in oof.present)
    return path.exists() and path.stat().st_mtime >= trained


def find_submission(oofs, output, infer, given):
    """Return the newest submission later than the folds. infer: 03's module; given: its flags."""
    folder = oofs[0].folder if len(oofs) == 1 else output
    name = infer.submission_name(given.exps, given.tta, given.blend, given.weights)
    paths = [given.name] if given.name else folder.glob(glob.escape(f"submission_{name}_CV") + "*.csv")
    paths = [path for path in paths if is_later(path, oofs)]
    if not paths:
        what = f"{given.name or folder} has no submission of {listing(given.exps)} later than the folds"
        raise UserError(f"{what}: run {command('03_infer.py', *given.exps)}, and give its other flags as --infer")
    return max(paths, key=lambda path: path.stat().st_mtime)


def command(*words):
    return shlex.join(["python", *map(str, words)])


def flag_words(settings):
    """Return the flags that give these settings, as words: {'lr': 0.001, 'init': 'probe'} → ['--lr', '0.001', …]."""
    words = []
    for key, value in settings.items():
        flag = f"--{key.replace('_', '-')}"
        if isinstance(value, dict):
            value = [f"{name}={part}" for name, part in value.items()]
        if value is True:
            words.append(flag)
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        elif value is not None and value is not False:
            words += [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]
    return words


def training_flags(oof):
    """Return the flags of 01 that aren't the defaults, as words; with the precision, unless it is a CPU's usual one."""
    record, settings = oof.records[oof.present[0]], dict(oof.config["changed"])
    if record["weights"] not in ("hub", "none"):
        settings["weights"] = "WEIGHTS_FILE"
    if (record["run"]["device"], record["run"]["amp"]) != ("cpu", "none"):
        settings["amp"] = record["run"]["amp"]
    return flag_words(settings)


def prepare_commands(oofs, *folders):
    """Return the commands of 00, one for each size of the images, the first as it was given."""
    flags = oofs[0].prepared.flags
    sizes = dict.fromkeys([flags.get("size", 448), *sorted({oof.config["size"] for oof in oofs})])
    return [command("00_prepare.py", *flag_words(flags | dict(size=size)), *folders) for size in sizes]


def infer_command(exps, flags, output, *folders):
    """Return the command of 03 that writes OUTPUT/remade.csv. flags: its others, as words; a file of fitted weights
    becomes the one in `output`."""
    fitted, words = f"blend_{'+'.join(sorted(exps))}.json", list(flags)
    for i, word in enumerate(words):
        flag, equals, value = word.rpartition("=")
        words[i] = f"{flag}{equals}{output}/{fitted}" if value.endswith(fitted) else word
    return command("03_infer.py", *exps, *words, *folders, "--name", f"{output}/remade.csv")


def commit():
    """Return the git commit of the kit's files, "-dirty" where they differ."""
    if not ((common.ROOT / ".git").exists() and shutil.which("git")):
        return "no git checkout"
    words = ["git", "-C", common.ROOT, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return f"git commit {subprocess.run(words, capture_output=True, text=True).stdout.strip()}"


def document(exps, flags, oofs, submission):
    """Return the text of HANDOVER.md. oofs: of all experiments, those of --init too; flags: of 03, as words."""
    prepared, folders = oofs[exps[0]].prepared, ("--output", "scratch")
    scratch = prepare_commands([*oofs.values()], *folders)
    for exp, oof in oofs.items():
        scratch.append(command("01_train_fold.py", "--fold", "all", "--exp", exp, *training_flags(oof), *folders))
    scratch += [command("02_oof.py", *exps, *folders), infer_command(exps, flags, "scratch", *folders)]
    kept = [*prepare_commands([oofs[exp] for exp in exps]), infer_command(exps, flags, "output")]
    ledger = read_table(prepared.folder.parent / "experiments.csv", "run python 02_oof.py", dtype=str)
    rows = ledger[ledger.experiment.isin([*oofs, submission.removeprefix("submission_").rpartition("_CV")[0]])]
    return string.Template(Path(__file__).with_name("handover.md").read_text(encoding="utf-8")).substitute(
        name=" + ".join(exps), exps=shlex.join(exps), from_weights="\n".join(kept), from_scratch="\n".join(scratch),
        submission=shlex.quote(submission), scores=rows.reindex(columns=["experiment", *SCORES]).to_csv(index=False),
        metric=METRICS[prepared.metric].name, code=commit(),
    )  # fmt: skip


def find_files(output, exps, oofs, with_models):
    """Return {name in the zip: path} of the kit's files and of the output's."""
    files = {path.relative_to(common.ROOT): path for pattern in HANDOVER_FILES for path in common.ROOT.glob(pattern)}
    names = [Path("prepared", name) for name in PREPARED_FILES]
    names += [Path("experiments.csv"), Path(f"blend_{'+'.join(sorted(exps))}.json")]
    for exp, oof in oofs.items():
        of_folds = [name.format(k) for k in oof.present for name in [*FOLD_FILES, *["fold{}.pt"] * with_models]]
        names += [Path(exp, name) for name in [*of_folds, "config.json", "oof.csv", "report.html"]]
    files |= {"output" / name: output / name for name in names}
    return {str(name): path for name, path in files.items() if path.is_file() and path.suffix != ".pyc"}


def main(args):
    oofs, infer = read_experiments(args.output, args.exps), importlib.import_module("03_infer")
    flags = words_of("--infer", args.infer)
    given = parse(infer, [*args.exps, "--input", args.input, "--output", args.output, *flags])
    submission = find_submission([oofs[exp] for exp in args.exps], args.output, infer, given)
    files = find_files(args.output, args.exps, oofs, not args.no_weights) | {submission.name: submission}
    models = {f"output/{exp}/fold{k}.pt": oof.folder / f"fold{k}.pt" for exp, oof in oofs.items() for k in oof.present}
    hashes = [f"{file_hash(path)}  {name}\n" for name, path in ({submission.name: submission} | models).items()]
    packages = sorted({f"{package.name}=={package.version}\n" for package in importlib.metadata.distributions()})
    texts = {
        "HANDOVER.md": document(args.exps, flags, oofs, submission.name), "SHA256SUMS": "".join(hashes),
        "installed.txt": "".join([f"# Python {platform.python_version()}, {platform.platform()}\n", *packages]),
    }  # fmt: skip
    path = args.output / f"handover_{'+'.join(args.exps)}.zip"
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", strict_timestamps=False) as archive:
        for name, text in texts.items():
            archive.writestr(f"{path.stem}/{name}", text)
        for name, source in files.items():
            how = zipfile.ZIP_STORED if source.suffix == ".pt" else zipfile.ZIP_DEFLATED  # models hardly shrink
            archive.write(source, f"{path.stem}/{name}", how)
    say(f"{len(files) + len(texts)} files, {path.stat().st_size / 2**20:.1f} MiB → {path}")
    say(f"HANDOVER.md in it has the commands, and {texts['HANDOVER.md'].count('**TO FILL**')} places marked TO FILL")


if __name__ == "__main__":
    common.run(main, make_parser())
