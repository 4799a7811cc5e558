"""The model (normalise → timm backbone → head, logits out) and its predictions. Needs torch; 01 and 03 use it."""

import contextlib
import difflib
import io
import os
import pickle

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader

import common
import distributed
from common import RANK, WORLD, UserError
from data import Images

# what torch.load, safetensors and load_state_dict raise for a file that isn't what it should be
WEIGHT_ERRORS = (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, AttributeError, SafetensorError)
THESIS_MEAN = THESIS_STD = (0.5, 0.5, 0.5)  # albumentations.Normalize in the thesis' listing

# ---------------------------------------------------------------- the machine


def pick_device(name, deterministic=False):
    """ "auto" is CUDA where there is a GPU, else the CPU. Raises UserError for a device that isn't there.

    `deterministic` makes a GPU give the same bits each time; a CPU does so anyway.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, before its first use
    torch.use_deterministic_algorithms(deterministic)
    if WORLD > 1:
        name = distributed.own_device(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise UserError(f"--device {name} can't be used here ({str(error).splitlines()[0]}): try auto or cpu") from None
    return device


def pick_amp(name, device):
    """The autocast precision: "auto" is fp16 with a GradScaler on a GPU (thesis 3.3.1), none on the CPU."""
    if name != "auto":
        return name
    return "fp16" if device.type == "cuda" else "none"


def pick_workers(count, device):
    """Worker processes of the DataLoader: where a GPU computes, up to the thesis' 4; on the CPU they'd only compete."""
    if count is not None:
        return count
    return max(0, min(4, common.cpu_count() // common.LOCAL_WORLD - 1)) if device.type == "cuda" else 0


def autocast(device, amp):
    """The context in which the model runs; `amp` is fp16, bf16 or none."""
    if amp == "none":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype={"fp16": torch.float16, "bf16": torch.bfloat16}[amp])


# ---------------------------------------------------------------- the model


class Classifier(nn.Module):
    """uint8 images [B, 3, S, S] → float32 logits [B, K].

    The images are normalised here, on the device: moving bytes costs a quarter of moving floats.
    """

    def __init__(self, backbone, head, mean, std):
        super().__init__()
        self.backbone, self.head = backbone, head
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images):
        return self.head(self.backbone((images - self.mean) / self.std)).float()

    def tuned(self, tune):
        """The part that is trained: the whole model, or the new last layer alone (thesis 3.4: text against listing)."""
        if tune == "all":
            return self
        return self.backbone.get_classifier() if isinstance(self.head, nn.Identity) else self.head


def build_model(config, num_classes):
    """The model of an experiment (thesis 3.4), with the weights that its config names.

    config: "model" (a timm name), "model_kwargs" (dict), "weights" ("hub", "none" or a .safetensors or .pth file),
    "head" ("linear": the model's own outputs kept and a Linear(outputs, num_classes) behind them, as in the thesis;
    "fresh": timm's classifier for num_classes), "size" (px), "norm" ("thesis" or "model").
    Raises UserError for an unknown model, weights that can't be had or don't fit, and a size that the model can't take.
    """
    if not timm.is_model(config["model"]):
        near = difflib.get_close_matches(config["model"], timm.list_models() + timm.list_pretrained(), 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them"
        raise UserError(f"--model {config['model']} is no model of timm {timm.__version__}: {hint}")
    kwargs = dict(config["model_kwargs"])
    if timm.get_pretrained_cfg(config["model"], allow_unregistered=True).fixed_input_size:
        kwargs.setdefault("img_size", config["size"])
    if config["head"] == "fresh":
        kwargs["num_classes"] = num_classes
    if config["weights"] not in ("hub", "none"):
        kwargs["pretrained_cfg_overlay"] = dict(file=config["weights"])
    backbone = create_backbone(config, kwargs)
    if config.get("grad_checkpointing"):
        try:
            backbone.set_grad_checkpointing()
        except (AttributeError, AssertionError):  # timm's way of saying that a model hasn't got it
            raise UserError(f"{config['model']} can't do --grad-checkpointing: leave it out") from None
    data_config = timm.data.resolve_model_data_config(backbone)
    thesis = config["norm"] == "thesis"
    mean, std = (THESIS_MEAN, THESIS_STD) if thesis else (data_config["mean"], data_config["std"])
    outputs = backbone.num_classes or backbone.num_features  # some models come without a classifier
    head = nn.Identity() if config["head"] == "fresh" else nn.Linear(outputs, num_classes)
    return Classifier(backbone, head, mean, std)


def create_backbone(config, kwargs):
    """timm.create_model, its many errors turned into one line each."""
    name, weights = config["model"], config["weights"]
    try:
        if weights not in ("hub", "none") and not weights.endswith(".safetensors"):
            torch.load(weights, map_location="cpu", weights_only=True)  # timm 1.0.15 would let a pickle run code
        with contextlib.redirect_stdout(io.StringIO()):
            return timm.create_model(name, pretrained=weights != "none", **kwargs)
    except OSError as error:  # huggingface_hub's errors for a file that it can neither find nor fetch are OSErrors
        if weights == "hub":
            raise UserError(
                f"the weights of {name} can't be fetched from the hub ({str(error).splitlines()[0]}): download them "
                "where there is a network and pass --weights FILE, or --weights none to start from scratch"
            ) from None
        raise UserError(f"--weights {weights} can't be read ({error})") from None
    except (TypeError, AssertionError, ValueError) as error:
        given = " ".join(f"{key}={value}" for key, value in kwargs.items())
        raise UserError(f"{name} can't be built with {given} ({error}): mend --model-kwargs or --size") from None
    except WEIGHT_ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        if weights == "hub" and "pretrained" in reason:
            raise UserError(f"{name} has no weights on the hub ({reason}): pass --weights FILE or none") from None
        if weights in ("hub", "none"):
            raise
        raise UserError(f"--weights {weights} doesn't hold weights of {name} ({reason}): give another file") from None


def load_fold(path, device):
    """Reads a foldK.pt. → (its dict without the weights, the model in eval mode on `device`)."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        model = build_model({**saved["config"], "weights": "none"}, len(saved["classes"]))
        model.load_state_dict(saved.pop("model"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: train that fold") from None
    except (*WEIGHT_ERRORS, OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} is damaged or not the kit's ({reason}): train that fold again, with --overwrite"
        ) from None
    return saved, model.to(device).eval()


# ---------------------------------------------------------------- prediction


def d4_views(model):
    """A module that gives the mean of `model`'s logits over the 8 orientations of the square (thesis 3.8.1).

    Mirrored or not, upside down or not, turned by 90° or not: each symmetry of the square once. The images must be
    square. ttach's Rotate90 by 180° and 270° would only repeat views.
    """
    import ttach

    views = ttach.Compose([ttach.HorizontalFlip(), ttach.VerticalFlip(), ttach.Rotate90(angles=[0, 90])])
    return ttach.ClassificationTTAWrapper(model, views, merge_mode="mean")


def to_device(images, device):
    """Bytes [B, S, S, 3] of the DataLoader → bytes [B, 3, S, S] on the device (in channels_last order, by the way)."""
    return images.to(device, non_blocking=True).permute(0, 3, 1, 2)


@torch.inference_mode()
def predict(model, images, rows, batch_size, device, amp="none", workers=0, bar=None):
    """Logits of `images[rows]` by a model in eval mode: float32 [len(rows), K], without any random transform.

    The same for validation and for the test set; `model` may be wrapped in d4_views. `bar` names the progress bar. Of
    several processes, each predicts its share of the rows, and all get the whole.
    """
    model.eval()
    mine = rows[RANK::WORLD]
    loader = DataLoader(
        Images(images, mine),
        sampler=[(i, 0) for i in range(len(mine))],
        batch_size=batch_size,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_ctrl_c,
        generator=torch.Generator(),  # or making the loader would move the random stream that dropout draws from
    )
    logits = [torch.empty(0, device=device)]  # of a process without a row
    with common.progress(len(mine), bar) as progress_bar, autocast(device, amp):
        for batch, _ in loader:
            logits.append(model(to_device(batch, device)))
            progress_bar.update(len(batch))
    return distributed.gather_rows(torch.cat(logits).cpu().numpy().astype(np.float32))


def ignore_ctrl_c(worker_id):
    """Of a DataLoader's worker: the main process alone answers Ctrl-C, and ends its workers."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
