"""Adversarial validation: a test set of another kind is told from chance."""

import cv2
import numpy as np
import pytest

from kit.folds import shift


def statistics_of(images):
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


def test_a_brighter_test_set_is_told_from_chance(monkeypatch):
    images = np.random.default_rng(0).integers(0, 200, (160, 12, 12, 3)).astype(np.uint8)
    is_test, alone = np.arange(160) >= 80, np.arange(160)
    alike = shift.adversarial_validation(statistics_of(images), is_test, alone, 777)
    assert alike["low"] - 0.05 < alike["auc"] < alike["high"] + 0.05
    assert 0.35 < alike["low"] < 0.5 < alike["high"] < 0.65
    images[is_test] += 40
    other = shift.adversarial_validation(statistics_of(images), is_test, alone, 777)
    assert other["auc"] > 0.95
    monkeypatch.setattr(shift, "MOST_IMAGES", 60)
    fewer = shift.adversarial_validation(statistics_of(images), is_test, alone, 777)
    assert fewer["auc"] > 0.95
    assert fewer["high"] - fewer["low"] > other["high"] - other["low"], "fewer images, a wider range of chance"


def test_too_few_groups_on_either_side_prove_nothing():
    features = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    least = shift.LEAST
    for is_test in (np.arange(60) < least - 1, np.arange(60) > least - 2):
        assert shift.adversarial_validation(features, is_test, np.arange(60), 777) is None
    assert shift.adversarial_validation(features, np.arange(60) < least, np.arange(60), 777) is not None
    assert shift.adversarial_validation(features, np.arange(60) < 30, np.arange(60) // 2, 777) is None


def test_duplicates_do_not_look_like_a_shift():
    """48 sources × 5 near-duplicates: unless groups stay together, the sources tell which part is which."""
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
    ("auc", "words"), [(0.55, "don't tell"), (0.65, "differ a little"), (0.75, "may not hold for the leaderboard")]
)
def test_an_auc_within_the_range_of_chance_shows_no_shift(auc, words):
    verdict, figures = shift.shift_lines(dict(auc=auc, low=0.4, high=0.6))
    assert words in verdict
    assert f"AUC {auc:.3f}, by chance 0.400 to 0.600" in figures
    assert "don't tell" in shift.shift_lines(dict(auc=auc, low=0.2, high=0.8))[0]
    assert "too few" in shift.shift_lines(None)[0]
