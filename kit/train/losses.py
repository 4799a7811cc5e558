"""Losses, by --loss: complement cross entropy, cross entropy, binary cross entropy, squared error.

Each takes logits float [B, K] and targets, and returns the mean over the batch, a float32 scalar. Targets are int [B]
for classes, float [B, K] for labels (0 or 1) and for numbers (0 to 1 over their range, NaN where one is missing).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def complement_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the complement cross entropy (Kim, Lee and Jeon 2021, arXiv 2009.02189; thesis 3.6.1).

    It is the cross entropy minus 1 / (K - 1) times the entropy of the softmax over the *other* classes, which is
    thereby made uniform. With two classes there is one other class, its entropy is 0, and the loss is cross entropy.

    The softmax without the target's logit is the paper's p_j / (1 - p_target), but needs no division by a number that
    rounds to 0. The thesis' listing has K for K - 1 and the opposite sign, which sharpens what the paper levels; for
    its two classes both are 0."""
    logits = logits.float()
    is_target = F.one_hot(targets, logits.shape[1]).bool()
    log_q = F.log_softmax(logits.masked_fill(is_target, -torch.inf), dim=1).masked_fill(is_target, 0)
    q = log_q.exp().masked_fill(is_target, 0)
    entropy = -(q * log_q).sum(dim=1).mean()
    return F.cross_entropy(logits, targets) - entropy / (logits.shape[1] - 1)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the cross entropy."""
    return F.cross_entropy(logits.float(), targets)


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the mean binary cross entropy of labels, or of numbers as probabilities (1st of Pawpularity)."""
    losses = F.binary_cross_entropy_with_logits(logits.float(), targets.nan_to_num(), reduction="none")
    return masked_mean(losses, targets)


def squared_error(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the mean squared error of the logits' sigmoid, whose predictions stay in the range of the training
    targets."""
    return masked_mean((logits.float().sigmoid() - targets.nan_to_num()) ** 2, targets)


def masked_mean(losses, targets):
    """Return the mean of the losses whose target isn't NaN."""
    mask = ~targets.isnan()
    return (losses * mask).sum() / mask.sum().clamp_min(1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cce": complement_cross_entropy,
    "ce": cross_entropy,
    "bce": binary_cross_entropy,
    "mse": squared_error,
}
LOSS_TASKS = {"bce": ("labels", "numbers"), "mse": ("numbers",)}  # all other losses are for classes
