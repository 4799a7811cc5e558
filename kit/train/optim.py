"""Optimisers (--optimizer), schedules (--schedule), layer decay, freezing.

An optimiser is a function (classifier, config, steps: updates of the fold) → (torch optimiser, scheduler or None where
it has its own). A schedule is a function (step from 1 on, steps, lr, min_lr, warm_up: a share of the steps or None) →
the learning rate.
"""

import math
from collections.abc import Callable
from functools import partial

from common import UserError

import timm.optim
import torch
from timm.models import group_parameters

from kit.train.ranger21 import Ranger21Fast, learning_rate

# Defaults of other flags by --optimizer, ADAM for one not named here; min_lr: a share of --lr. Ranger21: table 4.1
ADAM = dict(lr=6e-5, min_lr=0.01, weight_decay=0.05, schedule="cosine", warmup=0.1)
DEFAULTS = {
    "ranger21": dict(lr=6e-5, min_lr=0.5, weight_decay=1e-4, schedule="ranger21", warmup=None),
    "sgd": ADAM | dict(lr=0.01, weight_decay=1e-4),
}


def cosine(step, steps, lr, min_lr, warm_up=None):
    """Return the rate of a linear warm-up, then half a cosine (Loshchilov and Hutter 2017, arXiv 1608.03983)."""
    first = int((warm_up or 0) * steps)
    if step <= first:
        return lr * step / first
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * (step - first) / (steps - first))) / 2


SCHEDULES: dict[str, Callable[..., float]] = {"ranger21": learning_rate, "cosine": cosine}


def choose_trained(classifier, tune, freeze):
    """Freeze the backbone where `tune` is "head", or its share `freeze` of layers, input side first."""
    backbone = classifier.backbone.requires_grad_(tune == "all")
    if freeze:
        if hasattr(backbone, "group_matcher"):
            layers = group_parameters(backbone, backbone.group_matcher(coarse=False), reverse=True)  # name → number
        else:  # CAFormer, PiT: twelve weights in a row are a layer, as for --layer-decay
            layers = timm.optim.auto_group_layers(backbone)
        first = freeze * (1 + max(layers.values()))
        for name, p in backbone.named_parameters():
            p.requires_grad_(p.requires_grad and layers.get(name, first) >= first)
        if not any(p.requires_grad for p in backbone.parameters()):
            raise UserError(f"--freeze {freeze:g} freezes every layer below the head: lower it, or give --tune head")


def train_mode(classifier, fixed_statistics):
    """Switch on dropout and batch statistics where weights are trained, and only there; with `fixed_statistics`, batch
    norm keeps its statistics everywhere."""
    classifier.train()
    for module in classifier.modules():
        trained = [p.requires_grad for p in module.parameters()]
        fixed = fixed_statistics and isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
        if fixed or (trained and not any(trained)):
            module.eval()


def layer_groups(classifier, config):
    """Return parameter groups with layer-wise learning rates (timm, after BEiT, arXiv 2106.08254): lr for the last
    layer, `layer_decay` times the rate of the one above for each other one, `head_lr` times lr for the head. Biases,
    norms and what the model's no_weight_decay() names don't decay (with Ranger21, the last parameter of the group
    before does)."""
    backbone, decay = classifier.backbone, config["weight_decay"]
    exempt = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else ()
    if config["layer_decay"]:
        groups = timm.optim.param_groups_layer_decay(backbone, decay, exempt, layer_decay=config["layer_decay"])
    else:
        groups = timm.optim.param_groups_weight_decay(backbone, decay, no_weight_decay_list=exempt)
    head = timm.optim.param_groups_weight_decay(classifier.head, decay)
    groups += [group | dict(lr_scale=config["head_lr"]) for group in head]
    for group in groups:
        scale = group.pop("lr_scale", 1.0)
        group.update(lr=config["lr"] * scale, min_lr=config["min_lr"] * scale)
    return [group for group in groups if group["params"]]


def ranger21(classifier, config, steps):
    """Return Ranger21, which computes its schedule itself (thesis 3.5.1)."""
    trained = [p for p in classifier.parameters() if p.requires_grad]
    grouped = config["layer_decay"] or config["head_lr"] != 1  # else one group, as in the listing
    params = layer_groups(classifier, config) if grouped else trained
    schedule = partial(SCHEDULES[config["schedule"]], warm_up=config["warmup"])
    return Ranger21Fast(params, config["lr"], steps, config["min_lr"], config["weight_decay"], schedule), None


def timm_optimizer(classifier, config, steps, name):
    """Return one of timm's optimisers. Raises UserError where it can't be built here."""
    params = layer_groups(classifier, config)
    fused = dict(fused=True) if name in ("adam", "adamw") and next(classifier.parameters()).is_cuda else {}
    rates = dict(lr=config["lr"], weight_decay=config["weight_decay"])
    try:
        optimizer = timm.optim.create_optimizer_v2(params, name, **rates, **fused)
    except (ImportError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"--optimizer {name} can't be built here ({error}): try adamw") from None
    schedule = partial(SCHEDULES[config["schedule"]], warm_up=config["warmup"])
    factor = lambda done: schedule(min(done + 1, steps), steps, config["lr"], config["min_lr"]) / config["lr"]  # noqa: E731
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


OPTIMIZERS: dict[str, Callable] = {"ranger21": ranger21}
OPTIMIZERS |= {name: partial(timm_optimizer, name=name) for name in "adamw sgd adam nadamw radam lamb lion".split()}


def current_lr(optimizer):
    """Return the highest learning rate of the last step; Ranger21 keeps it beside `lr`, which is constant."""
    return max(group.get("current_lr", group["lr"]) for group in optimizer.param_groups)
