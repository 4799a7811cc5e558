"""Augmentations, seeds, the head on tokens, recipes, flags that contradict each other."""

import json
import random

import numpy as np
import pytest
import torch
from conftest import ROOT, done, refused
from small_models import TRAIN, features_path, files, kept_weights

from kit.train import model as networks
from kit.train import settings as flag_checks
from kit.train.augment import AUGMENTATIONS, Augmentation

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def flags(of_classes):
    return of_classes(2)


def settings(*more):
    return json.loads(done(TRAIN, "--fold", 0, "--print-config", "--device", "cpu", *more))


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
    assert different == 1 if name == "none" else different >= dict(flip=2, d4=5, thesis=5).get(name, 11)
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
        tokens = classifier.backbone.fc_norm(tokens)  # a ViT that averages has the norm here
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
def test_recipes_name_existing_flags_and_models(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = settings(f"@recipes/{recipe}")
    networks.check_name(config["model"])


REFUSED = [
    ("--stop-after 1h --save-minutes 0", "--stop-after needs resume files"),
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


def test_a_batch_has_an_image_for_each_process(monkeypatch):
    monkeypatch.setattr(flag_checks, "WORLD", 4)
    assert "--batch-size 3 can't be shared by 4" in refused(TRAIN, "--fold", 0, "--print-config", "--batch-size", 3)


def test_weights_of_another_network_are_refused_also_without_classes(flags, vit, weights):
    """timm accepts missing weights where a network has no classes: its low layers would stay random."""
    given = [*vit, "--weights", weights["test_resnet"], "--head", "fresh", "--fold", 0]
    assert "doesn't hold weights of test_vit" in refused(TRAIN, *flags, *given)
