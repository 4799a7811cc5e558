"""Time and memory of each metric and of its bootstrap samples; macro AUC also with many classes.

    python tests/bench/bootstrap.py                                   # 100,000 images, 1,000 draws; 1,000 classes
    python tests/bench/bootstrap.py --images 20000 --classes 100 --draws 200

Random scores, balanced classes, each image a group of its own. Each row runs in a process of its own; its memory is the
peak resident size, including the predictions and the bootstrap weights.
"""

import argparse
import multiprocessing
import resource
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from common import softmax

from kit.score.intervals import bootstrap_weights, scored
from kit.score.metrics import METRICS


def measure(key, images, classes, draws):
    """Return the seconds of one score, the seconds of a score with all draws, and the peak memory in GiB."""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, classes, images)
    logits = rng.normal(size=(images, classes))
    logits[np.arange(images), targets] += 1
    probabilities, weights = softmax(logits), bootstrap_weights(np.arange(images), draws)
    del logits
    METRICS[key].score(targets[:1000], probabilities[:1000])  # imports scikit-learn, which isn't to be timed
    times = [time.perf_counter()]
    METRICS[key].score(targets, probabilities)
    times.append(time.perf_counter())
    scored(key, targets, probabilities, weights)
    times.append(time.perf_counter())
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return *np.diff(times), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--classes", type=int, default=1000, help="classes in the last row")
    parser.add_argument("--draws", type=int, default=1000, help="bootstrap samples per metric")
    args = parser.parse_args()
    print(f"{args.images} images, {args.draws} draws\nmetric              classes   one score   all draws   peak GiB")
    keys = [key for key, metric in METRICS.items() if metric.task == "classes"]
    for key, classes in [*((key, 2) for key in keys), ("auc", args.classes)]:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            one, both, peak = pool.apply(measure, (key, args.images, classes, args.draws))
        print(f"{key:<18} {classes:>8} {one:>9.2f} s {both - one:>9.1f} s {peak:>10.2f}", flush=True)


if __name__ == "__main__":
    main()
