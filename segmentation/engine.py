"""What training and evaluation share: building from a config, the loss, one scoring, the walks' health."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

import graphdiff as gd
from segmentation.config import Config
from segmentation.data import VOID, SegmentationDataset
from segmentation.data.coco import CocoDataset
from segmentation.data.context import ContextDataset
from segmentation.data.sbd import VOCAugDataset
from segmentation.data.shapes import ShapesDataset
from segmentation.data.voc import VOCDataset
from segmentation.errors import UsageError
from segmentation.metrics import ConfusionMatrix, Scores
from segmentation.models import DifNet, SimDeepLab

Model = DifNet | SimDeepLab
Loader = DataLoader[tuple[Tensor, Tensor]]


def pick_device(name: str) -> torch.device:
    """The device called "auto", "cpu" or "cuda"; auto is CUDA where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here; pass --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


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
    return DifNet(config.backbone, num_classes, config.aspp, config.walks, config.grid_stride)


def total_steps(config: Config, images: int) -> int:
    """Length of a run in steps; images left over at an epoch's end, too few for a batch, are dropped."""
    steps_per_epoch = images // config.batch_size
    if steps_per_epoch == 0:
        raise UsageError(
            f"--train-split {config.train_split} holds {images} images, fewer than a batch of "
            f"{config.batch_size}: lower --batch-size"
        )
    return config.max_steps or (config.epochs or 0) * steps_per_epoch


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


def parameter_groups(model: Model, fresh_parts: frozenset[str], config: Config) -> list[dict[str, Any]]:
    """SGD's groups: pretrained or fresh, with or without weight decay, and one of their own for µ_t and β_t.

    Args:
        model: the model.
        fresh_parts: parts of its backbones that do not start from pretrained weights.
        config: gives the rates and the decay.

    Returns:
        Five groups, the first ones at the base rate and possibly empty.
    """
    coefficients = list(model.cascade.coefficients()) if isinstance(model, DifNet) else []
    pretrained = {
        parameter
        for backbone in model.backbones
        for name, parameter in backbone.named_parameters()
        if name.split(".")[0] not in fresh_parts
    }
    norms = {p for module in model.modules() if isinstance(module, _BatchNorm) for p in module.parameters()}
    others = [parameter for parameter in model.parameters() if all(parameter is not c for c in coefficients)]
    groups: list[dict[str, Any]] = [
        {
            "name": f"{'pretrained' if from_file else 'fresh'}{'' if decayed else ', batch norm'}",
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


def segmentation_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Mean cross-entropy over the pixels that are not void; 0 for a batch that is void throughout.

    Args:
        logits: [B, K, H, W].
        label: int64 [B, H, W].
    """
    total = F.cross_entropy(logits, label, ignore_index=VOID, reduction="sum")
    return total / (label != VOID).sum().clamp(min=1)


@torch.no_grad()
def evaluate(
    model: Model, loader: Loader, num_classes: int, interrupted: Callable[[], bool] = lambda: False
) -> Scores | None:
    """Score a split at the images' own sizes with one confusion matrix; void and padding do not count.

    Args:
        model: left in the mode it was in.
        loader: gives one image at a time, padded right and below, with its label unpadded.
        num_classes: of the data.
        interrupted: asked before each image; True ends the scoring.

    Returns:
        The scores, or None if interrupted.
    """
    device = next(model.parameters()).device
    matrix = ConfusionMatrix(num_classes, device)
    was_training = model.training
    model.eval()
    try:
        for image, label in loader:
            if interrupted():
                return None
            height, width = label.shape[-2:]
            logits = model(image.to(device))[..., :height, :width]
            matrix.update(logits.argmax(1), label.to(device))
    finally:
        model.train(was_training)
    return matrix.compute()


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
    """DifNet's own columns of metrics.csv: of each walk µ, β, and the health of its P_t.

    `diagonal` is the median diagonal of P_t: near 1, the walk moves nothing. `hub` is its largest column
    mass, Σ_i P_ij / N: near 1, the walk sends every node to one. Both are means over the loader's images.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    seen = [torch.stack([_health(P) for P in model.transitions(image.to(device))]) for image, _ in loader]
    model.train(was_training)
    health = torch.stack(seen).mean(0)
    columns = {
        "mu": model.cascade.mu,
        "beta": model.cascade.beta,
        "diagonal": health[:, 0],
        "hub": health[:, 1],
    }
    return {
        f"{name}_{t}": float(v)
        for name, values in columns.items()
        for t, v in zip(model.walks, values, strict=True)
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
