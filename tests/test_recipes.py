"""The switches of 01 beyond the thesis: probes, earlier experiments, layers, schedules, averages."""

import itertools
import json
import math
import os
import random
import re
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import ROOT, done, kit, load, png, refused, toy_image, write_csv, write_zip
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.layers import resample_abs_pos_embed

from common import UserError, softmax
from kit.train import checkpoint, inference, linear_probe
from kit.train import model as networks
from kit.train import settings as flag_checks
from kit.train.augment import AUGMENTATIONS, Augmentation
from kit.train.optim import SCHEDULES, choose_trained

train = load("01_train_fold.py")
CPU = torch.device("cpu")
TRAIN = "01_train_fold.py"
PER_CLASS = {2: (32, 16), 3: (24, 16, 8)}  # training images
TESTS = 6
# three steps an epoch in each of two folds
PREPARE = "--folds 2 --groups source".split()
QUICK = "--size 32 --batch-size 8 --epochs 1 --lr 3e-3 --min-lr 3e-4".split()
PROBE = "--tune probe --head fresh".split()
STEP = ("--stop-after", "1s")  # imports took longer, so that each start makes one step


def competition(folder, classes):
    """Writes small images of unlike frequent classes into `folder`; two and two are of one source."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    labels = np.repeat(range(classes), PER_CLASS[classes])
    images = [toy_image(rng, label) for label in labels]
    for image in (image for image, label in zip(images, labels, strict=True) if label == 2):
        image[8:16, 8:16] += 90
    labels[12:16], labels[-4:-2] = 1, 0  # some are wrong
    rows = [(f"{i:03}.png", label, f"source {i // 2}") for i, label in enumerate(labels)]
    write_zip(folder / "train.zip", {f"train/{row[0]}": png(image) for row, image in zip(rows, images, strict=True)})
    write_csv(folder / "train.csv", [("image_name", "label", "source"), *rows])
    write_zip(folder / "test.zip", {f"test/t{i}.png": png(toy_image(rng, i % 2)) for i in range(TESTS)})
    write_csv(folder / "sample_submit.csv", [(f"t{i}.png", *[0.5] * (classes if classes > 2 else 1)) for i in range(6)])


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """An experiment's picture takes longer than its training here."""
    monkeypatch.setattr("kit.report.pictures.draw_classes", lambda *_: None)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """A function: number of classes → the folder of a prepared competition of that many, for reading only."""
    made = {}

    def world(classes):
        if classes not in made:
            folder = made[classes] = tmp_path_factory.mktemp(f"world{classes}")
            competition(folder / "input", classes)
            done("00_prepare.py", *folders(folder), "--size", 32, *PREPARE)
        return made[classes]

    return world


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights files of two small models, by name: what a download would bring."""
    folder, paths = tmp_path_factory.mktemp("weights"), {}
    for name, kwargs in (("test_resnet", {}), ("test_vit", dict(img_size=32))):
        torch.manual_seed(1)
        paths[name] = folder / f"{name}.pth"
        torch.save(timm.create_model(name, **kwargs).state_dict(), paths[name])
    return paths


def folders(folder):
    return ["--input", folder / "input", "--output", folder / "output"]


@pytest.fixture
def of_classes(worlds, tmp_path):
    """A function: number of classes → flags of a copy of that competition."""

    def copied(classes):
        shutil.copytree(worlds(classes) / "output", tmp_path / "output")
        return ["--input", worlds(classes) / "input", "--output", tmp_path / "output"]

    return copied


@pytest.fixture
def flags(of_classes):
    return of_classes(2)


@pytest.fixture
def resnet(weights):
    return [*QUICK, "--model", "test_resnet", "--weights", weights["test_resnet"]]


@pytest.fixture
def vit(weights):
    return [*QUICK, "--model", "test_vit", "--weights", weights["test_vit"]]


def files(flags, exp, fold=0):
    """The bytes of what a fold leaves: its model and predictions."""
    return [(flags[3] / exp / f"fold{fold}.{ending}").read_bytes() for ending in ("pt", "csv")]


def kept_weights(flags, exp, fold=0):
    return torch.load(flags[3] / exp / f"fold{fold}.pt", weights_only=True)["model"]


def started(flags, *more, fold=0):
    """→ 01's namespace of a fold that is about to be trained."""
    args = train.make_parser().parse_args([str(word) for word in (*flags, *more, "--fold", fold)])
    shared = train.gather(args, args.output / args.exp, args.seed[0], CPU)
    return train.set_up(shared, fold)


def settings(*more):
    return json.loads(done(TRAIN, "--fold", 0, "--print-config", "--device", "cpu", *more))


def same_after_stops(flags, *more):
    """Trains two epochs at one go, and with a stop after each of the first two steps, the first epoch and the fourth
    step. → the bytes of both."""
    more = [*more, "--fold", 0, "--epochs", 2]
    done(TRAIN, *flags, *more, "--exp", "whole")
    stops = [kit(TRAIN, *flags, *more, *STEP, "--exp", "parts").code for _ in range(4)]
    assert stops == [75] * 4
    assert "goes on in epoch 2 after 1 of 3 steps" in done(TRAIN, *flags, *more, "--exp", "parts")
    return files(flags, "whole"), files(flags, "parts")


# ---------------------------------------------------------------- --tune probe


def features_path(flags, model="test_resnet"):
    """The newest features of the model."""
    return max((flags[3] / "prepared").glob(f"features_{model}_32_*.npy"), key=lambda path: path.stat().st_mtime_ns)


def own_features(weights, images, tta):
    """What a network without its classifier makes of uint8 [N, S, S, 3] in the views: float32 [N, V, D]."""
    backbone = timm.create_model("test_resnet", num_classes=0).eval()
    backbone.load_state_dict(torch.load(weights, weights_only=True), strict=False)
    plain = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    turns = itertools.product(*([(0, 1)] * dict(d4=3, flip=1, none=0)[tta]))
    views = []
    for mirrored, flipped, turned in (turn + (0,) * (3 - len(turn)) for turn in turns):
        view = plain.flip(3) if mirrored else plain
        view = view.flip(2) if flipped else view
        views.append(torch.rot90(view, 1, (2, 3)) if turned else view)
    with torch.inference_mode():
        return torch.stack([backbone(view) for view in views], 1).numpy()


@pytest.mark.parametrize(("tta", "views"), [("d4", 8), ("flip", 2), ("none", 1)])
def test_features_are_the_networks_own_of_each_view(flags, resnet, weights, tta, views):
    done(TRAIN, *flags, *resnet, *PROBE, "--fold", 0, "--augment", tta)
    vectors = np.load(features_path(flags))
    assert vectors.dtype == np.float16
    images = [np.load(flags[3] / "prepared" / f"{part}_32.npy") for part in ("train", "test")]
    expected = own_features(weights["test_resnet"], np.concatenate(images), tta)
    assert vectors.shape == expected.shape == (48 + TESTS, views, expected.shape[2])
    bound = dict(rtol=2**-10, atol=1e-4)  # fp16 keeps 11 bits
    assert np.allclose(vectors[:, 0], expected[:, 0], **bound), "the plain view comes first"
    assert np.allclose(np.sort(vectors, 1), np.sort(expected, 1), **bound)
    if views > 1:
        assert not np.allclose(vectors[:, 0], vectors[:, -1], rtol=0.1), "views differ"


def test_features_are_computed_once_for_all_that_they_fit(flags, resnet, vit, weights, tmp_path):
    def there(*more):
        done(TRAIN, *flags, *more, *PROBE)
        return {path.name: path.stat().st_mtime_ns for path in (flags[3] / "prepared").glob("features_*.npy")}

    first = there(*resnet, "--fold", 0)
    assert len(first) == 1
    assert there(*resnet, "--fold", 1) == first
    assert there(*resnet, "--fold", "all", "--seed", 5, 6, "--exp", "seeds") == first
    assert there(*resnet, "--fold", 0, "--sampler", "shuffle", "--augment", "none", "--exp", "plain") == first, "d4"
    state = torch.load(weights["test_resnet"], weights_only=True)
    torch.save({key: value * 1.1 for key, value in state.items()}, tmp_path / "others.pth")
    others = (*resnet, "--augment", "flip", "--weights", tmp_path / "others.pth")
    for count, (exp, more) in enumerate(dict(vit=vit, flip=(*resnet, "--augment", "flip"), others=others).items(), 2):
        found = there(*more, "--fold", 0, "--exp", exp)
        assert len(found) == count, exp
        assert found.items() > first.items(), "two never push each other out"
        first = found
    prepared = flags[3] / "prepared" / "prepared.json"
    content = json.loads(prepared.read_text())
    content["made_from"]["test_images"] = "others"
    prepared.write_text(json.dumps(content))
    assert len(there(*others, "--fold", 0, "--exp", "images")) == 5, "other images"


def test_new_folds_of_new_images_leave_no_features(flags, resnet):
    done(TRAIN, *flags, *resnet, *PROBE, "--fold", 0)
    done("00_prepare.py", *flags, "--size", 32, *PREPARE, "--overwrite")
    assert not list((flags[3] / "prepared").glob("features_*"))


def test_a_probes_fold_is_a_model_like_any_other(flags, resnet):
    result = kit(TRAIN, *flags, *resnet, *PROBE, "--fold", 0)
    assert (result.code, result.err) == (0, "")
    assert "fold 0 of base: kept epoch 1" in result.out
    saved, classifier = checkpoint.load_fold(flags[3] / "base" / "fold0.pt", CPU)
    images, table = np.load(flags[3] / "prepared" / "train_32.npy"), pd.read_csv(flags[3] / "base" / "fold0.csv")
    rows = np.flatnonzero(pd.read_csv(flags[3] / "prepared" / "folds.csv").fold == 0)
    for kind, model in (("views", inference.TTAS["d4"](classifier)), ("best", classifier), ("last", classifier)):
        logits = inference.predict(model, images, rows, 32, CPU)
        assert np.abs(table[[f"{kind}_0", f"{kind}_1"]].to_numpy() - logits).max() < 1e-2, kind
    assert np.abs(table.views_1 - table.best_1).max() > 1e-2
    epochs = pd.read_csv(flags[3] / "base" / "fold0_epochs.csv")
    assert epochs.epoch.tolist() == [1]
    assert saved["scores"]["auc"] == pytest.approx(epochs.valid_auc.item(), abs=1e-6)


def sklearn_probe(vectors, targets, strength, balanced):
    model = LogisticRegression(C=strength, class_weight="balanced" if balanced else None, max_iter=5000)
    return make_pipeline(StandardScaler(), model).fit(vectors, targets)


@pytest.mark.parametrize(("classes", "sampler"), [(2, "imbalanced"), (2, "shuffle"), (3, "imbalanced"), (3, "shuffle")])
def test_the_head_is_scikit_learns_logistic_regression(of_classes, resnet, classes, sampler):
    flags = of_classes(classes)
    out = done(TRAIN, *flags, *resnet, *PROBE, "--fold", 1, "--sampler", sampler)
    printed = float(re.search(r"^fold 1: a logistic regression on frozen features, C = (\S+)$", out, re.M)[1])
    strength = linear_probe.STRENGTHS[np.abs(np.log(linear_probe.STRENGTHS / printed)).argmin()]
    assert printed == pytest.approx(strength, rel=0.05)
    folds = pd.read_csv(flags[3] / "prepared" / "folds.csv")
    count, vectors = len(folds), np.load(features_path(flags)).mean(1, dtype=np.float32)
    seen, targets = (folds.fold != 1).to_numpy(), folds.target.to_numpy()
    head = checkpoint.load_fold(flags[3] / "base" / "fold1.pt", CPU)[1].head
    with torch.inference_mode():
        ours = softmax(head(torch.from_numpy(vectors)).numpy())
    theirs, others = (
        sklearn_probe(vectors[:count][seen], targets[seen], strength, balanced).predict_proba(vectors)
        for balanced in (sampler == "imbalanced", sampler != "imbalanced")
    )
    assert np.abs(ours - theirs).max() < 2e-3
    assert np.abs(ours - others).max() > 2e-2, "class weights count"


@pytest.mark.parametrize("present", [[0, 2], [0, 2, 3]])
def test_a_class_without_training_images_is_never_predicted(present):
    rng = np.random.default_rng(0)
    targets = np.repeat(present, 20)
    vectors = (rng.normal(0, 1, (len(targets), 5)) + targets[:, None] / 2).astype(np.float32)
    weight, bias, strength = linear_probe.fit_head(vectors, targets, np.arange(len(targets)), 4, False, 777)
    assert weight.shape == (4, 5)
    assert weight.dtype == bias.dtype == np.float32
    ours = softmax(vectors @ weight.T + bias)
    absent = sorted({*range(4)} - {*present})
    assert ours[:, absent].max() < 0.01
    theirs = sklearn_probe(vectors, targets, strength, False).predict_proba(vectors)
    assert np.abs(ours[:, present] - theirs).max() < 1e-2


def test_c_is_chosen_in_folds_that_keep_groups_together(flags, resnet, monkeypatch):
    plain_fit, plain_choose, seen = linear_probe.fit_head, linear_probe.choose_strength, {}

    def fit(vectors, targets, groups, *more):
        seen["groups"] = groups
        return plain_fit(vectors, targets, groups, *more)

    def choose(points, targets, folds, options):
        seen["folds"] = folds
        return plain_choose(points, targets, folds, options)

    monkeypatch.setattr(linear_probe, "fit_head", fit)
    monkeypatch.setattr(linear_probe, "choose_strength", choose)
    done(TRAIN, *flags, *resnet, *PROBE, "--fold", 0)
    folds = pd.read_csv(flags[3] / "prepared" / "folds.csv")
    assert seen["groups"].tolist() == folds.group[folds.fold != 0].tolist()
    assert pd.Series(seen["groups"]).value_counts().tolist() == [2] * 12, "pairs of one source"
    by_group = pd.Series(seen["folds"]).groupby(seen["groups"])
    assert (by_group.nunique() == 1).all()
    assert len(set(seen["folds"])) == linear_probe.INNER


def test_c_is_the_one_of_least_log_loss():
    """Against each C on its own: small where noise drowns the classes, large where they are clear."""
    rng, targets, folds = np.random.default_rng(0), np.arange(200) % 2, np.arange(200) // 2 % 4
    chosen = []
    for distance in (0.0, 0.3, 3.0):
        points = rng.normal(0, 1, (200, 20)) + distance * targets[:, None]
        losses = []
        for c in linear_probe.STRENGTHS:
            parts = [(folds != k, folds == k) for k in range(4)]
            fits = [(LogisticRegression(C=c).fit(points[seen], targets[seen]), asked) for seen, asked in parts]
            losses.append(np.mean([log_loss(targets[asked], fit.predict_proba(points[asked])) for fit, asked in fits]))
        chosen.append(linear_probe.choose_strength(points, targets, folds, dict(class_weight=None, max_iter=1000)))
        assert chosen[-1] == linear_probe.STRENGTHS[np.argmin(losses)]
    assert chosen[0] < chosen[1] < chosen[2]


def test_groups_that_hold_whole_classes():
    """Three sources, a class each: an inner fold has no class that the others know."""
    targets = np.repeat([0, 1, 2], 10)
    vectors = np.random.default_rng(0).normal(0, 1, (30, 4)).astype(np.float32)
    weight, _, strength = linear_probe.fit_head(vectors, targets, targets, 3, False, 1)
    assert np.isfinite(weight).all()
    assert strength in linear_probe.STRENGTHS
    rows = targets < 2  # two sources: an inner fold's model knows one class
    _, _, strength = linear_probe.fit_head(vectors[rows], targets[rows], targets[rows], 3, False, 1)
    assert strength in linear_probe.STRENGTHS


def test_a_head_of_several_layers_is_refused(flags, resnet, monkeypatch):
    two = networks.Head("features", lambda n, k: torch.nn.Sequential(torch.nn.Linear(n, 4), torch.nn.Linear(4, k)))
    monkeypatch.setitem(networks.HEADS, "two", two)
    line = refused(TRAIN, *flags, *resnet, "--tune", "probe", "--head", "two", "--fold", 0)
    assert "--head two is no single layer" in line


def test_03_takes_cached_features_and_needs_none(flags, resnet, monkeypatch):
    done(TRAIN, *flags, *resnet, *PROBE, "--fold", "all")

    def network(*_):
        raise AssertionError("the network ran")

    with monkeypatch.context() as patch:
        patch.setattr(inference, "predict", network)
        done("03_infer.py", *flags)
    paths = [flags[3] / "base" / f"fold{k}_test.npy" for k in (0, 1)]
    cached = [np.load(path) for path in paths]
    assert cached[0].shape == (TESTS, 2)
    for path in paths:
        path.unlink()
    features_path(flags).unlink()
    done("03_infer.py", *flags)
    for path, logits in zip(paths, cached, strict=True):
        assert 0 < np.abs(np.load(path) - logits).max() < 1e-2
    done("03_infer.py", *flags, "--tta", "none")  # of which no fold was validated
    assert len([*flags[3].glob("base/submission_base_none_CV*.csv")]) == 1


def test_02_and_blends_take_a_probe_beside_a_trained_experiment(flags, resnet):
    done(TRAIN, *flags, *resnet, *PROBE, "--fold", "all", "--exp", "frozen")
    done(TRAIN, *flags, *resnet, "--fold", "all", "--exp", "trained")
    out = done("02_oof.py", "frozen", "trained", *flags, "--draws", 100)
    assert re.search(r"trained against frozen: .*Δ = ", out)
    assert (flags[3] / "frozen" / "report.html").exists()
    done("03_infer.py", "frozen", "trained", *flags)
    (submission,) = flags[3].glob("submission_frozen+trained_CV*.csv")
    each = [softmax(np.load(flags[3] / exp / f"fold{k}_test.npy")) for exp in ("frozen", "trained") for k in (0, 1)]
    found = np.loadtxt(submission, delimiter=",", usecols=1)
    assert found == pytest.approx(np.mean(each, axis=0)[:, 1], abs=1e-6)
    assert np.abs(found - np.mean(each[2:], axis=0)[:, 1]).max() > 1e-3


def test_damaged_features_are_computed_anew(flags, resnet):
    run = started(flags, *resnet, *PROBE)
    vectors = np.array(linear_probe.features(run))
    path = features_path(flags)
    whole = path.read_bytes()
    damages = {"cut": whole[: len(whole) // 2], "empty": b"", "garbage": b"x" * 1000, "lost": None}
    for name, content in damages.items():
        path.unlink() if content is None else path.write_bytes(content)
        assert np.array_equal(linear_probe.features(run), vectors), name
        assert path.read_bytes() == whole, name
    before = path.stat().st_ino
    linear_probe.features(run)
    assert path.stat().st_ino == before, "what is whole is kept"


@pytest.mark.parametrize("end", ["ctrl-c", "kill", "half a block"])
def test_a_killed_computation_goes_on_after_its_last_block(flags, resnet, monkeypatch, end):
    monkeypatch.setattr(linear_probe, "BLOCK", 8)  # the fifth block is in the training images
    run = started(flags, *resnet, *PROBE)
    whole = np.array(linear_probe.features(run))
    (path := features_path(flags)).unlink()
    plain, calls = inference.predict, []

    def counted(*arguments):
        calls.append(arguments)
        return plain(*arguments)

    def dies(*arguments):
        if len(calls) == 4:
            if end == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt
        return counted(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(linear_probe, "predict", dies)
        if end == "kill":
            if not (child := os.fork()):
                torch.set_num_threads(1)
                kit(TRAIN, *flags, *resnet, *PROBE, "--fold", 0)
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        else:
            with pytest.raises(KeyboardInterrupt):
                kit(TRAIN, *flags, *resnet, *PROBE, "--fold", 0)
    part = path.with_suffix(".part")
    assert part.exists()
    assert not path.exists()
    if end == "half a block":
        part.write_bytes(part.read_bytes()[:-10])
    calls.clear()
    monkeypatch.setattr(linear_probe, "predict", counted)
    done(TRAIN, *flags, *resnet, *PROBE, "--fold", 0)
    blocks = -(-48 // 8) + -(-TESTS // 8)
    assert len(calls) == blocks - (3 if end == "half a block" else 4)
    assert np.array_equal(np.load(path), whole)
    assert not part.exists()


def test_features_end_by_stop_after_and_go_on(flags, resnet, monkeypatch):
    monkeypatch.setattr(linear_probe, "BLOCK", 32)
    result = kit(TRAIN, *flags, *resnet, *PROBE, "--fold", 0, *STEP)
    assert result.code == 75
    assert "features: stopped by --stop-after; run it again to go on after 1 of" in result.out
    done(TRAIN, *flags, *resnet, *PROBE, "--fold", 0)


def test_blocks_join_into_the_same_file(flags, resnet, monkeypatch):
    run = started(flags, *resnet, *PROBE)
    at_once = np.array(linear_probe.features(run))
    features_path(flags).unlink()
    monkeypatch.setattr(linear_probe, "BLOCK", 7)
    in_blocks = linear_probe.features(run)
    assert in_blocks.shape == at_once.shape
    assert np.allclose(in_blocks, at_once, rtol=2**-9, atol=1e-4)


def test_features_that_fp16_cannot_hold_are_refused(flags, resnet, weights, tmp_path):
    state = torch.load(weights["test_resnet"], weights_only=True)
    torch.save(state | {"bn1.weight": state["bn1.weight"] * 1e7}, tmp_path / "huge.pth")
    line = refused(TRAIN, *flags, *resnet, *PROBE, "--weights", tmp_path / "huge.pth", "--fold", 0)
    assert "test_resnet: features are no numbers, or too large for fp16" in line
    assert not list((flags[3] / "prepared").glob("features*"))


# ---------------------------------------------------------------- --init


STILL = "--lr 1e-9 --min-lr 0 --optimizer sgd --epochs 1".split()  # nothing moves that one would see


def test_a_fold_may_start_from_the_probes_head(flags, vit):
    done(TRAIN, *flags, *vit, *PROBE, "--fold", 0, "--exp", "probe")
    fresh = [*vit, "--head", "fresh", *STILL, "--fold", 0]
    done(TRAIN, *flags, *fresh, "--init", "probe", "--exp", "started")
    done(TRAIN, *flags, *fresh, "--exp", "drawn")
    probe, begun, drawn = (kept_weights(flags, exp) for exp in ("probe", "started", "drawn"))
    for key in ("head.weight", "head.bias"):
        assert torch.allclose(begun[key], probe[key], atol=1e-6), key
        assert not torch.allclose(drawn[key], probe[key], atol=1e-2), key
    before, after = (pd.read_csv(flags[3] / exp / "fold0_epochs.csv").iloc[-1] for exp in ("probe", "started"))
    assert after.valid_loss == pytest.approx(before.valid_loss, abs=1e-3)
    assert after.valid_auc == pytest.approx(before.valid_auc, abs=1e-3)


def test_statistics_that_the_probes_head_was_fitted_to_stay(flags, resnet, weights):
    done(TRAIN, *flags, *resnet, "--fold", 0, "--init", "probe", "--head", "fresh", "--optimizer", "adamw")
    before, after = torch.load(weights["test_resnet"], weights_only=True), kept_weights(flags, "base")
    moved = {
        key for key in before if not key.startswith("fc.") and not torch.equal(before[key], after[f"backbone.{key}"])
    }
    assert moved
    assert not [key for key in moved if "running" in key or "num_batches" in key]


def test_a_fold_may_start_from_the_same_fold_of_another_experiment(flags, vit):
    done(TRAIN, *flags, *vit, "--fold", "all", "--exp", "first")
    done(TRAIN, *flags, *vit, *STILL, "--fold", "all", "--exp", "second", "--init", "first", "--seed", 5)
    for fold in (0, 1):
        before, after = (kept_weights(flags, exp, fold) for exp in ("first", "second"))
        assert before.keys() == after.keys()
        assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before), fold
    one, other = (kept_weights(flags, "first", fold) for fold in (0, 1))
    assert not torch.allclose(one["head.weight"], other["head.weight"], atol=1e-3)
    assert not torch.allclose(one["backbone.norm.weight"], other["backbone.norm.weight"], atol=1e-4)


def test_an_experiment_that_does_not_fit_is_no_start(flags, vit, resnet):
    done(TRAIN, *flags, *vit, "--fold", 0, "--exp", "first")

    def line(*more, fold=0):
        return refused(TRAIN, *flags, *more, "--fold", fold, "--exp", "second", "--init", "first")

    assert "first: its model is 'test_vit' and not 'test_resnet'" in line(*resnet)
    assert "first: its head is 'linear' and not 'fresh'" in line(*vit, "--head", "fresh")
    assert "--init first must be another experiment that has finished fold 1" in line(*vit, fold=1)
    assert "its norm is 'thesis' and not 'model'" in line(*vit, "--norm", "model")
    assert "its model_kwargs is" in line(*vit, "--model-kwargs", "embed_dim=32")
    itself = refused(TRAIN, *flags, *vit, "--fold", 0, "--exp", "first", "--init", "first", "--overwrite")
    assert "must be another experiment" in itself
    assert "nowhere" in refused(TRAIN, *flags, *vit, "--fold", 0, "--exp", "second", "--init", "nowhere")
    path = flags[3] / "first" / "fold0.pt"
    content = path.read_bytes()
    path.write_bytes(content[:1000])
    assert f"{path} is damaged" in line(*vit)
    path.unlink()
    assert "must be another experiment that has finished fold 0" in line(*vit)
    path.write_bytes(content)
    done("00_prepare.py", *flags, "--size", 32, *PREPARE, "--overwrite", "--seed", 1)
    assert "first: its folds_hash is" in line(*vit)
    assert not list((flags[3] / "second").glob("fold*.*"))


def test_another_size_resizes_a_vits_position_embedding(flags, vit):
    done(TRAIN, *flags, *vit, "--fold", 0, "--exp", "first")
    done("00_prepare.py", *flags, "--size", 64, *PREPARE)
    more = [*STILL, "--size", 64, "--fold", 0, "--init", "first", "--exp", "second", "--keep", "last"]
    done(TRAIN, *flags, *vit, *more)
    before, after = (kept_weights(flags, exp)["backbone.pos_embed"] for exp in ("first", "second"))
    assert (before.shape[1], after.shape[1]) == (1 + 2 * 2, 1 + 4 * 4)
    assert torch.allclose(after, resample_abs_pos_embed(before, (4, 4)), atol=1e-6)


# ---------------------------------------------------------------- which weights move, and how fast


def layers_above(name, head):
    """By hand, of test_vit: six blocks above the stem. timm counts the last norm to the last block, and, where the
    network has no classifier of its own, the last block to the head."""
    if name.startswith(("head.", "backbone.head.")):
        return 0
    block = 5 if name.startswith("backbone.norm.") else int(name.split(".")[2]) if ".blocks." in name else -1
    return 5 - block + (head == "linear")


@pytest.mark.parametrize("head", ["linear", "fresh"])
@pytest.mark.parametrize("optimizer", ["adamw", "ranger21"])
def test_each_layer_learns_at_its_own_rate(flags, vit, optimizer, head):
    schedule = "cosine" if optimizer == "adamw" else "ranger21"
    more = ["--layer-decay", 0.5, "--optimizer", optimizer, "--schedule", schedule, "--weight-decay", 0.1]
    run = started(flags, *vit, "--head", head, *more, "--epochs", 2)
    groups = run.optimizer.param_groups
    group_of = {id(p): group for group in groups for p in group["params"]}
    assert len(group_of) == sum(len(group["params"]) for group in groups) == len([*run.classifier.parameters()])
    scales = {}
    for name, p in run.classifier.named_parameters():
        group, scale = group_of[id(p)], 0.5 ** layers_above(name, head)
        scales[id(group)] = scale
        assert group["min_lr"] == pytest.approx(3e-4 * scale), name
        exempt = p.ndim <= 1 or name in ("backbone.pos_embed", "backbone.cls_token")
        assert group["weight_decay"] == (0 if exempt else 0.1), name
    assert sorted(set(scales.values()))[-2:] == [0.5, 1]
    for step in range(1, 7):
        for p in run.classifier.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        before = [group["lr"] for group in groups]
        train.update(run, step)
        rate = SCHEDULES[schedule](step, 6, 3e-3, 3e-4)
        for group, lr in zip(groups, before, strict=True):
            assert group.get("current_lr", lr) == pytest.approx(rate * scales[id(group)], rel=1e-9)
    assert rate == pytest.approx(3e-4, rel=0.5), "the schedule has come to its end"


def test_the_rates_are_those_by_which_weights_move(flags, vit):
    """AdamW's first step is the rate, whatever the gradient, beside the decay."""
    more = "--layer-decay 0.5 --optimizer adamw --schedule cosine --weight-decay 0.1".split()
    run = started(flags, *vit, *more)
    before = {name: p.detach().clone() for name, p in run.classifier.named_parameters()}
    for p in run.classifier.parameters():
        p.grad = torch.ones_like(p)
    train.update(run, 1)
    for name, p in run.classifier.named_parameters():
        lr = SCHEDULES["cosine"](1, 3, 3e-3, 3e-4) * 0.5 ** layers_above(name, "linear")
        decay = 0 if p.ndim <= 1 or name in ("backbone.pos_embed", "backbone.cls_token") else 0.1
        assert torch.allclose(p, before[name] * (1 - lr * decay) - lr, atol=1e-6), name


def test_without_layer_decay_all_learn_alike(flags, vit):
    for optimizer in ("adamw", "ranger21"):
        run = started(flags, *vit, "--optimizer", optimizer, "--schedule", "cosine")
        assert len({group["lr"] for group in run.optimizer.param_groups}) == 1


def test_layer_decay_leaves_out_what_stays(flags, vit):
    """Groups hold what learns and nothing else, and none is empty."""
    for more in (["--tune", "head"], ["--freeze", 0.5]):
        run = started(flags, *vit, "--layer-decay", 0.5, "--optimizer", "adamw", *more)
        given = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
        assert given == {id(p) for p in run.classifier.parameters() if p.requires_grad}
        assert all(group["params"] for group in run.optimizer.param_groups)
        assert 0 < len(given) < len([*run.classifier.parameters()])


@pytest.mark.parametrize(("share", "still"), [(0.5, ("conv1", "bn1", "layer1", "layer2")), (0, ())])
def test_frozen_layers_and_their_statistics_stay(flags, resnet, weights, share, still):
    """Of the stem, four layers and the classifier, the first half stays."""
    done(TRAIN, *flags, *resnet, "--fold", 0, "--freeze", share, "--optimizer", "adamw")
    before, after = torch.load(weights["test_resnet"], weights_only=True), kept_weights(flags, "base")
    moved = {key for key in before if not torch.equal(before[key], after[f"backbone.{key}"])}
    assert moved == {key for key in before if key.split(".")[0] not in still}
    assert {"layer3.0.bn1.running_mean", "layer3.0.conv1.weight", "fc.bias"} <= moved


def test_frozen_layers_drop_nothing_and_cost_no_backward_pass(flags, vit):
    run = started(flags, *vit, "--freeze", 0.5, "--model-kwargs", "proj_drop_rate=0.5")
    train.train_mode(run.classifier, "weights")
    blocks = run.classifier.backbone.blocks
    assert [block.mlp.drop1.training for block in blocks] == [False] * 3 + [True] * 3
    images = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    seen = []
    for block in blocks:
        block.register_forward_hook(lambda module, given, made: seen.append(made.requires_grad))
    run.model(images).sum().backward()
    assert seen == [False] * 3 + [True] * 3
    assert all((p.grad is not None) == p.requires_grad for p in run.classifier.parameters())


def test_layers_that_timm_does_not_know_are_not_frozen():
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="timm doesn't know the layers of this --model: leave --freeze out"):
        choose_trained(networks.Classifier(layer, layer, "features", (0.5,) * 3, (0.5,) * 3), "all", 0.5)


# ---------------------------------------------------------------- schedule, clipping, average


def test_cosine_by_hand():
    cosine = SCHEDULES["cosine"]
    assert [cosine(step, 10, 1.0, 0.1, 0.2) for step in (1, 2)] == [0.5, 1.0]
    assert cosine(4, 10, 1.0, 0.1, 0.2) == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert cosine(6, 10, 1.0, 0.1, 0.2) == pytest.approx(0.55)
    assert cosine(10, 10, 1.0, 0.1, 0.2) == pytest.approx(0.1)
    assert cosine(5, 10, 2.0, 0.0) == pytest.approx(1.0)
    assert cosine(1, 10, 2.0, 0.0) == pytest.approx(1 + math.cos(math.pi / 10))


def test_warm_up_of_rangers_schedule_by_hand():
    rate = SCHEDULES["ranger21"]
    assert [rate(step, 100, 1.0, 0.1, 0.5) for step in (1, 25, 50, 60)] == [0.02, 0.5, 1.0, 1.0]
    assert [rate(step, 100, 1.0, 0.1, 0) for step in (1, 71)] == [1.0, 1.0]
    assert [rate(step, 100, 1.0, 0.1) for step in (1, 22)] == pytest.approx([1 / 22, 1.0])


@pytest.mark.parametrize("optimizer", ["adamw", "ranger21"])
def test_the_schedule_of_the_flags_is_that_of_the_training(flags, resnet, optimizer, monkeypatch):
    rates, plain = [], train.update

    def update(run, number):
        before = run.optimizer.param_groups[0]["lr"]
        plain(run, number)
        rates.append(run.optimizer.param_groups[0].get("current_lr", before))

    monkeypatch.setattr(train, "update", update)
    more = ["--epochs", 2, "--optimizer", optimizer, "--schedule", "cosine", "--warmup", 0.4]
    run = started(flags, *resnet, *more)
    train.train_fold(run, run.resume.load(run))
    third = [3e-4 + 2.7e-3 * (1 + math.cos(math.pi * k / 4)) / 2 for k in (1, 2, 3, 4)]
    assert rates == pytest.approx([1.5e-3, 3e-3, *third], rel=1e-9)


def clipped(scaler, gradient, norm=1.0):
    """By how much a weight of 4 numbers moves at rate 1, where its loss has this gradient."""
    classifier = torch.nn.Linear(4, 1, bias=False)
    before = classifier.weight.detach().clone()
    run = SimpleNamespace(
        classifier=classifier, optimizer=torch.optim.SGD(classifier.parameters(), 1.0), scheduler=None, ema=None,
        scaler=scaler, config=dict(clip_grad=norm),
    )  # fmt: skip
    scaler.scale(classifier(torch.tensor([gradient])).sum()).backward()
    train.update(run, 1)
    return (before - classifier.weight.detach()).flatten()


@pytest.mark.parametrize("enabled", [False, True])
def test_long_gradients_are_shortened_and_short_ones_left(enabled):
    scaler = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=1024.0)
    long = torch.tensor([30.0, 40.0, 0.0, 0.0])
    assert torch.allclose(clipped(scaler, long.tolist()), long / 50, atol=1e-4)
    assert torch.allclose(clipped(scaler, long.tolist(), norm=5.0), long / 10, atol=1e-4)
    assert torch.allclose(clipped(scaler, [0.3, 0.4, 0.0, 0.0]), long / 100, atol=1e-6)
    assert torch.allclose(clipped(scaler, long.tolist(), norm=None), long, atol=1e-4)


def test_an_overflow_is_skipped_and_not_clipped():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    assert not clipped(scaler, [1e10] * 4).any()
    assert scaler.get_scale() == 2.0**119


def states_after_updates(run, monkeypatch):
    """A list that gets the weights after each update of the run."""
    states, plain = [], train.update

    def update(run, number):
        plain(run, number)
        states.append((number, {key: value.clone() for key, value in run.classifier.state_dict().items()}))

    monkeypatch.setattr(train, "update", update)
    return states


def test_the_average_is_that_by_hand_and_is_validated_and_kept(flags, resnet, monkeypatch):
    run = started(flags, *resnet, "--ema", 0.45, "--optimizer", "adamw")
    states = states_after_updates(run, monkeypatch)
    kept = train.train_fold(run, run.resume.load(run))["best"]
    assert [number for number, _ in states] == [1, 2, 3]
    expected = {}
    for number, state in states:
        decay = 0 if number == 1 else min(0.45, 1 - number ** (-2 / 3))
        for key, value in state.items():
            averaged = number > 1 and value.is_floating_point()
            expected[key] = decay * expected[key] + (1 - decay) * value if averaged else value
    assert 1 - 2 ** (-2 / 3) < 0.45 < 1 - 3 ** (-2 / 3), "the second step warms up, the third doesn't"
    live = states[-1][1]
    assert kept["weights"].keys() == expected.keys()
    for key, value in kept["weights"].items():
        assert torch.allclose(value.double(), expected[key].double(), atol=1e-6), key
    assert not torch.allclose(kept["weights"]["head.weight"], live["head.weight"], atol=1e-4)
    assert not torch.allclose(
        kept["weights"]["backbone.bn1.running_mean"], live["backbone.bn1.running_mean"], atol=1e-5
    )

    again = networks.build_model(run.config, 2, "none")
    again.load_state_dict(kept["weights"])
    logits = inference.predict(again.eval(), run.images, run.valid_rows, 32, CPU)
    assert kept["logits"].numpy() == pytest.approx(logits, abs=1e-5)


def test_accumulated_batches_count_as_one_step_of_the_average(flags, resnet, monkeypatch):
    run = started(flags, *resnet, "--ema", 0.9, "--optimizer", "adamw", "--accumulate", 2, "--epochs", 2)
    states = states_after_updates(run, monkeypatch)
    train.train_fold(run, run.resume.load(run))
    assert [number for number, _ in states] == [1, 2, 3, 4], "of three batches each, two and one"


def test_an_average_does_not_change_the_training(flags, resnet):
    more = [*resnet, "--fold", 0, "--optimizer", "adamw", "--epochs", 2]
    done(TRAIN, *flags, *more)
    done(TRAIN, *flags, *more, "--ema", 0.9, "--exp", "on")
    base, on = (pd.read_csv(flags[3] / exp / "fold0_epochs.csv") for exp in ("base", "on"))
    assert base.train_loss.tolist() == on.train_loss.tolist()
    assert base.valid_loss.tolist() != on.valid_loss.tolist()
    run = started(flags, *resnet, "--exp", "none")
    assert run.ema is None
    assert run.kept_model is run.classifier


@pytest.mark.parametrize(
    "switches",
    [
        "--init probe --head fresh --optimizer adamw --layer-decay 0.7 --schedule cosine --warmup 0.2 --clip-grad 1 "
        "--ema 0.9",
        "--layer-decay 0.7 --freeze 0.3 --ema 0.9 --augment light",
    ],
)
def test_a_stopped_fold_ends_with_the_same_bytes(flags, vit, switches):
    whole, parts = same_after_stops(flags, *vit, *switches.split())
    assert whole == parts


# ---------------------------------------------------------------- augmentations


def noise(side):
    return np.random.default_rng(side).integers(0, 255, (side, side, 3)).astype(np.uint8)


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_seed_alone_decides_a_transform(name, side):
    image = noise(side)
    before = image.copy()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    augment = Augmentation(name, side)
    first = [np.array(augment(image, seed)) for seed in range(2**32 - 12, 2**32)]
    random.seed(2)
    np.random.seed(2)
    again = [np.array(Augmentation(name, side)(image, seed)) for seed in range(2**32 - 12, 2**32)]
    random.setstate(states[0])
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert {(made.shape, made.dtype) for made in first} == {(image.shape, image.dtype)}
    different = len({made.tobytes() for made in first})
    assert different == 1 if name == "none" else different >= dict(flip=2, d4=5).get(name, 11)
    assert (image == before).all(), "the image itself stays"


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_transforms_leave_the_global_random_streams_alone(name):
    augment, image = Augmentation(name, 32), noise(32)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)

    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2:], torch.get_rng_state()

    before = states()
    for seed in range(20):
        augment(image, seed)
    after = states()
    assert before[:3] == after[:3]
    assert torch.equal(before[3], after[3])


# ---------------------------------------------------------------- seeds, tokens, recipes, refusals


def test_several_seeds_train_an_experiment_each(flags, vit):
    more = [*vit, "--fold", 0]
    done(TRAIN, *flags, *more, "--seed", 1, 2, "--exp", "both")
    for seed in (1, 2):
        done(TRAIN, *flags, *more, "--seed", seed, "--exp", f"alone{seed}")
        assert files(flags, f"both_{seed}") == files(flags, f"alone{seed}")
        assert json.loads((flags[3] / f"both_{seed}" / "config.json").read_text())["seed"] == seed
    assert files(flags, "both_1") != files(flags, "both_2")
    assert not (flags[3] / "both").exists()
    assert settings("--seed", 1, 2)["exps"] == ["base_1", "base_2"]
    assert settings("--seed", 5)["exps"] == settings()["exps"] == ["base"]
    out = done(TRAIN, *flags, *more, "--seed", 1, 2, "--exp", "both")
    assert "fold 0 of both_1 is finished" in out
    assert "fold 0 of both_2 is finished" in out


@pytest.mark.parametrize(
    ("model", "registers", "has_class"), [("test_vit", 0, True), ("test_vit", 2, True), ("test_vit2", 1, False)]
)
def test_the_tokens_are_the_class_token_and_the_mean_of_the_patches(model, registers, has_class):
    kwargs = dict(reg_tokens=registers)
    config = dict(model=model, model_kwargs=kwargs, head="tokens", size=32, norm="thesis")
    classifier = networks.build_model(config, 3, "none").eval()
    images = torch.randint(0, 255, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        tokens = classifier.backbone.forward_features(images / 127.5 - 1)
        tokens = classifier.backbone.fc_norm(tokens)  # of a ViT that averages, the norm stands behind
        seen, logits = classifier.features(images), classifier(images)
    assert tokens.shape == (4, has_class + registers + 2 * 2, 64)
    patches = tokens[:, has_class + registers :].mean(1)
    expected = torch.cat([tokens[:, 0], patches], 1) if has_class else patches
    assert seen.shape == (4, 128 if has_class else 64)
    assert torch.allclose(seen, expected, atol=1e-5)
    assert logits.shape == (4, 3)
    assert classifier.head.in_features == expected.shape[1]


def test_a_fold_learns_from_tokens_and_a_cnn_has_none(flags, vit, resnet):
    done(TRAIN, *flags, *vit, "--head", "tokens", "--fold", 0)
    assert kept_weights(flags, "base")["head.weight"].shape == (2, 128)
    done(TRAIN, *flags, *vit, "--head", "tokens", "--tune", "probe", "--fold", 0, "--exp", "probe")
    assert np.load(features_path(flags, "test_vit")).shape[2] == 128
    line = refused(TRAIN, *flags, *resnet, "--head", "tokens", "--fold", 0, "--exp", "cnn")
    assert "test_resnet is no ViT, and --head tokens needs tokens: give --head fresh" in line


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "recipes").glob("*.args")))
def test_recipes_name_flags_and_a_model_that_are_there(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = settings(f"@recipes/{recipe}")
    networks.check_name(config["model"])


REFUSED = [
    ("--stop-after 1h --save-minutes 0", "--stop-after has nothing to go on from"),
    ("--lr 1e-5 --min-lr 3e-5", "--lr 1e-05 is below --min-lr 3e-05"),
    ("--weights nowhere.pth", "--weights nowhere.pth is no file"),
    ("--seed 1 2 1", "--seed names a seed twice"),
    ("--freeze 1", "--freeze 1 must be below 1"),
    ("--ema 1", "--ema 1 must be below 1"),
    ("--warmup 1", "--warmup 1 must be below 1"),
    ("--warmup 0.8", "--warmup 0.8: Ranger21's warm-down begins at 0.72"),
    ("--tune probe --ema 0.9 --clip-grad 1", "--tune probe makes no training steps: leave --ema --clip-grad out"),
    ("--tune head --freeze 0.5", "--tune head freezes every layer below the head: leave --freeze out"),
    ("--weights none --tune probe", "a probe of --weights none would fit noise"),
    ("--weights none --init probe", "a probe of --weights none would fit noise"),
    ("--tune probe --init other", "leave --init other out"),
    ("--layer-decay 0", "must be above 0"),
    ("--layer-decay 85", "--layer-decay 85 would make low layers learn faster"),
    ("--clip-grad 0", "must be above 0"),
    ("--schedule linear", "invalid choice: 'linear'"),
]


@pytest.mark.parametrize(("given", "words"), REFUSED)
def test_flags_that_contradict_each_other_are_refused_in_one_line(given, words):
    assert words in refused(TRAIN, "--fold", 0, "--print-config", *given.split())


def test_processes_must_be_able_to_share_a_batch(monkeypatch):
    monkeypatch.setattr(flag_checks, "WORLD", 4)
    assert "--batch-size 3 can't be shared by 4" in refused(TRAIN, "--fold", 0, "--print-config", "--batch-size", 3)


def test_weights_of_another_network_are_refused_also_without_classes(flags, vit, weights):
    """timm doesn't insist on all weights where a network has no classes: its low layers would stay random."""
    given = [*vit, "--weights", weights["test_resnet"], "--head", "fresh", "--fold", 0]
    assert "doesn't hold weights of test_vit" in refused(TRAIN, *flags, *given)
