"""The paper's Table 3, over training: µ_t and β_t at every scoring of a run, and those of its weights."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator

from segmentation.checkpoint import Description
from segmentation.errors import UsageError
from segmentation.figures.drawing import PAGE, plain, save
from segmentation.figures.inputs import check_new
from segmentation.figures.panel import step_title
from segmentation.models import DifNet
from segmentation.rundir import RunDir, write_rows

SYMBOLS = {"mu": "µ", "beta": "β"}


def draw_coefficients(
    model: DifNet, about: Description, checkpoint: Path, out: Path, overwrite: bool = False
) -> tuple[list[Path], list[dict[str, Any]]]:
    """Draw coefficients.png and .pdf and write coefficients.csv, a row for each walk at each scoring.

    Args:
        model: the checkpoint's.
        about: what it is of.
        checkpoint: its file; the run's metrics.csv is looked for beside it.
        out: folder to write into.
        overwrite: replace what an earlier call wrote.

    Returns:
        The files written, and the rows of the checkpoint itself.
    """
    stem, table = out / "coefficients", out / "coefficients.csv"
    check_new([stem.with_suffix(".png"), stem.with_suffix(".pdf"), table], overwrite)
    final = {name: values.detach().tolist() for name, values in model.coefficients.items()}
    rows = _over_training(checkpoint.parent, model.steps, list(final))
    own: list[dict[str, Any]] = [
        {"source": checkpoint.name, "step": about.step, "walk": step}
        | {name: values[index] for name, values in final.items()}
        for index, step in enumerate(model.steps)
    ]
    figure, _ = plain(PAGE / 1.4, 2.1)
    figure.clear()
    for axis, name in zip(figure.subplots(1, len(final), sharey=True, squeeze=False)[0], final, strict=True):
        for index, step in enumerate(model.steps):
            line = [(row["step"], row[name]) for row in rows if row["walk"] == step]
            last = (about.step, final[name][index])
            # A circle for the checkpoint itself, which may be of an earlier step than the last scoring.
            points = list(zip(*(line or [last]), strict=True))
            drawn = axis.plot(*points, "-", marker=".", markersize=3, linewidth=1, label=step_title(step))
            axis.plot(*last, "o", markersize=5, markerfacecolor="none", color=drawn[0].get_color())
        axis.set_title(f"{SYMBOLS[name]} of each walk", fontsize=8)
        axis.set_xlabel("step", fontsize=7)
        axis.set_xlim(left=0)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.tick_params(labelsize=6.5, width=0.5)
        axis.grid(linewidth=0.3, color="0.85")
    figure.axes[-1].legend(fontsize=6.5, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    written = save(figure, stem)
    write_rows(table, [*rows, *own])
    return [*written, table], own


def table_of_coefficients(rows: Sequence[Mapping[str, Any]]) -> str:
    """The paper's Table 3 as aligned text."""
    names = [name for name in SYMBOLS if name in rows[0]]
    lines = [f"{'':<8}" + "".join(f"{SYMBOLS[name]:>8}" for name in names)]
    lines += [
        f"{step_title(row['walk']):<8}" + "".join(f"{row[name]:8.4f}" for name in names) for row in rows
    ]
    return "\n".join(lines)


def _over_training(folder: Path, steps: Sequence[str], names: Sequence[str]) -> list[dict[str, Any]]:
    """What metrics.csv has, in the order of training; nothing where it is not there."""
    file = RunDir(folder).metrics
    if not file.is_file():
        return []
    with open(file, newline="") as stream:
        table = list(csv.DictReader(stream))
    try:
        return [
            {"source": file.name, "step": int(row["step"]), "walk": step}
            | {name: float(row[f"{name}_{step}"]) for name in names}
            for row in table
            for step in steps
        ]
    except (KeyError, TypeError, ValueError) as fault:
        raise UsageError(
            f"{file} is not the table of this checkpoint's run ({type(fault).__name__}: {fault}): keep a "
            "checkpoint in the folder of its own run, or alone"
        ) from None
