"""Files a run leaves and takes up again.

Two kinds: weights (.safetensors, with a description that suffices to rebuild the model) for use, and the
whole state of a run (.ckpt, plain tensors, numbers, strings and lists, never pickled objects) for resuming.
Each is written whole (see files), so that a kill at any moment and a full disk leave the previous one as it
was.
"""

import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from segmentation.config import Config
from segmentation.errors import UsageError, first_of
from segmentation.files import whole

FORMAT = "graphdiff-segmentation-1"
STATE_FORMAT = "graphdiff-segmentation-state-2"

_HEADS = ("score", "importance", "seed_branch.classifier")
"""Parts whose size is that of the classes, the last one with --seed-model."""

MAY_CHANGE_ON_RESUME = frozenset(
    # Where files lie, how fast the run goes and what it tells: none of these touches the weights.
    ("data_path", "weights_backbone", "init_from", "output_dir", "workers", "threads", "device",
     "channels_last", "compile", "eval_every", "checkpoint_every", "keep", "log_every", "limit_val_batches")
)  # fmt: skip


@dataclass(frozen=True)
class Description:
    """What weights are of.

    Args:
        config: of the run that made them.
        classes: names in the order of the model's output channels.
        step: steps they were trained for.
        miou: their score on the run's validation split, in [0, 1].
        weights_sha256: hash of each file of weights the run started from.
    """

    config: Config
    classes: tuple[str, ...]
    step: int
    miou: float
    weights_sha256: dict[str, str] = field(default_factory=dict)


def save_weights(path: Path, model: nn.Module, description: Description) -> None:
    """Write a model's weights and what they are of."""
    metadata = {
        "format": FORMAT,
        "config": json.dumps(description.config.as_dict()),
        "classes": json.dumps(description.classes),
        "step": str(description.step),
        "miou": repr(description.miou),
        "weights_sha256": json.dumps(description.weights_sha256),
    }
    # A tensor that is a view of a larger one would be refused.
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with whole(path) as file:
        file.write(safetensors.torch.save(weights, metadata))


def load_weights(path: Path, option: str = "--checkpoint") -> tuple[dict[str, Tensor], Description]:
    """Read what `save_weights` wrote; `option` is what messages call it.

    Raises:
        UsageError: the file is missing, corrupt, or not one of ours.
    """
    if not path.is_file():
        raise UsageError(
            f"{option} {path}: no such file; name a best.safetensors or last.safetensors of a run"
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
    hashes = json.loads(metadata.get("weights_sha256", "{}"))
    return weights, Description(config, classes, int(metadata["step"]), float(metadata["miou"]), hashes)


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


def start_from(model: nn.Module, path: Path, classes: tuple[str, ...]) -> list[str]:
    """Fill a model with another run's weights, as far as the number of classes lets it.

    Returns:
        What is to be told of it, in lines.

    Raises:
        UsageError: the weights are of another architecture.
    """
    weights, description = load_weights(path, "--init-from")
    own = model.state_dict()
    differing = {
        name
        for name in own.keys() | weights.keys()
        if name not in own or name not in weights or own[name].shape != weights[name].shape
    }
    resized = len(classes) != len(description.classes)
    foreign = sorted(name for name in differing if not (resized and _head(name)))
    if foreign:
        made = description.config
        raise UsageError(
            f"--init-from {path} is of another architecture ({made.model} on {made.networks}): "
            f"{len(foreign)} tensors differ, {foreign[0]} first; give --model, --backbone, "
            "--aspp and what says how it diffuses (--walks, --diffusion, ...) as it had them"
        )
    fresh = sorted({_head(name) for name in differing})
    model.load_state_dict(
        {name: tensor for name, tensor in weights.items() if _head(name) not in fresh}, strict=False
    )
    lines = [f"weights of {path}, step {description.step}, {100 * description.miou:.2f} mIoU on its own data"]
    if fresh:
        lines.append(
            f"{' and '.join(fresh)} start fresh: it has {len(description.classes)} classes, the data "
            f"{len(classes)}"
        )
    elif description.classes != classes:
        lines.append(
            f"warning: its classes have other names ({first_of(description.classes)} against "
            f"{first_of(classes)}); its classifier is kept"
        )
    return lines


def _head(name: str) -> str:
    """Which of the parts that know the classes a tensor belongs to; "" for the others."""
    return next((head for head in _HEADS if name.startswith(f"{head}.")), "")


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write the whole state of a run: nested dicts and lists of tensors, numbers and strings."""
    with whole(path) as file:
        torch.save({"format": STATE_FORMAT, **state}, file)


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
    if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
        raise UsageError(f"--resume {path} is no state of format {STATE_FORMAT}: name the last.ckpt of a run")
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
            f"--resume {path} was trained on the classes {first_of(state['classes'])}; the data has "
            f"{first_of(classes)}: give --data-path the data it was trained on"
        )


def _first_line(fault: Exception) -> str:
    return str(fault).splitlines()[0] if str(fault) else type(fault).__name__
