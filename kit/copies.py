"""Which images show one source photo: rotated, mirrored, cropped, rescaled, blurred or relit copies of it?

All copies of a source belong in one fold. Three steps, each narrowing what the next, dearer one looks at:

1. `describe`, each image once: a small thumbnail, the low frequencies of its DCT, SIFT features blind to mirroring.
2. `candidates`: each image's nearest neighbours by the DCT, and by SIFT words and colours. N × k pairs, not N².
3. `relatives`: kit/pairs.py judges each candidate pair. `components`: images that such pairs join are one group.
"""

import cv2
import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from scipy.sparse import coo_matrix, csgraph
from sklearn.preprocessing import normalize as unit  # scales each row to length 1; a row of zeros stays so
from threadpoolctl import threadpool_limits

from common import cpu_count, listing, progress
from kit.images import contact_sheet
from kit.pairs import FEATURES, RECORD, THUMB, d4_hashes, mirror_blind, verify

LONG_SIDE = 256  # px at which SIFT looks: 10 ms an image; smaller copies are enlarged to it
CONTRAST = 0.01  # SIFT's threshold; its default of 0.04 leaves out-of-focus and dark pictures without features
WORDS = 1024  # size of the SIFT vocabulary
COLOUR_WEIGHT = 0.8  # of the colours beside the words; of 0.5, 0.8 and 1.2 the best on the demo
COLOUR_BINS = 6  # a channel
VECTOR = WORDS + COLOUR_BINS**3  # numbers that describe an image's words and colours
NEIGHBOURS = 12  # candidates per image and kind of descriptor
PAIRS_A_TASK = 500  # of a process
FEW_PAIRS = 2000  # that one process judges in less time than others take to start
CHAINING = 0.02  # share of all images above which one group is suspicious


def describe(image):
    """uint8 [H, W, 3] RGB → a RECORD."""
    record = np.zeros((), RECORD)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    scale = LONG_SIDE / max(grey.shape)
    size = [max(8, round(side * scale)) for side in grey.shape[::-1]]
    grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    record["dct"] = cv2.dct(cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32))[:8, :8]
    record["hashes"] = d4_hashes(record["dct"])
    height, width = record["shape"] = [max(2, round(side * THUMB / LONG_SIDE)) for side in grey.shape]
    blend = cv2.INTER_AREA if max(image.shape) > THUMB else cv2.INTER_LINEAR  # enlarged by area, pixels have edges
    record["thumb"][:height, :width] = cv2.resize(image, (width, height), interpolation=blend)
    low, high = np.percentile(grey, (1, 99))  # faint pictures have features too
    grey = np.clip((grey - low) * (255 / max(32, high - low)), 0, 255).astype(np.uint8)
    keypoints, descriptors = cv2.SIFT_create(FEATURES, contrastThreshold=CONTRAST).detectAndCompute(grey, None)
    count = record["count"] = min(len(keypoints), FEATURES)
    if count:
        points = np.array([keypoint.pt for keypoint in keypoints[:count]], np.float32)
        record["points"][:count] = (points - np.array(size, np.float32) / 2) * (THUMB / LONG_SIDE)
        record["descriptors"][:count], record["turned"][:count] = mirror_blind(descriptors[:count])
    return record


def candidates(records, vectors=None):
    """→ int [P, 2], pairs i < j of images that may be relatives: neighbours by the DCT, and by `vectors` float32 [N, D]
    of unit length (by default words and colours)."""
    if vectors is None:
        vectors = np.zeros((len(records), VECTOR), np.float32)
        words_and_colours(records, vectors)
    count = min(NEIGHBOURS + 1, len(records))
    pairs = np.sort(np.vstack([nearest(d4_blind(records["dct"]), count), nearest(vectors, count)]), axis=1)
    return np.unique(pairs[pairs[:, 0] < pairs[:, 1]], axis=0)


def nearest(vectors, count, block=64):
    """Pairs each row of `vectors` (float32 [N, D], unit length) with its `count` nearest by the angle → int32
    [N * count, 2]. N² products, but a block of rows at a time: scikit-learn's takes 1 GB."""
    blocks = (vectors[start : start + block] @ vectors.T for start in range(0, len(vectors), block))
    neighbours = [np.argpartition(similarity, -count, axis=1)[:, -count:].astype(np.int32) for similarity in blocks]
    return np.stack([np.repeat(np.arange(len(vectors), dtype=np.int32), count), np.vstack(neighbours).ravel()], axis=1)


def d4_blind(dct):
    """DCT blocks [N, 8, 8] → float [N, 70], unit length, the same for all 8 orientations, any brightness and contrast:
    the sum and the difference of the magnitudes of each pair of coefficients that mirror each other at the diagonal."""
    rows, columns = np.array(np.triu_indices(8))[:, 1:]  # without the first one, the mean brightness
    upper, lower = np.abs(dct[:, rows, columns]), np.abs(dct[:, columns, rows])
    return unit(np.hstack([upper + lower, np.abs(upper - lower)]))


def words_and_colours(records, vectors, block=256):
    """Fills vectors [N, VECTOR], of unit length: each image's SIFT features counted by visual word, rare words weighted
    up (Sivic and Zisserman 2003), and its colours. The words are features drawn at random: as good here as clusters."""
    rng, images_with = np.random.default_rng(0), np.zeros(WORDS)
    some = features(records[np.sort(rng.permutation(len(records))[:WORDS])])
    words = some[rng.permutation(len(some))[:WORDS]] if len(some) else np.zeros((1, 128), np.float32)
    parts = [slice(start, start + block) for start in range(0, len(records), block)]
    for part in parts:
        word = (features(records[part]) @ words.T - (words**2).sum(axis=1) / 2).argmax(axis=1)
        cell = np.repeat(np.arange(len(records[part])), records["count"][part]) * WORDS + word
        vectors[part, :WORDS] = np.bincount(cell, minlength=len(records[part]) * WORDS).reshape(-1, WORDS)
        images_with += (vectors[part, :WORDS] > 0).sum(axis=0)
    rarity = 1 + np.log((1 + len(records)) / (1 + images_with))
    for part in parts:
        counts = vectors[part, :WORDS]
        weighted = unit(((counts > 0) + np.log(np.maximum(1, counts))) * rarity)
        vectors[part] = unit(np.hstack([weighted, COLOUR_WEIGHT * np.array([*map(colours, records[part])])]))


def features(records):
    """→ float32 [M, 128], the descriptors of all features of the images."""
    return records["descriptors"][np.arange(FEATURES) < records["count"][:, None]].astype(np.float32)


def colours(record):
    """RECORD → float32 [COLOUR_BINS³], unit length: the joint histogram of the thumbnail's colours, each channel at
    mean 0 and deviation 1, so that light and tint don't matter, and square-rooted, as RootSIFT is."""
    pixels = record["thumb"][*map(slice, record["shape"])].reshape(-1, 3).astype(np.float32)
    pixels = (pixels - pixels.mean(axis=0)) / (pixels.std(axis=0) + 5)
    counts = np.histogramdd(np.clip(pixels, -2.39, 2.39), COLOUR_BINS, [(-2.4, 2.4)] * 3)[0].ravel()
    return np.sqrt(counts / counts.sum()).astype(np.float32)


def relatives(records, pairs):
    """Judges the candidate pairs on all cores. → (pairs [M, 2] of relatives, evidence [M, 3]: bits, inliers,
    correlation). In processes, since half of the work is small steps of Python. `records` is mapped to a file, so it
    isn't copied; it must be the whole file (joblib 1.5 crashes on a view of one field)."""
    tasks, kin = np.array_split(pairs, max(1, len(pairs) // PAIRS_A_TASK)), []
    with progress(len(pairs), "relatives", "pair") as bar:
        pool = Parallel(cpu_count() if len(pairs) > FEW_PAIRS else 1, return_as="generator", max_nbytes=None)
        for task, related in zip(tasks, pool(delayed(judge)(records, task) for task in tasks), strict=True):
            kin += related
            bar.update(len(task))
    kin = np.array(kin, np.float64).reshape(-1, 5)
    return kin[:, :2].astype(np.int64), kin[:, 2:]


def judge(records, pairs):
    """→ [(i, j, bits, inliers, correlation), …], the relatives among the pairs. In one thread: each core has a task."""
    cv2.setNumThreads(1)
    with threadpool_limits(1):
        return [(i, j, *verdict) for i, j in pairs if (verdict := verify(records[i], records[j]))]


def components(pairs, count):
    """→ int [count], the group of each image: images that pairs [M, 2] join share one. Numbered by first image."""
    graph = coo_matrix((np.ones(len(pairs)), pairs.T), (count, count))
    return pd.factorize(csgraph.connected_components(graph, directed=False)[1])[0]


def table(pairs, evidence, groups, names, labels, test_names):
    """→ a table of all images in groups of two or more: group, its size, part, image_name, label, whether the group's
    labels disagree, and the image's closest relative with the evidence for it."""
    images = pd.DataFrame(dict(
        group=groups, size=np.bincount(groups)[groups], part=["train"] * len(names) + ["test"] * len(test_names),
        image_name=[*names, *test_names], label=[*labels, *[None] * len(test_names)],
    ))  # fmt: skip
    images["labels_disagree"] = (images.groupby("group").label.transform("nunique") > 1).astype(int)
    image, other = np.stack([pairs, pairs[:, ::-1]], axis=1).reshape(-1, 2).T  # each pair, seen from either image
    bits, inliers = np.repeat(evidence[:, :2].astype(int), 2, axis=0).T
    links = pd.DataFrame(dict(
        relative=(images.part + "/" + images.image_name)[other].array, found_by=np.where(inliers, "features", "hash"),
        inliers=inliers, hash_bits=np.where(inliers, "", bits.astype(str)), correlation=np.repeat(evidence[:, 2], 2),
    ), index=image).sort_values(["inliers", "correlation"], ascending=False)  # fmt: skip
    closest = links[~links.index.duplicated()].round(4)
    return images.join(closest, how="inner").sort_values("group", kind="stable").fillna("")


def summary(groups, names, labels, test_names):
    """→ what prepared.json keeps: counts, shares, and the names in each group whose labels disagree."""
    train, test, sizes = groups[: len(names)], groups[len(names) :], np.bincount(groups)
    in_train = np.bincount(train, minlength=len(sizes))
    in_group = pd.DataFrame(dict(name=names, label=labels)).groupby(train)
    return dict(
        groups=int((sizes > 1).sum()), largest=int(sizes.max()), largest_share=float(sizes.max() / len(groups)),
        train_with_relative=float((in_train[train] > 1).mean()), test_with_relative=float((in_train[test] > 0).mean()),
        conflicts=in_group.name.agg(list)[in_group.label.nunique() > 1].tolist(),
    )  # fmt: skip


def report_lines(counts):
    """→ sentences on the counts that `summary` gave (or None: then none), for the terminal and the report."""
    if counts is None:
        return []
    train, test, share = counts["train_with_relative"], counts["test_with_relative"], counts["largest_share"]
    large = share > CHAINING and counts["largest"] > 20
    conflicts = [" = ".join(names[:4]) for names in counts["conflicts"]]
    lines = {
        f"{counts['groups']} of two or more images, the largest of {counts['largest']} (duplicates.csv, .png)": True,
        f"{train:.1%} of the training and {test:.1%} of the test images have a relative in the training set": True,
        "relatives stay in one fold: in several, they would make the CV too high": train > max(0.05, 2 * test),
        "the test set shares sources with the training set: the CV may be too low": test > max(0.05, train / 2),
        f"{len(conflicts)} whose labels disagree (a label is wrong, or the group is): {listing(conflicts)}": conflicts,
        f"warning: one group holds {share:.1%} of all images; if that is wrong, give --groups none or FILE.csv": large,
    }
    return [line for line, holds in lines.items() if holds]


def draw(path, records, pairs, evidence, groups, names, labels, test_names, most=12, columns=8):
    """Draws a contact sheet: the least certain pairs, then the largest groups."""
    captions = [f"train {name[-16:]}" + f" [{label}]"[:12] for name, label in zip(names, labels, strict=True)]
    captions += [f"test {name[-16:]}" for name in test_names]
    certainty = evidence[:, 2] + np.minimum(evidence[:, 1], 40) / 40
    doubtful = pairs[np.argsort(certainty, kind="stable")[: 2 * columns]].ravel()
    rows = [("least certain pairs", doubtful[k : k + columns]) for k in range(0, len(doubtful), columns)]
    sizes = np.bincount(groups)
    largest = np.argsort(-sizes, kind="stable")[: min(most, (sizes > 1).sum())]
    rows += [(f"group {k}\n{sizes[k]} images", np.flatnonzero(groups == k)[:columns]) for k in largest]
    thumbs = {i: records["thumb"][i][*map(slice, records["shape"][i])] for _, row in rows for i in row}
    sheet = [(title, [(thumbs[i], captions[i]) for i in row]) for title, row in rows]
    contact_sheet(path, sheet or [("no relatives found", [])], columns)
