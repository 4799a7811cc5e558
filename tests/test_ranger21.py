"""Ranger21 optimizer, compared number by number with the package that the thesis ran."""

import contextlib
import copy
import io

import pytest
import timm
import torch
from ranger21 import Ranger21
from torch.utils._python_dispatch import TorchDispatchMode

from kit.train.ranger21 import Ranger21Fast

SCHEDULE = dict(lr=3e-3, num_batches_per_epoch=100, num_epochs=2, warmdown_min_lr=3e-4, weight_decay=1e-2)
OURS = dict(lr=3e-3, steps=200, min_lr=3e-4, weight_decay=1e-2)
EVA = "eva02_large_patch14_448.mim_m38m_ft_in22k_in1k"


def package(parameters, **settings):
    with contextlib.redirect_stdout(io.StringIO()):
        return Ranger21(parameters, logging_active=False, **SCHEDULE | settings)


def step(optimizer):
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer.step()


def draw_gradients(models, generator, scale=1.0):
    """Give all models the same random gradients."""
    for parameters in zip(*(model.parameters() for model in models), strict=True):
        drawn = (
            torch.randn(parameters[0].shape, generator=generator, dtype=parameters[0].dtype)
            * torch.rand((), generator=generator)
            * scale
        )
        for p in parameters:
            p.grad = drawn.clone() if p.requires_grad else None


def difference(one, other):
    """Return the largest relative difference of any tensor."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(((p - q).norm() / p.norm().clamp_min(1e-9)).item() for p, q in pairs)


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("test_vit", 1),
        ("test_resnet", 1),
        pytest.param("test_convnext", 1, marks=pytest.mark.slow),
        pytest.param("test_efficientnet", 1, marks=pytest.mark.slow),
        pytest.param(EVA, 1, marks=pytest.mark.slow),
        ("test_resnet", 1e-7),
    ],
)
def test_200_steps_equal_those_of_the_package(name, scale):
    """Warm-up, warm-down, lookahead, and steps that a GradScaler skips; tiny gradients, where every epsilon counts."""
    torch.manual_seed(0)
    kwargs = dict(depth=2, embed_dim=64, num_heads=4, img_size=56) if name == EVA else {}
    theirs = timm.create_model(name, **kwargs)
    ours = copy.deepcopy(theirs)
    optimizers = package(theirs.parameters()), Ranger21Fast(ours.parameters(), **OURS)
    generator = torch.Generator().manual_seed(1)
    for number in range(200):
        draw_gradients((theirs, ours), generator, scale)
        if number in (3, 60, 61):
            continue
        for optimizer in optimizers:
            step(optimizer)
        assert optimizers[1].param_groups[0]["current_lr"] == pytest.approx(optimizers[0].current_lr, rel=1e-12)
        if number % 20 == 0 or number == 199:
            assert difference(theirs, ours) <= 1e-6, number


def test_parameter_groups_and_frozen_parameters_equal_the_package():
    """As in the package, a leftover loop variable decays the last parameter of the previous group, frozen or not."""
    torch.manual_seed(0)
    theirs = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Conv2d(2, 3, 3), torch.nn.Linear(4, 2))
    theirs.double()  # float64: the two then differ by rounding alone
    ours = copy.deepcopy(theirs)
    optimizers = []
    for model, kind in ((theirs, package), (ours, lambda p: Ranger21Fast(p, **OURS))):
        model[2].bias.requires_grad_(False)
        optimizers.append(kind([dict(params=model[:2].parameters()), dict(params=model[2].parameters())]))
    start, generator = ours[2].bias.clone(), torch.Generator().manual_seed(1)
    for _ in range(200):
        draw_gradients((theirs, ours), generator)
        for optimizer in optimizers:
            step(optimizer)
    assert difference(theirs, ours) <= 1e-12
    assert not torch.equal(ours[2].bias, start), "the package changes a frozen last parameter"


def test_training_resumes_exactly_from_the_state_dict(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_vit")
    optimizer, generator = Ranger21Fast(model.parameters(), **OURS), torch.Generator().manual_seed(1)
    for _ in range(7):  # 2 after a lookahead
        draw_gradients((model,), generator)
        optimizer.step()
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    loaded = timm.create_model("test_vit")
    loaded.load_state_dict(weights)
    resumed = Ranger21Fast(loaded.parameters(), **OURS)
    resumed.load_state_dict(state)
    for _ in range(9):
        draw_gradients((model, loaded), generator)
        optimizer.step()
        resumed.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), loaded.parameters(), strict=True))


class Operations(TorchDispatchMode):
    """Counts the operations of torch in a block."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_a_step_of_eva02_large_takes_less_than_a_thousand_operations():
    """The 464 tensors are smaller than the real model's, which doesn't change the number of operations."""
    counts = {}
    for kind in (package, lambda p: Ranger21Fast(p, **OURS)):
        model = timm.create_model(EVA, embed_dim=64, num_heads=4, img_size=56)
        optimizer = kind(model.parameters())
        for _ in range(2):
            draw_gradients((model,), torch.Generator().manual_seed(1))
            with Operations() as operations:
                step(optimizer)
        counts[type(optimizer).__name__] = operations.count
    assert counts["Ranger21"] > 16_000
    assert counts["Ranger21Fast"] < 1_000


def test_steps_without_gradients_or_with_zeros_stay_finite():
    layer = torch.nn.Linear(4, 3)
    before = copy.deepcopy(layer)
    optimizer = Ranger21Fast(layer.parameters(), **OURS)
    optimizer.step()
    assert torch.equal(layer.weight, before.weight)
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.isfinite(layer.bias).all()
