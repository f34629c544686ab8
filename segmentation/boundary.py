"""How close a segmentation keeps to the truth's borders: trimap mIoU and boundary IoU.

Both are counted over a whole split, image after image; void pixels do not count. Label maps are arrays of
ints [H, W], the truth's with `VOID` where it is unknown; predictions hold classes only.
"""

import numpy as np
from numpy.typing import NDArray

from segmentation.data import VOID
from segmentation.metrics import Scores, mean_of_known, ratio

Labels = NDArray[np.integer]

WIDEST_BAND = 40
"""Pixels; the curve of trimap mIoU has a point for each width up to this."""

DIAGONAL_SHARE = 0.02
"""Width of boundary IoU's bands as a share of the image's diagonal (Cheng et al. 2021)."""


class Trimap:
    """Confusion matrices limited to bands around the truth's borders (Kohli et al. 2009, DeepLab).

    Band k holds the pixels less than k px (Euclidean, between centres) from a pixel with another label beside
    it, void being a label too: k = 1 is the border pixels themselves. The image's edge is no border.

    Args:
        num_classes: C. The counts take widest x C x C integers, whatever the split.
        widest: number of bands.
    """

    def __init__(self, num_classes: int, widest: int = WIDEST_BAND) -> None:
        self._counts = np.zeros((widest, num_classes, num_classes), np.int64)

    def update(self, prediction: Labels, label: Labels) -> None:
        """Count one image."""
        widest, classes, _ = self._counts.shape
        distance = _border_distance(label)
        counted = (label != VOID) & (distance < widest)
        ring = distance[counted].astype(np.int64)
        cell = (ring * classes + label[counted]) * classes + prediction[counted]
        self._counts += np.bincount(cell, minlength=self._counts.size).reshape(self._counts.shape)

    def curve(self) -> list[Scores]:
        """Scores in bands 1, 2, ..., `widest`, each holding those before it."""
        return [Scores(confusion) for confusion in self._counts.cumsum(0)]


class BoundaryIoU:
    """IoU of inner bands (Cheng et al. 2021), class by class.

    The inner band of a class holds its pixels within d px (rows and columns alike) of a pixel outside it or
    of the image's edge; d is `DIAGONAL_SHARE` of the image's diagonal, at least 1. Truth and prediction are
    compared where the truth is known, and its void is outside of every class for both.
    """

    def __init__(self, num_classes: int) -> None:
        self._both = np.zeros(num_classes, np.int64)
        self._either = np.zeros(num_classes, np.int64)

    def update(self, prediction: Labels, label: Labels) -> None:
        """Count one image."""
        valid = label != VOID
        prediction = np.where(valid, prediction, VOID)
        width = max(1, round(DIAGONAL_SHARE * float(np.hypot(*label.shape))))
        in_truth = _inner_band(label, width) & valid
        in_prediction = _inner_band(prediction, width) & valid
        both = self._count(label, in_truth & in_prediction & (label == prediction))
        self._both += both
        self._either += self._count(label, in_truth) + self._count(prediction, in_prediction) - both

    @property
    def iou(self) -> NDArray[np.float64]:
        """Of each class, [C]; nan where neither truth nor prediction has it."""
        return ratio(self._both, self._either)

    @property
    def miou(self) -> float:
        """Mean over the classes that occur."""
        return mean_of_known(self.iou)

    def _count(self, labels: Labels, where: NDArray[np.bool_]) -> NDArray[np.int64]:
        return np.bincount(labels[where], minlength=len(self._both))


def _border_distance(label: Labels) -> NDArray[np.float64]:
    """Pixels to the nearest one with another label above, below, left or right of it; inf without any."""
    from scipy.ndimage import distance_transform_edt

    border = np.zeros(label.shape, bool)
    for one, other in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        differs = label[one] != label[other]
        border[one] |= differs
        border[other] |= differs
    if not border.any():
        return np.full(label.shape, np.inf)
    distance: NDArray[np.float64] = distance_transform_edt(~border)
    return distance


def _inner_band(labels: Labels, width: int) -> NDArray[np.bool_]:
    """Where the square of side 2 width + 1 around a pixel holds another label or leaves the image.

    That is what each class loses to an erosion by this square, for all classes at once.
    """
    from scipy.ndimage import maximum_filter, minimum_filter

    values = labels.astype(np.int16)
    side = 2 * width + 1
    lowest = minimum_filter(values, side, mode="constant", cval=-1)
    band: NDArray[np.bool_] = lowest != maximum_filter(values, side, mode="nearest")
    return band
