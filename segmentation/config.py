"""Every option of a training run, once: its type, its help, its default, its place on the command line.

A value comes from the recipe (configs/*.yaml), is overridden by the file given as --config, and that by
flags. The merged result is saved with the run as config.yaml, which --config accepts again.
"""

import copy
import dataclasses
import difflib
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
import yaml

from segmentation.errors import UsageError

RECIPES = {"shapes": "shapes", "voc": "paper", "voc-aug": "paper", "context": "paper", "coco": "paper"}
"""Each data set's recipe unless another is asked for: a file of the folder configs without its suffix."""

_CHOICES = ("paper", "modern")
"""What --recipe may say; shapes has its own."""

_OF_WALKS = ("walks", "affinity_scale", "transitions")
"""Options of no use where nothing walks."""

_OF_DATASET = {"voc-aug": {"train_split": "trainaug"}}
"""Values that belong to a data set, whatever its recipe."""


def _option(help_text: str, low: float | None = None, high: float | None = None) -> Any:
    # The help text shows the default: typer knows only None, which tells an absent flag from a given one.
    return typer.Option(help=help_text, min=low, max=high, show_default=False)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A training run. Fields without a default take it from the data set's recipe."""

    dataset: Annotated[
        Literal["shapes", "voc", "voc-aug", "context", "coco"],
        _option("Built-in generated shapes, a VOC-layout folder, or what segmentation.prepare made."),
    ] = "shapes"
    data_path: Annotated[
        str | None,
        _option(
            "Folder that holds JPEGImages (coco: train2017), its parent or its grandparent; needed with all "
            "but shapes."
        ),
    ] = None
    recipe: Annotated[
        Literal["paper", "modern"] | None,
        _option("The paper's training, or today's customs. [default: paper; shapes has its own]"),
    ] = None
    train_split: Annotated[str, _option("List of the images to train on; with voc-aug, trainaug.")] = "train"
    val_split: Annotated[str, _option("List of the images to score.")] = "val"

    model: Annotated[
        Literal["difnet", "sim-deeplab"], _option("DifNet, or the baseline without diffusion.")
    ] = "difnet"
    backbone: Annotated[
        str, _option("Network of each branch: any of timm's that gives features at output stride 8.")
    ]
    similarity_backbone: Annotated[
        str | None, _option("Another one for the similarity branch. [default: --backbone]")
    ] = None
    seed_model: Annotated[
        Literal[
            "fcn_resnet50",
            "fcn_resnet101",
            "deeplabv3_resnet50",
            "deeplabv3_resnet101",
            "deeplabv3_mobilenet_v3_large",
            "lraspp_mobilenet_v3_large",
        ]
        | None,
        _option(
            "A network of torchvision's as DifNet's seed branch, in place of --backbone with ASPP; its "
            "weights are the first of --weights-backbone FILE,FILE."
        ),
    ] = None
    weights_backbone: Annotated[
        str,
        _option(
            "File of ImageNet weights (.pth or .safetensors, torchvision's or timm's names; FILE,FILE for "
            "two backbones), 'none' to start from random weights, or 'hub' to fetch timm's; needed "
            "with data of one's own."
        ),
    ]
    init_from: Annotated[
        str | None,
        _option(
            "Weights of another run (best.safetensors) to start from, in place of --weights-backbone; "
            "classifiers of another size start fresh."
        ),
    ] = None
    aspp: Annotated[bool, _option("ASPP, or one plain 3x3 convolution, on the seed branch.")] = True
    walks: Annotated[
        tuple[int, ...], _option("Which walks to take: 0 on the image, 1 to 4 on layer1 to layer4.")
    ] = (0, 1, 2, 3, 4)
    grid_stride: Annotated[int, _option("Pixels between the nodes of the walks' grid.", low=1)] = 8
    affinity_scale: Annotated[
        float, _option("Factor on the inner products of the walks' embeddings; the paper's is 1.", low=0)
    ] = 1.0
    diffusion: Annotated[
        Literal["cascade", "exact", "none"],
        _option(
            "The paper's cascade of walks, one exact diffusion on the embeddings of all --walks together, or "
            "none: the seed is upsampled as it is."
        ),
    ] = "cascade"
    transitions: Annotated[
        Literal["hierarchical", "last"],
        _option("A P for each walk of the cascade, or for all the one of the last of --walks."),
    ] = "hierarchical"
    fixed_mu: Annotated[
        float | None, _option("Value to fix every µ at, instead of learning it.", low=0, high=1)
    ] = None
    fixed_beta: Annotated[
        float | None,
        _option(
            "Value to fix every β at, instead of learning it; 1 leaves the identity mapping out.",
            low=0,
            high=1,
        ),
    ] = None
    importance: Annotated[bool, _option("Weight the score by the importance M; without, s = x.")] = True

    output_dir: Annotated[
        str | None, _option("Folder of the run. [default: runs/DATASET-MODEL-BACKBONE]")
    ] = None
    epochs: Annotated[int | None, _option("Length of the run in epochs.", low=1)] = None
    max_steps: Annotated[int | None, _option("Length of the run in steps, in place of --epochs.", low=1)] = (
        None
    )
    batch_size: Annotated[int, _option("Images in a step, of all processes together.", low=1)]
    grad_accum_steps: Annotated[
        int, _option("Pieces that each process cuts its part of a step into, to save memory.", low=1)
    ] = 1
    lr: Annotated[float, _option("Base learning rate, of pretrained parts.", low=0)]
    head_lr_mult: Annotated[
        float, _option("Times --lr: the rate of parts that start fresh, µ and β included.", low=0)
    ]
    power: Annotated[float, _option("Of the schedule: rate x (1 - step/steps)^power.", low=0)]
    momentum: Annotated[float, _option("Of SGD.", low=0, high=1)]
    weight_decay: Annotated[float, _option("Not applied to batch norm, µ and β.", low=0)]
    crop_size: Annotated[int, _option("Side of training crops in pixels, best of the form 8k+1.", low=1)]
    scale: Annotated[tuple[float, float], _option("Range of the random scale in training.")]

    msc: Annotated[
        bool,
        _option(
            "Multi-scale training as in DeepLabV2: a loss at scales 1, 0.75 and 0.5 and one at their "
            "maximum, summed; scored by the maximum."
        ),
    ] = False
    bn: Annotated[
        Literal["train", "sync", "frozen"],
        _option(
            "Batch norm: statistics of each process's own images, of all processes' images (GPUs only), or, "
            "in what starts from pretrained weights, as they were."
        ),
    ] = "train"
    ema_decay: Annotated[
        float,
        _option("Of an average of the weights, which is then scored and saved; 0 keeps none.", low=0, high=1),
    ] = 0.0
    precision: Annotated[
        Literal["32", "bf16", "16"],
        _option("Bits of training's convolutions; walks and scoring stay at 32. 16 is for GPUs."),
    ] = "32"
    channels_last: Annotated[bool, _option("Memory layout that suits convolutions on many devices.")] = False
    compile: Annotated[
        bool, _option("Compile the network (torch.compile): slower to start, then faster.")
    ] = False
    deterministic: Annotated[bool, _option("Only algorithms that give the same bits each time.")] = False

    seed: Annotated[int, _option("Of initial weights, order and augmentation.", low=0)] = 0
    workers: Annotated[int, _option("Processes that load data; 0 loads in the training process.", low=0)] = 0
    threads: Annotated[int, _option("Threads of torch on the CPU; 0 leaves the choice to torch.", low=0)] = 0
    device: Annotated[Literal["auto", "cpu", "cuda"], _option("Where to compute.")] = "auto"
    eval_every: Annotated[int, _option("Steps between evaluations, each followed by a checkpoint.", low=1)]
    checkpoint_every: Annotated[int, _option("Steps between checkpoints to resume from.", low=1)] = 200
    keep: Annotated[
        int,
        _option(
            "Checkpoints to resume from that are kept: last.ckpt and, as step-N.ckpt, earlier ones.", low=1
        ),
    ] = 2
    log_every: Annotated[
        int, _option("Steps between lines of progress where there is no terminal.", low=1)
    ] = 20
    limit_train_batches: Annotated[int | None, _option("End each epoch after so many batches.", low=1)] = None
    limit_val_batches: Annotated[
        int | None, _option("Score only so many images, spread evenly over the split.", low=1)
    ] = None

    def __post_init__(self) -> None:
        """Refuse what single values cannot show."""
        if self.dataset != "shapes" and self.data_path is None:
            held = "train2017" if self.dataset == "coco" else "JPEGImages"
            raise UsageError(f"--dataset {self.dataset} needs --data-path: the folder that holds {held}")
        if self.dataset == "shapes" and self.data_path is not None:
            raise UsageError(
                "--data-path has no use with --dataset shapes, which is generated: pass --dataset voc"
            )
        if (self.epochs is None) == (self.max_steps is None):
            raise UsageError("the length of the run must be given once: as --epochs or as --max-steps")
        if self.batch_size % self.grad_accum_steps:
            raise UsageError(
                f"--batch-size {self.batch_size} cannot be cut into --grad-accum-steps "
                f"{self.grad_accum_steps} equal pieces: give a multiple"
            )
        if self.ema_decay == 1:
            raise UsageError("--ema-decay 1 would never leave the first weights: give less, such as 0.999")
        if self.init_from is not None and self.weights_backbone != "none":
            raise UsageError(
                f"--init-from {self.init_from} and --weights-backbone {self.weights_backbone} both give the "
                "weights to start from: give one of them"
            )
        if self.similarity_backbone is not None and self.model == "sim-deeplab":
            raise UsageError("--similarity-backbone belongs to --model difnet: sim-deeplab has one branch")
        self._check_diffusion()
        if not 0 < self.affinity_scale < math.inf:
            raise UsageError(
                f"--affinity-scale {self.affinity_scale} would make all pixels alike: give a factor > 0"
            )
        if self.seed_model is not None and self.model == "sim-deeplab":
            raise UsageError(
                f"--seed-model belongs to --model difnet: for {self.seed_model} alone pass --diffusion none "
                "--no-importance"
            )
        if self.seed_model is not None and self.branches[0][1] == "hub":
            raise UsageError(
                f"--weights-backbone hub: timm has no {self.seed_model}; name a file of torchvision's "
                "weights, or none, as in --weights-backbone none,hub"
            )
        if not 0 < self.scale[0] <= self.scale[1]:
            raise UsageError(
                f"--scale {self.scale[0]} {self.scale[1]}: expected two factors, 0 < low <= high"
            )
        if not self.walks or list(self.walks) != sorted(set(self.walks) & set(range(5))):
            raise UsageError(
                f"--walks {','.join(str(w) for w in self.walks)}: expected distinct numbers from 0 to 4 "
                "in rising order, such as 0,2,4"
            )

    def _check_diffusion(self) -> None:
        """Refuse what the chosen diffusion has no use for."""
        if self.transitions == "last" and self.diffusion != "cascade":
            raise UsageError(
                f"--transitions last belongs to --diffusion cascade: {self.diffusion} has no steps to share "
                "a P; for one exact diffusion on layer4 alone pass --diffusion exact --walks 4"
            )
        if self.fixed_beta is not None and self.diffusion != "cascade":
            raise UsageError(f"--fixed-beta belongs to --diffusion cascade: {self.diffusion} has no β")
        if self.fixed_mu is not None and self.diffusion == "none":
            raise UsageError("--fixed-mu belongs to --diffusion cascade or exact: none has no µ")
        if self.similarity_backbone is not None and self.diffusion == "none":
            raise UsageError(
                "--similarity-backbone belongs to --diffusion cascade or exact: none has no similarity branch"
            )
        if self.fixed_mu == 1:
            raise UsageError("--fixed-mu 1 would forget the seed: give less, such as 0.9")
        if 0 in (self.fixed_mu, self.fixed_beta):
            option = "--fixed-mu" if self.fixed_mu == 0 else "--fixed-beta"
            raise UsageError(f"{option} 0 would leave the seed as it is: give more, or pass --diffusion none")

    @property
    def walk_features(self) -> tuple[int, ...]:
        """What the transitions are made from: 0 is the image, 1 to 4 are layer1 to layer4."""
        if self.model == "sim-deeplab" or self.diffusion == "none":
            return ()
        return self.walks if self.transitions == "hierarchical" else self.walks[-1:]

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.output_dir or f"runs/{self.dataset}-{self.model}-{self.seed_model or self.backbone}")

    @property
    def branches(self) -> list[tuple[str, str]]:
        """Of each branch that there is the network, and where its weights come from."""
        first, second = self.seed_model or self.backbone, self.similarity_backbone or self.backbone
        sources = self.weights_backbone.split(",") if second != first else [self.weights_backbone]
        both = [(first, sources[0]), (second, sources[-1])]
        # The image alone needs no second branch.
        return both if any(walk > 0 for walk in self.walk_features) else both[:1]

    @property
    def networks(self) -> str:
        """Names of the branches' networks, for a line."""
        return " and ".join(dict.fromkeys(name for name, _ in self.branches))

    @property
    def weight_files(self) -> list[str]:
        """The files of weights that a run starts from."""
        sources = dict.fromkeys(source for _, source in self.branches if source not in ("none", "hub"))
        return [*sources] if self.init_from is None else [self.init_from]

    def as_dict(self) -> dict[str, Any]:
        """Values that YAML and JSON know; `Config.from_dict` takes them back."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], origin: str) -> "Config":
        """Take back a saved config; `origin` names where it was saved, for messages."""
        checked = _checked(values, origin)
        absent = [
            field.name for field in dataclasses.fields(cls) if _required(field) and field.name not in checked
        ]
        if absent:
            raise UsageError(f"{origin} lacks {', '.join(absent)}: it was not written by this program")
        return cls(**checked)


_FIELDS = {field.name: field for field in dataclasses.fields(Config)}
_HINTS = get_type_hints(Config, include_extras=True)


def resolve(flags: Mapping[str, Any], config_file: Path | None) -> Config:
    """Merge recipe < config file < flags; keys whose value is None are not given."""
    file = {} if config_file is None else _checked(_read_yaml(config_file), str(config_file))
    given = _checked(flags, "the command line")
    # A saved config names every option, with use or without; whoever gives a flag wants it to do something.
    if given.get("model", file.get("model")) == "sim-deeplab":
        for key in (*_OF_WALKS, "grid_stride", "diffusion", "fixed_mu", "fixed_beta", "importance"):
            if key in given:
                raise UsageError(
                    f"{_flag(key, given[key])} belongs to --model difnet: sim-deeplab has no walks and no "
                    "importance"
                )
    if given.get("diffusion", file.get("diffusion")) == "none":
        for key in _OF_WALKS:
            if key in given:
                raise UsageError(f"{_flag(key)} belongs to --diffusion cascade or exact: none has no walks")
    if "aspp" in given and given.get("seed_model", file.get("seed_model")):
        raise UsageError(
            f"{_flag('aspp', given['aspp'])} has no use with --seed-model, which has a head of its own"
        )
    dataset = given.get("dataset") or file.get("dataset") or Config.dataset
    values: dict[str, Any] = {}
    for layer in (_chosen_recipe(dataset, given, file), _OF_DATASET.get(dataset, {}), file, given):
        if "epochs" in layer and "max_steps" in layer:
            raise UsageError("--epochs and --max-steps both give the length of the run: give one of them")
        if "epochs" in layer or "max_steps" in layer:
            values.pop("epochs", None)
            values.pop("max_steps", None)
        if "init_from" in layer or "weights_backbone" in layer:
            values.pop("init_from", None)
            values.pop("weights_backbone", None)
        values.update(layer)
    if "weights_backbone" not in values and "init_from" in values:
        values["weights_backbone"] = "none"
    if "weights_backbone" not in values:
        # The one choice with data of one's own that has no safe default.
        raise UsageError(
            "--weights-backbone is not given: name a file of ImageNet weights, 'hub' to fetch timm's, "
            "or 'none' to start from random weights; or name another run's weights as --init-from"
        )
    return Config(**values)


def with_config_options(run: Callable[..., None]) -> Callable[..., None]:
    """Turn `run(config, *, ...)` into a function whose signature typer reads as the full command line.

    The options are the fields of `Config`, `--config FILE`, and the keyword arguments of `run` itself.
    """
    recipes = {name: _recipe(name) for name in dict.fromkeys((*RECIPES.values(), *_CHOICES))}
    own = [p for p in inspect.signature(run, eval_str=True).parameters.values() if p.kind is p.KEYWORD_ONLY]

    @functools.wraps(run)
    def command(**values: Any) -> None:
        file = values.pop("config")
        rest = {parameter.name: values.pop(parameter.name) for parameter in own}
        run(resolve(values, file), **rest)

    parameters = [_parameter(name, *_cli_type_and_option(name, recipes)) for name in _FIELDS]
    help_text = (
        "YAML file of options, under their names with _ for -; flags come before it, it before the recipe."
    )
    parameters.append(_parameter("config", Path | None, _option(help_text)))
    # typer asks inspect for the signature, and wraps() would lead it on to the undecorated function.
    command.__signature__ = inspect.Signature(parameters + own)  # type: ignore[attr-defined]
    command.__annotations__ = {}
    return command


def _parameter(name: str, annotation: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation, option]
    )


def _cli_type_and_option(name: str, recipes: dict[str, dict[str, Any]]) -> tuple[Any, Any]:
    """A field's type on the command line, None being not given; its option, the default in its help."""
    annotated, option = get_args(_HINTS[name])
    field = _FIELDS[name]
    fallback = {} if _required(field) or field.default is None else {name: field.default}
    shown = {
        key: _shown((fallback | recipe)[name]) for key, recipe in recipes.items() if name in fallback | recipe
    }
    if len(shown) == len(recipes) and len(set(shown.values())) == 1:
        default = f" [default: {next(iter(shown.values()))}]"
    elif shown:
        default = f" [default: {', '.join(f'{value} for {recipe}' for recipe, value in shown.items())}]"
    else:
        default = ""
    option = copy.copy(option)
    option.help += default
    return (str if name == "walks" else annotated) | None, option


def _required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (tuple, list)):
        return (" " if isinstance(value[0], float) else ",").join(str(part) for part in value)
    return str(value)


def _chosen_recipe(dataset: str, given: Mapping[str, Any], file: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's values, and the recipe itself where there was a choice."""
    asked = given.get("recipe") or file.get("recipe")
    if asked != (file.get("recipe") or asked):
        raise UsageError(
            f"--recipe {asked}: the file of --config says {file['recipe']}, and gives its values"
        )
    if RECIPES[dataset] not in _CHOICES:
        if asked:
            raise UsageError(f"--recipe {asked} has no use with --dataset {dataset}, which has its own")
        return _recipe(RECIPES[dataset])
    return {"recipe": asked or RECIPES[dataset]} | _recipe(asked or RECIPES[dataset])


def _recipe(name: str) -> dict[str, Any]:
    # In a checkout the recipes lie beside the package, in a wheel inside it.
    package = Path(__file__).parent
    folder = next(place for place in (package / "configs", package.parent / "configs") if place.is_dir())
    file = folder / f"{name}.yaml"
    return _checked(_read_yaml(file), str(file))


def _read_yaml(file: Path) -> Mapping[str, Any]:
    if not file.is_file():
        raise UsageError(f"--config {file}: no such file")
    try:
        values = yaml.safe_load(file.read_text())
    except yaml.YAMLError as fault:
        raise UsageError(f"{file} is not YAML: {' '.join(str(fault).split())}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{file}: expected lines of the form `key: value`")
    return values


def _checked(values: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Values of known keys in their types and bounds; None is dropped."""
    checked = {}
    for key, value in values.items():
        if key not in _FIELDS:
            nearest = difflib.get_close_matches(str(key).replace("-", "_"), _FIELDS, n=1, cutoff=0)[0]
            raise UsageError(f"{origin}: unknown option {key!r}; the nearest one is {nearest!r}")
        if value is not None:
            checked[key] = _typed(key, value, origin)
    return checked


def _typed(key: str, value: Any, origin: str) -> Any:
    annotated, option = get_args(_HINTS[key])
    if get_origin(annotated) in (Union, UnionType):
        annotated = next(part for part in get_args(annotated) if part is not NoneType)
    fault = UsageError(f"{origin}: {key} is {value!r}, expected {_expected(annotated, option)}")
    if get_origin(annotated) is Literal:
        # YAML reads 32 as a number.
        value = str(value)
        if value not in get_args(annotated):
            raise fault
        return value
    if get_origin(annotated) is tuple:
        parts = value.split(",") if isinstance(value, str) else value
        kind, second = get_args(annotated)
        try:
            result = tuple(kind(part) for part in parts)
        except (TypeError, ValueError):
            raise fault from None
        if second is not Ellipsis and len(result) != len(get_args(annotated)):
            raise fault
        return result
    if annotated is float and not isinstance(value, bool):
        # YAML 1.1 reads 1e-3, which has no point, as text.
        try:
            value = float(value)
        except (TypeError, ValueError):
            raise fault from None
    if not isinstance(value, annotated) or (annotated is int and isinstance(value, bool)):
        raise fault
    if (option.min is not None and not value >= option.min) or (
        option.max is not None and not value <= option.max
    ):
        raise fault
    return value


def _expected(annotated: Any, option: Any) -> str:
    if get_origin(annotated) is Literal:
        return f"one of {', '.join(get_args(annotated))}"
    if get_origin(annotated) is tuple:
        return "two numbers" if get_args(annotated)[0] is float else "whole numbers such as 0,2,4"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    low = "" if option.min is None else f" of at least {option.min}"
    high = "" if option.max is None else f" and at most {option.max}"
    return names[annotated] + low + high


def _flag(key: str, value: Any = None) -> str:
    return ("--no-" if value is False else "--") + key.replace("_", "-")
