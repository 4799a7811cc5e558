"""How do several processes, which torchrun starts, share one fold or one test set?

Gradients are averaged by torch's DistributedDataParallel (Li et al. 2020, arXiv 2006.15704), over NCCL between GPUs and
Gloo between CPUs. Without torchrun there is one process, for which the functions here give back what they got. Several
machines need an --output that all of them see.
"""

import contextlib

import numpy as np
import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import nn

import common
from common import LOCAL_RANK, LOCAL_WORLD, RANK, WORLD, UserError, warn


@contextlib.contextmanager
def together(device):
    """Joins the job's other processes for the block. Where one of them dies, the others raise UserError."""
    if WORLD == 1:
        yield
        return
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        common.joined = True
        yield
    except RuntimeError as error:
        lost = isinstance(error, (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError))
        if not lost and "gloo" not in str(error).lower() and "connection" not in str(error).lower():
            raise
        raise UserError(f"process {RANK} of {WORLD} has lost the others, one of which died: start it again") from None


def own_device(name):
    """The device of this process, where each process has a GPU of its own."""
    if not torch.cuda.is_available() or name == "cpu":
        return "cpu" if name == "auto" else name
    if name not in ("auto", "cuda"):
        raise UserError(f"--device {name}: under torchrun each process takes a GPU of its own: leave --device out")
    count = torch.cuda.device_count()
    if count < LOCAL_WORLD:  # each process says so, not only those that find no GPU
        raise UserError(f"torchrun started {LOCAL_WORLD} processes for {count} GPUs here: lower --nproc-per-node")
    return f"cuda:{LOCAL_RANK}"


def gather(part):
    """→ what each process has, in a list by rank; anything that can be pickled, tensors on the CPU."""
    if WORLD == 1:
        return [part]
    parts = [None] * WORLD
    dist.all_gather_object(parts, part)
    return parts


def gather_rows(rows):
    """Puts together an array of which the process of rank r has the rows r, r + WORLD, … → the whole, everywhere."""
    if WORLD == 1:
        return rows
    parts = gather(rows)
    whole = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
    for rank, part in enumerate(parts):
        if len(part):
            whole[rank::WORLD] = part
    return whole


def from_first(*numbers):
    """→ the whole numbers that the first process has: decisions that depend on a clock or a file are its alone. All
    processes meet here, without waiting for their GPUs."""
    if WORLD > 1:
        numbers = torch.tensor([int(number) for number in numbers])
        dist.broadcast(numbers, 0)
        numbers = numbers.tolist()
    return numbers


def wrap(classifier, device):
    """→ the module to train with: `classifier` itself or, under torchrun, DistributedDataParallel around it. On GPUs
    batch norm takes its statistics over the whole batch; on CPUs, for which torch can't do that, over each process's
    share."""
    if WORLD == 1:
        return classifier
    if device.type == "cuda":
        classifier.backbone = convert_sync_batchnorm(classifier.backbone)
    elif any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in classifier.modules()):
        warn("batch norm on CPUs sees only each process's share of a batch: the result differs from one process's")
    return nn.parallel.DistributedDataParallel(classifier)


def syncing(model, whole):
    """The context of a backward pass: processes exchange gradients only where a step follows (`whole`)."""
    return contextlib.nullcontext() if whole or WORLD == 1 else model.no_sync()
