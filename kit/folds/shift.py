"""Adversarial validation on image statistics: whether the test set differs from the training set.

If a classifier can't tell test images from training images by size, light, sharpness, colours and a thumbnail, the CV
may hold for the test set; if it can, the CV and the leaderboard measure different things.
"""

import cv2
import numpy as np
from scipy.stats import rankdata
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from kit.data.decode import resize

COLOUR_BINS, THUMB = 8, 6  # for each channel; px, the thumbnail's side
STATISTICS = 6 + 3 * COLOUR_BINS + THUMB * THUMB
LEAST = 20  # groups on either side; fewer prove nothing
FOLDS, PERMUTATIONS = 5, 50  # of the classifier; of train and test among the groups, for the range by chance
MOST_IMAGES = 4000  # more don't change the answer, only the time


def statistics(image, size=None):
    """Return the statistics of an image, uint8 [H, W, 3] RGB → float32 [STATISTICS]: log height, width and aspect, of
    `size` (width, height) where `image` is a smaller copy; brightness, contrast, sharpness (log variance of the
    Laplacian at 256 px); colour histograms; a grey thumbnail."""
    small = resize(image, 256)
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    histograms = [cv2.calcHist([small], [c], None, [COLOUR_BINS], (0, 256)).ravel() / grey.size for c in range(3)]
    thumb = resize(resize(grey, 64), THUMB).ravel() / 255  # in two steps, of which the first is quick: 256 is 4 × 64
    sharpness = cv2.meanStdDev(cv2.Laplacian(grey, cv2.CV_16S))[1].item() ** 2
    width, height = size or image.shape[1::-1]
    shape = np.log([height, width, width / height])
    light = [*np.ravel(cv2.meanStdDev(grey)) / 255, np.log(1 + sharpness)]
    return np.concatenate([shape, light, *histograms, thumb]).astype(np.float32)


def adversarial_validation(features, is_test, groups, seed):
    """Return how well a linear classifier tells test (bool [N]) from train by `features` [N, D], no group (int [N])
    split: dict(auc, low, high), the cross-validated AUC and the middle 95 % of it by chance, when the groups that are
    test are permuted; one on both sides (a leaked image) counts as two. None where a side has fewer than LEAST."""
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(len(features))[:MOST_IMAGES]) if len(features) > MOST_IMAGES else slice(None)
    features, is_test = features[chosen], is_test[chosen]
    groups = np.unique(groups[chosen], return_inverse=True)[1]
    (_, part_is_test), parts = np.unique(np.stack([groups, is_test]), axis=1, return_inverse=True)
    if np.bincount(part_is_test, minlength=2).min() < LEAST:
        return None
    fold = rng.integers(0, FOLDS, groups.max() + 1)[groups]
    chance = [rng.permutation(part_is_test.astype(bool))[parts] for _ in range(PERMUTATIONS)]
    columns = np.stack([is_test, *chance], axis=1)
    # A ridge regression on two values is a linear discriminant, and one fit serves all columns
    scores, model = [], make_pipeline(StandardScaler(), Ridge(alpha=40))
    for k in np.unique(fold):
        held_out, seen = columns[fold == k], fold != k
        outputs = model.fit(features[seen], columns[seen]).predict(features[~seen])
        tests, ranks = held_out.sum(axis=0), (rankdata(outputs, axis=0) * held_out).sum(axis=0)
        pairs = tests * (len(held_out) - tests)  # of a test image and another one
        scores.append((ranks - tests * (tests + 1) / 2) / np.where(pairs > 0, pairs, np.nan))
    score, *chance = np.nanmean(scores, axis=0)
    low, high = np.nanquantile(chance, [0.025, 0.975])
    return dict(auc=float(score), low=float(low), high=float(high))


def shift_lines(shift):
    """Return sentences on what adversarial_validation returned, for the terminal and the report."""
    if shift is None:
        return ["too few images to compare the test set with the training set"]
    if shift["auc"] <= shift["high"]:
        verdict = "size, light, sharpness and colours don't tell the test images from the training images"
    elif shift["auc"] < 0.7:
        verdict = "the test images differ a little from the training images: expect the CV to be a little off"
    else:
        verdict = "the test images look different from the training images: the CV may not hold for the leaderboard"
    return [verdict, "adversarial validation: AUC {auc:.3f}, by chance {low:.3f} to {high:.3f}".format(**shift)]
