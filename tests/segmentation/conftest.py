"""What the tests of segmentation share: the place of real data, a tiny VOC-layout folder, a tiny run."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segmentation.checkpoint import load_weights, save_weights
from segmentation.config import Config, resolve
from segmentation.data.shapes import ShapesDataset, draw
from segmentation.data.transforms import evaluation_transform
from segmentation.engine import build_model
from segmentation.train import train


@pytest.fixture(autouse=True)
def threads_as_before():
    """A run with threads of its own sets torch's; the next test finds them as they were."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def real_data():
    """The folder of real data, named by GRAPHDIFF_DATA or beside the repository."""
    root = Path(__file__).parents[2]
    folder = Path(os.environ.get("GRAPHDIFF_DATA", root.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist (name its place as GRAPHDIFF_DATA)")
    return folder


def write_voc(
    root: Path, images: int = 4, size: int = 41, splits: dict[str, list[int]] | None = None
) -> Path:
    """A data set in VOC's layout, of generated scenes with a void border; returns its root."""
    (root / "JPEGImages").mkdir(parents=True)
    (root / "SegmentationClass").mkdir()
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "classes.txt").write_text("ground\ndisc\nring\nbar\ncross\nsnake\n")
    for index in range(images):
        image, label = draw(np.random.default_rng(index), size)
        label[:2] = 255
        Image.fromarray(image).save(root / "JPEGImages" / f"scene_{index}.jpg", quality=95)
        save_label(root, f"scene_{index}", label)
    for split, members in (splits or {"train": list(range(images)), "val": list(range(images))}).items():
        lines = "".join(f"scene_{index}\n" for index in members)
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(lines)
    return root


def save_label(root: Path, identifier: str, label: np.ndarray) -> None:
    file = Image.fromarray(label.astype(np.uint8), mode="L")
    file.putpalette([value for index in range(256) for value in (index, 255 - index, 7 * index % 256)])
    file.save(root / "SegmentationClass" / f"{identifier}.png")


@pytest.fixture
def voc(tmp_path):
    return write_voc(tmp_path / "VOCdevkit" / "VOC2012")


def tiny(folder: Path, **flags: object) -> Config:
    """A run of seconds: DifNet-18 on small crops of shapes, on one thread."""
    values = {
        "output_dir": str(folder), "max_steps": 4, "batch_size": 2, "crop_size": 33, "eval_every": 4,
        "limit_val_batches": 2, "log_every": 1, "threads": 1, "device": "cpu", "lr": 0.01,
    }  # fmt: skip
    return resolve(values | flags, None)


# Epochs of four steps and checkpoints every three: some lie in the middle of an epoch.
UNBROKEN = {
    "max_steps": 12, "eval_every": 5, "checkpoint_every": 3, "limit_train_batches": 4, "ema_decay": 0.9,
    "grad_accum_steps": 2,
}  # fmt: skip


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory):
    """The folder of a finished run, which others must equal or evaluate."""
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    assert train(tiny(folder, **UNBROKEN)) == 0
    return folder


@pytest.fixture(scope="session")
def many_classes(unbroken, tmp_path_factory):
    """The checkpoint of that run, made to see every class and to walk far: a run of seconds does neither."""
    weights, about = load_weights(unbroken / "last.safetensors")
    model = build_model(about.config, len(about.classes)).eval()
    model.load_state_dict(weights)
    image, _ = ShapesDataset("val")[0]
    with torch.no_grad():
        score = model(evaluation_transform(image, 97)[None], return_maps=True).score
        model.score.convs[0].bias -= score.mean((0, 2, 3))
        for t, step in enumerate(model.cascade.steps):
            step.mu_logit.fill_(1.0 + 0.2 * t)
            step.beta_logit.fill_(0.9 - 0.1 * t)
    file = tmp_path_factory.mktemp("many") / "last.safetensors"
    save_weights(file, model, about)
    return file
