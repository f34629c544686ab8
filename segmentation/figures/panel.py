"""What a model makes of some images at one look: drawn when a training or a scoring ends."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from segmentation.data import SegmentationDataset
from segmentation.data.transforms import evaluation_transform
from segmentation.figures.drawing import Picture, tiles
from segmentation.files import whole
from segmentation.models import DifNet, SimDeepLab


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
    figure, _ = tiles(rows, dataset.classes, cell=1.5)
    with whole(file) as stream:
        figure.savefig(stream, format="png")


def _row(model: DifNet | SimDeepLab, dataset: SegmentationDataset, index: int) -> Mapping[str, Picture]:
    """Pictures of one image by title."""
    image, label = dataset[index]
    height, width = label.shape
    device = next(model.parameters()).device
    padded = evaluation_transform(image, dataset.eval_size)[None].to(device)
    pictures: dict[str, Picture] = {"image": image.permute(1, 2, 0).numpy(), "truth": label.numpy()}
    if isinstance(model, DifNet):
        maps = model(padded, return_maps=True)

        def on_image(grid: Tensor) -> Tensor:
            return cropped(grid, (height, width), padded)

        pictures["score x"] = largest_class(on_image(maps.score))
        pictures["influence E"] = np.asarray(on_image(maps.score.abs().sum(1, keepdim=True))[0, 0].cpu())
        pictures["importance M"] = np.asarray(on_image(maps.importance)[0, 0].cpu())
        pictures["seed s = Mx"] = largest_class(on_image(maps.seed))
        for step, y in zip(model.steps, maps.walks, strict=True):
            pictures[step_title(step)] = largest_class(on_image(y))
        logits = maps.logits
    else:
        logits = model(padded)
    pictures["prediction"] = largest_class(logits[..., :height, :width])
    return pictures


def cropped(grid: Tensor, image_size: tuple[int, int], padded: Tensor) -> Tensor:
    """The nodes [..., rows, columns] of a grid [..., h, w] that lie on the image, not on its padding."""
    rows, columns = (
        -(-side * nodes // whole_side)
        for side, nodes, whole_side in zip(image_size, grid.shape[-2:], padded.shape[-2:], strict=True)
    )
    return grid[..., :rows, :columns]


def largest_class(score: Tensor) -> Picture:
    """The class of the largest score at each place, int64 [h, w], of the first of scores [B, K, h, w]."""
    return np.asarray(score[0].argmax(0).cpu())


def step_title(step: str) -> str:
    """What pictures call a step of the diffusion."""
    return f"walk {step}" if step.isdigit() else step
