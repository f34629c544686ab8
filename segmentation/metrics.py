"""Scores of a segmentation, all computed from one confusion matrix over the whole split.

With n_ij the number of pixels of class i predicted as j, t_i = Σ_j n_ij and p_i = Σ_j n_ji:

    IoU_i = n_ii / (t_i + p_i - n_ii),  mIoU = mean of IoU_i over classes with t_i + p_i > 0.

Means over images or over batches are other numbers, and depend on how the split was cut into batches.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from segmentation.data import VOID


@dataclass(frozen=True)
class Scores:
    """Scores in [0, 1] from a confusion matrix.

    Args:
        confusion: int64 [C, C], truth along rows, prediction along columns.
    """

    confusion: NDArray[np.int64]

    @property
    def truth(self) -> NDArray[np.int64]:
        """Pixels of each class in the truth, [C]."""
        pixels: NDArray[np.int64] = self.confusion.sum(1)
        return pixels

    @property
    def iou(self) -> NDArray[np.float64]:
        """Intersection over union of each class, [C]; nan where neither truth nor prediction has it."""
        union = self.truth + self.confusion.sum(0) - self.confusion.diagonal()
        return ratio(self.confusion.diagonal(), union)

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """Share of each class's pixels that were found, [C]; nan where the truth has none."""
        return ratio(self.confusion.diagonal(), self.truth)

    @property
    def miou(self) -> float:
        """Mean IoU over the classes that occur."""
        return mean_of_known(self.iou)

    @property
    def foreground_miou(self) -> float:
        """Mean IoU over classes 1, 2, ..., where pixels of class 0 in the truth are left out like void.

        A pixel of another class that is taken for class 0 is a miss. On Pascal Context, with background as
        class 0, this is mIoU-59 and `miou` is mIoU-60.
        """
        confusion = self.confusion.copy()
        confusion[0] = 0
        return mean_of_known(Scores(confusion).iou[1:])

    @property
    def mean_accuracy(self) -> float:
        """Mean accuracy over the classes of the truth."""
        return mean_of_known(self.accuracy)

    @property
    def pixel_accuracy(self) -> float:
        """Share of pixels that were right."""
        return float(ratio(self.confusion.trace(), self.confusion.sum()))

    @property
    def fw_iou(self) -> float:
        """IoU weighted by each class's share of the truth."""
        weights = ratio(self.truth, self.truth.sum())
        return float(np.sum((weights * self.iou)[self.truth > 0])) if self.truth.any() else float("nan")

    @property
    def majority_miou(self) -> float:
        """The mIoU of answering the truth's most frequent class everywhere: what any model has to beat."""
        present = np.count_nonzero(self.truth)
        return float(ratio(self.truth.max(), self.truth.sum())) / present if present else float("nan")

    def table(self, classes: tuple[str, ...]) -> str:
        """Per-class scores and their means as aligned text, in percent."""
        width = max(len("frequency-weighted"), *(len(name) for name in classes))
        lines = [f"{'class':<{width}}  {'IoU':>6}  {'acc.':>6}  {'pixels':>7}"]
        share = 100 * ratio(self.truth, self.truth.sum())
        for name, iou, accuracy, part in zip(
            classes, 100 * self.iou, 100 * self.accuracy, share, strict=True
        ):
            lines.append(f"{name:<{width}}  {_cell(iou)}  {_cell(accuracy)}  {part:6.2f}%")
        lines += [
            f"{'mean':<{width}}  {_cell(100 * self.miou)}  {_cell(100 * self.mean_accuracy)}",
            f"{'frequency-weighted':<{width}}  {_cell(100 * self.fw_iou)}",
            f"{'all pixels':<{width}}  {'':6}  {_cell(100 * self.pixel_accuracy)}",
            f"{'majority class':<{width}}  {_cell(100 * self.majority_miou)}",
        ]
        return "\n".join(lines)


class ConfusionMatrix:
    """Counts pixels by truth and prediction, image after image; void pixels are left out."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        # Labels were checked when they were loaded, and predictions are an argmax over the classes.
        metric = MulticlassConfusionMatrix(num_classes, ignore_index=VOID, validate_args=False)
        self._metric = metric.to(device)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Count the pixels of one prediction: class indices of any equal shape."""
        self._metric.update(prediction, label)

    def compute(self) -> Scores:
        """Scores of everything counted so far."""
        return Scores(self._metric.compute().cpu().numpy().astype(np.int64))


def ratio(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    """part / whole, nan where the whole is 0."""
    share = np.full(np.shape(part), np.nan)
    np.divide(part, whole, out=share, where=np.not_equal(whole, 0))
    return share


def mean_of_known(values: NDArray[np.float64]) -> float:
    """Mean of what is not nan; nan where all is."""
    finite = values[~np.isnan(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _cell(percent: float) -> str:
    return "     -" if np.isnan(percent) else f"{percent:6.2f}"
