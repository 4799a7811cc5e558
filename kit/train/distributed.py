"""DDP (torchrun): several processes that train one fold, or predict one test set, together.

DistributedDataParallel (Li et al. 2020, arXiv 2006.15704) averages the gradients, over NCCL between GPUs and Gloo
between CPUs. Without torchrun there is one process, for which these functions return what they were given.
"""

import contextlib

import common
from common import LOCAL_RANK, LOCAL_WORLD, RANK, WORLD, UserError, warn

import numpy as np
import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import nn


@contextlib.contextmanager
def process_group(device):
    """Join the process group of the job for the block. Where one process dies, the others raise UserError."""
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


def process_device(name):
    """Return the name of this process's device: on GPUs each has its own. Raises UserError where there are fewer."""
    if not torch.cuda.is_available() or name == "cpu":
        return "cpu" if name == "auto" else name
    if name not in ("auto", "cuda"):
        raise UserError(f"--device {name}: under torchrun each process takes a GPU of its own: leave --device out")
    count = torch.cuda.device_count()
    if count < LOCAL_WORLD:  # each process raises it, not only those without a GPU
        raise UserError(f"torchrun started {LOCAL_WORLD} processes for {count} GPUs here: lower --nproc-per-node")
    return f"cuda:{LOCAL_RANK}"


def all_gather(part):
    """Return the parts of all processes, in a list by rank. A part can be pickled, and its tensors are on the CPU."""
    parts = [part] * WORLD
    if WORLD > 1:
        dist.all_gather_object(parts, part)
    return parts


def gather_rows(rows):
    """Gather an array of which the process of rank r has the rows r, r + WORLD, … → all rows, in each process."""
    parts = all_gather(rows)
    all_rows = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
    for rank, part in enumerate(parts):
        if len(part):
            all_rows[rank::WORLD] = part
    return all_rows


def broadcast(number):
    """Return the integer of the first process, which alone decides what depends on a clock or a file. All processes
    wait here for each other, but not for their GPUs."""
    if WORLD == 1:
        return number
    numbers = torch.tensor([int(number)])
    dist.broadcast(numbers, 0)
    return numbers.item()


def wrap(classifier, device):
    """Return the module to train: under torchrun DistributedDataParallel around it, on GPUs with SyncBatchNorm."""
    if WORLD == 1:
        return classifier
    if device.type == "cuda":
        classifier.backbone = convert_sync_batchnorm(classifier.backbone)
    elif any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in classifier.modules()):
        warn("batch norm on CPUs sees only each process's share of a batch: the result differs from one process's")
    return nn.parallel.DistributedDataParallel(classifier)


def syncing(model, sync_gradients):
    """Return the context of a backward pass. The last one before an optimizer step must exchange gradients."""
    return contextlib.nullcontext() if sync_gradients or WORLD == 1 else model.no_sync()
