"""`python -m segmentation.prepare`, and a short training on what it made."""

import json
import sys

import pytest

from segmentation import commandline, prepare
from segmentation.config import resolve
from segmentation.errors import UsageError
from segmentation.train import train
from tests.segmentation.test_coco import root as coco  # noqa: F401 # a fixture
from tests.segmentation.test_context import voc as context_voc  # noqa: F401 # a fixture
from tests.segmentation.test_context import write_mats
from tests.segmentation.test_voc_aug import folder as voc_aug  # noqa: F401 # a fixture

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


@pytest.fixture
def context(context_voc):  # noqa: F811
    write_mats(context_voc)
    return context_voc


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the program in this process; its exit code, what it wrote, its faults."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["prepare", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            commandline.run(prepare.main)
        return caught.value.code or 0, *capsys.readouterr()

    return run


def test_the_command_prepares_and_checks_and_its_exit_code_tells(voc_aug, call):  # noqa: F811
    code, out, _ = call("voc-aug", "--root", voc_aug, "--check")
    assert code == 1
    assert "wrong: there is no SegmentationClassAug in" in out
    assert out.splitlines()[-1] == "1 to mend"
    code, out, err = call("voc-aug", "--root", voc_aug)
    assert (code, err) == (0, "")
    assert f"to read it all once: python -m segmentation.prepare voc-aug --root {voc_aug} --check" in out
    code, out, _ = call("voc-aug", "--root", voc_aug, "--check")
    assert (code, out.splitlines()[-1]) == (0, "all is well")
    code, _, err = call("voc-aug", "--root", voc_aug / "nowhere")
    assert code == 2
    told = f"error: --root {voc_aug / 'nowhere'}: no such folder; name the one that holds the data or its "
    assert err == f"{told}archives\n"


def test_check_writes_nothing(voc_aug, call):  # noqa: F811
    def state():
        return {path: path.stat().st_mtime_ns for path in voc_aug.rglob("*")}

    before = state()
    call("voc-aug", "--root", voc_aug, "--check")
    assert state() == before


# What is prepared of each is tested above; that training takes it is the same for all in this form.
@pytest.mark.parametrize(
    "dataset",
    [
        "voc-aug",
        pytest.param("context", marks=pytest.mark.slow),
        pytest.param("coco", marks=pytest.mark.slow),
    ],
)
def test_what_was_prepared_trains(dataset, request, tmp_path):
    folder = request.getfixturevalue(dataset.replace("-", "_"))
    prepare.main(dataset, folder)
    config = resolve(
        {
            "dataset": dataset, "data_path": str(folder), "weights_backbone": "none", "model": "sim-deeplab",
            "backbone": "resnet18",
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
