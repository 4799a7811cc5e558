"""Near-duplicate search: rotated, mirrored, cropped, rescaled, blurred or relit copies of one source photo.

All copies of a source belong in one fold. Each step narrows down what the next, slower one looks at. `image_record`
keeps a small thumbnail, the low frequencies of its DCT, and SIFT features blind to mirroring. `candidate_pairs` takes
each image's nearest neighbours by the DCT, and by SIFT words and colours: N × k pairs, not N². `verified_pairs` accepts
or rejects each pair, and `components` makes groups of the accepted ones.
"""

import hashlib

from common import cpu_count, listing, progress

import cv2
import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from sklearn.preprocessing import normalize  # scales each row to length 1; a row of zeros stays so
from threadpoolctl import threadpool_limits

from kit.folds.neighbours import d4_blind, neighbour_pairs
from kit.folds.split import components

LONG_SIDE = 256  # px at which SIFT looks: 10 ms an image; smaller copies are enlarged to it
CONTRAST = 0.01  # SIFT's threshold; its default of 0.04 leaves out-of-focus and dark pictures without features
THUMB = 64  # px, the long side of the thumbnail on which pixels are compared: too small to show blur or JPEG noise
FEATURES, WORDS = 200, 1024  # SIFT features kept, the strongest; size of the SIFT vocabulary
COLOUR_WEIGHT, COLOUR_BINS = 0.8, 6  # of the colours beside the words; for each channel
VECTOR = WORDS + COLOUR_BINS**3  # length of the vector of an image's words and colours
NEIGHBOURS = 12  # candidates for each image and kind of descriptor
PAIRS_A_TASK, FEW_PAIRS = 500, 2000  # for a process; that one verifies in less time than others take to start
# When a pair is accepted; measured by tests/bench/duplicates.py, with its table in docs/LOG.md
MIN_INLIERS = 6  # matched features that one similarity transform explains …
EDGE_BLUR, MIN_CORRELATION = 1.5, 0.965  # … with edges, blurred by so many px, that correlate so well
MIN_AREA = 0.02  # share of either image that the features' hull covers: a shared logo is no copy
SCALES = 0.3, 3.3  # of one image on the other; RANSAC's chance fits collapse to 0
MAX_BITS = 16  # of 63 by which the hashes of a pair may differ in the best orientation …
EDGE_BLUR_HASH, MIN_CORRELATION_HASH = 3, 0.99  # … with edges like this: images without features are soft
FINE_BLUR, MIN_CORRELATION_FINE = 1, 0.985  # surely so if finer edges correlate so well, or if the greys …
MAX_CONTRAST, MAX_GREYS = 0.15, 3  # … differ by at most this share of the contrast, or by so many levels
MIN_EDGES = 0.25  # grey levels a px: pictures whose edges are fainter on average prove nothing
HASH, SURE_HASH, FEATURES_AGREE = 0, 1, 2  # how certain an accepted pair is
IDENTICAL = -1, FEATURES, 1.0, FEATURES_AGREE  # the evidence where all pixels are the same
CHAIN, DRAWN = 8, 32  # images of the largest group that isn't checked; pairs drawn from a group to check it
LIMIT = np.array([8, 8, 0.2, 0.2])  # of a step in aligning two images: px right, px down, share of the size, angle
RECORD = np.dtype([  # all that is kept of one image
    ("count", np.int32),  # of features
    ("shape", np.int32, 2),  # height, width of the thumbnail
    ("digest", np.uint64),  # of all pixels; 0: they have one colour, as a failed scan, and prove nothing
    ("thumb", np.uint8, (THUMB, THUMB, 3)),
    ("dct", np.float32, (8, 8)),
    ("hashes", bool, (8, 63)),  # of the 8 orientations
    ("points", np.float32, (FEATURES, 2)),  # x, y of each feature in thumbnail px from the middle
    ("turned", bool, FEATURES),  # whether the feature's descriptor was mirrored
    ("descriptors", np.uint8, (FEATURES, 128)),
])  # fmt: skip
SIGNS = (1, 1), (-1, 1), (1, -1), (-1, -1)  # of x and y, from the middle
ORIENTATIONS = np.float32([np.diag(signs)[::step] for step in (1, -1) for signs in SIGNS])  # in the order of the hashes


def image_record(image):
    """Return the RECORD of an image, uint8 [H, W, 3] RGB."""
    record, grey = np.zeros((), RECORD), cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    if (image[0] != image[0, 0]).any() or (image != image[0, 0]).any():  # a row, since it mostly suffices
        digest = hashlib.blake2b(np.ascontiguousarray(image), digest_size=8, salt=str(image.shape[0]).encode())
        record["digest"] = int.from_bytes(digest.digest())
    scale = LONG_SIDE / max(grey.shape)
    size = [max(8, round(side * scale)) for side in grey.shape[::-1]]
    grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    dct = record["dct"] = cv2.dct(cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32))[:8, :8]
    # A hash: which coefficients, but the mean brightness, are above their median. Mirroring alternates the signs of odd
    # rows or columns, and a reflection at the diagonal transposes
    sign = (-1) ** np.arange(8)
    views = [dct, dct * sign, dct * sign[:, None], dct * sign * sign[:, None]]
    flat = np.stack([*views, *(view.T for view in views)]).reshape(8, 64)[:, 1:]
    record["hashes"] = flat > np.median(flat, axis=1, keepdims=True)
    height, width = record["shape"] = [max(2, round(side * THUMB / LONG_SIDE)) for side in grey.shape]
    blend = cv2.INTER_AREA if max(image.shape) > THUMB else cv2.INTER_LINEAR  # enlarged by area, pixels have edges
    record["thumb"][:height, :width] = cv2.resize(image, (width, height), interpolation=blend)
    low, high = np.percentile(grey, (1, 99))  # faint pictures have features too
    grey = np.clip((grey - low) * (255 / max(32, high - low)), 0, 255).astype(np.uint8)
    keypoints, descriptors = cv2.SIFT_create(FEATURES, contrastThreshold=CONTRAST).detectAndCompute(grey, None)
    count = record["count"] = min(len(keypoints), FEATURES)
    if count:
        middle = np.float32(size) / 2
        record["points"][:count] = (cv2.KeyPoint_convert(keypoints[:count]) - middle) * (THUMB / LONG_SIDE)
        # RootSIFT, the same for a mirrored patch. Mirroring reverses the rows of the 4 × 4 cells and the sense of the 8
        # directions: the first half of the directions is to weigh more (Ma et al. 2010, Arandjelović 2012)
        cells = descriptors[:count].reshape(-1, 4, 4, 8)
        turned = record["turned"][:count] = cells[..., 1:4].sum((1, 2, 3)) < cells[..., 5:8].sum((1, 2, 3))
        mirrored = cells[:, ::-1, :, (8 - np.arange(8)) % 8]
        cells = np.where(turned[:, None, None, None], mirrored, cells).reshape(count, 128)
        root = np.sqrt(cells / np.maximum(1e-9, cells.sum(axis=1, keepdims=True)))
        record["descriptors"][:count] = np.minimum(255, root * 512)
    return record


def thumbnail(record):
    """Return the thumbnail of a RECORD, uint8 [height, width, 3]."""
    return record["thumb"][*map(slice, record["shape"])]


def grey(record):
    """Return the thumbnail of a RECORD in grey, float32 [height, width]."""
    return cv2.cvtColor(thumbnail(record).astype(np.float32), cv2.COLOR_RGB2GRAY)


def candidate_pairs(records, *vectors):
    """Return the pairs i < j, int [P, 2], of images that may be duplicates: those of the same pixels, and neighbours by
    the DCT and by each of `vectors`, float32 [N, D] of unit length."""
    digests = records["digest"]
    order = np.argsort(digests, kind="stable")
    order = order[digests[order] > 0]
    same = digests[order[1:]] == digests[order[:-1]]
    pairs = [np.stack([order[:-1][same], order[1:][same]], axis=1)]
    pairs += [neighbour_pairs(points, NEIGHBOURS + 1) for points in (d4_blind(records["dct"]), *vectors)]
    pairs = np.sort(np.concatenate(pairs), axis=1)
    return np.unique(pairs[pairs[:, 0] < pairs[:, 1]], axis=0)


def words_and_colours(records, vectors, block=32):
    """Fill vectors [N, VECTOR], of unit length: SIFT features counted by visual word (features drawn at random), rare
    words weighted up (Sivic and Zisserman 2003), and colours, scaled so that light and tint don't matter."""
    rng, images_with = np.random.default_rng(0), np.zeros(WORDS)
    descriptors, exist = records["descriptors"], np.arange(FEATURES) < records["count"][:, None]
    drawn = np.sort(rng.permutation(len(records))[:WORDS])
    sample = descriptors[drawn][exist[drawn]].astype(np.float32)
    words = sample[rng.permutation(len(sample))[:WORDS]] if len(sample) else np.zeros((1, 128), np.float32)
    parts = [slice(start, start + block) for start in range(0, len(records), block)]
    for part in parts:
        word = (descriptors[part][exist[part]] @ words.T - (words**2).sum(axis=1) / 2).argmax(axis=1)
        cell = np.repeat(np.arange(len(records[part])), records["count"][part]) * WORDS + word
        vectors[part, :WORDS] = np.bincount(cell, minlength=len(records[part]) * WORDS).reshape(-1, WORDS)
        images_with += (vectors[part, :WORDS] > 0).sum(axis=0)
    rarity = 1 + np.log((1 + len(records)) / (1 + images_with))
    for part in parts:
        counts = vectors[part, :WORDS]
        weighted = normalize(((counts > 0) + np.log(np.maximum(1, counts))) * rarity)
        colours = []
        for pixels in (thumbnail(record).reshape(-1, 3).astype(np.float32) for record in records[part]):
            scaled = (pixels - pixels.mean(axis=0)) / (pixels.std(axis=0) + 5)
            cells = np.histogramdd(np.clip(scaled, -2.39, 2.39), COLOUR_BINS, [(-2.4, 2.4)] * 3)[0].ravel()
            colours.append(np.sqrt(cells / cells.sum()).astype(np.float32))
        vectors[part] = normalize(np.hstack([weighted, COLOUR_WEIGHT * np.array(colours)]))


def verified_pairs(records, pairs):
    """Verify candidate pairs, int [P, 2]. → (the accepted ones [M, 2], evidence float [M, 3]: bits, inliers,
    correlation). Outlines, such as leaves', form chains in which each is like the next and the ends are unlike: there
    only sure pairs are kept, and only those with features where these form chains too."""
    accepted, evidence = verify_all(records, pairs)
    for least in (HASH, SURE_HASH):
        kept = (evidence[:, 3] > least) | ~in_chains(records, accepted, evidence, least)
        accepted, evidence = accepted[kept], evidence[kept]
    return accepted, evidence[:, :3]


def in_chains(records, accepted, evidence, least):
    """Return whether an accepted pair is of a group with more than CHAIN images, of which most pairs aren't accepted or
    are less certain than `least`, bool [M]. Looks only at groups that pairs no more certain than `least` connect."""
    groups = components(accepted, len(records))
    weak = np.bincount(groups[accepted[evidence[:, 3] <= least, 0]], minlength=groups.max() + 1)
    checked = np.flatnonzero((weak > 0) & (np.bincount(groups) > CHAIN))
    if not len(checked):
        return np.zeros(len(accepted), bool)
    rng, members = np.random.default_rng(0), pd.Series(groups).groupby(groups).indices
    drawn = np.concatenate([rng.choice(members[group], (DRAWN, 2)) for group in checked])
    drawn = drawn[drawn[:, 0] != drawn[:, 1]]
    alike, certainty = verify_all(records, drawn)
    alike = alike[certainty[:, 3] >= least]
    counts = [np.bincount(groups[pair[:, 0]], minlength=len(weak)) for pair in (alike, drawn)]
    return (counts[0] < counts[1] / 2)[groups[accepted[:, 0]]]


def verify_all(records, pairs):
    """Verify pairs, int [P, 2], on all cores. → (the accepted ones [M, 2], evidence as `verify` returns it, float [M,
    4]). `records` must be all of a mapped file: joblib 1.5 crashes on a view of one field."""
    tasks, accepted = np.array_split(pairs, max(1, len(pairs) // PAIRS_A_TASK)), []
    with progress(len(pairs), "duplicates", "pair") as bar:
        pool = Parallel(cpu_count() if len(pairs) > FEW_PAIRS else 1, return_as="generator", max_nbytes=None)
        for task, rows in zip(tasks, pool(delayed(verify_task)(records, task) for task in tasks), strict=True):
            accepted += rows
            bar.update(len(task))
    accepted = np.array(accepted, np.float64).reshape(-1, 6)
    return accepted[:, :2].astype(np.int64), accepted[:, 2:]


def verify_task(records, pairs):
    """Return [(i, j, *evidence), …] of the accepted pairs. In one thread: each core has a task."""
    cv2.setNumThreads(1)
    with threadpool_limits(1):
        return [(i, j, *evidence) for i, j in pairs if (evidence := verify(records[i], records[j]))]


def labels_disagree(groups, labels):
    """Return whether the TrainingLabels of each image's group (int [N]) disagree, bool [N]. Numbers may differ by 5 %
    of their range, or half their standard deviation where that is less."""
    apart = pd.Series(labels.task.write_targets(labels.targets)).groupby(groups).transform("nunique") > 1
    if not labels.task.strata_are_classes:
        numbers = pd.DataFrame(labels.targets, dtype=np.float64)
        by_group, most = numbers.groupby(groups), np.minimum(0.05 * (numbers.max() - numbers.min()), numbers.std() / 2)
        apart &= (by_group.transform("max") - by_group.transform("min") > most).any(axis=1)
    return apart.to_numpy()


def table(pairs, evidence, groups, names, labels, disagree, test_names):
    """Return the table duplicates.csv of all images in groups of two or more: group, its size, part, image_name, label,
    whether the group's labels disagree (bool [N]), and the image's closest duplicate with the evidence. Its index is
    `groups`'."""
    images = pd.DataFrame(dict(
        group=groups, size=np.bincount(groups)[groups], part=["train"] * len(names) + ["test"] * len(test_names),
        image_name=[*names, *test_names], label=[*labels, *[None] * len(test_names)],
        labels_disagree=np.append(disagree, np.zeros(len(test_names), bool)).astype(int),
    ))  # fmt: skip
    images["labels_disagree"] = images.groupby("group").labels_disagree.transform("max")
    image, other = np.stack([pairs, pairs[:, ::-1]], axis=1).reshape(-1, 2).T  # each pair, seen from either image
    bits, inliers = np.repeat(evidence[:, :2].astype(int), 2, axis=0).T
    by_pixels, by_features = bits < 0, inliers > 0
    links = pd.DataFrame(dict(
        duplicate=(images.part + "/" + images.image_name)[other].array,
        found_by=np.where(by_pixels, "pixels", np.where(by_features, "features", "hash")), inliers=inliers,
        hash_bits=np.where(by_features, "", bits.astype(str)), correlation=np.repeat(evidence[:, 2], 2),
    ), index=image).sort_values(["inliers", "correlation"], ascending=False)  # fmt: skip
    closest = links[~links.index.duplicated()].round(4)
    return images.join(closest, how="inner").sort_values("group", kind="stable").fillna("")


def summary(groups, names, disagree):
    """Return what prepared.json keeps: counts, shares, and the names in each group whose labels disagree. groups: int
    [N + T], the training images first, of which `names` and disagree (bool [N]) are."""
    train, test, sizes = groups[: len(names)], groups[len(names) :], np.bincount(groups)
    in_train = np.bincount(train, minlength=len(sizes))
    conflicts = pd.Series(names)[disagree].groupby(train[disagree]).agg(list)
    return dict(
        groups=int((sizes > 1).sum()), largest=int(sizes.max()), largest_share=sizes.max() / len(groups),
        train_with_duplicate=(in_train[train] > 1).mean(), test_with_duplicate=(in_train[test] > 0).mean(),
        conflicts=conflicts.tolist(),
    )  # fmt: skip


def joined(pairs, evidence, given, count):
    """Return how many pairs of the first `count` images, the training images, are in different `given` groups, int [N +
    T]: [those of the same pixels, others]."""
    apart = (given[pairs[:, 0]] != given[pairs[:, 1]]) & (pairs.max(axis=1) < count)
    same = int((evidence[apart, 0] < 0).sum())
    return [same, int(apart.sum()) - same]


def shares_sources(counts):
    """Return whether test images are copies of training images about as often as training images are of others."""
    return counts["test_with_duplicate"] > max(0.05, 0.75 * counts["train_with_duplicate"])


def sources_in_words(count):
    return "one source" if count == 1 else f"{count} sources"


def duplicate_lines(counts):
    """Return sentences on what `summary` returned, and 00_prepare.py added, for the terminal and the report; none for
    None."""
    if counts is None:
        return []
    train, test, share = counts["train_with_duplicate"], counts["test_with_duplicate"], counts["largest_share"]
    joined, few, split, blank = (counts.get(key) for key in ("joined", "few", "split", "blank"))
    identical, near = joined or (0, 0)
    together, shared = train > max(0.05, 2 * test), test > max(0.05, train / 2)
    large = share > 0.02 and counts["largest"] > 20  # pairs may have chained unlike images
    conflicts = [" = ".join(names[:4]) for names in counts["conflicts"]]
    lines = {
        f"{counts['groups']} of two or more images, the largest of {counts['largest']} (duplicates.csv, .png)": True,
        f"{train:.1%} of the training and {test:.1%} of the test images have a duplicate in the training set": True,
        f"{blank} images of one colour, which are taken for copies of none": blank,
        f"different groups held {identical} identical pairs and {near} near copies, and are joined": any(joined or ()),
        f"warning: all images look like copies of {sources_in_words(few)} (same part, same camera?), too few for the "
        "folds, of which several hold each; if they are copies, the CV is too high": few,
        f"warning: {split} sources are in several folds, as in the test set: for new ones the CV is too high":
            split and not few,
        "duplicates stay in one fold: in several, they would make the CV too high": together and not split,
        "the test set shares sources with the training set: the CV may be too low": shared and not split,
        f"{len(conflicts)} whose labels disagree (a label is wrong, or the group is): {listing(conflicts)}": conflicts,
        f"warning: one group holds {share:.1%} of all images; if that is wrong, give --groups none": large,
    }  # fmt: skip
    return [line for line, holds in lines.items() if holds]


def verify(a, b):
    """Return the evidence that two RECORDs show one source, or None: (bits of 63 by which their hashes differ, or 63
    where features sufficed; matched features that agree, or 0 where the hashes decided; correlation of the edges; HASH,
    SURE_HASH or FEATURES_AGREE). IDENTICAL for the same pixels."""
    if a["digest"] == b["digest"] > 0:
        return IDENTICAL
    inliers, correlation = by_features(a, b)
    if correlation >= MIN_CORRELATION:
        return 63, inliers, correlation, FEATURES_AGREE
    bits = (a["hashes"] != b["hashes"][0]).sum(axis=1)
    best = int(bits.argmin())
    if bits[best] > MAX_BITS:
        return None
    scale = b["shape"] / (a["shape"][::-1] if best >= 4 else a["shape"])
    aligned = align(a, b, np.diag(scale[::-1]) @ ORIENTATIONS[best])
    correlation = edge_correlation(a, b, *aligned, EDGE_BLUR_HASH)
    if correlation < MIN_CORRELATION_HASH:
        return None
    sure = edge_correlation(a, b, *aligned, FINE_BLUR) >= MIN_CORRELATION_FINE or greys_agree(a, b, *aligned)
    return int(bits[best]), 0, correlation, SURE_HASH if sure else HASH


def by_features(a, b):
    """Return (inliers, correlation of the edges) of the similarity transform from a to b, mirrored or not, that
    explains the most matched features, by RANSAC; (0, 0.0) where none is sound."""
    if min(a["count"], b["count"]) < MIN_INLIERS:
        return 0, 0.0
    rows, columns = match_features(a, b)
    mirrored, most, transform = a["turned"][rows] != b["turned"][columns], 0, None
    for flip, chosen in (np.float32([1, 1]), ~mirrored), (np.float32([-1, 1]), mirrored):
        if chosen.sum() < MIN_INLIERS:
            continue
        from_a, to_b = a["points"][rows[chosen]], b["points"][columns[chosen]]
        matrix, inside = cv2.estimateAffinePartial2D(from_a * flip, to_b, ransacReprojThreshold=1.5, maxIters=500)
        if matrix is None or inside.sum() < max(MIN_INLIERS, most + 1):
            continue
        hulls = [cv2.convexHull(points[inside.ravel() > 0]) for points in (from_a, to_b)]
        covered = min(cv2.contourArea(hull) / on["shape"].prod() for hull, on in zip(hulls, (a, b), strict=True))
        if SCALES[0] <= np.hypot(matrix[0, 0], matrix[1, 0]) <= SCALES[1] and covered >= MIN_AREA:
            most, transform = int(inside.sum()), (matrix[:, :2] * flip, matrix[:, 2])
    return (most, edge_correlation(a, b, *transform)) if most else (0, 0.0)


def match_features(a, b):
    """Match the features of two RECORDs: mutual nearest neighbours whose second-best is clearly worse (Lowe's ratio,
    0.85). → their rows in a, and in b."""
    first, second = (record["descriptors"][: record["count"]].astype(np.float32) for record in (a, b))
    distance = first @ (-2 * second.T) + (second**2).sum(axis=1) + (first**2).sum(axis=1)[:, None]
    nearest, rows = distance.argmin(axis=1), np.arange(len(first))
    rows = rows[distance.argmin(axis=0)[nearest] == rows]
    best = distance[rows, nearest[rows]]
    distance[rows, nearest[rows]] = np.inf
    rows = rows[best < 0.85**2 * distance[rows].min(axis=1)]
    return rows, nearest[rows]


def align(a, b, turn):
    """Align image a, placed on b by `turn` [2, 2] from the middles: shift, rotate and scale it until the greys agree
    best up to brightness and contrast (Lucas and Kanade 1981). → (turn [2, 2], shift [2])."""
    greys, shift = [grey(record) for record in (a, b)], np.zeros(2)
    y, x = (np.float32(axis - (axis.size - 1) / 2) for axis in np.ogrid[*map(slice, b["shape"])])
    for blur in (4, 2, 2):  # px: coarse first
        image, other = (cv2.GaussianBlur(grey, (0, 0), blur) for grey in greys)
        image, seen = overlay(image, other, turn, shift)
        (dx, dy), one = edges(image), np.ones_like(image)
        effects = (np.stack([dx, dy, dx * x + dy * y, dy * x - dx * y, image, one]) * seen).reshape(6, -1)
        products = effects @ effects.T + np.eye(6)  # flat pictures have a solution too
        *step, contrast, _ = np.linalg.solve(products, effects @ other.ravel())
        right, down, larger, angle = np.clip(np.divide(step, max(contrast, 0.1)), -LIMIT, LIMIT)
        back = np.linalg.inv([[1 + larger, -angle], [angle, 1 + larger]])
        turn, shift = back @ turn, back @ (shift - (right, down))
    return turn, shift


def greys_agree(a, b, turn, shift):
    """Return whether the thumbnails' greys agree up to brightness and contrast, placed as in `edge_correlation`."""
    image, seen = overlay(grey(a), grey(b), turn, shift)
    x, y = image[seen > 0], grey(b)[seen > 0]
    contrast = y.std()
    apart = contrast * np.sqrt(max(0, 1 - np.corrcoef(x, y)[0, 1] ** 2))
    return apart <= max(MAX_GREYS, MAX_CONTRAST * contrast)


def edge_correlation(a, b, turn, shift, blur=EDGE_BLUR):
    """Return the correlation of the thumbnails' edges, in each colour, where they overlap, when the point x from the
    middle of a is at turn @ x + shift from the middle of b; 0 where the overlap is under a quarter of both."""
    image, other = (thumbnail(record).astype(np.float32) for record in (a, b))
    image, seen = overlay(image, other, turn, shift)
    if seen.sum() < 0.25 * min(b["shape"].prod(), a["shape"].prod() * abs(np.linalg.det(turn))):
        return 0.0
    x, y = (edges(cv2.GaussianBlur(side, (0, 0), blur)) * seen[..., None] for side in (image, other))
    norm = np.sqrt(np.vdot(x, x) * np.vdot(y, y))
    return float(np.vdot(x, y) / norm) if norm > MIN_EDGES**2 * seen.sum() else 0.0


def edges(image):
    """Return the change from pixel to pixel, to the right and down: float32 [H, W, …] → float32 [2, H, W, …]."""
    return np.stack([cv2.Sobel(image, cv2.CV_32F, *axis, scale=1 / 8) for axis in ((1, 0), (0, 1))])


def overlay(image, other, turn, shift):
    """Return (`image` placed on the `other`, continued beyond its borders; float32 of that size, 1 on the image)."""
    middle, other_middle = (np.array(side.shape[1::-1]) / 2 - 0.5 for side in (image, other))
    matrix, size = np.column_stack([turn, shift + other_middle - turn @ middle]), other.shape[1::-1]
    seen = cv2.warpAffine(np.ones(image.shape[:2], np.float32), matrix, size, flags=cv2.INTER_NEAREST)
    seen = cv2.erode(seen, np.ones((5, 5), np.uint8))  # edges at its borders are half made up
    return cv2.warpAffine(image, matrix, size, borderMode=cv2.BORDER_REPLICATE), seen
