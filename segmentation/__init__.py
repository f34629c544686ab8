"""DifNet and its baseline: semantic segmentation by learned cascades of random walks (see graphdiff).

The programs are `python -m segmentation.train` and `python -m segmentation.evaluate`.
"""

from importlib.util import find_spec

# What `pip install "graphdiff[segmentation]"` brings, by the name it is imported under.
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
        f"segmentation needs {', '.join(_missing)}, not installed here: "
        'pip install "graphdiff[segmentation]" brings what it needs'
    )
