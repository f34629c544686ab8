"""Data sets of images and label maps, their joint transforms and their loaders."""

from typing import Protocol

from torchvision import tv_tensors

VOID = 255
"""The label of pixels that neither train nor score: VOC's object borders, and padding."""


class SegmentationDataset(Protocol):
    """What training and evaluation ask of a data set."""

    classes: tuple[str, ...]
    """Class names in the order of their label values."""

    eval_size: int
    """Side in pixels to which smaller images are padded when scored."""

    label_source: str
    """Where the labels come from, for results."""

    def __len__(self) -> int:
        """Number of images in the split."""

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        """Image uint8 [3, H, W] in RGB and label int64 [H, W], values in 0..len(classes)-1 or `VOID`."""

    def name(self, index: int) -> str:
        """What messages and figures call the image."""
