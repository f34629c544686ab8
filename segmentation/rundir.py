"""The folder of a run: what lies in it, when it may be written to, its tables."""

import csv
import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from segmentation.config import Config
from segmentation.errors import UsageError
from segmentation.files import told, write_text
from segmentation.metrics import Scores

_PACKAGES = ("graphdiff", "torch", "torchvision", "timm", "lightning", "torchmetrics", "safetensors", "numpy")


class RunDir:
    """Paths and tables of one run.

    Args:
        root: the folder; it need not exist.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.env = root / "env.json"
        self.metrics = root / "metrics.csv"
        self.per_class = root / "per_class.csv"
        self.best = root / "best.safetensors"
        self.last = root / "last.safetensors"
        self.state = root / "last.ckpt"
        self.panel = root / "panel.png"

    def earlier_states(self) -> list[Path]:
        """States before the last one that are kept, oldest first."""
        return sorted(self.root.glob("step-*.ckpt"), key=_step_of)

    def keep_state(self, step: int, keep: int) -> None:
        """The last state, of `step`, gets a second name before another takes its place; the oldest go.

        Args:
            step: of the last state.
            keep: states to be left, the one to come included.
        """
        if keep > 1:
            kept = self.root / f"step-{step}.ckpt"
            kept.unlink(missing_ok=True)
            # A link: at no moment, and on no full disk, is there no last state.
            try:
                os.link(self.state, kept)
            except OSError:
                # Some disks know no second names.
                with told(kept):
                    shutil.copyfile(self.state, kept)
        states = self.earlier_states()
        for state in states[: max(len(states) - (keep - 1), 0)]:
            state.unlink()

    def state_to_resume(self, resume: str | None, overwrite: bool) -> Path | None:
        """Decide between a fresh start (None) and going on from a state; touch nothing yet.

        Args:
            resume: a state file, "auto" for the folder's own if there is one, or None.
            overwrite: whether an earlier run in the folder may be deleted.

        Raises:
            UsageError: the folder holds something and neither was asked for, or both were.
        """
        if resume is not None and overwrite:
            raise UsageError("--resume goes on with a run and --overwrite deletes it: give one of them")
        if self.root.exists() and not self.root.is_dir():
            raise UsageError(f"--output-dir {self.root} is a file: name a folder")
        if resume == "auto" and self.state.is_file():
            return self.state
        held = {file.name for file in self.root.iterdir()} if self.root.is_dir() else set()
        if resume == "auto":
            # Killed before its first checkpoint, a run leaves no more than this; it starts anew.
            resume, held = None, held - {self.config.name, self.env.name}
        here = resume is not None and Path(resume).resolve().parent == self.root.resolve()
        if held and not overwrite and not here:
            raise UsageError(
                f"--output-dir {self.root} is not empty: pass --resume auto to go on with the run in it "
                f"(which needs its {self.state.name}), --overwrite to replace that run, or another "
                "--output-dir"
            )
        return None if resume is None else Path(resume)

    def start(self, config: Config, environment: Mapping[str, Any], step: int, evaluation_due: bool) -> None:
        """Make the folder ready for a run that stands at `step`: of an earlier one, nothing later remains.

        Only files that a run writes are touched.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        if step == 0:
            for file in (self.metrics, self.per_class, self.best, self.last, self.state, self.panel):
                file.unlink(missing_ok=True)
                file.with_name(file.name + ".partial").unlink(missing_ok=True)
        for state in self.earlier_states():
            if step == 0 or _step_of(state) > step:
                state.unlink()
        for table in (self.metrics, self.per_class):
            _keep_rows_before(table, step if evaluation_due else step + 1)
        write_text(self.config, yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True))
        write_text(self.env, json.dumps(environment, indent=2) + "\n")

    def log(self, row: Mapping[str, Any], scores: Scores, classes: tuple[str, ...]) -> None:
        """Append one scoring: a row to metrics.csv and its classes to per_class.csv."""
        _append(self.metrics, [row])
        _append(self.per_class, class_rows(row["step"], scores, classes))

    def files(self) -> list[Path]:
        """What the run has written so far."""
        tables = [self.config, self.env, self.metrics, self.per_class]
        written = (*tables, self.best, self.last, *self.earlier_states(), self.state, self.panel)
        return [file for file in written if file.is_file()]


def class_rows(step: int, scores: Scores, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Rows of per_class.csv: scores in [0, 1], nan where a class does not occur."""
    columns = zip(classes, scores.iou, scores.accuracy, scores.truth, strict=True)
    return [
        {"step": step, "class": name, "iou": float(iou), "accuracy": float(accuracy), "pixels": int(pixels)}
        for name, iou, accuracy, pixels in columns
    ]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write a table anew."""
    file.unlink(missing_ok=True)
    _append(file, rows)


def environment(
    config: Config, device: str, threads: int, processes: int, weights_sha256: Mapping[str, str]
) -> dict[str, Any]:
    """What env.json records: what one needs to know to repeat a run, beyond its config."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
        "device": device,
        "threads": threads,
        "processes": processes,
        "seed": config.seed,
        "weights_sha256": dict(weights_sha256),
    }


def _step_of(state: Path) -> int:
    return int(state.stem.removeprefix("step-"))


def _append(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    is_new = not file.exists()
    with told(file), open(file, "a", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def _keep_rows_before(table: Path, step: int) -> None:
    """Drop rows of later steps, and a last row that a kill cut short."""
    if not table.is_file():
        return
    header, *lines = table.read_text().splitlines(keepends=True) or [""]
    kept = [line for line in lines if line.endswith("\n") and int(line.split(",")[0]) < step]
    write_text(table, "".join([header, *kept]))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, "-dirty" if files differ from it; None for an installed package."""
    checkout = Path(__file__).parent.parent
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def weights_sha256(files: Sequence[str]) -> dict[str, str]:
    """Hash of each file."""
    hashes = {}
    for file in files:
        with open(file, "rb") as stream:
            hashes[file] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes
