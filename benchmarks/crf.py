"""The dense CRF against pydensecrf2: time and difference on images of VOC; prints a Markdown table.

The first validation images of 500 by 375 pixels get scores of 21 classes as a network of stride 8 might
give them: the truth, coarse, with noise. Both refine the same scores by ten iterations with the same
parameters, in turn; preparation (both lattices) is counted, loading is not. The ratio is the median over
images and rounds of our time over pydensecrf2's in the same turn. A near-tie is a pixel whose two best
classes are within 0.01 of each other in pydensecrf2's answer.

    python benchmarks/crf.py --data-path VOCdevkit/VOC2012 [--images N] [--rounds N]

needs the extra [crf].
"""

import argparse
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from segmentation.crf import DenseCRF

CLASSES = 21
# Name and parameters: the defaults, and those of pydensecrf's own example.
SETTINGS = (
    ("67 px, 3 levels; 1 px", {}),
    ("80 px, 13 levels; 3 px", {"bilateral_sigma": 80.0, "colour_sigma": 13.0, "gaussian_sigma": 3.0}),
)


def samples(root: Path, count: int):
    names = (root / "ImageSets" / "Segmentation" / "val.txt").read_text().split()
    found = 0
    for name in names:
        picture = Image.open(root / "JPEGImages" / f"{name}.jpg")
        if picture.size == (500, 375) and found < count:
            found += 1
            image = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
            label = np.array(Image.open(root / "SegmentationClass" / f"{name}.png")).astype(np.int64)
            label[label >= CLASSES] = 0
            truth = F.one_hot(torch.from_numpy(label), CLASSES).permute(2, 0, 1)[None].float()
            coarse = 6 * F.interpolate(truth, scale_factor=1 / 8, mode="bilinear", antialias=True)
            coarse = coarse + torch.randn(coarse.shape, generator=torch.Generator().manual_seed(found))
            yield F.interpolate(coarse, label.shape, mode="bilinear")[0], image


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-path", type=Path, required=True, metavar="DIR", help="the folder VOC2012")
    parser.add_argument("--images", type=int, default=5, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of each image")
    options = parser.parse_args()
    images = list(samples(options.data_path, options.images))
    if not images:
        print(f"nothing measured: {options.data_path} has no val image of 500x375", file=sys.stderr)
        return
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, torch "
        f"{version('torch')}, pydensecrf2 {version('pydensecrf2')}; {len(images)} images of 500x375, "
        f"{CLASSES} classes, {options.rounds} rounds\n"
    )
    print(
        "| parameters | builtin, s | pydensecrf2, s | ratio | largest ΔQ | labels unlike | beyond near-ties |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, parameters in SETTINGS:
        ours, theirs = DenseCRF(**parameters), DenseCRF(**parameters, backend="pydensecrf2")
        seconds, largest, unlike, beyond = [], 0.0, 0, 0
        ours(*images[0])
        for logits, image in images:
            for _ in range(options.rounds):
                marks, answers = [time.perf_counter()], []
                for crf in (ours, theirs):
                    answers.append(crf(logits, image))
                    marks.append(time.perf_counter())
                seconds.append((marks[1] - marks[0], marks[2] - marks[1]))
            q, reference = answers
            largest = max(largest, float((q - reference).abs().max()))
            differs = q.argmax(0) != reference.argmax(0)
            best = reference.topk(2, 0).values
            unlike += int(differs.sum())
            beyond += int((differs & (best[0] - best[1] > 0.01)).sum())
        mine, peer = (statistics.median(column) for column in zip(*seconds, strict=True))
        ratio = statistics.median(a / b for a, b in seconds)
        print(f"| {name} | {mine:.2f} | {peer:.2f} | {ratio:.2f} | {largest:.0e} | {unlike} | {beyond} |")


if __name__ == "__main__":
    main()
