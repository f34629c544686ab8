"""What the programs that use a checkpoint share on their command lines."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from segmentation.errors import told_in_one_line

Checkpoint = Annotated[Path, typer.Option(help="best.safetensors or last.safetensors of a run.")]
Scales = Annotated[
    list[float] | None,
    typer.Option(
        "--scales",
        metavar="FACTOR ...",
        help="Factors on the image's sides; the model sees it at each, as in --scales 0.5 0.75 1.0.",
        show_default="1; 0.5 0.75 1 if trained with --msc",
    ),
]
Flip = Annotated[bool, typer.Option("--flip", help="See the image mirrored too, at each scale.")]
Fusion = Annotated[
    Literal["max", "mean"],
    typer.Option(help="Of the logits of several views: the largest (as DeepLabV2) or their mean."),
]
CRF = Annotated[
    Literal["none", "builtin", "pydensecrf2"],
    typer.Option(
        "--crf", help="Dense CRF on the full-size probabilities; pydensecrf2 needs the extra [crf]."
    ),
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")]
Threads = Annotated[int, typer.Option(help="Threads of torch on the CPU; 0 leaves it to torch.", min=0)]


# Options that take several values, and the form of those.
_MANY = {"--scales": re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?|nan|inf"), "--pixels": re.compile(r"-?\d+,-?\d+")}


def run(*commands: Callable[..., Any]) -> None:
    """Parse the arguments and run; faults of the user end in one line and exit code 2.

    Several commands are told apart by the first argument, their names.
    """
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    for command in commands:
        app.command()(command)
    arguments = sys.argv[1:]
    for option in _MANY:
        arguments = _one_value_each(arguments, option)
    with told_in_one_line():
        app(args=arguments)


def _one_value_each(arguments: list[str], option: str) -> list[str]:
    """Write `option` before each of the values that follow it, as typer wants an option with many values."""
    spread: list[str] = []
    among_values = False
    for argument in arguments:
        is_value = among_values and _MANY[option].fullmatch(argument) is not None
        if is_value and spread[-1] != option:
            spread.append(option)
        spread.append(argument)
        among_values = is_value or argument == option
    return spread
