"""Updates of the optimiser: parts of a batch, missing numbers, skipped steps, the sampler's prior, defaults."""

import contextlib
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import done, kit, load, prepare, refused
from small_models import QUICK, TRAIN, competition, kept_weights, started

from kit.score.tasks import Numbers
from kit.train import checkpoint, dataset, losses, model
from kit.train.optim import layer_groups

train = load(TRAIN)
CPU = torch.device("cpu")
SMALL = [*QUICK, "--model", "test_resnet", "--weights", "none", "--head", "fresh", "--tta", "none"]
pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def flags(of_classes):
    return of_classes(2)


def settings(*flags):
    return json.loads(done(TRAIN, "--print-config", "--device", "cpu", *flags))


# ---------------------------------------------------------------- parts of a batch


def gradient(monkeypatch, images, targets, micro_batch=None, batch_size=8, accumulate=1):
    """Return the gradient of a linear model's first update on these images."""
    torch.manual_seed(1)
    backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, targets.shape[1]))
    classifier = model.Classifier(backbone, torch.nn.Identity(), "features", (0.5,) * 3, (0.5,) * 3, targets.shape[1])
    config = dict(
        batch_size=batch_size, accumulate=accumulate, epochs=1, seed=1, sampler="shuffle", augment="none",
        weights="none", clip_grad=None, init="weights", tta="none",
    )  # fmt: skip
    task = Numbers([str(k) for k in range(targets.shape[1])], [[0, 1]] * targets.shape[1])
    experiment = SimpleNamespace(
        config=config, device=CPU, amp="none", workers=0, parts=-(-batch_size // (micro_batch or batch_size)),
        images=images, targets=targets,
        prepared=SimpleNamespace(task=task, metric="rmse"),
    )  # fmt: skip
    run = SimpleNamespace(
        experiment=experiment, fold=0, train_rows=np.arange(len(images)), classifier=classifier, model=classifier,
        criterion=losses.binary_cross_entropy, optimizer=torch.optim.SGD(classifier.parameters(), 0.0), scheduler=None,
        ema=None, scaler=torch.amp.GradScaler("cpu", enabled=False), batch_norm=None,
        epoch_name=lambda epoch: "epoch", track=SimpleNamespace(note=lambda *_: None),
        resume=SimpleNamespace(due=lambda: False),
    )  # fmt: skip
    monkeypatch.setattr(train, "EpochMonitor", lambda *_: contextlib.nullcontext(SimpleNamespace(count=id, after=max)))
    seen = []

    def update(run, number):
        seen.append(backbone[1].weight.grad.clone())
        run.optimizer.zero_grad()
        return True

    monkeypatch.setattr(train, "update", update)
    monkeypatch.setattr(train, "scores", lambda *_: {})
    train.train_epoch(run, checkpoint.fold_start())
    return seen[0]


def test_missing_numbers_weigh_the_same_however_a_step_is_computed(monkeypatch):
    """The loss of a step is the sum over its known numbers, divided by their count: in one batch of 16, in parts, and
    accumulated, though one part knows a single number."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (16, 4, 4, 3)).astype(np.uint8)
    targets = rng.random((16, 3)).astype(np.float32)
    targets[rng.random((16, 3)) < 0.7] = np.nan
    whole = gradient(monkeypatch, images, targets, batch_size=16)
    assert whole.abs().max() > 0.01
    for kwargs in (dict(micro_batch=3), dict(micro_batch=1), dict(batch_size=4, accumulate=4)):
        parts = gradient(monkeypatch, images, targets, **dict(batch_size=16) | kwargs)
        assert torch.allclose(parts, whole, atol=1e-6), kwargs
    targets[:] = np.nan
    assert not gradient(monkeypatch, images, targets, batch_size=16, micro_batch=4).any(), "nothing is known"


def test_parts_of_a_batch_train_the_same_and_are_no_setting(flags, vit):
    done(TRAIN, *flags, *vit, "--fold", 0)
    done(TRAIN, *flags, *vit, "--fold", 0, "--micro-batch", 3, "--exp", "parts")
    whole, parts = (
        pd.read_csv(flags[3] / exp / "fold0.csv").filter(like="views").to_numpy() for exp in ("base", "parts")
    )
    assert np.allclose(whole, parts, atol=1e-3)
    done(TRAIN, *flags, *vit, "--fold", 1, "--micro-batch", 2, "--exp", "parts")  # refused if it were a setting
    assert json.loads((flags[3] / "parts" / "fold1.json").read_text())["run"]["micro_batch"] == 2
    assert "micro_batch" not in json.loads((flags[3] / "parts" / "config.json").read_text())


@pytest.mark.parametrize(
    ("more", "stays"),
    [
        (["--micro-batch", 4], True),  # two parts of 4
        (["--micro-batch", 8], False),
        (["--batch-size", 1, "--accumulate", 8], True),
        (["--batch-size", 4], False),  # from scratch, statistics of 4 are better than none
    ],
)
def test_batch_norm_of_few_images_keeps_its_statistics(flags, more, stays):
    out = done(TRAIN, *flags, *SMALL, "--fold", 0, *more)
    assert ("fold 0: batch norm keeps its statistics" in out) == stays
    moved = kept_weights(flags, "base")["backbone.bn1.running_mean"].abs().max().item()
    assert (moved == 0) == stays


def test_a_full_gpu_names_the_flag_that_halves_what_is_computed_at_once():
    args = SimpleNamespace(micro_batch=None, batch_size=17, grad_checkpointing=False)
    assert train.less_memory(args).startswith("--micro-batch 8 computes each batch in parts, of 8 images now or --grad")
    args = SimpleNamespace(micro_batch=4, batch_size=17, grad_checkpointing=True)
    assert "--micro-batch 2 " in train.less_memory(args)
    assert "--grad" not in train.less_memory(args)
    args = SimpleNamespace(micro_batch=1, batch_size=17, grad_checkpointing=True)
    assert train.less_memory(args).startswith("take a smaller --size or --model")


# ---------------------------------------------------------------- skipped steps


class InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x * 1

    @staticmethod
    def backward(context, gradient):
        return gradient * torch.inf


@pytest.mark.parametrize(("epochs", "said"), [(2, "6 of 6 steps"), (9, "21 steps")])
def test_gradients_that_are_never_numbers_end_the_training(flags, monkeypatch, epochs, said):
    """The loss is finite, the GradScaler skips each step: without a word the first weights would be kept."""
    plain = losses.cross_entropy
    monkeypatch.setitem(losses.LOSSES, "ce", lambda x, y: plain(InfiniteGradient.apply(x), y))
    more = ["--fold", 0, "--amp", "fp16", "--loss", "ce", "--epochs", epochs, "--optimizer", "adamw"]
    line = refused(TRAIN, *flags, *SMALL, *more)
    assert f"the gradients of {said} were NaN or infinite, so they changed nothing" in line
    assert not (flags[3] / "base" / "fold0.pt").exists()


def test_a_skipped_step_moves_neither_schedule_nor_ema(flags, vit):
    run = started(flags, *vit, "--optimizer", "adamw", "--ema", 0.5)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = run.optimizer.param_groups[0]["lr"]
    for value, taken in ((torch.inf, False), (1.0, True)):
        scale = run.scaler.get_scale()
        run.scaler.scale(run.classifier.head.weight.sum() * 1.0).backward()
        run.classifier.head.weight.grad.fill_(value * scale)
        average = run.ema.module.head.weight.clone()
        assert train.update(run, 1) == taken
        assert (run.optimizer.param_groups[0]["lr"] != before) == taken
        assert (not torch.equal(average, run.ema.module.head.weight)) == taken


# ---------------------------------------------------------------- the sampler and the prior


def test_the_prior_is_the_classes_shares_over_equal_ones():
    config = dict(sampler="imbalanced", metric="logloss")
    targets = np.repeat([0, 2], [30, 10])
    prior = dataset.log_prior(config, targets, 3)
    assert prior.exp().tolist() == pytest.approx([3 * 30 / 41, 3 * 1 / 41, 3 * 10 / 41])  # class 1 was never drawn
    for other in (
        dict(metric="auc"),
        dict(metric="balanced-accuracy"),
        dict(sampler="thesis"),
        dict(sampler="shuffle"),
    ):
        assert not dataset.log_prior(config | other, targets, 3).any(), other


def test_the_sampler_follows_the_metric_and_a_given_one_gets_the_prior_back(tmp_path):
    """The thesis' sampler leaves the prior out: between the two the held-out logits differ by it, and 03's too."""
    competition(tmp_path / "input", 2)
    flags = ["--input", tmp_path / "input", "--output", tmp_path / "output"]
    prepare(flags, 32, "--folds", 2, "--metric", "logloss")
    logits, more = {}, [*SMALL, "--fold", 0, "--keep", "last", "--augment", "none"]
    assert "--sampler shuffle: log loss depends on the classes' shares" in done(TRAIN, *flags, *more, "--exp", "auto")
    assert json.loads((tmp_path / "output/auto/config.json").read_text())["sampler"] == "shuffle"
    for sampler, said in (
        ("imbalanced", "these are put back"),
        ("thesis", "are for equal shares"),
    ):
        assert said in done(TRAIN, *flags, *more, "--sampler", sampler, "--exp", sampler)
        done("03_infer.py", *flags, sampler)
        held_out = pd.read_csv(tmp_path / "output" / sampler / "fold0.csv").filter(like="last").to_numpy()
        logits[sampler] = np.concatenate([held_out, np.load(tmp_path / "output" / sampler / "fold0_test.npy")])
    added = logits["imbalanced"] - logits["thesis"]
    counts = np.bincount(pd.read_csv(tmp_path / "output/prepared/folds.csv").query("fold == 1").target)
    assert np.allclose(added, np.log(2 * counts / counts.sum()), atol=1e-5)
    assert abs(added[0, 0]) > 0.2


def test_metrics_of_ranks_keep_the_imbalance_sampler(flags):
    out = done(TRAIN, *flags, *SMALL, "--fold", 0)
    assert "--sampler imbalanced: AUC doesn't depend on the classes' shares" in out
    assert not kept_weights(flags, "base")["log_prior"].any()


# ---------------------------------------------------------------- resumed folds


def test_a_fold_that_resumes_in_another_precision_says_so(flags, vit):
    more = [*flags, *vit, "--fold", 0, "--epochs", 2]
    stop = ["--stop-after", "1s"]
    assert kit(TRAIN, *more, *stop, "--amp", "bf16").code == 75
    result = kit(TRAIN, *more, *stop)
    assert result.code == 75
    assert "fold0.resume.pt was made with other amp: --overwrite would start the fold over" in result.err
    done(TRAIN, *more)
    run = json.loads((flags[3] / "base" / "fold0.json").read_text())["run"]
    assert (run["amp"], run["before_stops"]) == ("none", [dict(amp="bf16")])
    assert "trained with different amp" in kit(TRAIN, *flags, *vit, "--epochs", 2, "--fold", 1).err
    done("02_oof.py", *flags)


def test_overwrite_starts_a_fold_over_that_other_code_began(flags, vit, monkeypatch):
    more = [*flags, *vit, "--fold", 0, "--epochs", 2, "--overwrite"]
    assert kit(TRAIN, *more, "--stop-after", "1s").code == 75
    monkeypatch.setattr(checkpoint, "CODE", checkpoint.CODE[1:])
    out = done(TRAIN, *more)
    assert "it was made with other code): the fold starts over" in out
    assert "epoch 1/2" in out
    assert json.loads((flags[3] / "base" / "fold0.json").read_text())["run"]["before_stops"] == []


# ---------------------------------------------------------------- flags


def test_what_flags_mean_that_arent_given_follows_the_optimizer():
    expected = {
        "ranger21": (6e-5, 3e-5, 1e-4, "ranger21", None),
        "adamw": (6e-5, 6e-7, 0.05, "cosine", 0.1),
        "sgd": (0.01, 1e-4, 1e-4, "cosine", 0.1),
    }
    names = "lr", "min_lr", "weight_decay", "schedule", "warmup"
    for optimizer, values in expected.items():
        config = settings("--optimizer", optimizer)
        assert [config[name] for name in names] == pytest.approx(list(values)), optimizer
    assert settings("--lr", 1e-5)["min_lr"] == 5e-6, "it follows --lr"
    assert settings("--lr", 1e-3, "--min-lr", 3e-5)["min_lr"] == 3e-5
    assert settings("--optimizer", "adamw", "--schedule", "ranger21")["schedule"] == "ranger21"
    assert settings()["fold"] == ["all"]


def test_folds_with_commas_are_refused_with_what_to_write(flags):
    assert refused(TRAIN, *flags, *SMALL, "--fold", "0-1").endswith("--fold 0-1: there are folds 0 to 1: write 0 1")


@pytest.mark.parametrize("optimizer", ["adamw", "ranger21"])
def test_the_head_has_a_learning_rate_of_its_own(flags, vit, optimizer):
    run = started(flags, *vit, "--optimizer", optimizer, "--head-lr", 10)
    group_of = {id(p): group for group in run.optimizer.param_groups for p in group["params"]}
    for name, p in run.classifier.named_parameters():
        times = 10 if name.startswith("head.") else 1
        group = group_of[id(p)]
        assert group.get("initial_lr", group["lr"]) == pytest.approx(3e-3 * times), name
        assert group["min_lr"] == pytest.approx(3e-4 * times), name


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("test_vit", {}),
        ("swin_tiny_patch4_window7_224", dict(img_size=64, window_size=2, embed_dim=12, depths=(1, 1, 1, 1))),
        ("beit_base_patch16_224", dict(img_size=32, depth=1, embed_dim=24, num_heads=2)),
    ],
)
def test_what_a_model_exempts_from_weight_decay_never_decays(name, kwargs):
    """Without --layer-decay, too."""
    config = dict(model=name, model_kwargs=kwargs, head="fresh", size=kwargs.get("img_size", 32), norm="model")
    classifier = model.build_model(config, 2, "none")
    exempt = classifier.backbone.no_weight_decay()
    assert exempt
    config |= dict(weight_decay=0.05, layer_decay=None, head_lr=1, lr=1e-3, min_lr=1e-4)
    decay = {id(p): group["weight_decay"] for group in layer_groups(classifier, config) for p in group["params"]}
    names = {name: decay[id(p)] for name, p in classifier.backbone.named_parameters()}
    tables = [name for name in names if any(word in name for word in ("pos_embed", "cls_token", "bias_table"))]
    assert tables
    assert {names[name] for name in tables} == {0}
    assert {names[name] for name in names if name.endswith("weight") and "norm" not in name} == {0.05}


def test_an_experiment_of_0_1_0_goes_on_with_the_choices_that_are_named_thesis_now(flags):
    more = [*flags, *SMALL, "--augment", "thesis", "--sampler", "thesis"]
    done(TRAIN, *more, "--fold", 0)
    path = flags[3] / "base" / "fold0.json"
    record = json.loads(path.read_text())
    record["config"] |= dict(augment="d4", sampler="imbalanced")  # as 0.1.0 called them
    del record["config"]["head_lr"]
    path.write_text(json.dumps(record))
    assert "augment was 'thesis' and is now 'd4'" in refused(TRAIN, *flags, *SMALL, "--fold", 1)
    done(TRAIN, *more, "--fold", 1)


def test_folds_with_other_statistics_of_batch_norm_are_warned_of(flags):
    done(TRAIN, *flags, *SMALL, "--fold", 0)
    warned = kit(TRAIN, *flags, *SMALL, "--fold", 1, "--micro-batch", 4).err
    assert "trained with different batch_norm (fold 0 | fold 1)" in warned
    runs = [json.loads((flags[3] / "base" / f"fold{k}.json").read_text())["run"] for k in (0, 1)]
    assert [run["batch_norm"] for run in runs] == [8, 0]
