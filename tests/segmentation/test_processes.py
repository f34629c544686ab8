"""Two processes on the CPU: one run, and one that loses a process and goes on."""

import os
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
import yaml

from segmentation.checkpoint import load_weights
from segmentation.config import resolve
from segmentation.evaluate import evaluate
from segmentation.models.backbone import network
from segmentation.train import train
from tests.segmentation.conftest import tiny
from tests.segmentation.test_training import ROOT, rows

# What torchrun starts: the program; then another run, in which each process has statistics of batch norm of
# its own, and the second one is killed after the first scoring.
PROGRAM = """
import os, signal, sys
from pathlib import Path
from segmentation import engine, train
from segmentation.config import resolve
from segmentation.errors import told_in_one_line
from segmentation.trainer import Trainer

evaluate = engine.evaluate

def watched(model, *rest):
    # Not to the output: there two processes write into each other's lines.
    with open(f"{SCORED}-{os.environ['RANK']}", "a") as file:
        print(sum(float(buffer.double().sum()) for buffer in model.buffers()), file=file)
    return evaluate(model, *rest)

engine.evaluate = watched
try:
    train.run_command_line()
except SystemExit as ended:
    if ended.code:
        raise

steps, step = [], Trainer.step

def dying(self, image, label):
    steps.append(1)
    if len(steps) == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, image, label)

Trainer.step = dying
flags = {"bn": "train", "batch_size": 8, "lr": 0.05, "output_dir": DYING}
with told_in_one_line():
    train.train(resolve(flags, Path(sys.argv[2])))
"""


def test_two_processes_are_one_run_and_the_death_of_one_is_told(tmp_path):
    weights = tmp_path / "imagenet.pth"
    torch.manual_seed(0)
    torch.save(network("resnet18", (1, 2, 3, 4)).state_dict(), weights)
    # With frozen statistics the loss of a batch does not depend on how it is cut.
    flags = {
        "model": "sim-deeplab", "bn": "frozen", "weights_backbone": str(weights), "batch_size": 4,
        "grad_accum_steps": 2, "max_steps": 4, "eval_every": 2, "checkpoint_every": 1,
        "limit_val_batches": 3, "ema_decay": 0.5, "lr": 0.001,
    }  # fmt: skip
    folder, dying = tmp_path / "two", tmp_path / "dying"
    options, program = tmp_path / "options.yaml", tmp_path / "program.py"
    options.write_text(yaml.safe_dump(tiny(folder, **flags).as_dict()))
    program.write_text(f"DYING, SCORED = {str(dying)!r}, {str(tmp_path / 'scored')!r}\n" + PROGRAM)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, str(program), "--config", str(options)],
        capture_output=True, text=True, cwd=ROOT, timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip

    # One log of one run, which is that of one process.
    assert done.stdout.count("4 steps of 4 on cpu, by 2 processes") == 1, done.stderr
    assert len([line for line in done.stdout.splitlines() if re.match(r"step 3/4 .*left", line)]) == 1
    alone = tmp_path / "one"
    assert train(tiny(alone, **flags)) == 0
    for one, two in zip(rows(alone / "metrics.csv"), rows(folder / "metrics.csv"), strict=True):
        assert float(two["loss"]) == pytest.approx(float(one["loss"]), rel=1e-4)
    (a, _), (b, _) = (load_weights(run / "last.safetensors") for run in (alone, folder))
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, rtol=1e-3, atol=1e-5, msg=name)

    # The death of one ends all with a message, and the run goes on, here by one process.
    assert done.returncode != 0
    state = dying / "last.ckpt"
    assert (
        "error: process 0: another process of the run has ended or cannot be reached (its own message says "
        f"why); {state} holds step 2, to go on from by --resume auto"
    ) in done.stderr

    # Both score one model, and of three images none is counted twice.
    files = sorted(tmp_path.glob("scored-*"))
    assert len(files) == 2
    scored = Counter(line for file in files for line in file.read_text().splitlines())
    assert len(scored) == 2  # frozen, and once learned
    assert all(times % 2 == 0 for times in scored.values())
    for run in (folder, dying):
        evaluate(run / "last.safetensors", limit_batches=3, threads=1, out=run / "scores")
        assert rows(run / "scores" / "per_class.csv") == rows(run / "per_class.csv")[-6:]
    assert train(resolve({}, dying / "config.yaml"), resume="auto") == 0
    assert [row["step"] for row in rows(dying / "metrics.csv")] == ["2", "4"]
