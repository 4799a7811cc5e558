"""Small models with weights files, and a competition for them: test_probe.py, test_optim.py, test_recipes.py.

conftest.py imports the fixtures; torch is imported where it is used, since most tests need neither.
"""

import shutil

import numpy as np
import pytest
from conftest import done, load, png, toy_image, write_csv, write_zip

TRAIN = "01_train_fold.py"
PER_CLASS = {2: (32, 16), 3: (24, 16, 8)}  # training images
TESTS = 6
PREPARE = "--folds 2 --groups source".split()  # three steps an epoch in each of two folds
QUICK = "--size 32 --batch-size 8 --epochs 1 --lr 3e-3 --min-lr 3e-4".split()
PROBE = "--tune probe --head fresh".split()
STEP = ("--stop-after", "1s")  # imports took longer, so that each start makes one step


def competition(folder, classes):
    """Write small images of classes of different sizes into `folder`; each source has two images."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    labels = np.repeat(range(classes), PER_CLASS[classes])
    images = [toy_image(rng, label) for label in labels]
    for image in (image for image, label in zip(images, labels, strict=True) if label == 2):
        image[8:16, 8:16] += 90
    labels[12:16], labels[-4:-2] = 1, 0  # some are wrong
    rows = [(f"{i:03}.png", label, f"source {i // 2}") for i, label in enumerate(labels)]
    write_zip(folder / "train.zip", {f"train/{row[0]}": png(image) for row, image in zip(rows, images, strict=True)})
    write_csv(folder / "train.csv", [("image_name", "label", "source"), *rows])
    write_zip(folder / "test.zip", {f"test/t{i}.png": png(toy_image(rng, i % 2)) for i in range(TESTS)})
    write_csv(folder / "sample_submit.csv", [(f"t{i}.png", *[0.5] * (classes if classes > 2 else 1)) for i in range(6)])


@pytest.fixture
def no_pictures(monkeypatch):
    """Draw no augmented.png, which takes longer than the training here."""
    monkeypatch.setattr("kit.report.pictures.draw_classes", lambda *_: None)


@pytest.fixture(scope="session")
def worlds(tmp_path_factory):
    """Return a function: number of classes → the folder of a prepared competition of that many, only read."""
    made = {}

    def world(classes):
        if classes not in made:
            folder = made[classes] = tmp_path_factory.mktemp(f"world{classes}")
            competition(folder / "input", classes)
            done("00_prepare.py", "--input", folder / "input", "--output", folder / "output", "--size", 32, *PREPARE)
        return made[classes]

    return world


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Write weights files of two small models, as if downloaded. → {name: path}."""
    import timm
    import torch

    folder, paths = tmp_path_factory.mktemp("weights"), {}
    for name, kwargs in (("test_resnet", {}), ("test_vit", dict(img_size=32))):
        torch.manual_seed(1)
        paths[name] = folder / f"{name}.pth"
        torch.save(timm.create_model(name, **kwargs).state_dict(), paths[name])
    return paths


@pytest.fixture
def of_classes(worlds, tmp_path):
    """Return a function: number of classes → flags of a copy of that competition."""

    def copied(classes):
        shutil.copytree(worlds(classes) / "output", tmp_path / "output")
        return ["--input", worlds(classes) / "input", "--output", tmp_path / "output"]

    return copied


@pytest.fixture
def resnet(weights):
    return [*QUICK, "--model", "test_resnet", "--weights", weights["test_resnet"]]


@pytest.fixture
def vit(weights):
    return [*QUICK, "--model", "test_vit", "--weights", weights["test_vit"]]


def files(flags, exp, fold=0):
    """Return the bytes of a fold's model and predictions."""
    return [(flags[3] / exp / f"fold{fold}.{ending}").read_bytes() for ending in ("pt", "csv")]


def kept_weights(flags, exp, fold=0):
    """Return the state_dict in foldK.pt."""
    import torch

    return torch.load(flags[3] / exp / f"fold{fold}.pt", weights_only=True)["model"]


def started(flags, *more, fold=0):
    """Return the FoldRun of a fold that is about to be trained."""
    import torch

    from kit.train.run import Experiment, set_up

    train = load(TRAIN)
    args = train.make_parser().parse_args([str(word) for word in (*flags, *more, "--fold", fold)])
    machine = {name: value for name, value in vars(args).items() if name in Experiment.__dataclass_fields__}
    machine |= dict(fold=args.fold, overwrite=args.overwrite, device=torch.device("cpu"), amp="none")
    config = train.settings(args, args.seed[0])
    return set_up(train.open_experiment(args.output / args.exp, config, train.defaults(), **machine), fold)


def features_path(flags, model="test_resnet"):
    """Return the path of the model's newest features."""
    return max((flags[3] / "prepared").glob(f"features_{model}_32_*.npy"), key=lambda path: path.stat().st_mtime_ns)
