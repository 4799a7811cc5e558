"""Copies of one source are found and strangers are not joined; a shift of the test set is told from chance."""

from itertools import combinations
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from bench.copies import digits, drawn, pieces, with_copies

from kit.folds import duplicates, shift
from kit.report import pictures


@pytest.fixture(scope="module")
def family():
    """30 drawn products and two copies of each."""
    images, source = with_copies(drawn(30), 2, np.random.default_rng(2))
    return SimpleNamespace(records=np.stack([duplicates.describe(image) for image in images]), source=source)


# ---------------------------------------------------------------- a pair


@pytest.mark.parametrize("orientation", range(8))
def test_one_dct_gives_the_hashes_of_all_orientations(orientation):
    image = drawn(1)[0]
    turned = np.rot90(image, orientation % 4)
    turned = np.ascontiguousarray(turned[:, ::-1] if orientation >= 4 else turned)
    a, b = duplicates.describe(image), duplicates.describe(turned)
    bits = (a["hashes"] != b["hashes"][0]).sum(axis=1)
    assert bits.min() == 0
    assert sorted(bits)[1] > 4, "the other seven are other pictures"
    matrix = duplicates.ORIENTATIONS[bits.argmin()]
    assert duplicates.edge_correlation(a, b, matrix, np.zeros(2)) > 0.99, "as a matrix it lays one on the other"
    assert duplicates.d4_blind(a["dct"][None]) == pytest.approx(duplicates.d4_blind(b["dct"][None]), abs=1e-5)


def test_sift_is_blind_to_mirroring():
    image = drawn(1)[0]
    a, b = duplicates.describe(image), duplicates.describe(np.ascontiguousarray(image[:, ::-1]))
    inliers, correlation = duplicates.by_features(a, b)
    assert inliers > 0.6 * a["count"]
    assert correlation > 0.98


@pytest.mark.parametrize("angle", [17, 45, 133])
def test_rotated_cropped_reduced_blurred_copies_are_recognised(angle):
    image = drawn(3)[2]
    side = len(image)
    matrix = cv2.getRotationMatrix2D((side / 2, side / 2), angle, 0.5 / np.sqrt(0.6))
    matrix[:, 2] += side / 4 - side / 2
    copy = cv2.GaussianBlur(cv2.warpAffine(image, matrix, (side // 2, side // 2), flags=cv2.INTER_AREA), (0, 0), 1)
    bits, inliers, correlation = duplicates.verify(duplicates.describe(image), duplicates.describe(copy))
    assert bits == 63
    assert inliers >= duplicates.MIN_INLIERS
    assert correlation >= duplicates.MIN_CORRELATION


def test_a_blurred_quarter_turn_without_features_is_recognised_by_its_hash():
    soft = cv2.resize(np.random.default_rng(0).integers(60, 190, (4, 6, 3)).astype(np.uint8), (120, 80))
    a, b = duplicates.describe(soft), duplicates.describe(np.ascontiguousarray(np.rot90(soft)))
    a["count"] = 0
    bits, inliers, correlation = duplicates.verify(a, b)
    assert bits <= duplicates.MAX_BITS
    assert inliers == 0
    assert correlation > 0.98


def exact_copies(image):
    """Mirrored, turned, both and saved as JPEG, reduced, enlarged."""
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
def test_exact_copies_are_found_however_smooth_they_are(kind, sources):
    for image in sources:
        record = duplicates.describe(image)
        assert all(duplicates.verify(record, duplicates.describe(copy)) for copy in exact_copies(image)), kind


def test_an_image_smaller_than_the_thumbnail_is_found_enlarged():
    for image in [*digits(8)][:12]:
        larger = cv2.resize(image, (16, 16), interpolation=cv2.INTER_CUBIC)
        assert duplicates.verify(duplicates.describe(image), duplicates.describe(larger))


def test_what_lies_beyond_a_copys_border_does_not_count():
    image = pieces(28, np.random.default_rng(1))[4]
    crop = duplicates.describe(np.ascontiguousarray(image[60:, 60:]))
    shift = np.array([30, 30]) * duplicates.THUMB / 320
    assert duplicates.edge_correlation(crop, duplicates.describe(image), np.eye(2) * 260 / 320, shift) > 0.998


def test_digits_are_alike_without_being_copies():
    """At 8 px as they are, and enlarged: no pair of 9,480 is joined."""
    for size, enlarge in ((8, cv2.INTER_LINEAR), (28, cv2.INTER_NEAREST), (112, cv2.INTER_CUBIC)):
        records = np.stack([duplicates.describe(image) for image in [*digits(size, enlarge)][:80]])
        proposed = duplicates.candidates(records)
        assert len(proposed) > 800
        assert len(duplicates.relatives(records, proposed)[0]) == 0, f"{size} px"


def test_a_copy_without_features_is_moved_onto_its_source():
    """Cropped, as the hash doesn't notice, it lies some pixels off."""
    soft = cv2.resize(np.random.default_rng(0).integers(60, 190, (7, 9, 3)).astype(np.uint8), (180, 140))
    a, b = duplicates.describe(soft), duplicates.describe(soft[8:, :170])
    a["count"] = 0
    assert duplicates.edge_correlation(a, b, np.diag(b["shape"][::-1] / a["shape"][::-1]), np.zeros(2), 3) < 0.95
    turn, shift = duplicates.moved(a, b, np.eye(2))
    assert duplicates.edge_correlation(a, b, turn, shift, 3) > 0.995
    assert duplicates.verify(a, b) is not None
    assert shift == pytest.approx(np.array([5, -4]) * turn[0, 0] * 64 / 180, abs=0.4)


def test_flat_faint_and_tiny_images_are_no_relatives():
    flat = [np.full((50, 70, 3), value, np.uint8) for value in (0, 128, 255)]
    tiny = [np.full((1, 1, 3), 7, np.uint8), np.zeros((1, 3000, 3), np.uint8)]
    faint = [image.copy() for image in flat[1:]]  # two images whose right half is one grey level off
    for image in faint:
        image[:, 35:] -= 1
    records = np.stack([duplicates.describe(image) for image in flat + tiny + faint])
    proposed = duplicates.candidates(records)
    assert len(proposed) == 21, "of 7 images, every pair is a candidate"
    assert len(duplicates.relatives(records, proposed)[0]) == 0


def test_equal_outlines_in_other_colours_are_no_relatives():
    image = drawn(1)[0]
    a, b = duplicates.describe(image), duplicates.describe(np.ascontiguousarray(image[..., ::-1]))
    assert duplicates.by_features(a, b)[0] > 100, "the features agree"
    assert duplicates.verify(a, b) is None
    assert duplicates.verify(a, a) is not None


def test_a_small_logo_in_both_images_is_no_copy(monkeypatch):
    logo = np.random.default_rng(0).integers(0, 255, (8, 8, 3)).astype(np.uint8)
    records = []
    for y, x in ((40, 30), (120, 110)):
        image = np.full((256, 256, 3), 250, np.uint8)
        image[y : y + 32, x : x + 32] = cv2.resize(logo, (32, 32), interpolation=cv2.INTER_CUBIC)
        records.append(duplicates.describe(image))
    assert duplicates.verify(*records) is None
    monkeypatch.setattr(duplicates, "MIN_AREA", 0)
    assert duplicates.verify(*records) is not None, "the area is what tells"


def test_matches_are_mutual_and_clear():
    a, b = np.zeros(2, duplicates.RECORD)
    one, two, three = np.eye(128, dtype=np.uint8)[:3]
    a["count"], b["count"] = 4, 3
    a["descriptors"][:4] = 100 * one, 90 * one, 100 * two, 90 * two + 100 * three
    b["descriptors"][:3] = 100 * one, 100 * two, 100 * three
    rows, columns = duplicates.match(a, b)
    assert rows.tolist() == [0, 2], "row 1 is second to row 0, row 3 is near two of b"
    assert columns.tolist() == [0, 1]


# ---------------------------------------------------------------- groups


def test_recall_and_strangers_over_many_pairs(family):
    related, evidence = duplicates.relatives(family.records, duplicates.candidates(family.records))
    groups = duplicates.components(related, len(family.source))
    every = np.array(list(combinations(range(len(groups)), 2)))
    kin = family.source[every[:, 0]] == family.source[every[:, 1]]
    together = groups[every[:, 0]] == groups[every[:, 1]]
    assert together[kin].mean() >= 0.95
    assert together[~kin].sum() <= 1, "of 3,915 pairs of strangers"
    assert evidence.shape == (len(related), 3)


def test_an_embedding_takes_the_place_of_words_and_colours(family):
    records = family.records[::3]  # strangers
    twins = {(i, i + 15) for i in range(15)}
    embedding = np.eye(15, dtype=np.float32)[np.arange(30) % 15]
    by_dct = np.sort(duplicates.nearest(duplicates.d4_blind(records["dct"]), 5), axis=1)
    by_dct = {(i, j) for i, j in by_dct.tolist() if i < j}
    by_words, by_embedding = duplicates.candidates(records), duplicates.candidates(records, embedding)
    assert by_dct <= {*map(tuple, by_words.tolist())}
    assert not twins <= {*map(tuple, by_words.tolist())}
    assert by_dct | twins <= {*map(tuple, by_embedding.tolist())}
    vectors = np.full((30, duplicates.VECTOR), np.nan, np.float32)
    duplicates.words_and_colours(records, vectors)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1)
    assert np.array_equal(duplicates.candidates(records, vectors), by_words)


def test_processes_read_the_mapped_file_and_find_the_same(family, tmp_path, monkeypatch):
    records = np.memmap(tmp_path / "records", duplicates.RECORD, "w+", shape=24)
    records[:] = family.records[:24]
    proposed = duplicates.candidates(records)
    monkeypatch.setattr(duplicates, "PAIRS_A_TASK", 40)
    monkeypatch.setattr(duplicates, "cpu_count", lambda: 2)
    alone = duplicates.relatives(records, proposed)
    monkeypatch.setattr(duplicates, "FEW_PAIRS", 0)
    monkeypatch.setattr(cv2, "setNumThreads", None)  # only this process would fail
    together = duplicates.relatives(records, proposed)
    assert len(alone[0]) >= 16
    assert np.array_equal(alone[0], together[0])
    assert np.array_equal(alone[1], together[1])


def test_components_are_numbered_by_their_first_image():
    assert duplicates.components(np.array([[1, 4], [4, 5], [2, 3]]), 7).tolist() == [0, 1, 2, 2, 1, 1, 3]
    assert duplicates.components(np.array([[5, 0], [2, 1]]), 6).tolist() == [0, 1, 1, 2, 3, 0]
    assert duplicates.components(np.zeros((0, 2), int), 3).tolist() == [0, 1, 2]


# ---------------------------------------------------------------- what is shown

# Of the training images a to e, a, b and c are one group and d has a copy in the test set.
RELATED = np.array([[0, 1], [0, 2], [1, 2], [3, 5]])
EVIDENCE = np.array([[63, 20, 0.95], [63, 20, 0.97], [63, 9, 0.99], [4, 0, 0.93]])
SHOWN = np.array([0, 0, 0, 1, 2, 1, 3]), list("abcde"), list("xxyyx"), ["s", "t"]


def test_table_names_the_closest_relative_and_the_evidence():
    table = duplicates.table(RELATED, EVIDENCE, *SHOWN).astype(str)
    assert table.image_name.tolist() == ["a", "b", "c", "d", "s"]
    assert table.relative.tolist() == ["train/c", "train/a", "train/a", "test/s", "train/d"]
    assert table.label.tolist() == ["x", "x", "y", "y", ""]
    assert table.labels_disagree.tolist() == ["1", "1", "1", "0", "0"]
    assert table.found_by.tolist() == ["features"] * 3 + ["hash"] * 2
    assert table.hash_bits.tolist() == ["", "", "", "4", "4"]
    assert table.iloc[0].tolist()[-2:] == ["", "0.97"]
    empty = duplicates.table(np.zeros((0, 2), int), np.zeros((0, 3)), np.arange(7), *SHOWN[1:])
    assert len(empty) == 0
    assert empty.columns.tolist() == table.columns.tolist()


def test_summary_counts_relatives_and_names_conflicts():
    summary = duplicates.summary(*SHOWN)
    assert summary == dict(
        groups=2, largest=3, largest_share=pytest.approx(3 / 7), train_with_relative=0.6, test_with_relative=0.5,
        conflicts=[["a", "b", "c"]],
    )  # fmt: skip
    lines = duplicates.report_lines(summary)
    assert lines[0].startswith("2 of two or more images, the largest of 3 ")
    assert "60.0% of the training and 50.0% of the test images have a relative" in lines[1]
    assert "a = b = c" in lines[-1]
    assert lines[-1].startswith("1 whose labels disagree (a label is wrong, or the group is)")


@pytest.mark.parametrize(
    ("changed", "count", "said"),
    [
        ({}, 2, "have a relative"),
        (dict(train_with_relative=0.5), 3, "relatives stay in one fold"),
        (dict(train_with_relative=0.5, test_with_relative=0.4), 3, "the test set shares sources"),
        (dict(test_with_relative=0.04), 2, "have a relative"),
        (dict(conflicts=[["a", "b"]]), 3, "a = b"),
        (dict(largest=21, largest_share=0.021), 3, "--groups none"),
        (dict(largest=20, largest_share=0.5), 2, "have a relative"),
    ],
)
def test_each_finding_is_said_once(changed, count, said):
    plain = dict(
        groups=1, largest=2, largest_share=0.01, train_with_relative=0.01, test_with_relative=0.0, conflicts=[]
    )
    lines = duplicates.report_lines(plain | changed)
    assert len(lines) == count
    assert said in lines[-1]
    assert duplicates.report_lines(None) == []


def test_contact_sheet_shows_the_least_certain_pairs_then_the_largest_groups(family, tmp_path, monkeypatch):
    sheets = []
    monkeypatch.setattr(pictures, "contact_sheet", lambda *sheet: sheets.append(sheet))
    pictures.draw(tmp_path / "sheet.png", family.records[:7], RELATED, EVIDENCE, *SHOWN)
    path, rows, columns = sheets[0]
    titles, captions = [title for title, _ in rows], [[caption for _, caption in cells] for _, cells in rows]
    assert (path, columns) == (tmp_path / "sheet.png", 8)
    assert titles == ["least certain pairs", "group 0\n3 images", "group 1\n2 images"]
    a, b, c, d, s = "train a [x]", "train b [x]", "train c [y]", "train d [y]", "test s"
    assert captions == [[d, s, b, c, a, b, a, c], [a, b, c], [d, s]]
    height, width = family.records["shape"][3]
    assert np.array_equal(rows[0][1][0][0], family.records["thumb"][3, :height, :width])


# ---------------------------------------------------------------- the forecast


def light_of(images):
    return np.stack([shift.statistics(image) for image in images])


def test_statistics_are_size_light_sharpness_colours_and_a_thumbnail():
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 40:] = 255, 0, 0  # the right half is red, of grey 76
    values = shift.statistics(image)
    assert values.shape == (shift.STATISTICS,)
    assert values[:3] == pytest.approx(np.log([40, 80, 2]))
    assert values[3:5] == pytest.approx([38 / 255, 38 / 255], abs=0.005)
    assert values[5] > shift.statistics(cv2.GaussianBlur(image, (0, 0), 2))[5] > 0
    assert values[6:30].reshape(3, 8)[:, [0, 7]] == pytest.approx(np.array([[0.5, 0.5], [1, 0], [1, 0]]), abs=0.01)
    assert values[30:].reshape(6, 6)[0] * 255 == pytest.approx([0, 0, 0, 76, 76, 76], abs=2)


def test_adversarial_validation_tells_another_light_from_chance(monkeypatch):
    images = np.random.default_rng(0).integers(0, 200, (160, 12, 12, 3)).astype(np.uint8)
    is_test, alone = np.arange(160) >= 80, np.arange(160)
    alike = shift.adversarial_validation(light_of(images), is_test, alone, 777)
    assert alike["low"] - 0.05 < alike["auc"] < alike["high"] + 0.05
    assert 0.35 < alike["low"] < 0.5 < alike["high"] < 0.65
    images[is_test] += 40
    other = shift.adversarial_validation(light_of(images), is_test, alone, 777)
    assert other["auc"] > 0.95
    monkeypatch.setattr(shift, "MOST_IMAGES", 60)
    fewer = shift.adversarial_validation(light_of(images), is_test, alone, 777)
    assert fewer["auc"] > 0.95
    assert fewer["high"] - fewer["low"] > other["high"] - other["low"], "of fewer images, chance says more"


def test_too_few_groups_on_either_side_prove_nothing():
    features = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    least = shift.LEAST
    for is_test in (np.arange(60) < least - 1, np.arange(60) > least - 2):
        assert shift.adversarial_validation(features, is_test, np.arange(60), 777) is None
    assert shift.adversarial_validation(features, np.arange(60) < least, np.arange(60), 777) is not None
    assert shift.adversarial_validation(features, np.arange(60) < 30, np.arange(60) // 2, 777) is None


def test_copies_of_one_source_do_not_look_like_a_shift():
    """48 sources × 5 near-copies: unless groups are held together, the sources give away which part is which."""
    rng = np.random.default_rng(1)
    source = np.repeat(np.arange(48), 5)
    features = (rng.normal(size=(48, 100))[source] + 0.01 * rng.normal(size=(240, 100))).astype(np.float32)
    is_test = source >= 24
    together = shift.adversarial_validation(features, is_test, source, 777)
    apart = shift.adversarial_validation(features, is_test, np.arange(240), 777)
    assert together["low"] < together["auc"] < together["high"]
    assert apart["auc"] > 0.95
    assert together["high"] - together["low"] > 2 * (apart["high"] - apart["low"]), "whole groups are permuted"


@pytest.mark.parametrize(
    ("auc", "said"), [(0.55, "don't tell"), (0.65, "differ a little"), (0.75, "may not speak for the leaderboard")]
)
def test_verdict_depends_on_chance_first(auc, said):
    verdict, figures = shift.report_lines(dict(auc=auc, low=0.4, high=0.6))
    assert said in verdict
    assert f"AUC {auc:.3f}, by chance 0.400 to 0.600" in figures
    assert "don't tell" in shift.report_lines(dict(auc=auc, low=0.2, high=0.8))[0]
    assert "too few" in shift.report_lines(None)[0]
