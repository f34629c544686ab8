"""Images a second: of loading a split for scoring by so many processes, and of scoring it.

`python benchmarks/loading.py --data-path DIR` with any folder that `--dataset voc` takes. Scoring is timed on
images loaded before, by a model with random weights, which takes as long as a trained one. Loading is the
limit where its row is the slower one.
"""

import argparse
import itertools
import os
import platform
import time

import torch

from segmentation.boundary import BoundaryIoU, Trimap
from segmentation.data.loader import Evaluated, evaluation_loader
from segmentation.data.voc import VOCDataset
from segmentation.fragments import Fragments
from segmentation.inference import Views
from segmentation.metrics import ConfusionMatrix
from segmentation.models import DifNet, SimDeepLab

MODELS = {"difnet": DifNet, "sim-deeplab": SimDeepLab}


def loaded_per_second(dataset, workers, images):
    """Of a loader that runs; its start, which a split pays once, is told apart, in seconds."""
    start = time.perf_counter()
    batches = iter(evaluation_loader(Evaluated(dataset), workers, images))
    next(batches)
    first = time.perf_counter()
    rest = sum(1 for _ in batches)
    return rest / (time.perf_counter() - first), first - start


def scored_per_second(model, samples, size, views, borders):
    device = next(model.parameters()).device
    classes = model.score.convs[0].out_channels
    matrix = ConfusionMatrix(classes, device)
    measures = (Trimap(classes), BoundaryIoU(classes), Fragments(classes)) if borders else ()

    def score(image, label):
        height, width = label.shape[-2:]
        prediction = views.logits(model, image[..., :height, :width].to(device), size).argmax(1)
        matrix.update(prediction, label.to(device))
        for measure in measures:
            measure.update(prediction[0].cpu().numpy(), label[0].numpy())

    score(*samples[0])
    matrix.compute()  # waits for the device
    start = time.perf_counter()
    for image, label in samples:
        score(image, label)
    matrix.compute()
    return len(samples) / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-path", required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--model", choices=MODELS, default="difnet")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scored", type=int, default=8, help="images to time the scoring on")
    options = parser.parse_args()
    dataset = VOCDataset(options.data_path, options.split)
    images = min(options.images, len(dataset))
    model = MODELS[options.model](options.backbone, len(dataset.classes)).to(options.device).eval()
    samples = list(itertools.islice(evaluation_loader(Evaluated(dataset), 0), options.scored))
    processor = platform.processor() or platform.machine()
    device = torch.cuda.get_device_name() if options.device == "cuda" else processor
    print(
        f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, scored on {device}, torch "
        f"{torch.__version__}; {images} images, {options.model} on {options.backbone}\n"
    )
    print("| what | images/s |")
    print("| --- | ---: |")
    for workers in (0, 1, 2, 4, 8):
        if workers <= (os.cpu_count() or 1):
            speed, start = loaded_per_second(dataset, workers, images)
            print(f"| loading, {workers} workers (the first after {start:.1f} s) | {speed:.1f} |")
    several = Views((0.5, 0.75, 1.0), flip=True)
    for name, views, borders in (
        ("scoring", Views(), False),
        ("scoring, --boundary", Views(), True),
        ("scoring, --scales 0.5 0.75 1.0 --flip", several, False),
    ):
        speed = scored_per_second(model, samples, dataset.eval_size, views, borders)
        print(f"| {name} | {speed:.2f} |")


if __name__ == "__main__":
    main()
