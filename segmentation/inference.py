"""A trained model at work: loaded from its file alone, and asked about an image at several scales."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from segmentation import engine
from segmentation.checkpoint import Description, load_into, load_weights
from segmentation.config import Config
from segmentation.data import SegmentationDataset
from segmentation.data.folder import FolderDataset
from segmentation.data.shapes import ShapesDataset
from segmentation.data.transforms import evaluation_transform, padded_side
from segmentation.errors import UsageError, first_of
from segmentation.images import to_tensor
from segmentation.models import MSC_SCALES


class Segmenter(NamedTuple):
    """What `segmentation.load` gives; its docstring describes the three."""

    model: engine.Model
    classes: tuple[str, ...]
    transform: Callable[[Image.Image], Tensor]


def load(checkpoint: str | Path, device: str = "cpu") -> Segmenter:
    """See `segmentation.load`."""
    model, about = load_model(Path(checkpoint), device)
    place, size = next(model.parameters()).device, scored_size(about.config)

    def transform(image: Image.Image) -> Tensor:
        return evaluation_transform(to_tensor(image), size)[None].to(place)

    return Segmenter(model, about.classes, transform)


def load_model(checkpoint: Path, device: str) -> tuple[engine.Model, Description]:
    """A trained model in eval mode, and what it is of."""
    weights, about = load_weights(checkpoint)
    model = engine.build_model(about.config, len(about.classes))
    load_into(model, weights, checkpoint)
    return model.to(engine.pick_device(device)).eval(), about


def scored_dataset(
    about: Description, checkpoint: Path, split: str, data_path: str | None
) -> SegmentationDataset:
    """One split of the data a model was trained for.

    Args:
        about: what the model is of.
        checkpoint: the file it is from, for messages.
        split: name of the list.
        data_path: the data, where they lie elsewhere than in training.

    Raises:
        UsageError: there are no such data, or they have other classes.
    """
    config = about.config
    if data_path is not None:
        config = dataclasses.replace(config, data_path=data_path)
    dataset = engine.build_dataset(config, split)
    if dataset.classes != about.classes:
        raise UsageError(
            f"{checkpoint} knows {len(about.classes)} classes ({first_of(about.classes)}), "
            f"the data has {len(dataset.classes)} ({first_of(dataset.classes)}): "
            "give --data-path the data it was trained for"
        )
    return dataset


def scored_size(config: Config) -> int:
    """Side in pixels to which a run's data set pads smaller images when they are scored."""
    return ShapesDataset("val").eval_size if config.dataset == "shapes" else FolderDataset.eval_size


@dataclass(frozen=True)
class Views:
    """How a model looks at an image: at which scales, mirrored too or not, and how the views are fused.

    Args:
        scales: factors on the image's sides.
        flip: whether each scale is seen mirrored as well.
        fusion: "max" takes the largest of the views' logits, class by class, as DeepLabV2 does; "mean" their
            mean.

    Raises:
        UsageError: for scales that are not distinct positive numbers.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    fusion: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        """Refuse scales that give no image."""
        if not self.scales or len(set(self.scales)) < len(self.scales) or not min(self.scales) > 0:
            raise UsageError(
                f"--scales {' '.join(f'{scale:g}' for scale in self.scales)}: expected distinct factors "
                "above 0, such as 0.5 0.75 1.0"
            )

    def __str__(self) -> str:
        shown = ", ".join(f"{scale:g}" for scale in self.scales)
        fused = f"fused by {self.fusion}" if self.flip or len(self.scales) > 1 else "nothing to fuse"
        return f"scales {shown}, {'flip' if self.flip else 'no flip'}, {fused}"

    @torch.no_grad()
    def logits(self, model: nn.Module, image: Tensor, size: int) -> Tensor:
        """The fused logits of images.

        Each view is padded with the mean, right and below, to `size` times its scale or the next 8k+1; the
        padding is cut off the logits, which are then resized bilinearly to the image's grid. At the one scale
        1 this is what training scores.

        Args:
            model: maps [B, 3, H, W] to [B, K, H, W].
            image: float [B, 3, H, W], normalised, not padded.
            size: to which images are padded at scale 1.

        Returns:
            [B, K, H, W].
        """
        height, width = image.shape[-2:]
        fused: Tensor | None = None
        for scale in self.scales:
            rows, columns = max(1, round(scale * height)), max(1, round(scale * width))
            scaled = _resized(image, rows, columns, antialias=True)
            least = padded_side(math.ceil(scale * size), 0)
            padding = [0, padded_side(columns, least) - columns, 0, padded_side(rows, least) - rows]
            for mirrored in (False, True) if self.flip else (False,):
                seen = model(F.pad(scaled.flip(-1) if mirrored else scaled, padding))[..., :rows, :columns]
                seen = _resized(seen.flip(-1) if mirrored else seen, height, width, antialias=False)
                if fused is None:
                    fused = seen
                else:
                    fused = torch.maximum(fused, seen) if self.fusion == "max" else fused + seen
        assert fused is not None  # there is a scale
        views = len(self.scales) * (1 + self.flip)
        return fused / views if self.fusion == "mean" else fused


def views_for(
    config: Config,
    scales: Sequence[float] | None = None,
    flip: bool = False,
    fusion: Literal["max", "mean"] = "max",
) -> Views:
    """Views as asked for; without scales, those at which a model of this config learned."""
    if scales is None:
        scales = sorted(MSC_SCALES) if config.msc else (1.0,)
    return Views(tuple(scales), flip, fusion)


def _resized(maps: Tensor, height: int, width: int, antialias: bool) -> Tensor:
    if maps.shape[-2:] == (height, width):
        return maps
    return F.interpolate(maps, (height, width), mode="bilinear", align_corners=False, antialias=antialias)
