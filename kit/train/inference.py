"""What network, with which weights and head; how does it predict; which views?"""

import torch
import ttach
from torch.utils.data import DataLoader

from common import RANK, WORLD, progress
from kit.train import distributed
from kit.train.dataset import Images
from kit.train.device import autocast, ignore_ctrl_c

PREDICT_BATCH = 32  # images a batch where nothing is learnt (listing)


def d4(model):
    """The mean of `model`'s logits over the 8 orientations of the square (thesis 3.8.1); the images must be square.

    Mirrored or not, upside down or not, turned by 90° or not: each symmetry of the square once. ttach's Rotate90 by
    180° and 270° would only repeat views."""
    views = ttach.Compose([ttach.HorizontalFlip(), ttach.VerticalFlip(), ttach.Rotate90(angles=[0, 90])])
    return ttach.ClassificationTTAWrapper(model, views, merge_mode="mean")


def flip(model):
    """The mean of `model`'s logits over the image and its mirror image."""
    return ttach.ClassificationTTAWrapper(model, ttach.Compose([ttach.HorizontalFlip()]), merge_mode="mean")


# Each takes a model and gives one that averages its logits over views.
TTAS = {"d4": d4, "flip": flip, "none": lambda model: model}


def to_device(images, device):
    """Bytes [B, S, S, 3] of a DataLoader → bytes [B, 3, S, S] on the device, which are thereby channels_last."""
    return images.to(device, non_blocking=True).permute(0, 3, 1, 2)


@torch.inference_mode()
def predict(model, images, rows, batch_size, device, amp="none", workers=0, bar=None):
    """Logits of `images[rows]` by a model in eval mode: float32 [len(rows), K], without any random transform.

    The same for validation and for the test set; `model` may be one of TTAS. `bar` names the progress bar. Under
    torchrun each process predicts its share of the rows, and all get the whole."""
    model.eval()
    share = rows[RANK::WORLD]
    loader = DataLoader(
        Images(images, share), sampler=[(i, 0) for i in range(len(share))], batch_size=batch_size, num_workers=workers,
        pin_memory=device.type == "cuda", worker_init_fn=ignore_ctrl_c,
        generator=torch.Generator(),  # or making the loader would move the random stream that dropout draws from
    )  # fmt: skip
    logits, done = torch.empty(0, device=device), 0  # empty in a process without a row
    with progress(len(share), bar) as progress_bar, autocast(device, amp):
        for batch, _ in loader:
            count = len(batch)
            if device.type == "cuda" and count < batch_size:  # another shape would be compiled anew
                batch = torch.nn.functional.pad(batch, (0, 0, 0, 0, 0, 0, 0, batch_size - count))
            part = model(to_device(batch, device))[:count]
            if done == 0:
                logits = part.new_empty(len(share), *part.shape[1:])
            logits[done : done + count] = part
            done += count
            progress_bar.update(count)
    return distributed.gather_rows(logits.cpu().float().numpy())
