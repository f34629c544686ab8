"""Sizes, shapes and wiring of the networks; weights they start from."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from segmentation.errors import UsageError
from segmentation.models import DifNet, SimDeepLab, difnet
from segmentation.models.backbone import channels, load_pretrained, network, parts
from segmentation.models.heads import Importance

PARAMETERS = {
    ("difnet", "resnet18"): 22_807_628,
    ("difnet", "resnet34"): 43_023_948,
    ("difnet", "resnet50"): 48_816_204,
    ("difnet", "resnet101"): 86_800_460,
    ("sim-deeplab", "resnet18"): 11_563_668,
    ("sim-deeplab", "resnet34"): 21_671_828,
    ("sim-deeplab", "resnet50"): 25_056_404,
    ("sim-deeplab", "resnet101"): 44_048_532,
}


def count(model, backbone, **options):
    with torch.device("meta"):
        network = {"difnet": DifNet, "sim-deeplab": SimDeepLab}[model](backbone, 21, **options)
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(("model", "backbone"), PARAMETERS)
def test_parameter_counts_are_exact(model, backbone):
    assert count(model, backbone) == PARAMETERS[model, backbone]


def test_parameter_counts_are_those_of_the_paper():
    difnet, deeplab = count("difnet", "resnet50"), count("sim-deeplab", "resnet101")
    assert (round(difnet / 1e6, 2), round(deeplab / 1e6, 2)) == (48.82, 44.05)
    assert round(difnet / deeplab, 3) == 1.108


def test_without_aspp_one_convolution_remains():
    kernel = 512 * 21 * 9 + 21
    assert count("difnet", "resnet18") - count("difnet", "resnet18", aspp=False) == 3 * kernel


def test_fewer_walks_need_fewer_layers():
    # Without walks 3 and 4 the similarity branch ends at layer2; with walk 0 alone there is none.
    assert count("difnet", "resnet18", walks=(0, 1, 2)) < count("difnet", "resnet18") - 10e6
    with torch.device("meta"):
        assert DifNet("resnet18", 21, walks=(0,)).similarity_branch is None


@pytest.mark.parametrize("classes", [2, 21, 60])
def test_importance_starts_near_1_and_learns(classes):
    torch.manual_seed(0)
    head = Importance(classes)
    M = head(torch.randn(4, classes, 17, 17))
    assert M.shape == (4, 1, 17, 17)
    assert 0.85 < M.detach().mean() < 0.97
    M.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters())


def test_the_scale_of_the_affinity_reaches_every_walk():
    torch.manual_seed(0)
    image = torch.randn(1, 3, 33, 33)
    plain = DifNet("resnet18", 4).eval()
    scaled = DifNet("resnet18", 4, affinity_scale=0.25).eval()
    scaled.load_state_dict(plain.state_dict())
    for P, Q in zip(plain.transitions(image), scaled.transitions(image), strict=True):
        assert torch.allclose(Q.dense(), torch.softmax(0.25 * P.psi @ P.psi.mT, -1), atol=1e-6)


@pytest.mark.parametrize("walks", [(0, 1, 2, 3, 4), (0, 2, 4), (0,), (4,), (1, 3)])
@pytest.mark.parametrize("grid_stride", [8, 5])
def test_any_walks_and_grid_run_forward_and_backward(walks, grid_stride):
    torch.manual_seed(3)
    model = DifNet("resnet18", 4, walks=walks, grid_stride=grid_stride)
    image = torch.randn(2, 3, 41, 33)
    maps = model(image, return_maps=True)
    grid = (6, 5) if grid_stride == 8 else (9, 7)
    assert maps.score.shape == maps.seed.shape == (2, 4, *grid)
    assert maps.importance.shape == (2, 1, *grid)
    assert [walk.shape for walk in maps.walks] == len(walks) * [(2, 4, *grid)]
    assert maps.logits.shape == (2, 4, 41, 33)
    torch.testing.assert_close(maps.seed, maps.importance * maps.score)
    assert ((maps.importance > 0) & (maps.importance < 1)).all()
    maps.logits.square().mean().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []


def test_forward_is_the_last_walk_upsampled_with_aligned_corners():
    torch.manual_seed(3)
    model = DifNet("resnet18", 4).eval()
    image = torch.randn(1, 3, 41, 33)
    with torch.no_grad():
        maps = model(image, return_maps=True)
        torch.testing.assert_close(model(image), maps.logits)
    # At sizes 8k+1 grid point (i, j) lies on pixel (8i, 8j).
    torch.testing.assert_close(maps.logits[..., ::8, ::8], maps.walks[-1])


def test_the_walks_follow_equation_5():
    torch.manual_seed(3)
    model = DifNet("resnet18", 4, walks=(0, 3)).eval()
    image = torch.randn(1, 3, 41, 33)
    with torch.no_grad():
        maps = model(image, return_maps=True)
        s = maps.seed.flatten(2).mT
        y = s
        for P, mu, beta, walk in zip(
            model.transitions(image), model.cascade.mu, model.cascade.beta, maps.walks, strict=True
        ):
            y = beta * (mu * (P.dense() @ y) + (1 - mu) * s) + (1 - beta) * y
            torch.testing.assert_close(walk.flatten(2).mT, y, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("recorded", [False, True])
def test_the_network_compiles_as_one_graph(recorded):
    model, image = DifNet("resnet18", 5).eval(), torch.randn(1, 3, 33, 49)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.set_grad_enabled(recorded):
        torch.testing.assert_close(compiled(image), model(image), rtol=1e-4, atol=1e-4)


# --- Branches side by side

VARIANTS = {"cascade": {}, "shared": {"transitions": "last"}, "exact": {"diffusion": "exact"}}


def beside(options, device):
    """DifNet with its similarity branch elsewhere."""
    return DifNet("resnet18", 5, **options).beside(device)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_similarity_branch_and_its_embeddings_move_and_nothing_else(variant):
    model = beside(VARIANTS[variant], "meta")
    moved = {name.rpartition(".")[0] for name, x in model.named_parameters() if x.device.type == "meta"}
    elsewhere = ("similarity_branch", "cascade.embeddings", "shared")
    stayed = {name.rpartition(".")[0] for name, _ in model.named_parameters()} - moved
    assert moved
    assert all(name.startswith(elsewhere) for name in moved)
    assert not any(name.startswith(elsewhere) for name in stayed)
    assert DifNet("resnet18", 5, diffusion="none").beside("meta").seed_branch is not None


@pytest.mark.parametrize("variant", ["cascade", "shared"])
def test_what_two_devices_compute_meets_on_the_first(variant):
    """On devices that are not there, whose tensors have all but values."""
    with FakeTensorMode():
        with torch.device("cuda:1"):
            second = DifNet("resnet18", 5, **VARIANTS[variant])
        with torch.device("cuda:0"):
            model = DifNet("resnet18", 5, **VARIANTS[variant])
            image = torch.randn(2, 3, 33, 49)
        # Fake parameters are not moved in place.
        model.similarity_branch, model.shared = second.similarity_branch, second.shared
        model.cascade.embeddings = second.cascade.embeddings
        maps = model(image, return_maps=True)
        assert {P.device for P in model.transitions(image)} == {image.device}
    assert maps.logits.shape == (2, 5, 33, 49)
    assert {x.device for x in (maps.score, maps.logits, *maps.walks)} == {image.device}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_streams_side_by_side_change_nothing():
    torch.manual_seed(0)
    model = DifNet("resnet18", 5).cuda()
    image = torch.randn(4, 3, 129, 129, device="cuda")

    def step():
        model.zero_grad()
        logits = model(image)
        logits.square().mean().backward()
        return [logits, *(p.grad.clone() for p in model.parameters())]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(difnet, "_stream_beside", lambda image: None)
        one_after_the_other = step()
    for _ in range(5):
        for a, b in zip(step(), one_after_the_other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("walks", [(), (0, 5), (2, 1), (1, 1)])
def test_walks_that_do_not_exist_are_refused(walks):
    with pytest.raises(ValueError, match="expected walks to be distinct numbers"):
        DifNet("resnet18", 4, walks=walks)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize(("side", "cells"), [(321, 41), (505, 64), (97, 13), (100, 13)])
def test_backbones_have_stride_8(name, side, cells):
    with torch.device("meta"):
        layers = network(name, (1, 2, 3, 4))(torch.empty(1, 3, side, side))
    assert [layer.shape[-1] for layer in layers[1:]] == 3 * [cells]


def saved(tmp_path, name, keep=lambda key: True, suffix=".pth"):
    torch.manual_seed(5)
    state = {key: value for key, value in network(name, (1, 2, 3, 4)).state_dict().items() if keep(key)}
    file = tmp_path / f"{name}{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    return file, state


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_are_loaded_into_every_branch(tmp_path, suffix):
    file, state = saved(tmp_path, "resnet18", suffix=suffix)
    model = DifNet("resnet18", 3, walks=(0, 2))
    assert [load_pretrained(each, "resnet18", str(file)) for each in model.backbones] == 2 * [frozenset()]
    torch.testing.assert_close(
        model.seed_branch.state_dict()["layer4.1.bn2.weight"], state["layer4.1.bn2.weight"]
    )
    torch.testing.assert_close(
        model.similarity_branch.state_dict()["layer2.0.conv1.weight"], state["layer2.0.conv1.weight"]
    )


def test_a_classifier_in_the_file_is_ignored(tmp_path):
    file, state = saved(tmp_path, "resnet18")
    torch.save(state | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}, file)
    assert load_pretrained(network("resnet18", (4,)), "resnet18", str(file)) == frozenset()


def test_parts_the_file_lacks_start_fresh(tmp_path):
    file, _ = saved(tmp_path, "resnet18", keep=lambda key: not key.startswith("layer4"))
    assert load_pretrained(network("resnet18", (4,)), "resnet18", str(file)) == {"layer4"}
    assert load_pretrained(network("resnet18", (4,)), "resnet18", "none") == set(parts("resnet18"))


def test_the_real_file_covers_all_but_layer4(real_data):
    file = real_data / "weights" / "resnet18_imagenet_to_layer3.pth"
    backbone = network("resnet18", (4,))
    before = backbone.state_dict()["layer4.0.conv1.weight"].clone()
    assert load_pretrained(backbone, "resnet18", str(file)) == {"layer4"}
    after = backbone.state_dict()
    assert torch.equal(after["layer4.0.conv1.weight"], before)
    assert after["layer3.1.conv2.weight"].dtype == torch.float32
    with pytest.raises(UsageError, match=r"does not fit resnet50.*it looks like resnet18"):
        load_pretrained(network("resnet18", (4,)), "resnet50", str(file))


@pytest.mark.parametrize(
    ("has", "wants"),
    [
        ("resnet18", "resnet34"),
        ("resnet34", "resnet18"),
        ("resnet18", "resnet50"),
        ("resnet50", "resnet101"),
        ("resnet101", "resnet50"),
        ("resnet50", "resnet18"),
    ],
)
def test_another_depth_is_refused(tmp_path, has, wants):
    file, _ = saved(tmp_path, has)
    with pytest.raises(
        UsageError, match=f"does not fit {wants}: .*it looks like {has}: pass that as --backbone"
    ):
        load_pretrained(network("resnet18", (4,)), wants, str(file))


def test_files_without_resnet_weights_are_refused(tmp_path):
    file = tmp_path / "weights.pth"
    with pytest.raises(UsageError, match="no such file; name a file of ImageNet weights"):
        load_pretrained(network("resnet18", (4,)), "resnet18", str(file))
    torch.save({"module.conv1.weight": torch.zeros(1)}, file)
    with pytest.raises(
        UsageError,
        match=r"holds no weights of resnet18: expected names such as .*, found module\.conv1\.weight",
    ):
        load_pretrained(network("resnet18", (4,)), "resnet18", str(file))
    torch.save({"state_dict": {"conv1.weight": torch.zeros(1)}}, file)
    with pytest.raises(UsageError, match="is no plain state dict of names and tensors"):
        load_pretrained(network("resnet18", (4,)), "resnet18", str(file))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UsageError, match="cannot be read as a state dict of tensors"):
        load_pretrained(network("resnet18", (4,)), "resnet18", str(file))


@pytest.mark.parametrize("name", ["convnext_atto", "regnety_002", "efficientnet_b0", "resnext50_32x4d"])
def test_other_backbones_serve_either_branch(name):
    torch.manual_seed(3)
    image = torch.randn(1, 3, 41, 33)
    for options in ({"seed": name}, {"seed": "resnet18", "similarity": name}):
        model = DifNet(num_classes=4, **options).eval()
        maps = model(image, return_maps=True)
        assert maps.seed.shape == (1, 4, 6, 5)
        assert [embedding.conv.in_channels for embedding in model.cascade.embeddings] == [3, *channels(name)]
        maps.logits.sum().backward()
        assert [n for n, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "resnet19",
            r"backbone 'resnet19': timm has no such model \(did you mean resnet\d+\?\); pass resnet18",
        ),
        (
            "swin_tiny_patch4_window7_224",
            "has strides 4, 8, 16, 32, and cannot be given output stride 8: pass",
        ),
        ("vgg16", "vgg16 has strides 1, 2, 4, 8, 16, 32, and cannot be given output stride 8: pass"),
        ("vit_tiny_patch16_224", "has strides 16, 16, 16, and cannot be given output stride 8: pass"),
    ],
)
def test_backbones_without_stride_8_are_refused(name, message):
    with pytest.raises(UsageError, match=message):
        SimDeepLab(name, 4)


def test_weights_under_timms_names_are_found(tmp_path):
    # Networks of features join the first names of the whole model.
    state = timm.create_model("convnext_atto").state_dict()
    file = tmp_path / "convnext.safetensors"
    save_file(state, file)
    backbone = network("convnext_atto", (2, 4))
    assert load_pretrained(backbone, "convnext_atto", str(file)) == frozenset()
    loaded = backbone.state_dict()
    assert torch.equal(loaded["stages_1.blocks.0.mlp.fc1.weight"], state["stages.1.blocks.0.mlp.fc1.weight"])
    save_file({key: value for key, value in state.items() if not key.startswith("stages.3")}, file)
    assert load_pretrained(backbone, "convnext_atto", str(file)) == {"stages_3"}
    with pytest.raises(
        UsageError, match=r"does not fit convnext_femto: .* in the file and .* in the network"
    ):
        load_pretrained(backbone, "convnext_femto", str(file))
