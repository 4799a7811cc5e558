"""Model: a timm backbone, its weights, and a classification head."""

import contextlib
import difflib
import io
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from common import UserError

import timm
import torch
from safetensors import SafetensorError
from torch import nn

from kit.train.device import align

# what torch.load, safetensors and load_state_dict raise for a damaged or unsuitable file
WEIGHT_ERRORS = (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, AttributeError, SafetensorError)
THESIS_MEAN = THESIS_STD = (0.5, 0.5, 0.5)  # albumentations.Normalize in the thesis' listing


class Head(NamedTuple):
    """An entry of HEADS."""

    input: str  # "outputs": the pretrained classes; "features": pooled; "tokens": class token and mean patch token
    build: Callable[[int, int], nn.Module]  # (inputs, classes) → the head


HEADS: dict[str, Head] = {
    "linear": Head("outputs", nn.Linear),  # thesis 3.4
    "fresh": Head("features", nn.Linear),
    "tokens": Head("tokens", nn.Linear),  # as DINOv2 and v3 are probed (arXiv 2304.07193, appendix)
}


class Classifier(nn.Module):
    """Backbone and head: uint8 images [B, 3, S, S] → float32 logits [B, K].

    The images are normalised here, on the device: copying bytes costs a quarter of copying floats. head_input: as in
    Head; mean, std: of the three channels, for values from 0 to 1."""

    def __init__(self, backbone, head, head_input, mean, std):
        super().__init__()
        self.backbone, self.head, self.head_input = backbone, head, head_input
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images):
        return self.head(self.features(images)).float()

    def features(self, images):
        """Return the head's input: float [B, D]."""
        # rotated views too, or torch.compile would compile a second version
        images = images.contiguous(memory_format=torch.channels_last)
        images = (images - self.mean) / self.std
        if self.head_input != "tokens":
            return self.backbone(images)
        tokens = getattr(self.backbone, "fc_norm", nn.Identity())(self.backbone.forward_features(images))
        prefix = self.backbone.num_prefix_tokens
        mean = tokens[:, prefix:].mean(1)
        return mean if getattr(self.backbone, "cls_token", None) is None else torch.cat([tokens[:, 0], mean], 1)


def build_model(config, num_classes, weights):
    """Return the Classifier of an experiment (thesis 3.4).

    config: its settings, of which "norm" is "thesis" or "model": the mean and std that the weights were trained with.
    weights: "hub", "none", the path of a .safetensors or .pth file, or a backbone's state_dict. Raises UserError for an
    unknown model, weights that can't be loaded or don't fit, and an image size that the model doesn't take."""
    head = HEADS[config["head"]]
    backbone = build_backbone(config, weights, {} if head.input == "outputs" else dict(num_classes=0))
    if config.get("grad_checkpointing"):
        try:
            backbone.set_grad_checkpointing()
        except (AttributeError, AssertionError):  # timm raises either for a model without it
            raise UserError(f"{config['model']} has no --grad-checkpointing in timm: leave it out") from None
    align(backbone)
    # the backbone's classes or, where it has none, its features
    width = backbone.num_classes or getattr(backbone, "head_hidden_size", None) or backbone.num_features
    if head.input == "tokens":
        if not hasattr(backbone, "num_prefix_tokens"):
            raise UserError(f"{config['model']} is no ViT, and --head tokens needs tokens: give --head fresh")
        backbone.attn_pool = None  # SigLIP's would never get a gradient
        width = backbone.num_features * (1 + (getattr(backbone, "cls_token", None) is not None))
    data = timm.data.resolve_model_data_config(backbone)
    mean, std = (THESIS_MEAN, THESIS_STD) if config["norm"] == "thesis" else (data["mean"], data["std"])
    return Classifier(backbone, head.build(width, num_classes), head.input, mean, std)


def build_backbone(config, weights, kwargs):
    """Return timm's model with its weights. Raises UserError for timm's many errors."""
    name = config["model"]
    check_name(name)
    kwargs = config["model_kwargs"] | kwargs
    if timm.get_pretrained_cfg(name, allow_unregistered=True).fixed_input_size:
        kwargs.setdefault("img_size", config["size"])
    is_file = isinstance(weights, (str, Path)) and weights not in ("hub", "none")
    source = dict(file=str(weights)) if is_file else dict(state_dict=weights) if isinstance(weights, dict) else {}
    overlay = dict(pretrained_cfg_overlay=source) if source else {}
    try:
        if is_file and not str(weights).endswith(".safetensors"):
            torch.load(weights, map_location="cpu", weights_only=True)  # timm 1.0.15 would let a pickle run code
        with contextlib.redirect_stdout(io.StringIO()), no_missing_weights() if overlay else contextlib.nullcontext():
            return timm.create_model(name, pretrained=weights != "none", **kwargs, **overlay)
    except (OSError, *WEIGHT_ERRORS) as error:
        reason = " ".join(str(error).split())[:200]
        if overlay:
            weights = weights if is_file else "of an earlier experiment"
            raise UserError(f"--weights {weights} doesn't hold weights of {name} ({reason}): give others") from None
        # huggingface_hub raises OSErrors, some of them ValueErrors too, for a file that it can neither find nor fetch
        if weights == "none" or not (isinstance(error, OSError) or "pretrained" in reason):
            raise
        remedy = "download them where there is a network and pass --weights FILE, or start from scratch: --weights none"
        raise UserError(f"the weights of {name} can't be loaded from the hub ({reason}): {remedy}") from None
    except (TypeError, AssertionError, ValueError) as error:
        given = " ".join(f"{key}={value}" for key, value in kwargs.items())
        raise UserError(f"{name} can't be built with {given} ({error}): change --model-kwargs or --size") from None


@contextlib.contextmanager
def no_missing_weights():
    """Raise KeyError where timm's log names missing weights: for a model without classes it is the only sign."""
    logger = logging.getLogger("timm.models._builder")
    level = logger.level

    def refuse(record):
        if record.getMessage().startswith("Missing keys"):
            raise KeyError(record.getMessage())
        return True

    logger.addFilter(refuse)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeFilter(refuse)
        logger.setLevel(level)


def check_name(name, flag="--model"):
    """Raise UserError for a model's name, or its tag, that timm doesn't know."""
    names = timm.list_models() + timm.list_pretrained()
    if name not in names:
        similar = difflib.get_close_matches(name, names, 3)
        hint = f"did you mean {' or '.join(similar)}?" if similar else "timm.list_models() lists them"
        raise UserError(f"{flag} {name} is no model of timm {timm.__version__}: {hint}")
