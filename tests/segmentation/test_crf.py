"""The dense CRF: against a dense oracle, against pydensecrf2, and as a user calls it."""

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import graphdiff as gd
from segmentation import crf as crf_module
from segmentation import engine
from segmentation.checkpoint import Description, save_weights
from segmentation.crf import DenseCRF
from segmentation.data.shapes import ShapesDataset, draw
from segmentation.data.transforms import normalise
from segmentation.errors import UsageError
from segmentation.evaluate import evaluate
from segmentation.inference import Views, load_model
from segmentation.predict import predict, run_command_line
from tests.segmentation.conftest import tiny

needs_peer = pytest.mark.skipif(
    importlib.util.find_spec("pydensecrf") is None, reason="pydensecrf2 is not installed: extra [crf]"
)


def scene(height=11, width=13, classes=4, seed=3):
    """Two colours with noise, and a score that roughly follows them."""
    g = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 12, (3, height, width), generator=g).to(torch.uint8)
    image[:, :, width // 2 :] += 90
    logits = torch.randn(classes, height, width, generator=g)
    logits[0, :, : width // 2] += 1.5
    logits[1, :, width // 2 :] += 1.5
    return logits, image


def dense_mean_field(logits, image, crf, kernels):
    """Equations of the paper in float64, from a matrix [N, N] for each kernel."""
    classes, height, width = logits.shape
    score = logits.double().log_softmax(0).clamp(min=np.log(crf.floor)).reshape(classes, -1)
    terms = []
    for weight, K in zip((crf.gaussian_weight, crf.bilateral_weight), kernels, strict=True):
        root = K.sum(-1).rsqrt()
        terms.append(weight * root.unsqueeze(-1) * K * root)
    q = score.softmax(0)
    for _ in range(crf.iterations):
        # An energy: what disagreement costs, not what agreement gains.
        cost = sum((1 - torch.eye(classes, dtype=torch.float64)) @ q @ K.T for K in terms)
        q = (score - cost).softmax(0)
    return q.reshape(classes, height, width)


def features(image, crf):
    height, width = image.shape[1:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places, colours = torch.stack([x, y], -1).reshape(-1, 2).float(), image.flatten(1).T.float()
    near, alike = places / crf.bilateral_sigma, colours / crf.colour_sigma
    # Rounded like the CRF's own.
    return (places / crf.gaussian_sigma).double(), torch.cat([near, alike], -1).double()


# --- mathematics


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"iterations": 3, "gaussian_sigma": 2.0, "bilateral_sigma": 5.0, "colour_sigma": 10.0},
        {"gaussian_weight": 0.0, "bilateral_weight": 9.0, "bilateral_sigma": 8.0},
        {"bilateral_weight": 0.0, "gaussian_sigma": 3.0, "floor": 1e-2},
    ],
)
def test_mean_field_equals_the_dense_equations_on_the_same_lattice(parameters):
    crf = DenseCRF(**parameters)
    logits, image = scene()
    # Pixels lie on borders of simplices: an oracle that breaks ties another way would have another lattice.
    # tests/graphdiff/test_permutohedral.py holds this one against such an oracle at points without ties.
    eye = torch.eye(image[0].numel(), dtype=torch.float64)
    kernels = [gd.PermutohedralLattice(p).filter(eye) for p in features(image, crf)]
    exact = dense_mean_field(logits, image, crf, kernels)
    q = crf(logits, image)
    assert q.dtype == torch.float32
    torch.testing.assert_close(q.sum(0), torch.ones(q.shape[1:]))
    torch.testing.assert_close(q.double(), exact, rtol=0, atol=2e-5)
    assert (q - logits.softmax(0)).abs().max() > 0.1


def test_it_is_near_the_crf_of_true_gaussians():
    """The lattice's own error, in the classes that it leads to."""
    crf = DenseCRF(gaussian_sigma=3.0, bilateral_sigma=20.0, colour_sigma=13.0)
    logits, image = scene(20, 24)
    kernels = [(-torch.cdist(p, p).square() / 2).exp() for p in features(image, crf)]
    exact, q = dense_mean_field(logits, image, crf, kernels), crf(logits, image)
    assert (q.argmax(0) == exact.argmax(0)).double().mean() > 0.99
    assert (q - exact).abs().mean() < 0.02


def test_without_pairs_the_probabilities_stay_and_small_ones_are_raised():
    logits, image = scene()
    logits[3] = -50.0
    crf = DenseCRF(gaussian_weight=0.0, bilateral_weight=0.0, floor=1e-3)
    raised = logits.softmax(0).clamp(min=1e-3)
    torch.testing.assert_close(crf(logits, image), raised / raised.sum(0))
    # Log-probabilities are logits, too; a constant at each pixel is nothing.
    torch.testing.assert_close(DenseCRF()(logits, image), DenseCRF()(logits.log_softmax(0) + 7, image))


def test_no_gradients_and_no_trace_of_the_default_dtype():
    logits, image = scene()
    plain = DenseCRF()(logits, image)
    assert not DenseCRF()(logits.clone().requires_grad_(), image).requires_grad
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(DenseCRF()(logits, image), plain)
    finally:
        torch.set_default_dtype(torch.float32)


# --- the peer


def check_against_the_peer(logits, image, **parameters):
    """Equal in argmax but where the two best are within 0.01 of each other; |ΔQ| ≤ 0.005."""
    ours = DenseCRF(**parameters)(logits, image)
    theirs = DenseCRF(**parameters, backend="pydensecrf2")(logits, image)
    assert (ours - theirs).abs().max() <= 0.005
    best = theirs.topk(2, 0).values
    near_tie = best[0] - best[1] < 0.01
    assert ((ours.argmax(0) == theirs.argmax(0)) | near_tie).all()


@needs_peer
def test_equal_to_pydensecrf2_on_a_scene():
    pixels, label = draw(np.random.default_rng(5), 97)
    logits = 2.0 * F.one_hot(torch.from_numpy(label).long().clamp(max=5), 6).permute(2, 0, 1).float()
    logits = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
    check_against_the_peer(logits, image)
    check_against_the_peer(logits, image, bilateral_sigma=80.0, colour_sigma=13.0, gaussian_sigma=3.0)
    check_against_the_peer(logits, image, iterations=2, floor=1e-3, gaussian_weight=1.0)


@needs_peer
@pytest.mark.parametrize(
    "file",
    ["VOCdevkit/VOC2012/{}/2007_000033", "VOCdevkit/VOC2012/{}/2007_000323", "CamVid/{}/0001TP_006690"],
)
def test_equal_to_pydensecrf2_on_real_images(real_data, file):
    picture = real_data / f"{file.format('JPEGImages')}.jpg"
    truth = real_data / f"{file.format('SegmentationClass')}.png"
    image = torch.from_numpy(np.array(Image.open(picture).convert("RGB"))).permute(2, 0, 1)
    label = torch.from_numpy(np.array(Image.open(truth))).long()
    label[label == 255] = 0
    # As a network of stride 8 might score: coarse, and wrong here and there.
    exact = F.one_hot(label, 21).permute(2, 0, 1)[None].float()
    coarse = 6.0 * F.interpolate(exact, scale_factor=1 / 8, mode="bilinear", antialias=True)
    coarse = coarse + torch.randn(coarse.shape, generator=torch.Generator().manual_seed(3))
    check_against_the_peer(F.interpolate(coarse, label.shape, mode="bilinear")[0], image)


def test_a_missing_peer_is_told_with_its_name_on_pypi(monkeypatch):
    monkeypatch.setattr(crf_module, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"not installed: pip install pydensecrf2, which compiles C\+\+"):
        DenseCRF(backend="pydensecrf2")


# --- on the command line


def test_scores_are_those_of_the_refined_probabilities_and_the_protocol_tells(tmp_path):
    config = tiny(tmp_path, model="sim-deeplab", backbone="resnet18", weights_backbone="none")
    torch.manual_seed(0)
    file = tmp_path / "best.safetensors"
    about = Description(config, ShapesDataset.classes, step=0, miou=0.0)
    save_weights(file, engine.build_model(config, 6), about)
    scores = evaluate(file, out=tmp_path, limit_batches=2, threads=1, crf="builtin")
    model, _ = load_model(file, "cpu")
    dataset, confusion = ShapesDataset("val"), torch.zeros(6, 6, dtype=torch.int64)
    plain = confusion.clone()
    for index in (0, len(dataset) - 1):
        image, label = dataset[index]
        logits = Views().logits(model, normalise()(image)[None].as_subclass(torch.Tensor), 97)[0]
        refined = DenseCRF()(logits, image.as_subclass(torch.Tensor)).argmax(0)
        for counts, found in ((confusion, refined), (plain, logits.argmax(0))):
            known = label != 255
            pairs = 6 * label[known].long() + found[known]
            counts += torch.bincount(pairs.as_subclass(torch.Tensor), minlength=36).reshape(6, 6)
    np.testing.assert_array_equal(scores.confusion, confusion.numpy())
    assert not torch.equal(confusion, plain)
    protocol = json.loads((tmp_path / "metrics.json").read_text())["protocol"]
    assert "; CRF builtin, 10 iterations, 3 at 1 px, 4 at 67 px and 3 levels; labels" in protocol


def test_predict_writes_what_the_crf_says(unbroken, tmp_path, monkeypatch):
    pixels, _ = draw(np.random.default_rng(1), 60)
    Image.fromarray(pixels).save(tmp_path / "scene.png")
    written = {}
    for crf in ("none", "builtin"):
        out = tmp_path / crf
        arguments = [
            "predict", str(tmp_path / "scene.png"), "--checkpoint", str(unbroken / "last.safetensors"),
            "--out", str(out), "--probabilities", "--threads", "1", "--crf", crf,
        ]  # fmt: skip
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as caught:
            run_command_line()
        assert not caught.value.code
        written[crf] = np.load(out / "probabilities" / "scene.npy")
        label = np.array(Image.open(out / "scene.png"))
        np.testing.assert_array_equal(label, written[crf].argmax(0))
    logits = torch.from_numpy(written["none"]).float().log()
    expected = DenseCRF()(logits.clamp(min=-20), torch.from_numpy(np.array(pixels)).permute(2, 0, 1))
    # What is written is rounded to half precision.
    np.testing.assert_allclose(written["builtin"].astype(np.float32), expected.numpy(), atol=0.02)
    assert np.abs(written["builtin"].astype(np.float32) - written["none"]).max() > 0.05


def test_without_the_peer_nothing_is_written(unbroken, tmp_path, monkeypatch):
    monkeypatch.setattr(crf_module, "find_spec", lambda name: None)
    Image.new("RGB", (20, 20)).save(tmp_path / "grey.png")
    with pytest.raises(UsageError, match=r"pip install pydensecrf2, .*--crf builtin"):
        predict(unbroken / "last.safetensors", [tmp_path / "grey.png"], tmp_path / "out", crf="pydensecrf2")
    with pytest.raises(UsageError, match=r"pip install pydensecrf2, .*--crf builtin"):
        evaluate(unbroken / "last.safetensors", out=tmp_path / "out", crf="pydensecrf2")
    assert not (tmp_path / "out").exists()


# --- bad input


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"logits": torch.zeros(1, 4, 11, 13)}, ValueError, r"logits: expected shape \[K, H, W\] of one"),
        ({"logits": torch.zeros(4, 11, 13).long()}, TypeError, r"logits: expected a floating-point tensor"),
        ({"logits": torch.full((4, 11, 13), -torch.inf)}, ValueError, r"logits: .*low one, such as -100"),
        ({"image": torch.zeros(3, 11, 13)}, TypeError, r"image: expected uint8 as it was stored, got .*32"),
        ({"image": torch.zeros(3, 13, 11).byte()}, ValueError, r"image: expected shape \[3, 11, 13\] like"),
        ({"image": torch.zeros(11, 13, 3).byte()}, ValueError, r"image: .* got \[11, 13, 3\]"),
    ],
)
def test_bad_arrays(given, error, message):
    logits, image = scene()
    with pytest.raises(error, match=message):
        DenseCRF()(**{"logits": logits, "image": image} | given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"iterations": 0}, r"iterations: expected an integer ≥ 1, got 0"),
        ({"iterations": 2.5}, r"iterations: .* got 2.5"),
        ({"gaussian_weight": -1.0}, r"gaussian_weight: expected a finite number ≥ 0, got -1.0"),
        ({"bilateral_weight": float("nan")}, r"bilateral_weight: .* got nan"),
        ({"colour_sigma": 0.0}, r"colour_sigma: expected a finite number > 0, got 0.0"),
        ({"floor": 1.0}, r"floor: expected a probability between 0 and 1, got 1.0"),
        ({"backend": "simple"}, r"""backend: expected "builtin" or "pydensecrf2", got 'simple'"""),
    ],
)
def test_bad_parameters(given, message):
    with pytest.raises(ValueError, match=message):
        DenseCRF(**given)
