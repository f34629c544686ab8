"""Figures of the mechanism, as a user draws them: what is written, and that its numbers are the model's."""

import csv
import dataclasses
import itertools
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from segmentation import engine, timing
from segmentation.checkpoint import Description, load_weights, save_weights
from segmentation.data import VOID
from segmentation.data.loader import spread
from segmentation.data.shapes import ShapesDataset
from segmentation.data.transforms import evaluation_transform
from segmentation.evaluate import evaluate
from segmentation.figures.__main__ import run_command_line
from segmentation.figures.inputs import Nodes, Study
from segmentation.figures.transitions import MEASURES, PIXELS, telling_pixels
from segmentation.inference import load_model
from segmentation.models import SimDeepLab


def rows(file):
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


def column(table, name):
    return np.array([float(row[name]) for row in table])


@pytest.fixture
def draw(monkeypatch, capsys):
    """Run the program; what it printed, and the one line of its error, if any."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["figures", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            run_command_line()
        printed = capsys.readouterr()
        assert (caught.value.code or 0) == (2 if printed.err else 0), printed.err
        return printed.err if printed.err else printed.out

    return run


@pytest.fixture(scope="module")
def model(many_classes):
    return load_model(many_classes, "cpu")[0]


def seen(index):
    """An image of the split and what the model sees of it."""
    image, label = ShapesDataset("val")[index]
    return label.numpy(), evaluation_transform(image, 97)[None]


@pytest.fixture(scope="module")
def baseline(tmp_path_factory, many_classes):
    """A Sim-DeepLab's checkpoint."""
    _, about = load_weights(many_classes)
    config = dataclasses.replace(about.config, model="sim-deeplab")
    file = tmp_path_factory.mktemp("baseline") / "last.safetensors"
    save_weights(file, engine.build_model(config, 6), Description(config, about.classes, 0, 0.0))
    return file


def fit_for_a_paper(folder, name):
    with Image.open(folder / f"{name}.png") as file:
        assert file.info["dpi"] == pytest.approx((300, 300), abs=0.1)
        assert file.width / 300 < 7.5
        assert len(np.unique(np.array(file.convert("L")))) > 50
    document = (folder / f"{name}.pdf").read_bytes()
    # Text is text, in an embedded TrueType font.
    assert document.startswith(b"%PDF")
    assert b"/FontFile2" in document


def test_maps_are_those_of_the_model(draw, many_classes, model, tmp_path):
    told = draw("maps", "val-3", "val-8", "--checkpoint", many_classes, "--out", tmp_path, "--threads", "1")
    for name in ("maps.png", "maps.pdf", "maps.csv"):
        assert f"wrote {tmp_path / name}\n" in told
    fit_for_a_paper(tmp_path, "maps")
    table = rows(tmp_path / "maps.csv")
    assert [row["image"] for row in table] == ["val-3"] * 169 + ["val-8"] * 169
    with torch.no_grad():
        maps = model(seen(8)[1], return_maps=True)
    mine = table[169:]
    places = [(int(row["row"]), int(row["column"])) for row in mine]
    assert places == list(np.ndindex(13, 13))
    np.testing.assert_allclose(column(mine, "influence"), maps.score.abs().sum(1).flatten(), rtol=1e-5)
    np.testing.assert_allclose(column(mine, "importance"), maps.importance.flatten(), rtol=1e-5)
    named = [ShapesDataset.classes[c] for c in maps.score.argmax(1).flatten()]
    assert [row["score_class"] for row in mine] == named


def test_the_last_walk_is_the_prediction_and_scored_as_evaluate_does(draw, many_classes, tmp_path):
    told = draw("walks", "--count", 3, "--drawn", 2, "--checkpoint", many_classes, "--out", tmp_path)
    fit_for_a_paper(tmp_path, "walks")
    table = rows(tmp_path / "walks.csv")
    assert [row["stage"] for row in table] == ["seed", *(f"walk {t}" for t in range(5))]
    assert {(row["images"], row["with_truth"]) for row in table} == {("3", "3")}
    scores = evaluate(many_classes, limit_batches=3, boundary=True, out=tmp_path / "scores", threads=1)
    expected = rows(tmp_path / "scores" / "trimap.csv")
    assert float(table[-1]["trimap_miou_5"]) == float(expected[4]["miou"])
    assert len(set(column(table, "miou"))) > 3, "the stages differ"
    assert float(table[-1]["miou"]) == scores.miou
    assert float(table[-1]["pixel_accuracy"]) == scores.pixel_accuracy
    assert f"walk 4  {100 * scores.miou:7.2f}" in told


def test_walks_tell_how_much_each_of_them_changes(draw, many_classes, model, tmp_path):
    draw("walks", "val-0", "--checkpoint", many_classes, "--out", tmp_path)
    with torch.no_grad():
        maps = model(seen(0)[1], return_maps=True)
    up = [torch.nn.functional.interpolate(y, (97, 97), mode="bilinear", align_corners=True).argmax(1)
          for y in (maps.seed, *maps.walks)]  # fmt: skip
    changed = [0.0, *(float((one != other).double().mean()) for one, other in itertools.pairwise(up))]
    np.testing.assert_allclose(column(rows(tmp_path / "walks.csv"), "changed"), changed, atol=1e-12)


def test_without_a_truth_scores_are_left_out_and_that_is_told(draw, many_classes, tmp_path):
    image, _ = ShapesDataset("val")[5]
    Image.fromarray(image.permute(1, 2, 0).numpy()[:60]).save(tmp_path / "photo.png")
    told = draw("walks", tmp_path / "photo.png", "--checkpoint", many_classes, "--out", tmp_path)
    assert "no truth is known for these images: scores are left out" in told
    assert set(rows(tmp_path / "walks.csv")[0]) == {"stage", "images", "with_truth", "changed"}
    # With one whose truth is known, that one is scored.
    told = draw(
        "walks", tmp_path / "photo.png", "val-5", "--checkpoint", many_classes, "--out", tmp_path / "b"
    )
    draw("walks", "val-5", "--checkpoint", many_classes, "--out", tmp_path / "c")
    assert "scores are those of the 1 of 2 images whose truth is known" in told
    assert column(rows(tmp_path / "b" / "walks.csv"), "miou").tolist() == (
        column(rows(tmp_path / "c" / "walks.csv"), "miou").tolist()
    )


def measured_plainly(P, node, label, image):
    """What transitions.csv says of a row, by loops over a dense P [N, N] and the nodes on the image."""
    grid, rows_seen = 13, -(-(label.shape[0] + 4) // 8)
    whole = torch.zeros(3, 97, 97)
    whole[:, : label.shape[0]] = image[:, : label.shape[0]]
    colours = torch.nn.functional.interpolate(whole[None].double() / 255, (grid, grid), mode="area")[0]
    classes = {
        j: int(label[min(8 * (j // grid), label.shape[0] - 1), 8 * (j % grid)])
        for j in range(grid * rows_seen)
    }
    row = P[node].double()

    places = np.stack(np.divmod(np.arange(grid * grid), grid), -1)
    far = np.linalg.norm(places - places[node], axis=-1)
    apart = (colours.flatten(1) - colours.flatten(1)[:, [node]]).norm(dim=0).numpy()
    others = [j for j in classes if j != node]
    total = sum(float(row[j]) for j in others)
    sums = dict.fromkeys(
        ("same_class", "same_class_near", "colour_distance", "colour_distance_near", "distance"), 0.0
    )
    for j in others:
        share = float(row[j]) / total
        ring = [k for k in others if round(far[k]) == round(far[j])]
        sums["same_class"] += share * (classes[j] == classes[node])
        sums["same_class_near"] += share * np.mean([classes[k] == classes[node] for k in ring])
        sums["colour_distance"] += share * apart[j]
        sums["colour_distance_near"] += share * np.mean(apart[ring])
        sums["distance"] += share * far[j]
    return sums | {
        "itself": float(row[node]), "largest": float(row.max()),
        "padding": float(row[grid * rows_seen :].sum()),
        "effective_nodes": float(torch.exp(torch.special.entr(row).sum())),
        "same_class_even": np.mean([classes[j] == classes[node] for j in others]),
        "colour_distance_even": np.mean(apart[others]),
    }  # fmt: skip


def test_rows_of_transitions_are_those_of_the_model(draw, many_classes, model, tmp_path):
    told = draw(
        "transitions", "val-4", "--pixels", "10,20", "77,50", "--checkpoint", many_classes, "--out", tmp_path
    )
    fit_for_a_paper(tmp_path, "transitions")
    table = rows(tmp_path / "transitions.csv")
    label, padded = seen(4)
    image, _ = ShapesDataset("val")[4]
    with torch.no_grad():
        dense = [P.dense()[0] for P in model.transitions(padded)]
    assert len(table) == 10
    for row in table:
        # The nearest of nodes 8 pixels apart: row 20 / 8 = 2.5 is rounded up.
        node = {("10", "20"): 3 * 13 + 1, ("77", "50"): 6 * 13 + 10}[row["x"], row["y"]]
        assert int(row["node"]) == node
        for name, value in measured_plainly(dense[int(row["walk"])], node, label, image).items():
            assert float(row[name]) == pytest.approx(value, rel=1e-4, abs=1e-7), name
        assert row["class"] == ShapesDataset.classes[label[8 * (node // 13), 8 * (node % 13)]]
    means = rows(tmp_path / "transitions_mean.csv")
    assert [row["walk"] for row in means] == ["0", "1", "2", "3", "4"]
    # Over all nodes of a class, then over classes.
    nodes = label[::8, ::8].ravel()
    diagonal = dense[2].diagonal().numpy()
    expected = np.mean([diagonal[nodes == c].mean() for c in np.unique(nodes)])
    assert float(means[2]["itself"]) == pytest.approx(expected, rel=1e-5)
    even = [np.mean([(np.sum(nodes == c) - 1) / (len(nodes) - 1)]) for c in np.unique(nodes)]
    assert float(means[0]["same_class_even"]) == pytest.approx(np.mean(even))
    for name in set(MEASURES) - {"largest", "padding"}:
        assert name.replace("_", " ") in told


def test_padding_is_told_apart_and_the_prediction_stands_in_for_the_truth(
    draw, many_classes, model, tmp_path
):
    image, _ = ShapesDataset("val")[5]
    Image.fromarray(image.permute(1, 2, 0).numpy()[:60]).save(tmp_path / "photo.png")
    draw("transitions", tmp_path / "photo.png", "--pixels", "40,57", "--checkpoint", many_classes,
         "--out", tmp_path)  # fmt: skip
    padded = evaluation_transform(tv_tensors.Image(image[:, :60]), 97)[None]
    with torch.no_grad():
        label = model(padded)[0, :, :60].argmax(0).numpy()
        dense = [P.dense()[0] for P in model.transitions(padded)]
    table = rows(tmp_path / "transitions.csv")
    assert column(table, "padding").max() > 1e-3
    for row, P in zip(table, dense, strict=True):
        assert (row["truth"], row["node"]) == ("False", str(7 * 13 + 5))
        for name, value in measured_plainly(P, 7 * 13 + 5, label, image).items():
            assert float(row[name]) == pytest.approx(value, rel=1e-4, abs=1e-7), name


def test_pixels_are_chosen_deep_inside_the_largest_regions():
    label = np.zeros((60, 80), np.int64)
    label[5:26, 5:26] = 2  # first object
    label[40:51, 5:16] = 2  # the second of its class comes after the other classes' first
    label[30:39, 50:59] = 1
    label[55:57, 70:72] = 3  # too small
    label[:, 79] = VOID
    found = telling_pixels(label)
    assert found == telling_pixels(label)
    assert len(found) == PIXELS
    assert found[:2] == [(15, 15), (54, 34)], "the largest object comes first"
    x, y = found[2]
    assert label[y, x] == 0
    # An image of one class, and one without any, have a pixel too.
    assert telling_pixels(np.zeros((9, 9), np.int64)) == [(4, 4)]
    assert telling_pixels(np.full((9, 12), VOID)) == [(6, 4)]


def test_nodes_lie_where_the_score_is_upsampled_from():
    nodes = Nodes((64, 64), (505, 505), (375, 500))
    assert (nodes.rows, nodes.columns) == (48, 63)
    assert nodes.pixel(3 * 64 + 5) == (40.0, 24.0)
    assert nodes.of_pixel(43, 27) == 3 * 64 + 5
    assert nodes.of_pixel(44, 28) == 4 * 64 + 6
    values = np.arange(64 * 64).reshape(64, 64)
    spread_out = nodes.on_pixels(values)
    assert spread_out.shape == (375, 500)
    assert spread_out[27, 43] == 3 * 64 + 5
    back = nodes.at_nodes(spread_out, -1)
    np.testing.assert_array_equal(back[:48, :63], values[:48, :63])
    assert (back[48:] == -1).all()
    assert (back[:, 63:] == -1).all()


def test_coefficients_are_those_of_training_and_of_the_weights(draw, unbroken, tmp_path):
    checkpoint = unbroken / "last.safetensors"
    model, _ = load_model(checkpoint, "cpu")
    told = draw("coefficients", "--checkpoint", checkpoint, "--out", tmp_path)
    fit_for_a_paper(tmp_path, "coefficients")
    table = rows(tmp_path / "coefficients.csv")
    during = [row for row in table if row["source"] == "metrics.csv"]
    written = rows(checkpoint.parent / "metrics.csv")
    assert [row["step"] for row in during] == [row["step"] for row in written for _ in range(5)]
    for row in during:
        (of_step,) = (line for line in written if line["step"] == row["step"])
        assert float(row["mu"]) == float(of_step[f"mu_{row['walk']}"])
        assert float(row["beta"]) == float(of_step[f"beta_{row['walk']}"])
    own = table[len(during) :]
    assert {row["source"] for row in own} == {"last.safetensors"}
    assert {row["step"] for row in own} == {"12"}
    np.testing.assert_allclose(column(own, "mu"), model.cascade.mu.detach(), rtol=1e-6)
    np.testing.assert_allclose(column(own, "beta"), model.cascade.beta.detach(), rtol=1e-6)
    assert f"walk 4  {model.cascade.mu[4]:8.4f}{model.cascade.beta[4]:8.4f}" in told
    # Alone, a checkpoint has its own values only.
    shutil.copy(checkpoint, tmp_path / "alone.safetensors")
    told = draw("coefficients", "--checkpoint", tmp_path / "alone.safetensors")
    assert f"no metrics.csv beside {tmp_path / 'alone.safetensors'}: only its own values are drawn" in told
    assert len(rows(tmp_path / "figures" / "coefficients.csv")) == 5
    (tmp_path / "metrics.csv").write_text("step,miou\n5,0.1\n")
    fault = draw("coefficients", "--checkpoint", tmp_path / "alone.safetensors", "--out", tmp_path / "c")
    assert "is not the table of this checkpoint's run" in fault


def test_timing_tells_every_part_of_every_model(draw, many_classes, tmp_path):
    told = draw("timing", "--checkpoint", many_classes, "--model", "sim-deeplab", "--backbone", "resnet18",
                "--image-size", 65, "--rounds", 2, "--threads", 1, "--out", tmp_path)  # fmt: skip
    fit_for_a_paper(tmp_path, "timing")
    table = rows(tmp_path / "timing.csv")
    parts = [
        "seed branch",
        "similarity branch",
        "diffusion",
        "upsampling",
        "all",
        "network",
        "upsampling",
        "all",
    ]
    assert [row["part"] for row in table] == parts
    names = ["difnet resnet18 (checkpoint)"] * 5 + ["sim-deeplab resnet18"] * 3
    assert [row["model"] for row in table] == names
    for mine in (table[:4], table[5:7]):
        assert column(mine, "share_percent").sum() == pytest.approx(100)
        assert column(mine, "smallest").min() > 0
    for row in table:
        assert float(row["smallest"]) <= float(row["median_seconds"]) <= float(row["largest"])
        assert row["part"] in told


@pytest.mark.parametrize(
    ("slowed", "part"),
    [("seed_branch", "seed branch"), ("importance", "seed branch"), ("cascade", "diffusion"),
     ("similarity_branch", "similarity branch")],
)  # fmt: skip
def test_time_is_counted_for_the_part_it_was_spent_in(model, monkeypatch, slowed, part):
    # A clock on which nothing takes time but this module.
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    handle = getattr(model, slowed).register_forward_pre_hook(lambda *_: clock.append(clock.pop() + 1.0))
    try:
        found = timing.seconds_by_part({"it": model}, torch.zeros(1, 3, 33, 33), rounds=2)["it"]
    finally:
        handle.remove()
    parts = ["seed branch", "similarity branch", "diffusion", "upsampling"]
    expected = {name: [float(name == part)] * 2 for name in parts}
    assert {name: seconds.tolist() for name, seconds in found.items()} == expected
    assert list(found) == parts
    assert not any(module._forward_hooks for module in model.modules())


def test_the_baseline_is_timed_in_two_parts():
    model = SimDeepLab("resnet18", 3).eval()
    (parts,) = timing.seconds_by_part({"it": model}, torch.zeros(1, 3, 33, 33), rounds=2).values()
    assert {part: len(seconds) for part, seconds in parts.items()} == {"network": 2, "upsampling": 2}


def test_without_names_images_are_spread_over_the_split(many_classes):
    names = [sample.name for sample in Study(many_classes, count=4)]
    assert names == [f"val-{index}" for index in spread(96, 4)]
    assert [sample.name for sample in Study(many_classes, ["test-3"], split="test")] == ["test-3"]


@pytest.mark.parametrize("command", ["maps", "transitions", "walks", "coefficients", "explore"])
def test_a_checkpoint_without_walks_is_refused(draw, baseline, command):
    image = () if command == "coefficients" else ("val-0",)
    fault = draw(command, *image, "--checkpoint", baseline)
    assert fault == (
        f"error: {baseline} is a sim-deeplab, which has no walks to show: name a checkpoint of a difnet that "
        "has\n"
    )


def test_nothing_is_replaced_unasked(draw, many_classes, tmp_path):
    (tmp_path / "maps.csv").write_text("mine")
    fault = draw("maps", "val-0", "--checkpoint", many_classes, "--out", tmp_path)
    assert fault == (
        f"error: {tmp_path / 'maps.csv'} is there: pass --overwrite to replace it, or another folder as "
        "--out\n"
    )
    assert (tmp_path / "maps.csv").read_text() == "mine"
    assert not (tmp_path / "maps.png").exists()
    draw("maps", "val-0", "--checkpoint", many_classes, "--out", tmp_path, "--overwrite")
    assert len(rows(tmp_path / "maps.csv")) == 169


def test_what_cannot_be_drawn_is_told_in_one_line(draw, many_classes, tmp_path):
    common = ("--checkpoint", many_classes, "--out", tmp_path)
    assert "val-99 is neither a file nor one of the 96 images of shapes val (val-0, ...)" in draw(
        "maps", "val-99", *common
    )
    assert "photo.jpg: no such file; name one, or the ID of an image" in draw("maps", "photo.jpg", *common)
    assert f"{tmp_path} is a folder: name its images, as in" in draw("maps", tmp_path, *common)
    assert draw("transitions", "val-0", "--pixels", "97,3", *common) == (
        "error: --pixels 97,3 lies outside val-0, which is 97x97 pixels: give x,y from 0,0 (top left) to "
        "96,96\n"
    )
    assert "--pixels 7: expected column and row as X,Y" in draw("transitions", "--pixels", "7", *common)
    assert "--backbone is that of --model" in draw("timing", "--backbone", "resnet18", "--out", tmp_path)
    nowhere = tmp_path / "none.safetensors"
    assert f"--checkpoint {nowhere}: no such file" in draw("coefficients", "--checkpoint", nowhere)
    Image.new("RGB", (70, 20)).save(tmp_path / "wide.png")
    assert "above --max-size 64" in draw("maps", tmp_path / "wide.png", "--max-size", "64", *common)
    assert not list(tmp_path.glob("*.pdf"))
