"""Where does it run, and in which precision?"""

import contextlib
import ctypes
import gc
import os
import signal

import torch
import torch.nn.functional as F
from timm.layers import SwiGLU
from torch import nn

from common import GARBAGE, LOCAL_WORLD, WORLD, UserError, cpu_count, number
from kit.train import distributed

PRECISIONS = ("auto", "native", "fp16", "bf16", "none")


def pick_device(name, deterministic=False):
    """The torch.device of "auto" (CUDA where there is a GPU, else the CPU) or of a device's name.

    `deterministic` makes a GPU give the same bits each time; a CPU does so anyway. Raises UserError for a device that
    isn't there."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, before its first use
    torch.use_deterministic_algorithms(deterministic)
    if WORLD > 1:
        name = distributed.own_device(name)
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
    """Lets glibc reuse the memory of large tensors. By default it gives it back after each, and then the system hands
    out and clears every page anew, in each step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # macOS and musl have none
    if mallopt is not None:
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            mallopt(parameter, value)


def pick_amp(name, device):
    """The autocast precision, "fp16", "bf16" or "none", of one of PRECISIONS.

    auto: fp16 with a GradScaler on a GPU (thesis 3.3.1), none elsewhere. native: bf16 where the GPU computes in it (a
    T4 only emulates it), else as auto."""
    if name not in ("auto", "native"):
        return name
    if device.type != "cuda":
        return "none"
    return "bf16" if name == "native" and torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def pick_amp_of(run, name, device):
    """As pick_amp; auto: what a fold was trained in, on such a device, or fp16 for bf16 on a GPU that only emulates
    that. run: what foldK.json says of its training."""
    if name != "auto" or run.get("device", "").partition(":")[0] != device.type:
        return pick_amp(name, device)
    return pick_amp("native", device) if (device.type, run["amp"]) == ("cuda", "bf16") else run["amp"]


def pick_workers(count, device):
    """Worker processes of a DataLoader: beside a GPU up to the thesis' 4; on the CPU none, they would only compete."""
    if count is not None:
        return count
    return max(0, min(4, cpu_count() // LOCAL_WORLD - 1)) if device.type == "cuda" else 0


def autocast(device, amp):
    """The context in which the model runs; `amp` is fp16, bf16 or none."""
    if amp == "none":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype={"fp16": torch.float16, "bf16": torch.bfloat16}[amp])


@contextlib.contextmanager
def enough_memory(remedy):
    """Turns a GPU's out-of-memory error into a UserError that names the remedy."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise UserError(f"the GPU's memory is full ({str(error).splitlines()[0][:120]}): {remedy}") from None


def ignore_ctrl_c(worker_id):
    """worker_init_fn of a DataLoader: the main process alone answers Ctrl-C, and ends its workers. One that
    wasn't forked has imported `common` without coming to its `run`, which sets the garbage's threshold right."""
    gc.set_threshold(*GARBAGE)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


UNITS = 64  # hidden units of a SwiGLU are filled up to a multiple of this on a GPU


class AlignedSwiGLU(SwiGLU):
    """timm's SwiGLU; on a GPU its hidden units are filled up by zeros, which add nothing.

    Tensor cores read rows of whole 16 bytes at full speed, and EVA-02-L has 2730 hidden units. Filled up, it trained
    1.2 times as fast on an H200 (docs/measured.md)."""

    def forward(self, x):
        return self.filled(x) if x.is_cuda else super().forward(x)

    def filled(self, x):
        units = self.fc2.in_features
        more = -units % UNITS
        gate, value = (F.linear(x, *(fill_rows(p, more) for p in (f.weight, f.bias))) for f in (self.fc1_g, self.fc1_x))
        hidden = self.norm(self.drop1(self.act(gate) * value)[..., :units])
        return self.drop2(F.linear(F.pad(hidden, (0, more)), F.pad(self.fc2.weight, (0, more)), self.fc2.bias))


def fill_rows(parameter, more):
    """A weight or a bias with that many rows of zeros below, or None where there is none."""
    return None if parameter is None else F.pad(parameter, (0, 0) * (parameter.dim() - 1) + (0, more))


def align(backbone):
    """Fills up the hidden units of a backbone, in place, where a GPU would stumble over their number."""
    for module in backbone.modules():
        if type(module) is SwiGLU and module.fc2.in_features % 8:
            module.__class__ = AlignedSwiGLU


def allow_recompiling():
    """Lets torch.compile make up to 64 forms of a function; after 8, its default, the rest would run uncompiled."""
    torch._dynamo.config.cache_size_limit = 64  # recompile_limit since PyTorch 2.7, which knows this name too


def compile_backbone(backbone):
    """Has torch.compile work on a backbone, in place. A ViT's blocks are compiled one by one: they are alike, and all
    but the first find the work done."""
    allow_recompiling()  # once for each rate of stochastic depth
    blocks = [*getattr(backbone, "blocks", [])]
    alike = len({type(block) for block in blocks}) == 1 and not isinstance(blocks[0], nn.Sequential)
    for part in blocks if alike else [backbone]:
        part.compile()


def add_machine_flags(add, amp_auto):
    """Add the five flags that say where and how a script computes. amp_auto: what --amp auto means there."""
    add("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    add("--amp", choices=PRECISIONS, default="auto", help=f"precision: %(choices)s; auto: {amp_auto}")
    add("--compile", action="store_true", help="torch.compile: about a minute at the start, then faster on a GPU")
    add("--workers", type=number(int, 0), help="processes that load images (default: up to 4 beside a GPU, else 0)")
    add("--deterministic", action="store_true", help="on a GPU: the same bits each time, at some cost in speed")
