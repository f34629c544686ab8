"""Segment images: `python -m segmentation.predict --checkpoint FILE IMAGE|FOLDER... --out DIR`."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from segmentation import commandline
from segmentation.errors import UsageError, first_of
from segmentation.files import told

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Of the files that are taken for images in a folder."""

VOC_TEST_IMAGES = 1456
"""In VOC 2012's test list; the server wants all of them."""


def predict(
    checkpoint: Path,
    inputs: Sequence[Path],
    out: Path,
    overlay: bool = False,
    probabilities: bool = False,
    scales: Sequence[float] | None = None,
    flip: bool = False,
    fusion: Literal["max", "mean"] = "max",
    max_size: int = 2048,
    voc_submission: bool = False,
    device: str = "auto",
    threads: int = 0,
    crf: Literal["none", "builtin", "pydensecrf2"] = "none",
) -> list[Path]:
    """Segment images at their own sizes.

    `out` receives NAME.png (class indices with VOC's palette) for each image, and as asked for
    overlays/NAME.png, probabilities/NAME.npy (float16 [K, H, W]) and comp6_test_cls.tar.gz. Pixels are taken
    as they are stored: a rotation noted in EXIF is not carried out.

    Args:
        checkpoint: weights written by segmentation.train.
        inputs: image files, and folders, of which all images are taken (not of folders below).
        out: folder to write into; files in it under the same names are replaced.
        overlay: draw the classes over the image, too.
        probabilities: write the classes' probabilities, too.
        scales: factors on the images' sides; the model sees each image at each. None is scale 1, or for
            a model trained with msc the scales of its training.
        flip: see images mirrored too, at each scale.
        fusion: of the views' logits, "max" or "mean".
        max_size: pixels; images with a longer side are skipped.
        voc_submission: collect the results as the archive that VOC's evaluation server takes.
        device: "auto", "cpu" or "cuda".
        threads: of torch on the CPU; 0 leaves the choice to torch.
        crf: what refines the probabilities: "none", or a backend of `crf.DenseCRF`.

    Returns:
        The images that were skipped, each told of on stderr.

    Raises:
        UsageError: what was asked for cannot be done at all.
    """
    files = _files(inputs)
    names = _names(files, out)
    if voc_submission:
        _check_voc_ids(files)
    # These take seconds to import; --help and a mistyped path do not wait for them.
    import torch
    from tqdm import tqdm

    from segmentation import images
    from segmentation.crf import DenseCRF
    from segmentation.data.transforms import normalise
    from segmentation.data.voc import VOC_CLASSES
    from segmentation.inference import load_model, scored_size, views_for

    refine = None if crf == "none" else DenseCRF(backend=crf)
    if threads:
        torch.set_num_threads(threads)
    model, about = load_model(checkpoint, device)
    views = views_for(about.config, scales, flip, fusion)
    if voc_submission and about.classes != VOC_CLASSES:
        raise UsageError(
            f"--voc-submission: {checkpoint} knows {len(about.classes)} classes "
            f"({first_of(about.classes)}), the server wants VOC's 21 in their order: name a "
            "checkpoint trained on them"
        )
    place, size = next(model.parameters()).device, scored_size(about.config)
    sizes: dict[str, tuple[int, int]] = {}
    skipped: list[Path] = []
    for folder, asked in ((".", True), ("overlays", overlay), ("probabilities", probabilities)):
        if asked:
            with told(out / folder):
                (out / folder).mkdir(parents=True, exist_ok=True)
    # tqdm draws a bar on a terminal and nothing elsewhere.
    for file, name in zip(tqdm(files, unit="image", disable=None), names, strict=True):
        try:
            image = images.read_image(file, max_size)
        except UsageError as fault:
            tqdm.write(f"skipped: {fault}", file=sys.stderr)
            skipped.append(file)
            continue
        normalised = normalise()(image).as_subclass(torch.Tensor)
        logits = views.logits(model, normalised[None].to(place), size)[0]
        if refine is not None:
            # What is 0 in float32 still has a logarithm.
            logits = refine(logits, image.as_subclass(torch.Tensor)).clamp(min=1e-30).log()
        sizes[name] = images.write_result(out, name, image, logits, overlay, probabilities)
    done = f"{len(sizes)} of {len(files)} images segmented into {out}"
    if about.config.msc and scales is None:
        done += f" ({views}, as the model was trained)"
    if voc_submission and skipped:
        done += "; no archive, which needs all of them"
    elif voc_submission:
        archive = out / "comp6_test_cls.tar.gz"
        images.write_submission(archive, sizes)
        done += f"; {archive} holds them"
        if len(sizes) != VOC_TEST_IMAGES:
            done += f", but the server wants all {VOC_TEST_IMAGES} of VOC's test list"
    print(done)
    return skipped


def _files(inputs: Sequence[Path]) -> list[Path]:
    """The images that were named, and those in the folders that were."""
    found: list[Path] = []
    for given in inputs:
        if given.is_dir():
            inside = sorted(file for file in given.iterdir() if file.suffix.lower() in SUFFIXES)
            if not inside:
                raise UsageError(
                    f"{given} holds no images ({', '.join(SUFFIXES)}): name images, or the folder they lie in"
                )
            found += inside
        elif given.is_file():
            found.append(given)
        else:
            raise UsageError(f"{given}: no such file or folder; name images, or folders that hold them")
    return found


def _names(files: list[Path], out: Path) -> list[str]:
    """What the results of each image are called; no two may be alike, and none may replace an image."""
    first: dict[str, Path] = {}
    for file in files:
        other = first.setdefault(file.stem, file)
        if other != file or files.count(file) > 1:
            raise UsageError(
                f"{other} and {file} would both become {out / file.stem}.png: predict them into two folders"
            )
        if file.resolve() == (out / f"{file.stem}.png").resolve():
            raise UsageError(f"--out {out}: {file} would be replaced by its labels: name another folder")
    return list(first)


def _check_voc_ids(files: list[Path]) -> None:
    for file in files:
        if not re.fullmatch(r"\d{4}_\d{6}", file.stem):
            raise UsageError(
                f"--voc-submission: {file.stem!r} is no ID of a VOC image, such as 2008_000006: name the "
                "images of VOC's test list alone"
            )


def main(
    inputs: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE|FOLDER...", help="Images, and folders of which all images are taken."),
    ],
    checkpoint: commandline.Checkpoint,
    out: Annotated[Path, typer.Option(help="Folder to write into.")],
    overlay: Annotated[
        bool, typer.Option("--overlay", help="Draw the classes over the images, too, into OUT/overlays.")
    ] = False,
    probabilities: Annotated[
        bool,
        typer.Option("--probabilities", help="Write float16 [K, H, W], too, into OUT/probabilities/*.npy."),
    ] = False,
    scales: commandline.Scales = None,
    flip: commandline.Flip = False,
    fusion: commandline.Fusion = "max",
    crf: commandline.CRF = "none",
    max_size: Annotated[
        int, typer.Option(help="Longest side in pixels; larger images are skipped.", min=1)
    ] = 2048,
    voc_submission: Annotated[
        bool,
        typer.Option(
            "--voc-submission", help="Write the archive VOC's evaluation server takes (comp6), too."
        ),
    ] = False,
    device: commandline.Device = "auto",
    threads: commandline.Threads = 0,
) -> None:
    """Segment images: index PNGs with VOC's palette, each at its image's own size.

    Images that cannot be read are told of and skipped; the exit code is 1 then.
    """
    skipped = predict(
        checkpoint, inputs, out, overlay, probabilities, scales, flip, fusion, max_size, voc_submission,
        device, threads, crf,
    )  # fmt: skip
    if skipped:
        raise typer.Exit(1)


def run_command_line() -> None:
    """Parse the arguments and run; faults of the user end in one line and exit code 2."""
    commandline.run(main)


if __name__ == "__main__":
    run_command_line()
