"""Layer decay, freezing, schedules, gradient clipping, EMA."""

import math
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import done, kit, load
from small_models import STEP, TRAIN, files, kept_weights, started

from kit.train import inference
from kit.train import model as networks
from kit.train.optim import SCHEDULES, choose_trained

train = load(TRAIN)
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def flags(of_classes):
    return of_classes(2)


def bytes_with_and_without_stops(flags, *more):
    """Train two epochs without a stop, and with one after each of the first two steps, the first epoch and the fourth
    step. → the bytes of both."""
    more = [*more, "--fold", 0, "--epochs", 2]
    done(TRAIN, *flags, *more, "--exp", "unbroken")
    stops = [kit(TRAIN, *flags, *more, *STEP, "--exp", "parts").code for _ in range(4)]
    assert stops == [75] * 4
    assert "goes on in epoch 2 after 1 of 3 steps" in done(TRAIN, *flags, *more, "--exp", "parts")
    return files(flags, "unbroken"), files(flags, "parts")


# ---------------------------------------------------------------- layer decay, freezing


def layers_above(name, head):
    """Return how many layers of test_vit are above a parameter's: six blocks, below them the stem. timm counts the last
    norm to the last block, and, where the network has no classifier, the last block to the head."""
    if name.startswith(("head.", "backbone.head.")):
        return 0
    block = 5 if name.startswith("backbone.norm.") else int(name.split(".")[2]) if ".blocks." in name else -1
    return 5 - block + (head == "linear")


@pytest.mark.parametrize("head", ["linear", "fresh"])
@pytest.mark.parametrize("optimizer", ["adamw", "ranger21"])
def test_each_layer_has_its_learning_rate(flags, vit, optimizer, head):
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


def test_weights_move_by_their_layers_learning_rate(flags, vit):
    """AdamW's first step is the learning rate, whatever the gradient, beside the decay."""
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


def test_without_layer_decay_all_layers_have_one_learning_rate(flags, vit):
    for optimizer in ("adamw", "ranger21"):
        run = started(flags, *vit, "--optimizer", optimizer, "--schedule", "cosine")
        assert len({group["lr"] for group in run.optimizer.param_groups}) == 1


def test_layer_decay_leaves_out_frozen_layers(flags, vit):
    """Groups hold the trained parameters and no others, and none is empty."""
    for more in (["--tune", "head"], ["--freeze", 0.5]):
        run = started(flags, *vit, "--layer-decay", 0.5, "--optimizer", "adamw", *more)
        given = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
        assert given == {id(p) for p in run.classifier.parameters() if p.requires_grad}
        assert all(group["params"] for group in run.optimizer.param_groups)
        assert 0 < len(given) < len([*run.classifier.parameters()])


@pytest.mark.parametrize(("share", "still"), [(0.5, ("conv1", "bn1", "layer1", "layer2")), (0, ())])
def test_frozen_layers_and_their_batch_statistics_stay(flags, resnet, weights, share, still):
    """A stem, four layers and a classifier, of which the first half stays."""
    done(TRAIN, *flags, *resnet, "--fold", 0, "--freeze", share, "--optimizer", "adamw")
    before, after = torch.load(weights["test_resnet"], weights_only=True), kept_weights(flags, "base")
    moved = {key for key in before if not torch.equal(before[key], after[f"backbone.{key}"])}
    assert moved == {key for key in before if key.split(".")[0] not in still}
    assert {"layer3.0.bn1.running_mean", "layer3.0.conv1.weight", "fc.bias"} <= moved


def test_frozen_layers_have_no_dropout_and_no_backward_pass(flags, vit):
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


def test_the_first_layers_of_a_model_without_timms_layer_numbers_are_frozen():
    config = dict(model="caformer_s18", model_kwargs={}, size=64, norm="model", head="fresh")
    classifier = networks.build_model(config, 2, None)
    choose_trained(classifier, "all", 0.5)
    trained = [p.requires_grad for p in classifier.backbone.parameters()]
    assert 0.4 < sum(trained) / len(trained) < 0.7
    assert trained == sorted(trained), "those nearest to the input, as registered"


# ---------------------------------------------------------------- schedule, gradient clipping, EMA


def test_cosine_by_hand():
    cosine = SCHEDULES["cosine"]
    assert [cosine(step, 10, 1.0, 0.1, 0.2) for step in (1, 2)] == [0.5, 1.0]
    assert cosine(4, 10, 1.0, 0.1, 0.2) == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert cosine(6, 10, 1.0, 0.1, 0.2) == pytest.approx(0.55)
    assert cosine(10, 10, 1.0, 0.1, 0.2) == pytest.approx(0.1)
    assert cosine(5, 10, 2.0, 0.0) == pytest.approx(1.0)
    assert cosine(1, 10, 2.0, 0.0) == pytest.approx(1 + math.cos(math.pi / 10))


def test_warm_up_of_ranger21s_schedule_by_hand():
    rate = SCHEDULES["ranger21"]
    assert [rate(step, 100, 1.0, 0.1, 0.5) for step in (1, 25, 50, 60)] == [0.02, 0.5, 1.0, 1.0]
    assert [rate(step, 100, 1.0, 0.1, 0) for step in (1, 71)] == [1.0, 1.0]
    assert [rate(step, 100, 1.0, 0.1) for step in (1, 22)] == pytest.approx([1 / 22, 1.0])


@pytest.mark.parametrize("optimizer", ["adamw", "ranger21"])
def test_training_follows_the_schedule_of_the_flags(flags, resnet, optimizer, monkeypatch):
    rates, plain = [], train.update

    def update(run, number):
        before = run.optimizer.param_groups[0]["lr"]
        assert plain(run, number)
        rates.append(run.optimizer.param_groups[0].get("current_lr", before))
        return True

    monkeypatch.setattr(train, "update", update)
    more = ["--epochs", 2, "--optimizer", optimizer, "--schedule", "cosine", "--warmup", 0.4]
    train.train_fold(started(flags, *resnet, *more))
    third = [3e-4 + 2.7e-3 * (1 + math.cos(math.pi * k / 4)) / 2 for k in (1, 2, 3, 4)]
    assert rates == pytest.approx([1.5e-3, 3e-3, *third], rel=1e-9)


def clipped(scaler, gradient, norm=1.0):
    """Return by how much a weight of 4 numbers moves at learning rate 1, where its loss has this gradient."""
    classifier = torch.nn.Linear(4, 1, bias=False)
    before = classifier.weight.detach().clone()
    run = SimpleNamespace(
        classifier=classifier, optimizer=torch.optim.SGD(classifier.parameters(), 1.0), scheduler=None, ema=None,
        scaler=scaler, experiment=SimpleNamespace(config=dict(clip_grad=norm)),
    )  # fmt: skip
    scaler.scale(classifier(torch.tensor([gradient])).sum()).backward()
    train.update(run, 1)
    return (before - classifier.weight.detach()).flatten()


@pytest.mark.parametrize("enabled", [False, True])
def test_gradients_above_the_maximum_norm_are_clipped(enabled):
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
    """Return a list that will hold (number, weights) after each update of the run."""
    states, plain = [], train.update

    def update(run, number):
        assert plain(run, number)
        states.append((number, {key: value.clone() for key, value in run.classifier.state_dict().items()}))
        return True

    monkeypatch.setattr(train, "update", update)
    return states


def test_the_ema_is_that_by_hand_and_is_validated_and_kept(flags, resnet, monkeypatch):
    run = started(flags, *resnet, "--ema", 0.45, "--optimizer", "adamw")
    states = states_after_updates(run, monkeypatch)
    kept = train.train_fold(run)[0]["best"]
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

    again = networks.build_model(run.experiment.config, 2, "none")
    again.load_state_dict(kept["weights"])
    logits = inference.predict(again.eval(), run.experiment.images, run.valid_rows, 32, CPU)
    assert kept["logits"].numpy() == pytest.approx(logits, abs=1e-5)


def test_accumulated_batches_are_one_update_of_the_ema(flags, resnet, monkeypatch):
    run = started(flags, *resnet, "--ema", 0.9, "--optimizer", "adamw", "--accumulate", 2, "--epochs", 2)
    states = states_after_updates(run, monkeypatch)
    train.train_fold(run)
    assert [number for number, _ in states] == [1, 2, 3, 4], "each epoch's three batches are two updates"


def test_an_ema_does_not_change_the_training(flags, resnet):
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
        "--layer-decay 0.7 --freeze 0.3 --ema 0.9 --augment light --model-kwargs proj_drop_rate=0.2",
    ],
)
def test_a_stopped_fold_ends_with_the_same_bytes(flags, vit, switches):
    unbroken, parts = bytes_with_and_without_stops(flags, *vit, *switches.split())
    assert unbroken == parts
