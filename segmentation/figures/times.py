"""The paper's Table 4: seconds of a forward pass, part by part."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segmentation.engine import Model
from segmentation.figures.drawing import PAGE, plain, save
from segmentation.figures.inputs import check_new
from segmentation.rundir import write_rows
from segmentation.timing import seconds_by_part

_COLOURS = {
    "seed branch": "#86aede", "similarity branch": "#a9def0", "diffusion": "#f0919b", "network": "#a3cf95",
    "upsampling": "#c4c4c4",
}  # fmt: skip


def draw_timing(
    models: Mapping[str, Model], image_size: int, rounds: int, out: Path, overwrite: bool = False
) -> tuple[list[Path], list[dict[str, Any]]]:
    """Time models on one image, draw timing.png and .pdf and write timing.csv, a row for each part.

    Args:
        models: by name, in eval mode, all on one device.
        image_size: side of the square image in pixels.
        rounds: passes of each model that count.
        out: folder to write into.
        overwrite: replace what an earlier call wrote.

    Returns:
        The files written, and the rows of timing.csv: median, smallest and largest seconds of each part and
        of the whole pass, and the share of the part's median in the sum of all parts' in percent.
    """
    stem, table = out / "timing", out / "timing.csv"
    check_new([stem.with_suffix(".png"), stem.with_suffix(".pdf"), table], overwrite)
    device = next(next(iter(models.values())).parameters()).device
    image = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)).to(device)
    rows: list[dict[str, Any]] = []
    for name, parts in seconds_by_part(models, image, rounds).items():
        medians = {part: float(np.median(seconds)) for part, seconds in parts.items()}
        parts = parts | {"all": np.sum(list(parts.values()), 0)}
        rows += [
            {
                "model": name, "part": part, "median_seconds": float(np.median(seconds)),
                "smallest": float(seconds.min()), "largest": float(seconds.max()),
                "share_percent": 100 * medians[part] / sum(medians.values()) if part in medians else 100.0,
                "image_size": image_size, "rounds": rounds, "device": str(device),
                "threads": torch.get_num_threads(),
            }
            for part, seconds in parts.items()
        ]  # fmt: skip
    figure, axis = plain(PAGE / 1.4, 0.75 + 0.4 * len(models))
    for place, name in enumerate(models):
        start = 0.0
        for row in rows:
            if row["model"] != name or row["part"] == "all":
                continue
            length = row["median_seconds"]
            label = None if row["part"] in axis.get_legend_handles_labels()[1] else row["part"]
            axis.barh(place, length, left=start, height=0.6, color=_COLOURS[row["part"]], label=label)
            if row["share_percent"] >= 6:
                share = f"{row['share_percent']:.0f} %"
                axis.text(start + length / 2, place, share, ha="center", va="center", fontsize=6.5)
            start += length
    axis.set_yticks(range(len(models)), list(models), fontsize=7)
    axis.invert_yaxis()
    axis.tick_params(labelsize=7, width=0.5)
    axis.spines[["top", "right"]].set_visible(False)
    where = f"{device}, threads: {torch.get_num_threads()}" if device.type == "cpu" else str(device)
    axis.set_xlabel(f"seconds for one image of {image_size}x{image_size} ({where})", fontsize=7)
    figure.legend(loc="outside upper center", ncols=5, fontsize=6.5, frameon=False)
    written = save(figure, stem)
    write_rows(table, rows)
    return [*written, table], rows


def table_of_timing(rows: Sequence[Mapping[str, Any]]) -> str:
    """The paper's Table 4 as aligned text."""
    width = max(len(row["model"]) for row in rows)
    return "\n".join(
        f"{row['model']:<{width}}  {row['part']:<17}  {row['median_seconds']:8.4f} s  "
        f"({row['smallest']:.4f} to {row['largest']:.4f})  {row['share_percent']:5.1f} %"
        for row in rows
    )
