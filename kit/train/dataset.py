"""Which images make a batch?"""

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchsampler import ImbalancedDatasetSampler

from common import RANK, WORLD
from kit.train.augment import Augmentation
from kit.train.device import ignore_ctrl_c


class Images:
    """A data set for torch's DataLoader: `images[rows[i]]`, transformed, with its target.

    images: uint8 [N, S, S, 3]; rows: int [n]; targets: int [n] or None. An index is a pair (i, seed). The seed alone
    decides the transform of that draw, so the number of workers, their start and a resume within an epoch can't change
    it."""

    def __init__(self, images, rows, targets=None, transform=None):
        self.images, self.rows, self.transform = images, rows, transform
        self.targets = np.zeros(len(rows), np.int64) if targets is None else targets

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        i, seed = index
        image = self.images[self.rows[i]]
        if self.transform is not None:
            image = self.transform(image, seed)
        return np.array(image), self.targets[i]  # a contiguous copy: flips are views, the memory map is read-only

    def __getstate__(self):
        """A worker that is spawned opens the memory map itself: pickled, it would be copied whole."""
        mapped = isinstance(self.images, np.memmap)
        return vars(self) | ({"images": str(self.images.filename)} if mapped else {})

    def __setstate__(self, state):
        vars(self).update(state)
        if isinstance(self.images, str):
            self.images = np.load(self.images, mmap_mode="r")


def imbalanced(labels):
    """Draws with replacement, each class equally often (thesis 3.2.1)."""
    return list(ImbalancedDatasetSampler(labels, labels=labels.tolist()))


def shuffle(labels):
    """Takes each image once."""
    return torch.randperm(len(labels)).tolist()


SAMPLERS = {"imbalanced": imbalanced, "shuffle": shuffle}


def draw_epoch(labels, config, fold, epoch):
    """The training images of an epoch, in order: a list of (position in the training folds, augmentation seed). It
    depends on the labels, the experiment's seed, the fold and the epoch alone."""
    seeds = np.random.SeedSequence([config["seed"], fold, epoch])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seeds.generate_state(1)[0]))
        order = SAMPLERS[config["sampler"]](labels)
    return list(zip(order, seeds.generate_state(len(order) + 1)[1:].tolist(), strict=True))


def training_batches(run, epoch, done=0):
    """A DataLoader over one epoch's draw, without the first `done` batches and the last incomplete one (listing,
    `drop_last`). Under torchrun each process gets its share of every batch.

    run: 01's namespace, of which images, train_rows, targets, config, fold, workers and device are used."""
    targets, size = run.targets[run.train_rows], run.config["batch_size"]
    order = draw_epoch(targets, run.config, run.fold, epoch)
    return DataLoader(
        Images(run.images, run.train_rows, targets, Augmentation(run.config["augment"], run.images.shape[1])),
        batch_sampler=[order[k * size : (k + 1) * size][RANK::WORLD] for k in range(done, len(order) // size)],
        num_workers=run.workers, pin_memory=run.device.type == "cuda", worker_init_fn=ignore_ctrl_c,
        generator=torch.Generator(),  # or making the loader would move the random stream that dropout draws from
    )  # fmt: skip
