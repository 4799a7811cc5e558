"""Is the test set like the training set? Adversarial validation on plain image statistics. Used by 00_prepare.py.

A classifier is asked to tell test images from training images by their size, light, sharpness, colours and a thumbnail.
If it can't, a CV on the training images may speak for the test set; if it can, the CV answers another question than
the leaderboard.
"""

import cv2
import numpy as np
from threadpoolctl import threadpool_limits

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
    histograms = [np.histogram(small[..., c], COLOUR_BINS, (0, 256))[0] / grey.size for c in range(3)]
    thumb = cv2.resize(grey, (THUMB, THUMB), interpolation=cv2.INTER_AREA).ravel() / 255
    plain = [np.log(height), np.log(width), np.log(width / height), grey.mean() / 255, grey.std() / 255, sharpness]
    return np.concatenate([plain, *histograms, thumb]).astype(np.float32)


def adversarial_validation(features, is_test, groups, seed):
    """How well a logistic regression tells test (bool [N]) from train by `features` [N, D], groups (int [N]) unsplit.

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
    with threadpool_limits(1):  # for problems this small, more threads only wait for each other
        auc = separation(features, is_test, groups, rng)
        chance = [separation(features, rng.permutation(unit_is_test)[units], groups, rng) for _ in range(PERMUTATIONS)]
    low, high = np.nanquantile(chance, [0.025, 0.975])
    return dict(auc=auc, low=float(low), high=float(high))


def separation(features, is_test, groups, rng):
    """Cross-validated AUC over random folds of whole groups; scores are ranked within each fold."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fold = rng.integers(0, FOLDS, groups.max() + 1)[groups]
    scores = []
    for k in range(FOLDS):
        held_out = fold == k
        if min(len(set(is_test[held_out])), len(set(is_test[~held_out]))) < 2:
            continue
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=200, class_weight="balanced"))
        model.fit(features[~held_out], is_test[~held_out])
        scores.append(roc_auc_score(is_test[held_out], model.decision_function(features[held_out])))
    return float(np.mean(scores)) if scores else float("nan")


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
