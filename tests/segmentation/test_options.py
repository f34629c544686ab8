"""What each option of training does, and what a device or a number of processes cannot do."""

import copy
import hashlib
import json

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from segmentation import engine
from segmentation.checkpoint import load_weights, start_from
from segmentation.config import resolve
from segmentation.data.loader import StepSampler
from segmentation.errors import UsageError
from segmentation.models.backbone import network, parts
from segmentation.train import train
from segmentation.trainer import Trainer
from tests.segmentation.conftest import tiny

PRETRAINED = frozenset()


@pytest.fixture(autouse=True)
def algorithms_as_before():
    yield
    torch.use_deterministic_algorithms(False)


def trainer(fresh=PRETRAINED, **flags) -> Trainer:
    """A model of four classes about to learn, always from the same weights."""
    config = resolve({"max_steps": 5, "batch_size": 4, **flags}, None)
    torch.manual_seed(1)
    model = engine.build_model(config, 4)
    precision = {"32": "32-true", "bf16": "bf16-mixed"}[config.precision]
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    return Trainer(config, model, len(model.backbones) * [fresh], 5, fabric)


def batch(images=4):
    generator = torch.Generator().manual_seed(2)
    label = torch.randint(0, 4, (images, 33, 33), generator=generator)
    label[0, :20] = 255
    return torch.randn(images, 3, 33, 33, generator=generator), label


def test_a_batch_in_pieces_is_the_batch_whole():
    # The first image is mostly void: means over the pieces would not be the mean over the batch.
    flags = {"model": "sim-deeplab", "bn": "frozen"}
    whole, pieces = trainer(**flags), trainer(**flags, grad_accum_steps=4)
    assert whole.step(*batch()) == pytest.approx(pieces.step(*batch()), rel=1e-5)
    for (name, one), other in zip(
        whole.model.state_dict().items(), pieces.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=name)
    # One Nth of a batch alone leads elsewhere.
    assert abs(trainer(**flags).step(*batch(2)) - whole.step(*batch())) > 1e-4


def test_frozen_batch_norm_stays_as_it_was_where_it_was_pretrained():
    it = trainer(fresh=frozenset({"layer4"}), bn="frozen")
    before = copy.deepcopy(it.model.state_dict())
    it.model.eval().train()  # what scoring does
    for _ in range(2):
        it.step(*batch())
    moved = {name for name, tensor in it.model.state_dict().items() if not torch.equal(tensor, before[name])}
    norms = {name for name, module in it.model.named_modules() if isinstance(module, _BatchNorm)}
    kept = {name for name in norms if "_branch." in name and "layer4" not in name}
    for name in norms:
        of_norm = {f"{name}.{part}" for part in ("weight", "bias", "running_mean", "running_var")}
        assert bool(of_norm & moved) == (name not in kept), name
    assert "seed_branch.layer1.0.conv1.weight" in moved


def test_half_precision_is_for_convolutions_and_not_for_walks():
    it = trainer(precision="bf16", model="difnet")
    seen = {}
    it.model.seed_branch.conv1.register_forward_hook(lambda *a: seen.update(conv=a[2].dtype))
    for number, embedding in enumerate(it.model.cascade.embeddings):
        embedding.register_forward_hook(lambda _m, _i, P, n=number: seen.update({n: P.psi.dtype}))
    loss = it.step(*batch())
    assert seen == {"conv": torch.bfloat16, **dict.fromkeys(range(5), torch.float32)}
    assert loss == pytest.approx(trainer(model="difnet").step(*batch()), rel=0.02)
    assert {p.dtype for p in it.model.parameters()} == {torch.float32}


def test_the_average_is_what_is_scored_and_saved(tmp_path):
    it = trainer(model="sim-deeplab", ema_decay=0.75)
    weight = it.model.score.convs[0].weight
    it.step(*batch())
    average = weight.detach().clone()
    for _ in range(2):
        it.step(*batch())
        average = 0.75 * average + 0.25 * weight.detach()
    torch.testing.assert_close(it.scored.score.convs[0].weight, average)
    assert not torch.allclose(weight, average)

    run = tmp_path / "run"
    assert train(tiny(run, model="sim-deeplab", aspp=False, max_steps=2, ema_decay=0.9)) == 0
    state = torch.load(run / "last.ckpt", weights_only=True)
    for name in ("best.safetensors", "last.safetensors"):
        saved, _ = load_weights(run / name)
        for key, tensor in saved.items():
            assert torch.equal(tensor, state["average"][f"module.{key}"])
    assert not torch.equal(saved["backbone.conv1.weight"], state["model"]["backbone.conv1.weight"])


def test_the_state_of_a_trainer_brings_back_all_that_a_step_changes():
    it, other = (trainer(model="sim-deeplab", ema_decay=0.5) for _ in range(2))
    it.step(*batch())
    state = copy.deepcopy(it.state())
    drawn = torch.rand(3)
    losses = [it.step(*batch()) for _ in range(2)]
    other.restore(state)
    assert torch.equal(torch.rand(3), drawn)
    assert [other.step(*batch()) for _ in range(2)] == losses
    assert other.lr == it.lr
    for name, tensor in it.scored.state_dict().items():
        assert torch.equal(other.scored.state_dict()[name], tensor)


def test_a_loss_that_is_not_finite_changes_no_weight():
    it = trainer(model="sim-deeplab", ema_decay=0.5)
    before = copy.deepcopy(it.scored.score.state_dict())
    image, label = batch()
    assert it.step(image * float("inf"), label) != it.step(image * float("inf"), label)
    for name, tensor in it.scored.score.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_memory_layout_and_deterministic_algorithms_change_no_loss(tmp_path):
    loss = trainer(model="sim-deeplab").step(*batch())
    it = trainer(model="sim-deeplab", channels_last=True)
    assert it.step(*batch()) == pytest.approx(loss, rel=1e-4)
    weight = it.model.backbone.layer1[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    logits, label = torch.randn(2, 4, 5, 5), batch(2)[1][:, 18:23, :5]
    loss = engine.summed_loss(logits, label)
    config = tiny(tmp_path / "run", deterministic=True, max_steps=1, limit_val_batches=1)
    assert train(config) == 0
    assert torch.are_deterministic_algorithms_enabled()
    torch.testing.assert_close(engine.summed_loss(logits, label), loss)


@pytest.mark.slow
def test_a_compiled_network_learns_the_same():
    loss = trainer().step(*batch())
    assert trainer(compile=True).step(*batch()) == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "device", "count", "message"),
    [
        ({"precision": "16"}, "cpu", 1, "--precision 16 needs a GPU: on a CPU pass --precision bf16, or 32"),
        ({"bn": "sync"}, "cpu", 2, "--bn sync needs GPUs: on a CPU pass --bn train, or frozen"),
        ({"bn": "sync"}, "cuda", 1, "--bn sync needs several processes: start them by torchrun"),
        ({"batch_size": 5}, "cpu", 2, "--batch-size 5 is for all 2 processes together.*multiple of 2"),
        (
            {"batch_size": 6, "grad_accum_steps": 2},
            "cpu",
            2,
            "each of which takes 2 equal pieces: give a multiple of 4",
        ),
        ({"deterministic": True}, "cuda", 1, "walks 0 and 1 pool adaptively, .*; pass --walks 2,3,4"),
    ],
)
def test_what_cannot_be_done_is_refused(flags, device, count, message):
    with pytest.raises(UsageError, match=message) as caught:
        engine.check_device(resolve(flags, None), torch.device(device), count)
    assert "\n" not in str(caught.value)


def test_refusals_come_before_any_file(tmp_path):
    for flags, message in (
        ({"precision": "16"}, "--precision 16 needs a GPU"),
        (
            {"bn": "frozen"},
            "--bn frozen keeps the statistics of pretrained weights, and the backbone has none",
        ),
        ({"init_from": "nowhere.safetensors"}, r"--init-from nowhere\.safetensors: no such file"),
    ):
        with pytest.raises(UsageError, match=message):
            train(tiny(tmp_path / "run", **flags))
    assert not (tmp_path / "run").exists()


def test_few_images_for_batch_norm_are_told(tmp_path, capsys):
    file = tmp_path / "imagenet.pth"
    torch.save(network("resnet18", (1, 2, 3, 4)).state_dict(), file)
    flags = {"model": "sim-deeplab", "aspp": False, "max_steps": 1, "weights_backbone": str(file)}
    assert train(tiny(tmp_path / "one", **flags)) == 0
    assert "warning: batch norm sees 2 images at a time" in capsys.readouterr().out
    assert train(tiny(tmp_path / "two", **flags, bn="frozen")) == 0
    assert "batch norm" not in capsys.readouterr().out


def test_epochs_end_after_so_many_batches():
    keys = list(StepSampler(images=10, batch_size=2, seed=0, first_step=0, last_step=5, steps_per_epoch=2))
    assert [epoch for ((epoch, _), _) in keys] == [0, 0, 1, 1, 2]
    config = resolve({"limit_train_batches": 3, "batch_size": 2}, None)
    assert [engine.steps_per_epoch(config, images) for images in (100, 5)] == [3, 2]


def test_processes_share_each_batch_and_no_image_twice():
    def keys(rank, ranks):
        return list(StepSampler(10, 4, 0, 0, 3, None, rank, ranks))

    for whole, first, second in zip(keys(0, 1), keys(0, 2), keys(1, 2), strict=True):
        assert len(first) == len(second) == 2
        assert sorted(first + second) == sorted(whole)


def test_modern_and_paper_are_recipes_of_all_data_but_shapes():
    own = {"dataset": "voc", "data_path": "x", "weights_backbone": "none"}
    paper, modern = resolve(own, None), resolve({**own, "recipe": "modern"}, None)
    assert (paper.recipe, paper.scale, paper.ema_decay) == ("paper", (0.5, 1.5), 0)
    assert (modern.recipe, modern.scale, modern.ema_decay) == ("modern", (0.5, 2.0), 0.999)
    with pytest.raises(UsageError, match="--recipe modern has no use with --dataset shapes"):
        resolve({"recipe": "modern"}, None)


def test_another_recipe_than_that_of_the_file_is_refused(tmp_path):
    own = {"dataset": "voc", "data_path": "x", "weights_backbone": "none"}
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(resolve(own, None).as_dict()))
    assert resolve({}, file).recipe == resolve({"recipe": "paper"}, file).recipe == "paper"
    with pytest.raises(UsageError, match="--recipe modern: the file of --config says paper"):
        resolve({"recipe": "modern"}, file)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"batch_size": 4, "grad_accum_steps": 3}, "--batch-size 4 cannot be cut into --grad-accum-steps 3"),
        ({"ema_decay": 1.0}, "--ema-decay 1 would never leave the first weights"),
        ({"init_from": "a", "weights_backbone": "b"}, "--init-from a and --weights-backbone b both give"),
        ({"similarity_backbone": "resnet34", "model": "sim-deeplab"}, "sim-deeplab has one branch"),
        ({"affinity_scale": 0.0}, "--affinity-scale 0.0 would make all pixels alike: give a factor > 0"),
        ({"affinity_scale": 0.5, "model": "sim-deeplab"}, "--affinity-scale belongs to --model difnet"),
    ],
)
def test_values_that_do_not_go_together_are_refused(flags, message):
    with pytest.raises(UsageError, match=message):
        resolve(flags, None)


def test_precision_may_be_a_number_in_a_file(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("precision: 32\n")
    assert resolve({}, file).precision == "32"
    file.write_text("precision: 64\n")
    with pytest.raises(UsageError, match="expected one of 32, bf16, 16"):
        resolve({}, file)


def test_a_run_starts_from_the_weights_of_another(unbroken, tmp_path, capsys):
    file, run = unbroken / "best.safetensors", tmp_path / "run"
    pretrained, _ = load_weights(file)
    assert train(tiny(run, init_from=str(file), lr=0.0, max_steps=1)) == 0
    weights, about = load_weights(run / "last.safetensors")
    for name, tensor in weights.items():
        if "running" not in name and "tracked" not in name:
            assert torch.equal(tensor, pretrained[name])
    assert about.weights_sha256 == {str(file): hashlib.sha256(file.read_bytes()).hexdigest()}
    assert json.loads((run / "env.json").read_text())["weights_sha256"] == about.weights_sha256
    told = capsys.readouterr().out
    assert f"the backbone starts from {file}" in told
    assert "start fresh" not in told


def test_classifiers_of_another_size_start_fresh_and_are_told(unbroken):
    file = unbroken / "best.safetensors"
    pretrained, about = load_weights(file)
    model = engine.build_model(about.config, 7)
    told = start_from(model, file, (*about.classes, "none"))
    assert told[1] == "importance and score start fresh: it has 6 classes, the data 7"
    weights = model.state_dict()
    for name, tensor in pretrained.items():
        if not name.startswith(("score", "importance")):
            assert torch.equal(weights[name], tensor), name
    model = engine.build_model(about.config, 6)
    assert "its classes have other names" in start_from(model, file, tuple("abcdef"))[1]
    assert torch.equal(model.state_dict()["score.convs.0.weight"], pretrained["score.convs.0.weight"])
    model = engine.build_model(resolve({"walks": "0,2"}, None), 6)
    with pytest.raises(UsageError, match=r"is of another architecture \(difnet on resnet18\): \d+ tensors"):
        start_from(model, file, about.classes)


def test_parts_of_the_second_backbone_have_their_own_rates():
    config = resolve({"similarity_backbone": "convnext_atto", "lr": 0.1, "head_lr_mult": 10.0}, None)
    model = engine.build_model(config, 3)
    fresh = [frozenset(), frozenset(parts("convnext_atto"))]
    groups = {group["name"]: group for group in engine.parameter_groups(model, fresh, config)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    members = {key: {names[id(p)] for p in group["params"]} for key, group in groups.items()}
    assert {name.split(".")[0] for name in members["pretrained"]} == {"seed_branch"}
    assert any(name.startswith("similarity_branch") for name in members["fresh"])
    layer_norms = {n for n, m in model.similarity_branch.named_modules() if isinstance(m, nn.LayerNorm)}
    assert {f"similarity_branch.{name}.weight" for name in layer_norms} <= members["fresh, norm"]
