"""Parameters of every system in configs/paper, beside what the paper scores with it; a Markdown table.

    python benchmarks/parameters.py

It is the table of docs/segmentation.md. The paper gives no counts: it calls those of DifNet-50 and
Sim-DeepLab-101 equivalent, and their ratio stands below the table.
"""

from pathlib import Path

import torch

from segmentation import engine
from segmentation.config import resolve

FOLDER = Path(__file__).parents[1] / "configs" / "paper"
CLASSES = {"voc-aug": 21, "context": 60, "coco": 21}

# Row of the paper, its configuration, what its scoring adds, the paper's mIoU on the split val.
SYSTEMS = [
    ("Table 1: Sim-DeepLab-18", "voc-sim-deeplab-18", "", "66.33"),
    ("Sim-DeepLab-34", "voc-sim-deeplab-34", "", "69.76"),
    ("Sim-DeepLab-50", "voc-sim-deeplab-50", "", "70.78"),
    ("Sim-DeepLab-101", "voc-sim-deeplab-101", "", "71.83"),
    ("Sim-DeepLab-101-CRF", "voc-sim-deeplab-101", "`--crf builtin`", "72.26"),
    ("DifNet-18", "voc-difnet-18", "", "70.17"),
    ("DifNet-34", "voc-difnet-34", "", "71.84"),
    ("DifNet-50-noASPP", "voc-difnet-50-noaspp", "", "72.52"),
    ("DifNet-50", "voc-difnet-50", "", "72.57"),
    ("DifNet-101", "voc-difnet-101", "", "73.22"),
    ("5.3: DifNet-50 without walks 2 and 4", "voc-difnet-50-walks-024", "", "a point less"),
    ("Table 2: DeepLab, MSC", "context-deeplab-101-msc", "", "41.4"),
    ("DeepLab, MSC, COCO", "context-deeplab-101-msc-coco", "", "42.9"),
    ("DeepLab, ASPP (Sim-DeepLab)", "context-sim-deeplab-101", "", "43.6"),
    ("DeepLab, MSC, COCO, ASPP", "context-deeplab-101-msc-coco-aspp", "", "44.7"),
    ("DeepLab, MSC, COCO, ASPP, CRF", "context-deeplab-101-msc-coco-aspp", "`--crf builtin`", "45.7"),
    ("DifNet-101, ASPP", "context-difnet-101", "", "46.0"),
    ("DifNet-101", "context-difnet-101-noaspp", "", "none"),
    ("DifNet-50", "context-difnet-50-noaspp", "", "44.7"),
    ("DifNet-50, ASPP", "context-difnet-50", "", "45.1"),
    ("COCO, to start from", "coco-deeplab-101-msc", "", "none"),
    ("COCO, to start from, ASPP", "coco-deeplab-101-msc-aspp", "", "none"),
]  # fmt: skip


def parameters(name: str) -> int:
    config = resolve({"data_path": "DIR"}, FOLDER / f"{name}.yaml")
    with torch.device("meta"):
        model = engine.build_model(config, CLASSES[config.dataset])
    return sum(parameter.numel() for parameter in model.parameters())


def main():
    counts = {name: parameters(name) for name in dict.fromkeys(name for _, name, _, _ in SYSTEMS)}
    print("| row of the paper | configuration | scored with | parameters | mIoU in the paper | mIoU here |")
    print("| --- | --- | --- | ---: | ---: | ---: |")
    for row, name, scored, miou in SYSTEMS:
        print(f"| {row} | `{name}` | {scored} | {counts[name]:,} | {miou} | not trained |")
    ratio = counts["voc-difnet-50"] / counts["voc-sim-deeplab-101"]
    print(f"\nDifNet-50 has {ratio:.3f} times the parameters of Sim-DeepLab-101.")


if __name__ == "__main__":
    main()
