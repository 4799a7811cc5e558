"""What happens to a training image?

Transforms work on bytes and keep the size: resizing is done once, in 00_prepare.py, and normalisation on the device, in
model.py.
"""

import os
from typing import NamedTuple

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # or the import asks the network for a newer version
import albumentations as A


class Augment(NamedTuple):
    """transforms: a function → the list of albumentations transforms, applied in turn. tta: the key of model.TTAS whose
    views show what training has seen."""

    transforms: callable
    tta: str


def d4():
    """Horizontal flip, quarter turn and vertical flip, each with probability one half (thesis 3.1.1)."""
    return [A.HorizontalFlip(p=0.5), A.RandomRotate90(p=0.5), A.VerticalFlip(p=0.5)]


AUGMENTATIONS = {"d4": Augment(d4, tta="d4"), "none": Augment(list, tta="none")}


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
