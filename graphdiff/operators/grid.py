"""Walks on the pixels of an image."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from graphdiff import checks
from graphdiff.operators.sparse import SparseTransition


def grid_transition(image: Tensor, beta: float = 90.0, connectivity: int | None = None) -> SparseTransition:
    r"""The reversible walk between neighbouring pixels that are alike.

    .. math:: P_{ij} \propto w_{ij} = \exp(-\beta \lVert I_i - I_j \rVert^2)

    Node `r * W + c` is the pixel in row r and column c; in a volume `(z * H + r) * W + c`. Rows are
    normalised in the log domain, so that a walk leaves even a pixel that is like none of its neighbours; an
    image of one pixel stays where it is.

    Args:
        image: I, shape [C, H, W] or [C, D, H, W], taken as given: for colours between 0 and 1 the default of
            `beta` is usual.
        beta: β ≥ 0, in units of 1/I²; 0 makes all neighbours alike.
        connectivity: 4 neighbours, or 8 with the diagonal ones; in a volume 6 or 26. The smaller if None.

    Returns:
        A `SparseTransition` on H·W or D·H·W nodes in the image's dtype, differentiable in `image`.

    Raises:
        TypeError: `image` is not a floating-point tensor.
        ValueError: `image` is not [C, H, W] or [C, D, H, W], empty or not finite, β is negative, or
            `connectivity` another number.

    Example:
        >>> import torch, graphdiff as gd
        >>> P = gd.grid_transition(torch.tensor([[[0.0, 0.0, 1.0]]]), beta=1.0)
        >>> P.dense()
        tensor([[0.0000, 1.0000, 0.0000],
                [0.7311, 0.0000, 0.2689],
                [0.0000, 1.0000, 0.0000]])
    """
    image = checks.floating(image, "image")
    if image.ndim not in (3, 4) or image.numel() == 0:
        raise ValueError(
            f"image: expected shape [C, H, W] or [C, D, H, W], not empty, got {checks.shape_text(image)}"
        )
    checks.finite(image, "image")
    beta = checks.nonnegative_number(beta, "beta")
    least = torch.finfo(image.dtype).min

    def log_weight(distance: Tensor, steps: Tensor) -> Tensor:
        # As far as the image's dtype can tell: infinitely unlike every neighbour is equally unlike all.
        return (-beta * distance).clamp(min=least)

    return grid_walk(image, log_weight, connectivity)


def grid_walk(
    image: Tensor,
    log_weight: Callable[[Tensor, Tensor], Tensor],
    connectivity: int | None = None,
    kept: Tensor | None = None,
) -> SparseTransition:
    """The walk between neighbouring pixels with weights of their squared distances in colour.

    Args:
        image: [C, H, W] or [C, D, H, W].
        log_weight: From ‖I_i − I_j‖² [N, steps] and the steps from i to j [steps, 2 or 3] to log w_ij. In
            float64 where the device has it.
        connectivity: Neighbours of a pixel: 4 or 8 in an image, 6 or 26 in a volume; the smaller if None.
        kept: Which pixels have neighbours, bool [N]; all if None. The walk stays at a pixel without any.
    """
    sides, device = image.shape[1:], image.device
    steps = torch.tensor(_steps(len(sides), connectivity), device=device)
    nodes = sides.numel()
    node = torch.arange(nodes, device=device)
    strides = torch.tensor([sides[i + 1 :].numel() for i in range(len(sides))], device=device)
    ends = torch.tensor(sides, device=device)
    places = (node.unsqueeze(-1) // strides % ends).unsqueeze(1) + steps
    inside = ((places >= 0) & (places < ends)).all(-1)
    target = torch.where(inside, (places * strides).sum(-1), 0)
    if kept is not None:
        inside = inside & kept.unsqueeze(-1) & kept[target]
    alone = ~inside.any(-1)
    target[alone, 0] = node[alone]
    inside[alone, 0] = True

    pixels = image.to(checks.widest(device)).flatten(1)
    distance = (pixels.unsqueeze(-1) - pixels[:, target]).square().sum(0)
    logits = log_weight(distance, steps).masked_fill(~inside, -torch.inf)
    numbers = torch.int32 if target.numel() < 2**31 else torch.int64
    indptr = torch.zeros(nodes + 1, dtype=numbers, device=device)
    indptr[1:] = inside.sum(-1).cumsum(0)
    return SparseTransition(
        indptr,
        target[inside].to(numbers),
        logits.softmax(-1)[inside].to(image.dtype),
        log_degree=logits.logsumexp(-1).to(image.dtype),
    )


def _steps(dimensions: int, connectivity: int | None) -> list[Sequence[int]]:
    """Steps to the neighbours along each axis, in the order of their node numbers."""
    every = [step for step in itertools.product((-1, 0, 1), repeat=dimensions) if any(step)]
    nearest = [step for step in every if sum(map(abs, step)) == 1]
    allowed = {len(nearest): nearest, len(every): every}
    if connectivity is None:
        return list(nearest)
    if connectivity not in allowed:
        few, many = allowed
        raise ValueError(f"connectivity: expected {few} or {many}, got {connectivity!r}")
    return list(allowed[connectivity])
