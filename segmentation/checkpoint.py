"""Files a run leaves and takes up again.

Two kinds: weights (.safetensors, with a description that suffices to rebuild the model) for use, and the
whole state of a run (.ckpt, plain tensors, numbers, strings and lists, never pickled objects) for resuming.
Each is written under another name, forced to the disk and then moved into place, so that a kill at any moment
leaves the previous one whole.
"""

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from segmentation.config import Config
from segmentation.errors import UsageError

FORMAT = "graphdiff-segmentation-1"

MAY_CHANGE_ON_RESUME = frozenset(
    # Where files lie, how fast the run goes and what it tells: none of these touches the weights.
    ("data_path", "weights_backbone", "output_dir", "workers", "threads", "device", "eval_every", "log_every",
     "limit_val_batches")
)  # fmt: skip


@dataclass(frozen=True)
class Description:
    """What weights are of.

    Args:
        config: of the run that made them.
        classes: names in the order of the model's output channels.
        step: steps they were trained for.
        miou: their score on the run's validation split, in [0, 1].
    """

    config: Config
    classes: tuple[str, ...]
    step: int
    miou: float


def save_weights(path: Path, model: nn.Module, description: Description) -> None:
    """Write a model's weights and what they are of."""
    metadata = {
        "format": FORMAT,
        "config": json.dumps(description.config.as_dict()),
        "classes": json.dumps(description.classes),
        "step": str(description.step),
        "miou": repr(description.miou),
    }
    # A tensor that is a view of a larger one would be refused.
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    _write(path, lambda partial: safetensors.torch.save_file(weights, partial, metadata))


def load_weights(path: Path) -> tuple[dict[str, Tensor], Description]:
    """Read what `save_weights` wrote.

    Raises:
        UsageError: the file is missing, corrupt, or not one of ours.
    """
    if not path.is_file():
        raise UsageError(
            f"--checkpoint {path}: no such file; name a best.safetensors or last.safetensors of a run"
        )
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 # it is no dict
    except (safetensors.SafetensorError, OSError) as fault:
        hint = (
            "it is for resuming; name the last.safetensors beside it"
            if path.suffix == ".ckpt"
            else "it is corrupt or cut short; name another"
        )
        raise UsageError(f"{path} cannot be read as safetensors ({_first_line(fault)}): {hint}") from None
    if metadata.get("format") != FORMAT:
        raise UsageError(
            f"{path} holds weights, but no description of format {FORMAT}: "
            "name one written by segmentation.train"
        )
    config = Config.from_dict(json.loads(metadata["config"]), f"the config inside {path}")
    classes = tuple(json.loads(metadata["classes"]))
    return weights, Description(config, classes, int(metadata["step"]), float(metadata["miou"]))


def load_into(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Fill a model; refuse weights of another architecture in one line."""
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    given = {name: tensor.shape for name, tensor in weights.items()}
    if own != given:
        differing = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
        raise UsageError(
            f"{path} is a checkpoint of another architecture: {len(differing)} tensors differ, "
            f"{differing[0]} first; name one that fits the model, or the version of graphdiff that wrote it"
        )
    model.load_state_dict(weights)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write the whole state of a run: nested dicts and lists of tensors, numbers and strings."""
    _write(path, lambda partial: torch.save({"format": FORMAT, **state}, partial))


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote.

    Raises:
        UsageError: the file is missing, corrupt, or not one of ours.
    """
    if not path.is_file():
        raise UsageError(f"--resume {path}: no such file; name the last.ckpt of a run, or 'auto'")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as fault:
        raise UsageError(
            f"--resume {path} is corrupt, cut short or of another kind ({_first_line(fault)}): "
            "name the last.ckpt of another run, or start afresh with --overwrite"
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UsageError(f"--resume {path} is no state of format {FORMAT}: name the last.ckpt of a run")
    return state


def check_same_run(state: dict[str, Any], config: Config, classes: tuple[str, ...], path: Path) -> None:
    """Refuse to go on with another run's state: name the first option or class that differs."""
    now = config.as_dict()
    for key, before in state["config"].items():
        if key not in MAY_CHANGE_ON_RESUME and before != now.get(key):
            raise UsageError(
                f"--resume {path} was made with {key} {before}, now it is {now.get(key)}: pass "
                f"--config {path.parent / 'config.yaml'}, or start afresh in another --output-dir"
            )
    if tuple(state["classes"]) != classes:
        raise UsageError(
            f"--resume {path} was trained on the classes {', '.join(state['classes'][:4])}, ..., the data "
            f"has {', '.join(classes[:4])}, ...: give --data-path the data it was trained on"
        )


def _write(path: Path, write: Callable[[Path], None]) -> None:
    partial = path.with_name(path.name + ".partial")
    write(partial)
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def _first_line(fault: Exception) -> str:
    return str(fault).splitlines()[0] if str(fault) else type(fault).__name__
