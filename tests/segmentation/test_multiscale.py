"""MSC: a loss at every scale and at their maximum; scored by the maximum."""

import copy
import csv
import json

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from PIL import Image
from torch import nn
from torch.nn import functional as F

from segmentation import engine
from segmentation.config import resolve
from segmentation.data import VOID
from segmentation.data.shapes import ShapesDataset
from segmentation.data.transforms import normalise
from segmentation.evaluate import evaluate
from segmentation.inference import Views, load_model, views_for
from segmentation.models import MultiScale
from segmentation.predict import predict
from segmentation.train import train
from segmentation.trainer import Trainer
from tests.segmentation.conftest import tiny


class Recording(nn.Module):
    """A score of every pixel alone; remembers what it saw."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.score = nn.Conv2d(3, 4, 1)

    def forward(self, image):
        self.seen.append(image)
        return self.score(image)


@pytest.mark.parametrize(
    ("side", "smaller"), [(321, (241, 161)), (97, (73, 49)), (33, (25, 17)), (50, (41, 25))]
)
def test_scales_are_seen_at_sides_of_8k_plus_1(side, smaller):
    it = Recording()
    logits = MultiScale(it)(torch.randn(2, 3, side, side))
    assert [image.shape[-1] for image in it.seen] == [side, *smaller]
    assert {each.shape for each in logits} == {(2, 4, side, side)}


def test_logits_of_each_scale_and_their_maximum_class_by_class():
    torch.manual_seed(0)
    it = Recording()
    image = torch.randn(2, 3, 33, 65)
    whole, half, largest = MultiScale(it, scales=(1.0, 0.5))(image)
    assert torch.equal(whole, it.score(image))
    small = F.interpolate(image, (17, 33), mode="bilinear", antialias=True)
    torch.testing.assert_close(half, F.interpolate(it.score(small), (33, 65), mode="bilinear"))
    assert torch.equal(largest, torch.where(whole > half, whole, half))
    assert ((largest == whole).any(), (largest == half).any()) == (True, True)


def test_images_are_made_smaller_in_float32_under_autocast_too():
    it, image = Recording(), torch.randn(2, 3, 33, 33)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = MultiScale(it, scales=(1.0, 0.5))(image)
    assert logits[0].dtype == torch.bfloat16
    assert torch.equal(it.seen[1], F.interpolate(image, (17, 17), mode="bilinear", antialias=True))


@pytest.mark.parametrize("model", ["sim-deeplab", "difnet"])
def test_the_loss_is_the_sum_over_the_scales_and_their_maximum(model):
    config = resolve({"model": model, "msc": True, "max_steps": 5, "batch_size": 2}, None)
    torch.manual_seed(1)
    built = engine.build_model(config, 4)
    image, label = torch.randn(2, 3, 33, 33), torch.randint(0, 4, (2, 33, 33))
    label[0, :20] = VOID
    logits = MultiScale(copy.deepcopy(built).train())(image)
    expected = sum(F.cross_entropy(each, label, ignore_index=VOID) for each in logits)
    it = Trainer(
        config, built, [frozenset() for _ in built.backbones], 5, Fabric(accelerator="cpu", devices=1)
    )
    before = copy.deepcopy(it.model.state_dict())
    assert it.step(image, label) == pytest.approx(expected.item(), rel=1e-5)
    assert len(logits) == 4
    # What is saved and scored is the network alone, and it has learned.
    assert it.scored is built
    assert not torch.equal(it.model.state_dict()["score.convs.0.weight"], before["score.convs.0.weight"])


def test_an_msc_run_is_scored_by_the_maximum_and_says_so(tmp_path, capsys):
    run = tmp_path / "run"
    # Weights that have not learned answer many classes; learned for two steps, they answer one.
    options = {
        "lr": 0.0,
        "model": "sim-deeplab",
        "aspp": False,
        "msc": True,
        "max_steps": 2,
        "limit_val_batches": 2,
    }
    assert train(tiny(run, **options)) == 0
    with open(run / "metrics.csv", newline="") as stream:
        (row,) = csv.DictReader(stream)
    capsys.readouterr()
    file = run / "last.safetensors"
    scores = evaluate(file, limit_batches=2, out=tmp_path / "max", threads=1)
    told = capsys.readouterr().out
    assert "scales 0.5, 0.75, 1, no flip, fused by max, as the model was trained; CRF none" in told
    assert "fused by max, as" in json.loads((tmp_path / "max" / "metrics.json").read_text())["protocol"]
    assert float(row["miou"]) == scores.miou
    asked = evaluate(file, limit_batches=2, scales=(0.5, 0.75, 1.0), threads=1)
    assert (asked.confusion == scores.confusion).all()
    assert evaluate(file, limit_batches=2, scales=(1.0,), threads=1).miou != scores.miou
    assert "scales 1, no flip, nothing to fuse; CRF none" in capsys.readouterr().out

    image, _ = ShapesDataset("val")[0]
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "picture.png")
    predict(file, [tmp_path / "picture.png"], tmp_path / "labels", probabilities=True, threads=1)
    assert "fused by max, as the model was trained" in capsys.readouterr().out
    predicted = torch.from_numpy(np.load(tmp_path / "labels" / "probabilities" / "picture.npy")).float()
    model, about = load_model(file, "cpu")
    assert about.config.msc
    one, three = (
        views.logits(model, normalise()(image)[None].as_subclass(torch.Tensor), 97)[0].softmax(0)
        for views in (Views(), Views((0.5, 0.75, 1.0)))
    )
    torch.testing.assert_close(predicted, three, atol=1e-3, rtol=0)
    assert (one - three).abs().max() > 3e-3


def test_other_models_are_scored_at_one_scale():
    assert views_for(resolve({}, None)) == Views((1.0,))
    assert views_for(resolve({"msc": True}, None)) == Views((0.5, 0.75, 1.0), fusion="max")
    assert views_for(resolve({"msc": True}, None), [2.0], True, "mean") == Views((2.0,), True, "mean")
