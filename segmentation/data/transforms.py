"""Joint transforms of an image and its label: how images are augmented in training and prepared for scoring.

Once an image is normalised, 0 is the channel mean: padding with 0 is padding with the mean. Labels are padded
with void. Padding goes to the right and to the bottom, so that pixel (0, 0) stays where it is.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from segmentation.data import VOID

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class RandomScale(v2.Transform):  # type: ignore[misc] # torchvision is untyped
    """Resize image and label by one factor drawn uniformly from [low, high].

    torchvision's own random resizes aim at a target size; this one multiplies each image's own.
    """

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low = low
        self.high = high

    def make_params(self, flat_inputs: list[Any]) -> dict[str, list[int]]:
        """Draw the factor."""
        height, width = v2.query_size(flat_inputs)
        factor = torch.empty(1).uniform_(self.low, self.high).item()
        return {"size": [max(1, round(height * factor)), max(1, round(width * factor))]}

    def transform(self, inpt: Any, params: dict[str, list[int]]) -> Any:
        """Resize one input: bilinear for images, nearest for labels."""
        return self._call_kernel(F.resize, inpt, params["size"], antialias=True)


class PadTo(v2.Transform):  # type: ignore[misc] # torchvision is untyped
    """Pad smaller images with 0 and labels with void, right and below, to at least size x size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, list[int]]:
        """Find what is lacking."""
        height, width = v2.query_size(flat_inputs)
        return {"padding": [0, 0, max(0, self.size - width), max(0, self.size - height)]}

    def transform(self, inpt: Any, params: dict[str, list[int]]) -> Any:
        """Pad one input with the fill of its type."""
        fill = VOID if isinstance(inpt, tv_tensors.Mask) else 0
        return self._call_kernel(F.pad, inpt, params["padding"], fill=fill)


def normalise() -> v2.Transform:
    """Map uint8 RGB to float32 with ImageNet's mean and deviation."""
    return v2.Compose([v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
                       v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)])  # fmt: skip


def training_transform(crop_size: int, scale: tuple[float, float]) -> v2.Transform:
    """Scale, normalise, pad and crop to crop_size x crop_size, and flip one time in two."""
    return v2.Compose(
        [
            RandomScale(*scale),
            normalise(),
            PadTo(crop_size),
            v2.RandomCrop(crop_size),
            v2.RandomHorizontalFlip(),
        ]
    )


def evaluation_transform(image: tv_tensors.Image, eval_size: int) -> Tensor:
    """Normalise an image and pad it for scoring; its label stays as it is.

    Each side becomes `eval_size`, or for a longer side the next 8k+1, the sizes at which the grid points of a
    stride-8 network lie on the first and the last pixel.

    Returns:
        float32 [3, H', W']. What a network says about rows and columns beyond the image's own is to be cut
        off.
    """
    height, width = image.shape[-2:]
    bottom, right = padded_side(height, eval_size) - height, padded_side(width, eval_size) - width
    padded: Tensor = F.pad(normalise()(image), [0, 0, right, bottom], fill=0).as_subclass(Tensor)
    return padded


def padded_side(side: int, eval_size: int) -> int:
    """`eval_size`, or for a longer side the next number of the form 8k+1."""
    return eval_size if side <= eval_size else 8 * math.ceil((side - 1) / 8) + 1


def denormalise(image: Tensor) -> Tensor:
    """Undo `normalise`, for drawing: [..., 3, H, W] float to uint8."""
    mean = torch.tensor(IMAGENET_MEAN, device=image.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=image.device).view(3, 1, 1)
    return ((image * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
