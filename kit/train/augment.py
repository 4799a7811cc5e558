"""What happens to a training image?

Transforms work on bytes and keep the size: decoding is done once, in 00_prepare.py, and normalisation on the device, in
model.py.
"""

import os
from typing import NamedTuple

import albumentations as A
import cv2

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # or the import asks the network for a newer version


class Augment(NamedTuple):
    """transforms: a function (side in px) → the list of albumentations transforms, applied in turn. tta: the key of
    model.TTAS whose views show what training has seen."""

    transforms: callable
    tta: str


def none(side):
    return []


def flip(side):
    """Mirrored or not."""
    return [A.HorizontalFlip(p=0.5)]


def d4(side):
    """Horizontal flip, quarter turn and vertical flip, each with probability one half (thesis 3.1.1)."""
    return [A.HorizontalFlip(p=0.5), A.RandomRotate90(p=0.5), A.VerticalFlip(p=0.5)]


def light(side):
    """What a photographer changes: mirror, place, distance, angle, light (1st of Plant Pathology 2020, reduced)."""
    moved = dict(translate_percent=(-0.1, 0.1), scale=(0.85, 1.15), rotate=(-15, 15), keep_ratio=True)
    moved |= dict(border_mode=cv2.BORDER_REFLECT_101)
    return [A.HorizontalFlip(p=0.5), A.Affine(**moved, p=0.7), A.RandomBrightnessContrast(0.15, 0.15, p=0.5)]


AUGMENTATIONS = {
    "d4": Augment(d4, tta="d4"),
    "none": Augment(none, tta="none"),
    "flip": Augment(flip, tta="flip"),
    "light": Augment(light, tta="flip"),
}


class Augmentation:
    """The random transform of AUGMENTATIONS[name]: (uint8 [S, S, 3], seed) → the same shape and type."""

    def __init__(self, name, side):
        self.transforms = AUGMENTATIONS[name].transforms(side)

    def __call__(self, image, seed):
        # Seeded one by one: A.Compose gives all its transforms the same seed, and then both flips happen or neither
        # (albumentations 2.0.8).
        for k, transform in enumerate(self.transforms):
            transform.set_random_seed(seed + k)
            image = transform(image=image)["image"]
        return image
