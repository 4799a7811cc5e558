"""What is kept of a trained fold, and what made it?"""

import hashlib
import os
from pathlib import Path

import pandas as pd
import timm
import torch

from common import conclude, file_hash, replacing, write_csv, write_json
from kit.experiment import write_logits
from kit.metrics import METRICS

OF_TESTS = "task", "ranges", "positive", "per_id", "reading"  # what 03 needs to know of other test images
# What decides how a fold is trained: a change between two folds is worth a warning.
CODE = ["01_train_fold.py", *(f"kit/{part}.py" for part in "augment batches losses model optim probe ranger21".split())]


def makers(weights, earlier=None):
    """→ the hashes of the code and of the weights that train a fold. weights: --weights; earlier: the hash of what
    made the experiment of --init, if any."""
    root, code = Path(__file__).parent.parent, hashlib.sha256()
    for name in CODE:
        code.update((root / name).read_bytes())
    weights = weights if weights in ("hub", "none") else file_hash(Path(weights))
    return dict(code=code.hexdigest(), weights=weights) | (dict(init=earlier) if earlier else {})


def save_fold(run, kept, logits, epochs):
    """Writes foldK.csv, foldK.json and, last, foldK.pt, whose presence says that the fold is finished.

    kept: what 01's train_fold returned; logits: float32 [n, K] of the held-out images by the kept weights, with the
    experiment's views; epochs: the rows of foldK_epochs.csv."""
    config, classes, path = run.config, run.prepared["classes"], run.folder / f"fold{run.fold}.pt"
    chosen = kept[config["keep"]]
    table = run.folds.loc[run.folds.fold == run.fold, ["image_name", "target"]].reset_index(drop=True)
    kinds = dict(best=kept["best"]["logits"], last=kept["last"]["logits"], views=logits)
    about = dict(
        fold=run.fold, epoch=chosen["epoch"], config=config, classes=classes, metric=run.metric,
        submission=run.prepared["submission"],
        # new keys: pickle writes a string that it has met before as a reference, and those of a resume file are others
        scores={key: chosen["scores"][key] for key in ("loss", "accuracy", run.metric) if key in chosen["scores"]},
    )  # fmt: skip
    about |= {key: run.prepared[key] for key in OF_TESTS if key in run.prepared}
    how = dict(device=str(run.device), amp=run.amp, torch=torch.__version__, timm=timm.__version__)
    with replacing(path) as temporary:
        with open(temporary, "wb") as file:
            torch.save(about | dict(model=chosen["weights"]), file)  # a path's name would be part of the archive
            os.fsync(file.fileno())  # a full disk must show before the old model of --overwrite goes
        for old in (path, run.folder / f"fold{run.fold}_test.npy"):
            old.unlink(missing_ok=True)  # predictions never stand beside other weights
        write_logits(run.folder, run.fold, table, kinds, classes)
        write_csv(run.folder / f"fold{run.fold}_epochs.csv", pd.DataFrame(epochs))
        write_json(run.folder / f"fold{run.fold}.json", about | run.makers | dict(run=how))
    run.resume.path.unlink(missing_ok=True)
    score = f"valid {METRICS[run.metric].name} {chosen['scores'][run.metric]:.4f}"
    conclude(f"fold {run.fold} of {run.folder.name}: kept epoch {chosen['epoch']}, {score} → {path}")
