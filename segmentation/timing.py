"""Where the time of a forward pass goes: seed branch, similarity branch, diffusion, upsampling."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from segmentation.engine import Model
from segmentation.models import DifNet

LAST_OF_PART = {
    "importance": "seed branch",
    "similarity_branch": "similarity branch",
    "cascade": "diffusion",
}
"""The module of a DifNet with which a part ends; what follows the last of them is upsampling."""

LAST_OF_BASELINE = {"score": "network"}
"""The same for Sim-DeepLab."""

REST = "upsampling"


@torch.no_grad()
def seconds_by_part(
    models: Mapping[str, Model], image: Tensor, rounds: int
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Time forward passes of models on one image, all models in turn in each round.

    A part reaches from the end of the one before it to the end of its own last module, so parts add up to the
    whole pass. For DifNet: the seed branch (to the importance map), the similarity branch, the diffusion
    (embeddings and walks), and upsampling; for Sim-DeepLab the network and upsampling. A round before those
    that count warms up.

    Args:
        models: by name, in eval mode, on the image's device.
        image: [1, 3, H, W].
        rounds: passes of each model that count.

    Returns:
        Seconds [rounds] by model and part, parts in their order.
    """
    taken: dict[str, dict[str, list[float]]] = {name: {} for name in models}
    for counted in [False] + [True] * rounds:
        for name, model in models.items():
            for part, seconds in _one_pass(model, image).items():
                if counted:
                    taken[name].setdefault(part, []).append(seconds)
    return {
        name: {part: np.array(seconds) for part, seconds in parts.items()} for name, parts in taken.items()
    }


def _one_pass(model: Model, image: Tensor) -> dict[str, float]:
    """Seconds of each part."""
    ends = LAST_OF_PART if isinstance(model, DifNet) else LAST_OF_BASELINE
    children: dict[str, nn.Module] = dict(model.named_children())
    marks: dict[str, float] = {}

    def marking(part: str) -> Callable[..., None]:
        def mark(*_: Any) -> None:
            marks[part] = _now(image.device)

        return mark

    hooks = [
        children[child].register_forward_hook(marking(part))
        for child, part in ends.items()
        if child in children
    ]
    try:
        before = _now(image.device)
        model(image)
        marks[REST] = _now(image.device)
    finally:
        for hook in hooks:
            hook.remove()
    parts: dict[str, float] = {}
    for part, end in marks.items():
        parts[part], before = end - before, end
    return parts


def _now(device: torch.device) -> float:
    """Seconds, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
