"""What is minimised? Each loss takes logits float [B, K] and targets, and gives the mean over the batch, a float32
scalar. Targets are int [B] of classes, float [B, K] of labels (0 or 1) and of numbers (0 to 1 over their range, NaN
where one is missing)."""

import torch
import torch.nn.functional as F


def complement_cross_entropy(logits, targets):
    """Complement cross entropy (Kim, Lee and Jeon 2021, arXiv 2009.02189; thesis 3.6.1).

    Cross entropy minus 1 / (K - 1) times the entropy of the softmax over the *other* classes, which is thereby made
    uniform. With two classes there is one other class, its entropy is 0, and the loss is cross entropy.

    The softmax without the target's logit is the paper's p_j / (1 - p_target), but needs no division by a number that
    rounds to 0. The thesis' listing has K for K - 1 and the opposite sign, which sharpens what the paper levels; for
    its two classes both are 0."""
    logits = logits.float()
    is_target = F.one_hot(targets, logits.shape[1]).bool()
    log_q = F.log_softmax(logits.masked_fill(is_target, -torch.inf), dim=1).masked_fill(is_target, 0)
    q = log_q.exp().masked_fill(is_target, 0)
    entropy = -(q * log_q).sum(dim=1).mean()
    return F.cross_entropy(logits, targets) - entropy / (logits.shape[1] - 1)


def cross_entropy(logits, targets):
    return F.cross_entropy(logits.float(), targets)


def binary_cross_entropy(logits, targets):
    """The mean over labels or numbers. Numbers are learnt as probabilities (1st of PetFinder Pawpularity)."""
    losses = F.binary_cross_entropy_with_logits(logits.float(), targets.nan_to_num(), reduction="none")
    return mean_of_known(losses, targets)


def squared_error(logits, targets):
    """Of what the sigmoid makes of the logits, so that predictions stay in the range of the training targets."""
    return mean_of_known((logits.float().sigmoid() - targets.nan_to_num()) ** 2, targets)


def mean_of_known(losses, targets):
    known = ~targets.isnan()
    return (losses * known).sum() / known.sum().clamp_min(1)


LOSSES = {"cce": complement_cross_entropy, "ce": cross_entropy, "bce": binary_cross_entropy, "mse": squared_error}
OF_TASKS = {"bce": ("labels", "numbers"), "mse": ("numbers",)}  # the others are for classes
