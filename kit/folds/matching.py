"""Folds whose held-out images are as far from the training images as the test images are: nearest-neighbour distance
matching (Milà et al. 2022, doi 10.1111/2041-210X.13851; Linnenbrink et al. 2024, doi 10.5194/gmd-17-5897-2024).

The candidates go from each image alone over duplicates together to a few clusters of look-alike images. Where the test
set shows known and new subjects, whole clusters are too hard and single images too easy: each clustering is also tried
with a share of its clusters split up. A candidate is measured by the distance between the similarities of held-out and
of test images to the nearest image that the same model has seen, without labels of the test set or a trained model.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.stats import wasserstein_distance
from sklearn.cluster import MiniBatchKMeans
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.preprocessing import normalize

from kit.folds.duplicates import WORDS, thumbnail
from kit.folds.split import assign_folds, rarest_labels, unlearnt_images
from kit.score import thresholds
from kit.score.metrics import METRICS

NO_VARIANCE = 1e-8  # of the largest variance: less is rounding, which whitening would enlarge
DIMENSIONS = 128  # of whitened words or features; of the colours half as many
LAB_BINS = 4, 8, 8  # of L, a, b
MOST = 4000  # images from which PCA and Ward learn at once: Ward's memory grows with their square
QUERIES = 2000  # held-out images, and test images, whose nearest neighbours are looked up …
FIRST = 256  # … among so many first, which all candidates share, and among all images where a fold has none of these
LEAST = 40  # sources in the training set, and test images: fewer say nothing
OUTPUTS = 512  # that a ridge regression fits at once: of thousands of labels, a copy takes gigabytes
MOST_UNLEARNT = 0.01  # share of the images that candidates may add to those whose class a fold can't learn
FEWEST, RATIO = 8, 2**0.5  # clusters of the last candidate, and how many times as many the candidate before has
SPLIT_UP = {0: "", 0.25: ", a quarter split up", 0.5: ", half split up", 0.75: ", three quarters split up"}
NEAR_ENOUGH, NEARLY_BEST = 0.5, 1.5  # largest distance, in standard deviations of similarities; times the least one


@dataclass(eq=False)  # compared by identity
class Candidate:
    """Folds that may be chosen, and how they compare with the test set."""

    name: str
    clusters: int  # 0: none
    split_up: float  # share of the images whose clusters are split up
    groups: np.ndarray  # int [N]
    folds: np.ndarray  # int [N]
    held_out: np.ndarray | None = None  # float [≤ QUERIES], similarity of held-out images to the nearest in other folds
    test: np.ndarray | None = None  # float [≤ QUERIES, folds], of test images to the nearest in all folds but one
    distance: float | None = None  # Wasserstein distance between the two
    near_enough: bool | None = None  # whether it is at most half the standard deviation of the similarities
    nearly_best: bool | None = None  # whether it is about the least, or as small as between halves of the test images
    score: float | None = None  # of a ridge regression, out of fold


def feature_points(records, words_and_colours, features, seed):
    """Return the points by whose cosine images are compared, float32 [N, D] of unit length: SIFT words, colours, and a
    network's `features` or None. Each block is whitened alone, or the words would hide the colours. The CIELAB colours
    aren't scaled as in duplicates.words_and_colours: the test set's light and tint are part of its distance."""
    colours, ranges = np.empty((len(records), np.prod(LAB_BINS)), np.float32), [(0, 256), (64, 192), (64, 192)]
    for row, record in zip(colours, records, strict=True):
        pixels = cv2.cvtColor(np.ascontiguousarray(thumbnail(record)), cv2.COLOR_RGB2LAB).reshape(-1, 3)
        row[:] = np.sqrt(np.histogramdd(pixels, LAB_BINS, ranges)[0].ravel() / len(pixels))
    blocks = (words_and_colours[:, :WORDS], DIMENSIONS), (colours, DIMENSIONS // 2), (features, DIMENSIONS)
    return normalize(np.hstack([whitened(*block, seed) for block in blocks if block[0] is not None]))


def whitened(vectors, count, seed, block=4096):
    """Return vectors [N, D] as float32 [N, ≤ count] of unit length, by a PCA that learns from at most MOST of them."""
    sample = np.sort(np.random.default_rng(seed).permutation(len(vectors))[:MOST])
    count = max(1, min(count, vectors.shape[1], len(sample) // 8))
    if not np.ptp(vectors[sample], axis=0).any():  # flat pictures, all the same
        return np.zeros((len(vectors), 1), np.float32)
    pca = PCA(count, whiten=True, svd_solver="randomized", random_state=seed).fit(vectors[sample])
    rank = (pca.explained_variance_ > NO_VARIANCE * pca.explained_variance_[0]).sum()  # grey pictures' colours have 4
    parts = [pca.transform(vectors[start : start + block])[:, :rank] for start in range(0, len(vectors), block)]
    return normalize(np.concatenate(parts).astype(np.float32))


def choose_folds(points, sources, targets, task, count, seed, metric, shared=False):
    """Choose the folds. points: float32 [N + T, D], the training images first; of these, sources int [N] (duplicates
    share one) and targets, as the task has them; count: of folds; metric: a key of METRICS; shared: whether the test
    images are copies of them too. → (the chosen Candidate, all Candidates, plain folds first), or (None, []) where
    there are too few images. Plain folds are chosen if nearly the best, with duplicates together if these match too and
    aren't shared; else the nearly best whose held-out images are farthest away, since a CV that promises too much is
    the costlier mistake; if none is near enough, the nearest."""
    train, test = points[: len(targets)], points[len(targets) :]
    if min(len(np.unique(sources)), len(test)) < max(LEAST, 2 * count):
        return None, []
    candidates = make_candidates(train, sources, task.strata(targets), count, seed)
    measure_distances(candidates, train, test, count, seed)
    for candidate in candidates:
        if candidate.nearly_best or not candidate.clusters:
            candidate.score = ridge_score(train, targets, candidate.folds, metric, task)
    nearest = min(candidates, key=lambda candidate: candidate.distance)
    best = [candidate for candidate in candidates if candidate.nearly_best] if nearest.near_enough else [nearest]
    if all(candidate.clusters for candidate in best):
        return min(best, key=lambda candidate: candidate.held_out.mean()), candidates
    plain = [item for item in candidates if not item.clusters and (item in best or (item.near_enough and not shared))]
    return plain[-1], candidates  # the last has duplicates together


def make_candidates(points, sources, strata, count, seed):
    """Return the Candidates, without distances, for the training images' points float32 [N, D]. Duplicates stay
    together in all but the first. Clusters are left out if they are too few groups, or if more images than with
    duplicates together have a class that a fold can't learn."""
    first, source = np.unique(sources, return_index=True, return_inverse=True)[1:]  # one image represents its copies
    groupings = [("each image alone", 0, 0, np.arange(len(sources)))]
    groupings += [("duplicates together", 0, 0, source)] * (len(first) < len(sources))
    steps = int(np.log(len(first) / 2 / FEWEST) / np.log(RATIO)) + 1
    counts, finer = [round(len(first) / 2 / RATIO**step) for step in range(steps)], source
    classes, plain = rarest_labels(strata), len(groupings)
    for clusters, labels in zip(counts, clusterings(points[first], counts, seed), strict=True):
        finer = split_dominant_clusters(labels[source], finer, source, classes)
        for share, words in SPLIT_UP.items():
            groups = split_up_clusters(finer, source, share, seed)
            groupings.append((f"{clusters} look-alike groups{words}", clusters, share, groups))
    candidates = [Candidate(*grouping, assign_folds(grouping[-1], strata, count, seed)) for grouping in groupings]
    most = unlearnt_images(candidates[plain - 1].folds, strata) + MOST_UNLEARNT * len(strata)
    clustered = [item for item in candidates[plain:] if len(np.unique(item.groups)) >= count]
    return candidates[:plain] + [item for item in clustered if unlearnt_images(item.folds, strata) <= most]


def clusterings(points, counts, seed):
    """Return Ward's clusters of points float32 [N, D], a list of int [N], one for each of the falling `counts`.
    Memory is flat: above MOST points, k-means makes parts of about MOST / 2, Ward clusters each, and one height cuts
    all trees. Where fewer than MOST / 2 clusters are wanted, Ward goes on with the centres of so many."""
    if len(points) <= MOST:
        tree = linkage(points.astype(np.float64), "ward")
        return [fcluster(tree, count, "maxclust") - 1 for count in counts]
    part = MiniBatchKMeans(2 * len(points) // MOST, random_state=seed, n_init=1).fit_predict(points)
    parts = [np.flatnonzero(part == k) for k in np.unique(part)]  # one may hold almost all: it is divided once more
    parts = [piece for rows in parts for piece in np.array_split(rows, -(-len(rows) // MOST))]
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


def split_dominant_clusters(labels, finer, source, strata):
    """Return the clusters int [N]. Where one has more than half of a class (an image's rarest label), that class'
    images in it and their copies get their `finer` clusters: otherwise a fold could hold out all of the class."""
    cell, together = np.unique(np.stack([labels, strata]), axis=1, return_inverse=True, return_counts=True)[1:]
    dominant = together[cell.ravel()] > np.bincount(strata)[strata] / 2
    dominant = (np.bincount(source, dominant) > 0)[source]
    return np.unique(np.where(dominant, finer + labels.max() + 1, labels), return_inverse=True)[1]


def split_up_clusters(labels, source, share, seed):
    """Return the clusters as groups int [N], of which some, drawn by the seed, with a `share` of the images are split
    up: there only the copies of one `source` stay together."""
    sizes = np.bincount(labels)
    order = np.random.default_rng(seed).permutation(len(sizes))
    drawn = order[np.cumsum(sizes[order]) - sizes[order] / 2 <= share * len(labels)]
    return np.where(np.isin(labels, drawn), source + labels.max() + 1, labels)


def measure_distances(candidates, train, test, count, seed, block=256):
    """Fill in how the candidates compare with the test set. A held-out image is compared with the other folds; a test
    image with all folds but one, each in turn, since a model that has seen fewer images is farther from everything."""
    rng = np.random.default_rng(seed)
    held_out, sample = (np.sort(rng.permutation(len(part))[:QUERIES]) for part in (train, test))
    queries = np.concatenate([train[held_out], test[sample]])
    nearest = np.empty((len(candidates), len(queries), count), np.float32)  # in each fold
    for start in range(0, len(queries), block):
        similar = queries[start : start + block] @ train.T
        first = np.argpartition(similar, -min(FIRST, len(train)), axis=1)[:, -FIRST:]
        for rows, candidate in zip(nearest, candidates, strict=True):
            rows[start : start + block] = nearest_in_folds(similar, first, candidate.folds, count)
    for candidate, rows in zip(candidates, nearest, strict=True):
        seen = np.stack([np.delete(rows, fold, axis=1).max(axis=1) for fold in range(count)], axis=1)
        candidate.held_out = seen[np.arange(len(held_out)), candidate.folds[held_out]]
        candidate.test = seen[len(held_out) :]
        candidate.distance = float(wasserstein_distance(candidate.held_out, candidate.test.ravel()))
        spread = np.append(candidate.held_out, candidate.test).std()
        candidate.near_enough = bool(candidate.distance <= NEAR_ENOUGH * spread)
    test, least = candidates[0].test, min(candidate.distance for candidate in candidates)
    most = max(NEARLY_BEST * least, wasserstein_distance(test[::2].ravel(), test[1::2].ravel()))
    for candidate in candidates:
        candidate.nearly_best = bool(candidate.distance <= most)


def nearest_in_folds(similar, first, folds, count):
    """Return the similarity to the nearest image of each fold, float32 [Q, count]. similar: float32 [Q, N]; first: int
    [Q, ·], the images that are most similar to a query, in any order; folds: int [N]."""
    similarities, fold_of = np.take_along_axis(similar, first, axis=1), folds[first]
    nearest = np.empty((len(similar), count), np.float32)
    for fold, column in enumerate(nearest.T):
        column[:] = np.where(fold_of == fold, similarities, -np.inf).max(axis=1)
        if np.isneginf(column).any():
            lost, rest = np.flatnonzero(np.isneginf(column)), np.flatnonzero(folds == fold)
            column[lost] = similar[np.ix_(lost, rest)].max(axis=1)
    return nearest


def ridge_score(points, targets, folds, metric, task):
    """Return the out-of-fold score of a ridge regression on the points [N, D]: enough to show what a grouping costs."""
    table, rows = task.regression_targets(targets)
    outputs = np.zeros((len(rows), table.shape[1]), np.float32)
    for fold in np.unique(folds):
        seen = folds != fold
        for first in range(0, table.shape[1], OUTPUTS):
            part = slice(first, first + OUTPUTS)
            model = Ridge(alpha=1).fit(points[seen], table[rows[seen], part])
            outputs[~seen, part] = model.predict(points[~seen]).reshape((~seen).sum(), -1)
    predictions = thresholds.held_out(metric, targets, task.from_regression(outputs), folds)
    return METRICS[metric].score(targets, predictions)


def summary(chosen, candidates):
    """Return what prepared.json keeps: the plain folds first, and the candidates that are nearly the best, of which one
    is chosen; of each, median similarities, and what the leaderboard forecast reads."""
    keys, rows = "name clusters split_up distance score near_enough nearly_best".split(), []
    for candidate in [item for item in candidates if item.nearly_best or not item.clusters]:
        row = {key: getattr(candidate, key) for key in keys} | dict(chosen=candidate is chosen)
        row |= dict(similarity=float(np.median(candidate.held_out)), test_similarity=float(np.median(candidate.test)))
        rows.append(row)
    return rows


def matching_lines(candidates):
    """Return sentences on what `summary` returned, for the terminal and the report; none without candidates."""
    if not candidates:
        return []
    plain, chosen = candidates[0], next(candidate for candidate in candidates if candidate["chosen"])
    figures = "median similarity to the nearest image seen: {similarity:.2f} held out, {test_similarity:.2f} test"
    figures = figures.format(**chosen) + f", {plain['similarity']:.2f} held out in plain folds" * (chosen is not plain)
    if not chosen["near_enough"]:
        return [f"no folds match the test set; the nearest: {chosen['name']} (matched.png)", figures]
    if chosen["clusters"] == 0:
        return [f"{chosen['name']}: these match the test set (matched.png)", figures]
    if plain["score"] is None:  # the metric changed since
        return [f"matched folds, {chosen['name']} (matched.png)", figures]
    scores = f"a ridge regression scores {plain['score']:.3f} in plain folds, {chosen['score']:.3f} in these"
    return [f"matched folds, {chosen['name']} (matched.png)", figures, scores]
