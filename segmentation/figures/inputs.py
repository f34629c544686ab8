"""What figures are drawn of: the model of a checkpoint, and images with their truth where it is known."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import tv_tensors

from segmentation.checkpoint import Description
from segmentation.data import SegmentationDataset
from segmentation.data.loader import spread
from segmentation.data.transforms import denormalise, evaluation_transform
from segmentation.errors import UsageError, first_of
from segmentation.files import told
from segmentation.images import read_image
from segmentation.inference import load_model, scored_dataset, scored_size
from segmentation.models import DifNet, DifNetMaps
from segmentation.predict import SUFFIXES


@dataclass(frozen=True)
class Sample:
    """One image.

    Args:
        name: the file's stem, or the ID in the data set.
        image: uint8 [3, H, W].
        label: its truth, int64 [H, W]; None where it is not known.
        padded: what the model sees, [1, 3, H', W']: normalised, and padded right and below as in scoring.
    """

    name: str
    image: tv_tensors.Image
    label: NDArray[np.int64] | None
    padded: Tensor

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """The image, uint8 [H, W, 3]."""
        pixels: NDArray[np.uint8] = self.image.permute(1, 2, 0).numpy()
        return pixels

    @property
    def size(self) -> tuple[int, int]:
        """H and W."""
        height, width = self.image.shape[-2:]
        return height, width


class Study:
    """A DifNet and the images to look at.

    Args:
        checkpoint: weights written by segmentation.train.
        images: files, and IDs of images in the data set the checkpoint was trained for; with none, `count`
            images of the split, spread evenly over it.
        split: list of the data set.
        data_path: the data, where they lie elsewhere than in training.
        count: how many images, where none are named.
        max_size: longest side in pixels that a file may have.
        device: "auto", "cpu" or "cuda".

    Raises:
        UsageError: the checkpoint is no DifNet or has no walks, or an image is not there.
    """

    def __init__(
        self,
        checkpoint: Path,
        images: Sequence[str] = (),
        *,
        split: str = "val",
        data_path: str | None = None,
        count: int = 6,
        max_size: int = 2048,
        device: str = "auto",
    ) -> None:
        _refuse_other_paths(images)
        self.model, self.about = load_difnet(checkpoint, device)
        self.classes = self.about.classes
        self._max_size = max_size
        self._dataset: SegmentationDataset | None = None
        if not all(Path(given).is_file() for given in images) or not images:
            self._dataset = scored_dataset(self.about, checkpoint, split, data_path)
        self._places: list[Path | int]
        if images:
            self._places = [self._find(given, split) for given in images]
        else:
            assert self._dataset is not None  # there are no files
            self._places = list(spread(len(self._dataset), count))

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Sample]:
        """Load one image after the other."""
        size = scored_size(self.about.config)
        device = next(self.model.parameters()).device
        for place in self._places:
            label = None
            if isinstance(place, Path):
                name, image = place.stem, read_image(place, self._max_size)
            else:
                assert self._dataset is not None  # it gave the index
                name = self._dataset.name(place)
                image, mask = self._dataset[place]
                label = mask.numpy()
            yield Sample(name, image, label, evaluation_transform(image, size)[None].to(device))

    @torch.no_grad()
    def maps(self, sample: Sample) -> DifNetMaps:
        """What happens inside the model on the way to its logits."""
        maps: DifNetMaps = self.model(sample.padded, return_maps=True)
        return maps

    def _find(self, given: str, split: str) -> Path | int:
        """The file of this name, or the index of the image with this ID."""
        path = Path(given)
        if path.is_file():
            return path
        assert self._dataset is not None  # not all are files
        names = [self._dataset.name(index) for index in range(len(self._dataset))]
        if given in names:
            return names.index(given)
        raise UsageError(
            f"{given} is neither a file nor one of the {len(names)} images of {self.about.config.dataset} "
            f"{split} ({first_of(names, 1)}): name one of either, or another list by --split"
        )


def _refuse_other_paths(images: Sequence[str]) -> None:
    """Refuse folders, and files that are not there, which cannot be IDs."""
    for given in images:
        path = Path(given)
        if path.is_dir():
            raise UsageError(f"{given} is a folder: name its images, as in {path / '*.jpg'}")
        if not path.is_file() and path.suffix.lower() in SUFFIXES:
            raise UsageError(f"{given}: no such file; name one, or the ID of an image, without a suffix")


def load_difnet(checkpoint: Path, device: str = "cpu") -> tuple[DifNet, Description]:
    """The DifNet of a checkpoint, with walks to look at.

    Raises:
        UsageError: it is of another kind.
    """
    model, about = load_model(checkpoint, device)
    if not isinstance(model, DifNet) or not model.steps:
        kind = about.config.model if not isinstance(model, DifNet) else "difnet without a diffusion"
        raise UsageError(
            f"{checkpoint} is a {kind}, which has no walks to show: name a checkpoint of a difnet that has"
        )
    return model, about


class Nodes:
    """Where the nodes of a grid lie on an image: corners on corners of what the model sees.

    Args:
        grid: h and w.
        padded: H' and W' of what the model sees.
        size: H and W of the image in its corner.
    """

    def __init__(self, grid: tuple[int, int], padded: tuple[int, int], size: tuple[int, int]) -> None:
        self.grid = grid
        self._pitch = [max(side - 1, 1) / max(nodes - 1, 1) for nodes, side in zip(grid, padded, strict=True)]
        # Of each row and each column of pixels, the nearest node.
        self._nearest = [
            np.minimum((np.arange(side) / pitch + 0.5).astype(np.int64), nodes - 1)
            for side, pitch, nodes in zip(size, self._pitch, grid, strict=True)
        ]
        self.rows, self.columns = (int(nearest[-1]) + 1 for nearest in self._nearest)

    def of_pixel(self, x: int, y: int) -> int:
        """The node nearest to column x and row y."""
        return int(self._nearest[0][y] * self.grid[1] + self._nearest[1][x])

    def pixel(self, node: int) -> tuple[float, float]:
        """Column x and row y of a node."""
        row, column = divmod(node, self.grid[1])
        return column * self._pitch[1], row * self._pitch[0]

    def on_pixels(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values [h, w] of the nodes, at every pixel that of the nearest, [H, W]."""
        spread_out: NDArray[Any] = values[self._nearest[0][:, None], self._nearest[1][None, :]]
        return spread_out

    def at_nodes(self, pixels: NDArray[Any], outside: Any) -> NDArray[Any]:
        """Values [H, W, ...] of the pixels, at every node that of its own pixel, [h, w, ...].

        Nodes beyond the image get `outside`.
        """
        height, width = pixels.shape[:2]
        found = np.full((*self.grid, *pixels.shape[2:]), outside, pixels.dtype)
        rows = (np.arange(self.rows) * self._pitch[0]).round().astype(int).clip(max=height - 1)
        columns = (np.arange(self.columns) * self._pitch[1]).round().astype(int).clip(max=width - 1)
        found[: self.rows, : self.columns] = pixels[rows[:, None], columns[None, :]]
        return found


def nodes_of(sample: Sample, maps: DifNetMaps) -> Nodes:
    """The nodes of the walks' grid over an image."""
    height, width = maps.seed.shape[-2:]
    return Nodes((height, width), (sample.padded.shape[-2], sample.padded.shape[-1]), sample.size)


def seen_colours(sample: Sample, nodes: Nodes) -> NDArray[np.float64]:
    """The mean colour of the pixels around each node, in [0, 1], [h, w, 3]."""
    pixels = denormalise(sample.padded.cpu()).double() / 255
    means = torch.nn.functional.interpolate(pixels, nodes.grid, mode="area")
    return means[0].permute(1, 2, 0).numpy()


def check_new(files: Sequence[Path], overwrite: bool) -> None:
    """Refuse to replace files unless asked to, and make their folder.

    Raises:
        UsageError: a file is there, or its folder cannot be made.
    """
    for file in files:
        if file.exists() and not overwrite:
            raise UsageError(f"{file} is there: pass --overwrite to replace it, or another folder as --out")
    with told(files[0].parent):
        files[0].parent.mkdir(parents=True, exist_ok=True)
