"""Finds images that show one source photo: rotated, mirrored, cropped, rescaled, blurred or relit copies of it.

Used by 00_prepare.py, so that all copies of a source stay in one fold. Three steps, each narrowing what the next,
dearer one looks at:

1. Each image is described once (`describe`): a small grey thumbnail; the low 8 × 8 block of its DCT; SIFT features,
   made blind to mirroring.
2. Each image's likely relatives (`candidates`): its nearest neighbours in the DCT block, and in a bag of SIFT words and
   colours. N × k pairs, not N².
3. Each candidate pair is judged (`verify`): the best of the 8 orientations by the DCT hash, and the similarity
   transform that RANSAC fits to the matched features, propose how one image lies on the other; the pair is accepted
   where the pixels then agree as well.

Connected components of the accepted pairs are the groups.
"""

import cv2
import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from threadpoolctl import threadpool_limits

from common import cpu_count, progress
from images import contact_sheet

LONG_SIDE = 256  # px at which SIFT looks: 10 ms an image; smaller copies are enlarged to it
THUMB = 64  # px, the long side of the thumbnail on which pixels are compared: too small to show blur or JPEG noise
FEATURES = 200  # SIFT features kept, the strongest
CONTRAST = 0.01  # SIFT's threshold; its default of 0.04 leaves out-of-focus and dark pictures without features
WORDS = 1024  # size of the SIFT vocabulary
COLOUR_WEIGHT = 0.8  # of the colours beside the words; of 0.5, 0.8 and 1.2 the best on the demo
COLOUR_BINS = 6  # a channel
VECTOR = WORDS + COLOUR_BINS**3  # numbers that describe an image's words and colours
NEIGHBOURS = 12  # candidates per image and kind of descriptor

# Accepting a pair. Measured by tests/bench/copies.py, whose table is in README.md.
MIN_INLIERS = 5  # matched features that one similarity transform explains …
MIN_CORRELATION = 0.88  # … when the pixels that it lays on each other correlate so well, colour by colour
MIN_AREA = 0.02  # share of either image that the features' hull covers: a shared logo is no copy
SCALES = 0.3, 3.3  # of one image on the other; RANSAC's chance fits collapse to 0
FEW_PAIRS = 2000  # that one process judges in less time than others take to start
MAX_BITS = 12  # of 63 by which the DCT hashes of a pair may differ in the best orientation …
MIN_CORRELATION_HASH = 0.9  # … when the pixels correlate so well

RECORD = np.dtype(
    [
        ("count", np.int32),
        ("shape", np.int32, 2),  # height, width of the thumbnail
        ("thumb", np.uint8, (THUMB, THUMB, 3)),
        ("dct", np.float32, (8, 8)),
        ("hashes", bool, (8, 63)),  # of the 8 orientations
        ("points", np.float32, (FEATURES, 2)),  # x, y in thumbnail px from the middle
        ("turned", bool, FEATURES),  # by mirror_blind
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
    record["hashes"] = hash_bits(d4_dcts(record["dct"]))
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
        record["descriptors"][:count], record["turned"][:count] = mirror_blind(descriptors[:count])
    return record


def mirror_blind(descriptors):
    """SIFT descriptors float32 [F, 128] → (RootSIFT uint8 [F, 128], the same for a mirrored patch; bool [F],
    whether the descriptor was mirrored for that). RootSIFT: Arandjelović and Zisserman 2012.

    A mirrored patch has the rows of the 4 × 4 cells and the sense of the 8 directions reversed. Of both readings, the
    one with more weight in the first half of the directions is taken, as mirror-invariant SIFT does (Ma et al. 2010).
    """
    cells = descriptors.reshape(-1, 4, 4, 8)
    mirrored = cells[:, ::-1, :, (8 - np.arange(8)) % 8]
    turn = cells[..., 1:4].sum((1, 2, 3)) < cells[..., 5:8].sum((1, 2, 3))
    cells = np.where(turn[:, None, None, None], mirrored, cells).reshape(len(cells), 128)
    root = np.sqrt(cells / np.maximum(1e-9, cells.sum(axis=1, keepdims=True)))
    return np.minimum(255, root * 512).astype(np.uint8), turn


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


def candidates(records, vectors=None, embedding=None):
    """→ int [P, 2], pairs i < j of images that may be relatives: the nearest neighbours by DCT, and by words and
    colours, or by `embedding` [N, D] in place of these. `vectors` float32 [N, VECTOR] is room for words and colours,
    which may be mapped to a file."""
    if embedding is None:
        embedding = np.zeros((len(records), VECTOR), np.float32) if vectors is None else vectors
        words_and_colours(records, embedding)
    count = min(NEIGHBOURS + 1, len(records))
    pairs = np.concatenate([nearest(d4_blind(records["dct"]), count), nearest(embedding, count)])
    pairs.sort(axis=1)
    return np.unique(pairs[pairs[:, 0] < pairs[:, 1]], axis=0)


def nearest(vectors, count, block=64):
    """→ int32 [N * count, 2]: each row with its `count` nearest by the angle; vectors float32 [N, D] of unit length. N²
    products, but of a block at a time: scikit-learn's takes 1 GB."""
    found = np.empty((len(vectors), count), np.int32)
    for start in range(0, len(vectors), block):
        similarity = vectors[start : start + block] @ vectors.T
        found[start : start + block] = np.argpartition(similarity, -count, axis=1)[:, -count:]
    return np.stack([np.repeat(np.arange(len(vectors), dtype=np.int32), count), found.ravel()], axis=1)


def unit(vectors):
    return vectors / np.maximum(1e-6, np.linalg.norm(vectors, axis=1, keepdims=True))


def d4_blind(dct):
    """DCT blocks [N, 8, 8] → float [N, 72], unit length, the same for all 8 orientations and any brightness and
    contrast: of each pair of coefficients mirrored at the diagonal, the sum and difference of the magnitudes."""
    size = np.abs(dct)
    size[:, 0, 0] = 0
    lower, upper = size, np.swapaxes(size, 1, 2)
    rows, columns = np.triu_indices(8)
    return unit(np.concatenate([(lower + upper)[:, rows, columns], np.abs(lower - upper)[:, rows, columns]], axis=1))


def words_and_colours(records, vectors, block=256):
    """Fills vectors [N, VECTOR], of unit length, with each image's SIFT features counted by visual word, rare words
    weighted up (Sivic and Zisserman 2003), and its colours. The words are features drawn at random: cheaper than
    clusters and, for the few dozen candidates wanted here, as good."""

    def features(part):
        return part["descriptors"][np.arange(FEATURES) < part["count"][:, None]].astype(np.float32)

    rng = np.random.default_rng(0)
    some = features(records[np.sort(rng.permutation(len(records))[:WORDS])])
    words = some[rng.permutation(len(some))[:WORDS]]
    half_squares, images_with = (words**2).sum(axis=1) / 2, np.zeros(WORDS)
    blocks = [slice(start, start + block) for start in range(0, len(records), block)]
    for part in blocks:
        record = records[part]
        word = (features(record) @ words.T - half_squares).argmax(axis=1) if len(words) else np.zeros(0, int)
        row = np.repeat(np.arange(len(record)), record["count"])
        counts = np.bincount(row * WORDS + word, minlength=len(record) * WORDS).reshape(-1, WORDS)
        vectors[part, :WORDS] = counts
        images_with += (counts > 0).sum(axis=0)
    rarity = 1 + np.log((1 + len(records)) / (1 + images_with))
    for part in blocks:
        counts = vectors[part, :WORDS]
        weighted = unit(np.where(counts > 0, 1 + np.log(np.maximum(1, counts)), 0) * rarity)
        vectors[part] = unit(np.hstack([weighted, COLOUR_WEIGHT * colours(records[part])]))


def colours(records):
    """RECORDs [N] → [N, COLOUR_BINS³], unit length: the joint histogram of the thumbnail's colours, each channel at
    mean 0 and deviation 1, so that light and tint don't matter, and square-rooted, as RootSIFT is."""
    rows = np.zeros((len(records), COLOUR_BINS**3), np.float32)
    for row, record in zip(rows, records, strict=True):
        height, width = record["shape"]
        pixels = record["thumb"][:height, :width].reshape(-1, 3).astype(np.float32)
        pixels = (pixels - pixels.mean(axis=0)) / (pixels.std(axis=0) + 5)
        counts = np.histogramdd(np.clip(pixels, -2.39, 2.39), COLOUR_BINS, [(-2.4, 2.4)] * 3)[0].ravel()
        row[:] = np.sqrt(counts / counts.sum())
    return rows


# ---------------------------------------------------------------- 3. a pair


def verify(a, b):
    """Two RECORDs → (bits of 63 by which their hashes differ, matched features that agree, correlation of the pixels),
    or None where they are no relatives."""
    inliers, correlation = by_features(a, b)
    if inliers and correlation >= MIN_CORRELATION:
        return 63, inliers, correlation
    bits = (a["hashes"] != b["hashes"][0]).sum(axis=1)
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
    rows, columns = match(a, b)
    mirrored = a["turned"][rows] != b["turned"][columns]
    best = 0, 0.0
    for mirror, chosen in ((1, ~mirrored), (-1, mirrored)):
        if chosen.sum() < max(MIN_INLIERS, best[0] + 1):
            continue
        flip = np.array([mirror, 1], np.float32)
        from_a, to_b = a["points"][rows[chosen]], b["points"][columns[chosen]]
        matrix, inside = cv2.estimateAffinePartial2D(
            from_a * flip, to_b, method=cv2.RANSAC, ransacReprojThreshold=1.5, maxIters=500, confidence=0.99
        )
        if matrix is None:
            continue
        inside = inside.ravel().astype(bool)
        inliers, scale = int(inside.sum()), float(np.hypot(matrix[0, 0], matrix[1, 0]))
        if inliers < MIN_INLIERS or inliers <= best[0] or not SCALES[0] <= scale <= SCALES[1]:
            continue
        if min(covered(from_a[inside], a), covered(to_b[inside], b)) >= MIN_AREA:
            best = inliers, overlap_correlation(a, b, matrix[:, :2] * flip, matrix[:, 2])
    return best


def match(a, b):
    """Mutual nearest neighbours whose second-best is clearly worse (Lowe's ratio, 0.85). → their rows in a and in b."""
    first, second = (r["descriptors"][: r["count"]].astype(np.float32) for r in (a, b))
    distance = (first**2).sum(1)[:, None] + (second**2).sum(1) - 2 * (first @ second.T)
    nearest, rows = distance.argmin(axis=1), np.arange(len(first))
    rows = rows[distance.argmin(axis=0)[nearest] == rows]
    two = np.partition(distance[rows], 1, axis=1)[:, :2]
    rows = rows[two[:, 0] < 0.85**2 * two[:, 1]]
    return rows, nearest[rows]


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
    """Verifies the candidate pairs on all cores. → (pairs [M, 2], evidence [M, 3]: bits, inliers, correlation).

    In processes, since half of the work is small steps of Python. `records` is mapped to a file, so it isn't copied; it
    must be the whole file (joblib 1.5 crashes on a view of one field).
    """
    from joblib import Parallel, delayed

    blocks = np.array_split(pairs, max(1, len(pairs) // 500))
    found = []
    with progress(len(pairs), description, "pair") as bar:
        judged = Parallel(cpu_count() if len(pairs) > FEW_PAIRS else 1, return_as="generator", max_nbytes=None)(
            delayed(verify_all)(records, block) for block in blocks
        )
        for block, results in zip(blocks, judged, strict=True):
            found += [(*pair, *result) for pair, result in zip(block, results, strict=True) if result]
            bar.update(len(block))
    found = np.array(found, np.float64).reshape(-1, 5)
    return found[:, :2].astype(np.int64), found[:, 2:]


def verify_all(records, pairs):
    cv2.setNumThreads(1)
    cv2.setRNGSeed(0)
    with threadpool_limits(1):
        return [verify(records[i], records[j]) for i, j in pairs]


def components(pairs, count):
    """Connected components of `count` images joined by pairs [M, 2] → group numbers int [count], in order of the first
    image of each."""
    graph = coo_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), (count, count))
    labels = connected_components(graph, directed=False)[1]
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


# ---------------------------------------------------------------- what is shown

CHAINING = 0.02  # share of all images above which one group is suspicious


def part_and_name(i, names, test_names):
    return ("train", names[i]) if i < len(names) else ("test", test_names[i - len(names)])


def table(pairs, evidence, groups, names, labels, test_names):
    """→ a table of all images in groups of two or more: group, its size, part, image_name, label, whether the group's
    labels disagree, and the image's closest relative with the evidence for it."""
    import pandas as pd

    sizes = np.bincount(groups)
    conflicts = disagreeing(groups, labels)
    closest = {}
    for (a, b), (bits, inliers, correlation) in zip(pairs.tolist(), evidence.tolist(), strict=True):
        for one, other in ((a, b), (b, a)):
            if one not in closest or closest[one][2:] < (inliers, correlation):
                closest[one] = (other, bits, inliers, correlation)
    rows = []
    for i in np.flatnonzero(sizes[groups] > 1)[np.argsort(groups[sizes[groups] > 1], kind="stable")]:
        part, name = part_and_name(i, names, test_names)
        other, bits, inliers, correlation = closest[i]
        rows.append(
            dict(
                group=groups[i],
                size=sizes[groups[i]],
                part=part,
                image_name=name,
                label=labels[i] if part == "train" else "",
                labels_disagree=int(groups[i] in conflicts),
                relative="/".join(part_and_name(other, names, test_names)),
                found_by="features" if inliers else "hash",
                inliers=int(inliers),
                hash_bits=int(bits) if not inliers else "",
                correlation=round(correlation, 4),
            )
        )
    columns = "group size part image_name label labels_disagree relative found_by inliers hash_bits correlation".split()
    return pd.DataFrame(rows, columns=columns)


def disagreeing(groups, labels):
    """→ the set of groups whose training images carry more than one label."""
    first, conflicts = {}, set()
    for group, label in zip(groups.tolist(), labels, strict=False):  # groups goes on with the test images
        if first.setdefault(group, label) != label:
            conflicts.add(group)
    return conflicts


def summary(groups, names, labels, test_names):
    """→ what prepared.json keeps: counts and shares."""
    train, test = groups[: len(names)], groups[len(names) :]
    in_train = np.bincount(train, minlength=groups.max() + 1)
    sizes = np.bincount(groups)
    conflicts = sorted(disagreeing(groups, labels))
    return dict(
        groups=int((sizes > 1).sum()),
        largest=int(sizes.max()),
        largest_share=float(sizes.max() / len(groups)),
        train_with_relative=float((in_train[train] > 1).mean()),
        test_with_relative=float((in_train[test] > 0).mean()),
        conflicts=[[name for name, group in zip(names, train, strict=True) if group == c] for c in conflicts],
    )


def report_lines(found):
    """The lines that 00_prepare.py prints about relatives."""
    if found is None:
        return []
    train, test = found["train_with_relative"], found["test_with_relative"]
    lines = [
        f"groups  {found['groups']} of two images or more, the largest of {found['largest']} (duplicates.csv, .png)",
        f"relatives in train: {train:.1%} of the training images, {test:.1%} of the test images",
    ]
    if train > 0.05 and test < train / 2:
        lines.append("  folds that split relatives would give a CV far above the leaderboard: they are kept together")
    elif test > 0.05 and test > train / 2:
        lines.append("  the test set shares sources with the training set: a grouped CV may be below the leaderboard")
    if found["conflicts"]:
        from common import listing

        groups = [" = ".join(names[:4]) for names in found["conflicts"]]
        lines.append(f"  {len(groups)} groups carry different labels, mislabelled or ambiguous: {listing(groups)}")
    if found["largest_share"] > CHAINING and found["largest"] > 20:
        lines.append(
            f"  warning: one group holds {found['largest_share']:.1%} of all images: look at duplicates.png; if they "
            "are no copies, give --groups none, or a corrected FILE.csv"
        )
    return lines


def draw(path, records, pairs, evidence, groups, names, labels, test_names, most=12, columns=8):
    """A contact sheet: the least certain pairs first, then the largest groups."""

    def cell(i):
        height, width = records["shape"][i]
        part, name = part_and_name(i, names, test_names)
        label = f" [{labels[i]}]" if part == "train" else ""
        return records["thumb"][i][:height, :width], f"{part} {name[-16:]}{label[:12]}"

    certainty = evidence[:, 2] + np.minimum(evidence[:, 1], 40) / 40
    doubtful = pairs[np.argsort(certainty, kind="stable")[: 2 * columns]]
    rows = [
        ("least certain pairs", doubtful[k : k + columns // 2].ravel()) for k in range(0, len(doubtful), columns // 2)
    ]
    sizes = np.bincount(groups)
    for group in np.argsort(-sizes, kind="stable")[:most]:
        if sizes[group] > 1:
            rows.append((f"group {group}\n{sizes[group]} images", np.flatnonzero(groups == group)[:columns]))
    rows = [(title, [cell(i) for i in members]) for title, members in rows] or [("no relatives found", [])]
    contact_sheet(path, rows, columns)
