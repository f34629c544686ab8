"""configs/paper: every system of the paper is built, counted as the documents say, and learns."""

import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from lightning.fabric import Fabric

from segmentation import engine
from segmentation.config import resolve
from segmentation.errors import UsageError
from segmentation.trainer import Trainer

ROOT = Path(__file__).parents[2]
CONFIGS = {file.stem: file for file in sorted((ROOT / "configs" / "paper").glob("*.yaml"))}
CLASSES = {"voc-aug": 21, "context": 60, "coco": 21}
# Of depth 101, and built as others that differ from them in one option or the number of classes.
ALIKE = {
    "coco-deeplab-101-msc", "coco-deeplab-101-msc-aspp", "context-deeplab-101-msc-coco", "context-difnet-101",
    "context-difnet-101-noaspp", "context-deeplab-101-msc-coco-aspp",
}  # fmt: skip
ROW = re.compile(r"\| (.*) \| `([a-z0-9-]+)` \| (.*) \| ([0-9,]+) \| (.+) \| (.+) \|")


def documented():
    """Of each configuration the rows of docs/segmentation.md: name, scored with, parameters, mIoU."""
    rows = {}
    for name, config, scored, count, miou, _ in ROW.findall((ROOT / "docs" / "segmentation.md").read_text()):
        rows.setdefault(config, []).append((name, scored, int(count.replace(",", "")), miou))
    return rows


def test_the_document_has_every_configuration_and_no_other():
    rows = documented()
    assert rows.keys() == CONFIGS.keys()
    assert sum(map(len, rows.values())) == len(CONFIGS) + 2  # two rows score the same weights with a CRF
    for name, file in CONFIGS.items():
        told = "".join(line for line in file.read_text().splitlines(keepends=True) if line.startswith("#"))
        numbers = {miou for _, _, _, miou in rows[name] if miou[0].isdigit()}
        assert numbers == set(re.findall(r"\b\d\d\.\d+\b", told)), name


@pytest.mark.parametrize("name", CONFIGS)
def test_a_system_of_the_paper_trains_as_there_and_has_the_parameters_that_are_told(name):
    config = resolve({"data_path": "DIR"}, CONFIGS[name])
    assert (config.recipe, config.batch_size, config.crop_size) == ("paper", 16, 321)
    assert config.epochs == (30 if config.dataset == "coco" else 200)
    assert config.run_dir == Path("runs") / name
    with torch.device("meta"):
        model = engine.build_model(config, CLASSES[config.dataset])
    counts = {count for _, _, count, _ in documented()[name]}
    assert {sum(parameter.numel() for parameter in model.parameters())} == counts


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ALIKE)) for name in CONFIGS]
)
def test_a_system_of_the_paper_takes_a_step(name):
    file = CONFIGS[name]
    small = resolve({"data_path": "DIR", "batch_size": 2, "crop_size": 17, "max_steps": 1}, file)
    torch.manual_seed(0)
    classes = CLASSES[small.dataset]
    model = engine.build_model(small, classes)
    fresh = [frozenset() for _ in model.backbones]
    trainer = Trainer(small, model, fresh, 1, Fabric(accelerator="cpu", devices=1))
    before = model.score.convs[0].weight.detach().clone()
    assert math.isfinite(trainer.step(torch.randn(2, 3, 17, 17), torch.randint(0, classes, (2, 17, 17))))
    assert not torch.equal(model.score.convs[0].weight, before)


def test_what_is_started_from_is_trained_by_another_configuration():
    for name, file in CONFIGS.items():
        config = resolve({"data_path": "DIR"}, file)
        if config.init_from is not None:
            source = Path(config.init_from)
            pretraining = resolve({"data_path": "DIR"}, CONFIGS[source.parent.name])
            assert pretraining.run_dir / "best.safetensors" == source
            for option in ("model", "backbone", "aspp", "msc"):
                assert getattr(pretraining, option) == getattr(config, option), name


def test_flags_replace_the_weights_of_a_configuration(tmp_path):
    hub, run = CONFIGS["voc-difnet-50"], CONFIGS["context-deeplab-101-msc-coco"]
    own = {"data_path": "DIR"}
    assert resolve({**own, "weights_backbone": "r50.pth"}, hub).weight_files == ["r50.pth"]
    assert resolve({**own, "init_from": "a.safetensors"}, hub).weight_files == ["a.safetensors"]
    assert resolve({**own, "weights_backbone": "r101.pth"}, run).weight_files == ["r101.pth"]
    # What a run saved names both, and is taken back.
    saved = tmp_path / "config.yaml"
    saved.write_text(yaml.safe_dump(resolve(own, run).as_dict()))
    assert resolve({}, saved).init_from == "runs/coco-deeplab-101-msc/best.safetensors"
    assert resolve({"weights_backbone": "r101.pth"}, saved).weight_files == ["r101.pth"]
    with pytest.raises(UsageError, match="both give the weights to start from"):
        resolve({**own, "weights_backbone": "r101.pth", "init_from": "a.safetensors"}, hub)
