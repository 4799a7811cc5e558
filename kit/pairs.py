"""Does a pair of images show one source photo?

`verify` lays one image on the other in two ways: by features that look alike, where one similarity transform explains
several of them; and by hashes of the DCT, in the best of 8 orientations, moved until the greys agree best. It believes
it where the *edges* then agree. Light and dark areas lie alike in many pictures (two digits, two hands, two shirts on
one carpet: their pixels correlate by 0.9 and more), but the edges of two photos hardly ever fall on each other.
"""

import cv2
import numpy as np

THUMB = 64  # px, the long side of the thumbnail on which pixels are compared: too small to show blur or JPEG noise
FEATURES = 200  # SIFT features kept, the strongest

# What makes a pair: measured by tests/bench/copies.py, whose table is in docs/measured.md.
MIN_INLIERS = 6  # matched features that one similarity transform explains …
EDGE_BLUR = 1.5  # px: edges that lie half a pixel apart still agree
MIN_CORRELATION = 0.965  # … where the edges, so blurred, correlate so well; those of two shirts on one bed reach 0.954
MIN_AREA = 0.02  # share of either image that the features' hull covers: a shared logo is no copy
SCALES = 0.3, 3.3  # of one image on the other; RANSAC's chance fits collapse to 0
MAX_BITS = 16  # of 63 by which the hashes of a pair may differ in the best orientation …
EDGE_BLUR_HASH = 3  # px: what has no features is soft, and noise or other pixels change its fine edges
MIN_CORRELATION_HASH = 0.99  # … where the edges, so blurred, correlate so well: they are all the evidence
MIN_EDGES = 0.25  # grey levels a px: pictures whose edges are fainter on average prove nothing
BLURS = 4, 2, 2  # px, while one image is moved on the other: coarse first
LIMITS = [-8, -8, -0.2, -0.2], [8, 8, 0.2, 0.2]  # px right, px down, share of the size, angle by which each may move it

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
    features that agree, correlation of the edges). Features come first; bits are 63 where they sufficed, and the
    features 0 where the hashes decided."""
    inliers, correlation = by_features(a, b)
    if correlation >= MIN_CORRELATION:
        return 63, inliers, correlation
    bits = (a["hashes"] != b["hashes"][0]).sum(axis=1)
    best = int(bits.argmin())
    if bits[best] > MAX_BITS:
        return None
    scale = b["shape"] / (a["shape"][::-1] if best >= 4 else a["shape"])
    correlation = edge_correlation(a, b, *moved(a, b, np.diag(scale[::-1]) @ ORIENTATIONS[best]), EDGE_BLUR_HASH)
    return (int(bits[best]), 0, correlation) if correlation >= MIN_CORRELATION_HASH else None


def by_features(a, b):
    """→ (inliers, correlation of the edges) of the similarity transform of a on b, mirrored or not, that explains the
    most matched features; (0, 0.0) where none is sound."""
    if min(a["count"], b["count"]) < MIN_INLIERS:
        return 0, 0.0
    rows, columns = match(a, b)
    mirrored = a["turned"][rows] != b["turned"][columns]
    readings = (np.float32([1, 1]), ~mirrored), (np.float32([-1, 1]), mirrored)
    fits = [fit(a, b, rows[chosen], columns[chosen], flip) for flip, chosen in readings if chosen.sum() >= MIN_INLIERS]
    inliers, *transform = max(fits, key=lambda fitted: fitted[0], default=(0,))
    return (inliers, edge_correlation(a, b, *transform)) if inliers else (0, 0.0)


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
    distance = first @ (-2 * second.T)
    distance += np.einsum("ij,ij->i", second, second)
    distance += np.einsum("ij,ij->i", first, first)[:, None]
    nearest, rows = distance.argmin(axis=1), np.arange(len(first))
    rows = rows[distance.argmin(axis=0)[nearest] == rows]
    best = distance[rows, nearest[rows]]
    distance[rows, nearest[rows]] = np.inf
    rows = rows[best < 0.85**2 * distance[rows].min(axis=1)]
    return rows, nearest[rows]


def moved(a, b, turn):
    """Moves image a, laid on b by `turn` [2, 2] from the middles: shifts, turns, scales it until the greys agree best
    up to brightness and contrast (Lucas and Kanade 1981). → (turn [2, 2], shift [2])."""
    greys, shift = [cv2.cvtColor(pixels(record), cv2.COLOR_RGB2GRAY) for record in (a, b)], np.zeros(2)
    y, x = (np.float32(axis - (axis.size - 1) / 2) for axis in np.ogrid[*map(slice, b["shape"])])
    for blur in BLURS:
        image, other = (cv2.GaussianBlur(grey, (0, 0), blur) for grey in greys)
        image, seen = laid(image, other, turn, shift)
        dx, dy = edges(image)
        effects = np.stack([dx, dy, dx * x + dy * y, dy * x - dx * y, image, np.ones_like(image)]) * seen
        effects = effects.reshape(len(effects), -1)
        products = effects @ effects.T + np.eye(len(effects))  # one: flat pictures have a solution too
        *step, contrast, _ = np.linalg.solve(products, effects @ other.ravel())
        right, down, larger, angle = np.clip(np.divide(step, max(contrast, 0.1)), *LIMITS)
        back = np.linalg.inv([[1 + larger, -angle], [angle, 1 + larger]])
        turn, shift = back @ turn, back @ (shift - (right, down))
    return turn, shift


def edge_correlation(a, b, turn, shift, blur=EDGE_BLUR):
    """Correlation of the thumbnails' edges where they overlap, when x from the middle of a lies at turn @ x + shift
    from the middle of b. Brightness and contrast don't matter, but colours do: an outline in other colours is no copy.
    0 where the overlap is under a quarter of both."""
    other = pixels(b)
    image, seen = laid(pixels(a), other, turn, shift)
    if seen.sum() < 0.25 * min(b["shape"].prod(), a["shape"].prod() * abs(np.linalg.det(turn))):
        return 0.0
    x, y = (edges(cv2.GaussianBlur(side, (0, 0), blur)) * seen[..., None] for side in (image, other))
    norm = np.sqrt(np.vdot(x, x) * np.vdot(y, y))
    return float(np.vdot(x, y) / norm) if norm > MIN_EDGES**2 * seen.sum() else 0.0


def edges(image):
    """float32 [H, W, …] → float32 [2, H, W, …], the change from pixel to pixel, to the right and down."""
    return np.stack([cv2.Sobel(image, cv2.CV_32F, *axis, scale=1 / 8) for axis in ((1, 0), (0, 1))])


def laid(image, other, turn, shift):
    """→ (`image` laid on the `other`, continued beyond its borders; float32 of the other's size, 1 where it lies)."""
    middle, other_middle = (np.array(side.shape[1::-1]) / 2 - 0.5 for side in (image, other))
    matrix, size = np.column_stack([turn, shift + other_middle - turn @ middle]), other.shape[1::-1]
    seen = cv2.warpAffine(np.ones(image.shape[:2], np.float32), matrix, size, flags=cv2.INTER_NEAREST)
    seen = cv2.erode(seen, np.ones((5, 5), np.uint8))  # edges at its borders are half made up
    return cv2.warpAffine(image, matrix, size, borderMode=cv2.BORDER_REPLICATE), seen


def pixels(record):
    """→ float32 [height, width, 3], the RECORD's thumbnail."""
    return record["thumb"][*map(slice, record["shape"])].astype(np.float32)
