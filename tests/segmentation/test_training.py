"""Training and scoring as a whole, at tiny size."""

import csv
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from segmentation import engine
from segmentation.checkpoint import Description, load_weights, save_weights
from segmentation.config import Config, resolve
from segmentation.data.loader import Augmented, Evaluated, evaluation_loader
from segmentation.data.shapes import ShapesDataset
from segmentation.data.transforms import training_transform
from segmentation.errors import UsageError
from segmentation.evaluate import evaluate
from segmentation.models import DifNet, SimDeepLab
from segmentation.models.backbone import network, parts
from segmentation.train import train
from tests.segmentation.conftest import UNBROKEN, tiny, write_voc

ROOT = Path(__file__).parents[2]
ALL_FRESH = 2 * [frozenset(parts("resnet18"))]


def rows(file):
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


def same_weights(one, other):
    a, b = load_file(one / "last.safetensors"), load_file(other / "last.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same(one, other):
    """Whether two states hold the same, to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def same_run(folder, unbroken):
    """Whether a run that was interrupted has become the one that was not, in all it leaves."""
    one, other = (torch.load(run / "last.ckpt", weights_only=True) for run in (folder, unbroken))
    assert {**one["config"], "output_dir": ""} == {**other["config"], "output_dir": ""}
    assert [key for key in one if key != "config" and not same(one[key], other[key])] == []
    tables = zip(rows(folder / "metrics.csv"), rows(unbroken / "metrics.csv"), strict=True)
    for row, expected in tables:
        assert {**row, "images_per_second": ""} == {**expected, "images_per_second": ""}
    return same_weights(folder, unbroken)


def test_a_run_leaves_what_it_promises(unbroken):
    names = {"config.yaml", "env.json", "metrics.csv", "per_class.csv", "panel.png"}
    names |= {"best.safetensors", "last.safetensors", "last.ckpt", "step-10.ckpt"}
    assert {file.name for file in unbroken.iterdir()} == names
    table = rows(unbroken / "metrics.csv")
    assert [row["step"] for row in table] == ["5", "10", "12"]
    for row in table:
        assert all(math.isfinite(float(value)) for value in row.values())
        for t in range(5):
            assert 0 < float(row[f"mu_{t}"]) < 1
            assert 0 < float(row[f"beta_{t}"]) < 1
            assert 0 <= float(row[f"diagonal_{t}"]) <= 1
            assert 0 < float(row[f"hub_{t}"]) <= 1
    lr = [float(row["lr"]) for row in table]
    np.testing.assert_allclose(lr, [0.01 * (1 - step / 12) ** 0.9 for step in (5, 10, 12)], atol=1e-9)
    assert len(rows(unbroken / "per_class.csv")) == 3 * 6
    environment = json.loads((unbroken / "env.json").read_text())
    assert (environment["threads"], environment["device"]) == (1, "cpu")
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0]
    assert resolve({}, unbroken / "config.yaml") == tiny(unbroken, **UNBROKEN)


def test_the_hash_of_the_weight_file_outlives_the_file(tmp_path):
    file = tmp_path / "imagenet.pth"
    torch.save(network("resnet18", (1, 2, 3, 4)).state_dict(), file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    run = tmp_path / "run"
    config = tiny(run, model="sim-deeplab", aspp=False, weights_backbone=str(file), max_steps=1)
    assert train(config) == 0
    file.unlink()
    assert train(config, resume="auto") == 0
    assert json.loads((run / "env.json").read_text())["weights_sha256"] == {str(file): digest}
    _, about = load_weights(run / "best.safetensors")
    assert about.weights_sha256 == {str(file): digest}
    evaluate(run / "best.safetensors", limit_batches=1, out=tmp_path / "scores", threads=1)
    scores = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert scores["weights_sha256"] == {str(file): digest}


def test_evaluate_gives_the_score_of_training(unbroken, tmp_path, capsys):
    scores = evaluate(unbroken / "last.safetensors", limit_batches=2, out=tmp_path, panel=2, threads=1)
    last = rows(unbroken / "metrics.csv")[-1]
    assert float(last["miou"]) == scores.miou
    assert float(last["majority_miou"]) == scores.majority_miou
    np.testing.assert_array_equal(np.load(tmp_path / "confusion.npy"), scores.confusion)
    assert json.loads((tmp_path / "metrics.json").read_text())["miou"] == scores.miou
    assert rows(tmp_path / "per_class.csv") == rows(unbroken / "per_class.csv")[-6:]
    assert (tmp_path / "panel.png").stat().st_size > 10_000
    told = capsys.readouterr().out
    assert "majority class" in told
    assert "2 of 96 images at their own sizes" in told


def test_evaluate_refuses_data_of_other_classes(unbroken, voc, tmp_path):
    config = tiny(tmp_path, dataset="voc", data_path=str(voc), weights_backbone="none", model="sim-deeplab")
    file = tmp_path / "best.safetensors"
    about = Description(config, ("cat", "dog"), step=1, miou=0.5)
    save_weights(file, engine.build_model(config, 2), about)
    with pytest.raises(
        UsageError, match=r"2 classes \(cat, dog\), the data has 6 \(ground, disc, ring, bar, \.\.\.\): give"
    ):
        evaluate(file)
    with pytest.raises(UsageError, match="--panel needs --out"):
        evaluate(unbroken / "last.safetensors", panel=2)


def test_the_loss_falls_on_images_seen_again_and_again():
    torch.manual_seed(6)
    config = resolve({"lr": 0.02}, None)
    model = DifNet("resnet18", 6)
    optimizer = torch.optim.SGD(engine.parameter_groups(model, ALL_FRESH, config), momentum=0.9)
    samples = Augmented(ShapesDataset("train"), training_transform(65, (1.0, 1.0)), seed=0)
    image, label = (
        torch.stack(parts) for parts in zip(*(samples[0, index] for index in range(4)), strict=True)
    )
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = engine.summed_loss(model(image), label) / label.numel()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_sim_deeplab_trains_too(tmp_path, capsys):
    assert train(tiny(tmp_path / "run", model="sim-deeplab", aspp=False, max_steps=2)) == 0
    told = capsys.readouterr().out
    assert "sim-deeplab on resnet18" in told
    assert "µ" not in told
    assert (tmp_path / "run" / "panel.png").is_file()


def test_the_first_walks_coefficients_stay_equal(tmp_path):
    # Theory 8: y¹ = s + β₁µ₁(P₁s − s) is symmetric in the two, later walks are not.
    assert train(tiny(tmp_path / "run", lr=0.05)) == 0
    (row,) = rows(tmp_path / "run" / "metrics.csv")
    mu, beta = ([float(row[f"{name}_{t}"]) for t in range(5)] for name in ("mu", "beta"))
    assert abs(mu[0] - beta[0]) < 1e-6
    assert abs(mu[0] - 0.5) > 1e-6
    assert abs(mu[1] - beta[1]) > 3e-6


def test_parameters_are_grouped_by_rate_and_decay():
    config = resolve({"lr": 0.1, "head_lr_mult": 10.0, "weight_decay": 0.3}, None)
    model = DifNet("resnet18", 3)
    groups = {
        group["name"]: group for group in engine.parameter_groups(model, 2 * [frozenset({"layer4"})], config)
    }
    assert sum(len(group["params"]) for group in groups.values()) == len(list(model.parameters()))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    members = {key: {names[id(p)] for p in group["params"]} for key, group in groups.items()}
    rates = {key: (group["lr"], group["weight_decay"]) for key, group in groups.items()}
    assert rates == {
        "pretrained": (0.1, 0.3), "pretrained, norm": (0.1, 0.0),
        "fresh": (1.0, 0.3), "fresh, norm": (1.0, 0.0), "µ, β": (1.0, 0.0),
    }  # fmt: skip
    assert len(members["µ, β"]) == 10
    assert "seed_branch.layer3.0.conv1.weight" in members["pretrained"]
    assert "similarity_branch.bn1.bias" in members["pretrained, norm"]
    assert {"seed_branch.layer4.0.conv1.weight", "score.convs.0.bias"} <= members["fresh"]
    assert {"similarity_branch.layer4.0.bn1.weight", "importance.0.weight"} <= members["fresh, norm"]
    assert not engine.parameter_groups(model, ALL_FRESH, config)[0]["params"]


def test_walk_columns_are_those_of_the_dense_matrices():
    torch.manual_seed(4)
    model = DifNet("resnet18", 3, walks=(0, 2)).eval()
    images = torch.randn(2, 3, 41, 41)
    columns = engine.walk_columns(model, [(image[None], None) for image in images])
    with torch.no_grad():
        for t, P in zip((0, 2), model.transitions(images), strict=True):
            dense = P.dense()
            diagonal = dense.diagonal(dim1=-2, dim2=-1).median(-1).values.mean()
            hub = (dense.sum(-2).max(-1).values / dense.shape[-1]).mean()
            assert columns[f"diagonal_{t}"] == pytest.approx(float(diagonal), rel=1e-4)
            assert columns[f"hub_{t}"] == pytest.approx(float(hub), rel=1e-4)
    assert columns["mu_2"] == columns["beta_0"] == 0.5


def test_void_neither_trains_nor_counts():
    torch.manual_seed(4)
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    label = torch.randint(0, 3, (2, 4, 4))
    label[0] = 255
    loss = engine.summed_loss(logits, label)
    expected = torch.nn.functional.cross_entropy(logits[1:], label[1:], reduction="sum")
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert not logits.grad[0].any()
    assert engine.summed_loss(logits, torch.full_like(label, 255)) == 0


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(
        UsageError, match=r"the loss is (nan|inf) at step .*: lower --lr; no step was saved yet"
    ):
        train(tiny(tmp_path / "run", lr=1e12))


def test_a_split_smaller_than_a_batch_is_refused(voc, tmp_path):
    config = tiny(tmp_path / "run", dataset="voc", data_path=str(voc), weights_backbone="none", batch_size=5)
    with pytest.raises(
        UsageError, match="--train-split train holds 4 images, fewer than a batch of 5: lower"
    ):
        train(config)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_images_trains_and_images_in_both_splits_are_told(tmp_path, capsys):
    root = write_voc(tmp_path / "scenes", splits={"train": [0, 1, 2], "val": [2]})
    flags = {"dataset": "voc", "data_path": str(root), "weights_backbone": "none", "backbone": "resnet18"}
    assert train(tiny(tmp_path / "run", **flags, max_steps=1)) == 0
    assert "warning: 1 images are in both 'train' and 'val'" in capsys.readouterr().out


def test_a_run_is_not_overwritten_unasked(unbroken, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"is not empty: pass --resume auto .*, --overwrite .*, or another"):
        train(tiny(folder))
    with pytest.raises(UsageError, match="--resume goes on with a run and --overwrite deletes it"):
        train(tiny(folder), resume="auto", overwrite=True)
    assert same_weights(folder, unbroken)
    assert train(tiny(folder, max_steps=1), overwrite=True) == 0
    assert [row["step"] for row in rows(folder / "metrics.csv")] == ["1"]
    assert (folder / "notes.txt").read_text() == "mine"


def test_resuming_a_finished_run_scores_it_again(unbroken, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    assert train(tiny(folder, **UNBROKEN), resume="auto") == 0
    assert [row["step"] for row in rows(folder / "metrics.csv")] == ["5", "10", "12"]
    assert rows(folder / "metrics.csv")[-1]["miou"] == rows(unbroken / "metrics.csv")[-1]["miou"]
    with pytest.raises(UsageError, match=r"was made with seed 0, now it is 1: pass --config .*config\.yaml"):
        train(tiny(folder, **UNBROKEN, seed=1), resume="auto")


def start(config: Config, folder: Path) -> subprocess.Popen[str]:
    """A training process of its own, from its saved options."""
    options = folder.parent / "options.yaml"
    options.write_text(yaml.safe_dump(config.as_dict()))
    command = [sys.executable, "-u", "-m", "segmentation.train", "--config", str(options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)


def stop_after_step(process: subprocess.Popen[str], step: int, number: int) -> str:
    """Send a signal once a step is told; return what follows."""
    for line in process.stdout:
        if line.startswith(f"step {step}/"):
            process.send_signal(number)
            break
    return process.communicate()[0]


def test_a_killed_run_resumed_equals_an_unbroken_one(unbroken, tmp_path):
    folder = tmp_path / "run"
    config = tiny(folder, **UNBROKEN)
    process = start(config, folder)
    stop_after_step(process, 7, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert torch.load(folder / "last.ckpt", weights_only=True)["at"]["step"] == 6
    # What a kill in the middle of a row would leave behind.
    with open(folder / "metrics.csv", "a") as table:
        table.write("10,0.1,")

    assert train(config, resume="auto") == 0
    assert same_run(folder, unbroken)


def test_sigterm_writes_a_checkpoint_and_ends_cleanly(unbroken, tmp_path):
    folder = tmp_path / "run"
    config = tiny(folder, **UNBROKEN)
    process = start(config, folder)
    told = stop_after_step(process, 2, signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM
    assert f"--config {folder / 'config.yaml'} --resume auto" in told
    step = torch.load(folder / "last.ckpt", weights_only=True)["at"]["step"]
    assert f"stopped by SIGTERM after step {step} of 12" in told
    assert 2 <= step < 12

    assert train(resolve({}, folder / "config.yaml"), resume="auto") == 0
    assert same_run(folder, unbroken)


def test_help_does_not_wait_for_torch():
    code = (
        "import sys; from segmentation import train, evaluate\n"
        "for program in (train, evaluate):\n"
        "    try: sys.argv = ['program', '--help']; program.run_command_line()\n"
        "    except SystemExit: pass\n"
        "print('heavy:', [m for m in ('torch', 'torchvision', 'timm', 'lightning') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    told = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    assert told.endswith("heavy: []\n")
    assert "--head-lr-mult" in told
    assert "--limit-batches" in told


def test_a_scoring_that_is_interrupted_gives_no_score():
    model = SimDeepLab("resnet18", 6)
    loader = evaluation_loader(Evaluated(ShapesDataset("val")), workers=0, limit=3)
    asked = iter([False, True])
    assert engine.evaluate(model, loader, 6, lambda: next(asked)) is None
    assert model.training
