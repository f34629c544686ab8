"""DifNet on other FCN-like models: modules of one's own, and torchvision's by name."""

import re

import pytest
import timm
import torch
import torchvision
from lightning.fabric import Fabric
from torch import nn
from torch.nn import functional as F

import segmentation
from segmentation import engine
from segmentation.checkpoint import load_weights, start_from
from segmentation.config import resolve
from segmentation.errors import UsageError
from segmentation.evaluate import evaluate
from segmentation.models import DifNet, fcn
from segmentation.train import train
from segmentation.trainer import Trainer
from tests.segmentation.conftest import tiny

SEED_MODELS = (
    "fcn_resnet50", "fcn_resnet101", "deeplabv3_resnet50", "deeplabv3_resnet101",
    "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large",
)  # fmt: skip


class Maps(nn.Module):
    """Three maps of 4, 6 and 8 channels at strides 2, 4 and 16, as a list, a tuple or a dictionary."""

    def __init__(self, kind=list):
        super().__init__()
        self.kind = kind
        sizes = ((3, 4, 2), (4, 6, 2), (6, 8, 4))
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, s, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b, s in sizes
        )

    def forward(self, image):
        maps = []
        for stage in self.stages:
            image = stage(image)
            maps.append(image)
        return {"a": maps[0], "b": maps[1], "c": maps[2]} if self.kind is dict else self.kind(maps)


class Out(nn.Module):
    """A score under "out", beside another that does not count, as torchvision's networks give it."""

    def __init__(self, stride, classes=4):
        super().__init__()
        self.conv = nn.Conv2d(3, classes, 3, stride, 1)

    def forward(self, image):
        score = self.conv(image)
        return {"out": score, "aux": score.new_zeros(1)}


def learned(model, image):
    """The loss before and after a step of SGD."""
    label = torch.randint(0, 4, (len(image), *image.shape[-2:]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(2):
        loss = F.cross_entropy(model(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("stride", [1, 8, 16])
@pytest.mark.parametrize("seed", [Out, lambda stride: nn.Conv2d(3, 4, 3, stride, 1)], ids=["out", "score"])
@pytest.mark.parametrize("kind", [list, dict, tuple])
def test_any_score_and_any_maps_make_a_difnet_that_learns(seed, stride, kind):
    torch.manual_seed(3)
    model = DifNet(seed(stride), 4, Maps(kind))
    assert (model.walks, model.steps) == ((0, 1, 2, 3), ("0", "1", "2", "3"))
    assert [embedding.conv.in_channels for embedding in model.cascade.embeddings] == [3, 4, 6, 8]
    image = torch.randn(2, 3, 41, 33)
    before, after = learned(model, image)
    assert after < before
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    maps = model(image, return_maps=True)
    # Whatever its stride, node (i, j) is read at pixel (8i, 8j).
    given = model.seed_branch(image)
    given = given["out"] if isinstance(given, dict) else given
    on_pixels = F.interpolate(given, (41, 33), mode="bilinear", align_corners=True)
    torch.testing.assert_close(maps.score, on_pixels[..., ::8, ::8], atol=1e-5, rtol=1e-4)
    assert model.backbones == [model.seed_branch, model.similarity_branch]


def test_walks_read_the_maps_they_are_numbered_by():
    torch.manual_seed(3)
    extractor = Maps(tuple)
    image = torch.randn(1, 3, 41, 33)
    for options, sources in (
        ({"walks": (0, 2)}, (0, 2)), ({"walks": [3]}, (3,)), ({"transitions": "last"}, (3,)),
        ({"walks": (1, 3), "diffusion": "exact"}, (1, 3)),
    ):  # fmt: skip
        model = DifNet(Out(8), 4, extractor, **options).eval()
        with torch.no_grad():
            all_of_them = [image, *extractor(image)]
            features = model.similarity_features(image)
        assert len(features) == len(sources)
        assert all(torch.equal(f, all_of_them[t]) for f, t in zip(features, sources, strict=True))
    # A timm network that gives maps is an extractor like any other, by module as by name.
    by_name = DifNet("resnet18", 4, walks=(0, 2, 4))
    network = timm.create_model("resnet18", features_only=True, output_stride=8, out_indices=(1, 2, 3, 4))
    by_module = DifNet("resnet18", 4, network, walks=(0, 2, 4))
    assert network.training
    network.load_state_dict(by_name.similarity_branch.state_dict(), strict=False)
    for one, other in zip(
        by_name.eval().similarity_features(image), by_module.eval().similarity_features(image), strict=True
    ):
        assert one.shape == other.shape


def test_a_dry_run_leaves_the_extractor_as_it_was():
    extractor = Maps()
    extractor.stages[1].eval()
    before = {key: value.clone() for key, value in extractor.state_dict().items()}
    DifNet(Out(8), 4, extractor)
    assert [module.training for module in extractor.stages] == [True, False, True]
    assert all(torch.equal(value, before[key]) for key, value in extractor.state_dict().items())
    # Channels that are given need none.
    extractor.forward = None
    assert DifNet(Out(8), 4, extractor, similarity_channels=(4, 6, 8)).walks == (0, 1, 2, 3)


def test_without_a_second_branch_the_image_or_nothing_is_read():
    image = torch.randn(1, 3, 33, 33)
    assert DifNet(Out(8), 4, walks=(0,)).eval()(image).shape == (1, 4, 33, 33)
    model = DifNet(Out(16), 4, diffusion="none", importance=False).eval()
    assert [name for name, _ in model.named_parameters()] == [
        "seed_branch.conv.weight",
        "seed_branch.conv.bias",
    ]
    assert model(image).shape == (1, 4, 33, 33)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: DifNet(Out(8), 4),
            "similarity: expected a backbone's name or a module that gives feature maps",
        ),
        (
            lambda: DifNet(Out(8), 4, "resnet18", diffusion="none"),
            "similarity: expected None with diffusion=",
        ),
        (
            lambda: DifNet(Out(8), 4, Maps(), walks=(0, 4)),
            r"numbers from \(0, 1, 2, 3\) in rising order, got",
        ),
        (
            lambda: DifNet("resnet18", 4, similarity_channels=(3,)),
            "similarity_channels: expected None unless",
        ),
        (
            lambda: DifNet(Out(8), 4, Out(8)),
            "similarity: expected the module to give a list, tuple or dict|map",
        ),
        (
            lambda: DifNet(Out(8), 4, nn.Conv2d(3, 4, 1)),
            r"dictionary of maps \[B, C, H, W\], got \[1, 4, 224",
        ),
        (
            lambda: DifNet(Out(8), 4, nn.Conv2d(5, 4, 1)),
            "a dry run on 224x224 pixels failed .*; give similarity_",
        ),
        (
            lambda: DifNet("resnet18", 4, diffusion="inverse"),
            'diffusion: expected "cascade", "exact" or "none"',
        ),
        (
            lambda: DifNet("resnet18", 4, transitions="first"),
            'transitions: expected "hierarchical" or "last"',
        ),
        (
            lambda: DifNet("resnet18", 4, diffusion="exact", fixed_beta=1),
            'fixed_beta: belongs to diffusion="casc',
        ),
        (lambda: DifNet("resnet18", 4, diffusion="none", fixed_mu=0.5), "fixed_mu: belongs to diffusion="),
        (
            lambda: DifNet("resnet18", 4, diffusion="exact", transitions="last"),
            "transitions: belongs to diff",
        ),
    ],
)
def test_branches_that_do_not_fit_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_what_the_branches_give_is_checked():
    image = torch.randn(1, 3, 33, 33)
    with pytest.raises(
        ValueError, match=r"seed: expected the module to give a score \[B, 5, h, w\].*got \[1, 4,"
    ):
        DifNet(Out(8), 5, Maps()).eval()(image)
    with pytest.raises(ValueError, match="got list"):
        DifNet(Maps(), 4, Maps()).eval()(image)
    with pytest.raises(ValueError, match="similarity: expected 2 maps, got 3"):
        DifNet(Out(8), 4, Maps(), similarity_channels=(4, 6)).eval()(image)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * name.endswith("101")) for name in SEED_MODELS],
)
def test_torchvisions_networks_are_seed_branches_that_learn(name):
    config = resolve({"seed_model": name, "max_steps": 2, "batch_size": 2, "walks": "0,2", "lr": 0.01}, None)
    torch.manual_seed(3)
    model = engine.build_model(config, 5)
    assert engine.start_branches(model, config)[0] == {"backbone", "classifier"}
    assert not any("aux" in key for key in model.state_dict())
    fresh = [frozenset(parts) for parts in engine.branch_parts(config)]
    it = Trainer(config, model, fresh, 2, Fabric(accelerator="cpu", devices=1))
    before = {key: value.clone() for key, value in model.named_parameters()}
    assert it.step(torch.randn(2, 3, 33, 33), torch.randint(0, 5, (2, 33, 33))) > 0
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert moved >= {key for key in before if key.startswith(("seed_branch", "importance"))}


@pytest.fixture(scope="module")
def lraspp(tmp_path_factory):
    """The folder of a finished run on LR-ASPP, with one walk on the image and one on layer2."""
    folder = tmp_path_factory.mktemp("runs") / "lraspp"
    flags = {
        "seed_model": "lraspp_mobilenet_v3_large",
        "walks": "0,2",
        "limit_val_batches": 1,
        "max_steps": 1,
    }
    assert train(tiny(folder, **flags)) == 0
    return folder


def test_a_run_on_a_seed_model_is_scored_and_loaded_by_its_file_alone(lraspp, tmp_path, capsys):
    evaluate(lraspp / "best.safetensors", limit_batches=1, out=tmp_path, panel=1, threads=1)
    assert "difnet on lraspp_mobilenet_v3_large and resnet18, step 1" in capsys.readouterr().out
    model, classes, _ = segmentation.load(lraspp / "best.safetensors")
    assert type(model.seed_branch).__name__ == "LRASPP"
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 33, 33)).shape == (1, len(classes), 33, 33)
    _, about = load_weights(lraspp / "best.safetensors")
    assert about.config.seed_model == "lraspp_mobilenet_v3_large"


def test_its_classifier_starts_fresh_for_other_classes(lraspp):
    file = lraspp / "best.safetensors"
    pretrained, about = load_weights(file)
    model = engine.build_model(about.config, 7)
    told = start_from(model, file, (*about.classes, "none"))
    assert told[1] == "importance and seed_branch.classifier start fresh: it has 6 classes, the data 7"
    weights = model.state_dict()
    for name, tensor in pretrained.items():
        if not name.startswith(("seed_branch.classifier", "importance")):
            assert torch.equal(weights[name], tensor), name
    model = engine.build_model(resolve({"walks": "0,2"}, None), 6)
    with pytest.raises(
        UsageError, match=r"\(difnet on lraspp_mobilenet_v3_large and resnet18\): \d+ tensors"
    ):
        start_from(model, file, about.classes)


def test_weights_of_the_whole_network_or_of_its_backbone_are_taken(tmp_path):
    torch.manual_seed(5)
    name, file = "lraspp_mobilenet_v3_large", tmp_path / "weights.pth"
    whole = fcn.seed_model(name, 21)
    torch.save(whole.state_dict() | {"aux_classifier.0.weight": torch.zeros(1)}, file)
    same, other = fcn.seed_model(name, 21), fcn.seed_model(name, 6)
    assert fcn.load_pretrained(same, name, str(file)) == frozenset()
    assert fcn.load_pretrained(other, name, str(file)) == {"classifier"}
    assert torch.equal(
        same.state_dict()["classifier.low_classifier.bias"], whole.classifier.low_classifier.bias
    )
    for model in (same, other):
        for key, value in whole.backbone.state_dict().items():
            assert torch.equal(model.backbone.state_dict()[key], value)
    # Trained on ImageNet, its layers are called features, and it has a classifier of another kind.
    imagenet = torchvision.models.mobilenet_v3_large()
    torch.save(imagenet.state_dict(), file)
    assert fcn.load_pretrained(other, name, str(file)) == {"classifier"}
    assert torch.equal(other.backbone["0"][0].weight, imagenet.features[0][0].weight)
    with pytest.raises(
        UsageError, match=r"does not fit fcn_resnet50: \d+ tensors differ, .* first; name torchv"
    ):
        fcn.load_pretrained(fcn.seed_model("fcn_resnet50", 6), "fcn_resnet50", str(file))


def test_each_branch_starts_from_its_own_file_at_its_own_rate(tmp_path):
    seed, similar = tmp_path / "seed.pth", tmp_path / "similar.pth"
    torch.save(torchvision.models.mobilenet_v3_large().state_dict(), seed)
    torch.save(torchvision.models.resnet18().state_dict(), similar)
    flags = {"seed_model": "lraspp_mobilenet_v3_large", "walks": "0,2", "lr": 0.1, "head_lr_mult": 10.0}
    config = resolve({**flags, "weights_backbone": f"{seed},{similar}"}, None)
    assert config.weight_files == [str(seed), str(similar)]
    assert config.run_dir.name == "shapes-difnet-lraspp_mobilenet_v3_large"
    model = engine.build_model(config, 3)
    fresh = engine.start_branches(model, config)
    assert fresh == [{"classifier"}, frozenset()]
    groups = {group["name"]: group for group in engine.parameter_groups(model, fresh, config)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    pretrained = {names[id(p)] for p in groups["pretrained"]["params"]}
    assert {re.match(r"\w+\.?(backbone)?", name)[0] for name in pretrained} == {
        "seed_branch.backbone", "similarity_branch.",
    }  # fmt: skip
    assert "seed_branch.classifier.low_classifier.weight" in {names[id(p)] for p in groups["fresh"]["params"]}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"seed_model": "unet"}, "seed_model is 'unet', expected one of fcn_resnet50, fcn_resnet101, "),
        (
            {"seed_model": "fcn_resnet50", "model": "sim-deeplab"},
            "alone pass --diffusion none --no-importance",
        ),
        (
            {"seed_model": "fcn_resnet50", "weights_backbone": "hub"},
            "hub: timm has no fcn_resnet50; name a file",
        ),
        ({"seed_model": "fcn_resnet50", "aspp": False}, "--no-aspp has no use with --seed-model"),
    ],
)
def test_seed_models_that_cannot_be_are_refused(flags, message):
    with pytest.raises(UsageError, match=message):
        resolve(flags, None)


def test_one_image_at_a_time_is_too_few_for_what_is_pooled_to_one_pixel():
    flags = {"seed_model": "deeplabv3_resnet50", "batch_size": 4, "grad_accum_steps": 4}
    with pytest.raises(UsageError, match="cannot learn from one image at a time: raise --batch-size"):
        engine.check_device(resolve(flags, None), torch.device("cpu"), 1)
    engine.check_device(resolve({**flags, "seed_model": "fcn_resnet50"}, None), torch.device("cpu"), 1)
