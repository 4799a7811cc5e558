"""Linear probe (--tune probe), and folds that start from it or from another experiment (--init)."""

import itertools
import json
import os
import re
import signal

from common import softmax

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import done, kit, refused
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from small_models import PREPARE, PROBE, STEP, TESTS, TRAIN, features_path, kept_weights, started
from timm.layers import resample_abs_pos_embed

from kit.train import checkpoint, inference, linear_probe
from kit.train import model as networks

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def flags(of_classes):
    return of_classes(2)


# ---------------------------------------------------------------- --tune probe


def timm_features(weights, images, tta):
    """Return the features of timm's network for uint8 [N, S, S, 3] in the views: float32 [N, V, D]."""
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
def test_features_are_those_of_timms_network_in_each_view(flags, resnet, weights, tta, views):
    done(TRAIN, *flags, *resnet, *PROBE, "--fold", 0, "--augment", tta)
    vectors = np.load(features_path(flags))
    assert vectors.dtype == np.float16
    images = [np.load(flags[3] / "prepared" / f"{part}_32.npy") for part in ("train", "test")]
    expected = timm_features(weights["test_resnet"], np.concatenate(images), tta)
    assert vectors.shape == expected.shape == (48 + TESTS, views, expected.shape[2])
    bound = dict(rtol=2**-10, atol=1e-4)  # fp16 keeps 11 bits
    assert np.allclose(vectors[:, 0], expected[:, 0], **bound), "the plain view comes first"
    assert np.allclose(np.sort(vectors, 1), np.sort(expected, 1), **bound)
    if views > 1:
        assert not np.allclose(vectors[:, 0], vectors[:, -1], rtol=0.1), "views differ"


@pytest.mark.slow
def test_features_are_computed_once_for_all_folds_seeds_and_experiments(flags, resnet, vit, weights, tmp_path):
    def files_after(*more):
        done(TRAIN, *flags, *more, *PROBE)
        return {path.name: path.stat().st_mtime_ns for path in (flags[3] / "prepared").glob("features_*.npy")}

    first = files_after(*resnet, "--fold", 0)
    assert len(first) == 1
    assert files_after(*resnet, "--fold", 1) == first
    assert files_after(*resnet, "--fold", "all", "--seed", 5, 6, "--exp", "seeds") == first
    plain = (*resnet, "--fold", 0, "--sampler", "shuffle", "--augment", "none", "--exp", "plain")
    assert files_after(*plain) == first, "the plain view is one of d4's"
    state = torch.load(weights["test_resnet"], weights_only=True)
    torch.save({key: value * 1.1 for key, value in state.items()}, tmp_path / "others.pth")
    others = (*resnet, "--augment", "flip", "--weights", tmp_path / "others.pth")
    for count, (exp, more) in enumerate(dict(vit=vit, flip=(*resnet, "--augment", "flip"), others=others).items(), 2):
        found = files_after(*more, "--fold", 0, "--exp", exp)
        assert len(found) == count, exp
        assert found.items() > first.items(), "none replaces another"
        first = found
    prepared = flags[3] / "prepared" / "prepared.json"
    content = json.loads(prepared.read_text())
    content["made_from"]["test_images"] = "others"
    prepared.write_text(json.dumps(content))
    assert len(files_after(*others, "--fold", 0, "--exp", "images")) == 5, "other images"


@pytest.mark.slow
def test_each_precision_has_its_own_features(flags, vit):
    for amp in ("none", "bf16"):
        out = done(TRAIN, *flags, *vit, *PROBE, "--fold", 0, "--amp", amp, "--exp", amp)
        assert "features of 54 images" in out
    assert "features of" not in done(TRAIN, *flags, *vit, *PROBE, "--fold", 1, "--amp", "bf16", "--exp", "bf16")
    paths = sorted((flags[3] / "prepared").glob("features_*.npy"), key=lambda path: path.stat().st_mtime_ns)
    one, other = map(np.load, paths)
    assert 1e-4 < np.abs(one - other).max() < 1e-1
    tables = [pd.read_csv(flags[3] / amp / "fold0.csv").best_1 for amp in ("none", "bf16")]
    assert not np.allclose(*tables, atol=1e-5)


def test_03_in_another_precision_than_the_features_asks_the_network(flags, resnet, monkeypatch):
    done(TRAIN, *flags, *resnet, *PROBE, "--fold", 0)
    seen, plain = [], inference.autocast
    monkeypatch.setattr(inference, "autocast", lambda device, amp: seen.append(amp) or plain(device, amp))
    done("03_infer.py", *flags)
    assert seen == []
    done("03_infer.py", *flags, "--amp", "bf16")
    assert set(seen) == {"bf16"}


def test_00_with_overwrite_removes_the_features(flags, resnet):
    done(TRAIN, *flags, *resnet, *PROBE, "--fold", 0)
    done("00_prepare.py", *flags, "--size", 32, *PREPARE, "--overwrite")
    assert not list((flags[3] / "prepared").glob("features_*"))


def test_the_fold_file_of_a_probe_is_a_model_like_any_other(flags, resnet):
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
    strength = linear_probe.C_VALUES[np.abs(np.log(linear_probe.C_VALUES / printed)).argmin()]
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
    fit_head, fit_classes, seen = linear_probe.fit_head, linear_probe.fit_classes, {}

    def note_groups(vectors, targets, groups, *more):
        seen["groups"] = groups
        return fit_head(vectors, targets, groups, *more)

    def note_folds(points, targets, folds, *more):
        seen["folds"] = folds
        return fit_classes(points, targets, folds, *more)

    monkeypatch.setattr(linear_probe, "fit_head", note_groups)
    monkeypatch.setattr(linear_probe, "fit_classes", note_folds)
    done(TRAIN, *flags, *resnet, *PROBE, "--fold", 0)
    folds = pd.read_csv(flags[3] / "prepared" / "folds.csv")
    assert seen["groups"].tolist() == folds.group[folds.fold != 0].tolist()
    assert pd.Series(seen["groups"]).value_counts().tolist() == [2] * 12, "pairs of one source"
    by_group = pd.Series(seen["folds"]).groupby(seen["groups"])
    assert (by_group.nunique() == 1).all()
    assert len(set(seen["folds"])) == linear_probe.INNER


def test_c_has_the_least_log_loss():
    """Compared with each C alone: small where noise hides the classes, large where they are clear."""
    rng, targets, folds = np.random.default_rng(0), np.arange(200) % 2, np.arange(200) // 2 % 4
    chosen = []
    for distance in (0.0, 0.3, 3.0):
        points = rng.normal(0, 1, (200, 20)) + distance * targets[:, None]
        losses = []
        for c in linear_probe.C_VALUES:
            parts = [(folds != k, folds == k) for k in range(4)]
            fits = [(LogisticRegression(C=c).fit(points[train], targets[train]), valid) for train, valid in parts]
            losses.append(np.mean([log_loss(targets[valid], fit.predict_proba(points[valid])) for fit, valid in fits]))
        chosen.append(linear_probe.fit_classes(points, targets, folds, 2, False)[2])
        assert chosen[-1] == linear_probe.C_VALUES[np.argmin(losses)]
    assert chosen[0] < chosen[1] < chosen[2]


def test_c_where_each_class_is_one_group():
    """Three sources, a class each: an inner fold's class is in none of the others."""
    targets = np.repeat([0, 1, 2], 10)
    vectors = np.random.default_rng(0).normal(0, 1, (30, 4)).astype(np.float32)
    weight, _, strength = linear_probe.fit_head(vectors, targets, targets, 3, False, 1)
    assert np.isfinite(weight).all()
    assert strength in linear_probe.C_VALUES
    rows = targets < 2  # two sources: the inner folds' training images are of one class
    _, _, strength = linear_probe.fit_head(vectors[rows], targets[rows], targets[rows], 3, False, 1)
    assert strength in linear_probe.C_VALUES


def test_a_head_of_several_layers_is_refused(flags, resnet, monkeypatch):
    two = networks.Head("features", lambda n, k: torch.nn.Sequential(torch.nn.Linear(n, 4), torch.nn.Linear(4, k)))
    monkeypatch.setitem(networks.HEADS, "two", two)
    line = refused(TRAIN, *flags, *resnet, "--tune", "probe", "--head", "two", "--fold", 0)
    assert "--head two is no single layer" in line


def test_03_uses_cached_features_or_computes_them(flags, resnet, monkeypatch):
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
    assert re.search(r"trained against frozen: .*\n    Δ = ", out)
    assert (flags[3] / "frozen" / "report.html").exists()
    done("03_infer.py", "frozen", "trained", *flags)
    (submission,) = flags[3].glob("submission_frozen+trained_CV*.csv")
    each = [softmax(np.load(flags[3] / exp / f"fold{k}_test.npy")) for exp in ("frozen", "trained") for k in (0, 1)]
    found = np.loadtxt(submission, delimiter=",", usecols=1)
    assert found == pytest.approx(np.mean(each, axis=0)[:, 1], abs=1e-6)
    assert np.abs(found - np.mean(each[2:], axis=0)[:, 1]).max() > 1e-3


def test_damaged_features_are_computed_again(flags, resnet):
    run = started(flags, *resnet, *PROBE)
    vectors = np.array(linear_probe.features(run))
    path = features_path(flags)
    intact = path.read_bytes()
    damages = {"cut": intact[: len(intact) // 2], "empty": b"", "garbage": b"x" * 1000, "lost": None}
    for name, content in damages.items():
        path.unlink() if content is None else path.write_bytes(content)
        assert np.array_equal(linear_probe.features(run), vectors), name
        assert path.read_bytes() == intact, name
    before = path.stat().st_ino
    linear_probe.features(run)
    assert path.stat().st_ino == before, "an intact file is kept"


@pytest.mark.parametrize("end", ["ctrl-c", "kill", "half a block"])
def test_a_killed_computation_of_features_resumes_after_its_last_block(flags, resnet, monkeypatch, end):
    monkeypatch.setattr(linear_probe, "BLOCK", 8)  # the fifth block is in the training images
    run = started(flags, *resnet, *PROBE)
    expected = np.array(linear_probe.features(run))
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
    parts = sorted(path.parent.glob("features_*.part"))
    assert [part.name for part in parts] == [path.with_suffix(f".{number}.part").name for number in range(4)]
    assert not path.exists()
    if end == "half a block":  # which the kill has left under its temporary name
        (path.parent / f".tmp1.{parts[3].name}").write_bytes(parts[3].read_bytes()[:-10])
        parts[3].unlink()
    calls.clear()
    monkeypatch.setattr(linear_probe, "predict", counted)
    done(TRAIN, *flags, *resnet, *PROBE, "--fold", 0)
    blocks = -(-48 // 8) + -(-TESTS // 8)
    assert len(calls) == blocks - (3 if end == "half a block" else 4)
    assert np.array_equal(np.load(path), expected)
    assert not list(path.parent.glob("features_*.part"))


def test_features_are_stopped_by_stop_after_and_resume(flags, resnet, monkeypatch):
    monkeypatch.setattr(linear_probe, "BLOCK", 32)
    result = kit(TRAIN, *flags, *resnet, *PROBE, "--fold", 0, *STEP)
    assert result.code == 75
    assert "features: stopped by --stop-after; run it again to resume after 1 of" in result.out
    done(TRAIN, *flags, *resnet, *PROBE, "--fold", 0)


def test_blocks_of_any_size_give_the_same_features(flags, resnet, monkeypatch):
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
    assert "test_resnet: features are NaN, or too large for fp16" in line
    assert not list((flags[3] / "prepared").glob("features*"))


# ---------------------------------------------------------------- --init


STILL = "--lr 1e-9 --min-lr 0 --optimizer sgd --epochs 1".split()  # no weight changes visibly


def test_init_probe_starts_with_the_probes_head(flags, vit):
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


def test_init_probe_keeps_the_batch_statistics(flags, resnet, weights):
    done(TRAIN, *flags, *resnet, "--fold", 0, "--init", "probe", "--head", "fresh", "--optimizer", "adamw")
    before, after = torch.load(weights["test_resnet"], weights_only=True), kept_weights(flags, "base")
    kept = [key for key in before if not key.startswith("fc.")]
    moved = {key for key in kept if not torch.equal(before[key], after[f"backbone.{key}"])}
    assert moved
    assert not [key for key in moved if "running" in key or "num_batches" in key]


def test_init_starts_from_the_same_fold_of_another_experiment(flags, vit):
    done(TRAIN, *flags, *vit, "--fold", "all", "--exp", "first")
    done(TRAIN, *flags, *vit, *STILL, "--fold", "all", "--exp", "second", "--init", "first", "--seed", 5)
    for fold in (0, 1):
        before, after = (kept_weights(flags, exp, fold) for exp in ("first", "second"))
        assert before.keys() == after.keys()
        assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before), fold
    one, other = (kept_weights(flags, "first", fold) for fold in (0, 1))
    assert not torch.allclose(one["head.weight"], other["head.weight"], atol=1e-3)
    assert not torch.allclose(one["backbone.norm.weight"], other["backbone.norm.weight"], atol=1e-4)


def test_init_refuses_an_experiment_that_does_not_fit(flags, vit, resnet):
    done(TRAIN, *flags, *vit, "--fold", 0, "--exp", "first")

    def line(*more, fold=0):
        return refused(TRAIN, *flags, *more, "--fold", fold, "--exp", "second", "--init", "first")

    assert "first: its model is 'test_vit' and not 'test_resnet'" in line(*resnet)
    assert "first: its head is 'linear' and not 'fresh'" in line(*vit, "--head", "fresh")
    assert "--init first must be another experiment that has finished fold 1" in line(*vit, fold=1)
    assert "its norm is 'model' and not 'thesis'" in line(*vit, "--norm", "thesis")
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


def test_init_takes_an_experiment_of_other_dropout(flags, vit):
    kwargs = "--model-kwargs", "drop_path_rate=0.1"
    done(TRAIN, *flags, *vit, *kwargs, "--fold", 0, "--exp", "first")
    more = "--model-kwargs", "drop_rate=0.2", "proj_drop_rate=0.1"
    done(TRAIN, *flags, *vit, *STILL, *more, "--fold", 0, "--exp", "second", "--init", "first")
    before, after = (kept_weights(flags, exp) for exp in ("first", "second"))
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)


def test_another_size_resizes_a_vits_position_embedding(flags, vit):
    done(TRAIN, *flags, *vit, "--fold", 0, "--exp", "first")
    done("00_prepare.py", *flags, "--size", 64, *PREPARE)
    more = [*STILL, "--size", 64, "--fold", 0, "--init", "first", "--exp", "second", "--keep", "last"]
    done(TRAIN, *flags, *vit, *more)
    before, after = (kept_weights(flags, exp)["backbone.pos_embed"] for exp in ("first", "second"))
    assert (before.shape[1], after.shape[1]) == (1 + 2 * 2, 1 + 4 * 4)
    assert torch.allclose(after, resample_abs_pos_embed(before, (4, 4)), atol=1e-6)
