"""Near-duplicate search: rotated, mirrored, cropped, rescaled, blurred or relit copies of one source photo.

All copies of a source belong in one fold. Each step narrows down what the next, slower one looks at. `image_record`
keeps a small thumbnail, the low frequencies of its DCT, and SIFT features blind to mirroring. `candidate_pairs` takes
each image's nearest neighbours by the DCT, and by SIFT words and colours: N × k pairs, not N². `verified_pairs` accepts
or rejects each pair, and `components` makes groups of the accepted ones.
"""

from common import cpu_count, listing, progress

import cv2
import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from scipy.sparse import coo_matrix, csgraph
from sklearn.preprocessing import normalize  # scales each row to length 1; a row of zeros stays so
from threadpoolctl import threadpool_limits

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
MIN_EDGES = 0.25  # grey levels a px: pictures whose edges are fainter on average prove nothing
LIMIT = np.array([8, 8, 0.2, 0.2])  # of a step in aligning two images: px right, px down, share of the size, angle
RECORD = np.dtype([  # all that is kept of one image
    ("count", np.int32),  # of features
    ("shape", np.int32, 2),  # height, width of the thumbnail
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


def candidate_pairs(records, vectors, block=64):
    """Return the pairs i < j, int [P, 2], of images that may be duplicates: neighbours by the DCT, and by `vectors`,
    float32 [N, D] of unit length. N² products, but a block of rows at a time: scikit-learn's takes 1 GB."""
    count, pairs = min(NEIGHBOURS + 1, len(records)), []
    for points in (d4_blind(records["dct"]), vectors):
        for start in range(0, len(points), block):
            similarity = points[start : start + block] @ points.T
            neighbours = np.argpartition(similarity, -count, axis=1)[:, -count:].astype(np.int32)
            images = np.arange(start, start + len(neighbours), dtype=np.int32)
            pairs.append(np.stack([np.repeat(images, count), neighbours.ravel()], axis=1))
    pairs = np.sort(np.concatenate(pairs), axis=1)
    return np.unique(pairs[pairs[:, 0] < pairs[:, 1]], axis=0)


def d4_blind(dct):
    """Return vectors of unit length, float [N, 70], from DCT blocks [N, 8, 8], the same for all 8 orientations and any
    brightness and contrast: sums and differences of the magnitudes of each two coefficients that a transpose swaps."""
    rows, columns = np.array(np.triu_indices(8))[:, 1:]  # without the first one, the mean brightness
    upper, lower = np.abs(dct[:, rows, columns]), np.abs(dct[:, columns, rows])
    return normalize(np.hstack([upper + lower, np.abs(upper - lower)]))


def words_and_colours(records, vectors, block=256):
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
    """Verify candidate pairs, int [P, 2], on all cores. → (the accepted ones [M, 2], evidence float [M, 3]: bits,
    inliers, correlation). `records` must be all of a mapped file: joblib 1.5 crashes on a view of one field."""
    tasks, accepted = np.array_split(pairs, max(1, len(pairs) // PAIRS_A_TASK)), []
    with progress(len(pairs), "duplicates", "pair") as bar:
        pool = Parallel(cpu_count() if len(pairs) > FEW_PAIRS else 1, return_as="generator", max_nbytes=None)
        for task, rows in zip(tasks, pool(delayed(verify_task)(records, task) for task in tasks), strict=True):
            accepted += rows
            bar.update(len(task))
    accepted = np.array(accepted, np.float64).reshape(-1, 5)
    return accepted[:, :2].astype(np.int64), accepted[:, 2:]


def verify_task(records, pairs):
    """Return [(i, j, bits, inliers, correlation), …] of the accepted pairs. In one thread: each core has a task."""
    cv2.setNumThreads(1)
    with threadpool_limits(1):
        return [(i, j, *evidence) for i, j in pairs if (evidence := verify(records[i], records[j]))]


def components(pairs, count):
    """Return the group of each image, int [count], numbered by first image: those that `pairs` connect share one."""
    graph = coo_matrix((np.ones(len(pairs)), pairs.T), (count, count))
    return pd.factorize(csgraph.connected_components(graph, directed=False)[1])[0]


def table(pairs, evidence, groups, names, labels, test_names):
    """Return the table duplicates.csv of all images in groups of two or more: group, its size, part, image_name, label,
    whether the group's labels disagree, and the image's closest duplicate with the evidence. Its index is `groups`'."""
    images = pd.DataFrame(dict(
        group=groups, size=np.bincount(groups)[groups], part=["train"] * len(names) + ["test"] * len(test_names),
        image_name=[*names, *test_names], label=[*labels, *[None] * len(test_names)],
    ))  # fmt: skip
    images["labels_disagree"] = (images.groupby("group").label.transform("nunique") > 1).astype(int)
    image, other = np.stack([pairs, pairs[:, ::-1]], axis=1).reshape(-1, 2).T  # each pair, seen from either image
    bits, inliers = np.repeat(evidence[:, :2].astype(int), 2, axis=0).T
    links = pd.DataFrame(dict(
        duplicate=(images.part + "/" + images.image_name)[other].array, found_by=np.where(inliers, "features", "hash"),
        inliers=inliers, hash_bits=np.where(inliers, "", bits.astype(str)), correlation=np.repeat(evidence[:, 2], 2),
    ), index=image).sort_values(["inliers", "correlation"], ascending=False)  # fmt: skip
    closest = links[~links.index.duplicated()].round(4)
    return images.join(closest, how="inner").sort_values("group", kind="stable").fillna("")


def summary(groups, names, labels):
    """Return what prepared.json keeps: counts, shares, and the names in each group whose labels disagree. groups: int
    [N + T], the training images first, of which `names` and `labels` are."""
    train, test, sizes = groups[: len(names)], groups[len(names) :], np.bincount(groups)
    in_train = np.bincount(train, minlength=len(sizes))
    in_group = pd.DataFrame(dict(name=names, label=labels)).groupby(train)
    return dict(
        groups=int((sizes > 1).sum()), largest=int(sizes.max()), largest_share=sizes.max() / len(groups),
        train_with_duplicate=(in_train[train] > 1).mean(), test_with_duplicate=(in_train[test] > 0).mean(),
        conflicts=in_group.name.agg(list)[in_group.label.nunique() > 1].tolist(),
    )  # fmt: skip


def duplicate_lines(counts):
    """Return sentences on what `summary` returned, for the terminal and the report; none for None."""
    if counts is None:
        return []
    train, test, share = counts["train_with_duplicate"], counts["test_with_duplicate"], counts["largest_share"]
    large = share > 0.02 and counts["largest"] > 20  # pairs may have chained unlike images
    conflicts = [" = ".join(names[:4]) for names in counts["conflicts"]]
    lines = {
        f"{counts['groups']} of two or more images, the largest of {counts['largest']} (duplicates.csv, .png)": True,
        f"{train:.1%} of the training and {test:.1%} of the test images have a duplicate in the training set": True,
        "duplicates stay in one fold: in several, they would make the CV too high": train > max(0.05, 2 * test),
        "the test set shares sources with the training set: the CV may be too low": test > max(0.05, train / 2),
        f"{len(conflicts)} whose labels disagree (a label is wrong, or the group is): {listing(conflicts)}": conflicts,
        f"warning: one group holds {share:.1%} of all images; if that is wrong, give --groups none or FILE.csv": large,
    }
    return [line for line, holds in lines.items() if holds]


def verify(a, b):
    """Return the evidence that two RECORDs show one source, or None: (bits of 63 by which their hashes differ, or 63
    where features sufficed; matched features that agree, or 0 where the hashes decided; correlation of the edges)."""
    inliers, correlation = by_features(a, b)
    if correlation >= MIN_CORRELATION:
        return 63, inliers, correlation
    bits = (a["hashes"] != b["hashes"][0]).sum(axis=1)
    best = int(bits.argmin())
    if bits[best] > MAX_BITS:
        return None
    scale = b["shape"] / (a["shape"][::-1] if best >= 4 else a["shape"])
    correlation = edge_correlation(a, b, *align(a, b, np.diag(scale[::-1]) @ ORIENTATIONS[best]), EDGE_BLUR_HASH)
    return (int(bits[best]), 0, correlation) if correlation >= MIN_CORRELATION_HASH else None


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
    greys = [cv2.cvtColor(thumbnail(record).astype(np.float32), cv2.COLOR_RGB2GRAY) for record in (a, b)]
    shift = np.zeros(2)
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
