"""How figures are drawn: pictures side by side in one look, and files fit for a paper."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from segmentation.data import VOID
from segmentation.data.labels import voc_palette
from segmentation.files import whole

Picture = NDArray[np.generic]
"""uint8 [H, W, 3], class indices int64 [h, w] with `VOID`, or values float [h, w]."""

PAGE = 7.0
"""Inches: the width of a figure over the whole page of a paper."""

# Text in a PDF stays text, in fonts that journals take.
_STYLE: dict[Any, Any] = {"pdf.fonttype": 42, "font.size": 7, "axes.linewidth": 0.5}
_VOID_COLOUR = (0.88, 0.88, 0.82)


def tiles(
    rows: Sequence[Mapping[str, Picture]],
    classes: tuple[str, ...],
    cell: float,
    names: Sequence[str] = (),
    below: float = 0.0,
) -> tuple[Figure, NDArray[Any]]:
    """Pictures in rows, by title, with a legend of the classes that occur in them.

    Args:
        rows: pictures of one image each; the first gives the row its shape. Where a row lacks a title of the
            others (the truth of an image without one), its place stays free.
        classes: names by index.
        cell: width of a picture in inches.
        names: of the rows, written at the left.
        below: inches to leave free below the legend.

    Returns:
        The figure and its axes, [rows, titles].
    """
    titles = max((list(row) for row in rows), key=len)
    colours = voc_palette()[: len(classes)] / 255
    legend = _legend(rows, classes, colours)
    heights = [(first := next(iter(row.values()))).shape[0] / first.shape[1] for row in rows]
    # All in inches: pictures of one width, and a legend of as many lines as its names need.
    left = 0.17 if names else 0.02
    per_line = max(1, int(cell * len(titles) / 1.05))
    top, bottom = 0.22, 0.15 * -(-len(legend) // per_line) + 0.12 * bool(legend) + 0.03 + below
    width, height = cell * len(titles) + left + 0.02, cell * sum(heights) + top + bottom
    figure = Figure(figsize=(width, height), dpi=140)
    axes = figure.subplots(len(rows), len(titles), squeeze=False, gridspec_kw={"height_ratios": heights})
    figure.subplots_adjust(
        left=left / width, right=1 - 0.02 / width, top=1 - top / height, bottom=bottom / height,
        wspace=0.03, hspace=0.04,
    )  # fmt: skip
    for title, axis in zip(titles, axes[0], strict=True):
        axis.set_title(title, fontsize=7.5, pad=3)
    for row, line in zip(rows, axes, strict=True):
        for title, axis in zip(titles, line, strict=True):
            axis.set_axis_off()
            if title in row:
                _show(axis, row[title], colours)
    for name, line, share in zip(names, axes, heights, strict=True) if names else ():
        # What does not fit beside its picture is shortened.
        fits = max(4, int(cell * share / 0.054))
        told = name if len(name) <= fits else f"{name[: fits - 1]}…"
        line[0].text(
            -0.02, 0.5, told, transform=line[0].transAxes, rotation=90, ha="right", va="center", fontsize=6
        )
    if legend:
        handles = [Patch(facecolor=colour, edgecolor="0.5", label=name) for name, colour in legend]
        figure.legend(
            handles=handles, loc="lower center", bbox_to_anchor=(0.5, below / height), ncols=per_line,
            fontsize=6.5, frameon=False, borderaxespad=0.2,
        )  # fmt: skip
    return figure, axes


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write STEM.png at 300 dpi and STEM.pdf with text as text; the files written."""
    written = []
    with matplotlib.rc_context(_STYLE):
        for suffix in (".png", ".pdf"):
            file = stem.with_name(stem.name + suffix)
            with whole(file) as stream:
                # Without a date, the same figure is the same file.
                metadata = {"CreationDate": None} if suffix == ".pdf" else None
                figure.savefig(stream, format=suffix[1:], dpi=300, metadata=metadata)
            written.append(file)
    return written


def plain(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of so many inches with one pair of axes, in the look of the others."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), dpi=140, layout="constrained")
        return figure, figure.subplots()


def _legend(
    rows: Sequence[Mapping[str, Picture]], classes: tuple[str, ...], colours: NDArray[np.float64]
) -> list[tuple[str, Any]]:
    """Names and colours of the classes that occur."""
    pictures = [picture for row in rows for picture in row.values()]
    drawn = {int(c) for picture in pictures if picture.dtype == np.int64 for c in np.unique(picture)}
    legend: list[tuple[str, Any]] = [(classes[c], colours[c]) for c in sorted(drawn - {VOID})]
    return [*legend, ("void", _VOID_COLOUR)] if VOID in drawn else legend


def _show(axis: Axes, picture: Picture, colours: NDArray[np.float64]) -> None:
    if picture.ndim == 3:
        axis.imshow(picture, aspect="auto")
    elif picture.dtype == np.int64:
        palette = ListedColormap(colours).with_extremes(over=_VOID_COLOUR)
        axis.imshow(
            picture, cmap=palette, vmin=-0.5, vmax=len(colours) - 0.5, interpolation="nearest", aspect="auto"
        )
    else:
        low, high = float(picture.min()), float(picture.max())
        axis.imshow(picture, cmap="viridis", interpolation="nearest", aspect="auto")
        # Each map has its own range of colours, so the numbers must be told.
        axis.text(
            0.03, 0.03, f"{low:.3g} to {high:.3g}", transform=axis.transAxes, fontsize=6, color="black",
            bbox={"facecolor": "white", "alpha": 0.7, "pad": 1, "linewidth": 0},
        )  # fmt: skip
