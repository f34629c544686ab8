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
        return _ratio(self.confusion.diagonal(), union)

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """Share of each class's pixels that were found, [C]; nan where the truth has none."""
        return _ratio(self.confusion.diagonal(), self.truth)

    @property
    def miou(self) -> float:
        """Mean IoU over the classes that occur."""
        return _mean(self.iou)

    @property
    def mean_accuracy(self) -> float:
        """Mean accuracy over the classes of the truth."""
        return _mean(self.accuracy)

    @property
    def pixel_accuracy(self) -> float:
        """Share of pixels that were right."""
        return float(_ratio(self.confusion.trace(), self.confusion.sum()))

    @property
    def fw_iou(self) -> float:
        """IoU weighted by each class's share of the truth."""
        weights = _ratio(self.truth, self.truth.sum())
        return float(np.sum((weights * self.iou)[self.truth > 0])) if self.truth.any() else float("nan")

    @property
    def majority_miou(self) -> float:
        """The mIoU of answering the truth's most frequent class everywhere: what any model has to beat."""
        present = np.count_nonzero(self.truth)
        return float(_ratio(self.truth.max(), self.truth.sum())) / present if present else float("nan")

    def table(self, classes: tuple[str, ...]) -> str:
        """Per-class scores and their means as aligned text, in percent."""
        width = max(len("frequency-weighted"), *(len(name) for name in classes))
        lines = [f"{'class':<{width}}  {'IoU':>6}  {'acc.':>6}  {'pixels':>7}"]
        share = 100 * _ratio(self.truth, self.truth.sum())
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


def _ratio(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        return np.divide(part, whole, dtype=np.float64)


def _mean(values: NDArray[np.float64]) -> float:
    finite = values[~np.isnan(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _cell(percent: float) -> str:
    return "     -" if np.isnan(percent) else f"{percent:6.2f}"
