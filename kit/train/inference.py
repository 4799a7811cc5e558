"""TTA, and the prediction loop (inference)."""

from collections.abc import Callable

from common import RANK, WORLD, progress

import numpy as np
import torch
import ttach
from torch import nn
from torch.utils.data import DataLoader

from kit.train import distributed
from kit.train.dataset import ImageDataset
from kit.train.device import autocast, ignore_ctrl_c, pick_device
from kit.train.model import build_model, check_size

PREDICT_BATCH = 32  # images a batch for validation and the test set (listing)


def averaged(*transforms):
    """Return a function of a model: the same model with its logits averaged over all views of the transforms."""
    return lambda model: ttach.ClassificationTTAWrapper(model, ttach.Compose([*transforms]), merge_mode="mean")


TTAS: dict[str, Callable[[nn.Module], nn.Module]] = {
    # the 8 symmetries of a square, each once (thesis 3.8.1): ttach's rotations by 180° and 270° would repeat views
    "d4": averaged(ttach.HorizontalFlip(), ttach.VerticalFlip(), ttach.Rotate90(angles=[0, 90])),
    "flip": averaged(ttach.HorizontalFlip()),
    "none": lambda model: model,
}


def to_device(images, device):
    """Return a DataLoader's images, uint8 [B, S, S, 3], on the device as uint8 [B, 3, S, S], contiguous: a CPU then
    makes the views of TTA in a third of the time."""
    return images.to(device, non_blocking=True).permute(0, 3, 1, 2).contiguous()


@torch.inference_mode()
def predict(model, images, rows, batch_size, device, amp="none", workers=0, bar=None):
    """Return the logits of `images[rows]` by a model in eval mode: float32 [len(rows), K], without random transforms.

    images: uint8 [N, S, S, 3]; bar: the progress bar's name. Under torchrun each process predicts its share of the
    rows, and all return all rows."""
    model.eval()
    data = ImageDataset(images, rows[RANK::WORLD])
    loader = DataLoader(
        data, sampler=[(i, 0) for i in range(len(data))], batch_size=batch_size, worker_init_fn=ignore_ctrl_c,
        num_workers=workers if isinstance(images, np.memmap) else 0,  # starting them takes longer than copying memory
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # or making the loader would move the random stream that dropout draws from
    )  # fmt: skip
    logits, done = torch.empty(0, device=device), 0  # empty in a process without a row
    with progress(len(data), bar) as progress_bar, autocast(device, amp):
        for batch, _ in loader:
            count = len(batch)
            if device.type == "cuda" and count < batch_size:  # or torch.compile would compile this shape too
                batch = nn.functional.pad(batch, (0, 0, 0, 0, 0, 0, 0, batch_size - count))
            part = model(to_device(batch, device))[:count]
            if done == 0:
                logits = part.new_empty(len(data), *part.shape[1:])
            logits[done : done + count] = part
            done += count
            progress_bar.update(count)
    return distributed.gather_rows(logits.cpu().float().numpy())


def embed(name, size, weights, seed, arrays):
    """Return the features of timm's model `name` for images: float32 [N, D], of unit length.

    arrays: uint8 [n, size, size, 3] each; weights: as in build_model; seed: decides the weights of "none"."""
    from sklearn.preprocessing import normalize  # takes a second to import, which predictions needn't wait for

    torch.manual_seed(seed)
    config = dict(model=name, model_kwargs={}, size=size, head="fresh", norm="model")
    device = pick_device("auto")
    model = build_model(config, 1, weights).to(device)
    check_size(model, config)
    model.head = nn.Identity()
    options = dict(batch_size=PREDICT_BATCH, device=device, bar="features")
    return normalize(np.concatenate([predict(model, array, np.arange(len(array)), **options) for array in arrays]))
