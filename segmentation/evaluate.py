"""Score a checkpoint on a split: `python -m segmentation.evaluate --checkpoint FILE --split val`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from segmentation.errors import UsageError, told_in_one_line

if TYPE_CHECKING:
    from segmentation.metrics import Scores


def evaluate(
    checkpoint: Path,
    split: str = "val",
    data_path: str | None = None,
    out: Path | None = None,
    panel: int = 0,
    device: str = "auto",
    threads: int = 0,
    limit_batches: int | None = None,
) -> Scores:
    """Score a checkpoint with one confusion matrix over a split, at the images' own sizes, void ignored.

    Args:
        checkpoint: weights written by segmentation.train; they say of what model and data they are.
        split: list of the images to score.
        data_path: the data, where they lie elsewhere than in training.
        out: folder for per_class.csv, confusion.npy, metrics.json and panel.png; None writes nothing.
        panel: images to draw, evenly spread over the split; needs `out`.
        device: "auto", "cpu" or "cuda".
        threads: of torch on the CPU; 0 leaves the choice to torch.
        limit_batches: score only so many images, evenly spread over the split.

    Returns:
        The scores.

    Raises:
        UsageError: what was asked for cannot be done.
    """
    # These take seconds to import; --help and a mistyped flag do not wait for them.
    import numpy as np
    import torch

    from segmentation import engine, figures, rundir
    from segmentation.checkpoint import load_into, load_weights
    from segmentation.data import loader

    if panel and out is None:
        raise UsageError("--panel needs --out: the folder to write panel.png into")
    weights, description = load_weights(checkpoint)
    config = description.config
    if data_path is not None:
        config = dataclasses.replace(config, data_path=data_path)
    if threads:
        torch.set_num_threads(threads)
    dataset = engine.build_dataset(config, split)
    if dataset.classes != description.classes:
        raise UsageError(
            f"{checkpoint} knows {len(description.classes)} classes "
            f"({', '.join(description.classes[:4])}, ...), "
            f"the data has {len(dataset.classes)} ({', '.join(dataset.classes[:4])}, ...): "
            "give --data-path the data it was trained for"
        )
    model = engine.build_model(config, len(dataset.classes))
    load_into(model, weights, checkpoint)
    model.to(engine.pick_device(device)).eval()

    scores = engine.evaluate(
        model, loader.evaluation_loader(loader.Evaluated(dataset), 0, limit_batches), len(dataset.classes)
    )
    assert scores is not None  # nothing interrupts it here
    images = len(dataset) if limit_batches is None else min(limit_batches, len(dataset))
    protocol = (
        f"{config.dataset} {split}, {images} of {len(dataset)} images at their own sizes, "
        f"padded to {dataset.eval_size} or the next 8k+1, one scale, no flip, no CRF, void ignored, "
        "one confusion matrix over all pixels"
    )
    print(f"{checkpoint}: {config.model} on {config.backbone}, step {description.step}")
    print(protocol)
    print(scores.table(dataset.classes))
    print(
        f"mIoU {100 * scores.miou:.2f}, {scores.miou / scores.majority_miou:.1f} times the majority class's "
        f"{100 * scores.majority_miou:.2f}"
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        rundir.write_rows(out / "per_class.csv", rundir.class_rows(description.step, scores, dataset.classes))
        np.save(out / "confusion.npy", scores.confusion)
        numbers = {
            "checkpoint": str(checkpoint), "step": description.step, "protocol": protocol,
            "classes": list(dataset.classes), "valid_pixels": int(scores.truth.sum()),
            "miou": scores.miou, "majority_miou": scores.majority_miou,
            "pixel_accuracy": scores.pixel_accuracy, "mean_accuracy": scores.mean_accuracy,
            "fw_iou": scores.fw_iou,
        }  # fmt: skip
        (out / "metrics.json").write_text(json.dumps(numbers, indent=2) + "\n")
        if panel:
            figures.panel(model, dataset, loader.spread(len(dataset), panel), out / "panel.png")
        print(f"wrote {', '.join(str(file) for file in sorted(out.iterdir()))}")
    return scores


def main(
    checkpoint: Annotated[Path, typer.Option(help="best.safetensors or last.safetensors of a run.")],
    split: Annotated[str, typer.Option(help="List of the images to score.")] = "val",
    data_path: Annotated[
        str | None, typer.Option(help="Folder of the data, where it is not the one trained on.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for per_class.csv, confusion.npy, metrics.json and panel.png.")
    ] = None,
    panel: Annotated[int, typer.Option(help="Images to draw, spread evenly over the split.", min=0)] = 0,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")] = "auto",
    threads: Annotated[
        int, typer.Option(help="Threads of torch on the CPU; 0 leaves it to torch.", min=0)
    ] = 0,
    limit_batches: Annotated[
        int | None, typer.Option(help="Score only so many images, spread evenly over the split.", min=1)
    ] = None,
) -> None:
    """Score a checkpoint: one confusion matrix over the split at original size, void ignored."""
    evaluate(checkpoint, split, data_path, out, panel, device, threads, limit_batches)


def run_command_line() -> None:
    """Parse the arguments and run; faults of the user end in one line and exit code 2."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(main)
    with told_in_one_line():
        app()


if __name__ == "__main__":
    run_command_line()
