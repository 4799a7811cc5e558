"""Where did the network look?

Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391) by the library grad-cam, which is imported only when it is asked for.
"""

import math

import numpy as np
import torch

from common import UserError
from kit.data.prepared import open_images, read_prepared
from kit.report import gallery
from kit.score import tasks
from kit.train.checkpoint import load_fold
from kit.train.device import enough_memory, pick_device
from kit.train.inference import to_device


def library():
    """→ grad-cam's GradCAM, ClassifierOutputTarget and show_cam_on_image. Raises UserError where it is missing."""
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.image import show_cam_on_image
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except Exception as error:  # an installation that is broken may raise anything
        raise UserError(f"--overlays needs grad-cam ({error}): pip install grad-cam") from None
    return GradCAM, ClassifierOutputTarget, show_cam_on_image


def overlay_worst(args, oof):
    """→ {row of oof.folds: (the image with its heat, uint8 [S, S, 3] RGB; what the heat speaks for)} of the worst
    mistakes, each by the fold's network that hasn't seen the image. Raises UserError where grad-cam, a foldK.pt or the
    images at the experiment's size are missing, or the network has no map of the image."""
    rows, outputs = gallery.worst(oof), doubtful(oof)
    _, folds = read_prepared(args)
    images = open_images(args, oof.prepared, "train", oof.config["size"], len(folds))
    places = np.flatnonzero(folds.fold.isin(oof.present))
    device, overlays = pick_device("auto"), {}
    for fold in np.unique(oof.folds.fold[rows]):
        saved, model = load_fold(oof.folder / f"fold{fold}.pt", device)
        if saved["config"].get("grad_checkpointing"):
            model.backbone.set_grad_checkpointing(False)  # it would hide the activations from grad-cam
        own = [int(row) for row in rows if oof.folds.fold[row] == fold]
        with enough_memory("run 02 without --overlays"):
            shown = overlay(model, images[places[own]], outputs[own], oof.config["model"])
        names = [f"heat for {oof.prepared['classes'][c]}" for c in outputs[own]]
        overlays |= dict(zip(own, zip(shown, names, strict=True), strict=True))
    return overlays


def doubtful(oof):
    """→ the output of each image that its heat is to speak for, int [N]: the predicted class; of labels or numbers, the
    one that is most wrong."""
    if tasks.task_of(oof.prepared) == "classes":
        return oof.probabilities.argmax(axis=1)
    unit = [tasks.to_unit(oof.prepared, part) for part in (oof.targets, oof.probabilities)]
    return np.nan_to_num(np.abs(unit[0] - unit[1])).argmax(axis=1)


def overlay(model, images, outputs, name):
    """A Classifier in eval mode, images uint8 [n, S, S, 3] RGB and an output of each, int [n] → the images under their
    heat, a list of uint8 [S, S, 3] RGB. name: the model's, for the error where it has no map."""
    _, _, show_cam_on_image = library()
    masks = heat(model, images, outputs, name)
    return [show_cam_on_image(image / 255, mask, use_rgb=True) for image, mask in zip(images, masks, strict=True)]


def heat(model, images, outputs, name):
    """→ Grad-CAM's masks float32 [n, S, S], from 0 to 1; the arguments are those of `overlay`."""
    GradCAM, ClassifierOutputTarget, _ = library()
    device, masks = next(model.parameters()).device, []
    batches = [to_device(torch.from_numpy(np.array(image[None])), device) for image in images]
    module, transform = last_map(model, batches[0], name)
    with GradCAM(model=model, target_layers=[module], reshape_transform=transform) as cam:
        for batch, output in zip(batches, outputs, strict=True):  # one by one: of large networks, a batch costs memory
            masks.append(cam(input_tensor=batch, targets=[ClassifierOutputTarget(int(output))])[0])
    return np.stack(masks)


def last_map(model, images, name):
    """→ (the module whose output Grad-CAM weighs, a function that makes it [B, C, H, W], or None where it is so).

    Of a ViT, what the attention of the last block sees: behind it only the class token may still lead to the logits,
    and the patches' gradient would be zero. Of other networks, the last output that still has height and width. Raises
    UserError where there is none."""
    backbone = model.backbone
    if hasattr(backbone, "num_prefix_tokens") and hasattr(backbone.blocks[-1], "norm1"):
        return backbone.blocks[-1].norm1, lambda tokens: grid(tokens, backbone.num_prefix_tokens)
    seen, width = [], getattr(backbone, "num_features", None)

    def note(module, _, output):
        if torch.is_tensor(output) and output.ndim == 4:
            last = output.shape[1] == output.shape[2] and output.shape[3] == width  # Swin's: the channels stand last
            if output.shape[2] > 1:
                seen.append((module, (lambda output: output.permute(0, 3, 1, 2)) if last else None))

    hooks = [module.register_forward_hook(note) for module in backbone.modules()]
    with torch.inference_mode():
        model(images)
    for hook in hooks:
        hook.remove()
    if not seen:
        raise UserError(f"--overlays: {name} has no map of the image that Grad-CAM could weigh: leave it out")
    return seen[-1]


def grid(tokens, prefix):
    """Tokens [B, prefix + side², C], or without the prefix, which CaiT adds later → [B, C, side, side]."""
    side = math.isqrt(tokens.shape[1] - prefix)
    if side**2 + prefix != tokens.shape[1]:
        side = math.isqrt(tokens.shape[1])
    return tokens[:, -(side**2) :].unflatten(1, (side, side)).permute(0, 3, 1, 2)
