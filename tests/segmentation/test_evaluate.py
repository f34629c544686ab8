"""Scoring a checkpoint, as a user calls it."""

import csv
import dataclasses
import gc
import json
import sys

import numpy as np
import pytest
import torch

from segmentation import engine
from segmentation.boundary import BoundaryIoU, Trimap
from segmentation.checkpoint import Description, load_weights, save_weights
from segmentation.data.loader import spread
from segmentation.data.shapes import ShapesDataset
from segmentation.data.transforms import normalise
from segmentation.evaluate import evaluate, run_command_line
from segmentation.fragments import Fragments
from segmentation.inference import Views, load_model
from segmentation.metrics import ConfusionMatrix
from segmentation.models import DifNet
from tests.segmentation.conftest import tiny, write_voc


def rows(file):
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def scored(unbroken, tmp_path_factory):
    """Three images through the command line, everything asked for: the folder written, what was printed."""
    out = tmp_path_factory.mktemp("scores")
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *parts, **_: printed.append(" ".join(map(str, parts))))
        patch.setattr(
            sys, "argv",
            ["evaluate", "--checkpoint", str(unbroken / "last.safetensors"), "--out", str(out), "--boundary",
             "--scales", "0.5", "1.0", "--flip", "--fusion", "mean", "--limit-batches", "3",
             "--workers", "2", "--threads", "1"],
        )  # fmt: skip
        with pytest.raises(SystemExit) as caught:
            run_command_line()
    assert not caught.value.code
    return out, "\n".join(printed)


@pytest.fixture(scope="module")
def recounted(unbroken):
    """The same images, predicted and measured one by one."""
    model, _ = load_model(unbroken / "last.safetensors", "cpu")
    dataset = ShapesDataset("val")
    matrix, measures = ConfusionMatrix(6, torch.device("cpu")), (Trimap(6), BoundaryIoU(6), Fragments(6))
    for index in spread(len(dataset), 3):
        image, label = dataset[index]
        views = Views((0.5, 1.0), True, "mean")
        prediction = views.logits(model, normalise()(image)[None].as_subclass(torch.Tensor), 97).argmax(1)
        matrix.update(prediction, label[None].as_subclass(torch.Tensor))
        for measure in measures:
            measure.update(prediction[0].numpy(), label.numpy())
    return matrix.compute(), *measures


def test_files_hold_what_plain_measuring_gives(scored, recounted):
    out, told = scored
    scores, trimap, inner, fragments = recounted
    np.testing.assert_array_equal(np.load(out / "confusion.npy"), scores.confusion)
    numbers = json.loads((out / "metrics.json").read_text())
    assert numbers["miou"] == scores.miou
    assert numbers["boundary_iou"] == inner.miou
    for name, value in fragments.compute().overall().items():
        assert numbers[name] == value
    curve = trimap.curve()
    table = rows(out / "trimap.csv")
    assert [int(row["band"]) for row in table] == list(range(1, 41))
    assert [float(row["miou"]) for row in table] == [point.miou for point in curve]
    assert [int(row["pixels"]) for row in table] == [point.truth.sum() for point in curve]
    assert numbers["trimap_miou_5"] == curve[4].miou
    per_class = rows(out / "per_class.csv")
    assert [row["class"] for row in per_class] == list(ShapesDataset.classes)
    np.testing.assert_array_equal([float(row["boundary_iou"]) for row in per_class], inner.iou)
    for name, values in fragments.compute().per_class().items():
        np.testing.assert_array_equal([float(row[name]) for row in per_class], values)
    assert f"5 px {100 * curve[4].miou:.2f}" in told
    assert f"boundary IoU {100 * inner.miou:.2f}" in told
    for file in ("confusion.npy", "metrics.json", "per_class.csv", "trimap.csv"):
        assert str(out / file) in told


def test_one_line_tells_the_protocol(scored):
    out, told = scored
    protocol = json.loads((out / "metrics.json").read_text())["protocol"]
    assert protocol == (
        "shapes val, 3 of 96 images at their own sizes, padded to 97 times the scale or the next 8k+1; "
        "scales 0.5, 1, flip, fused by mean; CRF none; labels drawn with the images; void ignored; "
        "one confusion matrix over all pixels"
    )
    assert f"protocol: {protocol}\n" in told


def test_context_has_two_named_scores(unbroken, tmp_path, monkeypatch, capsys):
    weights, about = load_weights(unbroken / "last.safetensors")
    config = dataclasses.replace(about.config, dataset="context", data_path="elsewhere")
    model = engine.build_model(config, 6)
    model.load_state_dict(weights)
    file = tmp_path / "best.safetensors"
    save_weights(file, model, Description(config, about.classes, about.step, about.miou))
    monkeypatch.setattr(engine, "build_dataset", lambda config, split: ShapesDataset(split))
    scores = evaluate(file, out=tmp_path, limit_batches=3, threads=1)
    numbers = json.loads((tmp_path / "metrics.json").read_text())
    assert numbers["miou_60"] == scores.miou
    assert numbers["miou_59"] == scores.foreground_miou != scores.miou
    assert f"mIoU-59 {100 * scores.foreground_miou:.2f}" in capsys.readouterr().out


def test_padding_is_cut_off_and_the_labels_told(tmp_path):
    root = write_voc(tmp_path / "scenes", images=2)
    config = tiny(tmp_path, dataset="voc", data_path=str(root), weights_backbone="none", model="sim-deeplab",
                  backbone="resnet18")  # fmt: skip
    torch.manual_seed(0)
    file = tmp_path / "best.safetensors"
    about = Description(config, ShapesDataset.classes, step=0, miou=0.0)
    save_weights(file, engine.build_model(config, 6), about)
    scores = evaluate(file, out=tmp_path / "scores", boundary=True, threads=1)
    # The first two rows of the labels are void.
    assert scores.truth.sum() == 2 * 39 * 41
    numbers = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert "2 of 2 images" in numbers["protocol"]
    assert "labels SegmentationClass (2); void ignored" in numbers["protocol"]


def test_what_is_kept_does_not_grow_with_the_split(unbroken, monkeypatch):
    def alive():
        gc.collect()
        tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor]
        return len(tensors), sum(t.numel() for t in tensors)

    seen = []
    forward = DifNet.forward
    monkeypatch.setattr(
        DifNet, "forward", lambda *given, **more: seen.append(alive()) or forward(*given, **more)
    )
    evaluate(unbroken / "last.safetensors", limit_batches=5, threads=1, boundary=True)
    assert len(seen) == 5
    # From the second image on, for the first one's label and logits are still held then.
    assert len(set(seen[1:])) == 1
