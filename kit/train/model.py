"""What network, with which weights and head; how does it predict; which views?"""

import contextlib
import difflib
import io
import logging
import pickle
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from safetensors import SafetensorError
from torch import nn

from common import UserError
from kit.train.device import align

# what torch.load, safetensors and load_state_dict raise for a file that isn't what it should be
WEIGHT_ERRORS = (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, AttributeError, SafetensorError)
THESIS_MEAN = THESIS_STD = (0.5, 0.5, 0.5)  # albumentations.Normalize in the thesis' listing


class Head(NamedTuple):
    """behind: "outputs", the model's own classes; "features", what its classifier would see; or "tokens", a ViT's class
    token beside the mean of its patch tokens. build: a function (inputs, classes) → the module that is put behind."""

    behind: str
    build: callable


HEADS = {
    "linear": Head("outputs", nn.Linear),  # thesis 3.4
    "fresh": Head("features", nn.Linear),
    "tokens": Head("tokens", nn.Linear),  # what DINOv2 and v3 are probed by (arXiv 2304.07193, appendix)
}


class Classifier(nn.Module):
    """uint8 images [B, 3, S, S] → float32 logits [B, K].

    The images are normalised here, on the device: moving bytes costs a quarter of moving floats."""

    def __init__(self, backbone, head, behind, mean, std):
        super().__init__()
        self.backbone, self.head, self.behind = backbone, head, behind
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images):
        return self.head(self.features(images)).float()

    def features(self, images):
        """→ what the head sees: float [B, D]."""
        images = images.contiguous(memory_format=torch.channels_last)  # of turned views too: one compiled form
        images = (images - self.mean) / self.std
        if self.behind != "tokens":
            return self.backbone(images)
        tokens = getattr(self.backbone, "fc_norm", nn.Identity())(self.backbone.forward_features(images))
        prefix = self.backbone.num_prefix_tokens
        mean = tokens[:, prefix:].mean(1)
        return mean if getattr(self.backbone, "cls_token", None) is None else torch.cat([tokens[:, 0], mean], 1)


def build_model(config, num_classes, weights):
    """The Classifier of an experiment (thesis 3.4).

    config: "model" (a timm name), "model_kwargs" (dict), "head" (a key of HEADS), "size" (px), "norm" ("thesis" or
    "model": the mean and std that the weights were trained with), "grad_checkpointing". weights: "hub", "none", the
    path of a .safetensors or .pth file, or a backbone's state_dict. Raises UserError for an unknown model, weights that
    can't be had or don't fit, and a size that the model can't take."""
    head = HEADS[config["head"]]
    backbone = build_backbone(config, weights, {} if head.behind == "outputs" else dict(num_classes=0))
    if config.get("grad_checkpointing"):
        try:
            backbone.set_grad_checkpointing()
        except (AttributeError, AssertionError):  # timm's way of saying that a model hasn't got it
            raise UserError(f"{config['model']} has no gradient checkpointing in timm: leave it out") from None
    align(backbone)
    # its classes or, where it has none, its features
    width = backbone.num_classes or getattr(backbone, "head_hidden_size", None) or backbone.num_features
    if head.behind == "tokens":
        if not hasattr(backbone, "num_prefix_tokens"):
            raise UserError(f"{config['model']} is no ViT, and --head tokens needs tokens: give --head fresh")
        backbone.attn_pool = None  # of SigLIP: it would never get a gradient
        width = backbone.num_features * (1 + (getattr(backbone, "cls_token", None) is not None))
    built = head.build(width, num_classes)
    return Classifier(backbone, built, head.behind, *normalisation(backbone, config["norm"]))


def build_features(name, size, weights):
    """A Classifier without a head, whose output is the features of timm's model `name`: [B, D]."""
    config = dict(model=name, model_kwargs={}, size=size)
    backbone = build_backbone(config, weights, dict(num_classes=0))
    return Classifier(backbone, nn.Identity(), "features", *normalisation(backbone, "model"))


def normalisation(backbone, norm):
    """→ (mean, std) of the three colours, of values from 0 to 1."""
    if norm == "thesis":
        return THESIS_MEAN, THESIS_STD
    data_config = timm.data.resolve_model_data_config(backbone)
    return data_config["mean"], data_config["std"]


def build_backbone(config, weights, kwargs):
    """timm.create_model, its many errors turned into one line each."""
    name = config["model"]
    check_name(name)
    kwargs = config["model_kwargs"] | kwargs
    if timm.get_pretrained_cfg(name, allow_unregistered=True).fixed_input_size:
        kwargs.setdefault("img_size", config["size"])
    of_file = isinstance(weights, (str, Path)) and weights not in ("hub", "none")
    source = dict(file=str(weights)) if of_file else dict(state_dict=weights) if isinstance(weights, dict) else {}
    overlay = dict(pretrained_cfg_overlay=source) if source else {}
    try:
        if of_file and not str(weights).endswith(".safetensors"):
            torch.load(weights, map_location="cpu", weights_only=True)  # timm 1.0.15 would let a pickle run code
        with contextlib.redirect_stdout(io.StringIO()), no_missing_weights() if overlay else contextlib.nullcontext():
            return timm.create_model(name, pretrained=weights != "none", **kwargs, **overlay)
    except (OSError, *WEIGHT_ERRORS) as error:
        reason = " ".join(str(error).split())[:200]
        if overlay:
            weights = weights if of_file else "of an earlier experiment"
            raise UserError(f"--weights {weights} doesn't hold weights of {name} ({reason}): give others") from None
        # huggingface_hub's errors for a file that it can neither find nor fetch are OSErrors, some ValueErrors as well
        if weights == "none" or not (isinstance(error, OSError) or "pretrained" in reason):
            raise
        remedy = "download them where there is a network and pass --weights FILE, or start from scratch: --weights none"
        raise UserError(f"the weights of {name} can't be had from the hub ({reason}): {remedy}") from None
    except (TypeError, AssertionError, ValueError) as error:
        given = " ".join(f"{key}={value}" for key, value in kwargs.items())
        raise UserError(f"{name} can't be built with {given} ({error}): mend --model-kwargs or --size") from None


@contextlib.contextmanager
def no_missing_weights():
    """Raises KeyError where timm loads weights that leave a part of the network random. Without classes it doesn't
    insist on all weights, and only its log names those that are missing."""
    missing, logger = [], logging.getLogger("timm.models._builder")
    handler, level = logging.Handler(), logger.level
    handler.emit = lambda record: missing.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    for message in missing:
        if message.startswith("Missing keys"):
            raise KeyError(message)


def check_name(name):
    """Raises UserError for a name that timm doesn't know, its tag included."""
    known = timm.list_models() + timm.list_pretrained()
    if name not in known:
        near = difflib.get_close_matches(name, known, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them"
        raise UserError(f"--model {name} is no model of timm {timm.__version__}: {hint}")
