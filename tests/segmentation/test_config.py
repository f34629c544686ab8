"""Where options come from, and what is refused before any work."""

import dataclasses
import sys
from pathlib import Path

import pytest
import yaml
from torch._utils import ExceptionWrapper

from segmentation import train
from segmentation.config import RECIPES, Config, resolve
from segmentation.errors import UsageError, told_in_one_line

ROOT = Path(__file__).parents[2]


def written(tmp_path, **values):
    file = tmp_path / "options.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def test_flags_come_before_the_file_and_the_file_before_the_recipe(tmp_path):
    recipe = yaml.safe_load((ROOT / "configs" / "shapes.yaml").read_text())
    assert resolve({}, None).lr == recipe["lr"]
    file = written(tmp_path, lr=0.5, batch_size=3, walks=[0, 4])
    config = resolve({"batch_size": 5, "seed": None}, file)
    assert (config.lr, config.batch_size, config.walks) == (0.5, 5, (0, 4))
    assert (config.momentum, config.seed) == (recipe["momentum"], 0)


def test_each_data_set_has_its_recipe():
    shapes = resolve({}, None)
    paper = resolve({"dataset": "voc", "data_path": "x", "weights_backbone": "none"}, None)
    assert (shapes.dataset, shapes.backbone, shapes.run_dir) == (
        "shapes",
        "resnet18",
        Path("runs/shapes-difnet-resnet18"),
    )
    assert (paper.lr, paper.head_lr_mult, paper.power, paper.momentum, paper.weight_decay) == (
        2.5e-4,
        10,
        0.9,
        0.9,
        5e-4,
    )
    assert (paper.batch_size, paper.epochs, paper.crop_size, paper.scale) == (16, 200, 321, (0.5, 1.5))


def test_recipes_say_everything_that_has_no_default():
    required = {field.name for field in dataclasses.fields(Config) if field.default is dataclasses.MISSING}
    for dataset, name in [*RECIPES.items(), ("voc", "modern")]:
        recipe = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
        assert required - set(recipe) == ({"weights_backbone"} if dataset != "shapes" else set())


def test_a_saved_config_is_taken_back(tmp_path):
    config = resolve({"walks": "0,2,4", "scale": (0.7, 1.0), "limit_val_batches": 3}, None)
    assert resolve({}, written(tmp_path, **config.as_dict())) == config
    assert Config.from_dict(config.as_dict(), "here") == config


def test_the_length_of_a_run_comes_from_one_place(tmp_path):
    assert resolve({"epochs": 3}, None).max_steps is None
    config = resolve({"max_steps": 7}, written(tmp_path, epochs=3))
    assert (config.epochs, config.max_steps) == (None, 7)
    with pytest.raises(UsageError, match="--epochs and --max-steps both give the length of the run"):
        resolve({"epochs": 3, "max_steps": 7}, None)


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("lr: 1e-3\nweight_decay: 0\n")
    config = resolve({}, file)
    assert (config.lr, config.weight_decay) == (1e-3, 0.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batchsize": 4}, r"options\.yaml: unknown option 'batchsize'; the nearest one is 'batch_size'"),
        ({"learning-rate": 4}, "unknown option 'learning-rate'; the nearest one is "),
        (
            {"batch_size": "many"},
            r"options\.yaml: batch_size is 'many', expected a whole number of at least 1",
        ),
        ({"batch_size": 0}, "batch_size is 0, expected a whole number of at least 1"),
        ({"batch_size": True}, "batch_size is True, expected a whole number"),
        ({"momentum": 1.5}, "momentum is 1.5, expected a number of at least 0 and at most 1"),
        ({"lr": float("nan")}, "lr is nan, expected a number of at least 0"),
        ({"aspp": "yes please"}, "aspp is 'yes please', expected true or false"),
        ({"model": "unet"}, "model is 'unet', expected one of difnet, sim-deeplab"),
        ({"scale": [1.0]}, "scale is .*, expected two numbers"),
        ({"scale": [1.5, 0.5]}, "--scale 1.5 0.5: expected two factors, 0 < low <= high"),
        ({"walks": "0;2"}, "walks is '0;2', expected whole numbers such as 0,2,4"),
        ({"walks": [2, 0]}, "--walks 2,0: expected distinct numbers from 0 to 4 in rising order"),
        ({"dataset": "voc"}, "--weights-backbone is not given: name a file .*, 'hub' .*, or 'none'"),
        ({"dataset": "voc", "weights_backbone": "none"}, "--dataset voc needs --data-path"),
        ({"data_path": "x"}, "--data-path has no use with --dataset shapes"),
    ],
)
def test_faults_are_told_in_one_line_with_the_fix(tmp_path, values, message):
    with pytest.raises(UsageError, match=message) as caught:
        resolve({}, written(tmp_path, **values))
    assert "\n" not in str(caught.value)


def test_flags_the_model_has_no_use_for_are_refused(tmp_path):
    with pytest.raises(UsageError, match="--walks belongs to --model difnet: sim-deeplab has no walks"):
        resolve({"model": "sim-deeplab", "walks": "0"}, None)
    # A saved config names every option, with use or without.
    config = resolve({"model": "sim-deeplab"}, None)
    assert resolve({"seed": 0}, written(tmp_path, **config.as_dict())) == config


def test_files_that_are_no_options_are_refused(tmp_path):
    file = tmp_path / "options.yaml"
    with pytest.raises(UsageError, match="no such file"):
        resolve({}, file)
    file.write_text("just text")
    with pytest.raises(UsageError, match="expected lines of the form `key: value`"):
        resolve({}, file)
    file.write_text("a: [1,\nb: 2")
    with pytest.raises(UsageError, match="is not YAML") as caught:
        resolve({}, file)
    assert "\n" not in str(caught.value)


def run_main(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["segmentation.train", *arguments])
    with pytest.raises(SystemExit) as ended:
        train.run_command_line()
    return ended.value.code, capsys.readouterr()


def test_help_lists_every_option_with_its_default(monkeypatch, capsys):
    code, told = run_main(monkeypatch, capsys, "--help")
    text = " ".join(told.out.split())
    assert code == 0
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')} " in text
    for default in (
        "[default: shapes]",
        "[default: 0.9]",
        "[default: 0,1,2,3,4]",
        "200 for paper",
        "513 for modern",
        "0.999 for modern",
    ):
        assert default in text
    for option in ("--no-aspp", "--config", "--resume", "--overwrite"):
        assert option in text


def test_faults_end_the_program_with_one_line_and_code_2(monkeypatch, capsys):
    code, told = run_main(
        monkeypatch, capsys, "--dataset", "voc", "--data-path", "nowhere", "--weights-backbone", "none"
    )
    assert code == 2
    assert told.err == "error: --data-path nowhere: no such folder; name the one that holds JPEGImages\n"
    assert told.out == ""


def test_faults_of_a_loaders_worker_are_told_in_one_line_too(capsys):
    try:
        raise UsageError("x.png is damaged: replace the file")
    except UsageError:
        from_worker = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(SystemExit), told_in_one_line():
        from_worker.reraise()
    assert capsys.readouterr().err == "error: x.png is damaged: replace the file\n"
