"""Score a checkpoint on a split: `python -m segmentation.evaluate --checkpoint FILE --split val`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from segmentation import commandline
from segmentation.errors import UsageError
from segmentation.files import told

if TYPE_CHECKING:
    from segmentation.boundary import BoundaryIoU, Trimap
    from segmentation.fragments import Fragmentation
    from segmentation.metrics import Scores

TOLD_BANDS = (1, 2, 5, 10, 20, 40)
"""Widths in pixels whose trimap mIoU is printed; trimap.csv has all."""


def evaluate(
    checkpoint: Path,
    split: str = "val",
    data_path: str | None = None,
    out: Path | None = None,
    panel: int = 0,
    device: str = "auto",
    threads: int = 0,
    limit_batches: int | None = None,
    workers: int = 0,
    scales: Sequence[float] | None = None,
    flip: bool = False,
    fusion: Literal["max", "mean"] = "max",
    boundary: bool = False,
    crf: Literal["none", "builtin", "pydensecrf2"] = "none",
) -> Scores:
    """Score a checkpoint with one confusion matrix over a split, at the images' own sizes, void ignored.

    What is kept while scoring does not grow with the split.

    Args:
        checkpoint: weights written by segmentation.train; they say of what model and data they are.
        split: list of the images to score.
        data_path: the data, where they lie elsewhere than in training.
        out: folder for metrics.json, per_class.csv, confusion.npy, and as asked for trimap.csv and panel.png;
            None writes nothing.
        panel: images to draw, evenly spread over the split; needs `out`.
        device: "auto", "cpu" or "cuda".
        threads: of torch on the CPU; 0 leaves the choice to torch.
        limit_batches: score only so many images, evenly spread over the split.
        workers: processes that load data; 0 loads in this one.
        scales: factors on the images' sides; the model sees each image at each. None is scale 1, or for
            a model trained with msc the scales of its training.
        flip: see images mirrored too, at each scale.
        fusion: of the views' logits, "max" or "mean".
        boundary: measure borders (trimap, boundary IoU) and fragmentation too.
        crf: what refines the probabilities before they are scored: "none", or a backend of `crf.DenseCRF`.

    Returns:
        The scores.

    Raises:
        UsageError: what was asked for cannot be done.
    """
    # These take seconds to import; --help and a mistyped flag do not wait for them.
    import numpy as np
    import torch

    from segmentation import rundir
    from segmentation.boundary import BoundaryIoU, Trimap
    from segmentation.crf import DenseCRF
    from segmentation.data import loader
    from segmentation.data.transforms import denormalise
    from segmentation.figures.panel import panel as draw_panel
    from segmentation.fragments import Fragments
    from segmentation.inference import load_model, scored_dataset, views_for
    from segmentation.metrics import ConfusionMatrix

    if panel and out is None:
        raise UsageError("--panel needs --out: the folder to write panel.png into")
    refine = None if crf == "none" else DenseCRF(backend=crf)
    if threads:
        torch.set_num_threads(threads)
    model, about = load_model(checkpoint, device)
    views = views_for(about.config, scales, flip, fusion)
    dataset = scored_dataset(about, checkpoint, split, data_path)
    config, classes = about.config, dataset.classes

    if out is not None:
        # Before the scoring, which may take hours.
        with told(out):
            out.mkdir(parents=True, exist_ok=True)

    place = next(model.parameters()).device
    matrix = ConfusionMatrix(len(classes), place)
    trimap, inner, fragments = Trimap(len(classes)), BoundaryIoU(len(classes)), Fragments(len(classes))
    for image, label in loader.evaluation_loader(loader.Evaluated(dataset), workers, limit_batches):
        height, width = label.shape[-2:]
        unpadded = image[..., :height, :width].to(place)
        found = views.logits(model, unpadded, dataset.eval_size)
        if refine is not None:
            found = refine(found[0], denormalise(unpadded[0])).unsqueeze(0)
        prediction = found.argmax(1)
        matrix.update(prediction, label.to(place))
        if boundary:
            for measure in (trimap, inner, fragments):
                measure.update(prediction[0].cpu().numpy(), label[0].numpy())
    scores = matrix.compute()

    images = len(dataset) if limit_batches is None else min(limit_batches, len(dataset))
    protocol = (
        f"{config.dataset} {split}, {images} of {len(dataset)} images at their own sizes, padded to "
        f"{dataset.eval_size} times the scale or the next 8k+1; {views}"
        f"{', as the model was trained' if config.msc and scales is None else ''}; CRF {refine or 'none'}; "
        f"labels {dataset.label_source}; void ignored; one confusion matrix over all pixels"
    )
    rows = rundir.class_rows(about.step, scores, classes)
    numbers: dict[str, Any] = {
        "checkpoint": str(checkpoint), "step": about.step, "protocol": protocol, "classes": list(classes),
        "weights_sha256": about.weights_sha256,
        "valid_pixels": int(scores.truth.sum()), "miou": scores.miou, "majority_miou": scores.majority_miou,
        "pixel_accuracy": scores.pixel_accuracy, "mean_accuracy": scores.mean_accuracy,
        "fw_iou": scores.fw_iou,
    }  # fmt: skip
    print(f"{checkpoint}: {config.model} on {config.networks}, step {about.step}")
    print(f"protocol: {protocol}")
    print(scores.table(classes))
    print(
        f"mIoU {100 * scores.miou:.2f}, {scores.miou / scores.majority_miou:.1f} times the majority class's "
        f"{100 * scores.majority_miou:.2f}"
    )
    if config.dataset == "context":
        numbers |= {"miou_60": scores.miou, "miou_59": scores.foreground_miou}
        print(
            f"mIoU-60 {100 * scores.miou:.2f} (with background), mIoU-59 {100 * scores.foreground_miou:.2f} "
            "(pixels of background left out)"
        )
    if boundary:
        scattered = fragments.compute()
        numbers |= border_numbers(trimap, inner, scattered)
        for row, iou in zip(rows, inner.iou, strict=True):
            row["boundary_iou"] = float(iou)
        for name, values in scattered.per_class().items():
            for row, value in zip(rows, values, strict=True):
                row[name] = float(value)
        print(_border_lines(trimap, inner, scattered))

    if out is not None:
        written = ["confusion.npy", "metrics.json", "per_class.csv"]
        with told(out):
            rundir.write_rows(out / "per_class.csv", rows)
            np.save(out / "confusion.npy", scores.confusion)
            # JSON knows no nan.
            known = {key: None if value != value else value for key, value in numbers.items()}
            (out / "metrics.json").write_text(json.dumps(known, indent=2) + "\n")
            if boundary:
                rundir.write_rows(out / "trimap.csv", _trimap_rows(trimap))
                written.append("trimap.csv")
            if panel:
                draw_panel(model, dataset, loader.spread(len(dataset), panel), out / "panel.png")
                written.append("panel.png")
        print(f"wrote {', '.join(str(out / name) for name in written)}")
    return scores


def _trimap_rows(trimap: Trimap) -> list[dict[str, Any]]:
    """Rows of trimap.csv, one for each width of the band in pixels."""
    return [
        {
            "band": width, "miou": scores.miou, "pixel_accuracy": scores.pixel_accuracy,
            "pixels": int(scores.truth.sum()),
        }
        for width, scores in enumerate(trimap.curve(), start=1)
    ]  # fmt: skip


def border_numbers(trimap: Trimap, inner: BoundaryIoU, scattered: Fragmentation) -> dict[str, float]:
    """How close predictions keep to the truth's borders and how scattered they are, by name."""
    curve = trimap.curve()
    told = {f"trimap_miou_{width}": curve[width - 1].miou for width in TOLD_BANDS}
    return told | {"boundary_iou": inner.miou} | scattered.overall()


def _border_lines(trimap: Trimap, inner: BoundaryIoU, scattered: Fragmentation) -> str:
    """What is printed of borders and fragmentation."""
    curve, overall = trimap.curve(), scattered.overall()
    return "\n".join(
        [
            "mIoU within so many pixels of the truth's borders: "
            + ", ".join(f"{width} px {100 * curve[width - 1].miou:.2f}" for width in TOLD_BANDS),
            f"boundary IoU {100 * inner.miou:.2f} (inner bands of 2 % of the diagonal)",
            f"components beyond the truth's, per image and predicted class: "
            f"{overall['extra_components']:+.2f}, absolute {overall['extra_components_abs']:.2f}",
            f"pixels in components below 0.1 % of the image: {100 * overall['tiny_share']:.2f} % "
            f"(truth {100 * overall['truth_tiny_share']:.2f} %)",
            f"length of the borders: {overall['border_ratio']:.2f} times the truth's",
        ]
    )


def main(
    checkpoint: commandline.Checkpoint,
    split: Annotated[str, typer.Option(help="List of the images to score.")] = "val",
    data_path: Annotated[
        str | None, typer.Option(help="Folder of the data, where it is not the one trained on.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for metrics.json, per_class.csv, confusion.npy, trimap.csv and panel.png."),
    ] = None,
    scales: commandline.Scales = None,
    flip: commandline.Flip = False,
    fusion: commandline.Fusion = "max",
    boundary: Annotated[
        bool,
        typer.Option("--boundary", help="Measure borders (trimap, boundary IoU) and fragmentation too."),
    ] = False,
    crf: commandline.CRF = "none",
    panel: Annotated[int, typer.Option(help="Images to draw, spread evenly over the split.", min=0)] = 0,
    workers: Annotated[
        int,
        typer.Option(
            help="Processes that load data; 0 loads in this one.", min=0, show_default="4, at most one a core"
        ),
    ] = min(4, os.cpu_count() or 1),
    device: commandline.Device = "auto",
    threads: commandline.Threads = 0,
    limit_batches: Annotated[
        int | None, typer.Option(help="Score only so many images, spread evenly over the split.", min=1)
    ] = None,
) -> None:
    """Score a checkpoint: one confusion matrix over the split at original size, void ignored."""
    evaluate(
        checkpoint, split, data_path, out, panel, device, threads, limit_batches,
        workers=workers, scales=scales, flip=flip, fusion=fusion, boundary=boundary, crf=crf,
    )  # fmt: skip


def run_command_line() -> None:
    """Parse the arguments and run; faults of the user end in one line and exit code 2."""
    commandline.run(main)


if __name__ == "__main__":
    run_command_line()
