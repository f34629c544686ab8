"""DifNet and its baseline: semantic segmentation by learned cascades of random walks (see graphdiff).

The programs are `python -m segmentation.prepare`, `.train`, `.evaluate`, `.predict` and `.figures`; `load`
gives a trained model.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from segmentation.inference import Segmenter

# What the extra [segmentation] brings, by the name it is imported under.
_NEEDED = {
    "torchvision": "torchvision",
    "timm": "timm",
    "lightning": "lightning",
    "torchmetrics": "torchmetrics",
    "safetensors": "safetensors",
    "typer": "typer",
    "yaml": "pyyaml",
    "tqdm": "tqdm",
    "matplotlib": "matplotlib",
    "PIL": "pillow",
}

_missing = [package for module, package in _NEEDED.items() if find_spec(module) is None]
if _missing:
    raise ImportError(
        f"segmentation needs {', '.join(_missing)}, not installed here: pip install {' '.join(_missing)}, "
        'or pip install ".[segmentation]" in a clone of graphdiff'
    )


def load(checkpoint: str | Path, device: str = "cpu") -> "Segmenter":
    """A trained model, ready to use.

    Args:
        checkpoint: best.safetensors or last.safetensors of a run.
        device: "cpu", "cuda" or "auto".

    Returns:
        (model, classes, transform): the model in eval mode, from [B, 3, H, W] to logits [B, K, H, W]; the
        names of the K classes; and what maps a PIL image to the model's input [1, 3, H', W'] on its device,
        normalised, and padded on the right and below as in scoring.

    Raises:
        UsageError: there is no such file or device, or the file was not written by segmentation.train.

    Example::

        model, classes, transform = segmentation.load("best.safetensors")
        with torch.no_grad():
            labels = model(transform(image))[0].argmax(0)[: image.height, : image.width]
    """
    # Imported here: the programs' --help does not wait for torch.
    from segmentation import inference

    return inference.load(checkpoint, device)
