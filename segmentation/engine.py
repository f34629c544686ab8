"""What training and evaluation share: building from a config, the loss, one scoring, the walks' health."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

import graphdiff as gd
from segmentation import processes
from segmentation.config import Config
from segmentation.data import VOID, SegmentationDataset
from segmentation.data.coco import CocoDataset
from segmentation.data.context import ContextDataset
from segmentation.data.sbd import VOCAugDataset
from segmentation.data.shapes import ShapesDataset
from segmentation.data.voc import VOCDataset
from segmentation.errors import UsageError
from segmentation.metrics import ConfusionMatrix, Scores
from segmentation.models import DifNet, SimDeepLab, backbone, fcn

Model = DifNet | SimDeepLab
Loader = DataLoader[tuple[Tensor, Tensor]]


def pick_device(name: str) -> torch.device:
    """The device called "auto", "cpu" or "cuda"; auto is CUDA where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here; pass --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def check_device(config: Config, device: torch.device, count: int) -> None:
    """Refuse what a device, or a number of processes, cannot do."""
    on_cpu = device.type == "cpu"
    if config.precision == "16" and on_cpu:
        raise UsageError("--precision 16 needs a GPU: on a CPU pass --precision bf16, or 32")
    if config.precision == "bf16" and not on_cpu and not torch.cuda.is_bf16_supported():
        raise UsageError("--precision bf16: this GPU has no bfloat16; pass --precision 16, or 32")
    if config.bn == "sync" and on_cpu:
        raise UsageError("--bn sync needs GPUs: on a CPU pass --bn train, or frozen with pretrained weights")
    if config.bn == "sync" and count == 1:
        raise UsageError(
            "--bn sync needs several processes: start them by torchrun --nproc_per_node=N -m "
            "segmentation.train ..., or pass --bn train"
        )
    if config.batch_size % (count * config.grad_accum_steps):
        raise UsageError(
            f"--batch-size {config.batch_size} is for all {count} processes together, each of which takes "
            f"{config.grad_accum_steps} equal pieces: give a multiple of {count * config.grad_accum_steps}"
        )
    at_once = config.batch_size // (config.grad_accum_steps * (1 if config.bn == "sync" else count))
    if at_once == 1 and str(config.seed_model).startswith("deeplabv3"):
        raise UsageError(
            f"--seed-model {config.seed_model} normalises what it pools to one pixel, and cannot learn from "
            "one image at a time: raise --batch-size, or lower --grad-accum-steps"
        )
    if config.deterministic and not on_cpu and {0, 1} & set(config.walk_features):
        raise UsageError(
            "--deterministic: walks 0 and 1 pool adaptively, which has no deterministic gradient on a GPU; "
            "pass --walks 2,3,4, --model sim-deeplab or --device cpu"
        )


def use_deterministic(wanted: bool) -> None:
    """Let torch take only algorithms that give the same bits each time, or any."""
    if wanted:
        # cuBLAS reads it when it starts, and refuses to be deterministic without it.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)


def build_dataset(config: Config, split: str) -> SegmentationDataset:
    """One split of the config's data set."""
    if config.dataset == "shapes":
        return ShapesDataset(split)
    assert config.data_path is not None  # Config refuses the others without it
    in_folders: dict[str, Callable[[str, str], SegmentationDataset]] = {
        "voc": VOCDataset,
        "voc-aug": VOCAugDataset,
        "context": ContextDataset,
        "coco": CocoDataset,
    }
    return in_folders[config.dataset](config.data_path, split)


def build_model(config: Config, num_classes: int) -> Model:
    """The config's model with random weights."""
    if config.model == "sim-deeplab":
        return SimDeepLab(config.backbone, num_classes, config.aspp)
    return DifNet(
        config.backbone if config.seed_model is None else fcn.seed_model(config.seed_model, num_classes),
        num_classes,
        None if config.diffusion == "none" else config.similarity_backbone or config.backbone,
        aspp=config.aspp,
        walks=config.walks,
        grid_stride=config.grid_stride,
        affinity_scale=config.affinity_scale,
        diffusion=config.diffusion,
        transitions=config.transitions,
        fixed_mu=config.fixed_mu,
        fixed_beta=config.fixed_beta,
        importance=config.importance,
    )


def branch_parts(config: Config) -> list[tuple[str, ...]]:
    """Of each branch the parts that its weights are told by, in order."""
    return [fcn.PARTS if name == config.seed_model else backbone.parts(name) for name, _ in config.branches]


def start_branches(model: Model, config: Config) -> list[frozenset[str]]:
    """Start each branch from the config's weights; return the parts of it that start fresh."""
    return [
        (fcn if name == config.seed_model else backbone).load_pretrained(network, name, source)
        for network, (name, source) in zip(model.backbones, config.branches, strict=True)
    ]


def steps_per_epoch(config: Config, images: int) -> int:
    """Whole batches in a split, or --limit-train-batches; images left over at an epoch's end are dropped."""
    steps = images // config.batch_size
    if steps == 0:
        raise UsageError(
            f"--train-split {config.train_split} holds {images} images, fewer than a batch of "
            f"{config.batch_size}: lower --batch-size"
        )
    return min(steps, config.limit_train_batches or steps)


@dataclass
class Position:
    """Where a run stands, beside its weights.

    Args:
        step: steps done.
        best_miou: best score so far, in [0, 1].
        evaluation_due: whether this step is to be scored before the next.
        loss_sum: of the steps since the last scoring.
        loss_steps: how many those are.
    """

    step: int = 0
    best_miou: float = -1.0
    evaluation_due: bool = False
    loss_sum: float = 0.0
    loss_steps: int = 0


def parameter_groups(
    model: Model, fresh_parts: Sequence[frozenset[str]], config: Config
) -> list[dict[str, Any]]:
    """SGD's groups: pretrained or fresh, with or without weight decay, and one of their own for µ_t and β_t.

    Args:
        model: the model.
        fresh_parts: of each of its backbones, the parts that do not start from pretrained weights.
        config: gives the rates and the decay.

    Returns:
        Five groups, the first ones at the base rate and possibly empty.
    """
    walks = model.cascade if isinstance(model, DifNet) else None
    coefficients = [] if walks is None else list(walks.coefficients())
    pretrained = {
        parameter
        for branch, fresh in zip(model.backbones, fresh_parts, strict=True)
        for name, parameter in branch.named_parameters()
        if name.split(".")[0] not in fresh
    }
    norms = {
        parameter
        for module in model.modules()
        if isinstance(module, (_BatchNorm, nn.LayerNorm, nn.GroupNorm))
        for parameter in module.parameters()
    }
    others = [parameter for parameter in model.parameters() if all(parameter is not c for c in coefficients)]
    groups: list[dict[str, Any]] = [
        {
            "name": f"{'pretrained' if from_file else 'fresh'}{'' if decayed else ', norm'}",
            "params": [p for p in others if (p in pretrained) == from_file and (p not in norms) == decayed],
            "lr": config.lr * (1 if from_file else config.head_lr_mult),
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        for from_file in (True, False)
        for decayed in (True, False)
    ]
    return [
        *groups,
        {"name": "µ, β", "params": coefficients, "lr": config.lr * config.head_lr_mult, "weight_decay": 0.0},
    ]


def summed_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy summed over the pixels that are not void.

    Args:
        logits: [B, K, H, W].
        label: int64 [B, H, W].
    """
    if torch.are_deterministic_algorithms_enabled():
        # On a GPU only the loss of a list of pixels is deterministic, not that of a map.
        logits, label = logits.movedim(1, -1).flatten(0, -2), label.flatten()
    return F.cross_entropy(logits, label, ignore_index=VOID, reduction="sum")


@torch.no_grad()
def evaluate(
    model: Model,
    loader: Loader,
    num_classes: int,
    interrupted: Callable[[], bool] = lambda: False,
    seen: Callable[[Model, Tensor], Tensor] | None = None,
) -> Scores | None:
    """Score a split at the images' own sizes with one confusion matrix; void and padding do not count.

    Where there are several processes, each scores the images its loader gives, and all get the sum.

    Args:
        model: left in the mode it was in.
        loader: gives one image at a time, padded right and below, with its label unpadded.
        num_classes: of the data.
        interrupted: asked before each image; True, in any process, ends the scoring.
        seen: gives a model's logits of images that are not padded; the model's own of padded ones if None.

    Returns:
        The scores, or None if interrupted.
    """
    device = next(model.parameters()).device
    matrix = ConfusionMatrix(num_classes, device)
    was_training = model.training
    stopped = False
    model.eval()
    try:
        for image, label in loader:
            stopped = interrupted()
            if stopped:
                break
            height, width = label.shape[-2:]
            image = image.to(device)
            if seen is None:
                logits = model(image)[..., :height, :width]
            else:
                logits = seen(model, image[..., :height, :width])
            matrix.update(logits.argmax(1), label.to(device))
    finally:
        model.train(was_training)
    return None if processes.any_of(stopped, device) else matrix.compute()


def metrics_row(
    at: Position, epoch: float, lr: float, images_per_second: float, scores: Scores
) -> dict[str, Any]:
    """The columns of metrics.csv that every model has.

    Scores lie in [0, 1]; `loss` is the mean since the last scoring, `lr` the base rate of the step to come.
    """
    return {
        "step": at.step,
        "epoch": round(epoch, 3),
        "loss": at.loss_sum / at.loss_steps if at.loss_steps else math.nan,
        "lr": lr,
        "miou": scores.miou,
        "majority_miou": scores.majority_miou,
        "pixel_accuracy": scores.pixel_accuracy,
        "mean_accuracy": scores.mean_accuracy,
        "fw_iou": scores.fw_iou,
        "images_per_second": images_per_second,
    }


@torch.no_grad()
def walk_columns(model: DifNet, loader: Loader) -> dict[str, float]:
    """DifNet's own columns of metrics.csv: of each step of its diffusion µ, β, and the health of its P_t.

    `diagonal` is the median diagonal of P_t: near 1, the walk moves nothing. `hub` is its largest column
    mass, Σ_i P_ij / N: near 1, the walk sends every node to one. Both are means over the loader's images.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    seen = []
    for image, _ in loader if model.steps else ():
        walks = model.transitions(image.to(device))
        # Steps may share one P.
        healths = {P: _health(P) for P in dict.fromkeys(walks)}
        seen.append(torch.stack([healths[P] for P in walks]))
    model.train(was_training)
    columns = dict(model.coefficients)
    if seen:
        columns["diagonal"], columns["hub"] = torch.stack(seen).mean(0).T
    return {
        f"{name}_{step}": float(value)
        for name, values in columns.items()
        for step, value in zip(model.steps, values, strict=True)
    }


def _health(P: gd.Transition, rows: int = 512) -> Tensor:
    """(median diagonal, largest column mass) of P [1, N, N], from so many rows at a time."""
    nodes = P.shape[-1]
    diagonal = []
    columns = torch.zeros(nodes, device=P.device)
    for start in range(0, nodes, rows):
        index = torch.arange(start, min(start + rows, nodes), device=P.device)
        block = P.rows(index)[0]
        diagonal.append(block.gather(1, index[:, None]).squeeze(1))
        columns += block.sum(0)
    return torch.stack([torch.cat(diagonal).median(), columns.max() / nodes])
