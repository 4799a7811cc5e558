"""Training: the thesis' recipe and its switches, checked on numbers and files."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import common

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import TINY, done, load, prepare, refused
from ranger21 import Ranger21
from safetensors.torch import save_file

from kit.score.metrics import METRICS
from kit.score.tasks import Classes
from kit.train import checkpoint, inference, model, monitor
from kit.train.augment import Augmentation
from kit.train.checkpoint import ResumeFile, fold_start
from kit.train.dataset import ImageDataset, draw_epoch, training_loader
from kit.train.device import AlignedSwiGLU, align, pick_amp
from kit.train.losses import complement_cross_entropy, cross_entropy
from kit.train.ranger21 import learning_rate
from kit.train.run import FoldRun
from kit.train.trackers import Track

train = load("01_train_fold.py")
CPU = torch.device("cpu")


def train_fold(flags, *more):
    return done("01_train_fold.py", *flags, "--fold", 0, *TINY, *more)


def settings(*flags):
    return json.loads(done("01_train_fold.py", "--fold", 0, "--print-config", "--device", "cpu", *flags))


# ---------------------------------------------------------------- settings


def test_the_thesis_recipe_is_tables_3_1_and_4_1():
    expected = dict(
        model="eva02_large_patch14_448.mim_m38m_ft_in22k_in1k", weights="pretrained", head="linear", tune="all",
        size=448, norm="thesis", augment="thesis", tta="d4", sampler="thesis", batch_size=17, epochs=2, loss="cce",
        optimizer="ranger21", lr=6e-5, min_lr=3e-5, keep="best", seed=777, accumulate=1,
    )  # fmt: skip
    config = settings("@recipes/thesis.args")
    assert {key: config[key] for key in expected} == expected
    assert model.THESIS_MEAN == model.THESIS_STD == (0.5, 0.5, 0.5)
    assert pick_amp("thesis", torch.device("cuda")) == "fp16"


def test_the_recipes_are_the_thesis_three_variants():
    changed = {name: settings(f"@recipes/{name}.args")["changed"] for name in ("thesis", "nosampler", "convnext")}
    assert changed["thesis"] == dict(augment="thesis", sampler="thesis")
    assert changed["nosampler"] == dict(augment="thesis", sampler="shuffle")
    convnext = dict(
        model="convnext_large.fb_in22k_ft_in1k", norm="thesis", epochs=3, batch_size=8, lr=7e-5, min_lr=3e-5
    )
    assert changed["convnext"] == changed["thesis"] | convnext


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--fold", "5"], "folds 0 to 4"),
        (["--epochs", "0"], "at least 1"),
        (["--lr", "0"], "above 0"),
        (["--lr", "nan"], "above 0"),
        (["--lr", "1e-5", "--min-lr", "3e-5"], "below --min-lr"),
        (["--batch-size", "x"], "whole number"),
        (["--bacth-size", "8"], "--bacth-size"),
        (["--batch-size", "999"], "training images"),
        (["--model", "eva02_large_patch14_44"], "did you mean eva02_large_patch14_448"),
        (["--model", "convnext_large.fb_in22k_ft_in1"], "did you mean convnext_large.fb_in22k_ft_in1k"),
        (["--optimizer", "ranger22"], "invalid choice: 'ranger22'"),
        (["--weights", "nowhere.pth"], "nowhere.pth"),
        (["--size", "64"], "--size 64"),
        (["--exp", "../x"], "plain folder"),
        (["--device", "cuda:9"], "cuda:9"),
        (["--model-kwargs", "nonsense=1"], "nonsense=1"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(toy, flags, words):
    folders = toy()
    prepare(folders)
    assert words in refused("01_train_fold.py", *folders, "--fold", 0, *TINY, *flags)
    assert not list(folders[3].glob("base/fold*"))


def test_without_network_the_error_names_weights(toy, monkeypatch):
    flags = toy()
    prepare(flags)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refused("01_train_fold.py", *flags, "--fold", 0, *TINY, "--weights", "hub")
    assert "--weights FILE" in line


# ---------------------------------------------------------------- loss


def paper_cce(logits, targets):
    """Kim, Lee and Jeon 2021 in float64, written as the paper's sums: H(y, p) - 1 / (K - 1) * C(p), C the mean over
    the samples of -sum over j != g of p_j / (1 - p_g) * log(p_j / (1 - p_g))."""
    total = 0.0
    for row, g in zip(logits.astype(np.float64), targets, strict=True):
        p = np.exp(row) / np.exp(row).sum()
        q = np.delete(p, g) / (1 - p[g])
        total += -np.log(p[g]) + (q * np.log(q)).sum() / (len(row) - 1)
    return total / len(logits)


@pytest.mark.parametrize("classes", [3, 10])
def test_cce_is_the_papers_formula(classes):
    rng = np.random.default_rng(classes)
    logits, targets = rng.normal(0, 2, (50, classes)), rng.integers(0, classes, 50)
    ours = complement_cross_entropy(torch.tensor(logits), torch.tensor(targets)).item()
    assert ours == pytest.approx(paper_cce(logits, targets), rel=1e-6)


def test_cce_of_two_classes_is_exactly_cross_entropy():
    logits = torch.randn(100, 2, requires_grad=True)
    targets = torch.arange(100) % 2
    loss = complement_cross_entropy(logits, targets)
    assert loss.item() == F.cross_entropy(logits, targets).item()
    gradient = torch.autograd.grad(loss, logits)[0]
    assert torch.equal(gradient, torch.autograd.grad(F.cross_entropy(logits, targets), logits)[0])


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("gap", [17, 100, 1e4, 1e30])
def test_cce_is_finite_at_any_logit_gap(classes, gap):
    logits = torch.zeros(2 * classes, classes)
    logits[range(classes), range(classes)] = gap
    logits[range(classes, 2 * classes), range(classes)] = -gap
    logits.requires_grad_(True)
    loss = complement_cross_entropy(logits, torch.arange(classes).repeat(2))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


# ---------------------------------------------------------------- batches


def test_augmentation_gives_all_eight_orientations_and_d4_each_equally_often():
    corners = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    seeds, shares = np.random.default_rng(0).integers(0, 2**32, 4000).tolist(), {}
    for name in ("d4", "thesis"):
        augment = Augmentation(name, 2)
        seen = [tuple(augment(corners, seed)[..., 0].ravel()) for seed in seeds]
        shares[name] = sorted(seen.count(view) / len(seen) for view in set(seen))
    assert shares["d4"] == pytest.approx([1 / 8] * 8, abs=0.02)
    # both flips and the half turn reach the four views that keep the axes: 3/4 of all; quarter turns the other four
    assert shares["thesis"] == pytest.approx([1 / 16] * 4 + [3 / 16] * 4, abs=0.02)
    assert (Augmentation("none", 2)(corners, 1) == corners).all()


def epoch_images(workers, epoch=1, seed=777, augment="d4"):
    images = np.random.default_rng(0).integers(0, 255, (40, 8, 8, 3)).astype(np.uint8)
    config = dict(seed=seed, sampler="shuffle", augment=augment, batch_size=8)
    experiment = SimpleNamespace(images=images, targets=np.arange(40) % 2, config=config, workers=workers, device=CPU)
    run = SimpleNamespace(experiment=experiment, train_rows=np.arange(40), fold=0)
    return torch.cat([batch for batch, _ in training_loader(run, epoch)[0]])


def test_workers_neither_change_nor_repeat_the_random_transforms():
    alone = epoch_images(0)
    assert torch.equal(alone, epoch_images(2))
    assert torch.equal(alone, epoch_images(3))
    assert not torch.equal(alone, epoch_images(2, epoch=2))
    assert not torch.equal(alone, epoch_images(2, seed=1))
    plain = epoch_images(0, augment="none")
    turned = [not torch.equal(a, b) for a, b in zip(alone, plain, strict=True)]
    by_worker = [turned[i : i + 8] for i in range(0, 40, 8)]
    assert len({tuple(part) for part in by_worker}) > 1, "workers replay one random stream"


def test_sampler_balances_and_shuffle_takes_each_image_once():
    labels = (np.arange(1000) < 100).astype(int)
    config = dict(seed=777, sampler="imbalanced")
    drawn = [i for i, _ in draw_epoch(labels, config, 0, 1)]
    assert np.mean(labels[drawn]) == pytest.approx(0.5, abs=0.05)
    assert drawn != [i for i, _ in draw_epoch(labels, config, 0, 2)]
    shuffled = [i for i, _ in draw_epoch(labels, config | dict(sampler="shuffle"), 0, 1)]
    assert sorted(shuffled) == list(range(1000))
    assert shuffled != sorted(shuffled)


def test_validation_images_are_not_augmented():
    images = np.random.default_rng(0).integers(0, 255, (6, 8, 8, 3)).astype(np.uint8)
    seen = []

    class Recorder(torch.nn.Module):
        def forward(self, batch):
            seen.append(batch.permute(0, 2, 3, 1))
            return batch.float().mean((2, 3))

    logits = inference.predict(Recorder(), images, np.array([3, 1, 5]), 2, CPU)
    assert (torch.cat(seen).numpy() == images[[3, 1, 5]]).all()
    assert logits == pytest.approx(images[[3, 1, 5]].mean((1, 2)), rel=1e-5)


# ---------------------------------------------------------------- optimiser


def quiet_ranger(lr, batches, epochs, min_lr, parameters):
    with contextlib.redirect_stdout(io.StringIO()):
        return Ranger21(parameters, lr=lr, num_batches_per_epoch=batches, num_epochs=epochs, warmdown_min_lr=min_lr)


@pytest.mark.parametrize(("batches", "epochs"), [(50, 2), (1500, 3)])
def test_other_optimisers_follow_rangers_schedule(batches, epochs):
    weight = torch.nn.Parameter(torch.ones(2, 2))
    ranger, steps = quiet_ranger(6e-5, batches, epochs, 3e-5, [weight]), batches * epochs
    with contextlib.redirect_stdout(io.StringIO()):
        for step in range(1, steps + 1):
            weight.grad = torch.tensor([[0.1, -0.2], [0.3, 0.1]])
            ranger.step()
            ours = learning_rate(step, steps, 6e-5, 3e-5)
            assert ours == pytest.approx(ranger.current_lr, rel=1e-9), step


def small_run(classifier, **config):
    """Return a FoldRun of a classifier of two classes."""
    config = (
        dict(batch_size=4, accumulate=1, epochs=1, init="weights", clip_grad=None, tta="none", weights="none") | config
    )
    prepared = SimpleNamespace(task=Classes(["0", "1"]), metric="auc")
    experiment = SimpleNamespace(
        config=config, prepared=prepared, device=CPU, amp="none", folder=Path(), save_minutes=0, stop_after=None,
        provenance={}, replaced=(), parts=1, images_at_once=4, micro_batch=None, chosen=[0], compile="off",
    )  # fmt: skip
    return FoldRun(
        experiment=experiment, fold=0,
        train_rows=np.arange(0), valid_rows=np.arange(0), classifier=classifier, model=classifier,
        criterion=cross_entropy, optimizer=torch.optim.SGD(classifier.parameters(), 0.1), scheduler=None, ema=None,
        scaler=torch.amp.GradScaler("cpu", enabled=False), resume=ResumeFile(experiment, 0),
        track=Track(None, Path(), 0, config),
    )  # fmt: skip


def train_small(classifier, batches, monkeypatch, **config):
    """Train an epoch of these batches."""
    known = [len(targets) for _, targets in batches]
    monkeypatch.setattr(train, "training_loader", lambda *_: (batches, known))
    return train.train_epoch(small_run(classifier, **config), fold_start())


def test_accumulated_batches_equal_one_large_batch(monkeypatch):
    torch.manual_seed(0)
    images, targets = torch.randint(0, 255, (16, 16, 16, 3), dtype=torch.uint8), torch.arange(16) % 2
    weights = []
    for size, accumulate in ((8, 1), (4, 2)):
        torch.manual_seed(1)
        backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 2))
        classifier = model.Classifier(backbone, torch.nn.Identity(), "features", (0.5,) * 3, (0.5,) * 3, 1)
        batches = [(images[i : i + size], targets[i : i + size]) for i in range(0, 16, size)]
        train_small(classifier, batches, monkeypatch, batch_size=size, accumulate=accumulate)
        weights.append(backbone[1].weight.detach().clone())
    assert torch.allclose(*weights, atol=1e-6)
    torch.manual_seed(1)
    assert not torch.allclose(weights[0], torch.nn.Linear(768, 2).weight), "something was learnt"


def test_running_scores_are_of_a_bounded_window(monkeypatch):
    sizes = []
    monkeypatch.setattr(monitor, "WINDOW", 8)
    monkeypatch.setattr(monitor, "READ_SECONDS", -1)
    plain_scores = monitor.scores
    for module in (monitor, train):
        monkeypatch.setattr(module, "scores", lambda run, x, y: sizes.append(len(x)) or plain_scores(run, x, y))
    classifier = model.Classifier(torch.nn.Flatten(), torch.nn.Linear(48, 2), "features", (0.5,) * 3, (0.5,) * 3, 2)
    batches = [(torch.zeros(4, 4, 4, 3, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))] * 10
    train_small(classifier, batches, monkeypatch)
    assert sizes == [4] + [8] * 9 + [40], "each refresh scores 8 images, the epoch's end all"


def test_training_auc_is_of_probabilities():
    logits = np.array([[5.0, 4.0], [-5.0, -3.0], [9.0, 5.0], [-9.0, -8.0]])
    targets = np.array([0, 1, 0, 1])
    assert METRICS["auc"].score(targets, logits, None) == 0.0, "raw second logits order these rows the other way round"
    assert monitor.scores(small_run(torch.nn.Linear(1, 1)), logits, targets)["auc"] == 1.0


def test_nan_losses_are_skipped_by_the_grad_scaler_and_counted(monkeypatch, capsys):
    """With a GradScaler two NaN losses are a warning, five in a row end the fold; without one, the first does."""
    good, bad = torch.tensor(1.0), torch.tensor(float("nan"))
    run = small_run(torch.nn.Linear(1, 1))
    run.scaler = SimpleNamespace(is_enabled=lambda: True)
    monkeypatch.setattr(monitor, "READ_SECONDS", 1e9)

    def epoch(*losses):
        state = fold_start() | dict(logits=[torch.zeros(2, 2)], targets=[torch.tensor([0, 1])])
        with monitor.EpochMonitor(run, state, len(losses)) as epoch_monitor:
            for step, loss in enumerate(losses):
                epoch_monitor.after(step, loss, False)

    epoch(good, bad, bad, good)
    assert "2 of 4 losses were NaN or infinite" in capsys.readouterr().err
    with pytest.raises(common.UserError, match="loss is nan at step 6 of 6"):
        epoch(good, bad, bad, bad, bad, bad)
    run.scaler = SimpleNamespace(is_enabled=lambda: False)
    with pytest.raises(common.UserError, match="loss is nan at step 2 of 3"):
        epoch(good, bad, good)


# ---------------------------------------------------------------- the model


EVA = dict(
    model="eva02_large_patch14_448.mim_m38m_ft_in22k_in1k", model_kwargs=dict(depth=2, embed_dim=64, num_heads=4),
    size=56, norm="thesis", head="linear",
)  # fmt: skip
EVA_FLAGS = "--model-kwargs depth=2 embed_dim=64 num_heads=4 --size 56 --epochs 1 --batch-size 8".split()


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_eva02_trains_from_a_weights_file(toy, tmp_path, ending):
    torch.manual_seed(3)
    state = timm.create_model(EVA["model"], img_size=56, **EVA["model_kwargs"]).state_dict()
    path = tmp_path / f"eva{ending}"
    save_file(state, path) if ending == ".safetensors" else torch.save(state, path)
    loaded = model.build_model(EVA, 2, path)
    assert all(torch.equal(value, state[key]) for key, value in loaded.backbone.state_dict().items())
    assert loaded.head.weight.shape == (2, 1000), "the thesis keeps the 1000 outputs"

    flags = toy()
    prepare(flags, 56)
    done("01_train_fold.py", *flags, "--fold", 0, *EVA_FLAGS, "--weights", path)
    _, trained = checkpoint.load_fold(flags[3] / "base" / "fold0.pt", CPU)
    moved = (trained.backbone.blocks[0].mlp.fc1_g.weight - state["blocks.0.mlp.fc1_g.weight"]).abs().max()
    assert 0 < moved < 0.01


def test_a_weights_file_of_another_model_or_with_code_is_refused(toy, tmp_path):
    flags = toy()
    prepare(flags)
    other = tmp_path / "other.pth"
    torch.save(timm.create_model("test_vit").state_dict(), other)
    hostile = tmp_path / "hostile.pth"
    hostile.write_bytes(b"cos\nsystem\n(S'touch " + bytes(tmp_path / "owned") + b"'\ntR.")
    noise = tmp_path / "noise.safetensors"
    noise.write_bytes(b"\xff" * 100)
    for path in (other, hostile, noise):
        line = refused("01_train_fold.py", *flags, "--fold", 0, *TINY, "--weights", path)
        assert path.name in line
    assert not (tmp_path / "owned").exists()


def test_heads_and_norms():
    base = dict(model="test_resnet", model_kwargs={}, size=32, norm="model")
    linear, fresh = (model.build_model(base | dict(head=head), 3, "none") for head in ("linear", "fresh"))
    batch = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    assert linear(batch).shape == fresh(batch).shape == (2, 3)
    assert linear.backbone.num_classes == 1000
    assert fresh.backbone.num_classes == 0
    assert fresh.head.weight.shape == (3, fresh.backbone.num_features)
    config = timm.data.resolve_model_data_config(linear.backbone)
    assert (linear.mean.flatten() / 255).tolist() == pytest.approx(config["mean"])
    fresh.eval()
    normalised = (batch / 255 - torch.tensor(config["mean"]).view(3, 1, 1)) / torch.tensor(config["std"]).view(3, 1, 1)
    assert torch.allclose(fresh(batch), fresh.head(fresh.backbone(normalised)), atol=1e-5)


@pytest.mark.parametrize("head", ["linear", "fresh"])
def test_tune_head_trains_the_head_alone(toy, head):
    flags = toy()
    prepare(flags)
    train_fold(flags, "--tune", "head", "--head", head, "--epochs", 1)
    after = torch.load(flags[3] / "base" / "fold0.pt")["model"]
    torch.manual_seed(np.random.SeedSequence([777, 0]).generate_state(1).item())
    before = model.build_model(torch.load(flags[3] / "base" / "fold0.pt")["config"], 2, "none").state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"head.weight", "head.bias"}


def small(name="test_vit", head="fresh", size=32, **kwargs):
    return dict(model=name, model_kwargs=kwargs, head=head, size=size, norm="model")


def test_a_score_of_bf16_features_has_the_digits_of_float32():
    """Among 500 images, computed in bf16, a head in bf16 too would tie most scores."""
    torch.manual_seed(0)
    classifier = model.build_model(small(), 2, "none")
    images = np.random.default_rng(0).integers(0, 255, (500, 32, 32, 3), dtype=np.uint8)
    logits = inference.predict(classifier, images, np.arange(500), 64, CPU, "bf16")
    assert len(np.unique(logits[:, 1] - logits[:, 0])) > 490
    with torch.autocast("cpu", torch.bfloat16):
        features = classifier.features(torch.from_numpy(images[:2]).permute(0, 3, 1, 2))
    assert features.dtype == torch.float32


def test_the_prior_is_added_in_eval_mode_alone_and_older_fold_files_have_none(tmp_path):
    classifier, config = model.build_model(small(), 2, "none"), small()
    images = torch.randint(0, 255, (4, 3, 32, 32), dtype=torch.uint8)
    without = classifier.eval()(images)
    classifier.log_prior.copy_(torch.tensor([1.0, -2.0]))
    assert torch.allclose(classifier(images) - without, torch.tensor([1.0, -2.0]), atol=1e-5)
    assert torch.allclose(classifier.train()(images), without, atol=1e-5)  # a ViT has no batch statistics
    weights = classifier.state_dict()
    torch.save(dict(config=config, classes=["a", "b"], model=weights), tmp_path / "fold0.pt")
    del weights["log_prior"]
    torch.save(dict(config=config, classes=["a", "b"], model=weights), tmp_path / "fold1.pt")
    priors = [checkpoint.load_fold(tmp_path / f"fold{k}.pt", CPU)[1].log_prior.tolist() for k in (0, 1)]
    assert priors == [[1.0, -2.0], [0.0, 0.0]]


VIT = dict(depth=1, embed_dim=32, num_heads=2)
FAMILIES = [
    ("vit_tiny_patch16_224", 64, VIT),
    ("vit_small_patch16_dinov3", 64, VIT),
    ("eva02_tiny_patch14_224", 56, VIT),
    ("beit_base_patch16_224", 64, VIT),
    ("deit3_small_patch16_224", 64, VIT),
    ("swin_tiny_patch4_window7_224", 64, dict(depths=(1, 1), num_heads=(1, 2), embed_dim=16)),
    ("swinv2_tiny_window8_256", 64, dict(depths=(1, 1), num_heads=(1, 2), embed_dim=16)),
    ("hiera_tiny_224", 64, dict(embed_dim=16, num_heads=1, stages=(1, 1, 1, 1))),
    ("convnext_atto", 64, dict(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))),
    ("convnextv2_atto", 64, dict(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))),
    ("maxvit_rmlp_pico_rw_256", 64, {}),
    ("caformer_s18", 64, {}),
    ("mobilenetv3_small_050", 64, {}),
]


@pytest.mark.parametrize(("name", "size", "kwargs"), FAMILIES, ids=[name for name, *_ in FAMILIES])
def test_weights_that_others_replace_are_not_drawn(name, size, kwargs):
    """The network computes the same, with its tables of positions, whether a state dict of all or a backbone's came."""
    config = small(name, size=size, **kwargs)
    drawn = model.build_model(config, 2, "none").eval()
    later = model.build_model(config, 2, None)
    assert model.has_nan(later)
    later.load_state_dict(drawn.state_dict())
    begun = model.build_model(config, 2, drawn.backbone.state_dict())
    assert not model.has_nan(begun)
    images = torch.randint(0, 255, (2, 3, size, size), dtype=torch.uint8)
    with torch.no_grad():
        logits = drawn(images)
        begun.head.load_state_dict(drawn.head.state_dict())
        assert torch.equal(later.eval()(images), logits)
        assert torch.equal(begun.eval()(images), logits)


def test_weights_that_the_hubs_file_lacks_are_drawn(monkeypatch):
    """timm accepts such a file for a network without classes."""
    state = timm.create_model("test_resnet").state_dict()
    lacking = {key: value for key, value in state.items() if not key.startswith("layer2")}
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(lacking))
    backbone = model.build_model(small("test_resnet"), 2, "hub").backbone
    assert not model.has_nan(backbone)
    assert torch.equal(backbone.conv1[0].weight, state["conv1.0.weight"])
    drawn = backbone.get_parameter("layer2.0.conv1.weight")
    assert 0 < drawn.std() < 1
    assert drawn.shape == state["layer2.0.conv1.weight"].shape


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--model test_vit --model-kwargs in_chans=1", "to have 1 channels, but got 3 channels"),
        ("--model vit_tiny_patch16_224 --model-kwargs depth=1 img_size=64", "(32) doesn't match model (64)"),
        ("--model test_vit --model-kwargs global_pool= --head fresh", "logits of shape [1, 5, 2]"),
        ("--model inception_v3 --weights none", "Kernel size can't be greater than actual input size"),
        ("--model test_vit --model-kwargs patch_size=0", "can't be built with patch_size=0"),
        ("--model test_vit --model-kwargs embed_dim=-1", "can't be built with embed_dim=-1"),
    ],
)
def test_a_network_that_cannot_compute_the_images_is_refused(toy, words, reason):
    flags = toy()
    prepare(flags)
    line = refused("01_train_fold.py", *flags, *TINY, "--fold", 0, *words.split())
    assert reason in line
    assert "--model-kwargs" in line
    assert not list((flags[3] / "base").glob("fold*"))


def test_timms_old_names_are_called_by_their_new_ones(capsys):
    model.current_name.cache_clear()
    config = json.loads(done("01_train_fold.py", "--fold", 0, "--print-config", "--model", "tf_efficientnet_b0_ns"))
    assert config["model"] == "tf_efficientnet_b0.ns_jft_in1k"
    model.current_name.cache_clear()
    assert model.current_name("vit_base_patch16_224_in21k") == "vit_base_patch16_224.augreg_in21k"
    model.current_name("vit_base_patch16_224_in21k")
    warning = "--model vit_base_patch16_224_in21k is called vit_base_patch16_224.augreg_in21k in timm now"
    assert capsys.readouterr().err.count(warning) == 1
    for name in ("test_vit", "resnet50.a1_in1k", "no_such_model"):
        assert model.current_name(name) == name


def test_other_models_than_the_thesis_have_their_weights_mean_and_std():
    assert settings()["norm"] == "thesis"
    assert settings("--model", "test_resnet")["norm"] == "model"
    assert settings("--model", "test_resnet", "--norm", "thesis")["norm"] == "thesis"
    assert settings("--norm", "model")["norm"] == "model"
    assert settings("@recipes/convnext.args")["norm"] == "thesis"


# ---------------------------------------------------------------- a fold from end to end


def test_padded_hidden_units_of_a_swiglu_change_nothing():
    """170 units become 192. On a CPU the forward pass without padding would run."""
    torch.manual_seed(0)
    small = dict(depth=2, embed_dim=64, num_heads=4, img_size=56, num_classes=3)
    plain, padded = (timm.create_model("eva02_large_patch14_448", **small) for _ in range(2))
    padded.load_state_dict(plain.state_dict())
    align(padded)
    mlps = [module for module in padded.modules() if type(module) is AlignedSwiGLU]
    assert [mlp.fc2.in_features for mlp in mlps] == [170, 170]
    for mlp in mlps:
        mlp.forward = mlp.padded
    images = torch.randn(3, 3, 56, 56)
    logits = [network(images) for network in (plain, padded)]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-7)
    for values in logits:
        values.square().sum().backward()
    for one, other in zip(plain.parameters(), padded.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-9)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="on a CPU, torch.compile needs a C++ compiler")
def test_compiled_training_and_prediction_give_the_same_scores(toy):
    flags = toy()
    prepare(flags)
    vit = ["--model", "test_vit", "--model-kwargs", "img_size=32", "--optimizer", "adamw", "--tta", "flip"]
    for exp, words in (("plain", []), ("compiled", ["--compile"])):
        done("01_train_fold.py", *flags, "--fold", "all", *TINY, *vit, "--exp", exp, *words)
        done("02_oof.py", exp, *flags)
        done("03_infer.py", exp, *flags, *words)
    plain, compiled = (np.load(flags[3] / exp / "fold1_test.npy") for exp in ("plain", "compiled"))
    np.testing.assert_allclose(plain, compiled, atol=1e-3)


def test_fp16_with_a_grad_scaler_and_bf16_run_on_the_cpu(toy):
    flags = toy()
    prepare(flags)
    for amp in ("fp16", "bf16"):
        train_fold(flags, "--amp", amp, "--exp", amp, "--epochs", 1)
        assert json.loads((flags[3] / amp / "fold0.json").read_text())["run"]["amp"] == amp
        logits = pd.read_csv(flags[3] / amp / "fold0.csv").filter(like="best_")
        assert np.isfinite(logits.to_numpy()).all()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler.scale(weight.half().sum() * 1e4).backward()
    experiment = SimpleNamespace(config=dict(clip_grad=None))
    run = SimpleNamespace(optimizer=optimizer, scheduler=None, scaler=scaler, ema=None, experiment=experiment)
    train.update(run, 1)
    assert weight.item() == 1.0, "a step with overflowed gradients is skipped"


def test_a_nan_loss_ends_training_with_its_step_and_learning_rate(toy):
    flags = toy()
    prepare(flags)
    line = refused(
        "01_train_fold.py", *flags, "--fold", 0, *TINY, "--optimizer", "sgd", "--lr", "1e30", "--augment", "none"
    )
    assert re.search(r"loss is (nan|inf) at step \d+ of 4, lr \d", line)
    assert not list(flags[3].glob("base/fold0*"))


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_timm_optimisers_with_shuffled_images(toy, optimizer):
    flags = toy()
    prepare(flags)
    train_fold(flags, "--optimizer", optimizer, "--sampler", "shuffle", "--loss", "ce", "--epochs", 3)
    epochs = pd.read_csv(flags[3] / "base" / "fold0_epochs.csv")
    assert epochs.lr.iloc[-1] == pytest.approx(3e-4, rel=0.35)
    assert epochs.train_loss.iloc[-1] < epochs.train_loss.iloc[0]


def test_keep_chooses_the_epoch(trained, toy):
    epochs = pd.read_csv(trained.base / "fold0_epochs.csv")
    saved = torch.load(trained.base / "fold0.pt")
    best = epochs.epoch[::-1][epochs.valid_auc[::-1].idxmax()] if len(epochs) else 0
    assert saved["epoch"] == best
    assert saved["scores"]["auc"] == pytest.approx(epochs.valid_auc.max(), rel=1e-6)
    flags = toy()
    prepare(flags)
    train_fold(flags, "--keep", "last", "--epochs", 3)
    assert torch.load(flags[3] / "base" / "fold0.pt")["epoch"] == 3


def test_epoch_table_and_lines(trained):
    epochs = pd.read_csv(trained.base / "fold1_epochs.csv")
    scores = [f"{part}_{score}" for part in ("train", "valid") for score in ("loss", "accuracy", "auc")]
    assert list(epochs.columns) == ["epoch", *scores, "lr", "seconds", "images_per_second"]
    assert epochs.epoch.tolist() == [1, 2]
    assert epochs.lr.iloc[-1] == pytest.approx(3e-4, rel=0.2)
    assert epochs.filter(like="auc").stack().between(0, 1).all()


def test_a_finished_fold_is_left_alone_and_other_settings_are_refused(toy):
    flags = toy()
    prepare(flags)
    assert len(re.findall(r"^fold 0 epoch \d/2 ", train_fold(flags), re.M)) == 2
    files = {path.name: path.read_bytes() for path in (flags[3] / "base").glob("[!.]*")}
    assert "is finished" in train_fold(flags)
    line = refused("01_train_fold.py", *flags, "--fold", 1, *TINY, "--lr", "1e-3")
    assert "lr was 0.003 and is now 0.001" in line
    assert files == {path.name: path.read_bytes() for path in (flags[3] / "base").glob("[!.]*")}


@pytest.mark.slow
def test_the_same_command_gives_the_same_bytes_with_any_number_of_workers(toy):
    flags = toy()
    prepare(flags)
    for exp, workers in (("a", 0), ("b", 0), ("c", 2)):
        train_fold(flags, "--exp", exp, "--workers", workers)
    train_fold(flags, "--exp", "d", "--seed", 1)
    read = lambda exp, name: (flags[3] / exp / name).read_bytes()  # noqa: E731
    for name in ("fold0.csv", "fold0.pt"):
        assert read("a", name) == read("b", name) == read("c", name)
    assert read("a", "fold0.csv") != read("d", "fold0.csv")


def test_images_are_copied_out_of_the_read_only_map():
    images = np.zeros((3, 4, 4, 3), np.uint8)
    images.flags.writeable = False
    image, _ = ImageDataset(images, np.arange(3), None, Augmentation("d4", 4))[(1, 5)]
    assert image.flags.writeable
    assert image.flags.c_contiguous


@pytest.mark.parametrize(
    ("name", "memory_format"), [("test_vit", torch.contiguous_format), ("test_resnet", torch.channels_last)]
)
def test_a_backbone_gets_images_in_the_format_that_is_fast_for_it(name, memory_format):
    """Whatever the format in which they come, as TTA's rotated views do."""
    config, seen = dict(model=name, model_kwargs={}, size=32, head="fresh", norm="model"), []
    classifier = model.build_model(config, 2, "none").eval()
    classifier.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    for given in (
        images,
        images.contiguous(memory_format=torch.channels_last),
        images.rot90(1, (2, 3)).rot90(3, (2, 3)),
    ):
        with torch.no_grad():
            classifier(given)
        assert seen[-1].is_contiguous(memory_format=memory_format)
        assert torch.equal(seen[-1], seen[0])
