"""Grad-CAM overlays (Selvaraju et al. 2017, arXiv 1610.02391) by the library grad-cam, only for --overlays."""

import math

from common import UserError

import numpy as np
import torch

from kit.report import gallery
from kit.report.html import training_images
from kit.train.checkpoint import load_fold
from kit.train.device import enough_memory, pick_device
from kit.train.inference import to_device

try:
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.image import show_cam_on_image
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
except Exception as error:  # an installation that is broken may raise anything
    raise UserError(f"--overlays needs grad-cam ({error}): pip install grad-cam") from None


def overlay_worst(oof):
    """Return {row of oof.folds: (the image under its heat, uint8 [S, S, 3] RGB; what the heat is for)} for the worst
    mistakes, each by the fold's network that hasn't seen the image."""
    worst, outputs = gallery.worst_mistakes(oof), oof.task.worst_output(oof.targets, oof.predictions)
    images, image_rows = training_images(oof, oof.config["size"])
    device, overlays = pick_device("auto"), {}
    for fold in np.unique(oof.folds.fold[worst]):
        _, model = load_fold(oof.folder / f"fold{fold}.pt", device)
        rows = worst[oof.folds.fold[worst] == fold]
        shown = images[image_rows[rows]]
        with enough_memory("run 02 without --overlays"):
            masks = heat(model, shown, outputs[rows], oof.config["model"])
        for row, image, mask in zip(rows, shown, masks, strict=True):
            overlay = show_cam_on_image(image / 255, mask, use_rgb=True)
            overlays[row] = overlay, f"heat for {oof.task.names[outputs[row]]}"
    return overlays


def heat(model, images, outputs, name):
    """Return Grad-CAM's masks float32 [n, S, S], from 0 to 1, for images uint8 [n, S, S, 3] RGB. model: a Classifier in
    eval mode; outputs: the one that each mask is for, int [n]; name: the model's, for an error."""
    masks, device = [], next(model.parameters()).device
    batches = to_device(torch.from_numpy(np.array(images)), device).split(1)
    module, transform = last_map(model, batches[0], name)
    with GradCAM(model=model, target_layers=[module], reshape_transform=transform) as cam:
        for batch, output in zip(batches, outputs, strict=True):  # one by one: a batch of a large network costs memory
            masks.append(cam(input_tensor=batch, targets=[ClassifierOutputTarget(int(output))])[0])
    return np.stack(masks)


def last_map(model, images, name):
    """Return (the module whose output Grad-CAM weighs, a function that makes it [B, C, H, W], or None where it is so).

    For a ViT, it is what the attention of the last block sees: behind it only the class token may still lead to the
    logits, and the patches' gradient would be zero. For others, it is the last output with a height and a width."""
    backbone = model.backbone
    if hasattr(backbone, "num_prefix_tokens") and hasattr(backbone.blocks[-1], "norm1"):
        return backbone.blocks[-1].norm1, lambda tokens: grid(tokens, backbone.num_prefix_tokens)
    maps, width = [], getattr(backbone, "num_features", None)

    def note(module, _, output):
        if torch.is_tensor(output) and output.ndim == 4 and output.shape[2] > 1:
            last = output.shape[1] == output.shape[2] and output.shape[3] == width  # Swin's channels come last
            maps.append((module, (lambda output: output.permute(0, 3, 1, 2)) if last else None))

    hooks = [module.register_forward_hook(note) for module in backbone.modules()]
    with torch.inference_mode():
        model(images)
    for hook in hooks:
        hook.remove()
    if not maps:
        raise UserError(f"--overlays: {name} has no map of the image that Grad-CAM could weigh: leave it out")
    return maps[-1]


def grid(tokens, prefix):
    """Return tokens [B, prefix + side², C], or without the prefix, which CaiT adds later, as [B, C, side, side]."""
    side = math.isqrt(tokens.shape[1] - prefix)
    if side**2 + prefix != tokens.shape[1]:
        side = math.isqrt(tokens.shape[1])
    return tokens[:, -(side**2) :].unflatten(1, (side, side)).permute(0, 3, 1, 2)
