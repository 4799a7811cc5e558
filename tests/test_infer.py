"""03_infer.py: TTA, the submission, kept test logits, blends, precision, and errors."""

import csv
import json
import re
import shutil

from common import UserError, softmax

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY, done, kit, prepare, refused
from sklearn.metrics import roc_auc_score

from kit.score.blend import blend
from kit.score.tasks import Classes
from kit.submit import test_set
from kit.train import checkpoint, device, inference, model
from kit.train.device import pick_amp_of

CPU = torch.device("cpu")


@pytest.fixture
def copied(trained, tmp_path):
    """Copy the trained experiment, to be damaged. → flags, output folder."""
    shutil.copytree(trained.output, tmp_path / "output")
    return ["--input", trained.input, "--output", tmp_path / "output"], tmp_path / "output"


def submission_of(output, exp="base"):
    (path,) = (output / exp).glob("submission_*.csv")
    with open(path, newline="") as file:
        return path, list(csv.reader(file))


def oof_of(folder, kind, folds=range(3)):
    """Return targets [N] and probabilities [N, 2] of the folds' held-out images."""
    table = pd.concat([pd.read_csv(folder / f"fold{k}.csv") for k in folds])
    return table.target.to_numpy(), softmax(table[[f"{kind}_0", f"{kind}_1"]])


def test_d4_is_the_mean_over_the_eight_symmetries():
    torch.manual_seed(0)
    config = dict(model="test_resnet", model_kwargs={}, size=32, norm="thesis", head="linear")
    classifier = model.build_model(config, 3, "none").eval()
    images = np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3)).astype(np.uint8)
    views = [np.rot90(mirrored, k, (1, 2)) for mirrored in (images, images[:, :, ::-1]) for k in range(4)]
    assert len({view.tobytes() for view in views}) == 8
    each = [inference.predict(classifier, np.ascontiguousarray(view), np.arange(5), 2, CPU) for view in views]
    together = inference.predict(inference.TTAS["d4"](classifier), images, np.arange(5), 2, CPU)
    assert together == pytest.approx(np.mean(each, axis=0), abs=1e-5)
    assert not np.allclose(together, each[0], atol=1e-3), "views of one model differ"


def test_submission_is_the_mean_over_folds_in_the_samples_format(copied):
    flags, output = copied
    out = done("03_infer.py", *flags, "--competition", "4d63b1cf2dd3462d902ac805f60d96ca")
    path, rows = submission_of(output)
    cv = roc_auc_score(*(lambda targets, p: (targets, p[:, 1]))(*oof_of(output / "base", "views")))
    assert path.name == f"submission_base_CV{cv:.4f}.csv", "the CV of what is submitted: of the eight views"
    assert f'signate submit --task_key=4d63b1cf2dd3462d902ac805f60d96ca --path={path} --memo "base CV {cv:.4f}"' in out
    sample = (flags[1] / "sample_submit.csv").read_text().splitlines()
    assert [row[0] for row in rows] == [line.split(",")[0] for line in sample]
    images = np.load(output / "prepared" / "test_32.npy")
    each = []
    for k in range(3):
        model = inference.TTAS["d4"](checkpoint.load_fold(output / "base" / f"fold{k}.pt", CPU)[1])
        logits = inference.predict(model, images, np.arange(len(images)), 7, CPU)
        assert np.load(output / "base" / f"fold{k}_test.npy") == pytest.approx(logits, abs=1e-4)
        each.append(softmax(logits)[:, 1])
    assert [float(row[1]) for row in rows] == pytest.approx(np.mean(each, axis=0), abs=1e-5)
    solution = pd.read_csv(flags[1] / "solution.csv")
    public = solution.usage == "Public"
    score = roc_auc_score(solution.label[public], np.mean(each, axis=0)[public])
    assert f"public {score:.4f}" in out


def test_logits_are_predicted_again_only_after_a_change(copied):
    flags, output = copied
    done("03_infer.py", *flags)
    _, rows = submission_of(output)
    (output / "base" / "fold1_test.npy").write_bytes(b"damaged")
    out = done("03_infer.py", *flags)
    assert re.findall(r"fold (\d), d4 views: \d+ images, predicted earlier", out) == ["0", "2"]
    assert submission_of(output)[1] == rows
    out = done("03_infer.py", *flags, "--tta", "none")
    assert "base fold 0, one view: " in out
    assert "earlier" not in out, "other views are other predictions"
    ledger = pd.read_csv(output / "experiments.csv").set_index("experiment")
    assert set(ledger.index) == {"base", "base_none"}, "a score of other views isn't noted beside the CV of these"
    (output / "base").glob("submission_base_none_CV*.csv").__next__().unlink()
    path = output / "prepared" / "test.csv"
    lines = path.read_text().splitlines()
    done("03_infer.py", *flags)
    path.write_text("\n".join([lines[0], *lines[:0:-1]]) + "\n")
    assert "earlier" not in done("03_infer.py", *flags), "another order of images"


def test_missing_folds_are_printed_and_left_out(copied):
    flags, output = copied
    (output / "base" / "fold1.pt").unlink()
    out = done("03_infer.py", *flags)
    assert "base: 2 of 3 folds" in out
    targets, p = oof_of(output / "base", "views", (0, 2))
    path, rows = submission_of(output)
    assert path.stem.endswith(f"CV{roc_auc_score(targets, p[:, 1]):.4f}")
    kept = [softmax(np.load(output / "base" / f"fold{k}_test.npy"))[:, 1] for k in (0, 2)]
    assert [float(row[1]) for row in rows] == pytest.approx(np.mean(kept, axis=0), abs=1e-6)
    for k in (0, 2):
        (output / "base" / f"fold{k}.json").unlink()
    assert "has no finished fold" in refused("03_infer.py", *flags)
    assert "nowhere has no finished fold" in refused("03_infer.py", "nowhere", *flags)


def test_several_experiments_are_blended(copied):
    flags, output = copied
    done("01_train_fold.py", *flags, *TINY, "--fold", "all", "--exp", "other", "--seed", 1, "--epochs", 1)
    for exps in (["base"], ["other"], ["base", "other"]):
        done("03_infer.py", *exps, *flags)
    (mean,) = output.glob("submission_base+other_CV*.csv")
    paths = [submission_of(output)[0], submission_of(output, "other")[0], mean]
    values = [np.loadtxt(path, delimiter=",", usecols=1) for path in paths]
    assert values[2] == pytest.approx((values[0] + values[1]) / 2, abs=1e-6)
    assert not np.allclose(values[0], values[1])
    targets, first = oof_of(output / "base", "views")
    second = oof_of(output / "other", "views")[1]
    assert mean.stem.endswith(f"CV{roc_auc_score(targets, (first + second)[:, 1]):.4f}")
    mean.unlink()
    done("03_infer.py", "base", "other", *flags, "--weights", 3, 1)
    (weighted,) = output.glob("submission_base+other_3.0_1.0_CV*.csv")
    assert np.loadtxt(weighted, delimiter=",", usecols=1) == pytest.approx(
        0.75 * values[0] + 0.25 * values[1], abs=1e-6
    )
    weighted.unlink()
    out = done("03_infer.py", "base", "other", *flags, "--blend", "rank")
    (ranks,) = output.glob("submission_base+other_rank_CV*.csv")
    parts = [np.stack([1 - v, v], axis=1) for v in values[:2]]
    expected = blend(parts, "rank", None, Classes(["0", "1"]))[:, 1]
    assert np.loadtxt(ranks, delimiter=",", usecols=1) == pytest.approx(expected, abs=1e-3)
    assert "named twice" in refused("03_infer.py", "base", "base", *flags)
    assert out.count("predicted earlier") == 6, "blends are made of what is kept"
    assert "--weights needs a number for each" in refused("03_infer.py", "base", "other", *flags, "--weights", 1)


def test_a_model_of_other_folds_or_settings_is_refused(copied):
    flags, output = copied
    path = output / "base" / "fold1.pt"
    saved = torch.load(path)
    torch.save(saved | dict(config=saved["config"] | dict(lr=1.0)), path)
    assert "fold1.pt isn't the model of fold1.json" in refused("03_infer.py", *flags)
    path.write_bytes(path.read_bytes()[:5000])
    assert "fold1.pt is damaged" in refused("03_infer.py", *flags)
    saved["model"] = {
        key: value * torch.nan if value.is_floating_point() else value for key, value in saved["model"].items()
    }
    torch.save(saved, path)
    assert "NaN or infinite" in refused("03_infer.py", *flags, "--tta", "none")
    assert not list((output / "base").glob("submission*"))
    folds = output / "prepared" / "folds.csv"
    rows = folds.read_text().splitlines()
    rows[1] = rows[1][:-1] + str((int(rows[1][-1]) + 1) % 3)
    folds.write_text("\n".join(rows) + "\n")
    assert "folds.csv" in refused("03_infer.py", *flags)


def test_folds_of_another_run_are_refused(copied):
    flags, _ = copied
    done("00_prepare.py", *flags, "--size", 32, "--folds", 3, "--seed", 1, "--overwrite", "--groups", "none")
    for script in ("02_oof.py", "03_infer.py"):
        assert "other folds" in refused(script, *flags)
    assert "folds_hash" in refused("01_train_fold.py", *flags, *TINY, "--fold", 0)


def test_a_fold_trained_on_a_gpu_in_fp16_is_predicted_in_fp32_on_a_cpu(copied, monkeypatch):
    flags, output = copied
    path = output / "base" / "fold0.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | dict(run=content["run"] | dict(amp="fp16", device="cuda"))))
    seen = []
    plain = device.autocast
    monkeypatch.setattr(inference, "autocast", lambda device, amp: seen.append(amp) or plain(device, amp))
    assert kit("03_infer.py", *flags).code == 0
    assert set(seen) == {"none"}


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
def test_auto_is_no_precision_that_the_device_only_emulates(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cuda, cpu, usual = torch.device("cuda", 1), torch.device("cpu"), "bf16" if capability > (8, 0) else "fp16"
    trained = dict(device="cuda:0", amp="bf16")
    assert pick_amp_of(trained, "auto", cuda) == usual
    assert pick_amp_of(trained, "bf16", cuda) == "bf16"
    assert pick_amp_of(trained | dict(amp="none"), "auto", cuda) == "none"
    assert pick_amp_of(trained, "auto", cpu) == "none"
    assert pick_amp_of({}, "auto", cuda) == usual


def test_auto_is_the_precision_of_training_on_such_a_device(copied, monkeypatch):
    """The CV is of bf16 then, and the submission too; with another precision all is predicted again."""
    flags, output = copied
    for fold in range(3):
        path = output / "base" / f"fold{fold}.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | dict(run=content["run"] | dict(amp="bf16"))))
    seen, plain = [], device.autocast
    monkeypatch.setattr(inference, "autocast", lambda device, amp: seen.append(amp) or plain(device, amp))
    done("03_infer.py", *flags)
    assert set(seen) == {"bf16"}
    assert done("03_infer.py", *flags).count("predicted earlier") == 3
    assert "predicted earlier" not in done("03_infer.py", *flags, "--amp", "none")
    assert "none" in seen


def test_the_submission_follows_a_sample_of_labels_or_of_columns(copied):
    flags, output = copied
    path = output / "prepared" / "prepared.json"
    prepared = json.loads(path.read_text())
    layout = pd.read_csv(output / "prepared" / "sample.csv", dtype=str)
    for submission, header in (
        (dict(header=["id", "class"], value="label", columns=None), ["id", "class"]),
        (dict(header=["id", "1", "0"], value="probability", columns=["1", "0"]), ["id", "1", "0"]),
    ):
        path.write_text(json.dumps(prepared | dict(submission=submission)))
        wide = layout.assign(**{f"c{i}": "" for i in range(1, len(header))})
        wide.to_csv(output / "prepared" / "sample.csv", index=False)
        done("03_infer.py", *flags)
        _, rows = submission_of(output)
        assert rows[0] == header
        if submission["value"] == "label":
            assert {row[1] for row in rows[1:]} <= {"0", "1"}
            labels = [row[1] for row in rows[1:]]
        else:
            values = np.array([row[1:] for row in rows[1:]], float)
            assert values.sum(axis=1) == pytest.approx(np.ones(len(values)))
            assert labels == ["1" if one > zero else "0" for one, zero in values]


# ---------------------------------------------------------------- test logits that 01 predicts


def kept_logits(output, exp="base"):
    """Return the bytes of the test logits and of what made them, by file name."""
    return {path.name: path.read_bytes() for path in sorted((output / exp).glob("fold?_test.*"))}


def test_01_predicts_what_03_would(copied, no_pictures):
    """By the model that was just trained, or a finished fold's: the same bytes."""
    flags, output = copied
    done("03_infer.py", *flags)
    by_03, submission = kept_logits(output), submission_of(output)[0].read_bytes()
    assert len(by_03) == 6
    for path in (output / "base").glob("fold?_test.*"):
        path.unlink()
    done("01_train_fold.py", *flags, *TINY, "--fold", 2, "--overwrite", "--predict")
    out = done("01_train_fold.py", *flags, *TINY, "--predict", "--fold", "all")
    assert re.findall(r"base fold (\d), d4 views: \d+ images(, predicted earlier)?", out) == [
        ("0", ""), ("1", ""), ("2", ", predicted earlier")]  # fmt: skip
    assert kept_logits(output) == by_03
    assert done("03_infer.py", *flags).count("predicted earlier") == 3
    assert submission_of(output)[0].read_bytes() == submission


@pytest.mark.parametrize("more", ["--tune probe --head fresh --tta flip", "--ema 0.9 --augment flip"])
def test_01_predicts_with_the_kept_weights(more, of_classes, vit, no_pictures):
    flags = of_classes(2)
    done("01_train_fold.py", *flags, *vit, *more.split(), "--fold", 0, "--predict")
    by_01 = kept_logits(flags[3])
    assert "predicted earlier" in done("03_infer.py", *flags)
    (flags[3] / "base" / "fold0_test.json").unlink()
    done("03_infer.py", *flags)
    assert len(by_01) == 2
    assert kept_logits(flags[3]) == by_01


def test_a_stop_before_the_test_images_are_predicted(toy, no_pictures):
    """Each start does something, and the same command comes to the end, with the bytes of an unbroken run."""
    flags = toy()
    prepare(flags, 32, "--folds", 2)
    train = ["01_train_fold.py", *flags, *TINY, "--epochs", 1, "--batch-size", 20, "--tta", "none", "--predict"]
    done(*train, "--exp", "unbroken")
    codes, out = [], ""
    while codes[-1:] != [0]:
        result = kit(*train, "--exp", "stopped", "--stop-after", "1s")
        codes, out = [*codes, result.code], out + result.out
        assert len(codes) < 9
    assert codes == [75, 75, 0], "after each training; each start predicts and trains"
    assert re.findall(r"fold (\d): stopped by --stop-after; .* to resume after its training", out) == ["0", "1"]
    assert kept_logits(flags[3], "stopped") == kept_logits(flags[3], "unbroken")
    for path in (flags[3] / "stopped").glob("fold?_test.npy"):
        path.unlink()
    result = kit(*train, "--exp", "stopped", "--stop-after", "1s")
    assert (result.code, result.out.count("images predicted")) == (75, 1), "one of two finished folds"


def test_a_test_set_that_cannot_be_predicted_costs_no_fold(copied, no_pictures, monkeypatch):
    flags, output = copied
    train = ["01_train_fold.py", *flags, *TINY, "--epochs", 1, "--exp", "new", "--fold", 0, "--predict"]

    def fails(*_):
        raise UserError("the GPU is gone")

    with monkeypatch.context() as patch:
        patch.setattr(test_set, "predict", fails)
        assert "the GPU is gone" in refused(*train)
    out = done(*train)
    assert "fold 0 of new is finished" in out
    assert "new fold 0, d4 views: " in out
    (output / "prepared" / "test_32.npy").unlink()
    train[train.index("new")] = "newer"
    assert "test_32.npy is missing: run python 00_prepare.py again" in refused(*train)
    assert not (output / "newer").exists(), "before any training"


def test_images_in_memory_need_no_workers(tmp_path, monkeypatch):
    started, plain = [], inference.DataLoader
    monkeypatch.setattr(inference, "DataLoader", lambda *a, **k: started.append(k["num_workers"]) or plain(*a, **k))
    np.save(tmp_path / "images.npy", np.zeros((3, 8, 8, 3), np.uint8))
    network = torch.nn.Flatten()
    for mode in (None, "r"):
        images = np.load(tmp_path / "images.npy", mmap_mode=mode)
        assert inference.predict(network, images, np.arange(3), 2, CPU, workers=1).shape == (3, 192)
    assert started == [0, 1]
