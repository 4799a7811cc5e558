"""Finds images that show one source photo: rotated, mirrored, cropped, rescaled, blurred or relit copies of it.

Used by 00_prepare.py, so that all copies of a source stay in one fold. Three steps, each narrowing what the next,
dearer one looks at:

1. Each image is described once (`describe`): a small grey thumbnail; the low 8 × 8 block of its DCT; SIFT features,
   made blind to mirroring.
2. Each image's likely relatives (`candidates`): its nearest neighbours in the DCT block and in a bag of SIFT words.
   N × k pairs, not N².
3. Each candidate pair is judged (`verify`): the best of the 8 orientations by the DCT hash, and the similarity transform
   that RANSAC fits to the matched features, propose how one image lies on the other; the pair is accepted where the
   pixels then agree as well.

Connected components of the accepted pairs are the groups.
"""

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import connected_components

from common import cpu_count, progress

LONG_SIDE = 256  # px at which SIFT looks: 10 ms an image; smaller copies are enlarged to it
THUMB = 64  # px, the long side of the thumbnail on which pixels are compared: too small to show blur or JPEG noise
FEATURES = 300  # SIFT features kept, the strongest
CONTRAST = 0.01  # SIFT's threshold; its default of 0.04 leaves out-of-focus and dark pictures without features
WORDS = 2048  # size of the SIFT vocabulary
NEIGHBOURS = 20  # candidates per image and kind of descriptor

# Accepting a pair. Measured by tests/bench/copies.py, whose table is in README.md.
MIN_INLIERS = 5  # matched features that one similarity transform explains …
MIN_CORRELATION = 0.85  # … when the pixels that it lays on each other correlate so well, colour by colour
SURE_INLIERS = 20  # so many need less support from the pixels:
SURE_CORRELATION = 0.4
MIN_AREA = 0.02  # share of either image that the features' hull covers: a shared logo is no copy
SCALES = 0.3, 3.3  # of one image on the other; RANSAC's chance fits collapse to 0
MAX_BITS = 12  # of 63 by which the DCT hashes of a pair may differ in the best orientation …
MIN_CORRELATION_HASH = 0.9  # … when the pixels correlate so well

RECORD = np.dtype(
    [
        ("count", np.int32),
        ("shape", np.int32, 2),  # height, width of the thumbnail
        ("thumb", np.uint8, (THUMB, THUMB, 3)),
        ("dct", np.float32, (8, 8)),
        ("points", np.float32, (FEATURES, 2)),  # x, y in thumbnail px from the middle
        ("descriptors", np.uint8, (FEATURES, 128)),
    ]
)

# ---------------------------------------------------------------- 1. one image


def describe(image):
    """uint8 [H, W, 3] RGB → a RECORD."""
    record = np.zeros((), RECORD)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    scale = LONG_SIDE / max(grey.shape)
    size = [max(8, round(side * scale)) for side in grey.shape[::-1]]
    grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    record["dct"] = cv2.dct(cv2.resize(grey, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32))[:8, :8]
    ratio = THUMB / LONG_SIDE
    height, width = (max(2, round(side * ratio)) for side in grey.shape)
    record["shape"] = height, width
    record["thumb"][:height, :width] = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    low, high = np.percentile(grey, (1, 99))  # faint pictures have features too
    grey = np.clip((grey - low) * (255 / max(32, high - low)), 0, 255).astype(np.uint8)
    keypoints, descriptors = cv2.SIFT_create(FEATURES, contrastThreshold=CONTRAST).detectAndCompute(grey, None)
    count = min(len(keypoints), FEATURES)
    record["count"] = count
    if count:
        points = np.array([keypoint.pt for keypoint in keypoints[:count]], np.float32)
        record["points"][:count] = (points - np.array(size, np.float32) / 2) * ratio
        record["descriptors"][:count] = mirror_blind(descriptors[:count])
    return record


def mirror_blind(descriptors):
    """SIFT descriptors float32 [F, 128] → RootSIFT uint8 [F, 128] (Arandjelović and Zisserman 2012), the same for a
    mirrored patch.

    A mirrored patch has the rows of the 4 × 4 cells and the sense of the 8 directions reversed. Of both readings, the
    one with more weight in the first half of the directions is taken, as mirror-invariant SIFT does (Ma et al. 2010).
    """
    cells = descriptors.reshape(-1, 4, 4, 8)
    mirrored = cells[:, ::-1, :, (8 - np.arange(8)) % 8]
    turn = cells[..., 1:4].sum((1, 2, 3)) < cells[..., 5:8].sum((1, 2, 3))
    cells = np.where(turn[:, None, None, None], mirrored, cells).reshape(len(cells), 128)
    root = np.sqrt(cells / np.maximum(1e-9, cells.sum(axis=1, keepdims=True)))
    return np.minimum(255, root * 512).astype(np.uint8)


def d4_dcts(dct):
    """DCT blocks [..., 8, 8] → [8, ..., 8, 8]: those of the image's 8 orientations. Mirroring alternates the signs of
    the odd rows or columns, and a reflection at the diagonal transposes; orientation o is ORIENTATIONS[o]."""
    sign = np.where(np.arange(8) % 2, -1.0, 1.0).astype(np.float32)
    views = [dct, dct * sign, dct * sign[:, None], dct * sign * sign[:, None]]
    return np.stack([*views, *(np.swapaxes(view, -1, -2) for view in views)])


# orientation o as a 2 × 2 matrix on (x, y) from the middle, in the order of d4_dcts
_FLIPS = [np.diag(signs) for signs in ((1, 1), (-1, 1), (1, -1), (-1, -1))]
ORIENTATIONS = np.array([*_FLIPS, *(np.array([[0, 1], [1, 0]]) @ flip for flip in _FLIPS)], np.float32)


def hash_bits(dct):
    """DCT blocks [..., 8, 8] → bool [..., 63]: above the block's median or not, the mean brightness left out."""
    flat = dct.reshape(*dct.shape[:-2], 64)[..., 1:]
    return flat > np.median(flat, axis=-1, keepdims=True)


# ---------------------------------------------------------------- 2. likely relatives


def candidates(records, embedding=None):
    """→ int [P, 2], pairs i < j of images that may be relatives: the nearest neighbours by DCT and by bag of words, or
    by `embedding` [N, D] in place of the words."""
    from sklearn.neighbors import NearestNeighbors

    count = min(NEIGHBOURS + 1, len(records))
    words = bag_of_words(records) if embedding is None else embedding
    pairs = []
    for vectors, metric in ((d4_blind(records["dct"]), "euclidean"), (words, "cosine")):
        near = NearestNeighbors(n_neighbors=count, metric=metric, n_jobs=-1).fit(vectors)
        found = near.kneighbors(vectors, return_distance=False)
        pairs.append(np.stack([np.repeat(np.arange(len(records)), count), found.ravel()], axis=1))
    pairs = np.sort(np.concatenate(pairs), axis=1)
    return np.unique(pairs[pairs[:, 0] < pairs[:, 1]], axis=0)


def d4_blind(dct):
    """DCT blocks [N, 8, 8] → float [N, 72], unit length, the same for all 8 orientations and any brightness and
    contrast: of each pair of coefficients mirrored at the diagonal, the sum and difference of the magnitudes."""
    size = np.abs(dct)
    size[:, 0, 0] = 0
    lower, upper = size, np.swapaxes(size, 1, 2)
    rows, columns = np.triu_indices(8)
    both = np.concatenate([(lower + upper)[:, rows, columns], np.abs(lower - upper)[:, rows, columns]], axis=1)
    return both / np.maximum(1e-6, np.linalg.norm(both, axis=1, keepdims=True))


def bag_of_words(records, sample=60_000, block=512):
    """RECORDs [N] → sparse [N, WORDS], each image's SIFT features counted by visual word, rare words weighted up
    (Sivic and Zisserman 2003), unit length."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.feature_extraction.text import TfidfTransformer

    rng = np.random.default_rng(0)
    counts = records["count"]
    chosen = rng.permutation(len(records))[: max(1, 4 * sample // FEATURES)]
    some = np.concatenate([records["descriptors"][i][: counts[i]] for i in chosen] or [np.zeros((1, 128))])
    some = rng.permutation(some)[:sample].astype(np.float32)
    if len(some) < 2:
        return csr_matrix((len(records), WORDS))
    words = min(WORDS, max(1, len(some) // 8))
    codebook = MiniBatchKMeans(words, batch_size=4096, n_init=1, max_iter=20, random_state=0).fit(some)
    bags = []
    for start in range(0, len(records), block):
        part = records[start : start + block]
        mask = np.arange(FEATURES) < part["count"][:, None]
        found = codebook.predict(part["descriptors"][mask].astype(np.float32)) if mask.any() else []
        rows = np.repeat(np.arange(len(part)), part["count"])
        bags.append(csr_matrix((np.ones(len(rows)), (rows, found)), (len(part), words)))
    from scipy.sparse import vstack

    return TfidfTransformer(sublinear_tf=True).fit_transform(vstack(bags))


# ---------------------------------------------------------------- 3. a pair


def verify(a, b):
    """Two RECORDs → (bits of 63 by which their hashes differ, matched features that agree, correlation of the pixels),
    or None where they are no relatives."""
    inliers, correlation = by_features(a, b)
    if inliers and correlation >= (SURE_CORRELATION if inliers >= SURE_INLIERS else MIN_CORRELATION):
        return 63, inliers, correlation
    views = hash_bits(d4_dcts(a["dct"]))
    bits = (views != hash_bits(b["dct"])).sum(axis=1)
    best = int(bits.argmin())
    if bits[best] <= MAX_BITS:
        scale = b["shape"] / (a["shape"][::-1] if best >= 4 else a["shape"])
        correlation = overlap_correlation(a, b, np.diag(scale[::-1]) @ ORIENTATIONS[best], np.zeros(2))
        if correlation >= MIN_CORRELATION_HASH:
            return int(bits[best]), 0, correlation
    return None


def by_features(a, b):
    """→ (inliers, correlation of the pixels) of the best similarity transform, mirrored or not, of a on b; (0, 0) where
    none is sound."""
    if min(a["count"], b["count"]) < MIN_INLIERS:
        return 0, 0.0
    matched_a, matched_b = match(a, b)
    best = 0, 0.0
    if len(matched_a) < MIN_INLIERS:
        return best
    for mirror in (1, -1):
        flip = np.array([mirror, 1], np.float32)
        matrix, inside = cv2.estimateAffinePartial2D(
            matched_a * flip, matched_b, method=cv2.RANSAC, ransacReprojThreshold=1.5, maxIters=1000, confidence=0.99
        )
        if matrix is None:
            continue
        inside = inside.ravel().astype(bool)
        inliers, scale = int(inside.sum()), float(np.hypot(matrix[0, 0], matrix[1, 0]))
        if inliers < MIN_INLIERS or inliers <= best[0] or not SCALES[0] <= scale <= SCALES[1]:
            continue
        if min(covered(matched_a[inside], a), covered(matched_b[inside], b)) >= MIN_AREA:
            best = inliers, overlap_correlation(a, b, matrix[:, :2] * flip, matrix[:, 2])
    return best


def match(a, b):
    """Mutual nearest neighbours whose second-best is clearly worse (Lowe's ratio, 0.85). → points of a, points of b."""
    first, second = (r["descriptors"][: r["count"]].astype(np.float32) for r in (a, b))
    product = first @ second.T
    distance = (first**2).sum(1)[:, None] + (second**2).sum(1) - 2 * product
    nearest = distance.argmin(axis=1)
    rows = np.arange(len(first))
    two = np.partition(distance, 1, axis=1)[:, :2]
    keep = (distance.argmin(axis=0)[nearest] == rows) & (two[:, 0] < 0.85**2 * two[:, 1])
    return a["points"][rows[keep]], b["points"][nearest[keep]]


def covered(points, record):
    """Share of the image inside the points' convex hull."""
    return cv2.contourArea(cv2.convexHull(points)) / float(record["shape"].prod())


def overlap_correlation(a, b, turn, shift):
    """Correlation of the thumbnails where they overlap, when x from the middle of a lies at turn @ x + shift from the
    middle of b; blind to brightness and contrast. The overlap must be a quarter of b or a quarter of a."""
    (ha, wa), (hb, wb) = a["shape"], b["shape"]
    middle_a, middle_b = np.array([wa, ha]) / 2 - 0.5, np.array([wb, hb]) / 2 - 0.5
    matrix = np.column_stack([turn, shift + middle_b - turn @ middle_a]).astype(np.float64)
    size = int(wb), int(hb)
    seen = cv2.warpAffine(np.full((ha, wa), 255, np.uint8), matrix, size, flags=cv2.INTER_NEAREST) > 0
    if seen.sum() < 0.25 * min(hb * wb, ha * wa * abs(np.linalg.det(turn))):
        return 0.0
    moved = cv2.warpAffine(np.ascontiguousarray(a["thumb"][:ha, :wa]), matrix, size, flags=cv2.INTER_LINEAR)
    x, y = moved[seen].astype(np.float64), b["thumb"][:hb, :wb][seen].astype(np.float64)
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)  # by colour: equal outlines in other colours are other products
    norm = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / norm) if norm > len(x) else 0.0  # flat pictures prove nothing


# ---------------------------------------------------------------- all


def relatives(records, pairs, description="relatives"):
    """Verifies the candidate pairs on all cores. → (pairs [M, 2], evidence [M, 3]: bits, inliers, correlation)."""

    def judge(block):
        cv2.setRNGSeed(0)
        return [verify(records[i], records[j]) for i, j in block]

    blocks = np.array_split(pairs, max(1, len(pairs) // 200))
    found = []
    with ThreadPoolExecutor(cpu_count()) as pool, progress(len(pairs), description, "pair") as bar:
        for block, results in zip(blocks, pool.map(judge, blocks), strict=True):
            found += [(*pair, *result) for pair, result in zip(block, results, strict=True) if result]
            bar.update(len(block))
    found = np.array(found, np.float64).reshape(-1, 5)
    return found[:, :2].astype(np.int64), found[:, 2:]


def components(pairs, count):
    """Connected components of `count` images joined by pairs [M, 2] → group numbers int [count], in order of the first
    image of each."""
    graph = coo_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), (count, count))
    labels = connected_components(graph, directed=False)[1]
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]
