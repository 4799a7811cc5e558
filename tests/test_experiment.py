"""Experiments: settings that folds share, provenance, locks, the ledger, forecasts, devices and workers."""

import errno
import json
import os
import pickle
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import common

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import ROOT, TINY, done, kit, load, prepare, refused

from kit.experiment import lock_config, note_in_ledger
from kit.locks import locked, remove_leftovers
from kit.train import device, monitor, optim
from kit.train.checkpoint import ResumeFile
from kit.train.dataset import ImageDataset

TRAIN = "01_train_fold.py"
QUICK = [*TINY, "--epochs", 1, "--augment", "none"]


@pytest.fixture
def flags(toy):
    folders = toy()
    prepare(folders, 32, "--folds", 2)
    return folders


# ---------------------------------------------------------------- all folds in one process


def test_all_folds_in_one_process_equal_those_of_several_processes(toy):
    """Also with dropout, whose generator must be seeded for each fold."""
    folders = toy(train=60)
    prepare(folders, 32, "--folds", 3)
    more = ["--model", "test_vit", "--model-kwargs", "img_size=32", "proj_drop_rate=0.2", "--epochs", 1]
    together = done(TRAIN, *folders, *TINY, *more, "--fold", "all", "--exp", "together")
    assert together.count("kept epoch 1") == 3
    done(TRAIN, *folders, *TINY, *more, "--fold", 2, 0, "--exp", "apart")
    done(TRAIN, *folders, *TINY, *more, "--fold", 1, "--exp", "apart")
    for fold in range(3):
        for ending in ("pt", "csv"):
            apart, one = (folders[3] / exp / f"fold{fold}.{ending}" for exp in ("apart", "together"))
            assert apart.read_bytes() == one.read_bytes()
    assert "there are folds 0 to 2, and all must stand alone" in refused(TRAIN, *folders, *TINY, "--fold", "all", 1)


# ---------------------------------------------------------------- views


def test_held_out_images_are_predicted_in_the_views_of_the_augmentation(flags):
    """With d4 in 8 views, without augmentation in one."""
    done(TRAIN, *flags, *TINY, "--epochs", 1, "--fold", 0, "--exp", "turned")
    done(TRAIN, *flags, *QUICK, "--fold", 0, "--exp", "plain")
    for exp, tta, equal in (("turned", "d4", False), ("plain", "none", True)):
        table = pd.read_csv(flags[3] / exp / "fold0.csv")
        assert np.allclose(table[["views_0", "views_1"]], table[["best_0", "best_1"]]) == equal
        assert json.loads((flags[3] / exp / "config.json").read_text())["tta"] == tta
    assert "one view" in done("03_infer.py", "plain", *flags)


# ---------------------------------------------------------------- settings


def test_a_flag_that_an_older_experiment_lacks_means_its_default(flags):
    done(TRAIN, *flags, *QUICK, "--fold", 0)
    folder = flags[3] / "base"
    for name in ("config.json", "fold0.json"):
        content = json.loads((folder / name).read_text())
        config = content if name == "config.json" else content["config"]
        del config["accumulate"], config["clip_grad"]
        (folder / name).write_text(json.dumps(content))
    done(TRAIN, *flags, *QUICK, "--fold", 1)
    line = refused(TRAIN, *flags, *QUICK, "--fold", 0, 1, "--accumulate", 2)
    assert "accumulate was its default and is now 2" in line


def test_overwriting_every_finished_fold_allows_other_settings(flags):
    done(TRAIN, *flags, *QUICK, "--fold", 0)
    done(TRAIN, *flags, *QUICK, "--fold", 0, "--overwrite", "--seed", 1)
    assert json.loads((flags[3] / "base" / "config.json").read_text())["seed"] == 1
    done(TRAIN, *flags, *QUICK, "--fold", 1, "--seed", 1)
    line = refused(TRAIN, *flags, *QUICK, "--fold", 0, "--overwrite", "--seed", 2)
    assert "fold 1 of experiment base was trained with other settings: seed was 1 and is now 2" in line
    done(TRAIN, *flags, *QUICK, "--fold", "all", "--overwrite", "--seed", 2)


def test_a_failed_overwrite_leaves_the_old_files(flags):
    """The old fold, its epochs and the other folds stay as they were until the new one is finished."""
    done(TRAIN, *flags, *TINY, "--fold", "all")
    before = {path.name: path.read_bytes() for path in (flags[3] / "base").glob("fold*")}
    line = refused(TRAIN, *flags, *TINY, "--fold", "all", "--overwrite", "--optimizer", "lion", "--lr", "1e30")
    assert "lower --lr" in line
    assert before.items() <= {path.name: path.read_bytes() for path in (flags[3] / "base").glob("fold*")}.items()
    done("02_oof.py", *flags, "--draws", 100)


def test_paths_and_precision_are_no_settings(flags, tmp_path):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes((tmp_path / "a.pth").read_bytes())
    quick = [*TINY[:2], *TINY[4:], "--epochs", 1, "--augment", "none"]
    done(TRAIN, *flags, *quick, "--weights", tmp_path / "a.pth", "--fold", 0)
    result = kit(TRAIN, *flags, *quick, "--weights", tmp_path / "b.pth", "--amp", "bf16", "--fold", 1)
    assert result.code == 0
    assert result.err.count("warning") == 1, "the same bytes under another name"
    assert "the folds of base are trained with different amp (fold 0 | fold 1)" in result.err
    other = json.loads((flags[3] / "base" / "fold1.json").read_text())
    assert other["run"]["amp"] == "bf16"
    assert other["run"]["version"] == common.__version__
    assert "amp" not in other["config"]
    with open(tmp_path / "b.pth", "ab") as file:
        file.write(b"other weights")
    result = kit(TRAIN, *flags, *quick, "--weights", tmp_path / "a.pth", "--fold", 0, "--overwrite")
    assert "weights" not in result.err


def test_a_change_of_the_code_between_folds_is_a_warning(flags):
    done(TRAIN, *flags, *QUICK, "--fold", 0)
    path = flags[3] / "base" / "fold0.json"
    path.write_text(path.read_text().replace(json.loads(path.read_text())["code"], "0" * 64))
    result = kit(TRAIN, *flags, *QUICK, "--fold", 1)
    assert result.code == 0
    assert "the folds of base are trained with different code (fold 0 | fold 1)" in result.err
    result = kit("02_oof.py", *flags, "--draws", 100)
    assert result.code == 0
    assert "the folds of base are trained with different code (fold 0 | fold 1)" in result.err


def test_a_cv_of_epochs_chosen_by_two_metrics_is_refused(flags):
    done(TRAIN, *flags, *QUICK, "--fold", 0)
    prepare(flags, 32, "--folds", 2, "--overwrite", "--metric", "logloss")
    assert "metric was 'auc' and is now 'logloss'" in refused(TRAIN, *flags, *QUICK, "--fold", 1)
    assert "metric of 00_prepare.py" in refused("02_oof.py", *flags)


def test_a_cv_of_folds_with_different_settings_is_refused(flags):
    """config.json can't change while a fold trains, and 02 and 03 check the settings in each foldK.json."""
    done(TRAIN, *flags, *QUICK, "--fold", "all")
    path = flags[3] / "base" / "fold1.json"
    content = json.loads(path.read_text())
    content["config"]["lr"] = 1.0
    path.write_text(json.dumps(content))
    for script in ("02_oof.py", "03_infer.py"):
        line = refused(script, *flags)
        assert "fold1.pt was trained with other settings than fold 0: lr was 0.003 and is now 1.0" in line


HOLD = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from kit.experiment import lock_config
with lock_config(Path({folder!r}), dict(lr=1.0), set()):
    print("held", flush=True)
    time.sleep(60)
"""


def test_config_is_not_replaced_while_its_first_fold_trains(tmp_path):
    folder = tmp_path / "exp"
    code = HOLD.format(root=str(ROOT), folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"

    def claim(lr):
        with lock_config(folder, dict(lr=lr), set()):
            return json.loads((folder / "config.json").read_text())["lr"]

    with pytest.raises(common.UserError, match=r"is being trained with other settings: lr was 1.0 and is now 2.0"):
        claim(2.0)
    assert claim(1.0) == 1.0
    process.kill()
    process.wait()
    assert claim(2.0) == 2.0


def test_leftovers_of_fold_10_stay_while_fold_1_is_locked(tmp_path):
    for name in ("fold1.pt", "fold1_epochs.csv", "fold10.pt", "fold10_epochs.csv"):
        (tmp_path / f".tmp5.{name}").touch()
    remove_leftovers(tmp_path, "fold1.*", "fold1_*")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp5.fold10.pt", ".tmp5.fold10_epochs.csv"]


NOTE = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from kit.experiment import note_in_ledger
for i in range(20):
    note_in_ledger(Path({output!r}), f"{name}{{i}}", dict(cv=i / 20))
"""


def test_two_processes_write_to_the_ledger_at_once(tmp_path):
    processes = [
        subprocess.Popen([sys.executable, "-c", NOTE.format(root=str(ROOT), output=str(tmp_path), name=name)])
        for name in "ab"
    ]
    assert [process.wait() for process in processes] == [0, 0]
    table = pd.read_csv(tmp_path / "experiments.csv")
    assert set(table.experiment) == {f"{name}{i}" for name in "ab" for i in range(20)}


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("kit.locks.fcntl.lockf", no_locks)
    with locked(tmp_path / ".lock", "it"):
        note_in_ledger(tmp_path, "base", dict(cv=0.5))
    assert "no locks on the file system" in capsys.readouterr().err
    assert (tmp_path / "experiments.csv").exists()


# ---------------------------------------------------------------- disk, time and memory


def test_a_resume_file_that_cannot_be_written_is_a_warning(flags, monkeypatch):
    plain = torch.save

    def full(content, path):
        if os.path.basename(getattr(path, "name", "")).endswith("resume.pt"):
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(content, path)

    monkeypatch.setattr("torch.save", full)
    result = kit(TRAIN, *flags, *TINY, "--fold", 0)
    assert result.code == 0
    assert "no resume file: " in result.err
    assert "No space left on device" in result.err
    assert (flags[3] / "base" / "fold0.pt").exists()
    assert not list((flags[3] / "base").glob("*resume*"))


@pytest.mark.slow
def test_stop_after_ends_an_epoch_of_one_step(flags):
    command = [sys.executable, ROOT / TRAIN, *flags, *TINY, "--fold", 0, "--batch-size", 20, "--stop-after", "1s"]
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert result.returncode == 75, result.stderr
    assert "stopped by --stop-after; run it again to resume after 1 of 2 epochs" in result.stdout
    assert "goes on in epoch 2" in done(TRAIN, *flags, *TINY, "--fold", 0, "--batch-size", 20)


def test_a_full_gpu_memory_names_the_flags_that_help(flags, monkeypatch):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("torch.nn.functional.cross_entropy", full)
    line = refused(TRAIN, *flags, *TINY, "--fold", 0)
    assert "--micro-batch 4 computes each batch in parts, of 4 images now or --grad-checkpointing" in line


def test_the_first_steps_print_how_long_a_fold_takes(flags, monkeypatch):
    monkeypatch.setattr(monitor, "READ_SECONDS", -1)
    out = done(TRAIN, *flags, *TINY, "--batch-size", 2, "--fold", "all")
    lines = re.findall(r"^fold (\d) takes about (\d+\.\d min|\d+ s) \(\d+\.\d\d s a step of 2 images\)$", out, re.M)
    assert [fold for fold, _ in lines] == ["0", "1"]


def test_a_large_model_without_a_gpu_is_a_warning_with_hours(flags, monkeypatch):
    monkeypatch.setattr(monitor, "LARGE", 1e5)
    result = kit(TRAIN, *flags, *QUICK, "--fold", 0)
    assert result.code == 0
    assert re.search(r"there is no GPU: this fold would take about \d+ hours\. Without a GPU: @recipes/cpu", result.err)


def test_progress_in_a_log_is_a_line_now_and_then(monkeypatch, capsys):
    """Off a terminal there is no bar, but lines with a rate and the time left, at least LINE_SECONDS apart."""
    monkeypatch.setattr(common, "LINE_SECONDS", 0.2)
    with common.progress(100, "fold 0 epoch 1/2") as bar:
        for _ in range(50):
            time.sleep(0.02)
            bar.update(2)
    lines = capsys.readouterr().out.splitlines()
    assert 2 <= len(lines) <= 6
    assert re.search(r"^fold 0 epoch 1/2: \d+ of 100 img, .*\d+\.\d+img/s, \d\d:\d\d left", lines[-1])


# ---------------------------------------------------------------- device and workers


def test_another_gpu_opens_no_context_on_the_first(monkeypatch):
    chosen = []
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    monkeypatch.setattr("torch.zeros", lambda *_, device: chosen.append("used"))
    assert device.pick_device("cuda:1") == torch.device("cuda:1")
    assert chosen == [torch.device("cuda:1"), "used"]


GPU, CPU = torch.device("cuda"), torch.device("cpu")


def test_precision_follows_the_device(monkeypatch):
    for capability, auto in (((7, 5), "fp16"), ((9, 0), "bf16")):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda _, found=capability: found)
        assert device.pick_amp("auto", GPU) == auto
        assert device.pick_amp("thesis", GPU) == "fp16"
    assert device.pick_amp("thesis", CPU) == device.pick_amp("auto", CPU) == "none"


def test_a_gpu_times_its_kernels_and_takes_tf32_where_no_precision_is_given():
    for deterministic in (True, False):
        device.pick_device("cpu", deterministic)
        assert torch.backends.cudnn.benchmark == (not deterministic)
    for where, amp, expected in ((GPU, "none", "high"), (GPU, "bf16", "highest"), (CPU, "none", "highest")):
        device.autocast(where, amp)
        assert torch.get_float32_matmul_precision() == expected


def test_adamw_is_fused_on_a_gpu_alone(monkeypatch):
    given, config = {}, dict(lr=1.0, min_lr=0.1, weight_decay=0.0, schedule="cosine", warmup=0)
    monkeypatch.setattr(optim, "layer_groups", lambda *_: [torch.nn.Parameter(torch.zeros(1))])
    plain = timm.optim.create_optimizer_v2
    monkeypatch.setattr(
        "timm.optim.create_optimizer_v2",
        lambda params, name, fused=False, **rates: given.update({name: fused}) or plain(params, name, **rates),
    )
    for is_cuda in (True, False):
        classifier = SimpleNamespace(parameters=lambda here=is_cuda: iter([SimpleNamespace(is_cuda=here)]))
        for name in ("adamw", "adam", "lamb"):
            optim.OPTIMIZERS[name](classifier, config, 10)
        assert given == dict(adamw=is_cuda, adam=is_cuda, lamb=False)


def test_a_small_shared_memory_means_no_workers_by_default(monkeypatch, capsys):
    monkeypatch.setattr(device, "cpu_count", lambda: 8)
    monkeypatch.setattr("os.path.isdir", lambda _: True)
    for size, expected in ((64e6, 0), (8e9, 4)):
        device.most_workers.cache_clear()
        monkeypatch.setattr("shutil.disk_usage", lambda _, size=size: SimpleNamespace(total=size))
        assert [device.pick_workers(count, where) for count, where in ((None, GPU), (None, GPU), (2, GPU))] == [
            expected, expected, 2]  # fmt: skip
        assert device.pick_workers(None, CPU) == 0
        said = capsys.readouterr().out
        assert said.count("/dev/shm has 64 MB: --workers 0; docker run --shm-size=8g") == (expected == 0), "once"
    device.most_workers.cache_clear()


# ---------------------------------------------------------------- torch.compile


def test_compiling_repays_long_trainings_on_a_gpu_alone(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    assert device.compiling_repays(300, GPU)
    assert not device.compiling_repays(200, GPU), "a quarter of it is less than a minute"
    assert not device.compiling_repays(1e9, CPU)
    for name, value in (
        ("kit.train.device.WORLD", 2),
        ("torch.are_deterministic_algorithms_enabled", lambda: True),
        ("torch.cuda.get_device_capability", lambda _: (6, 0)),
        ("importlib.util.find_spec", lambda name: None),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(name, value)
            assert not device.compiling_repays(1e9, GPU), name


@pytest.mark.parametrize(("words", "early"), [([], False), (["--compile"], True), (["--compile", "off"], None)])
def test_the_first_steps_decide_whether_to_compile(flags, monkeypatch, words, early):
    """Here the compiler is replaced: it notes what it is called for, the validated average of the weights too."""
    compiled, asked = [], []
    monkeypatch.setattr(monitor, "READ_SECONDS", -1)
    monkeypatch.setattr(monitor, "compiling_repays", lambda seconds, _: asked.append(seconds) or True)
    monkeypatch.setattr("kit.train.run.compile_backbone", lambda backbone: compiled.append(len(asked)))
    with torch._dynamo.config.patch(suppress_errors=False):
        more = "--batch-size 4 --optimizer adamw --ema 0.9 --fold all".split()
        out = done(TRAIN, *flags, *QUICK, *more, *words)
        may_fail = torch._dynamo.config.suppress_errors
    lines = re.findall(r"s a step of 4 images\); torch.compile begins: about 60 s, to save \d+ s$", out, re.M)
    if early is None:
        assert compiled == asked == lines == []
    else:
        assert compiled == [0 if early else 1] * 4, "two networks a fold, and the second fold from its start"
        assert len(lines) == len(asked) == (0 if early else 1)
    assert may_fail == bool(asked), "what can't be compiled goes on uncompiled"


def test_a_compiler_that_fails_is_named_in_one_line(flags, monkeypatch):
    def fails(*_):
        raise torch._dynamo.exc.TorchDynamoException("InvalidCxxCompiler: No working C++ compiler found")

    monkeypatch.setattr("torch.nn.functional.cross_entropy", fails)
    line = refused(TRAIN, *flags, *TINY, "--fold", 0)
    assert "torch.compile can't be used here (InvalidCxxCompiler" in line
    assert "give --compile off" in line


def test_compile_takes_no_experiment_for_its_word():
    assert "argument --compile: invalid choice: 'base'" in refused("03_infer.py", "--compile", "base")


def test_a_spawned_worker_opens_the_memory_map_itself(tmp_path):
    np.save(tmp_path / "train_32.npy", np.arange(200 * 32 * 32 * 3, dtype=np.uint8).reshape(200, 32, 32, 3))
    images = ImageDataset(np.load(tmp_path / "train_32.npy", mmap_mode="r"), np.arange(200))
    pickled = pickle.dumps(images)
    assert len(pickled) < 10_000, "the images themselves must not be pickled"
    again = pickle.loads(pickled)
    assert isinstance(again.images, np.memmap)
    assert (again[(7, 0)][0] == images[(7, 0)][0]).all()


def test_validation_has_its_own_batch_size(flags, monkeypatch):
    train, sizes = load(TRAIN), []
    assert train.PREDICT_BATCH == 32
    plain = torch.utils.data.DataLoader

    def loader(*arguments, batch_size=None, **options):
        sizes.append(batch_size)
        return plain(*arguments, batch_size=batch_size or 1, **options)

    monkeypatch.setattr("kit.train.inference.DataLoader", loader)
    vit = ["--model", "test_vit", "--model-kwargs", "img_size=32"]
    done(TRAIN, *flags, *QUICK, *vit, "--batch-size", 1, "--accumulate", 8, "--fold", 0)
    assert sizes == [32]


def test_no_resume_file_is_due_with_save_minutes_0(tmp_path):
    machine = dict(amp="none", save_minutes=0, stop_after=None)
    assert not ResumeFile(SimpleNamespace(folder=tmp_path, config={}, provenance={}, replaced=(), **machine), 0).due()
    assert os.listdir(tmp_path) == []
