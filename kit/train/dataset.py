"""Dataset, samplers and the dataloader of training."""

from collections.abc import Callable

from common import RANK, WORLD

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchsampler import ImbalancedDatasetSampler

from kit.score.metrics import METRICS
from kit.train.augment import Augmentation
from kit.train.device import ignore_ctrl_c


class ImageDataset:
    """A dataset for torch's DataLoader: `images[rows[i]]`, transformed, with its target.

    images: uint8 [N, S, S, 3]; rows: int [n]; targets: int [n] or None. An index is a pair (i, seed). The seed alone
    decides the transform of that draw; workers and a resume within an epoch can't change it."""

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
        """Replace a memory map by its path, which a spawned worker opens: pickled, all its images would be copied."""
        mapped = isinstance(self.images, np.memmap)
        return vars(self) | ({"images": str(self.images.filename)} if mapped else {})

    def __setstate__(self, state):
        vars(self).update(state)
        if isinstance(self.images, str):
            self.images = np.load(self.images, mmap_mode="r")


def imbalanced(labels):
    """Draw rows with replacement, each class equally often (thesis 3.2.1)."""
    return list(ImbalancedDatasetSampler(labels, labels=labels.tolist()))


# labels int [n] → the rows to draw, in order
SAMPLERS: dict[str, Callable[[np.ndarray], list[int]]] = {
    "imbalanced": imbalanced,
    "shuffle": lambda labels: torch.randperm(len(labels)).tolist(),
    "thesis": imbalanced,
}


def log_prior(config, targets, count):
    """Return what is added to the logits of a model that was trained on equally frequent classes, float32 [count]: the
    logarithm of `count` times each class's share of the targets, int [n] (Menon et al. 2021, arXiv 2007.07314).

    Zeros, unless --sampler imbalanced draws for a metric that doesn't weigh each class the same; --sampler thesis
    leaves the prior out, as the thesis did."""
    if config["sampler"] != "imbalanced" or METRICS[config["metric"]].balanced:
        return torch.zeros(count)
    images = np.maximum(np.bincount(targets, minlength=count), 1)  # a class without training images was never drawn
    return torch.from_numpy(np.log(count * images / images.sum())).float()


def draw_epoch(labels, config, fold, epoch):
    """Draw the training images of an epoch from the labels and seeds alone. → [(row, augmentation seed), …]."""
    seeds = np.random.SeedSequence([config["seed"], fold, epoch])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seeds.generate_state(1)[0]))
        order = SAMPLERS[config["sampler"]](labels)
    return list(zip(order, seeds.generate_state(len(order) + 1)[1:].tolist(), strict=True))


def training_loader(run, epoch, done=0):
    """Return (the DataLoader of an epoch of a FoldRun, without its first `done` batches and a last incomplete one
    (listing, `drop_last`); the targets of each of its batches that aren't NaN, int [batches]). Under torchrun each
    process gets its share of every batch."""
    experiment, config, rows = run.experiment, run.experiment.config, run.train_rows
    images, targets, size = experiment.images, experiment.targets[rows], config["batch_size"]
    order = draw_epoch(targets, config, run.fold, epoch)
    batches = [order[k * size : (k + 1) * size] for k in range(done, len(order) // size)]
    known = [np.isfinite(targets[[row for row, _ in batch]]).sum() for batch in batches]
    loader = DataLoader(
        ImageDataset(images, rows, targets, Augmentation(config["augment"], images.shape[1])),
        batch_sampler=[batch[RANK::WORLD] for batch in batches],
        num_workers=experiment.workers, pin_memory=experiment.device.type == "cuda", worker_init_fn=ignore_ctrl_c,
        generator=torch.Generator(),  # or making the loader would move the random stream that dropout draws from
    )  # fmt: skip
    return loader, known
