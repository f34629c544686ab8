"""The paper's Figure 4: the seed and the output of every walk, and how good each of them is.

Every stage is scored as the prediction is: upsampled, argmax, at the image's own size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from segmentation.boundary import BoundaryIoU, Trimap
from segmentation.data.loader import spread
from segmentation.evaluate import border_numbers
from segmentation.figures.drawing import PAGE, Picture, save, tiles
from segmentation.figures.inputs import Study, check_new
from segmentation.figures.panel import largest_class, step_title
from segmentation.fragments import Fragments
from segmentation.metrics import ConfusionMatrix
from segmentation.models import DifNetMaps
from segmentation.models.deeplab import upsample
from segmentation.rundir import write_rows


def draw_walks(
    study: Study, out: Path, overwrite: bool = False, drawn: int = 6
) -> tuple[list[Path], list[dict[str, Any]]]:
    """Draw walks.png and walks.pdf and write walks.csv, a row for the seed and each walk.

    Columns: `changed`, the share of pixels whose class is another than at the stage before; and over the
    images whose truth is known mIoU, pixel accuracy, the trimap mIoU of several widths, boundary IoU and
    fragmentation, as `segmentation.evaluate --boundary` has them. Without any truth these columns are left
    out.

    Args:
        study: model and images; all of them count.
        out: folder to write into.
        overwrite: replace what an earlier call wrote.
        drawn: how many of the images to draw, evenly spread.

    Returns:
        The files written, and the rows of walks.csv.
    """
    stem, table = out / "walks", out / "walks.csv"
    check_new([stem.with_suffix(".png"), stem.with_suffix(".pdf"), table], overwrite)
    stages = [_Stage(title, len(study.classes)) for title in ("seed", *map(step_title, study.model.steps))]
    chosen = set(spread(len(study), drawn))
    rows: list[Mapping[str, Picture]] = []
    names: list[str] = []
    known = 0
    for index, sample in enumerate(study):
        maps = study.maps(sample)
        predictions = _predictions(maps, sample.padded, sample.size)
        known += sample.label is not None
        before = predictions[0]
        for stage, prediction in zip(stages, predictions, strict=True):
            stage.update(prediction, before, sample.label)
            before = prediction
        if index in chosen:
            row: dict[str, Picture] = {"image": sample.pixels}
            if sample.label is not None:
                row["truth"] = sample.label
            titles = (stage.title for stage in stages)
            rows.append(row | dict(zip(titles, predictions, strict=True)))
            names.append(sample.name)
    figure, _ = tiles(rows, study.classes, PAGE / max(map(len, rows)), names)
    written = save(figure, stem)
    numbers = [stage.numbers(known) for stage in stages]
    write_rows(table, numbers)
    return [*written, table], numbers


def table_of_walks(numbers: Sequence[Mapping[str, Any]]) -> str:
    """The most telling columns of walks.csv as aligned text; scores in percent."""
    shown = {
        "miou": ("mIoU", 100), "trimap_miou_1": ("1 px", 100), "trimap_miou_5": ("5 px", 100),
        "trimap_miou_20": ("20 px", 100), "boundary_iou": ("bIoU", 100), "extra_components": ("extra", 1),
        "tiny_share": ("tiny %", 100), "border_ratio": ("border", 1), "changed": ("changed %", 100),
    }  # fmt: skip
    columns = [(key, *told) for key, told in shown.items() if key in numbers[0]]
    width = max(len(str(row["stage"])) for row in numbers)
    lines = [f"{'':<{width}}" + "".join(f"  {name:>{max(7, len(name))}}" for _, name, _ in columns)]
    for row in numbers:
        cells = (f"  {factor * row[key]:>{max(7, len(name))}.2f}" for key, name, factor in columns)
        lines.append(f"{row['stage']:<{width}}" + "".join(cells))
    return "\n".join(lines)


def _predictions(maps: DifNetMaps, padded: torch.Tensor, size: tuple[int, int]) -> list[NDArray[Any]]:
    """Classes [H, W] of the seed and after each walk."""
    height, width = size
    return [
        largest_class(upsample(score, padded)[..., :height, :width]) for score in (maps.seed, *maps.walks)
    ]


@dataclass
class _Stage:
    """What is counted of one stage over the images."""

    title: str
    classes: int
    changed: int = 0
    pixels: int = 0
    images: int = 0
    matrix: ConfusionMatrix = field(init=False)
    trimap: Trimap = field(init=False)
    inner: BoundaryIoU = field(init=False)
    fragments: Fragments = field(init=False)

    def __post_init__(self) -> None:
        self.matrix = ConfusionMatrix(self.classes, torch.device("cpu"))
        self.trimap, self.inner = Trimap(self.classes), BoundaryIoU(self.classes)
        self.fragments = Fragments(self.classes)

    def update(
        self, prediction: NDArray[np.int64], before: NDArray[np.int64], label: NDArray[np.int64] | None
    ) -> None:
        self.images += 1
        self.pixels += prediction.size
        self.changed += int((prediction != before).sum())
        if label is not None:
            self.matrix.update(torch.from_numpy(prediction), torch.from_numpy(label))
            for measure in (self.trimap, self.inner, self.fragments):
                measure.update(prediction, label)

    def numbers(self, known: int) -> dict[str, Any]:
        row = {"stage": self.title, "images": self.images, "with_truth": known}
        changed = {"changed": self.changed / self.pixels}
        if not known:
            return row | changed
        scores = self.matrix.compute()
        return {
            **row, "miou": scores.miou, "pixel_accuracy": scores.pixel_accuracy,
            **border_numbers(self.trimap, self.inner, self.fragments.compute()), **changed,
        }  # fmt: skip
