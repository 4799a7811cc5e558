"""How do the weights move?

An optimiser is a function (module, config, steps) → (torch optimiser, its learning-rate scheduler or None). `steps` is
the number of updates of the whole fold; config holds lr, min_lr and weight_decay. All follow Ranger21's schedule.
"""

from functools import partial

import timm.optim
import torch

from common import UserError
from kit.ranger21 import Ranger21Fast, learning_rate


def ranger21(module, config, steps):
    """Ranger21, which brings its own schedule (thesis 3.5.1)."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return Ranger21Fast(parameters, config["lr"], steps, config["min_lr"], config["weight_decay"]), None


def timm_optimizer(module, config, steps, name):
    """One of timm's optimisers, with Ranger21's schedule. Raises UserError where it can't be made here."""
    try:
        optimizer = timm.optim.create_optimizer_v2(module, name, lr=config["lr"], weight_decay=config["weight_decay"])
    except (ImportError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"--optimizer {name} can't be made here ({error}): try adamw") from None
    factor = lambda done: learning_rate(min(done + 1, steps), steps, config["lr"], config["min_lr"]) / config["lr"]  # noqa: E731
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


OPTIMIZERS = {"ranger21": ranger21}
OPTIMIZERS |= {name: partial(timm_optimizer, name=name) for name in "adamw sgd adam nadamw radam lamb lion".split()}


def current_lr(optimizer):
    """The learning rate of the last step; Ranger21 keeps it beside `lr`, which never moves."""
    group = optimizer.param_groups[0]
    return group.get("current_lr", group["lr"])
