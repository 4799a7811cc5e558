"""Is the test set like the training set? Adversarial validation on plain image statistics. Used by 00_prepare.py.

A classifier is asked to tell test images from training images by their size, light, sharpness, colours and a thumbnail.
If it can't, a CV on the training images may speak for the test set; if it can, the CV answers another question than
the leaderboard.
"""

import cv2
import numpy as np

from data import auc

COLOUR_BINS = 8
THUMB = 6
STATISTICS = 6 + 3 * COLOUR_BINS + THUMB * THUMB
FOLDS = 5
LEAST = 20  # groups on either side; of fewer, nothing can be said
PERMUTATIONS = 50  # of train and test among the groups, for the range that chance gives
MOST_IMAGES = 4000  # more don't change the answer, only the time


def statistics(image):
    """uint8 [H, W, 3] RGB → float32 [STATISTICS]: log height, width and aspect; brightness, contrast, sharpness (log
    variance of the Laplacian at 256 px); colour histograms; a grey thumbnail."""
    height, width = image.shape[:2]
    small = cv2.resize(image, (256, 256), interpolation=cv2.INTER_AREA)
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    sharpness = np.log(1 + cv2.Laplacian(grey, cv2.CV_32F).var())
    histograms = [cv2.calcHist([small], [c], None, [COLOUR_BINS], (0, 256)).ravel() / grey.size for c in range(3)]
    thumb = cv2.resize(grey, (THUMB, THUMB), interpolation=cv2.INTER_AREA).ravel() / 255
    plain = [np.log(height), np.log(width), np.log(width / height), grey.mean() / 255, grey.std() / 255, sharpness]
    return np.concatenate([plain, *histograms, thumb]).astype(np.float32)


def adversarial_validation(features, is_test, groups, seed):
    """How well a linear classifier tells test (bool [N]) from train by `features` [N, D], groups (int [N]) unsplit.

    → dict(auc, low, high): the cross-validated AUC, and the middle 95 % of what chance gives, by permuting which groups
    are test. None where either side has too few groups.
    """
    rng = np.random.default_rng(seed)
    if len(features) > MOST_IMAGES:
        chosen = np.sort(rng.permutation(len(features))[:MOST_IMAGES])
        features, is_test, groups = features[chosen], is_test[chosen], groups[chosen]
    _, groups = np.unique(groups, return_inverse=True)
    if min(len(np.unique(groups[is_test])), len(np.unique(groups[~is_test]))) < LEAST:
        return None
    # a group that is on both sides (a leaked image) moves as two
    units = np.unique(np.stack([groups, is_test]), axis=1, return_inverse=True)[1]
    unit_is_test = np.zeros(units.max() + 1, bool)
    unit_is_test[units] = is_test
    fold = rng.integers(0, FOLDS, groups.max() + 1)[groups]
    chance = [rng.permutation(unit_is_test)[units] for _ in range(PERMUTATIONS)]
    score, *chance = separation(features, np.stack([is_test, *chance], axis=1), fold)
    low, high = np.nanquantile(chance, [0.025, 0.975])
    return dict(auc=float(score), low=float(low), high=float(high))


def separation(features, is_test, fold):
    """Cross-validated AUC of each column of is_test (bool [N, T]), over folds (int [N]); scores are ranked within a
    fold. A ridge regression on two values is a linear discriminant, and one fit serves all columns. → [T]"""
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    scores = []
    for k in np.unique(fold):
        mine = fold == k
        model = make_pipeline(StandardScaler(), Ridge(alpha=40)).fit(features[~mine], is_test[~mine])
        found = model.predict(features[mine])
        scores.append(
            [auc(y.astype(int), np.stack([-s, s], axis=1)) for y, s in zip(is_test[mine].T, found.T, strict=True)]
        )
    return np.nanmean(scores, axis=0)


def report_lines(found):
    """What adversarial_validation found, as one sentence of verdict."""
    if found is None:
        return ["shift  too few images to compare the test set with the training set"]
    figures = f"AUC {found['auc']:.3f}, by chance {found['low']:.3f} to {found['high']:.3f}"
    if found["auc"] <= found["high"]:
        verdict = "size, light, sharpness and colours don't tell the test images from the training images"
    elif found["auc"] < 0.7:
        verdict = "the test images differ a little from the training images; expect the CV to be a little off"
    else:
        verdict = "the test images look different from the training images: the CV may not speak for the leaderboard"
    return [f"shift  {verdict} (adversarial validation {figures})"]
