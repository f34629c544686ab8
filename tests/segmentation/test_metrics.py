"""Scores against a plain loop over classes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from segmentation.metrics import ConfusionMatrix, Scores

CLASSES = 5


@st.composite
def predictions(draw):
    """A few images of differing size: truth with void, and a prediction."""
    seed = draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    present = rng.choice(CLASSES, size=rng.integers(1, CLASSES + 1), replace=False)
    pairs = []
    for _ in range(draw(st.integers(1, 4))):
        shape = rng.integers(1, 9, 2)
        truth = rng.choice(np.append(present, 255), size=shape)
        pairs.append((truth, rng.integers(0, CLASSES, shape)))
    return pairs


@given(predictions())
def test_scores_equal_plain_counting(pairs):
    matrix = ConfusionMatrix(CLASSES, torch.device("cpu"))
    for truth, prediction in pairs:
        matrix.update(torch.from_numpy(prediction)[None], torch.from_numpy(truth)[None])
    scores = matrix.compute()

    truth = np.concatenate([t.ravel() for t, _ in pairs])
    prediction = np.concatenate([p.ravel() for _, p in pairs])
    prediction, truth = prediction[truth != 255], truth[truth != 255]
    iou, accuracy, weighted = [], [], []
    for c in range(CLASSES):
        both, either = np.sum((truth == c) & (prediction == c)), np.sum((truth == c) | (prediction == c))
        iou.append(both / either if either else np.nan)
        accuracy.append(both / np.sum(truth == c) if (truth == c).any() else np.nan)
        weighted.append(np.sum(truth == c) / len(truth) * iou[c] if (truth == c).any() else 0)
    np.testing.assert_allclose(scores.iou, iou)
    np.testing.assert_allclose(scores.accuracy, accuracy)
    if len(truth):
        assert scores.miou == pytest.approx(np.nanmean(iou))
        assert scores.mean_accuracy == pytest.approx(np.nanmean(accuracy))
        assert scores.pixel_accuracy == pytest.approx(np.mean(truth == prediction))
        assert scores.fw_iou == pytest.approx(sum(weighted))

        majority = np.bincount(truth).argmax()
        constant = ConfusionMatrix(CLASSES, torch.device("cpu"))
        constant.update(torch.full((len(truth),), int(majority)), torch.from_numpy(truth))
        assert scores.majority_miou == pytest.approx(constant.compute().miou)


def test_one_matrix_over_the_split_is_not_a_mean_over_images():
    matrix = ConfusionMatrix(2, torch.device("cpu"))
    matrix.update(torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1]))
    matrix.update(torch.tensor([1]), torch.tensor([1]))
    scores = matrix.compute()
    np.testing.assert_array_equal(scores.confusion, [[3, 0], [1, 1]])
    assert scores.miou == pytest.approx((3 / 4 + 1 / 2) / 2)


def test_nothing_counted_is_nan_and_no_error():
    scores = Scores(np.zeros((3, 3), np.int64))
    assert np.isnan([scores.miou, scores.pixel_accuracy, scores.fw_iou, scores.majority_miou]).all()
    assert "ground" in scores.table(("ground", "disc", "ring"))


def test_the_table_is_aligned_and_in_percent():
    table = Scores(np.array([[3, 1], [0, 4]])).table(("background", "cat")).splitlines()
    assert table[1].split() == ["background", "75.00", "75.00", "50.00%"]
    assert table[3].split() == ["mean", "77.50", "87.50"]
    assert len({line.rstrip()[:25].rfind(".") for line in table[1:4]}) == 1
