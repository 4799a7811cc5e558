"""What happens to a training image?

Transforms work on bytes and keep the size: decoding is done once, in 00_prepare.py, and normalisation on the device, in
model.py, where mixing two images happens as well.
"""

import os
import random
from functools import partial
from typing import NamedTuple

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # or the import asks the network for a newer version
import albumentations as A
import cv2
import numpy as np
from PIL import Image
from timm.data import Mixup
from timm.data.auto_augment import rand_augment_transform
from timm.data.mixup import mixup_target


class Augment(NamedTuple):
    """transforms: a function (side in px) → the list of albumentations transforms, applied in turn. tta: the key of
    model.TTAS whose views show what training has seen."""

    transforms: callable
    tta: str


class RandAugment:
    """timm's RandAugment (Cubuk et al. 2019, arXiv 1909.13719) at EVA-02's settings, as an albumentations transform."""

    def __init__(self, side):
        limits = dict(translate_const=int(0.45 * side), magnitude_max=9.99)  # at 10, Posterize would keep no bit
        self.transform = rand_augment_transform("rand-m9-mstd0.5-inc1", limits)

    def set_random_seed(self, seed):
        self.seed = seed % 2**32

    def __call__(self, image):
        states = random.getstate(), np.random.get_state()  # timm draws from the global generators
        random.seed(self.seed)
        np.random.seed(self.seed)
        image = np.asarray(self.transform(Image.fromarray(image)))
        random.setstate(states[0])
        np.random.set_state(states[1])
        return dict(image=image)


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


def degrade(side):
    """What the thesis' contest did to its photos: turned, cropped, reduced, blurred, saved again."""
    crop = A.RandomResizedCrop((side, side), scale=(0.5, 1), ratio=(0.8, 1.25), interpolation=cv2.INTER_AREA, p=0.7)
    small = A.Downscale((0.3, 0.9), dict(downscale=cv2.INTER_AREA, upscale=cv2.INTER_LINEAR), p=0.3)
    worse = [small, A.GaussianBlur((3, 7), p=0.3), A.ImageCompression("jpeg", (40, 95), p=0.3)]
    return [*d4(side), crop, *worse, A.RandomBrightnessContrast(0.15, 0.15, p=0.5)]


def strong(side):
    """Crop, mirror and RandAugment, as most networks were pretrained."""
    crop = A.RandomResizedCrop((side, side), scale=(0.35, 1), interpolation=cv2.INTER_AREA)
    return [crop, A.HorizontalFlip(p=0.5), RandAugment(side)]


AUGMENTATIONS = {
    "d4": Augment(d4, tta="d4"),
    "none": Augment(none, tta="none"),
    "flip": Augment(flip, tta="flip"),
    "light": Augment(light, tta="flip"),
    "degrade": Augment(degrade, tta="d4"),
    "strong": Augment(strong, tta="flip"),
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


def batch_mixing(config, classes):
    """→ a function (images uint8 [B, 3, S, S], targets int [B]) → (images, what the loss gets as targets), by config's
    mixup (Zhang et al. 2018, arXiv 1710.09412), cutmix (Yun et al. 2019, arXiv 1905.04899) and label_smoothing."""
    smoothing = config["label_smoothing"]
    if config["mixup"] or config["cutmix"]:
        mix = Mixup(config["mixup"], config["cutmix"], label_smoothing=smoothing, num_classes=classes)
        return lambda images, targets: mix(images.float(), targets)
    if smoothing:
        soft = partial(mixup_target, num_classes=classes, smoothing=smoothing)
        return lambda images, targets: (images, soft(targets))
    return lambda images, targets: (images, targets)
