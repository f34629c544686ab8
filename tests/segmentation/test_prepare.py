"""`python -m segmentation.prepare`, and a short training on what it made."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from segmentation import prepare
from segmentation.config import resolve
from segmentation.errors import UsageError
from segmentation.train import train
from tests.segmentation.test_coco import root as coco  # noqa: F401 # a fixture
from tests.segmentation.test_context import voc as context_voc  # noqa: F401 # a fixture
from tests.segmentation.test_context import write_mats
from tests.segmentation.test_voc_aug import folder as voc_aug  # noqa: F401 # a fixture


@pytest.fixture
def context(context_voc):  # noqa: F811
    write_mats(context_voc)
    return context_voc


def call(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "segmentation.prepare", *map(str, arguments)],
        capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2],
    )  # fmt: skip


def test_the_command_prepares_and_checks_and_its_exit_code_tells(voc_aug):  # noqa: F811
    done = call("voc-aug", "--root", voc_aug, "--check")
    assert done.returncode == 1
    assert "wrong: there is no SBD below --root, nor" in done.stdout
    assert done.stdout.splitlines()[-1] == "1 to mend"
    done = call("voc-aug", "--root", voc_aug)
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        f"to read it all once: python -m segmentation.prepare voc-aug --root {voc_aug} --check" in done.stdout
    )
    done = call("voc-aug", "--root", voc_aug, "--check")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "all is well")
    done = call("voc-aug", "--root", voc_aug / "nowhere")
    assert done.returncode == 2
    told = f"error: --root {voc_aug / 'nowhere'}: no such folder; name the one that holds the data or its "
    assert done.stderr == f"{told}archives\n"


def test_check_writes_nothing(voc_aug):  # noqa: F811
    def state():
        return {path: path.stat().st_mtime_ns for path in voc_aug.rglob("*")}

    before = state()
    call("voc-aug", "--root", voc_aug, "--check")
    assert state() == before


@pytest.mark.parametrize("dataset", ["voc-aug", "context", "coco"])
def test_what_was_prepared_trains(dataset, request, tmp_path):
    folder = request.getfixturevalue(dataset.replace("-", "_"))
    prepare.main(dataset, folder)
    config = resolve(
        {
            "dataset": dataset, "data_path": str(folder), "weights_backbone": "none", "backbone": "resnet18",
            "output_dir": str(tmp_path / "run"), "max_steps": 1, "batch_size": 2, "crop_size": 33,
            "eval_every": 1, "limit_val_batches": 1, "device": "cpu", "threads": 1,
        },
        None,
    )  # fmt: skip
    assert config.train_split == ("trainaug" if dataset == "voc-aug" else "train")
    assert train(config) == 0
    labels = json.loads((tmp_path / "run" / "env.json").read_text())["labels"]
    assert labels["val"].startswith("SegmentationClass")
    assert ("459 labels (.mat)" in labels["val"]) == (dataset == "context")
    assert (tmp_path / "run" / "best.safetensors").is_file()


def test_data_sets_of_files_need_a_path():
    with pytest.raises(
        UsageError, match=r"--dataset coco needs --data-path: the folder that holds train2017"
    ):
        resolve({"dataset": "coco", "weights_backbone": "none"}, None)
    with pytest.raises(
        UsageError, match=r"--dataset voc-aug needs --data-path: the folder that holds JPEGIma"
    ):
        resolve({"dataset": "voc-aug", "weights_backbone": "none"}, None)
