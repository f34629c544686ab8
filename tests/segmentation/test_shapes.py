"""The generated data set: repeatable, well labelled, with parts as thin as promised."""

import pytest
import torch
from scipy.ndimage import binary_erosion

from segmentation.data.shapes import SPLITS, ShapesDataset
from segmentation.errors import UsageError


def test_an_image_depends_on_seed_split_and_index_alone():
    first, again = ShapesDataset("train"), ShapesDataset("train")
    again[5]
    for one, other in zip(first[3], again[3], strict=True):
        assert torch.equal(one, other)
    others = [ShapesDataset("val")[3], ShapesDataset("train", seed=8)[3], first[4]]
    assert not any(torch.equal(first[3][0], image) for image, _ in others)


def test_images_and_labels_have_the_promised_form():
    dataset = ShapesDataset("val")
    counts = torch.zeros(6, dtype=torch.int64)
    for index in range(40):
        image, label = dataset[index]
        assert (image.dtype, image.shape) == (torch.uint8, (3, 97, 97))
        assert (label.dtype, label.shape) == (torch.int64, (97, 97))
        counts += torch.bincount(label.flatten(), minlength=6)
    shares = counts / counts.sum()
    assert shares[0] < 0.85  # answering "ground" is not enough
    assert (shares[1:] > 0.01).all()
    assert shares.shape == (len(dataset.classes),)


def test_thin_parts_are_one_grid_cell_wide():
    # Eroding by 6 on each side removes what is up to 12 pixels wide; by 3, only what is up to 6 wide.
    left_thin, left_thick = [], []
    for index in range(60):
        label = ShapesDataset("val")[index][1].numpy()
        bars = label == 3
        if bars.sum() > 200:
            left_thin.append(binary_erosion(bars, iterations=3).any())
            left_thick.append(binary_erosion(bars, structure=[[1] * 3] * 3, iterations=7).any())
    assert len(left_thin) > 15
    assert sum(left_thin) > 0.9 * len(left_thin)
    assert sum(left_thick) < 0.1 * len(left_thick)


def test_a_split_that_does_not_exist_is_refused():
    with pytest.raises(UsageError, match="no split 'trainval': pass one of train, val, test"):
        ShapesDataset("trainval")
    with pytest.raises(IndexError, match="outside the split 'val'"):
        ShapesDataset("val")[SPLITS["val"]]
