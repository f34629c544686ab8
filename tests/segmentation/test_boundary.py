"""Trimap, boundary IoU and fragmentation against plain loops over pixels."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segmentation.boundary import BoundaryIoU, Trimap
from segmentation.fragments import Fragments
from segmentation.metrics import Scores

CLASSES = 4
VOID = 255


@st.composite
def pairs(draw):
    """Some images of differing size, blocky so that there are insides: prediction, and truth with void."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    found = []
    for _ in range(draw(st.integers(1, 3))):
        height, width = rng.integers(1, 15, 2)
        block = np.ones(rng.integers(1, 5, 2), int)
        truth, prediction = (
            np.kron(rng.choice(values, size=(15, 15)), block)[:height, :width]
            for values in ([0, 1, 3, 3, VOID], [0, 1, 2, 3])
        )
        found.append((prediction, np.where(rng.random(truth.shape) < 0.05, 2, truth)))
    return found


def pixels(array):
    return itertools.product(*(range(side) for side in array.shape))


def beside(array, i, j):
    around = ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1))
    return [array[p] for p in around if 0 <= p[0] < array.shape[0] and 0 <= p[1] < array.shape[1]]


@given(pairs())
def test_trimap_counts_the_pixels_near_borders(images):
    trimap, expected = Trimap(CLASSES, widest=5), np.zeros((5, CLASSES, CLASSES), int)
    for prediction, truth in images:
        trimap.update(prediction, truth)
        border = [p for p in pixels(truth) if any(v != truth[p] for v in beside(truth, *p))]
        for p in pixels(truth):
            nearest = min((math.dist(p, q) for q in border), default=math.inf)
            for k in range(1, 6):
                if truth[p] != VOID and nearest < k:
                    expected[k - 1, truth[p], prediction[p]] += 1
    np.testing.assert_array_equal([scores.confusion for scores in trimap.curve()], expected)


@given(pairs())
def test_boundary_iou_is_that_of_eroded_classes(images):
    measure, both, either = BoundaryIoU(CLASSES), np.zeros(CLASSES), np.zeros(CLASSES)

    def band(mask):
        d = max(1, round(0.02 * math.hypot(*mask.shape)))
        padded = np.pad(mask, d)
        kept = [padded[i : i + 2 * d + 1, j : j + 2 * d + 1].all() for i, j in pixels(mask)]
        return mask & ~np.reshape(kept, mask.shape)

    for prediction, truth in images:
        measure.update(prediction, truth)
        for c in range(CLASSES):
            one, other = band(truth == c), band((prediction == c) & (truth != VOID))
            both[c] += (one & other).sum()
            either[c] += (one | other).sum()
    expected = [b / e if e else math.nan for b, e in zip(both, either, strict=True)]
    np.testing.assert_allclose(measure.iou, expected)
    if either.any():
        assert measure.miou == pytest.approx(np.nanmean(expected))


def test_boundary_iou_bands_are_two_percent_of_the_diagonal_wide():
    truth = np.zeros((300, 400), int)
    measure = BoundaryIoU(1)
    measure.update(truth, truth)
    assert measure._either[0] == 300 * 400 - 280 * 380


def components(mask):
    """Sizes, by flooding."""
    left, sizes = {p for p in pixels(mask) if mask[p]}, []
    while left:
        edge = [left.pop()]
        sizes.append(0)
        while edge:
            i, j = edge.pop()
            sizes[-1] += 1
            near = {(i + a, j + b) for a in (-1, 0, 1) for b in (-1, 0, 1)} & left
            left -= near
            edge += near
    return sizes


@given(pairs())
def test_fragments_are_flooded_components(images):
    measure = Fragments(CLASSES)
    counts = {name: np.zeros(CLASSES) for name in ("images", "extra", "abs", "pixels", "length", "truth")}
    for prediction, truth in images:
        measure.update(prediction, truth)
        prediction = np.where(truth == VOID, VOID, prediction)
        for c in range(CLASSES):
            found = components(prediction == c)
            if found:
                extra = len(found) - len(components(truth == c))
                counts["images"][c] += 1
                counts["extra"][c] += extra
                counts["abs"][c] += abs(extra)
                counts["pixels"][c] += sum(found)
            for name, array in (("length", prediction), ("truth", truth)):
                inside = [p for p in pixels(array) if array[p] == c]
                counts[name][c] += sum(v != c for p in inside for v in beside(array, *p))
    result = measure.compute()
    for name, got in (("images", result.images), ("extra", result.extra), ("abs", result.extra_abs),
                      ("pixels", result.pixels), ("length", result.border),
                      ("truth", result.truth_border)):  # fmt: skip
        np.testing.assert_array_equal(got, counts[name], err_msg=name)
    overall = result.overall()
    if counts["images"].any():
        assert overall["extra_components"] == pytest.approx(counts["extra"].sum() / counts["images"].sum())
    if counts["truth"].any():
        assert overall["border_ratio"] == pytest.approx(counts["length"].sum() / counts["truth"].sum())


def test_tiny_components_are_smaller_than_a_thousandth_of_the_image():
    truth = np.zeros((50, 100), int)
    prediction = truth.copy()
    prediction[10:12, 10:12] = 1  # 4 of 5000 pixels: tiny
    prediction[30:31, 10:15] = 1  # 5 of 5000: not
    measure = Fragments(2)
    measure.update(prediction, truth)
    result = measure.compute()
    np.testing.assert_array_equal(result.tiny, [0, 4])
    assert result.overall()["tiny_share"] == pytest.approx(4 / 5000)
    assert result.overall()["truth_tiny_share"] == 0
    per_class = result.per_class()
    np.testing.assert_allclose(per_class["extra_components"], [0, 2])
    np.testing.assert_allclose(per_class["tiny_share"], [0, 4 / 9])
    np.testing.assert_allclose(per_class["border_ratio"], [np.nan, np.nan])


@given(pairs())
def test_what_is_said_of_void_counts_nowhere_and_the_truth_itself_is_perfect(images):
    boundary, trimap, fragments = BoundaryIoU(CLASSES), Trimap(CLASSES), Fragments(CLASSES)
    for prediction, truth in images:
        for measure in (boundary, trimap, fragments):
            measure.update(np.where(truth == VOID, prediction, truth), truth)
    assert set(boundary.iou[~np.isnan(boundary.iou)]) <= {1.0}
    widest = trimap.curve()[-1]
    assert np.isnan(widest.miou) or widest.miou == 1
    result = fragments.compute()
    assert not result.extra_abs.any()
    np.testing.assert_array_equal(result.border, result.truth_border)
    np.testing.assert_array_equal(result.tiny, result.truth_tiny)


def test_counts_do_not_grow_with_the_split():
    measures = Trimap(CLASSES), BoundaryIoU(CLASSES), Fragments(CLASSES)

    def held():
        values = [value for measure in measures for value in vars(measure).values()]
        arrays = [a for value in values for a in (value.values() if isinstance(value, dict) else [value])]
        return [(array.shape, array.dtype) for array in arrays]

    before = held()
    rng = np.random.default_rng(1)
    for _ in range(10):
        truth, prediction = rng.integers(0, CLASSES, (2, 12, 13))
        for measure in measures:
            measure.update(prediction, truth)
    assert held() == before


def test_foreground_miou_leaves_the_truths_background_out():
    # Rows: truth. Background taken for a cat is not counted, a cat taken for background is a miss.
    scores = Scores(np.array([[50, 7, 0], [1, 3, 0], [0, 2, 4]]))
    assert scores.foreground_miou == pytest.approx((3 / 6 + 4 / 6) / 2)
    assert np.isnan(Scores(np.zeros((3, 3), np.int64)).foreground_miou)
