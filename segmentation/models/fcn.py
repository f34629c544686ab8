"""torchvision's segmentation networks as seed branches, and the weights they start from.

Their auxiliary head is off. Nothing is downloaded: weights come from a file, or are random.
"""

from pathlib import Path

from torch import nn
from torchvision.models import segmentation

from segmentation.errors import UsageError
from segmentation.models.backbone import read_weights

PARTS = ("backbone", "classifier")
"""The parts that weights are told by, in order."""


def seed_model(name: str, num_classes: int) -> nn.Module:
    """A network that maps images [B, 3, H, W] to {"out": score [B, K, H, W]}, from random weights.

    Args:
        name: "fcn_resnet50", or another builder of torchvision.models.segmentation.
        num_classes: K.
    """
    options = {} if name.startswith("lraspp") else {"aux_loss": False}
    built: nn.Module = getattr(segmentation, name)(
        weights=None, weights_backbone=None, num_classes=num_classes, **options
    )
    return built


def load_pretrained(model: nn.Module, name: str, source: str) -> frozenset[str]:
    """Start a seed model from a file.

    Args:
        model: made by `seed_model(name, ...)`.
        name: of the model.
        source: torchvision's weights of the whole network (of any number of classes), or those of its
            backbone as trained on ImageNet (.pth, .pt or .safetensors); "none" for random weights.

    Returns:
        The parts (of `PARTS`) that start fresh: the classifier where the file has none of this size.

    Raises:
        UsageError: a file that is missing, unreadable, or of another network.
    """
    if source == "none":
        return frozenset(PARTS)
    state = read_weights(Path(source))
    if not any(key.startswith("backbone.") for key in state):
        # A MobileNet's classifier trained on ImageNet is none of ours, and its layers lie under "features".
        state = {
            f"backbone.{key.removeprefix('features.')}": tensor
            for key, tensor in state.items()
            if not key.startswith(("fc.", "classifier."))
        }
    own = {key: tensor.shape for key, tensor in model.state_dict().items() if not _counts(key)}
    given = {
        key: tensor.shape
        for key, tensor in state.items()
        if not _counts(key) and not key.startswith("aux_classifier.")
    }
    differing = sorted(key for key in own.keys() | given.keys() if own.get(key) != given.get(key))
    foreign = [key for key in differing if not key.startswith("classifier.")]
    if foreign:
        raise UsageError(
            f"--weights-backbone {source} does not fit {name}: {len(foreign)} tensors differ, "
            f"{foreign[0].removeprefix('backbone.')} first; name torchvision's weights of {name} or ImageNet "
            f"weights of its backbone, and with another network on the similarity branch FILE,FILE"
        )
    fresh = frozenset({"classifier"} if differing else ())
    model.load_state_dict(
        {key: state[key] for key in own if key.split(".")[0] not in fresh and key in state}, strict=False
    )
    return fresh


def _counts(key: str) -> bool:
    return key.endswith("num_batches_tracked")
