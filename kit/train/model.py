"""Model: a timm backbone, its weights, and a classification head."""

import contextlib
import difflib
import functools
import io
import logging
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from common import UserError, warn

import timm
import torch
from safetensors import SafetensorError
from timm.models import get_deprecated_models
from torch import nn
from torch.overrides import TorchFunctionMode

from kit.train.device import align

# what torch.load, safetensors and load_state_dict raise for a damaged or unsuitable file
WEIGHT_ERRORS = (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, AttributeError, SafetensorError)
# and what timm and PyTorch raise for arguments and images that don't suit a model
MODEL_ERRORS = (RuntimeError, TypeError, ValueError, AssertionError, LookupError, AttributeError, ArithmeticError)
THESIS_MODEL = "eva02_large_patch14_448.mim_m38m_ft_in22k_in1k"  # thesis 3.4
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
    Head; mean, std: of the three channels, for values from 0 to 1. log_prior, float32 [K]: added to the logits in eval
    mode, where the sampler drew the classes in other shares than the training images have."""

    def __init__(self, backbone, head, head_input, mean, std, classes):
        super().__init__()
        self.backbone, self.head, self.head_input = backbone, head, head_input
        # convolutions are faster in channels_last, except the one that makes a transformer's tokens
        is_transformer = isinstance(getattr(backbone, "patch_embed", None), timm.layers.PatchEmbed)
        self.memory_format = torch.contiguous_format if is_transformer else torch.channels_last
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1))
        self.register_buffer("log_prior", torch.zeros(classes))

    def forward(self, images):
        features = self.features(images)
        device = "cuda" if features.is_cuda else "cpu"
        with torch.autocast(device, enabled=False):  # bf16 would round logits to 8 bits, and make scores equal
            logits = self.head(features)
        return logits if self.training else logits + self.log_prior

    def features(self, images):
        """Return the head's input: float32 [B, D]."""
        # Contiguous, or torch.compile would compile a second version for rotated views, and a CPU would compute on rows
        # of three numbers, the channels, which its vector units are too wide for.
        images = (images.contiguous() - self.mean) / self.std
        images = images.contiguous(memory_format=self.memory_format)
        if self.head_input != "tokens":
            return self.backbone(images).float()
        tokens = getattr(self.backbone, "fc_norm", nn.Identity())(self.backbone.forward_features(images)).float()
        prefix = self.backbone.num_prefix_tokens
        mean = tokens[:, prefix:].mean(1)
        return mean if getattr(self.backbone, "cls_token", None) is None else torch.cat([tokens[:, 0], mean], 1)


def build_model(config, num_classes, weights):
    """Return the Classifier of an experiment (thesis 3.4).

    config: its settings, of which "norm" is "thesis" or "model": the mean and std that the weights were trained with.
    weights: "hub", "none" (drawn at random), the path of a .safetensors or .pth file, a backbone's state_dict, or None:
    left to a load_state_dict that follows. Raises UserError for an unknown model, weights that can't be loaded or don't
    fit, and an image size that the model doesn't take."""
    head = HEADS[config["head"]]
    backbone = build_backbone(config, weights, {} if head.input == "outputs" else dict(num_classes=0))
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
    return Classifier(backbone, head.build(width, num_classes), head.input, mean, std, num_classes)


def checkpoint_activations(backbone, name):
    """Let the backbone compute its activations twice, which saves memory. Raises UserError where timm's model `name`
    can't."""
    try:
        backbone.set_grad_checkpointing()
    except (AttributeError, AssertionError):  # timm raises either for a model without it
        raise UserError(f"{name} has no --grad-checkpointing in timm: leave it out") from None


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
    pretrained = weights not in ("none", None)

    def create():
        with contextlib.redirect_stdout(io.StringIO()), no_missing_weights() if overlay else contextlib.nullcontext():
            return timm.create_model(name, pretrained=pretrained, **kwargs, **overlay)

    try:
        if is_file and not str(weights).endswith(".safetensors"):
            torch.load(weights, map_location="cpu", weights_only=True)  # timm 1.0.15 would let a pickle run code
        if pretrained or weights is None:
            with Undrawn():
                backbone = create()
            if weights is None or not has_nan(backbone):
                return backbone
        return create()  # also what the weights lack is drawn
    except (OSError, *WEIGHT_ERRORS, *MODEL_ERRORS) as error:
        reason = " ".join(str(error).split())[:200]
        if overlay and isinstance(error, (OSError, *WEIGHT_ERRORS)):
            weights = weights if is_file else "of an earlier experiment"
            raise UserError(f"--weights {weights} doesn't hold weights of {name} ({reason}): give others") from None
        # huggingface_hub raises OSErrors, some of them ValueErrors too, for a file that it can neither find nor fetch
        if pretrained and (isinstance(error, OSError) or "pretrained" in reason):
            remedy = "download them elsewhere and pass --weights FILE, or start from scratch: --weights none"
            raise UserError(f"the weights of {name} can't be loaded from the hub ({reason}): {remedy}") from None
        given = " ".join(f"{key}={value}" for key, value in kwargs.items())
        raise UserError(f"{name} can't be built with {given} ({reason}): change --model-kwargs or --size") from None


def check_size(classifier, config):
    """Raise UserError where the network can't take images of the experiment's size, by trying one."""
    name, size = config["model"], config["size"]
    image = torch.zeros((1, 3, size, size), dtype=torch.uint8, device=classifier.mean.device)
    try:
        with torch.no_grad():
            logits = classifier.eval()(image)
        if logits.shape != (1, len(classifier.log_prior)):
            raise ValueError(f"logits of shape {[*logits.shape]}")
    except torch.cuda.OutOfMemoryError:
        raise
    except MODEL_ERRORS as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        remedy = "give 00 and 01 another --size, another --model, or see --model-kwargs"
        raise UserError(f"{name} can't compute an RGB image of {size} px ({reason}): {remedy}") from None


class Undrawn(TorchFunctionMode):
    """Context in which a network's initial weights are NaN: drawing them takes ViT-L seconds, and others follow."""

    def __torch_function__(self, func, types, given=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name not in ("uniform_", "normal_", "kaiming_uniform_", "erfinv_", "mul_", "div_", "add_", "clamp_"):
            return func(*given, **kwargs)
        tensor = given[0] if given else kwargs["tensor"]
        with torch.no_grad():
            if name in ("uniform_", "normal_", "kaiming_uniform_"):
                return tensor.fill_(math.nan)
            drawn = tensor.numel() and tensor.is_floating_point() and tensor[(0,) * tensor.dim()].isnan()
        return tensor if drawn else func(*given, **kwargs)  # arithmetic leaves a NaN what it is


def has_nan(module):
    """Return whether a weight or buffer is NaN."""
    tensors = (*module.parameters(), *module.buffers())
    return any(bool(tensor.sum().isnan()) for tensor in tensors if tensor.is_floating_point())


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


@functools.cache  # says it once
def current_name(name):
    """Return the name that timm now has for a model; warn where it has changed."""
    architecture, _, tag = name.partition(".")
    current = get_deprecated_models().get(architecture)
    if current is None:
        return name
    current = f"{current.partition('.')[0]}.{tag}" if tag else current
    warn(f"--model {name} is called {current} in timm now")
    return current


def check_name(name, flag="--model"):
    """Raise UserError for a model's name, or its tag, that timm doesn't know."""
    names = timm.list_models() + timm.list_pretrained()
    if name not in names:
        similar = difflib.get_close_matches(name, names, 3)
        hint = f"did you mean {' or '.join(similar)}?" if similar else "timm.list_models() lists them"
        raise UserError(f"{flag} {name} is no model of timm {timm.__version__}: {hint}")
