"""Networks of timm that give features at output stride 8, and the weights they start from.

Their last four maps are called layer1 to layer4. In a ResNet the stride of layer3 and layer4 is replaced by
dilation 2 and 4, so an image of 8k+1 pixels becomes a map of k+1.
"""

import difflib
import functools
import pickle
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from segmentation.errors import UsageError

_KNOWN = "resnet18, resnet50, convnext_tiny, regnety_008 or efficientnet_b0"
"""Some that do, for messages."""


def network(name: str, layers: tuple[int, ...]) -> nn.Module:
    """A backbone that maps images [B, 3, H, W] to the outputs of the given layers (of 1 to 4), in that order.

    It reaches no further than the last of them. It starts from random weights.

    Raises:
        UsageError: timm does not know it, or not with four maps and output stride 8.
    """
    before = _maps(name) - 4
    built: nn.Module = timm.create_model(
        name, features_only=True, output_stride=8, out_indices=tuple(before + layer - 1 for layer in layers)
    )
    return built


def channels(name: str) -> tuple[int, ...]:
    """Channels of layer1 to layer4."""
    counts: list[int] = _whole(name).feature_info.channels()
    return tuple(counts)


def parts(name: str) -> tuple[str, ...]:
    """The parts that its weights are told by, in order: for a ResNet conv1, bn1, layer1 to layer4."""
    return tuple(dict.fromkeys(key.split(".")[0] for key in _whole(name).state_dict()))


@functools.cache
def _whole(name: str) -> Any:
    """All four layers, without memory for their weights."""
    with torch.device("meta"):
        return network(name, layers=(1, 2, 3, 4))


@functools.cache
def _maps(name: str) -> int:
    """How many maps it gives."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise UsageError(f"backbone {name!r}: timm has no such model{meant}; pass {_KNOWN}")
    strides = _strides(name, output_stride=8)
    if not strides or strides[-1] != 8:
        other = strides or _strides(name)
        found = f"strides {', '.join(str(stride) for stride in other)}" if other else "no feature maps"
        raise UsageError(f"backbone {name} has {found}, and cannot be given output stride 8: pass {_KNOWN}")
    if len(strides) < 4:
        raise UsageError(f"backbone {name} has {len(strides)} feature maps, four are needed: pass {_KNOWN}")
    return len(strides)


def _strides(name: str, **options: int) -> list[int]:
    """Of its maps; none where timm cannot build it."""
    try:
        with torch.device("meta"):
            strides: list[int] = timm.create_model(
                name, features_only=True, **options
            ).feature_info.reduction()
    except Exception:
        # Each of timm's families refuses an option in its own way.
        return []
    return strides


def load_pretrained(backbone: nn.Module, name: str, source: str) -> frozenset[str]:
    """Start a backbone from ImageNet weights.

    Args:
        backbone: made by `network(name, ...)`.
        name: of the model.
        source: a file of weights under torchvision's or timm's names (.pth, .pt or .safetensors); "hub" for
            timm's hub; "none" for a start from random weights.

    Returns:
        The parts (of `parts(name)`) that start fresh since the source does not hold them.

    Raises:
        UsageError: a file that is missing, unreadable, or of another network.
    """
    if source == "none":
        return frozenset(parts(name))
    if source == "hub":
        tag = _hub_name(name)
        state, origin = _read_hub(tag), f"timm's {tag}"
    else:
        state, origin = read_weights(Path(source)), source
    # Networks of features join the first names of the whole model: stages.0.x becomes stages_0.x.
    plain = {_plain(key): key for key in state}
    fresh = _fit(state, plain, name, origin)
    backbone.load_state_dict(
        {key: state[plain[_plain(key)]] for key in backbone.state_dict() if _plain(key) in plain},
        strict=False,
    )
    return fresh


def _fit(state: dict[str, Tensor], plain: dict[str, str], name: str, origin: str) -> frozenset[str]:
    """Check a state against the whole backbone, part by part: a part is there whole or not at all."""
    wanted = {
        _plain(key): (key, tensor)
        for key, tensor in _whole(name).state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    known = parts(name)
    part_of = {
        key: part
        for key in plain
        for part in known
        if key.startswith(part + "_") and not key.endswith("num_batches_tracked")
    }
    present = set(part_of.values())
    if not present:
        raise UsageError(
            f"{origin} holds no weights of {name}: expected names such as {next(iter(wanted.values()))[0]}, "
            f"found {', '.join(sorted(state)[:3]) or 'nothing'}"
        )
    needed = {key for key, (given, _) in wanted.items() if given.split(".")[0] in present}
    fault = next(iter(sorted(part_of.keys() ^ needed)), None)
    if fault is not None:
        fault = (
            f"{plain[fault]} is in the file, not in the network"
            if fault in part_of
            else f"{wanted[fault][0]} is not in the file"
        )
    else:
        for key in sorted(part_of):
            tensor = state[plain[key]]
            if tensor.shape != wanted[key][1].shape:
                fault = (
                    f"{plain[key]} is {_size(tensor)} in the file and {_size(wanted[key][1])} in the network"
                )
                break
    if fault is not None:
        looks = f"; it looks like {_depth(state)}" if "layer1.0.conv1.weight" in state else ""
        raise UsageError(
            f"{origin} does not fit {name}: {fault}{looks}: "
            "pass that as --backbone, or the file of the backbone wanted as --weights-backbone"
        )
    return frozenset(known) - present


def _plain(key: str) -> str:
    return key.replace(".", "_")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a file of --weights-backbone."""
    if not path.is_file():
        raise UsageError(
            f"--weights-backbone {path}: no such file; name a file of ImageNet weights (.pth or "
            ".safetensors), 'hub' to fetch timm's, or 'none' to start from random weights"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as fault:
        reason = str(fault).splitlines()[0] if str(fault) else type(fault).__name__
        raise UsageError(
            f"--weights-backbone {path} cannot be read as a state dict of tensors ({reason}): "
            "it may be cut short or of another kind; fetch it again"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UsageError(
            f"--weights-backbone {path} is no plain state dict of names and tensors: save "
            "model.state_dict() alone"
        )
    return state


def _hub_name(name: str) -> str:
    """A name that says which weights: torchvision's where timm has them, else timm's choice."""
    return f"{name}.tv_in1k" if timm.list_pretrained(f"{name}.tv_in1k") else name


def _read_hub(name: str) -> dict[str, Tensor]:
    try:
        model = timm.create_model(name, pretrained=True)
    except Exception as fault:
        # Whatever the hub's client raises (no network, no such file, a proxy), the way out is the same.
        reason = (str(fault).splitlines() or [type(fault).__name__])[0]
        raise UsageError(
            f"timm's hub did not give {name} ({reason}): pass a local file as --weights-backbone FILE"
        ) from fault
    state: dict[str, Tensor] = model.state_dict()
    return state


def _depth(state: dict[str, Tensor]) -> str:
    """Which ResNet a state belongs to, by its blocks: as far as its layers tell."""
    if "layer1.0.conv3.weight" in state or "layer3.0.conv3.weight" in state:
        return "resnet101" if "layer3.6.conv1.weight" in state else "resnet50"
    return "resnet34" if "layer1.2.conv1.weight" in state or "layer3.2.conv1.weight" in state else "resnet18"


def _size(tensor: Tensor) -> str:
    return "x".join(str(side) for side in tensor.shape)
