"""Files of a run: whole or refused."""

import json

import pytest
import safetensors.torch
import torch

from segmentation import checkpoint, engine
from segmentation.checkpoint import Description
from segmentation.config import resolve
from segmentation.errors import UsageError

CLASSES = ("ground", "disc", "ring")


@pytest.fixture(scope="module")
def config():
    return resolve({"model": "sim-deeplab"}, None)


@pytest.fixture
def weights(tmp_path, config):
    torch.manual_seed(2)
    model = engine.build_model(config, 3)
    file = tmp_path / "best.safetensors"
    checkpoint.save_weights(file, model, Description(config, CLASSES, 70, 0.25))
    return file, model


def test_weights_come_back_with_what_they_are_of(weights, config):
    file, model = weights
    state, description = checkpoint.load_weights(file)
    assert description == Description(config, CLASSES, 70, 0.25)
    other = engine.build_model(description.config, len(description.classes))
    checkpoint.load_into(other, state, file)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_another_architecture_is_refused(weights, config):
    file, _ = weights
    state, _ = checkpoint.load_weights(file)
    model = engine.build_model(resolve({"model": "difnet"}, None), 3)
    with pytest.raises(UsageError, match=r"is a checkpoint of another architecture: \d+ tensors differ"):
        checkpoint.load_into(model, state, file)
    with pytest.raises(
        UsageError, match=r"another architecture: 8 tensors differ, score\.convs\.0\.bias first"
    ):
        checkpoint.load_into(engine.build_model(config, 4), state, file)


@pytest.mark.parametrize("kept", [0, 5, 200, 100_000])
def test_weights_cut_short_are_refused(weights, kept):
    file, _ = weights
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UsageError, match=r"cannot be read as safetensors .*: it is corrupt or cut short"):
        checkpoint.load_weights(file)


def test_files_that_are_no_weights_of_ours_are_refused(tmp_path):
    file = tmp_path / "last.ckpt"
    with pytest.raises(UsageError, match=r"--checkpoint .*: no such file; name a best\.safetensors"):
        checkpoint.load_weights(file)
    checkpoint.save_state(file, {})
    with pytest.raises(UsageError, match=r"it is for resuming; name the last\.safetensors beside it"):
        checkpoint.load_weights(file)
    file = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(UsageError, match="no description of format"):
        checkpoint.load_weights(file)
    metadata = {"format": checkpoint.FORMAT, "classes": "[]", "step": "1", "miou": "0"}
    safetensors.torch.save_file({"a": torch.zeros(1)}, file, metadata | {"config": json.dumps({"depth": 3})})
    with pytest.raises(UsageError, match=r"the config inside .*: unknown option 'depth'"):
        checkpoint.load_weights(file)
    safetensors.torch.save_file({"a": torch.zeros(1)}, file, metadata | {"config": json.dumps({"lr": 3})})
    with pytest.raises(UsageError, match="lacks backbone, weights_backbone, batch_size"):
        checkpoint.load_weights(file)


def test_states_hold_plain_values_only(tmp_path):
    file = tmp_path / "last.ckpt"
    state = {"config": {"lr": 0.1, "walks": [0, 1]}, "at": {"step": 3}, "model": {"w": torch.arange(3.0)}}
    checkpoint.save_state(file, state)
    loaded = torch.load(file, weights_only=True)
    assert loaded["config"] == state["config"]
    assert torch.equal(checkpoint.load_state(file)["model"]["w"], state["model"]["w"])


class Harmful:
    def __reduce__(self):
        return print, ("ran",)


def test_states_that_cannot_be_trusted_are_refused(tmp_path, capsys):
    file = tmp_path / "last.ckpt"
    with pytest.raises(
        UsageError, match=r"--resume .*: no such file; name the last\.ckpt of a run, or 'auto'"
    ):
        checkpoint.load_state(file)
    checkpoint.save_state(file, {"w": torch.zeros(1000)})
    whole = file.read_bytes()
    for kept in (0, 10, len(whole) // 2, len(whole) - 10):
        file.write_bytes(whole[:kept])
        with pytest.raises(UsageError, match="is corrupt, cut short or of another kind") as caught:
            checkpoint.load_state(file)
        assert "\n" not in str(caught.value)
    torch.save({"format": checkpoint.FORMAT, "object": Harmful()}, file)
    with pytest.raises(UsageError, match="is corrupt, cut short or of another kind"):
        checkpoint.load_state(file)
    assert capsys.readouterr().out == ""
    torch.save({"w": torch.zeros(1)}, file)
    with pytest.raises(UsageError, match="is no state of format"):
        checkpoint.load_state(file)


def test_a_write_that_fails_leaves_the_last_file_whole(tmp_path):
    file = tmp_path / "last.ckpt"
    checkpoint.save_state(file, {"step": 1})
    with pytest.raises(Exception, match=r"[Pp]ickle"):
        checkpoint.save_state(file, {"step": 2, "function": lambda: None})
    assert checkpoint.load_state(file)["step"] == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"backbone": "resnet50"},
            r"was made with backbone resnet18, now it is resnet50: pass --config .*config\.yaml",
        ),
        ({"lr": 0.5}, "was made with lr .*, now it is 0.5"),
        ({"max_steps": 9}, "was made with max_steps .*, now it is 9"),
    ],
)
def test_another_run_is_not_resumed(tmp_path, config, flags, message):
    state = {"config": config.as_dict(), "classes": list(CLASSES)}
    now = resolve({"model": "sim-deeplab", **flags}, None)
    with pytest.raises(UsageError, match=message):
        checkpoint.check_same_run(state, now, CLASSES, tmp_path / "last.ckpt")


def test_other_classes_are_not_resumed_but_other_workers_are(tmp_path, config):
    state = {"config": config.as_dict(), "classes": list(CLASSES)}
    now = resolve({"model": "sim-deeplab", "workers": 2, "log_every": 3, "output_dir": "elsewhere"}, None)
    checkpoint.check_same_run(state, now, CLASSES, tmp_path / "last.ckpt")
    with pytest.raises(
        UsageError, match=r"was trained on the classes ground, disc, ring; the data has cat, dog: give"
    ):
        checkpoint.check_same_run(state, config, ("cat", "dog"), tmp_path / "last.ckpt")
