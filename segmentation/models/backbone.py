"""ResNets of output stride 8 from timm, and the weights they start from.

The stride of layer3 and layer4 is replaced by dilation 2 and 4, so an image of 8k+1 pixels becomes a map of
k+1.
"""

import pickle
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from segmentation.errors import UsageError

CHANNELS = {
    "resnet18": (64, 128, 256, 512),
    "resnet34": (64, 128, 256, 512),
    "resnet50": (256, 512, 1024, 2048),
    "resnet101": (256, 512, 1024, 2048),
}
"""Channels of layer1 to layer4."""

PARTS = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
"""The parts of a ResNet without its classifier, as torchvision and timm both name them."""


def resnet(name: str, layers: tuple[int, ...]) -> nn.Module:
    """A ResNet that maps images [B, 3, H, W] to the outputs of the given layers (of 1 to 4), in that order.

    It reaches no further than the last of them. It starts from random weights.
    """
    network: nn.Module = timm.create_model(name, features_only=True, output_stride=8, out_indices=layers)
    return network


def load_pretrained(backbones: list[nn.Module], name: str, source: str) -> frozenset[str]:
    """Start the backbones from ImageNet weights.

    Args:
        backbones: networks made by `resnet(name, ...)`; each gets a copy of its own.
        name: the ResNet's name.
        source: a file of weights under torchvision's or timm's names (.pth, .pt or .safetensors); "hub" for
            timm's hub; "none" for a start from random weights.

    Returns:
        The parts (of `PARTS`) that start fresh since the source does not hold them.

    Raises:
        UsageError: a file that is missing, unreadable, of another depth, or of no ResNet.
    """
    if source == "none":
        return frozenset(PARTS)
    if source == "hub":
        state, origin = _read_hub(name), f"timm's {name}.tv_in1k"
    else:
        state, origin = _read_file(Path(source)), source
    fresh = _fit(state, name, origin)
    for backbone in backbones:
        backbone.load_state_dict(
            {key: state[key] for key in backbone.state_dict() if key in state}, strict=False
        )
    return fresh


def _fit(state: dict[str, Tensor], name: str, origin: str) -> frozenset[str]:
    """Check a state against the whole ResNet, part by part: a part is there whole or not at all."""
    with torch.device("meta"):
        wanted = resnet(name, layers=(1, 2, 3, 4)).state_dict()
    present = {key.split(".")[0] for key in state} & set(PARTS)
    if not present:
        raise UsageError(
            f"{origin} holds no ResNet weights: expected names such as conv1.weight and "
            f"layer1.0.conv1.weight, found {', '.join(sorted(state)[:3]) or 'nothing'}"
        )
    given = {key for key in state if key.split(".")[0] in PARTS and not key.endswith("num_batches_tracked")}
    needed = {
        key for key in wanted if key.split(".")[0] in present and not key.endswith("num_batches_tracked")
    }
    fault = next(iter(sorted(given ^ needed)), None)
    if fault is not None:
        fault = f"{fault} is {'in the file, not in the network' if fault in given else 'not in the file'}"
    else:
        for key in sorted(given):
            if state[key].shape != wanted[key].shape:
                fault = f"{key} is {_size(state[key])} in the file and {_size(wanted[key])} in the network"
                break
    if fault is not None:
        raise UsageError(
            f"{origin} does not fit {name}: {fault}; it looks like {_depth(state)}: "
            "pass that as --backbone, or the file of the backbone wanted as --weights-backbone"
        )
    return frozenset(PARTS) - present


def _read_file(path: Path) -> dict[str, Tensor]:
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


def _read_hub(name: str) -> dict[str, Tensor]:
    try:
        network = timm.create_model(f"{name}.tv_in1k", pretrained=True)
    except Exception as fault:
        # Whatever the hub's client raises (no network, no such file, a proxy), the way out is the same.
        reason = (str(fault).splitlines() or [type(fault).__name__])[0]
        raise UsageError(
            f"timm's hub did not give {name}.tv_in1k ({reason}): pass a local file as --weights-backbone FILE"
        ) from fault
    state: dict[str, Tensor] = network.state_dict()
    return state


def _depth(state: dict[str, Tensor]) -> str:
    """Which ResNet a state belongs to, by its blocks: as far as its layers tell."""
    if "layer1.0.conv3.weight" in state or "layer3.0.conv3.weight" in state:
        return "resnet101" if "layer3.6.conv1.weight" in state else "resnet50"
    return "resnet34" if "layer1.2.conv1.weight" in state or "layer3.2.conv1.weight" in state else "resnet18"


def _size(tensor: Tensor) -> str:
    return "x".join(str(side) for side in tensor.shape)
