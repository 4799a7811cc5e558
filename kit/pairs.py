"""Does a pair of images show one source photo?

`verify` lays one image on the other in two ways, and believes it where the pixels then agree: by features that look
alike, where one similarity transform explains several of them; and by hashes of the DCT, in the best of 8 orientations.
"""

import cv2
import numpy as np

THUMB = 64  # px, the long side of the thumbnail on which pixels are compared: too small to show blur or JPEG noise
FEATURES = 200  # SIFT features kept, the strongest

# What makes a pair: measured by tests/bench/copies.py, whose table is in docs/measured.md.
MIN_INLIERS = 5  # matched features that one similarity transform explains …
MIN_CORRELATION = 0.88  # … where the pixels correlate so well, colour by colour: an outline in other colours is no copy
MIN_AREA = 0.02  # share of either image that the features' hull covers: a shared logo is no copy
SCALES = 0.3, 3.3  # of one image on the other; RANSAC's chance fits collapse to 0
MAX_BITS = 12  # of 63 by which the hashes of a pair may differ in the best orientation …
MIN_CORRELATION_HASH = 0.9  # … where the pixels correlate so well

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

# Orientation o as a 2 × 2 matrix on (x, y) from the middle, in the order of d4_hashes.
_FLIPS = [np.diag(signs) for signs in ((1, 1), (-1, 1), (1, -1), (-1, -1))]
ORIENTATIONS = np.array([*_FLIPS, *(flip[::-1] for flip in _FLIPS)], np.float32)


def d4_hashes(dct):
    """DCT block float32 [8, 8] of an image → bool [8, 63], the hashes of its 8 orientations: whether a coefficient is
    above their median; the mean brightness is left out. Mirroring alternates the signs of the odd rows or columns, and
    a reflection at the diagonal transposes."""
    sign = (-1) ** np.arange(8)
    views = [dct, dct * sign, dct * sign[:, None], dct * sign * sign[:, None]]
    flat = np.stack([*views, *(view.T for view in views)]).reshape(8, 64)[:, 1:]
    return flat > np.median(flat, axis=1, keepdims=True)


def mirror_blind(descriptors):
    """SIFT descriptors float32 [F, 128] → (RootSIFT uint8 [F, 128], the same for a mirrored patch; bool [F], if the
    patch was read mirrored for that). Mirroring reverses the rows of the 4 × 4 cells and the sense of the 8 directions.
    The reading with more weight in the first half of the directions counts (Ma et al. 2010, Arandjelović 2012)."""
    cells = descriptors.reshape(-1, 4, 4, 8)
    mirrored = cells[:, ::-1, :, (8 - np.arange(8)) % 8]
    turn = cells[..., 1:4].sum((1, 2, 3)) < cells[..., 5:8].sum((1, 2, 3))
    cells = np.where(turn[:, None, None, None], mirrored, cells).reshape(len(cells), 128)
    root = np.sqrt(cells / np.maximum(1e-9, cells.sum(axis=1, keepdims=True)))
    return np.minimum(255, root * 512).astype(np.uint8), turn


def verify(a, b):
    """Two RECORDs → the evidence that they show one source, or None: (bits of 63 by which their hashes differ, matched
    features that agree, correlation of the pixels). Features come first; bits are 63 where they sufficed, and the
    features 0 where the hashes decided."""
    inliers, correlation = by_features(a, b)
    if correlation >= MIN_CORRELATION:
        return 63, inliers, correlation
    bits = (a["hashes"] != b["hashes"][0]).sum(axis=1)
    best = int(bits.argmin())
    if bits[best] > MAX_BITS:
        return None
    scale = b["shape"] / (a["shape"][::-1] if best >= 4 else a["shape"])
    correlation = overlap_correlation(a, b, np.diag(scale[::-1]) @ ORIENTATIONS[best], np.zeros(2))
    return (int(bits[best]), 0, correlation) if correlation >= MIN_CORRELATION_HASH else None


def by_features(a, b):
    """→ (inliers, correlation of the pixels) of the similarity transform of a on b, mirrored or not, that explains the
    most matched features; (0, 0.0) where none is sound."""
    if min(a["count"], b["count"]) < MIN_INLIERS:
        return 0, 0.0
    rows, columns = match(a, b)
    mirrored = a["turned"][rows] != b["turned"][columns]
    readings = (np.float32([1, 1]), ~mirrored), (np.float32([-1, 1]), mirrored)
    fits = [fit(a, b, rows[chosen], columns[chosen], flip) for flip, chosen in readings if chosen.sum() >= MIN_INLIERS]
    inliers, *transform = max(fits, key=lambda fitted: fitted[0], default=(0,))
    return (inliers, overlap_correlation(a, b, *transform)) if inliers else (0, 0.0)


def fit(a, b, rows, columns, flip):
    """Fits by RANSAC the similarity transform that takes features `rows` of a, times `flip` (x, y), to `columns` of b.
    → (inliers, turn [2, 2], shift [2]); (0, None, None) where it is unsound."""
    from_a, to_b = a["points"][rows], b["points"][columns]
    matrix, inside = cv2.estimateAffinePartial2D(from_a * flip, to_b, ransacReprojThreshold=1.5, maxIters=500)
    if matrix is None or inside.sum() < MIN_INLIERS:
        return 0, None, None
    hulls = [cv2.convexHull(points[inside.ravel() > 0]) for points in (from_a, to_b)]
    covered = min(cv2.contourArea(hull) / side["shape"].prod() for hull, side in zip(hulls, (a, b), strict=True))
    sound = SCALES[0] <= np.hypot(matrix[0, 0], matrix[1, 0]) <= SCALES[1] and covered >= MIN_AREA
    return (int(inside.sum()), matrix[:, :2] * flip, matrix[:, 2]) if sound else (0, None, None)


def match(a, b):
    """Matches features: mutual nearest neighbours whose second-best is clearly worse (Lowe's ratio, 0.85).
    → their rows in a and in b."""
    first, second = (record["descriptors"][: record["count"]].astype(np.float32) for record in (a, b))
    distance = (first**2).sum(1)[:, None] + (second**2).sum(1) - 2 * (first @ second.T)
    nearest, rows = distance.argmin(axis=1), np.arange(len(first))
    rows = rows[distance.argmin(axis=0)[nearest] == rows]
    two = np.partition(distance[rows], 1, axis=1)[:, :2]
    rows = rows[two[:, 0] < 0.85**2 * two[:, 1]]
    return rows, nearest[rows]


def overlap_correlation(a, b, turn, shift):
    """Correlation of the thumbnails' pixels where they overlap, when x from the middle of a lies at turn @ x + shift
    from the middle of b. Brightness and contrast don't matter. 0 where the overlap is under a quarter of both."""
    (ha, wa), (hb, wb) = a["shape"].tolist(), b["shape"].tolist()
    middle_a, middle_b = np.array([wa, ha]) / 2 - 0.5, np.array([wb, hb]) / 2 - 0.5
    matrix = np.column_stack([turn, shift + middle_b - turn @ middle_a]).astype(np.float64)
    seen = cv2.warpAffine(np.full((ha, wa), 255, np.uint8), matrix, (wb, hb), flags=cv2.INTER_NEAREST) > 0
    if seen.sum() < 0.25 * min(hb * wb, ha * wa * abs(np.linalg.det(turn))):
        return 0.0
    moved = cv2.warpAffine(np.ascontiguousarray(a["thumb"][:ha, :wa]), matrix, (wb, hb))
    x, y = (pixels[seen] - pixels[seen].mean(axis=0) for pixels in (moved, b["thumb"][:hb, :wb]))  # colour by colour
    norm = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / norm) if norm > len(x) else 0.0  # flat pictures prove nothing
