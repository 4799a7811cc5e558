"""What winners hand in: the zip remakes the submission, by the commands that stand in it."""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import TINY, done, kit, load, prepare

from common import file_hash
from kit.submit import handover

PREPARE, TRAIN = load("00_prepare.py"), load("01_train_fold.py")


def hand_over(flags, *words):
    """Makes a zip that must be made. → it, open; its names are without the top folder."""
    result = kit("kit/submit/handover.py", *words, *flags)
    assert result.code == 0, result.err
    path = Path(re.search(r"→ (.*\.zip)", result.out)[1])
    archive = zipfile.ZipFile(path)
    assert {name.split("/")[0] for name in archive.namelist()} == {path.stem}
    sizes = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    read = lambda name: archive.read(f"{path.stem}/{name}").decode()  # noqa: E731
    return SimpleNamespace(path=path, names=sizes, read=read, err=result.err, text=read("HANDOVER.md"))


def refused(flags, *words):
    result = kit("kit/submit/handover.py", *words, *flags)
    assert result.code == 2, (result.out, result.err)
    (line,) = result.err.strip().splitlines()
    assert line.startswith("handover.py: error: ")
    return line


def shell_commands(text, title):
    """→ the literal commands of HANDOVER.md under `# title`."""
    return re.search(rf"```bash\n# {title}\n(.*?)```", text, re.DOTALL)[1]


@pytest.fixture(scope="module")
def scored(trained, tmp_path_factory):
    """The demo with scores and a submission, for reading only. → its flags."""
    output = tmp_path_factory.mktemp("scored") / "output"
    shutil.copytree(trained.output, output)
    flags = ["--input", trained.input, "--output", output]
    done("02_oof.py", *flags, "--draws", 100)
    done("03_infer.py", *flags)
    return flags


@pytest.fixture
def flags(scored, tmp_path):
    shutil.copytree(scored[3], tmp_path / "output")
    return [*scored[:3], tmp_path / "output"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["from the kept weights", "from scratch"])
def test_remakes_the_submission_to_the_byte(toy, tmp_path, way):
    """The commands run as they stand, elsewhere, with the competition's files in input/. The tables have unusual
    names, so that 00 needs the flags that it had."""
    flags = toy()
    (flags[1] / "train.csv").rename(flags[1] / "labels of images.csv")
    prepare(flags, 32, "--folds", 2, "--train-csv", "labels of images.csv", "--metric", "logloss")
    done("01_train_fold.py", *flags, *TINY, "--fold", "all", "--augment", "flip", "--seed", 5, "--epochs", 3)
    done("02_oof.py", *flags, "--draws", 100)
    done("03_infer.py", *flags)
    (submission,) = (flags[3] / "base").glob("submission_base_CV*.csv")
    made = hand_over(flags)
    with zipfile.ZipFile(made.path) as archive:
        archive.extractall(tmp_path / "elsewhere")
    folder = tmp_path / "elsewhere" / "handover_base"
    shutil.copytree(flags[1], folder / "input", dirs_exist_ok=True)
    output = folder / ("scratch" if way == "from scratch" else "output")
    assert not [*output.glob("base/submission*")]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | dict(PATH=path)
    command = ["bash", "-euc", shell_commands(made.text, way)]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    remade = output / "remade.csv"
    assert remade.read_bytes() == submission.read_bytes()
    assert ("epoch 3/3" in result.stdout) == (way == "from scratch")
    submission_in_zip = folder / "submission" / submission.name
    submission_in_zip.write_bytes(submission_in_zip.read_bytes()[:-2] + b"9\n")
    compare = command[2].strip().splitlines()[-1]
    assert subprocess.run(["bash", "-euc", compare], cwd=folder, capture_output=True).returncode == 1


def test_what_is_in_the_zip(flags):
    made, base = hand_over(flags, "base"), flags[3] / "base"
    files = "config.json recipe.args oof.csv report.html fold0.pt fold2.pt fold1.csv fold1.json fold1_epochs.csv"
    expected = {f"output/base/{name}" for name in files.split()}
    expected |= {f"output/prepared/{name}" for name in ("prepared.json", "folds.csv", "test.csv", "sample.csv")}
    expected |= {
        "01_train_fold.py",
        "kit/train/model.py",
        "run.sh",
        "requirements.lock",
        "installed.txt",
        "weights.csv",
    }
    assert expected <= made.names.keys()
    assert not [name for name in made.names if name.endswith((".npy", ".lock", ".zip")) and name.startswith("output")]
    assert {*made.read("directory_structure.txt").split("\n")} - {""} == made.names.keys()
    assert re.search(r"^torch==\d", made.read("installed.txt"), re.MULTILINE)
    weights = [*csv.DictReader(io.StringIO(made.read("weights.csv")))]
    assert [row["sha256"] for row in weights] == [file_hash(base / f"fold{k}.pt") for k in range(3)]
    assert {row["in_archive"] for row in weights} == {"yes"}
    assert made.names["output/base/fold0.pt"].compress_type == zipfile.ZIP_STORED
    assert made.names["output/base/oof.csv"].compress_type == zipfile.ZIP_DEFLATED
    words = made.read("output/base/recipe.args")
    args = TRAIN.make_parser().parse_args([*words.split("\n", 1)[1].split(), "--fold", "0"])
    config = json.loads((base / "config.json").read_text())
    assert TRAIN.settings(args, *args.seed).items() <= config.items()


def test_says_the_scores_and_leaves_the_rest_to_the_author(flags):
    done("02_oof.py", *flags, "--draws", 100, "--lb-public", 0.8125)
    text = hand_over(flags).text
    (row,) = csv.DictReader((flags[3] / "experiments.csv").open())
    assert f"| base | {row['cv']} | {row['cv_low']} to {row['cv_high']} | 0.812500 |" in text
    headings = "Background Summary Features Training findings Simple Execution References".split()
    assert all(re.search(rf"^### .*{word}", text, re.MULTILINE) for word in headings)
    assert text.count("**TO FILL**") > 5
    assert "$" not in text


def test_no_weights(flags):
    made = hand_over(flags, "--no-weights")
    assert not [name for name in made.names if name.endswith(".pt")]
    rows = [*csv.DictReader(io.StringIO(made.read("weights.csv")))]
    assert [(row["sha256"], row["in_archive"]) for row in rows] == [
        (file_hash(flags[3] / "base" / f"fold{k}.pt"), "no") for k in range(3)
    ]
    assert "not in this archive" in made.text


def test_a_blend_and_what_it_started_from(flags):
    """An experiment that began with another one's folds needs that one's training first."""
    done("01_train_fold.py", *flags, *TINY, "--fold", "all", "--exp", "next", "--init", "base", "--epochs", 1)
    done("02_oof.py", "next", *flags, "--draws", 100)
    done("03_infer.py", "next", *flags)
    made = hand_over(flags, "next")
    trained = re.findall(r"01_train_fold.py .*--exp (\w+)", shell_commands(made.text, "from scratch"))
    assert trained == ["base", "next"]
    assert "output/base/fold0.pt" in made.names
    done("02_oof.py", "base", "next", *flags, "--draws", 100)
    done("03_infer.py", "base", "next", "--blend", "rank", *flags)
    assert "has no submission of base, next" in refused(flags, "base", "next")
    made = hand_over(flags, "base", "next", "--infer", "--blend rank")
    assert made.path.name == "handover_base+next.zip"
    assert "python 03_infer.py base next --blend rank --name output/remade.csv\n" in shell_commands(
        made.text, "from the kept weights"
    )
    (name,) = (path.name for path in flags[3].glob("submission_base+next_rank_CV*.csv"))
    assert f"submission/{name}" in made.names


def test_fitted_weights_are_those_of_the_way():
    args = SimpleNamespace(exps=["next", "base"], infer="--weights=old/blend_base+next.json --blend rank")
    made = handover.infer_command(args, "scratch", "--output", "scratch")
    assert made == (
        "python 03_infer.py next base --weights=scratch/blend_base+next.json --blend rank --output scratch "
        "--name scratch/remade.csv"
    )
    args.infer = "--weights old/blend_base+next.json"
    assert "base --weights output/blend_base+next.json --name" in handover.infer_command(args, "output")


def test_wrong_uses(flags):
    folder = flags[3] / "base"
    assert "has no finished fold" in refused(flags, "nobody")
    assert "nowhere.csv is none of this competition" in refused(flags, "--submission", "nowhere.csv")
    assert "is none of this competition" in refused(flags, "--submission", flags[3] / "base" / "oof.csv")
    (submission,) = folder.glob("submission_*.csv")
    assert f"submission/{submission.name}" in hand_over(flags, "--infer", "--batch-size 8").names
    (flags[3] / "handover_base.zip").unlink()
    other = folder / "other.csv"
    for damaged in ("", "image_name\n", submission.read_text()[:-5] + "cat\n", "x" * 200_000):
        other.write_text(damaged)
        assert "is none of this competition" in refused(flags, "--submission", other)
    assert "--infer can't be read" in refused(flags, "--infer", "--blend 'rank")
    result = kit("kit/submit/handover.py", "--infer", "--blnd rank", *flags)
    assert (result.code, "03_infer.py: error: unrecognized arguments: --blnd" in result.err) == (2, True)
    assert "has no submission of base later than the folds: run python 03_infer.py base --tta" in refused(
        flags, "--infer=--tta none"
    )
    before = (folder / "fold2.csv").stat().st_mtime - 1
    os.utime(submission, (before, before))
    assert "has no submission of base later than the folds: run python 03_infer.py base" in refused(flags)
    os.utime(folder / "oof.csv", (before, before))
    assert "no oof.csv and report.html later than its folds" in refused(flags)
    (folder / "oof.csv").unlink()
    assert "run python 02_oof.py base" in refused(flags)
    (folder / "fold1.pt").unlink()
    assert "has 2 of 3 folds: python 01_train_fold.py --exp base --fold 1" in refused(flags)
    assert not [*flags[3].glob("*.zip")]
    assert not [*flags[3].glob(".tmp*")]


def test_the_code_is_that_of_the_commit_or_says_how_it_differs(flags, tmp_path, monkeypatch):
    root = tmp_path / "copy"
    (root / "kit").mkdir(parents=True)
    (root / "input").mkdir()
    for name in ("common.py", "kit/train/model.py", "requirements.lock", "input/make_demo.py"):
        (root / name).write_text("x = 1\n")
    (root / "output").symlink_to(flags[3])  # lies in the kit, and git isn't told to ignore it
    monkeypatch.setattr(handover, "ROOT", root)
    (root / "results").mkdir()

    def names():
        paths, about, difference = handover.code_files()
        return {str(path.relative_to(root)) for path in paths}, about, difference

    kept = {"common.py", "kit/train/model.py", "requirements.lock", "input/make_demo.py"}
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert names() == (kept, "the kit's files as they lay there (no git checkout)", None)

    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        return subprocess.run(["git", *who, *words], cwd=root, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    (root / ".gitignore").write_text("output\n")
    git("add", "-A")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD").strip()
    assert names() == ({*kept, ".gitignore"}, f"git commit {commit}", None)
    (root / "kit" / "model.py").write_text("x = 2\n")
    (root / "kit" / "new.py").write_text("")
    (root / "results" / "big.npy").write_text("not code")
    (root / "input" / "train.csv").write_text("not code")
    (root / "kaggle.json").write_text("a key")
    found, about, difference = names()
    assert found == {*kept, ".gitignore", "kit/new.py"}
    assert about.startswith(f"git commit {commit} with changes")
    assert "-x = 1\n+x = 2" in difference
    git("rm", "-qr", "--cached", ".")  # a repository that lies around the kit and doesn't hold it
    git("commit", "-qm", "second")
    assert names() == ({*kept, "kit/new.py"}, "the kit's files as they lay there (no git checkout)", None)


@pytest.mark.parametrize(
    "words",
    [
        "--model test_vit --model-kwargs drop_path_rate=0.1 act_layer=gelu --seed 5 --augment light --tta none",
        "--init probe --freeze 0.5 --layer-decay 0.9 --grad-checkpointing --weights none --min-lr 1e-7 --warmup 0.1",
        "--clip-grad 1 --keep last --schedule cosine --loss ce --norm model --amp bf16 --workers 2",
    ],
)
def test_the_flags_of_a_training_give_its_settings(words):
    parse = TRAIN.make_parser().parse_args
    args = parse([*words.split(), "--fold", "0"])
    config = TRAIN.settings(args, *args.seed)
    again = parse([*handover.flag_words(TRAIN.changed(config, TRAIN.defaults())), "--fold", "0"])
    assert TRAIN.settings(again, *again.seed) == config


def test_the_flags_of_the_preparation_are_kept(flags):
    parse = PREPARE.make_parser().parse_args
    words = ["--size", "32", "--separator=-", "--positive", "a b", "c", "--drop-unlabelled", "--bands", "4", "3", "2"]
    args = parse([*words, "--label-pattern", "(cat|dog)", "--output", "elsewhere"])
    given = json.loads(json.dumps(PREPARE.given(args)))
    assert "output" not in given
    assert PREPARE.given(parse(handover.flag_words(given))) == PREPARE.given(args)
    prepared = json.loads((flags[3] / "prepared" / "prepared.json").read_text())
    assert prepared["flags"] == dict(size=32, folds=3)
