"""Which folds ask what the test set asks? Those whose held-out images lie as far from their training folds as the test
images do: nearest-neighbour distance matching, from spatial statistics (Milà et al. 2022, doi 10.1111/2041-210X.13851;
Linnenbrink et al. 2024, doi 10.5194/gmd-17-5897-2024).

A ladder of groupings leads from each image alone over the copies of one source to a few clusters of images that look
alike. Where the test set shows new subjects and known ones, whole clusters ask too much and single images too little:
so each clustering is tried with a share of its clusters released, image by image. A rung is judged by one distance: how
unlike are the similarities of held-out images, and of test images, to the nearest image that the same model has seen?
No label of the test set and no trained model is needed.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.stats import wasserstein_distance
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.preprocessing import normalize as unit

from common import softmax
from kit.folds.duplicates import WORDS
from kit.folds.split import deal, scarce
from kit.score import thresholds
from kit.score.metrics import METRICS
from kit.score.tasks import strata

DIMENSIONS = 128  # of whitened words or features; of the colours half as many
COLOURS = 4, 8, 8  # bins of L, a, b
MOST = 4000  # images from which PCA and Ward learn at once: Ward's memory grows with their square
ASKED = 2000  # held-out images, and test images, whose nearest neighbours are looked up
LEAST = 40  # sources in the training set, and test images: of fewer nothing can be said
FEWEST, RATIO = 8, 2**0.5  # clusters of the last rung, and how many times as many the rung before has
RELEASED = 0, 0.25, 0.5, 0.75  # shares of the images whose clusters are released
MATCHING = 0.5  # standard deviations of the similarities by which a rung that matches may be off
ALIKE = 1.5  # times the least distance: rungs below it match about as well
STEEPNESS = 5  # of the softmax that makes probabilities of a ridge regression's guesses


@dataclass(eq=False)  # two are equal only if they are one
class Rung:
    name: str
    clusters: int  # 0: none
    released: float  # share of the images
    groups: np.ndarray  # int [N]
    folds: np.ndarray  # int [N]
    held_out: np.ndarray = None  # float [≤ ASKED], similarity of held-out images to the nearest of the other folds
    test: np.ndarray = None  # float [≤ ASKED, folds], of test images to the nearest of all folds but one, each in turn
    distance: float = None  # Wasserstein's, between the two
    score: float = None  # of a ridge regression, out of fold


def describe(records, words_and_colours, features, seed):
    """→ float32 [N, D] of unit length, what similarity is measured by: SIFT words, colours as they are, and a network's
    `features` where there are some. Each is whitened, or the commonest would drown the telling ones, and then they
    stand side by side: whitened together, the words drown the colours."""
    words = (words_and_colours[:, :WORDS], DIMENSIONS)
    blocks = [words, (np.array([colours(record) for record in records]), DIMENSIONS // 2)]
    blocks += [] if features is None else [(features, DIMENSIONS)]
    return unit(np.hstack([whitened(*block, seed) for block in blocks]))


def colours(record):
    """RECORD → float32 [256], the joint histogram of the thumbnail's CIELAB colours, square-rooted. Other than those of
    copies.colours they aren't normalised: the test set's light and tint are part of how far it lies."""
    thumb = np.ascontiguousarray(record["thumb"][*map(slice, record["shape"])])
    pixels, ranges = cv2.cvtColor(thumb, cv2.COLOR_RGB2LAB).reshape(-1, 3), [(0, 256), (64, 192), (64, 192)]
    return np.sqrt(np.histogramdd(pixels, COLOURS, ranges)[0].ravel() / len(pixels)).astype(np.float32)


def whitened(vectors, count, seed, block=4096):
    """Vectors [N, D] → float32 [N, ≤ count] of unit length, by a PCA that learns from MOST of them at most."""
    some = np.sort(np.random.default_rng(seed).permutation(len(vectors))[:MOST])
    count = max(1, min(count, vectors.shape[1], len(some) // 8))
    if not np.ptp(vectors[some], axis=0).any():  # flat pictures, all the same
        return np.zeros((len(vectors), 1), np.float32)
    pca = PCA(count, whiten=True, svd_solver="randomized", random_state=seed).fit(vectors[some])
    parts = [pca.transform(vectors[start : start + block]) for start in range(0, len(vectors), block)]
    return unit(np.concatenate(parts).astype(np.float32))


def match(points, sources, targets, count, seed, metric, task="classes"):
    """Chooses the folds. points float32 [N + T, D]: the training images, then the test images; of the training images,
    sources int [N] (copies share one) and targets, by the task; count of folds; metric: a key of METRICS.

    → (chosen Rung, all Rungs in the order of the ladder), or (None, []) where there are too few images.
    The plain folds, with copies together, where they match about as well as the best rung; else, of the rungs that do,
    the one whose held-out images lie farthest away: similarities can't tell new subjects from well-hidden known ones,
    and a CV that promises too much is the costlier mistake. Where none matches, the one that comes nearest."""
    train, test = points[: len(targets)], points[len(targets) :]
    if min(len(np.unique(sources)), len(test)) < max(LEAST, 2 * count):
        return None, []
    rungs = ladder(train, sources, strata(task, targets), count, seed)
    compare(rungs, train, test, count, seed)
    near = alike(rungs)
    for rung in rungs:
        if rung in near or not rung.clusters:
            rung.score = head_score(train, targets, rung.folds, metric, task)
    best = min(rungs, key=lambda rung: rung.distance)
    if not matches(best):
        near = [best]
    plain = [rung for rung in rungs if not rung.clusters]  # the last of them keeps copies together
    return plain[-1] if set(plain) & set(near) else min(near, key=lambda rung: rung.held_out.mean()), rungs


def matches(rung):
    """Whether held-out and test similarities differ by less than they vary."""
    return rung.distance <= MATCHING * np.concatenate([rung.held_out, rung.test.ravel()]).std()


def alike(rungs):
    """→ the rungs that match about as well as the best, or as well as one half of the test images matches the other."""
    halves = wasserstein_distance(rungs[0].test[::2].ravel(), rungs[0].test[1::2].ravel())
    most = max(ALIKE * min(rung.distance for rung in rungs), halves)
    return [rung for rung in rungs if rung.distance <= most]


def ladder(points, sources, targets, count, seed):
    """→ the rungs, without similarities, of the training images' points float32 [N, D]. Copies stay together on all but
    the first. A rung that would leave a class out of the training side of a fold is left out, but for the first."""
    first, source = np.unique(sources, return_index=True, return_inverse=True)[1:]  # one image stands for its copies
    candidates = [("each image alone", 0, 0, np.arange(len(sources)))]
    candidates += [("copies of one source together", 0, 0, source)] * (len(first) < len(sources))
    steps = int(np.log(len(first) / 2 / FEWEST) / np.log(RATIO)) + 1
    counts, finer = [round(len(first) / 2 / RATIO**step) for step in range(steps)], source
    for clusters, labels in zip(counts, clusterings(points[first], counts, seed), strict=True):
        finer = keep_classes_apart(labels[source], finer, source, targets)
        for share in RELEASED:
            name = f"{clusters} clusters" + f", {share:.0%} of the images released" * (share > 0)
            candidates.append((name, clusters, share, release(finer, source, share, seed)))
    rungs = [Rung(*candidate, deal(candidate[-1], targets, count, seed)) for candidate in candidates]
    lacking = {*scarce(rungs[0].folds, targets)}  # what no folds can help: a class of one image
    kept = [rung for rung in rungs[1:] if len(np.unique(rung.groups)) >= count]
    kept = [rung for rung in kept if {*scarce(rung.folds, targets)} <= lacking]
    return rungs[:1] + kept


def clusterings(points, counts, seed):
    """Ward's clusters of points float32 [N, D] → a list of int [N], one for each of `counts`, which fall.

    Memory is flat: above MOST points, k-means makes parts of some MOST / 2, Ward clusters each, and one height cuts all
    trees. Where fewer than MOST / 2 clusters are wanted, Ward goes on with the centres of so many."""
    if len(points) <= MOST:
        tree = linkage(points.astype(np.float64), "ward")
        return [fcluster(tree, count, "maxclust") - 1 for count in counts]
    part = MiniBatchKMeans(2 * len(points) // MOST, random_state=seed, n_init=1).fit_predict(points)
    parts = [np.flatnonzero(part == k) for k in np.unique(part)]  # one may hold almost all: it is divided once more
    parts = [some for rows in parts for some in np.array_split(rows, -(-len(rows) // MOST))]
    trees = [linkage(points[rows].astype(np.float64), "ward") if len(rows) > 1 else None for rows in parts]
    heights = np.sort(np.concatenate([tree[:, 2] for tree in trees if tree is not None]))

    def cut(count):
        labels, height = np.zeros(len(points), np.int64), heights[max(0, len(points) - count - 1)]
        for k, (rows, tree) in enumerate(zip(parts, trees, strict=True)):
            labels[rows] = k * len(points) + (0 if tree is None else fcluster(tree, height, "distance"))
        return np.unique(labels, return_inverse=True)[1]

    middle = cut(MOST // 2)
    centres = np.stack([np.bincount(middle, column) for column in points.T], axis=1) / np.bincount(middle)[:, None]
    coarse = iter(clusterings(centres, [count for count in counts if count < MOST // 2], seed))
    return [next(coarse)[middle] if count < MOST // 2 else cut(count) for count in counts]


def keep_classes_apart(labels, finer, source, targets):
    """Clusters int [N] → the same, but where one holds more than half of a class, that class' images in it, and their
    copies, stay in the `finer` clusters: else a fold could hold out the whole class. Of labels, an image's rarest is
    its class."""
    if targets.ndim == 2:
        targets = np.where(targets, targets.sum(axis=0), len(targets) + 1).argmin(axis=1)
    cell, together = np.unique(np.stack([labels, targets]), axis=1, return_inverse=True, return_counts=True)[1:]
    most = together[cell.ravel()] > np.bincount(targets)[targets] / 2
    most = (np.bincount(source, most) > 0)[source]
    return np.unique(np.where(most, finer + labels.max() + 1, labels), return_inverse=True)[1]


def release(labels, source, share, seed):
    """Clusters int [N] → groups int [N]: of a `share` of the images, in whole clusters drawn by the seed, only the
    copies of one `source` stay together."""
    sizes, drawn = np.bincount(labels), np.zeros(labels.max() + 1, bool)
    order = np.random.default_rng(seed).permutation(len(sizes))
    drawn[order] = np.cumsum(sizes[order]) - sizes[order] / 2 <= share * len(labels) if share else False
    return np.where(drawn[labels], source + labels.max() + 1, labels)


def compare(rungs, train, test, count, seed, block=256):
    """Fills in the rungs' similarities and distances. A held-out image is compared with the other folds; a test image
    with all folds but one, since a model that has seen less lies farther from everything."""
    rng = np.random.default_rng(seed)
    held_out, some = (np.sort(rng.permutation(len(part))[:ASKED]) for part in (train, test))
    asked = np.concatenate([train[held_out], test[some]])
    orders = [np.argsort(rung.folds, kind="stable") for rung in rungs]
    starts = [np.searchsorted(rung.folds[order], range(count)) for rung, order in zip(rungs, orders, strict=True)]
    nearest = np.empty((len(rungs), len(asked), count), np.float32)  # of each fold
    for start in range(0, len(asked), block):
        similar = asked[start : start + block] @ train.T
        for near, order, first in zip(nearest, orders, starts, strict=True):
            near[start : start + block] = np.maximum.reduceat(similar[:, order], first, axis=1)
    for rung, near in zip(rungs, nearest, strict=True):
        seen = np.stack([np.delete(near, fold, axis=1).max(axis=1) for fold in range(count)], axis=1)
        rung.held_out = seen[np.arange(len(held_out)), rung.folds[held_out]]
        rung.test = seen[len(held_out) :]
        rung.distance = float(wasserstein_distance(rung.held_out, rung.test.ravel()))


def head_score(points, targets, folds, metric, task="classes"):
    """→ the score, out of fold, of a ridge regression on the points [N, D]: no model to submit, but enough to see what
    a grouping costs."""
    if task == "classes":
        targets = np.unique(targets, return_inverse=True)[1]
        wanted, row = np.eye(targets.max() + 1, dtype=np.float32), targets  # of all images they would fill the memory
    else:
        wanted, row = np.where(np.isfinite(targets), targets, np.nanmean(targets, axis=0)), np.arange(len(targets))
    guesses = np.zeros((len(row), wanted.shape[1]), np.float32)
    for fold in np.unique(folds):
        seen = folds != fold
        guesses[~seen] = (
            Ridge(alpha=1).fit(points[seen], wanted[row[seen]]).predict(points[~seen]).reshape(-1, wanted.shape[1])
        )
    if task == "classes":
        guesses *= STEEPNESS
        guesses = softmax(guesses)
    elif task == "labels":
        guesses = np.clip(guesses, 0, 1)
        guesses = thresholds.held_out(metric, targets, guesses, folds) if METRICS[metric].of_sets else guesses
    return METRICS[metric].score(targets, guesses)


def summary(chosen, rungs):
    """→ what prepared.json keeps of the ladder: a row for each rung, with the median similarities."""
    near, rows = alike(rungs), []
    for rung in rungs:
        row = {key: getattr(rung, key) for key in ("name", "clusters", "released", "distance", "score")}
        medians = dict(similarity=float(np.median(rung.held_out)), test_similarity=float(np.median(rung.test)))
        rows.append(row | medians | dict(alike=rung in near, chosen=rung is chosen, matches=bool(matches(rung))))
    return rows


def report_lines(rungs):
    """→ sentences on what `summary` gave, for the terminal and the report; none without a ladder."""
    if not rungs:
        return []
    plain, chosen = rungs[0], next(rung for rung in rungs if rung["chosen"])
    figures = "nearest image seen, median similarity: {similarity:.2f} held out, {test_similarity:.2f} test"
    figures = figures.format(**chosen) + f", {plain['similarity']:.2f} in plain folds" * (chosen is not plain)
    if not chosen["matches"]:
        return [f"no folds match the test set; {chosen['name']} come nearest (matched.png)", figures]
    if chosen["clusters"] == 0:
        return [f"{chosen['name']}: these match the test set (matched.png)", figures]
    scores = f"a ridge regression scores {plain['score']:.3f} in plain folds, {chosen['score']:.3f} in these"
    return [f"matched folds, {chosen['name']} (matched.png)", figures, scores]
