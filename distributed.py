"""Several processes on one job, started by torchrun. Used by 01_train_fold.py, 03_infer.py and what they import.

    torchrun --nproc-per-node 2 01_train_fold.py --fold 2                # one fold on two GPUs
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 01_train_fold.py --fold 2

Gradients are averaged by torch's DistributedDataParallel (Li et al. 2020, arXiv 2006.15704), over NCCL between GPUs and
Gloo between CPUs. A process by itself is a world of one, for which the functions here give back what they got.
Several machines need an --output that all of them see.
"""

import contextlib

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import common
from common import LOCAL_RANK, LOCAL_WORLD, RANK, WORLD, UserError


@contextlib.contextmanager
def together(device):
    """Joins the job's other processes for the block. Where one of them dies, the others raise UserError."""
    if WORLD == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend)
        common.joined = True
        yield
    except RuntimeError as error:
        lost = isinstance(error, (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError))
        if not lost and "gloo" not in str(error).lower() and "connection" not in str(error).lower():
            raise
        raise UserError(
            f"process {RANK} of {WORLD} has lost the others, one of which has died: see the messages above, then start "
            "the same command again; it goes on from the last resume file"
        ) from None
    # no destroy_process_group: with torch 2.6 and Gloo it waits for ever, every other time, for one that has ended


def own_device(name):
    """The device of this process, where each process has a GPU of its own."""
    if not torch.cuda.is_available() or name == "cpu":
        return "cpu" if name == "auto" else name
    if name not in ("auto", "cuda"):
        raise UserError(f"--device {name}: under torchrun each process takes a GPU of its own: leave --device out")
    if torch.cuda.device_count() < LOCAL_WORLD:  # each process says so, not only those that find no GPU
        raise UserError(
            f"torchrun started {LOCAL_WORLD} processes on this machine, which has {torch.cuda.device_count()} GPUs: "
            "lower --nproc-per-node"
        )
    torch.cuda.set_device(LOCAL_RANK)
    return f"cuda:{LOCAL_RANK}"


def gather(mine):
    """→ what each process has, in a list by rank; anything that can be pickled, tensors on the CPU."""
    if WORLD == 1:
        return [mine]
    parts = [None] * WORLD
    dist.all_gather_object(parts, mine)
    return parts


def gather_rows(mine):
    """Puts together an array of which the process of rank r has the rows r, r + WORLD, … → the whole, everywhere."""
    parts = gather(mine)
    whole = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
    for rank, part in enumerate(parts):
        if len(part):
            whole[rank::WORLD] = part
    return whole


def from_first(*numbers):
    """→ the numbers that the first process has: decisions that hang on a clock or a file are its alone. Waits for it,
    but not for the GPU."""
    if WORLD > 1:
        numbers = torch.tensor([int(number) for number in numbers])
        dist.broadcast(numbers, 0)
        numbers = numbers.tolist()
    return numbers


def wrap(classifier, device):
    """→ the module to train with: `classifier` itself, or DistributedDataParallel around it, with the batch statistics
    of BatchNorm taken over the whole batch."""
    if WORLD == 1:
        return classifier
    if device.type == "cuda":
        from timm.layers import convert_sync_batchnorm

        classifier.backbone = convert_sync_batchnorm(classifier.backbone)
    else:  # torch's SyncBatchNorm refuses CPUs
        for module in classifier.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine and module.track_running_stats:
                module.forward = WholeBatchNorm(module, module.forward)
    return nn.parallel.DistributedDataParallel(classifier)


class WholeBatchNorm:
    """The forward of a BatchNorm (or timm's BatchNormAct) `module` on the CPU, whose batch is spread over processes."""

    def __init__(self, module, plain):
        self.module, self.plain = module, plain

    def __call__(self, x):
        bn = self.module
        if not bn.training:
            return self.plain(x)
        over, shape = [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))
        count = _Sum.apply(torch.tensor(float(x.numel() / x.shape[1])))
        mean = _Sum.apply(x.float().sum(over)) / count
        variance = _Sum.apply((x.float() - mean.view(shape)).square().sum(over)) / count
        bn.num_batches_tracked += 1
        momentum = 1 / bn.num_batches_tracked.item() if bn.momentum is None else bn.momentum
        with torch.no_grad():
            bn.running_mean.lerp_(mean, momentum)
            bn.running_var.lerp_(variance * count / (count - 1), momentum)
        x = (x - mean.view(shape)) / (variance + bn.eps).sqrt().view(shape)
        x = x * bn.weight.view(shape) + bn.bias.view(shape)
        return bn.act(bn.drop(x)) if hasattr(bn, "act") else x


class _Sum(torch.autograd.Function):
    """The sum over all processes, for each of them."""

    @staticmethod
    def forward(ctx, mine):
        total = mine.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return _Sum.forward(ctx, gradient.contiguous())
