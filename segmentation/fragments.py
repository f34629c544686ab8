"""How scattered a segmentation is: its components, their sizes and the length of its borders.

Label maps are arrays of ints [H, W], the truth's with `VOID` where it is unknown. Void belongs to no
component of either, so that a prediction that is right wherever the truth is known has exactly the truth's
components.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from segmentation.data import VOID
from segmentation.metrics import ratio

Labels = NDArray[np.integer]

TINY = 0.001
"""A component is tiny below this share of its image."""

_COLUMNS = {
    "extra_components": ("extra", "images"),
    "extra_components_abs": ("extra_abs", "images"),
    "tiny_share": ("tiny", "pixels"),
    "truth_tiny_share": ("truth_tiny", "truth_pixels"),
    "border_ratio": ("border", "truth_border"),
}


@dataclass(frozen=True)
class Fragmentation:
    """Counts over a split, each int64 [C].

    Args:
        images: in which the class is predicted.
        extra: over those, 8-connected components of the prediction less those of the truth, signed.
        extra_abs: the same, absolute.
        tiny: predicted pixels in tiny components.
        pixels: predicted.
        truth_tiny: pixels of the truth in tiny components.
        truth_pixels: of the truth.
        border: of the prediction, in pairs of a pixel of the class beside (not diagonally) one outside it.
        truth_border: of the truth.
    """

    images: NDArray[np.int64]
    extra: NDArray[np.int64]
    extra_abs: NDArray[np.int64]
    tiny: NDArray[np.int64]
    pixels: NDArray[np.int64]
    truth_tiny: NDArray[np.int64]
    truth_pixels: NDArray[np.int64]
    border: NDArray[np.int64]
    truth_border: NDArray[np.int64]

    def per_class(self) -> dict[str, NDArray[np.float64]]:
        """Measures of each class, [C]; nan where there is nothing to divide by.

        `extra_components` and `extra_components_abs` are means over images in which the class is predicted,
        `tiny_share` and `truth_tiny_share` shares of the class's pixels, `border_ratio` prediction to truth.
        """
        return {
            name: ratio(getattr(self, part), getattr(self, whole)) for name, (part, whole) in _COLUMNS.items()
        }

    def overall(self) -> dict[str, float]:
        """The same measures over all classes: sums divided by sums."""
        return {
            name: float(ratio(getattr(self, part).sum(), getattr(self, whole).sum()))
            for name, (part, whole) in _COLUMNS.items()
        }


class Fragments:
    """Counts the components of predictions and truths, image after image."""

    def __init__(self, num_classes: int) -> None:
        self._counts = {name: np.zeros(num_classes, np.int64) for name in Fragmentation.__dataclass_fields__}

    def update(self, prediction: Labels, label: Labels) -> None:
        """Count one image."""
        count = self._counts
        prediction = np.where(label == VOID, VOID, prediction)
        tiny = TINY * label.size
        for c in np.union1d(prediction, label):
            if c == VOID:
                continue
            sizes, truth_sizes = _component_sizes(prediction == c), _component_sizes(label == c)
            if len(sizes):
                count["images"][c] += 1
                count["extra"][c] += len(sizes) - len(truth_sizes)
                count["extra_abs"][c] += abs(len(sizes) - len(truth_sizes))
            count["tiny"][c] += sizes[sizes < tiny].sum()
            count["pixels"][c] += sizes.sum()
            count["truth_tiny"][c] += truth_sizes[truth_sizes < tiny].sum()
            count["truth_pixels"][c] += truth_sizes.sum()
        count["border"] += _border_lengths(prediction, len(count["border"]))
        count["truth_border"] += _border_lengths(label, len(count["border"]))

    def compute(self) -> Fragmentation:
        """Counts of everything seen so far."""
        return Fragmentation(**{name: values.copy() for name, values in self._counts.items()})


def _component_sizes(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Pixels of each 8-connected component."""
    from scipy.ndimage import label as number_components

    numbers, _ = number_components(mask, structure=np.ones((3, 3)))
    return np.bincount(numbers.ravel())[1:]


def _border_lengths(labels: Labels, num_classes: int) -> NDArray[np.int64]:
    """Pairs of pixels, side by side or one above the other, of which one is of the class, [C]."""
    lengths = np.zeros(VOID + 1, np.int64)
    for one, other in ((labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1])):
        differs = one != other
        lengths += np.bincount(one[differs], minlength=VOID + 1)
        lengths += np.bincount(other[differs], minlength=VOID + 1)
    return lengths[:num_classes]
