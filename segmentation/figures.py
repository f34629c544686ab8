"""Figures of what a model does, as PNG files."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from torch import Tensor

from segmentation.data import VOID, SegmentationDataset
from segmentation.data.labels import voc_palette
from segmentation.data.transforms import evaluation_transform
from segmentation.models import DifNet, SimDeepLab

_VOID_COLOUR = (0.88, 0.88, 0.82)


@torch.no_grad()
def panel(model: DifNet | SimDeepLab, dataset: SegmentationDataset, indices: list[int], file: Path) -> None:
    """Draw what a model makes of some images, a row for each.

    For DifNet: image, truth, argmax of the score x, influence E_i = Σ_k |x_ik|, importance M, argmax of the
    seed, argmax after each step of the diffusion, prediction (the paper's Figures 2 and 4). For Sim-DeepLab:
    image, truth, prediction.

    Args:
        model: on any device; left in the mode it was in.
        dataset: gives the images and the class names.
        indices: of the images to draw.
        file: PNG to write.
    """
    was_training = model.training
    model.eval()
    rows = [_row(model, dataset, index) for index in indices]
    model.train(was_training)

    titles = [title for title, _ in rows[0]]
    colours = voc_palette()[: len(dataset.classes)] / 255
    drawn = {
        int(c) for row in rows for _, picture in row if picture.dtype == np.int64 for c in np.unique(picture)
    }
    legend = [(dataset.classes[c], colours[c]) for c in sorted(drawn - {VOID})]
    if VOID in drawn:
        legend.append(("void", np.array(_VOID_COLOUR)))
    heights = [image.shape[0] / image.shape[1] for (_, image), *_ in rows]
    # All in inches: pictures of one width, and a legend of as many lines as its names need.
    cell = 1.5
    per_line = max(1, int(cell * len(titles) / 1.15))
    top, bottom = 0.35, 0.17 * -(-len(legend) // per_line) + 0.15
    size = (cell * len(titles), cell * sum(heights) + top + bottom)
    figure = Figure(figsize=size, dpi=140)
    axes = figure.subplots(len(rows), len(titles), squeeze=False, gridspec_kw={"height_ratios": heights})
    figure.subplots_adjust(
        left=0.005, right=0.995, top=1 - top / size[1], bottom=bottom / size[1], wspace=0.03, hspace=0.03
    )
    for title, axis in zip(titles, axes[0], strict=True):
        axis.set_title(title, fontsize=8)
    for row, line in zip(rows, axes, strict=True):
        for (_, picture), axis in zip(row, line, strict=True):
            _show(axis, picture, colours)
    handles = [Patch(facecolor=colour, edgecolor="0.5", label=name) for name, colour in legend]
    figure.legend(handles=handles, loc="lower center", ncols=per_line, fontsize=7, frameon=False)
    figure.savefig(file, format="png")


def _row(
    model: DifNet | SimDeepLab, dataset: SegmentationDataset, index: int
) -> list[tuple[str, NDArray[np.generic]]]:
    """Titles and pictures of one image: uint8 [H, W, 3], class indices int64, or values float32 [h, w]."""
    image, label = dataset[index]
    height, width = label.shape
    device = next(model.parameters()).device
    padded = evaluation_transform(image, dataset.eval_size)[None].to(device)
    pictures: list[tuple[str, NDArray[np.generic]]] = [
        ("image", image.permute(1, 2, 0).numpy()),
        ("truth", label.numpy()),
    ]
    if isinstance(model, DifNet):
        maps = model(padded, return_maps=True)
        # Grid nodes that lie on the image, not on its padding.
        rows = -(-height * maps.score.shape[-2] // padded.shape[-2])
        columns = -(-width * maps.score.shape[-1] // padded.shape[-1])

        def classes(score: Tensor) -> NDArray[np.generic]:
            return np.asarray(score[0, :, :rows, :columns].argmax(0).cpu())

        def values(amount: Tensor) -> NDArray[np.generic]:
            return np.asarray(amount[0, :rows, :columns].cpu())

        pictures += [
            ("score x", classes(maps.score)),
            ("influence E", values(maps.score.abs().sum(1))),
            ("importance M", values(maps.importance[:, 0])),
            ("seed s = Mx", classes(maps.seed)),
        ]
        pictures += [
            (step if step == "exact" else f"walk {step}", classes(y))
            for step, y in zip(model.steps, maps.walks, strict=True)
        ]
        logits = maps.logits
    else:
        logits = model(padded)
    pictures.append(("prediction", np.asarray(logits[0, :, :height, :width].argmax(0).cpu())))
    return pictures


def _show(axis: Axes, picture: NDArray[np.generic], colours: NDArray[np.float64]) -> None:
    axis.set_axis_off()
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
            0.03, 0.03, f"{low:.2g} to {high:.2g}", transform=axis.transAxes, fontsize=6, color="black",
            bbox={"facecolor": "white", "alpha": 0.7, "pad": 1, "linewidth": 0},
        )  # fmt: skip
