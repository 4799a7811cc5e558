"""The winner's zip: what is in it, and that its commands remake the submission."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import common
from common import file_hash

import pandas as pd
import pytest
from conftest import TINY, done, kit, load, prepare

from kit.submit import handover
from kit.train.settings import changed, settings

PREPARE, TRAIN = load("00_prepare.py"), load("01_train_fold.py")


def hand_over(flags, *words):
    """Make a zip, which must succeed. → it, open; its names are without the top folder."""
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
    """Return the literal commands of HANDOVER.md under `# title`."""
    return re.search(rf"```bash\n# {title}\n(.*?)```", text, re.DOTALL)[1]


@pytest.fixture(scope="module")
def scored(trained, tmp_path_factory):
    """Score the demo and write its submission, for reading only. → its flags."""
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
    submission_in_zip = folder / submission.name
    submission_in_zip.write_bytes(submission_in_zip.read_bytes()[:-2] + b"9\n")
    compare = command[2].strip().splitlines()[-1]
    assert subprocess.run(["bash", "-euc", compare], cwd=folder, capture_output=True).returncode == 1


def test_contents_of_the_zip(flags):
    made, base = hand_over(flags, "base"), flags[3] / "base"
    files = "config.json oof.csv report.html fold0.pt fold2.pt fold1.csv fold1.json fold1_epochs.csv".split()
    expected = {f"output/base/{name}" for name in files} | {"output/experiments.csv"}
    expected |= {f"output/prepared/{name}" for name in ("prepared.json", "folds.csv", "test.csv", "sample.csv")}
    expected |= {"01_train_fold.py", "kit/train/model.py", "kit/report/page.html", "run.sh", "requirements.lock"}
    expected |= {"installed.txt", "SHA256SUMS"}
    assert expected <= made.names.keys()
    assert not [name for name in made.names if name.endswith((".npy", ".lock", ".zip")) and name.startswith("output")]
    assert re.search(r"^torch==\d", made.read("installed.txt"), re.MULTILINE)
    (submission,) = base.glob("submission_*.csv")
    hashes = [f"{file_hash(submission)}  {submission.name}"]
    hashes += [f"{file_hash(base / f'fold{k}.pt')}  output/base/fold{k}.pt" for k in range(3)]
    assert made.read("SHA256SUMS").splitlines() == hashes
    assert made.names["output/base/fold0.pt"].compress_type == zipfile.ZIP_STORED
    assert made.names["output/base/oof.csv"].compress_type == zipfile.ZIP_DEFLATED
    (training,) = re.findall(r"python 01_train_fold.py (.*)", shell_commands(made.text, "from scratch"))
    args = TRAIN.make_parser().parse_args(shlex.split(training))
    config = json.loads((base / "config.json").read_text())
    made = settings(args, *args.seed) | dict(sampler="imbalanced")  # auto, for the AUC
    assert {key: config[key] for key in made} == made


def test_the_page_has_the_scores_and_marks_what_the_author_must_fill_in(flags):
    done("02_oof.py", *flags, "--draws", 100, "--lb-public", 0.8125)
    text = hand_over(flags).text
    row = pd.read_csv(flags[3] / "experiments.csv", dtype=str).iloc[0]
    assert f"\nbase,{row.cv},{row.cv_low},{row.cv_high},0.812500," in text
    assert text.count("**TO FILL**") == 5
    assert "$" not in text


def test_no_weights(flags):
    made, base = hand_over(flags, "--no-weights"), flags[3] / "base"
    assert not [name for name in made.names if name.endswith(".pt")]
    for k in range(3):
        assert f"{file_hash(base / f'fold{k}.pt')}  output/base/fold{k}.pt" in made.read("SHA256SUMS").splitlines()


@pytest.mark.slow
def test_a_blend_and_an_experiment_that_began_with_another(flags):
    """The one that it began with is trained first."""
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
    assert name in made.names


def test_fitted_weights_are_read_from_the_folder_that_they_are_made_in():
    flags = "--weights=old/blend_base+next.json --blend rank".split()
    made = handover.infer_command(["next", "base"], flags, "scratch", "--output", "scratch")
    assert made == (
        "python 03_infer.py next base --weights=scratch/blend_base+next.json --blend rank --output scratch "
        "--name scratch/remade.csv"
    )
    made = handover.infer_command(["next", "base"], ["--weights", "old/blend_base+next.json"], "output")
    assert "base --weights output/blend_base+next.json --name" in made


def test_errors(flags):
    folder = flags[3] / "base"
    assert "has no finished fold" in refused(flags, "nobody")
    (submission,) = folder.glob("submission_*.csv")
    assert submission.name in hand_over(flags, "--infer", "--batch-size 8").names
    (flags[3] / "handover_base.zip").unlink()
    assert "nowhere.csv has no submission" in refused(flags, "--infer", "--name nowhere.csv")
    assert "--infer can't be read" in refused(flags, "--infer", "--blend 'rank")
    result = kit("kit/submit/handover.py", "--infer", "--blnd rank", *flags)
    assert (result.code, "03_infer.py: error: unrecognized arguments: --blnd" in result.err) == (2, True)
    missing = "has no submission of base later than the folds: run python 03_infer.py base"
    assert missing in refused(flags, "--infer=--tta none")
    before = (folder / "fold2.csv").stat().st_mtime - 1
    os.utime(submission, (before, before))
    assert missing in refused(flags)
    os.utime(folder / "oof.csv", (before, before))
    assert "no oof.csv and report.html later than its folds" in refused(flags)
    (folder / "oof.csv").unlink()
    assert "run python 02_oof.py base" in refused(flags)
    (folder / "fold1.pt").unlink()
    assert "has 2 of 3 folds: python 01_train_fold.py --exp base --fold 1" in refused(flags)
    assert not [*flags[3].glob("*.zip")]
    assert not [*flags[3].glob(".tmp*")]


def test_other_code_than_the_folds_were_trained_with_is_a_warning(flags):
    assert "other code" not in hand_over(flags).err
    path = flags[3] / "base" / "fold1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(code="0" * 64)))
    assert "folds of base were trained by other code than this" in hand_over(flags).err


def test_the_code_is_the_kits_files_with_their_commit(tmp_path, monkeypatch):
    root = tmp_path / "copy"
    (root / "kit" / "train").mkdir(parents=True)
    (root / "input").mkdir()
    kept = {"common.py", "kit/train/model.py", "requirements.lock", "input/make_demo.py"}
    for name in (*kept, "kaggle.json", "input/train.csv", "kit/train/model.pyc"):
        (root / name).write_text("x = 1\n")
    monkeypatch.setattr(common, "ROOT", root)
    assert handover.find_files(tmp_path / "output", [], {}, True).keys() == kept, "no keys, no data"
    assert handover.commit() == "no git checkout"

    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        return subprocess.run(["git", *who, *words], cwd=root, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    git("add", *kept)
    git("commit", "-qm", "first")
    git("tag", "v1")
    commit = git("rev-parse", "HEAD").strip()
    assert handover.commit() == f"git commit {commit}"
    (root / "common.py").write_text("x = 2\n")
    assert handover.commit() == f"git commit {commit}-dirty"


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
    config = settings(args, *args.seed)
    again = parse([*handover.flag_words(changed(config, TRAIN.defaults())), "--fold", "0"])
    assert settings(again, *again.seed) == config


def test_the_flags_of_the_preparation_are_kept(flags):
    parse = PREPARE.make_parser().parse_args
    words = ["--size", "32", "--separator=-", "--positive", "a b", "c", "--drop-unlabelled", "--bands", "4", "3", "2"]
    args = parse([*words, "--label-pattern", "(cat|dog)", "--output", "elsewhere"])
    given = json.loads(json.dumps(PREPARE.changed_flags(vars(args))))
    assert "output" not in given
    assert PREPARE.changed_flags(vars(parse(handover.flag_words(given)))) == PREPARE.changed_flags(vars(args))
    prepared = json.loads((flags[3] / "prepared" / "prepared.json").read_text())
    assert prepared["flags"] == dict(size=32, folds=3)
