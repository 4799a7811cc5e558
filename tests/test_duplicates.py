"""Near-duplicate search: copies of one source are found, unrelated images are not joined."""

from itertools import combinations
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from bench.duplicates import candidates, digits, drawn, pieces, with_copies
from PIL import Image

from kit.data.labels import TrainingLabels, class_labels
from kit.folds import duplicates, neighbours
from kit.report import pictures
from kit.score.tasks import Numbers


@pytest.fixture(scope="module")
def copied():
    """Return the records of 30 drawn products with two copies each, and the source of each image."""
    images, source = with_copies(drawn(30), 2, np.random.default_rng(2))
    return SimpleNamespace(records=np.stack([duplicates.image_record(image) for image in images]), source=source)


# ---------------------------------------------------------------- a pair


@pytest.mark.parametrize("orientation", range(8))
def test_one_dct_gives_the_hashes_of_all_orientations(orientation):
    image = drawn(1)[0]
    turned = np.rot90(image, orientation % 4)
    turned = np.ascontiguousarray(turned[:, ::-1] if orientation >= 4 else turned)
    a, b = duplicates.image_record(image), duplicates.image_record(turned)
    bits = (a["hashes"] != b["hashes"][0]).sum(axis=1)
    assert bits.min() == 0
    assert sorted(bits)[1] > 4, "the other seven differ"
    matrix = duplicates.ORIENTATIONS[bits.argmin()]
    assert duplicates.edge_correlation(a, b, matrix, np.zeros(2)) > 0.99, "as a matrix it places one on the other"
    assert duplicates.d4_blind(a["dct"][None]) == pytest.approx(duplicates.d4_blind(b["dct"][None]), abs=1e-5)


def test_sift_features_are_blind_to_mirroring():
    image = drawn(1)[0]
    a, b = duplicates.image_record(image), duplicates.image_record(np.ascontiguousarray(image[:, ::-1]))
    inliers, correlation = duplicates.by_features(a, b)
    assert inliers > 0.6 * a["count"]
    assert correlation > 0.98


@pytest.mark.parametrize("angle", [17, 45, 133])
def test_rotated_cropped_reduced_and_blurred_copies_are_found_by_their_features(angle):
    image = drawn(3)[2]
    side = len(image)
    matrix = cv2.getRotationMatrix2D((side / 2, side / 2), angle, 0.5 / np.sqrt(0.6))
    matrix[:, 2] += side / 4 - side / 2
    copy = cv2.GaussianBlur(cv2.warpAffine(image, matrix, (side // 2, side // 2), flags=cv2.INTER_AREA), (0, 0), 1)
    evidence = duplicates.verify(duplicates.image_record(image), duplicates.image_record(copy))
    bits, inliers, correlation, certainty = evidence
    assert (bits, certainty) == (63, duplicates.FEATURES_AGREE)
    assert inliers >= duplicates.MIN_INLIERS
    assert correlation >= duplicates.MIN_CORRELATION


def test_a_soft_image_turned_by_a_quarter_is_found_by_its_hash():
    soft = cv2.resize(np.random.default_rng(0).integers(60, 190, (4, 6, 3)).astype(np.uint8), (120, 80))
    a, b = duplicates.image_record(soft), duplicates.image_record(np.ascontiguousarray(np.rot90(soft)))
    a["count"] = 0
    bits, inliers, correlation, certainty = duplicates.verify(a, b)
    assert bits <= duplicates.MAX_BITS
    assert (inliers, certainty) == (0, duplicates.SURE_HASH)
    assert correlation > 0.98


def exact_copies(image):
    """Yield copies: mirrored, turned, both and saved as JPEG, reduced, enlarged."""
    mirrored = np.ascontiguousarray(image[:, ::-1])
    yield mirrored
    yield np.ascontiguousarray(np.rot90(image))
    yield cv2.imdecode(cv2.imencode(".jpg", np.rot90(mirrored), [cv2.IMWRITE_JPEG_QUALITY, 90])[1], cv2.IMREAD_COLOR)
    yield cv2.resize(image, None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA)
    yield cv2.resize(image, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)


@pytest.mark.parametrize(
    ("kind", "sources"),
    [("digits of 28 px", [*digits(28)][:12]), ("digits of 112 px", [*digits(112, cv2.INTER_CUBIC)][:12]),
     ("pieces of photos", pieces(12, np.random.default_rng(1)))],
)  # fmt: skip
def test_exact_copies_of_smooth_and_of_blocky_images_are_found(kind, sources):
    for image in sources:
        record = duplicates.image_record(image)
        assert all(duplicates.verify(record, duplicates.image_record(copy)) for copy in exact_copies(image)), kind


def test_the_enlarged_copy_of_an_image_smaller_than_the_thumbnail_is_found():
    for image in [*digits(8)][:12]:
        larger = cv2.resize(image, (16, 16), interpolation=cv2.INTER_CUBIC)
        assert duplicates.verify(duplicates.image_record(image), duplicates.image_record(larger))


def test_edges_at_a_crops_border_do_not_count():
    image = pieces(28, np.random.default_rng(1))[4]
    crop = duplicates.image_record(np.ascontiguousarray(image[60:, 60:]))
    shift = np.array([30, 30]) * duplicates.THUMB / 320
    assert duplicates.edge_correlation(crop, duplicates.image_record(image), np.eye(2) * 260 / 320, shift) > 0.998


def test_digits_that_look_alike_are_no_duplicates():
    """At 8 px as they are, and enlarged: no pair of 9,480 is accepted."""
    for size, enlarge in ((8, cv2.INTER_LINEAR), (28, cv2.INTER_NEAREST), (112, cv2.INTER_CUBIC)):
        records = np.stack([duplicates.image_record(image) for image in [*digits(size, enlarge)][:80]])
        proposed = candidates(records)
        assert len(proposed) > 800
        assert len(duplicates.verified_pairs(records, proposed)[0]) == 0, f"{size} px"


def test_a_copy_without_features_is_aligned_with_its_source():
    """Cropped, which the hash doesn't show, it is some pixels off."""
    soft = cv2.resize(np.random.default_rng(0).integers(60, 190, (7, 9, 3)).astype(np.uint8), (180, 140))
    a, b = duplicates.image_record(soft), duplicates.image_record(soft[8:, :170])
    a["count"] = 0
    assert duplicates.edge_correlation(a, b, np.diag(b["shape"][::-1] / a["shape"][::-1]), np.zeros(2), 3) < 0.95
    turn, shift = duplicates.align(a, b, np.eye(2))
    assert duplicates.edge_correlation(a, b, turn, shift, 3) > 0.995
    assert duplicates.verify(a, b) is not None
    assert shift == pytest.approx(np.array([5, -4]) * turn[0, 0] * 64 / 180, abs=0.4)


def test_flat_faint_and_tiny_images_are_no_duplicates():
    flat = [np.full((50, 70, 3), value, np.uint8) for value in (0, 128, 255)]
    tiny = [np.full((1, 1, 3), 7, np.uint8), np.zeros((1, 3000, 3), np.uint8)]
    faint = [image.copy() for image in flat[1:]]  # two images whose right half is one grey level off
    for image in faint:
        image[:, 35:] -= 1
    records = np.stack([duplicates.image_record(image) for image in flat + tiny + faint])
    proposed = candidates(records)
    assert len(proposed) == 21, "every pair of the 7 images is a candidate"
    assert len(duplicates.verified_pairs(records, proposed)[0]) == 0


def test_equal_outlines_in_other_colours_are_no_duplicates():
    image = drawn(1)[0]
    a, b = duplicates.image_record(image), duplicates.image_record(np.ascontiguousarray(image[..., ::-1]))
    assert duplicates.by_features(a, b)[0] > 100, "the features agree"
    assert duplicates.verify(a, b) is None
    assert duplicates.verify(a, a) == duplicates.IDENTICAL


def test_two_images_with_the_same_small_logo_are_no_duplicates(monkeypatch):
    logo = np.random.default_rng(0).integers(0, 255, (8, 8, 3)).astype(np.uint8)
    records = []
    for y, x in ((40, 30), (120, 110)):
        image = np.full((256, 256, 3), 250, np.uint8)
        image[y : y + 32, x : x + 32] = cv2.resize(logo, (32, 32), interpolation=cv2.INTER_CUBIC)
        records.append(duplicates.image_record(image))
    assert duplicates.verify(*records) is None
    monkeypatch.setattr(duplicates, "MIN_AREA", 0)
    assert duplicates.verify(*records) is not None, "the area decides"


def test_matched_features_are_mutual_nearest_neighbours_and_unambiguous():
    a, b = np.zeros(2, duplicates.RECORD)
    one, two, three = np.eye(128, dtype=np.uint8)[:3]
    a["count"], b["count"] = 4, 3
    a["descriptors"][:4] = 100 * one, 90 * one, 100 * two, 90 * two + 100 * three
    b["descriptors"][:3] = 100 * one, 100 * two, 100 * three
    rows, columns = duplicates.match_features(a, b)
    assert rows.tolist() == [0, 2], "row 1 is second to row 0, row 3 is near two of b"
    assert columns.tolist() == [0, 1]


def faint(rng):
    """Return a smooth picture of 8 grey levels, as of sky, cloth or ultrasound."""
    y, x = np.mgrid[:128, :128] / 128
    a, b, c, d = rng.uniform(-1, 1, 4)
    grey = 120 + 4 * (np.sin(18 * a * x + 6 * b) + np.cos(5 * c * y * 6 + d))
    return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


@pytest.mark.parametrize(
    ("kind", "image"),
    [("faint", faint), ("dark", lambda rng: pieces(1, rng)[0] // 60), ("strip", lambda rng: pieces(1, rng)[0][:8]),
     ("noise", lambda rng: rng.integers(0, 256, (512, 512, 3)).astype(np.uint8))],
)  # fmt: skip
def test_the_same_pixels_are_joined_whatever_their_contrast(kind, image):
    """Twenty neighbours by every descriptor lie between a picture and its twin."""
    rng = np.random.default_rng(0)
    images = [image(rng) for _ in range(3)]
    between = [np.clip(images[0] + rng.integers(-1, 2, images[0].shape), 0, 255).astype(np.uint8) for _ in range(20)]
    records = np.stack([duplicates.image_record(one) for one in [*images, *between, *images]])
    accepted, evidence = duplicates.verified_pairs(records, candidates(records))
    identical = accepted[evidence[:, 0] < 0]
    assert identical.tolist() == [[0, 23], [1, 24], [2, 25]], kind


def test_images_of_one_colour_are_copies_of_none():
    grey, noise = np.full((64, 64, 3), 128, np.uint8), np.random.default_rng(0).integers(0, 256, (10, 12, 3))
    wide = noise.astype(np.uint8)
    below = np.concatenate([grey[:32], noise[:1, :1].repeat(64, 1)]).astype(np.uint8)  # another colour in the last row
    images = grey, grey, wide, wide.reshape(12, 10, 3), wide, below  # the fourth: the same bytes in another shape
    records = np.stack([duplicates.image_record(image) for image in images])
    assert (records["digest"] == 0).tolist() == [True, True, False, False, False, False]
    assert duplicates.verified_pairs(records, candidates(records))[0].tolist() == [[2, 4]]


# ---------------------------------------------------------------- outlines


def blob(seed, light=255):
    """Return a filled outline, each seed's another one, uint8 [220, 220, 3]."""
    rng, angle, image = np.random.default_rng(seed), np.linspace(0, 2 * np.pi, 80), np.zeros((220, 220, 3), np.uint8)
    waves = sum(rng.normal(0, 14 / (f + 1)) * np.cos(f * angle + rng.uniform(0, 6)) for f in range(1, 6))
    outline = 110 + (70 + waves)[:, None] * np.stack([0.7 * np.cos(angle), np.sin(angle)], axis=1)
    return cv2.fillPoly(image, [outline.astype(np.int32)], (light,) * 3, cv2.LINE_AA)


def ellipse(seed):
    rng, image = np.random.default_rng(seed), np.full((220, 220, 3), 255, np.uint8)
    axes = [int(axis) for axis in rng.integers(20, 90, 2)]
    return cv2.ellipse(image, (110, 110), axes, float(rng.uniform(0, 180)), 0, 360, (20, 20, 20), -1, cv2.LINE_AA)


def scribbled_circle(seed):
    rng, angle, image = (
        np.random.default_rng(seed),
        np.linspace(0, 2 * np.pi, 60),
        np.full((220, 220, 3), 255, np.uint8),
    )
    radius = (80 + np.convolve(rng.normal(0, 8, 60), np.ones(9) / 9, "same"))[:, None]
    line = 110 + radius * np.stack([np.cos(angle) * rng.uniform(0.8, 1.1), np.sin(angle)], axis=1)
    return cv2.polylines(image, [line.astype(np.int32)], True, (0, 0, 0), 3, cv2.LINE_AA)


@pytest.mark.parametrize(("draw", "light"), [(blob, [255]), (blob, [40]), (ellipse, []), (scribbled_circle, [])])
def test_outlines_that_look_alike_form_no_large_groups(draw, light, monkeypatch):
    """Each shape is like the next one, so that by single pairs most were one source."""
    records = np.stack([duplicates.image_record(draw(k, *light)) for k in range(70)])
    verified, verify_all = [], duplicates.verify_all
    monkeypatch.setattr(duplicates, "verify_all", lambda *args: verified.append(verify_all(*args)) or verified[-1])
    accepted = duplicates.verified_pairs(records, candidates(records))[0]
    sizes, single = (np.bincount(duplicates.components(pairs, 70)) for pairs in (accepted, verified[0][0]))
    assert sizes.max() <= duplicates.CHAIN < single.max()


def test_a_large_group_whose_images_are_all_copies_stays_together():
    """Soft, so that only hashes find them."""
    soft = cv2.resize(np.random.default_rng(0).integers(60, 190, (4, 6, 3)).astype(np.uint8), (120, 80))
    rng = np.random.default_rng(1)
    shots = [np.clip(soft * rng.uniform(0.8, 1.2) + rng.normal(0, 2, soft.shape), 0, 255) for _ in range(20)]
    records = np.stack([duplicates.image_record(shot.astype(np.uint8)) for shot in shots])
    records["count"] = 0
    accepted, evidence = duplicates.verified_pairs(records, candidates(records))
    assert (evidence[:, 1] == 0).all()
    assert np.bincount(duplicates.components(accepted, 20)).tolist() == [20]


# ---------------------------------------------------------------- groups


def test_recall_and_false_pairs(copied):
    accepted, evidence = duplicates.verified_pairs(copied.records, candidates(copied.records))
    groups = duplicates.components(accepted, len(copied.source))
    every_pair = np.array(list(combinations(range(len(groups)), 2)))
    same = copied.source[every_pair[:, 0]] == copied.source[every_pair[:, 1]]
    together = groups[every_pair[:, 0]] == groups[every_pair[:, 1]]
    assert together[same].mean() >= 0.95
    assert together[~same].sum() <= 1, "of 3,915 pairs of unrelated images"
    assert evidence.shape == (len(accepted), 3)


def test_features_of_a_network_add_candidates(copied):
    records = copied.records[::3]  # unrelated
    twins = {(i, i + 15) for i in range(15)}
    embedding, vectors = np.eye(15, dtype=np.float32)[np.arange(30) % 15], np.empty((30, duplicates.VECTOR), np.float32)
    duplicates.words_and_colours(records, vectors)
    by_words = {*map(tuple, duplicates.candidate_pairs(records, vectors).tolist())}
    both = {*map(tuple, duplicates.candidate_pairs(records, vectors, embedding).tolist())}
    assert not twins <= by_words
    assert by_words | twins <= both


@pytest.mark.parametrize("count", [700, 1500])
def test_many_images_are_compared_by_cells(monkeypatch, count):
    """Noisy copies are found as if all were compared with all, in a fraction of the products."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(count, 24)).astype(np.float32)
    points[count // 2 :] = points[: count // 2] + 0.2 * rng.normal(size=(count // 2, 24))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    exact = {*map(tuple, neighbours.neighbour_pairs(points, 13).tolist())}
    monkeypatch.setattr(neighbours, "EXACT", count - 1)
    monkeypatch.setattr(neighbours, "PROBED", 16)
    cells = [*neighbours.cells_and_surroundings(points)]
    assert sorted(np.concatenate([queries for queries, _ in cells])) == [*range(count)], "each is looked up once"
    assert sum(len(queries) * len(near) for queries, near in cells) < 0.6 * count**2
    found = {*map(tuple, neighbours.neighbour_pairs(points, 13).tolist())}
    copies = {(i, i + count // 2) for i in range(count // 2)}
    assert len(copies & exact) == len(copies)
    assert len(copies & found) > 0.97 * len(copies)
    assert len(exact & found) > 0.7 * len(exact)
    again = {*map(tuple, neighbours.neighbour_pairs(points, 13).tolist())}
    assert found == again


def test_vectors_of_words_and_colours_have_unit_length(copied):
    vectors = np.full((30, duplicates.VECTOR), np.nan, np.float32)
    duplicates.words_and_colours(copied.records[::3], vectors)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1)


def test_several_processes_accept_the_same_pairs_as_one(copied, tmp_path, monkeypatch):
    records = np.memmap(tmp_path / "records", duplicates.RECORD, "w+", shape=24)
    records[:] = copied.records[:24]
    proposed = candidates(records)
    monkeypatch.setattr(duplicates, "PAIRS_A_TASK", 40)
    monkeypatch.setattr(duplicates, "cpu_count", lambda: 2)
    alone = duplicates.verified_pairs(records, proposed)
    monkeypatch.setattr(duplicates, "FEW_PAIRS", 0)
    monkeypatch.setattr(cv2, "setNumThreads", None)  # only this process would fail
    together = duplicates.verified_pairs(records, proposed)
    assert len(alone[0]) >= 16
    assert np.array_equal(alone[0], together[0])
    assert np.array_equal(alone[1], together[1])


def test_components_are_numbered_by_their_first_image():
    assert duplicates.components(np.array([[1, 4], [4, 5], [2, 3]]), 7).tolist() == [0, 1, 2, 2, 1, 1, 3]
    assert duplicates.components(np.array([[5, 0], [2, 1]]), 6).tolist() == [0, 1, 1, 2, 3, 0]
    assert duplicates.components(np.zeros((0, 2), int), 3).tolist() == [0, 1, 2]


# ---------------------------------------------------------------- what is shown

# The training images are a to e: a, b and c are one group, and d has a copy in the test set.
PAIRS = np.array([[0, 1], [0, 2], [1, 2], [3, 5]])
EVIDENCE = np.array([[63, 20, 0.95], [63, 20, 0.97], [63, 9, 0.99], [4, 0, 0.93]])
GROUPS, LABELS = np.array([0, 0, 0, 1, 2, 1, 3]), class_labels("train.csv", [*"abcde"], [*"xxyyx"], "")
DISAGREE = np.array([True, True, True, False, False])
SHOWN = GROUPS, LABELS.names, LABELS.cells, DISAGREE, ["s", "t"]


def test_table_names_the_closest_duplicate_and_the_evidence():
    table = duplicates.table(PAIRS, EVIDENCE, *SHOWN).astype(str)
    assert table.image_name.tolist() == ["a", "b", "c", "d", "s"]
    assert table.duplicate.tolist() == ["train/c", "train/a", "train/a", "test/s", "train/d"]
    assert table.label.tolist() == ["x", "x", "y", "y", ""]
    assert table.labels_disagree.tolist() == ["1", "1", "1", "0", "0"]
    assert table.found_by.tolist() == ["features"] * 3 + ["hash"] * 2
    assert table.hash_bits.tolist() == ["", "", "", "4", "4"]
    assert table.iloc[0].tolist()[-2:] == ["", "0.97"]
    same = duplicates.table(PAIRS, np.array([duplicates.IDENTICAL[:3]] * 4), *SHOWN)
    assert (same.found_by == "pixels").all()
    empty = duplicates.table(np.zeros((0, 2), int), np.zeros((0, 3)), np.arange(7), *SHOWN[1:])
    assert len(empty) == 0
    assert empty.columns.tolist() == table.columns.tolist()


def test_summary_counts_duplicates_and_names_label_conflicts():
    assert duplicates.labels_disagree(GROUPS[:5], LABELS).tolist() == DISAGREE.tolist()
    summary = duplicates.summary(GROUPS, LABELS.names, DISAGREE)
    assert summary == dict(
        groups=2, largest=3, largest_share=pytest.approx(3 / 7), train_with_duplicate=0.6, test_with_duplicate=0.5,
        conflicts=[["a", "b", "c"]],
    )  # fmt: skip
    lines = duplicates.duplicate_lines(summary)
    assert lines[0].startswith("2 of two or more images, the largest of 3 ")
    assert "60.0% of the training and 50.0% of the test images have a duplicate" in lines[1]
    assert "a = b = c" in lines[-1]
    assert lines[-1].startswith("1 whose labels disagree (a label is wrong, or the group is)")


def test_numbers_of_copies_may_differ_a_little():
    """By 5 % of their range of 100, or half a standard deviation where an outlier makes the range wide."""
    groups = np.repeat(np.arange(50), 2)
    even = np.repeat(np.linspace(0, 100, 50), 2)
    numbers = even + np.tile([0, 4.9], 50)
    numbers[:2] = 0, 5.5
    for values, wrong in ((numbers, 1), (np.append(numbers[:-1] / 100, 1000), 1)):
        cells = [str(value) for value in values]
        labels = TrainingLabels([*map(str, range(100))], Numbers(["n"]), values[:, None], cells, "")
        assert duplicates.labels_disagree(groups, labels).sum() == 2 * wrong


@pytest.mark.parametrize(
    ("changed", "count", "words"),
    [
        ({}, 2, "have a duplicate"),
        (dict(train_with_duplicate=0.5), 3, "duplicates stay in one fold"),
        (dict(train_with_duplicate=0.5, test_with_duplicate=0.4), 3, "the test set shares sources"),
        (dict(test_with_duplicate=0.04), 2, "have a duplicate"),
        (dict(conflicts=[["a", "b"]]), 3, "a = b"),
        (dict(largest=21, largest_share=0.021), 3, "--groups none"),
        (dict(largest=20, largest_share=0.5), 2, "have a duplicate"),
        (dict(train_with_duplicate=0.5, split=7), 3, "warning: 7 sources are in several folds"),
        (dict(train_with_duplicate=0.5, test_with_duplicate=0.5, split=7), 3, "warning: 7 sources are in several"),
        (dict(few=1, split=1), 3, "copies of one source (same part, same camera?), too few for the folds"),
        (dict(few=4, split=4), 3, "copies of 4 sources"),
        (dict(joined=[80, 3]), 3, "different groups held 80 identical pairs and 3 near copies, and are joined"),
        (dict(joined=[0, 0]), 2, "have a duplicate"),
        (dict(blank=12), 3, "12 images of one colour"),
    ],
)
def test_each_finding_has_one_line(changed, count, words):
    plain = dict(
        groups=1, largest=2, largest_share=0.01, train_with_duplicate=0.01, test_with_duplicate=0.0, conflicts=[]
    )
    lines = duplicates.duplicate_lines(plain | changed)
    assert len(lines) == count
    assert words in lines[-1]
    assert duplicates.duplicate_lines(None) == []


def test_duplicates_png_shows_the_least_certain_pairs_then_the_largest_groups(copied, tmp_path, monkeypatch):
    sheets, contact_sheet = [], pictures.contact_sheet
    monkeypatch.setattr(pictures, "contact_sheet", lambda *sheet: sheets.append(sheet) or contact_sheet(*sheet))
    table = duplicates.table(PAIRS, EVIDENCE, *SHOWN)
    pictures.draw_duplicates(tmp_path / "sheet.png", copied.records[:7], PAIRS, EVIDENCE, table)
    ((rows, columns),) = sheets
    titles, captions = [title for title, _ in rows], [[caption for _, caption in cells] for _, cells in rows]
    assert columns == 8
    assert np.array_equal(Image.open(tmp_path / "sheet.png"), contact_sheet(rows, columns))
    assert titles == ["least certain pairs", "group 0\n3 images", "group 1\n2 images"]
    a, b, c, d, s = "train a [x]", "train b [x]", "train c [y]", "train d [y]", "test s"
    assert captions == [[d, s, b, c, a, b, a, c], [a, b, c], [d, s]]
    height, width = copied.records["shape"][3]
    assert np.array_equal(rows[0][1][0][0], copied.records["thumb"][3, :height, :width])
