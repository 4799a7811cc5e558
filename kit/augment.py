"""What happens to a training image?

Transforms work on bytes and keep the size: resizing is done once, in 00_prepare.py, and normalisation on the device, in
model.py.
"""

import os
from typing import NamedTuple

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # or the import asks the network for a newer version
import albumentations as A
import numpy as np

from common import replacing
from kit.images import contact_sheet


class Augment(NamedTuple):
    """transforms: a function → the list of albumentations transforms, applied in turn. tta: the key of model.TTAS whose
    views show what training has seen."""

    transforms: callable
    tta: str


def d4():
    """Horizontal flip, quarter turn and vertical flip, each with probability one half (thesis 3.1.1)."""
    return [A.HorizontalFlip(p=0.5), A.RandomRotate90(p=0.5), A.VerticalFlip(p=0.5)]


AUGMENTATIONS = {
    "d4": Augment(d4, tta="d4"),
    "none": Augment(list, tta="none"),
}


class Augmentation:
    """The random transform of AUGMENTATIONS[name]: (uint8 [H, W, 3], seed) → the same shape and type."""

    def __init__(self, name):
        self.transforms = AUGMENTATIONS[name].transforms()

    def __call__(self, image, seed):
        # Seeded one by one: A.Compose gives all its transforms the same seed, and then both flips happen or neither
        # (albumentations 2.0.8).
        for k, transform in enumerate(self.transforms):
            transform.set_random_seed(seed + k)
            image = transform(image=image)["image"]
        return image


def draw_augmented(path, images, folds, config, columns=6, most=8):
    """Writes a picture of images of each class and, below each, the same after the random transform (thesis figures 3.1
    to 3.3), unless it is there. images: uint8 [N, S, S, 3]; folds: the table folds.csv."""
    if path.exists():
        return
    rng, augment, sheet = np.random.default_rng(config["seed"]), Augmentation(config["augment"]), []
    for label in folds.label.unique()[:most]:
        rows = np.flatnonzero(folds.label == label)
        rows = rng.choice(rows, min(columns, len(rows)), replace=False)
        sheet.append((f"label {label}", [(images[i], folds.image_name[i][-24:]) for i in rows]))
        sheet.append(("augmented", [(augment(images[i], int(i)), "") for i in rows]))
    with replacing(path) as temporary:
        contact_sheet(temporary, sheet, columns)
