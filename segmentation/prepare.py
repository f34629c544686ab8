"""Make labels and lists of data on your own disk: `python -m segmentation.prepare voc-aug --root DIR`.

Nothing is downloaded. What an interrupted run has written is kept, and never half a file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from segmentation.commandline import run
from segmentation.errors import UsageError


def main(
    dataset: Annotated[Literal["voc-aug", "context", "coco"], typer.Argument(help="What to prepare.")],
    root: Annotated[Path, typer.Option(help="Folder that holds the data, or the archives they come in.")],
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing: read all, list what is wrong, exit with 1 if so.")
    ] = False,
) -> None:
    """Make the labels and lists of a data set, or check them: counts, sizes, label values, class order."""
    # These take seconds to import; --help does not wait for them.
    from segmentation.data import coco, context, sbd

    if not root.is_dir():
        raise UsageError(f"--root {root}: no such folder; name the one that holds the data or its archives")
    source = {"voc-aug": sbd, "context": context, "coco": coco}[dataset]
    if not check:
        source.prepare(root, print)
        print(f"to read it all once: python -m segmentation.prepare {dataset} --root {root} --check")
        return
    faults = source.check(root, print)
    for fault in faults:
        print(f"wrong: {fault}")
    print(f"{len(faults)} to mend" if faults else "all is well")
    if faults:
        raise typer.Exit(1)


if __name__ == "__main__":
    run(main)
