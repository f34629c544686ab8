"""Draw what a model does: `python -m segmentation.figures maps --checkpoint FILE [IMAGE|ID...]`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from segmentation import commandline
from segmentation.errors import UsageError

if TYPE_CHECKING:
    from segmentation.engine import Model
    from segmentation.figures.inputs import Study

Images = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[IMAGE|ID...]",
        help="Files, or IDs of images in the data the checkpoint was trained on; these have a truth. None "
        "takes --count of them.",
        show_default=False,
    ),
]
Count = Annotated[
    int, typer.Option(help="Images to take where none are named, spread evenly over the split.", min=1)
]
Split = Annotated[str, typer.Option(help="List of the data set that IDs are looked up in.")]
DataPath = Annotated[str | None, typer.Option(help="Folder of the data, where it is not the one trained on.")]
MaxSize = Annotated[int, typer.Option(help="Longest side of a file's image in pixels.", min=1)]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder to write into.", show_default="figures beside the checkpoint"),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier call wrote.")]


def maps(
    checkpoint: commandline.Checkpoint,
    images: Images = None,
    count: Count = 6,
    split: Split = "val",
    data_path: DataPath = None,
    max_size: MaxSize = 2048,
    out: Out = None,
    overwrite: Overwrite = False,
    device: commandline.Device = "auto",
    threads: commandline.Threads = 0,
) -> None:
    """Figure 2: image, truth, largest class of the score, influence and importance."""
    study = _study(checkpoint, images, count, split, data_path, max_size, device, threads)
    from segmentation.figures.maps import draw_maps

    _tell(draw_maps(study, _folder(out, checkpoint), overwrite))


def transitions(
    checkpoint: commandline.Checkpoint,
    images: Images = None,
    pixels: Annotated[
        list[str] | None,
        typer.Option(
            "--pixels",
            metavar="X,Y ...",
            help="Columns and rows of pixels to walk from, in every image, as in --pixels 30,40 200,90.",
            show_default="up to 3 an image, deep inside its largest objects and its background",
        ),
    ] = None,
    count: Count = 3,
    split: Split = "val",
    data_path: DataPath = None,
    max_size: MaxSize = 2048,
    out: Out = None,
    overwrite: Overwrite = False,
    device: commandline.Device = "auto",
    threads: commandline.Threads = 0,
) -> None:
    """Figure 3: rows of every P_t on the image, and what they go by."""
    places = [_place(text) for text in pixels or ()]
    study = _study(checkpoint, images, count, split, data_path, max_size, device, threads)
    from segmentation.figures.transitions import draw_transitions, table_of_transitions

    written, rows = draw_transitions(study, _folder(out, checkpoint), places, overwrite)
    print(table_of_transitions(rows))
    _tell(written)


def walks(
    checkpoint: commandline.Checkpoint,
    images: Images = None,
    count: Count = 6,
    drawn: Annotated[int, typer.Option(help="Of the images, so many are drawn; all count.", min=1)] = 6,
    split: Split = "val",
    data_path: DataPath = None,
    max_size: MaxSize = 2048,
    out: Out = None,
    overwrite: Overwrite = False,
    device: commandline.Device = "auto",
    threads: commandline.Threads = 0,
) -> None:
    """Figure 4: the seed and what comes after each walk, with mIoU, trimap mIoU and fragmentation of each."""
    study = _study(checkpoint, images, count, split, data_path, max_size, device, threads)
    from segmentation.figures.walks import draw_walks, table_of_walks

    written, rows = draw_walks(study, _folder(out, checkpoint), overwrite, drawn)
    known, seen = rows[0]["with_truth"], rows[0]["images"]
    print(table_of_walks(rows))
    if not known:
        print("no truth is known for these images: scores are left out (IDs of a data set have a truth)")
    elif known < seen:
        print(f"scores are those of the {known} of {seen} images whose truth is known")
    _tell(written)


def coefficients(checkpoint: commandline.Checkpoint, out: Out = None, overwrite: Overwrite = False) -> None:
    """Table 3: µ and β of every walk, over training (metrics.csv beside the checkpoint) and at its end."""
    from segmentation.figures.coefficients import draw_coefficients, table_of_coefficients
    from segmentation.figures.inputs import load_difnet

    model, about = load_difnet(checkpoint)
    written, rows = draw_coefficients(model, about, checkpoint, _folder(out, checkpoint), overwrite)
    print(f"{checkpoint}, step {about.step}")
    print(table_of_coefficients(rows))
    if not (checkpoint.parent / "metrics.csv").is_file():
        print(f"no metrics.csv beside {checkpoint}: only its own values are drawn")
    _tell(written)


def timing(
    checkpoint: Annotated[
        Path | None, typer.Option(help="Time this model, best.safetensors or last.safetensors of a run.")
    ] = None,
    model: Annotated[
        Literal["difnet", "sim-deeplab"] | None,
        typer.Option(
            help="Time this one with random weights, beside the checkpoint's if that is given, too.",
            show_default="difnet and sim-deeplab",
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(help="Of --model.", show_default="resnet50, and resnet101 for sim-deeplab"),
    ] = None,
    image_size: Annotated[int, typer.Option(help="Side of the image in pixels.", min=33)] = 505,
    num_classes: Annotated[int, typer.Option(help="Classes of --model.", min=2)] = 21,
    rounds: Annotated[int, typer.Option(help="Passes of each model that count.", min=1)] = 7,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write into.", show_default="figures, beside the checkpoint if any"),
    ] = None,
    overwrite: Overwrite = False,
    device: commandline.Device = "auto",
    threads: commandline.Threads = 0,
) -> None:
    """Table 4: seconds of a forward pass by part, the median of several rounds, all models in turn."""
    import torch

    from segmentation.engine import pick_device
    from segmentation.figures.times import draw_timing, table_of_timing
    from segmentation.inference import load_model

    if backbone is not None and model is None:
        raise UsageError("--backbone is that of --model: give --model difnet or sim-deeplab, too")
    if threads:
        torch.set_num_threads(threads)
    models: dict[str, Model] = {}
    if checkpoint is not None:
        loaded, about = load_model(checkpoint, device)
        models[f"{about.config.model} {about.config.backbone} (checkpoint)"] = loaded
    both: tuple[tuple[str, str], ...] = (("difnet", "resnet50"), ("sim-deeplab", "resnet101"))
    for kind, usual in both:
        if model == kind or (model is None and checkpoint is None):
            network = backbone or usual
            models[f"{kind} {network}"] = _random(kind, network, num_classes).to(pick_device(device)).eval()
    folder = out or (Path("figures") if checkpoint is None else checkpoint.parent / "figures")
    written, rows = draw_timing(models, image_size, rounds, folder, overwrite)
    print(table_of_timing(rows))
    _tell(written)


def explore(
    image: Annotated[
        str,
        typer.Argument(metavar="IMAGE|ID", help="A file, or the ID of an image in the checkpoint's data."),
    ],
    checkpoint: commandline.Checkpoint,
    split: Split = "val",
    data_path: DataPath = None,
    max_size: MaxSize = 2048,
    out: Out = None,
    overwrite: Overwrite = False,
    device: commandline.Device = "auto",
    threads: commandline.Threads = 0,
) -> None:
    """One page for a browser: move over the image, and the rows of every P_t from there light up."""
    study = _study(checkpoint, [image], 1, split, data_path, max_size, device, threads)
    from segmentation.figures.explore import write_page

    page, apart = write_page(study, _folder(out, checkpoint), overwrite)
    print(f"rows computed in the page differ from the model's by at most {apart:.1e}")
    print(f"wrote {page} ({page.stat().st_size / 1e6:.1f} MB)")


def _study(
    checkpoint: Path,
    images: list[str] | None,
    count: int,
    split: str,
    data_path: str | None,
    max_size: int,
    device: str,
    threads: int,
) -> Study:
    # These take seconds to import; --help and a mistyped flag do not wait for them.
    import torch

    from segmentation.figures.inputs import Study

    if threads:
        torch.set_num_threads(threads)
    return Study(
        checkpoint, images or (), split=split, data_path=data_path, count=count, max_size=max_size,
        device=device,
    )  # fmt: skip


def _random(kind: str, backbone: str, num_classes: int) -> Model:
    """A model with random weights, as `segmentation.train` makes it."""
    from segmentation.config import resolve
    from segmentation.engine import build_model

    values: dict[str, Any] = {"model": kind, "backbone": backbone}
    return build_model(resolve(values, None), num_classes)


def _folder(out: Path | None, checkpoint: Path) -> Path:
    return out or checkpoint.parent / "figures"


def _place(text: str) -> tuple[int, int]:
    """x and y."""
    try:
        x, y = (int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--pixels {text}: expected column and row as X,Y, such as 30,40") from None
    return x, y


def _tell(written: list[Path]) -> None:
    for file in written:
        print(f"wrote {file}")


def run_command_line() -> None:
    """Parse the arguments and run; faults of the user end in one line and exit code 2."""
    commandline.run(maps, transitions, walks, coefficients, timing, explore)


if __name__ == "__main__":
    run_command_line()
