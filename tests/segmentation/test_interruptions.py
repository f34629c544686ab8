"""Files of a run when the disk is full, or when the run dies while it writes."""

import os
import re
import resource
import signal
import time
from contextlib import contextmanager
from io import FileIO

import pytest
import torch

from segmentation import checkpoint, files
from segmentation.errors import UsageError
from segmentation.figures import panel
from segmentation.files import WriteFault
from segmentation.train import train
from segmentation.trainer import Trainer
from tests.segmentation.conftest import tiny


def test_a_kill_in_the_middle_of_a_write_leaves_the_last_file_whole(tmp_path):
    file, partial = tmp_path / "last.ckpt", tmp_path / "last.ckpt.partial"
    checkpoint.save_state(file, {"step": 1, "weights": torch.zeros(1000)})
    # A child of its own: only a real kill leaves no time to tidy up.
    child = os.fork()
    if child == 0:
        write = FileIO.write

        class Slow(files._Remembering):
            def write(self, data):
                write(self, bytes(data)[: len(data) // 2])
                time.sleep(60)

        files._Remembering = Slow
        checkpoint.save_state(file, {"step": 2, "weights": torch.ones(1000)})
        os._exit(0)
    deadline = time.monotonic() + 30
    while not (partial.is_file() and partial.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert partial.stat().st_size > 0
    assert checkpoint.load_state(file)["step"] == 1
    checkpoint.save_state(file, {"step": 3})
    assert checkpoint.load_state(file)["step"] == 3
    assert not partial.exists()


def test_a_full_disk_is_told_and_leaves_the_last_file_whole(tmp_path):
    file = tmp_path / "last.ckpt"
    checkpoint.save_state(file, {"step": 1})
    # A device on which every write ends as on a full disk.
    (tmp_path / "last.ckpt.partial").symlink_to("/dev/full")
    with pytest.raises(
        WriteFault, match=r"last\.ckpt could not be written \(No space left on device\): free"
    ):
        checkpoint.save_state(file, {"step": 2, "weights": torch.zeros(1000)})
    assert checkpoint.load_state(file)["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    with pytest.raises(WriteFault, match="No such file or directory"):
        files.write_text(tmp_path / "none" / "config.yaml", "text")


@contextmanager
def quota(size):
    """No file may grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_run_that_fills_the_disk_names_the_file_and_the_last_good_checkpoint(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    flags = {"model": "sim-deeplab", "aspp": False, "max_steps": 3, "checkpoint_every": 1}
    steps = []
    step = Trainer.step

    def counted(self, image, label):
        steps.append(1)
        if len(steps) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return step(self, image, label)

    monkeypatch.setattr(Trainer, "step", counted)
    state = folder / "last.ckpt"
    message = re.escape(
        f"{state} could not be written (File too large): free space there, or name another folder; "
        f"{state} holds step 1, to go on from by --resume auto"
    )
    with quota(resource.RLIM_INFINITY), pytest.raises(UsageError, match=message) as caught:
        train(tiny(folder, **flags))
    assert "\n" not in str(caught.value)
    assert not list(folder.glob("*.partial"))
    assert checkpoint.load_state(state)["at"]["step"] == 1

    whole = tmp_path / "whole"
    assert train(tiny(folder, **flags), resume="auto") == 0
    assert train(tiny(whole, **flags)) == 0
    one, other = (checkpoint.load_weights(run / "last.safetensors")[0] for run in (folder, whole))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_run_that_cannot_write_its_first_checkpoint_says_that_there_is_none(tmp_path):
    with (
        quota(2**20),
        pytest.raises(UsageError, match=r"best\.safetensors could not be .*; no step was saved"),
    ):
        train(tiny(tmp_path / "run", model="sim-deeplab", aspp=False, max_steps=1))


def test_a_signal_while_the_panel_is_drawn_does_not_leave_it_out(tmp_path, monkeypatch):
    draw = panel.panel

    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        draw(*arguments)

    monkeypatch.setattr(panel, "panel", signalled)
    config = tiny(tmp_path, model="sim-deeplab", aspp=False, max_steps=1)
    late = []
    before = signal.signal(signal.SIGTERM, lambda *_: late.append("as if there were no run"))
    try:
        assert train(config) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not late
    assert (config.run_dir / "panel.png").is_file()


def test_as_many_states_are_left_as_asked_and_an_earlier_one_can_be_gone_on_from(tmp_path):
    flags = {"model": "sim-deeplab", "aspp": False, "max_steps": 5, "checkpoint_every": 1, "keep": 3}
    config = tiny(tmp_path, **flags)
    train(config, None, False)
    run = config.run_dir
    states = sorted(file.name for file in run.glob("*.ckpt"))
    assert states == ["last.ckpt", "step-3.ckpt", "step-4.ckpt"]
    assert [checkpoint.load_state(run / name)["at"]["step"] for name in states] == [5, 3, 4]
    whole = checkpoint.load_state(run / "last.ckpt")["model"]

    train(config, str(run / "step-3.ckpt"), False)
    again = checkpoint.load_state(run / "last.ckpt")
    assert again["at"]["step"] == 5
    assert all(torch.equal(again["model"][name], tensor) for name, tensor in whole.items())
    assert {file.name for file in run.glob("*.ckpt")} == {"last.ckpt", "step-3.ckpt", "step-4.ckpt"}

    # A new run in the folder has none of them, and one state alone has no other name.
    train(tiny(tmp_path, **flags | {"keep": 1}), None, True)
    assert [file.name for file in run.glob("*.ckpt")] == ["last.ckpt"]
