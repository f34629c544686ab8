"""A trained model at work: several views of an image, `segmentation.load`, `predict`."""

import os
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import segmentation
from segmentation import commandline, engine, images
from segmentation.checkpoint import Description, save_weights
from segmentation.data.labels import save_label, voc_palette
from segmentation.data.shapes import ShapesDataset, draw
from segmentation.data.transforms import evaluation_transform
from segmentation.data.voc import VOC_CLASSES
from segmentation.errors import UsageError
from segmentation.inference import Views
from segmentation.predict import predict, run_command_line
from tests.segmentation.conftest import tiny

ROOT = Path(__file__).parents[2]


class Recording(nn.Module):
    """Gives its input back as logits, plus `column` times each pixel's column."""

    def __init__(self, column=0.0):
        super().__init__()
        self.column = column
        self.sizes = []

    def forward(self, image):
        self.sizes.append(tuple(image.shape[-2:]))
        return image + self.column * torch.arange(image.shape[-1])


def test_one_view_is_the_padded_image():
    image, model = torch.randn(1, 3, 30, 41), Recording()
    torch.testing.assert_close(Views().logits(model, image, 97), image, rtol=0, atol=0)
    assert model.sizes == [(97, 97)]


def test_views_have_the_sides_of_whole_grids():
    model = Recording()
    Views((0.5, 0.75, 1.0, 1.5), flip=True).logits(model, torch.randn(1, 3, 375, 600), 505)
    assert model.sizes[::2] == model.sizes[1::2]
    # 505 times the scale, or the image's side times the scale, up to the next 8k+1.
    assert model.sizes[::2] == [(257, 305), (385, 457), (505, 601), (761, 905)]


@pytest.mark.parametrize("fusion", ["max", "mean"])
def test_mirrored_views_are_turned_back_and_fused(fusion):
    image = torch.randn(2, 3, 20, 25)
    ramp = 0.3 * torch.arange(25.0)
    one, other = image + ramp, image + ramp.flip(0)
    expected = torch.maximum(one, other) if fusion == "max" else (one + other) / 2
    torch.testing.assert_close(Views((1.0,), True, fusion).logits(Recording(0.3), image, 33), expected)


@pytest.mark.parametrize("fusion", ["max", "mean"])
def test_scaled_views_are_resized_to_the_image_and_fused(fusion):
    image = torch.randn(1, 3, 40, 56)
    half = F.interpolate(image, (20, 28), mode="bilinear", antialias=True)
    back = F.interpolate(half, (40, 56), mode="bilinear")
    expected = torch.maximum(back, image) if fusion == "max" else (back + image) / 2
    torch.testing.assert_close(Views((0.5, 1.0), False, fusion).logits(Recording(), image, 57), expected)


@pytest.mark.parametrize("scales", [(), (1.0, 1.0), (0.0,), (-0.5, 1.0), (float("nan"),)])
def test_scales_that_give_no_image_are_refused(scales):
    with pytest.raises(UsageError, match=r"--scales .*: expected distinct factors above 0"):
        Views(scales)


def test_an_option_takes_several_numbers():
    arguments = ["--scales", "0.5", "1", "--flip", "1.0", "a.png", "--scales", "2", "3.5", "b.png", "7"]
    assert commandline._one_value_each(arguments, "--scales") == [
        "--scales", "0.5", "--scales", "1", "--flip", "1.0", "a.png",
        "--scales", "2", "--scales", "3.5", "b.png", "7",
    ]  # fmt: skip


def picture(index, width, height):
    return Image.fromarray(draw(np.random.default_rng(index), max(width, height))[0][:height, :width])


def test_three_lines_give_a_label_map(unbroken):
    image = picture(1, 50, 31).convert("RGBA")
    model, classes, transform = segmentation.load(unbroken / "last.safetensors")
    with torch.no_grad():
        labels = model(transform(image))[0].argmax(0)[: image.height, : image.width]
    assert labels.shape == (31, 50)
    assert classes == ShapesDataset.classes
    assert not model.training
    assert transform(image).shape == (1, 3, 97, 97)
    with pytest.raises(UsageError, match=r"--checkpoint nowhere: no such file; name a best\.safetensors"):
        segmentation.load("nowhere")


def test_load_sees_what_scoring_sees(unbroken):
    dataset = ShapesDataset("val")
    image, _ = dataset[3]
    _, _, transform = segmentation.load(str(unbroken / "last.safetensors"))
    seen = transform(Image.fromarray(image.permute(1, 2, 0).numpy()))
    torch.testing.assert_close(seen[0], evaluation_transform(image, dataset.eval_size), rtol=0, atol=0)


@pytest.fixture
def pictures(tmp_path):
    """A folder of three images of differing form, and a damaged one."""
    folder = tmp_path / "in"
    folder.mkdir()
    picture(0, 60, 40).save(folder / "colour.jpg")
    picture(1, 33, 97).convert("L").save(folder / "grey.PNG", format="PNG")
    picture(2, 20, 24).convert("P").save(folder / "palette.png")
    (folder / "notes.txt").write_text("no image")
    whole = (folder / "colour.jpg").read_bytes()
    (folder / "damaged.jpg").write_bytes(whole[: len(whole) // 2])
    return folder


def run(monkeypatch, *arguments):
    """The program's exit code."""
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        run_command_line()
    return caught.value.code or 0


def test_a_folder_is_segmented_and_the_damaged_image_told(unbroken, pictures, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    code = run(
        monkeypatch, pictures, "--checkpoint", unbroken / "last.safetensors", "--out", out, "--overlay",
        "--probabilities", "--scales", "0.5", "1.0", "--flip", "--fusion", "mean", "--threads", 1,
    )  # fmt: skip
    assert code == 1
    told = capsys.readouterr()
    assert told.out == f"3 of 4 images segmented into {out}\n"
    assert f"skipped: {pictures / 'damaged.jpg'} cannot be read as an image (" in told.err

    model, _, transform = segmentation.load(unbroken / "last.safetensors")
    held = {str(file.relative_to(out)) for file in out.rglob("*.*")}
    assert held == {
        f"{place}{name}.{suffix}"
        for name in ("colour", "grey", "palette")
        for place, suffix in (("", "png"), ("overlays/", "png"), ("probabilities/", "npy"))
    }
    for file in ("colour.jpg", "grey.PNG", "palette.png"):
        name = Path(file).stem
        with Image.open(pictures / file) as image, Image.open(out / f"{name}.png") as label:
            assert (label.mode, label.size) == ("P", image.size)
            np.testing.assert_array_equal(np.reshape(label.getpalette(), (-1, 3))[:6], voc_palette()[:6])
            indices, rgb = np.array(label), np.array(image.convert("RGB"))
            normalised = transform(image)[..., : image.height, : image.width]
        logits = Views((0.5, 1.0), True, "mean").logits(model, normalised, 97)[0]
        np.testing.assert_array_equal(indices, logits.argmax(0).numpy())
        shares = np.load(out / "probabilities" / f"{name}.npy")
        assert (shares.dtype, shares.shape) == (np.float16, (6, *indices.shape))
        np.testing.assert_allclose(shares, logits.softmax(0).numpy(), atol=1e-3)
        mixed = np.array(Image.open(out / "overlays" / f"{name}.png"))
        np.testing.assert_allclose(mixed, rgb / 2 + voc_palette()[indices] / 2, atol=1)


def test_large_images_are_skipped_and_the_option_named(unbroken, pictures, tmp_path, capsys):
    skipped = predict(
        unbroken / "last.safetensors", [pictures / "colour.jpg", pictures / "palette.png"], tmp_path / "out",
        max_size=59, threads=1,
    )  # fmt: skip
    assert skipped == [pictures / "colour.jpg"]
    assert "is 60x40 pixels, above --max-size 59: shrink it, or pass --max-size 60" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["palette.png"]


def test_the_size_is_refused_before_pixels_are_read(tmp_path):
    # Such a header alone makes Pillow refuse an image as a bomb.
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "huge.png").write_bytes(start + struct.pack(">I", 0) + b"IDAT" + bytes(4))
    with pytest.raises(UsageError, match=r"is 30000x30000 pixels, above --max-size 2048"):
        images.read_image(tmp_path / "huge.png", 2048)


def test_images_of_more_than_8_bits_are_refused(tmp_path):
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UsageError, match=r"deep\.png is of mode I;16, more than 8 bits a channel: scale"):
        images.read_image(tmp_path / "deep.png", 2048)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on its way
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "bmp", "ppm"])
def test_damaged_images_of_any_kind_are_the_images_fault(tmp_path, suffix):
    file = tmp_path / f"image.{suffix}"
    picture(0, 40, 30).save(file)
    whole, rng = np.frombuffer(file.read_bytes(), np.uint8), np.random.default_rng(0)
    refused = 0
    for _ in range(40):
        damaged = whole.copy()
        damaged[rng.integers(0, len(whole), 8)] = rng.integers(0, 256, 8)
        damaged[rng.integers(0, min(64, len(whole)))] ^= 255
        file.write_bytes(damaged.tobytes())
        try:
            images.read_image(file, 2048)
        except UsageError:
            refused += 1
    assert refused


def test_what_cannot_be_done_at_all_is_refused_first(unbroken, pictures, tmp_path, monkeypatch, capsys):
    def refused(message, *arguments, out=tmp_path / "out"):
        checkpoint = unbroken / "last.safetensors"
        assert run(monkeypatch, "--checkpoint", checkpoint, "--out", out, *arguments) == 2
        assert message in capsys.readouterr().err

    refused("nowhere.jpg: no such file or folder; name images, or folders", tmp_path / "nowhere.jpg")
    (tmp_path / "empty").mkdir()
    refused("empty holds no images (.bmp, .jpeg, .jpg", tmp_path / "empty")
    picture(0, 9, 9).save(pictures / "colour.png")
    refused("colour.png: predict them into two folders", pictures)
    (pictures / "colour.png").unlink()
    refused("palette.png would be replaced by its labels: name another", pictures, out=pictures)
    refused("'colour' is no ID of a VOC image, such as 2008_000006", pictures, "--voc-submission")
    refused("--scales 0: expected distinct factors above 0", pictures, "--scales", "0")
    picture(0, 9, 9).save(tmp_path / "2008_000006.png")
    refused(
        "knows 6 classes (ground, disc, ring, bar, ...)", tmp_path / "2008_000006.png", "--voc-submission"
    )
    refused(
        "notes.txt could not be written (File exists): free space there, or name another",
        pictures,
        out=pictures / "notes.txt",
    )
    assert not (tmp_path / "out").exists()


def test_nothing_half_written_is_left_under_a_results_name(unbroken, pictures, tmp_path, monkeypatch):
    def full(self, file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    out = tmp_path / "out"
    with pytest.raises(
        UsageError, match=r"colour\.png could not be written \(No space left on device\): free"
    ):
        predict(unbroken / "last.safetensors", [pictures / "colour.jpg"], out, threads=1)
    assert not list(out.glob("*.png"))


@pytest.fixture(scope="module")
def voc_weights(tmp_path_factory):
    """Weights of an untrained model for VOC's classes."""
    folder = tmp_path_factory.mktemp("voc")
    config = tiny(folder, dataset="voc", data_path="elsewhere", weights_backbone="none", model="sim-deeplab",
                  backbone="resnet18")  # fmt: skip
    torch.manual_seed(0)
    file = folder / "best.safetensors"
    save_weights(file, engine.build_model(config, 21), Description(config, VOC_CLASSES, step=0, miou=0.0))
    return file


def test_the_archive_for_vocs_server(voc_weights, tmp_path, capsys):
    sizes = {"2008_000006": (50, 37), "2011_003271": (33, 40)}
    for index, (name, size) in enumerate(sizes.items()):
        picture(index, *size).save(tmp_path / f"{name}.jpg")
    out = tmp_path / "out"
    files = [tmp_path / f"{name}.jpg" for name in sizes]
    assert predict(voc_weights, files, out, voc_submission=True, threads=1) == []
    assert "the server wants all 1456 of VOC's test list" in capsys.readouterr().out
    archive = out / "comp6_test_cls.tar.gz"
    with tarfile.open(archive) as tar:
        assert tar.getnames() == [f"results/VOC2012/Segmentation/comp6_test_cls/{name}.png" for name in sizes]
        for name, size in sizes.items():
            with Image.open(tar.extractfile(f"{images.SUBMISSION}/{name}.png")) as label:
                assert (label.mode, label.size) == ("P", size)
                assert np.array(label).max() <= 20
    assert not list(out.glob("*.partial"))

    archive.unlink()
    (tmp_path / "2011_003271.jpg").write_bytes(b"no image")
    assert len(predict(voc_weights, files, out, voc_submission=True, threads=1)) == 1
    assert "1 of 2 images segmented" in (told := capsys.readouterr().out)
    assert "no archive, which needs all of them" in told
    assert not archive.exists()


def test_an_archive_the_server_would_not_take_is_not_written(tmp_path):
    name = "2008_000006"
    file, archive = tmp_path / f"{name}.png", tmp_path / "archive.tar.gz"

    def refused(message):
        with pytest.raises(UsageError, match=message):
            images.write_submission(archive, {name: (8, 6)})
        assert not archive.exists()

    Image.new("L", (8, 6)).save(file)
    refused(r"2008_000006\.png is of mode L, 8x6 pixels.*the server wants mode P")
    save_label(file, np.zeros((8, 6), np.uint8))
    refused(r"6x8 pixels, values up to 0; the server wants mode P, 8x6 pixels")
    save_label(file, np.full((6, 8), 21, np.uint8))
    refused(r"values up to 21; the server wants .* values up to 20")
    save_label(file, np.full((6, 8), 20, np.uint8))
    images.write_submission(archive, {name: (8, 6)})
    with pytest.raises(UsageError, match=r"comp6_test_cls/2008_000006\.png is missing, double or not asked"):
        images.check_submission(archive, {"2008_000007": (8, 6)})


def test_help_does_not_wait_for_torch():
    code = (
        "import sys; from segmentation import predict\n"
        "try: sys.argv = ['predict', '--help']; predict.run_command_line()\n"
        "except SystemExit: pass\n"
        "print('heavy:', [m for m in ('torch', 'torchvision', 'timm', 'lightning') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    ).stdout
    assert told.endswith("heavy: []\n")
    assert "--voc-submission" in told
