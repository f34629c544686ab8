"""The paper's Figure 2: image, truth, argmax of the score x, influence E_i = Σ_k |x_ik|, importance M."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segmentation.figures.drawing import PAGE, Picture, save, tiles
from segmentation.figures.inputs import Sample, Study, check_new, nodes_of
from segmentation.figures.panel import largest_class
from segmentation.rundir import write_rows


def draw_maps(study: Study, out: Path, overwrite: bool = False) -> list[Path]:
    """Draw maps.png and maps.pdf, and write the values behind them, a row for each node, to maps.csv.

    Args:
        study: model and images.
        out: folder to write into.
        overwrite: replace what an earlier call wrote.

    Returns:
        The files written.
    """
    stem, table = out / "maps", out / "maps.csv"
    check_new([stem.with_suffix(".png"), stem.with_suffix(".pdf"), table], overwrite)
    rows: list[Mapping[str, Picture]] = []
    names: list[str] = []
    numbers: list[dict[str, Any]] = []
    for sample in study:
        maps = study.maps(sample)
        nodes = nodes_of(sample, maps)
        # As float64, in which the sum over classes does not round before the file does.
        score = maps.score[0].double()
        inside = np.s_[: nodes.rows, : nodes.columns]
        largest = largest_class(maps.score)[inside]
        influence = score.abs().sum(0).cpu().numpy()[inside]
        importance = maps.importance[0, 0].cpu().numpy()[inside]
        row: dict[str, Picture] = {"image": sample.pixels}
        if sample.label is not None:
            row["truth"] = sample.label
        row |= {"score $x$": largest, "influence $E$": influence, "importance $M$": importance}
        rows.append(row)
        names.append(sample.name)
        numbers += _numbers(sample, study.classes, largest, influence, importance)
    figure, _ = tiles(rows, study.classes, PAGE / max(map(len, rows)), names)
    written = save(figure, stem)
    write_rows(table, numbers)
    return [*written, table]


def _numbers(
    sample: Sample,
    classes: tuple[str, ...],
    largest: NDArray[Any],
    influence: NDArray[Any],
    importance: NDArray[Any],
) -> list[dict[str, Any]]:
    return [
        {
            "image": sample.name, "row": row, "column": column, "score_class": classes[largest[row, column]],
            "influence": float(influence[row, column]), "importance": float(importance[row, column]),
        }
        for row, column in np.ndindex(*largest.shape)
    ]  # fmt: skip
