"""Augmentations, by --augment: the random transforms of training images.

They take and return uint8 and keep the size. 00_prepare.py has decoded the images; kit/train/model.py normalises them,
on the device.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

import albumentations as A
import cv2

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # or the import asks the network for a newer version


class Augment(NamedTuple):
    """An entry of AUGMENTATIONS."""

    transforms: Callable[[int], list[A.BasicTransform]]  # side in px → the transforms, applied in turn
    tta: str  # the key of inference.TTAS whose views show what training has seen


def flip(side):
    """Return a horizontal flip with probability one half."""
    return [A.HorizontalFlip(p=0.5)]


def d4(side):
    """Return one of the 8 symmetries of a square, each equally often."""
    return [A.D4(p=1)]


def thesis(side):
    """Return horizontal flip, quarter turn and vertical flip, each with probability one half (thesis 3.1.1). A
    turn may be by 0 or 180 degrees: the four views turned by 90 come a third as often as the others."""
    return [A.HorizontalFlip(p=0.5), A.RandomRotate90(p=0.5), A.VerticalFlip(p=0.5)]


def light(side):
    """Return flip, shift, scale, rotation, brightness and contrast (1st of Plant Pathology 2020, reduced)."""
    affine = dict(translate_percent=(-0.1, 0.1), scale=(0.85, 1.15), rotate=(-15, 15), keep_ratio=True)
    affine |= dict(border_mode=cv2.BORDER_REFLECT_101)
    return [A.HorizontalFlip(p=0.5), A.Affine(**affine, p=0.7), A.RandomBrightnessContrast(0.15, 0.15, p=0.5)]


AUGMENTATIONS: dict[str, Augment] = {
    "d4": Augment(d4, tta="d4"),
    "thesis": Augment(thesis, tta="d4"),
    "none": Augment(lambda side: [], tta="none"),
    "flip": Augment(flip, tta="flip"),
    "light": Augment(light, tta="flip"),
}


class Augmentation:
    """The random transform of AUGMENTATIONS[name]: (uint8 [S, S, 3], seed) → the same shape and dtype."""

    def __init__(self, name, side):
        self.transforms = AUGMENTATIONS[name].transforms(side)

    def __call__(self, image, seed):
        # Seeded one by one: A.Compose gives all its transforms the same seed, and then both flips happen or neither
        # (albumentations 2.0.8).
        for k, transform in enumerate(self.transforms):
            transform.set_random_seed(seed + k)
            image = transform(image=image)["image"]
        return image
