"""Data of one's own: classes, void and palette from one dataset.yaml."""

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from segmentation.data.voc import VOCDataset
from segmentation.errors import UsageError
from tests.segmentation.conftest import save_label


@pytest.fixture
def own(voc):
    (voc / "classes.txt").unlink()
    return voc


def describe(root, **given):
    (root / "dataset.yaml").write_text(yaml.safe_dump(given))


def refused(root, match):
    with pytest.raises(UsageError, match=match) as caught:
        VOCDataset(root, "train")
    assert "\n" not in str(caught.value)


def test_a_list_names_the_values_in_order(own):
    describe(own, classes=["ground", "disc", "ring", "bar", "cross", "snake"])
    dataset = VOCDataset(own, "train")
    assert dataset.classes == ("ground", "disc", "ring", "bar", "cross", "snake")
    assert dataset.label_source == "SegmentationClass (4)"
    describe(own, classes=["ground", "disc"])
    refused(own, r"there are 2 classes: values must lie in 0\.\.1, .* void values in .*dataset\.yaml or mend")


def test_a_mapping_names_values_that_are_no_indices_and_void_may_be_any_value(own):
    label = np.full((41, 41), 7)
    label[1], label[2], label[3], label[4] = 26, 0, 254, 255
    for image in range(4):
        save_label(own, f"scene_{image}", label)
    describe(own, classes={26: "car", 7: "road"}, void=[0, 254])
    dataset = VOCDataset(own, "train")
    assert dataset.classes == ("road", "car")
    wanted = torch.zeros(41, 41, dtype=torch.int64)
    wanted[1], wanted[2:5] = 1, 255
    assert torch.equal(torch.as_tensor(dataset[0][1]), wanted)
    describe(own, classes={26: "car", 7: "road"}, void=0)
    refused(own, r"holds the label values 254, .* values must lie in 7, 26, or be 0 or 255 for void")


def test_a_palette_reads_labels_in_colour(own):
    colours = np.array([[128, 64, 128], [70, 70, 70], [0, 0, 0]], dtype=np.uint8)
    indices = np.random.default_rng(0).integers(0, 3, (41, 41))
    for image in range(4):
        Image.fromarray(colours[indices]).save(own / "SegmentationClass" / f"scene_{image}.png")
    describe(own, classes=["road", "building"], void=[[0, 0, 0]], palette=colours[:2].tolist())
    label = VOCDataset(own, "train")[1][1].numpy()
    np.testing.assert_array_equal(label, np.where(indices == 2, 255, indices))
    describe(own, classes=["road", "building"], palette=colours[:2].tolist())
    refused(own, r"holds the colour \[0, 0, 0\], one of 1 without a meaning: add it to palette or void")
    describe(own, classes=["road", "building"])
    refused(own, r"is a RGB image, not class indices: .* or name each class's colour as the palette")


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"void": 3}, r"holds void: give classes, and where needed void and palette"),
        ({"classes": ["a", "b"], "colors": []}, r"holds classes, colors: give classes"),
        ({"classes": ["a"]}, r"classes is \['a'\]: give 2 to 255 names"),
        ({"classes": {300: "a", 1: "b"}}, r"give 2 to 255 names as a list .* label value \(0 to 254\)"),
        ({"classes": ["a", "b"], "void": "none"}, r"void is 'none': give a label value such as 0"),
        ({"classes": ["a", "b"], "void": 1}, r"label value 1 is both void and a class: leave it out of void"),
        ({"classes": ["a", "b"], "palette": [[0, 0, 0]]}, r"palette must be 2 colours"),
        ({"classes": ["a", "b"], "palette": [[0, 0, 0], [0, 0, 0]]}, r"palette and void name a colour twice"),
        ({"classes": ["a", "b"], "void": [[0, 0, 0]]}, r"void names colours, but there is no palette"),
    ],
)
def test_a_wrong_description_is_refused(own, given, match):
    describe(own, **given)
    refused(own, match)


def test_a_broken_description_and_two_of_them_are_refused(own):
    (own / "dataset.yaml").write_text("classes: [a, b\nvoid: 3")
    refused(own, r"dataset\.yaml is not YAML")
    (own / "dataset.yaml").write_text("")
    refused(own, r"dataset\.yaml holds NoneType: give classes")
    (own / "classes.txt").write_text("a\nb\n")
    refused(own, r"holds classes\.txt and dataset\.yaml: keep the one that is right")
