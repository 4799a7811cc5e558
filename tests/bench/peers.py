"""What other tools do with the same photos, network and CPU seconds, to stand beside the kit's recipes.

    from peers import PEERS
    probabilities, used = PEERS["fastai"](images, targets, tests, classes, weights, seconds, seed)

images: uint8 [N, S, S, 3], targets: int64 [N], tests: uint8 [M, S, S, 3], weights: a .safetensors of timm's
tf_efficientnet_lite0. → probabilities, float64 [M, classes], by one view of each test image, and the CPU seconds of
the training.

Equal seconds: a few batches, on a copy of the model, give the pace. They don't count. As many whole epochs as then fit
into `seconds` are planned, at least one, and the schedule is stretched or shrunk to them. What counts is training with
its augmentation and, where the tool validates, validation; all in this process, as process_time doesn't see a loader's
workers. The seed decides everything but the number of epochs, which follows the pace.

- fastai: the library itself, 2.8.12. The lock lacks it; `pip install fastai` changes none of the lock's versions.
- timm: timm's parts, and the defaults of train.py, which is in its repository but not in its package.
- AutoGluon: imitated, from the wheel of autogluon.multimodal 1.6.3. That can't be installed beside the kit: it wants
  torch < 2.14, timm < 1.0.7, pandas < 2.4 and Pillow < 13.
"""

import copy
import itertools
import sys
import time

import numpy as np
import timm
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, roc_auc_score
from sklearn.model_selection import train_test_split
from timm.data import create_transform, resolve_model_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

NETWORK = "tf_efficientnet_lite0"
PROBED = 3  # batches that give the pace, after one to warm up


# ---- what they share


class Photos(Dataset):
    """(transformed image, target), from a PIL image as in the tools' own loaders."""

    def __init__(self, images, targets, transform):
        self.images, self.targets, self.transform = images, targets, transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), int(self.targets[i])


def load_model(classes, weights, size):
    """→ (the network with a new last layer, what timm.data.create_transform must know of it: its mean, std, …)."""
    overlay = dict(file=str(weights))
    model = timm.create_model(NETWORK, pretrained=True, num_classes=classes, pretrained_cfg_overlay=overlay)
    return model, resolve_model_data_config(model) | dict(input_size=(3, size, size))


def pace(model, loader, loss):
    """→ CPU seconds to load a batch and to go forward and backward. `model` stays as it is."""
    model, stamps = copy.deepcopy(model).train(), []
    for images, targets in itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), PROBED + 1):
        loss(model(images), targets).backward()
        stamps.append(time.process_time())
    return (stamps[-1] - stamps[0]) / PROBED


def cpu_seconds(function, *args, **kwargs):
    """→ the CPU seconds that the call takes."""
    began = time.process_time()
    function(*args, **kwargs)
    return time.process_time() - began


def train(model, loader, loss, optimizer, plan, epochs, accumulate=1, clip=None, validate=None):
    """plan: a function (number of updates) → the flags of timm's cosine. accumulate: batches an update. clip: the
    largest norm of the gradient. validate: called twice an epoch, as Lightning does with val_check_interval=0.5."""
    flags = plan(epochs * -(-len(loader) // accumulate))
    scheduler, _ = create_scheduler_v2(optimizer, step_on_epochs=False, updates_per_epoch=1, **flags)
    update = 0
    for _ in range(epochs):
        for number, (images, targets) in enumerate(loader, 1):
            model.train()
            (loss(model(images), targets) / accumulate).backward()
            if number % accumulate == 0 or number == len(loader):
                if clip:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
                update += 1
                scheduler.step_update(update)
            if validate and number % max(1, len(loader) // 2) == 0:
                validate()


@torch.inference_mode()
def predict(model, images, transform):
    """→ float64 [N, K]: the probabilities of one view of each image."""
    loader = DataLoader(Photos(images, np.zeros(len(images)), transform), batch_size=32)
    return torch.cat([model.eval()(batch) for batch, _ in loader]).double().softmax(1).numpy()


# ---- fastai


def fastai_learner(fastai, images, targets, classes, weights):
    """vision_learner as it comes: average and maximum pooling, then 512 hidden units with batch norm and dropout;
    aug_transforms(): flip, rotation 10°, zoom 1.1, warp .2, lighting .2; Adam with betas .9 and .99 and eps 1e-5,
    weight decay .01; cross entropy; batches of 64. All images train: fine_tune needs no validation."""
    block = fastai.DataBlock(
        blocks=(fastai.ImageBlock, fastai.CategoryBlock(vocab=list(range(classes)))),
        getters=[fastai.ItemGetter(0), fastai.ItemGetter(1)],
        splitter=lambda items: (list(range(len(items))), []),
        batch_tfms=fastai.aug_transforms(),
    )
    items = list(zip(images, targets.tolist(), strict=True))
    batch = min(64, len(items))  # fastai drops a batch that isn't full
    dls = block.dataloaders(items, bs=batch, num_workers=0, device=torch.device("cpu"))
    return fastai.vision_learner(dls, NETWORK, pretrained_cfg_overlay=dict(file=str(weights)))


def fastai_fine_tune(images, targets, tests, classes, weights, seconds, seed):
    """Learner.fine_tune(epochs), with its defaults (callback/schedule.py): one frozen epoch at up to 2e-3, then the
    epochs that fit beside it, one-cycle, at up to 1e-5 (body) and 1e-3 (head), pct_start .3, div 5."""
    try:
        from fastai.vision import all as fastai
    except ImportError:
        sys.exit("fastai is missing: pip install fastai")
    random_seed(seed)
    learner = fastai_learner(fastai, images, targets, classes, weights)
    batches = learner.dls.train
    learner.freeze()
    frozen = len(batches) * pace(learner.model, batches, learner.loss_func)
    learner.unfreeze()
    unfrozen = len(batches) * pace(learner.model, batches, learner.loss_func)
    epochs = max(1, int((seconds - frozen) / unfrozen))  # fine_tune freezes again
    random_seed(seed)
    with learner.no_bar(), learner.no_logging():
        used = cpu_seconds(learner.fine_tune, epochs)
        probabilities, _ = learner.get_preds(dl=learner.dls.test_dl([(image,) for image in tests], num_workers=0))
    return probabilities.double().numpy(), used


# ---- timm


def timm_plan(updates):
    """Cosine to 0; the warm-up's share is 5 of 300 epochs. By update (--sched-on-updates), since by epoch, which is the
    default, a few epochs would never see a low lr."""
    return dict(num_epochs=updates, warmup_epochs=updates * 5 // 300, warmup_lr=1e-5)


def timm_train(images, targets, tests, classes, weights, seconds, seed):
    """The defaults of huggingface/pytorch-image-models' train.py, with --pretrained, and its last epoch.

    SGD with (Nesterov's) momentum .9, lr .1 per 256 images, weight decay 2e-5; crops of .08 to 1 of the area in a
    random interpolation, flip .5, colour jitter .4; label smoothing .1; batches of 128, one that isn't full is dropped.
    Tests are seen as its validation sees them: the middle 87.5 %, enlarged. All images train."""
    random_seed(seed)
    model, data = load_model(classes, weights, images.shape[1])
    augment = create_transform(**data | dict(interpolation="random"), is_training=True, color_jitter=0.4, hflip=0.5)
    batch = min(128, len(images))
    loader = DataLoader(Photos(images, targets, augment), batch_size=batch, shuffle=True, drop_last=True)
    loss = LabelSmoothingCrossEntropy(0.1)
    epochs = max(1, int(seconds / (len(loader) * pace(model, loader, loss))))
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1 * batch / 256, weight_decay=2e-5, momentum=0.9)
    random_seed(seed)
    used = cpu_seconds(train, model, loader, loss, optimizer, timm_plan, epochs)
    return predict(model, tests, create_transform(**data)), used


# ---- AutoGluon MultiModal


class TrivialAugment(transforms.TrivialAugmentWide):
    """One of 14 operations at a random strength, in AutoGluon's own, weaker ranges (data/trivial_augmenter.py)."""

    def _augmentation_space(self, bins):
        level, nothing = torch.linspace(0, 1, bins), (torch.tensor(0.0), False)
        shift, enhance = ((10 * level).int(), True), (1.7 * level - 0.9, False)  # px; relative to 1
        space = dict.fromkeys(("ShearX", "ShearY"), (0.3 * level, True)) | {"Rotate": ((30 * level).int(), True)}
        space |= dict.fromkeys(("TranslateX", "TranslateY"), shift)
        space |= dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), enhance)
        space |= {
            "Posterize": ((4 - (4 * level).int()).clamp(min=1), False),
            "Solarize": (256 - (256 * level).int(), False),
        }
        return space | dict.fromkeys(("Identity", "AutoContrast", "Equalize"), nothing)


class Soup:
    """The three states with the best scores on held-out images, and what AutoGluon makes of them: a greedy soup."""

    def __init__(self, model, images, targets, transform):
        self.model, self.images, self.targets, self.transform, self.best = model, images, targets, transform, []

    def score(self):
        """AUC of two classes, accuracy of more (utils/problem_types.py)."""
        guesses = predict(self.model, self.images, self.transform)
        auc = guesses.shape[1] == 2
        return roc_auc_score(self.targets, guesses[:, 1]) if auc else accuracy_score(self.targets, guesses.argmax(1))

    def keep(self):
        self.best.append((self.score(), copy.deepcopy(self.model.state_dict())))
        self.best = sorted(self.best, key=lambda scored: -scored[0])[:3]  # of equal scores the earlier is kept

    def pour(self):
        """Loads the mean of the best state and those of the others with which the score doesn't fall."""
        chosen, highest = [], -np.inf
        for _, state in self.best:
            self.load([*chosen, state])
            if (new := self.score()) >= highest:
                chosen, highest = [*chosen, state], new
        self.load(chosen)

    def load(self, states):
        means = {name: torch.stack([state[name].double() for state in states]).mean(0) for name in states[0]}
        self.model.load_state_dict(means)


def autogluon_groups(model):
    """AdamW's groups: lr 1e-4, × .9 for each stage away from the head; weight decay 1e-3, none on norms and biases.
    AutoGluon tells stages by names, and takes each block's bn2 for a part of the head (models/timm_image.py).

    1e-4 is the default, for high quality. Medium quality, with a MobileNet, has 4e-4."""
    groups = []
    for name, parameter in model.named_parameters():
        stage = int(name.split(".")[1]) if name.startswith("blocks") else -1
        away = 0 if any(part in name for part in ("bn2", "conv_head", "classifier")) else 7 - stage
        decay = 1e-3 if parameter.ndim > 1 else 0
        groups.append(dict(params=[parameter], lr=1e-4 * 0.9**away, weight_decay=decay))
    return groups


def autogluon_plan(updates):
    """Warm-up from 0 in 10 % of the updates, then cosine to 0. (AutoGluon itself counts too few updates where an
    epoch's batches aren't a multiple of 16, and its lr then rises again at the end.)"""
    return dict(num_epochs=updates - updates // 10, warmup_epochs=updates // 10, warmup_lr=0, warmup_prefix=True)


def autogluon_settings(images, targets, tests, classes, weights, seconds, seed):
    """The defaults of AutoGluon MultiModal (configs/optim, env and model), in high quality but for the network.

    AdamW with eps 1e-6; an update for 16 batches of 8, so that batch norm sees 8; clip 1.0; TrivialAugment; no label
    smoothing. 20 % of each class, less from 2,500 images on, are held out and scored twice an epoch; Soup. Left out,
    as they only end it sooner: at most 20 epochs, patience 10."""
    random_seed(seed)
    model, data = load_model(classes, weights, images.shape[1])
    plain = create_transform(**data | dict(crop_pct=1.0))
    share = max(0.1, min(0.2, 500 / len(images)))
    fit, held = train_test_split(np.arange(len(images)), test_size=share, stratify=targets, random_state=seed)
    augmented = Photos(images[fit], targets[fit], transforms.Compose([TrivialAugment(), plain]))
    loader, loss = DataLoader(augmented, batch_size=8, shuffle=True), nn.CrossEntropyLoss()
    soup = Soup(model, images[held], targets[held], plain)
    of_score = cpu_seconds(soup.score)
    of_epoch = len(loader) * pace(model, loader, loss) + 2 * of_score
    epochs = max(1, int((seconds - 3 * of_score) / of_epoch))  # the soup is scored up to three times
    optimizer = create_optimizer_v2(autogluon_groups(model), opt="adamw", lr=1e-4, weight_decay=1e-3, eps=1e-6)
    random_seed(seed)
    flags = dict(accumulate=16, clip=1.0, validate=soup.keep)
    used = cpu_seconds(train, model, loader, loss, optimizer, autogluon_plan, epochs, **flags)
    used += cpu_seconds(soup.pour)
    return predict(model, tests, plain), used


PEERS = {"fastai": fastai_fine_tune, "timm": timm_train, "autogluon": autogluon_settings}
