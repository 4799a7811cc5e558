"""Device, AMP precision, compilation, GPU memory."""

import contextlib
import ctypes
import functools
import gc
import importlib.util
import os
import re
import shutil
import signal

from common import GARBAGE, LOCAL_WORLD, WORLD, UserError, cpu_count, number, say

import torch
import torch.nn.functional as F
from timm.layers import SwiGLU
from torch import nn

from kit.train import distributed

PRECISIONS = ("auto", "thesis", "fp16", "bf16", "none")
LEAST_SHARED_MEMORY = 1e9  # bytes of /dev/shm, through which workers pass images; Docker gives 64 MB
COMPILE_SECONDS = 60  # EVA-02-L, block by block, for training and for prediction (docs/LOG.md)
COMPILE_GAIN = 0.25  # share of a step's time that compiling saves, at least: half for EVA-02-L on an H200


def pick_device(name, deterministic=False):
    """Return the torch.device for a name; "auto" is the GPU where there is one. Raises UserError where it isn't there.

    deterministic: whether a GPU returns the same bits each time; a CPU does so anyway."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it, before its first use
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic  # times its kernels once for each shape of a batch
    if WORLD > 1:
        name = distributed.process_device(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # or the first allocation opens a context on GPU 0 as well
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise UserError(f"--device {name} can't be used here ({str(error).splitlines()[0]}): try auto or cpu") from None
    return device


def keep_memory():
    """Let glibc keep the memory of large tensors; by default the system maps and clears its pages in each step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # macOS and musl have none
    if mallopt is not None:
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            mallopt(parameter, value)


def pick_amp(name, device):
    """Return the autocast precision, "fp16", "bf16" or "none", for one of PRECISIONS. auto: bf16 on a GPU that computes
    in it (a T4 only emulates it), fp16 on others, none elsewhere; thesis: fp16 on any GPU (3.3.1), none elsewhere."""
    if name not in ("auto", "thesis"):
        return name
    if device.type != "cuda":
        return "none"
    return "bf16" if name == "auto" and torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def pick_amp_of(run, name, device):
    """Return the autocast precision to predict in, as pick_amp does; auto: the precision of the fold's training, if
    that ran on such a device, and fp16 for bf16 where a GPU only emulates it. run: "run" in foldK.json."""
    same = name == "auto" and run.get("device", "").partition(":")[0] == device.type
    return run["amp"] if same and (device.type, run["amp"]) != ("cuda", "bf16") else pick_amp(name, device)


def pick_workers(count, device):
    """Return --workers or, by default, up to the thesis' 4 beside a GPU, and none on the CPU, where they compete."""
    if count is not None:
        return count
    usual = max(0, min(4, cpu_count() // LOCAL_WORLD - 1)) if device.type == "cuda" else 0
    return min(usual, most_workers()) if usual else 0


@functools.cache  # says it once
def most_workers(folder="/dev/shm"):
    """Return the most workers by default: 0 where the shared memory in `folder` is small, which is printed."""
    if os.path.isdir(folder) and (size := shutil.disk_usage(folder).total) < LEAST_SHARED_MEMORY:
        say(f"{folder} has {size / 1e6:.0f} MB: --workers 0; docker run --shm-size=8g allows workers, which are faster")
        return 0
    return cpu_count()


def autocast(device, amp):
    """Return the context in which the model runs. amp: fp16, bf16 or none; with none a GPU multiplies in TF32."""
    torch.set_float32_matmul_precision("high" if (device.type, amp) == ("cuda", "none") else "highest")
    return torch.autocast(device.type, torch.float16 if amp == "fp16" else torch.bfloat16, enabled=amp != "none")


@contextlib.contextmanager
def enough_memory(remedy):
    """Turn PyTorch's errors about what doesn't suit the machine into UserErrors: a GPU's memory that is full, for which
    `remedy` is named, the workers' shared memory, and torch.compile."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(f"the GPU's memory is full ({str(error).splitlines()[0][:120]}): {remedy}") from None
    except RuntimeError as error:
        if isinstance(error, torch._dynamo.exc.TorchDynamoException):
            why = str(error).splitlines()[0][:120]
            raise UserError(f"torch.compile can't be used here ({why}): give --compile off") from None
        if not re.search("shared memory|unable to write to file </torch", str(error)):
            raise
        why = str(error).splitlines()[-1].removeprefix("RuntimeError: ")[:120]
        raise UserError(f"shared memory is full ({why}): give --workers 0, or docker run --shm-size=8g") from None


def ignore_ctrl_c(worker_id):
    """Prepare a DataLoader's worker (its worker_init_fn): the main process alone answers Ctrl-C, and ends them."""
    gc.set_threshold(*GARBAGE)  # a worker that wasn't forked has imported `common` without calling its `run`
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class AlignedSwiGLU(SwiGLU):
    """timm's SwiGLU, with its hidden units padded with zeros, on a GPU, to a multiple of 64: tensor cores are fast for
    rows of a multiple of 16 bytes. EVA-02-L, with 2730, trained 1.2 times as fast on an H200 (docs/LOG.md)."""

    def forward(self, x):
        return self.padded(x) if x.is_cuda else super().forward(x)

    def padded(self, x):
        """Compute the forward pass of a GPU."""
        units = self.fc2.in_features
        extra = -units % 64
        pad = lambda p: None if p is None else F.pad(p, (0, 0) * (p.dim() - 1) + (0, extra))  # noqa: E731
        gate, value = (F.linear(x, pad(layer.weight), pad(layer.bias)) for layer in (self.fc1_g, self.fc1_x))
        hidden = self.norm(self.drop1(self.act(gate) * value)[..., :units])
        return self.drop2(F.linear(F.pad(hidden, (0, extra)), F.pad(self.fc2.weight, (0, extra)), self.fc2.bias))


def align(backbone):
    """Pad the hidden units of a backbone's SwiGLU layers, in place, where their number is slow on a GPU."""
    for module in backbone.modules():
        if type(module) is SwiGLU and module.fc2.in_features % 8:
            module.__class__ = AlignedSwiGLU


def allow_recompiling():
    """Let torch.compile keep up to 64 versions of a function; after 8, its default, the rest would run uncompiled."""
    torch._dynamo.config.cache_size_limit = 64  # recompile_limit since PyTorch 2.7, which knows this name too


def compiling_repays(seconds, device):
    """Return whether torch.compile would save more of the `seconds` of training to come than it takes. Never on
    a CPU, without Triton, which needs Volta or newer, or where no clock decides: torchrun, --deterministic."""
    possible = device.type == "cuda" and WORLD == 1 and not torch.are_deterministic_algorithms_enabled()
    possible = possible and torch.cuda.get_device_capability(device) >= (7, 0) and importlib.util.find_spec("triton")
    return bool(possible) and COMPILE_GAIN * seconds > COMPILE_SECONDS


def compile_backbone(backbone):
    """Compile a backbone, in place; a ViT block by block, since all but the first reuse the compiled code."""
    allow_recompiling()  # one version for each rate of stochastic depth
    blocks = [*getattr(backbone, "blocks", [])]
    one_class = len({type(block) for block in blocks}) == 1 and not isinstance(blocks[0], nn.Sequential)
    for part in blocks if one_class else [backbone]:
        part.compile()


def add_machine_flags(add, amp_auto, compile_auto):
    """Add the five flags that say where and how a script computes. *_auto: what auto means there."""
    add("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    add("--amp", choices=PRECISIONS, default="auto", help=f"precision: %(choices)s; auto: {amp_auto}")
    add("--compile", nargs="?", const="on", default="auto", choices=("auto", "on", "off"), help="torch.compile, about "
        f"a minute: %(choices)s; auto: {compile_auto}")  # fmt: skip
    add("--workers", type=number(int, 0), help="processes that load images (default: up to 4 beside a GPU, else 0)")
    add("--deterministic", action="store_true", help="on a GPU: the same bits each time, at some cost in speed")
