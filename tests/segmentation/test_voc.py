"""Reading VOC-layout folders, and refusing what cannot be trained on."""

import numpy as np
import pytest
import torch
from PIL import Image

from segmentation.data.voc import VOC_CLASSES, VOCDataset
from segmentation.errors import UsageError
from tests.segmentation.conftest import save_label


def refused(path, match, split="train"):
    with pytest.raises(UsageError, match=match) as caught:
        VOCDataset(path, split)
    assert "\n" not in str(caught.value)


def test_the_folder_its_parent_and_its_grandparent_are_accepted(voc):
    for path in (voc, voc.parent, voc.parent.parent):
        dataset = VOCDataset(path, "train")
        assert (len(dataset), dataset.root) == (4, voc)
    assert dataset.classes == ("ground", "disc", "ring", "bar", "cross", "snake")


def test_images_and_indices_come_as_they_are(voc):
    label = np.arange(41 * 41).reshape(41, 41) % 6
    label[0, 0] = 255
    save_label(voc, "scene_1", label)
    image, mask = VOCDataset(voc, "train")[1]
    assert (image.dtype, image.shape, mask.dtype) == (torch.uint8, (3, 41, 41), torch.int64)
    np.testing.assert_array_equal(mask.numpy(), label)
    with Image.open(voc / "JPEGImages" / "scene_1.jpg") as file:
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), np.array(file))


def test_grey_labels_and_images_are_accepted(voc):
    Image.fromarray(np.full((41, 41), 3, np.uint8), mode="L").save(voc / "SegmentationClass" / "scene_0.png")
    Image.fromarray(np.full((41, 41), 90, np.uint8), mode="L").save(voc / "JPEGImages" / "scene_0.jpg")
    image, mask = VOCDataset(voc, "train")[0]
    assert image.shape == (3, 41, 41)
    assert (mask == 3).all()


def test_lists_directly_in_imagesets_are_accepted(voc):
    folder = voc / "ImageSets" / "Segmentation"
    for file in folder.iterdir():
        file.rename(voc / "ImageSets" / file.name)
    folder.rmdir()
    assert len(VOCDataset(voc, "val")) == 4


def test_without_classes_txt_the_classes_are_vocs(voc):
    (voc / "classes.txt").unlink()
    assert VOCDataset(voc, "train").classes == VOC_CLASSES
    assert len(VOC_CLASSES) == 21


def test_missing_folders_are_refused(voc, tmp_path):
    refused(tmp_path / "nowhere", r"nowhere: no such folder; name the one that holds JPEGImages")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"holds no JPEGImages folder, nor does a folder one or two levels below")
    (voc / "SegmentationClass").rename(voc / "elsewhere")
    refused(voc, r"has JPEGImages but no SegmentationClass folder: put the label PNGs")


def test_two_data_sets_under_one_folder_are_refused(voc):
    (voc.parent / "VOC2007" / "JPEGImages").mkdir(parents=True)
    refused(voc.parent, r"holds several data sets \(.*VOC2007, .*VOC2012\): name one")


def test_a_missing_list_is_refused_and_the_others_named(voc):
    refused(
        voc,
        r"no list 'trainaug' in .*: write one image ID per line into \S*trainaug\.txt, or pass another "
        r"\(train, val\) by --train-split or --val-split to train, by --split to score",
        split="trainaug",
    )
    (voc / "ImageSets" / "Segmentation" / "train.txt").write_text("\n")
    refused(voc, r"train\.txt is empty: list one image ID per line")
    for file in (voc / "ImageSets" / "Segmentation").iterdir():
        file.unlink()
    refused(voc, r"holds no lists: write one image ID per line into .*train\.txt")


def test_a_missing_image_or_label_is_refused(voc):
    (voc / "SegmentationClass" / "scene_2.png").unlink()
    refused(voc, r"image 'scene_2' has no label: add .*scene_2\.png, or take the ID off .*train\.txt")
    (voc / "JPEGImages" / "scene_1.jpg").unlink()
    refused(voc, r"lists 'scene_1', but .*JPEGImages holds no such image: add it, or take the ID off")


def test_labels_in_colour_are_refused(voc):
    Image.new("RGB", (41, 41), (128, 0, 0)).save(voc / "SegmentationClass" / "scene_3.png")
    refused(
        voc, r"scene_3\.png is a RGB image, not class indices: .* save labels as palette \(P\) or grey \(L\)"
    )


def test_values_outside_the_classes_are_refused(voc):
    save_label(voc, "scene_2", np.full((41, 41), 6))
    refused(voc, r"scene_2\.png holds the label values 6, but there are 6 classes: values must lie in 0\.\.5")


def test_values_outside_the_classes_are_refused_when_loaded(voc):
    dataset = VOCDataset(voc, "train")
    save_label(voc, "scene_2", np.full((41, 41), 77))
    with pytest.raises(UsageError, match=r"scene_2\.png holds the label values 77"):
        dataset[2]


def test_another_size_is_refused(voc):
    save_label(voc, "scene_1", np.zeros((41, 40)))
    refused(voc, r"scene_1\.png is 40x41 pixels, its image scene_1\.jpg 41x41: a label must have the size")


def test_damaged_files_are_refused(voc):
    file = voc / "SegmentationClass" / "scene_0.png"
    whole = file.read_bytes()
    for length in (60, len(whole) - 60):
        file.write_bytes(whole[:length])
        refused(voc, r"scene_0\.png cannot be read as an image \(.*\): replace the file")
    file.write_bytes(b"not an image")
    refused(voc, r"scene_0\.png cannot be read as an image \(.*\): replace the file")


def test_real_voc(real_data):
    train, val = (VOCDataset(real_data / "VOCdevkit", split) for split in ("train", "val"))
    assert (len(train), len(val), len(train.classes)) == (311, 257, 21)
    assert not set(train.ids) & set(val.ids)
    image, label = val[0]
    assert image.shape[1:] == label.shape
    assert 255 in label.unique()


def test_real_camvid(real_data):
    dataset = VOCDataset(real_data / "CamVid", "test")
    assert (len(dataset), len(dataset.classes)) == (30, 11)
    assert dataset[0][1].shape == (360, 480)
