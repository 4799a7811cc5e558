"""Will the leaderboard agree with the CV? Adversarial validation on plain image statistics, and a forecast.

A classifier tries to tell test images from training images by their size, light, sharpness, colours and a thumbnail.
If it can't, the CV may speak for the test set; if it can, the CV and the leaderboard answer different questions.
"""

import cv2
import numpy as np

from kit.data.decode import resize

COLOUR_BINS, THUMB = 8, 6  # a channel; px, the thumbnail's side
STATISTICS = 6 + 3 * COLOUR_BINS + THUMB * THUMB
LEAST = 20  # groups on either side; fewer prove nothing
FOLDS, PERMUTATIONS = 5, 50  # of train and test among the groups, for the range that chance gives
MOST_IMAGES = 4000  # more don't change the answer, only the time


def statistics(image):
    """uint8 [H, W, 3] RGB → float32 [STATISTICS]: log height, width and aspect; brightness, contrast, sharpness (log
    variance of the Laplacian at 256 px); colour histograms; a grey thumbnail."""
    small = resize(image, 256)
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    histograms = [cv2.calcHist([small], [c], None, [COLOUR_BINS], (0, 256)).ravel() / grey.size for c in range(3)]
    thumb = resize(resize(grey, 64), THUMB).ravel() / 255  # in two steps, of which the first is quick: 256 is 4 × 64
    mean, deviation = (value.item() for value in cv2.meanStdDev(grey))
    sharpness = cv2.meanStdDev(cv2.Laplacian(grey, cv2.CV_16S))[1].item() ** 2
    shape = np.log([*image.shape[:2], image.shape[1] / image.shape[0]])
    plain = [*shape, mean / 255, deviation / 255, np.log(1 + sharpness)]
    return np.concatenate([plain, *histograms, thumb]).astype(np.float32)


def adversarial_validation(features, is_test, groups, seed):
    """How well does a linear classifier tell test (bool [N]) from train by `features` [N, D], no group (int [N]) split?
    → dict(auc, low, high): the cross-validated AUC, and the middle 95 % of what chance gives: which groups are test is
    permuted, one on both sides (a leaked image) as two. None where a side has fewer than LEAST."""
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.permutation(len(features))[:MOST_IMAGES]) if len(features) > MOST_IMAGES else slice(None)
    features, is_test = features[chosen], is_test[chosen]
    groups = np.unique(groups[chosen], return_inverse=True)[1]
    (_, unit_is_test), units = np.unique(np.stack([groups, is_test]), axis=1, return_inverse=True)
    if np.bincount(unit_is_test, minlength=2).min() < LEAST:
        return None
    fold = rng.integers(0, FOLDS, groups.max() + 1)[groups]
    chance = [rng.permutation(unit_is_test.astype(bool))[units] for _ in range(PERMUTATIONS)]
    score, *chance = separation(features, np.stack([is_test, *chance], axis=1), fold)
    low, high = np.nanquantile(chance, [0.025, 0.975])
    return dict(auc=float(score), low=float(low), high=float(high))


def separation(features, is_test, fold):
    """→ float [T], the AUC of each column of is_test (bool [N, T]): the mean over the folds (int [N]), each ranked by a
    fit to the others. A ridge regression on two values is a linear discriminant, and one fit serves all columns."""
    from sklearn.linear_model import Ridge  # here, since 03 reads this file and needn't wait for it
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    scores, model = [], make_pipeline(StandardScaler(), Ridge(alpha=40))
    for k in np.unique(fold):
        held_out = fold == k
        guesses = model.fit(features[~held_out], is_test[~held_out]).predict(features[held_out])
        scores.append(areas(is_test[held_out], guesses))
    return np.nanmean(scores, axis=0)


def areas(is_test, guesses):
    """→ the AUC of each column, float [T], from the ranks of all columns at once; NaN where a column has one side."""
    from scipy.stats import rankdata

    tests, others = is_test.sum(axis=0), (~is_test).sum(axis=0)
    ranks = np.where(is_test, rankdata(guesses, axis=0), 0).sum(axis=0)
    pairs = np.where(tests * others > 0, tests * others, np.nan)
    return (ranks - tests * (tests + 1) / 2) / pairs


def report_lines(shift):
    """→ sentences on what adversarial_validation returned, for the terminal and the report."""
    if shift is None:
        return ["too few images to compare the test set with the training set"]
    if shift["auc"] <= shift["high"]:
        verdict = "size, light, sharpness and colours don't tell the test images from the training images"
    elif shift["auc"] < 0.7:
        verdict = "the test images differ a little from the training images: expect the CV to be a little off"
    else:
        verdict = "the test images look different from the training images: the CV may not speak for the leaderboard"
    return [verdict, "adversarial validation: AUC {auc:.3f}, by chance {low:.3f} to {high:.3f}".format(**shift)]


def confidence_lines(probabilities, targets, folds, tests):
    """→ sentences on what the fold models show. probabilities [N, K], targets and folds int [N]: out of fold; tests: of
    each model, the probabilities of the test images [T, K]. The share of test images on which two models disagree is
    about the share on which one is wrong, if they are as sure as they are right (Jiang et al. 2022)."""
    held_out = [probabilities[folds == fold].max(axis=1).mean() for fold in np.unique(folds)]
    sure, mean = np.mean([test.max(axis=1).mean() for test in tests]), probabilities.max(axis=1).mean()
    warning = len(held_out) > 2 and sure < np.mean(held_out) - 3 * np.std(held_out, ddof=1)
    verdict = "much less: the test set may be of another kind" if warning else "about the same, which proves nothing"
    lines = [f"mean confidence {sure:.3f} on the test images, {mean:.3f} out of fold: {verdict}"]
    named = np.stack([test.argmax(axis=1) for test in tests])
    if len(named) > 1:
        agree = np.mean([(one == other).mean() for i, one in enumerate(named) for other in named[:i]])
        wrong = (probabilities.argmax(axis=1) != targets).mean()
        lines.append(
            f"two fold models disagree on {1 - agree:.1%} of the test images; out of fold {wrong:.1%} are wrong"
        )
    return lines
